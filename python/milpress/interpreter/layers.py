"""Layers with stored weights, and sums of their inputs for each element of the weight."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from milpress.interpreter.binding import Function, Step, operand_name
from milpress.interpreter.constants import Weight
from milpress.interpreter.ops.convolution import transposed_pairs, window_extents, window_pairs
from milpress.interpreter.products import BlockProducts, windows

# Of each op that multiplies one of its parameters by another: which by which. What the weights of
# recurrent layers are multiplied by is shown by these themselves.
_PARAMETERS = {
    "linear": {"weight": "x"},
    "conv": {"weight": "x"},
    "conv_transpose": {"weight": "x"},
    "matmul": {"y": "x", "x": "y"},
}
_RECURRENT = ("lstm", "gru", "rnn")


class InputSums(NamedTuple):
    """Sums over all positions at which a layer uses its weight.

    ``first`` and ``second`` are of the values that elements of the weight are multiplied by, and of
    their squares: of the weight's rank, each element for a block of the weight. ``n`` is how
    many outputs each output channel has.
    """

    first: NDArray[np.float64]
    second: NDArray[np.float64]
    n: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """An op that multiplies what the program computes by a stored weight.

    Parameters
    ----------
    prefix
        What the names of its model's values begin with.
    name
        The value that it computes, without the prefix; of a recurrent op, which has several
        weights, followed by the parameter.
    weight, shape
        Name of the weight, without the prefix, and its shape.
    input
        What it is multiplied by, with the prefix, as names of intermediate values have.
    kind
        Type of the op.
    parameter
        Which parameter of the op the weight is.
    settings
        Of the op.
    groups
        Equal parts of the weight's rows that are multiplied by an input of their own.
    """

    prefix: str
    name: str
    weight: str
    shape: tuple[int, ...]
    input: str
    kind: str
    parameter: str
    settings: dict[str, Any]
    groups: int = 1
    _known: dict[tuple[int, ...], list[Tensor]] = field(
        default_factory=dict, repr=False, compare=False
    )

    @property
    def key(self) -> tuple[Any, ...]:
        """What the sums depend on besides the input."""
        kernel = self.shape[2:] if self.kind.startswith("conv") else self._aligned(0)
        return (self.kind, self.parameter, kernel, self.groups, repr(self.settings))

    def sums(self, x: Tensor, mask: Tensor | None) -> InputSums:
        """Return the sums of one run.

        Parameters
        ----------
        x
            The layer's input.
        mask
            Of shape ``(batch, length)``: positions that count. Is applied where the input has these
            positions and they are not mixed by a kernel.
        """
        if self.kind.startswith("conv"):
            return self._windows(x, mask)
        if self.kind in _RECURRENT:
            parts = [self._channels(rows, (1, x.shape[-1])) for rows in _steps(x, mask)]
            first, second = (np.concatenate(each) for each in list(zip(*parts, strict=True))[:2])
            return InputSums(first, second, parts[0].n)
        other = _PARAMETERS[self.kind][self.parameter]
        rows = x.movedim(self._summed_axis(other), -1) if x.dim() > 1 else x
        return self._channels(_kept(rows, mask), self._aligned(rows.shape[-1]))

    @property
    def takes_feedback(self) -> bool:
        """Whether errors can be fed back to later columns of the weight."""
        return self.kind in ("linear", "conv", *_RECURRENT)

    def add_products(self, x: Tensor, mask: Tensor | None, products: BlockProducts) -> None:
        """Add the products of pairs of the values that elements of the weight are multiplied by.

        ``x`` and ``mask`` are as of `sums`; the products are of the layer's groups.
        """
        if self.kind == "linear":
            rows = _kept(x, mask)
            products.add(rows.reshape(1, -1, rows.shape[-1]))
            return
        if self.kind in _RECURRENT:
            products.add(torch.stack(list(_steps(x, mask))))
            return
        kernel, sizes = self.shape[2:], tuple(x.shape[2:])
        strides = self.settings.get("strides") or [1] * len(sizes)
        dilations = self.settings.get("dilations") or [1] * len(sizes)
        padding: list[int] = []
        for size, n_places, stride, dilation, before, n_outputs in self._geometry(sizes):
            end = (n_outputs - 1) * stride + dilation * (n_places - 1) + 1
            # Of the last axis first; what no window reaches is cut off.
            padding = [before, end - before - size, *padding]
        if mask is not None and all(size == 1 for size in kernel) and not any(padding):
            rows = _kept(x.movedim(1, -1).flatten(1, -2), mask)
            by_group = rows.reshape(-1, self.groups, rows.shape[-1] // self.groups)
            products.add(by_group.transpose(0, 1))
            return
        for part in windows(pad(x, padding), kernel, strides, dilations, self.groups):
            products.add(part)

    def _aligned(self, n: int) -> tuple[int, ...]:
        """Return the shape of sums for each input channel of a matrix."""
        shape = [1] * len(self.shape)
        shape[self._summed_axis(self.parameter)] = n
        return tuple(shape)

    def _summed_axis(self, parameter: str) -> int:
        """Return along which axis of a parameter a matrix product sums."""
        transposed = bool(self.settings.get(f"transpose_{parameter}"))
        return -2 if self.kind == "matmul" and transposed == (parameter == "x") else -1

    def _channels(self, rows: Tensor, shape: tuple[int, ...]) -> InputSums:
        wide = rows.reshape(-1, rows.shape[-1]).double()
        first, second = (
            total.numpy().reshape(shape) for total in (wide.sum(0), (wide * wide).sum(0))
        )
        return InputSums(first, second, len(wide))

    def _windows(self, x: Tensor, mask: Tensor | None) -> InputSums:
        kernel, n_channels = self.shape[2:], x.shape[1]
        is_transposed = self.kind == "conv_transpose"
        blocks = (n_channels, 1) if is_transposed else (self.groups, n_channels // self.groups)
        sizes = tuple(x.shape[2:])
        if sizes not in self._known:
            self._known[sizes] = [torch.from_numpy(reach) for reach in self._reaches(sizes)]
        reaches = self._known[sizes]
        is_pointwise = all(
            size == 1 and len(reach[0]) == reach[0].sum()
            for size, reach in zip(kernel, reaches, strict=True)
        )
        if mask is not None and is_pointwise:
            rows = x.movedim(1, -1).flatten(1, -2)
            return self._channels(_kept(rows, mask), (*blocks, *kernel))
        wide = x.double()
        totals = []
        for total in (wide.sum(0), (wide * wide).sum(0)):
            # Each turn takes away the first spatial axis and adds one of the kernel behind.
            for reach in reaches:
                total = torch.tensordot(total, reach, dims=([1], [1]))
            totals.append(total.numpy().reshape(*blocks, *kernel))
        n_outputs = math.prod(each[-1] for each in self._geometry(sizes))
        return InputSums(totals[0], totals[1], x.shape[0] * n_outputs)

    def _geometry(self, sizes: Sequence[int]) -> Iterator[tuple[int, int, int, int, int, int]]:
        """Yield size, kernel, stride, dilation, padding before and output size of each axis."""
        rank = len(sizes)
        settings = self.settings
        strides = settings.get("strides") or [1] * rank
        dilations = settings.get("dilations") or [1] * rank
        extents = window_extents(self.shape[2:], dilations)
        padding = settings.get("pad_type", "valid"), settings.get("pad")
        if self.kind == "conv":
            pairs = window_pairs(*padding, sizes, extents, strides)
            outputs = [
                (size + sum(pair) - extent) // stride + 1
                for size, pair, extent, stride in zip(sizes, pairs, extents, strides, strict=True)
            ]
        else:
            full = [
                (size - 1) * stride + extent
                for size, extent, stride in zip(sizes, extents, strides, strict=True)
            ]
            output_shape = settings.get("output_shape")
            pairs = transposed_pairs(*padding, sizes, full, strides, output_shape)
            outputs = [size - sum(pair) for size, pair in zip(full, pairs, strict=True)]
        befores = [before for before, _ in pairs]
        yield from zip(sizes, self.shape[2:], strides, dilations, befores, outputs, strict=True)

    def _reaches(self, sizes: Sequence[int]) -> Iterator[NDArray[np.float64]]:
        """Yield, for each axis, how often each place of the kernel meets each input."""
        for size, n_places, stride, dilation, before, n_outputs in self._geometry(sizes):
            places = np.arange(n_places)[:, None]
            reach = np.zeros((n_places, size))
            if self.kind == "conv":
                at = np.arange(n_outputs) * stride + places * dilation - before
                rows, columns = np.nonzero((at >= 0) & (at < size))
                np.add.at(reach, (rows, at[rows, columns]), 1)
            else:
                at = np.arange(size) * stride + places * dilation - before
                reach += (at >= 0) & (at < n_outputs)
            yield reach


def _kept(rows: Tensor, mask: Tensor | None) -> Tensor:
    """Return the rows along the last axis that a mask keeps, if it is a mask of these rows."""
    if mask is not None and rows.shape[:-1] in (mask.shape, (mask.numel(),)):
        return rows.reshape(-1, rows.shape[-1])[mask.reshape(-1)]
    return rows


def _steps(x: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
    """Yield the rows of each block of what a recurrent layer shows, whose steps come first."""
    for block in x:
        yield _kept(block, None if mask is None else mask.T).reshape(-1, block.shape[-1])


def layers(prefix: str, function: Function) -> Iterator[Layer]:
    """Yield the layers of a function whose weight is stored and whose input is computed."""
    computed = {slot: name for name, (slots, _) in function.watchable.items() for slot in slots}
    for step in function.block.all_steps():
        value = computed[step.writes[0][0]] if step.writes else ""
        settings = {
            name: item for name, item in step.settings.items() if not isinstance(item, Tensor)
        }
        for parameter, weight, given in _products_of(step, value, computed):
            shape = _stored_shape(function.stored[weight])
            if weight in function.names and len(shape) >= 2:
                yield Layer(
                    prefix=prefix,
                    name=given if step.kind in _RECURRENT else value,
                    weight=function.names[weight],
                    shape=shape,
                    input=prefix + given,
                    kind=step.kind,
                    parameter=parameter,
                    settings=settings,
                    groups=_groups(step, parameter),
                )


def _products_of(
    step: Step, value: str, computed: dict[int, str]
) -> Iterator[tuple[str, int, str]]:
    """Yield each parameter that is multiplied, its slot, and the name of the other factor."""
    for parameter, other in _PARAMETERS.get(step.kind, {}).items():
        weight, given = step.reads.get(parameter), step.reads.get(other)
        if isinstance(weight, int) and isinstance(given, int) and given in computed:
            yield parameter, weight, computed[given]
    for parameter in step.operands:
        weight = step.reads.get(parameter)
        if isinstance(weight, int):
            yield parameter, weight, operand_name(value, parameter)


def _groups(step: Step, parameter: str) -> int:
    if (step.kind, parameter) == ("gru", "weight_hh"):
        return 3
    return int(step.settings.get("groups") or 1)


def _stored_shape(stored: Any) -> tuple[int, ...]:
    if isinstance(stored, Weight):
        kind = stored.node.type
        return () if kind is None else kind.fixed_shape
    return tuple(stored.shape) if isinstance(stored, Tensor) else ()
