"""Which part of a parameter a view of it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from milpress.formats import Compressed
from milpress.torch._relayout import joined, stacked, transposed


@dataclass(frozen=True, slots=True, order=True)
class Part:
    """A matrix of a parameter, or some of its outputs; or the same of a kernel.

    Parameters
    ----------
    index
        Where it is along the axes in front of those of the matrix.
    begin, end
        Which outputs.
    axes
        Axes of outputs and inputs of the parameter.
    """

    index: tuple[int, ...]
    begin: int
    end: int
    axes: tuple[int, int]

    def of(self, parameter: Tensor) -> Tensor:
        """Return the part of a parameter, outputs first: a view of it."""
        matrix = parameter.detach()[self.index]
        matrix = matrix.mT if self.axes[0] > self.axes[1] else matrix
        return matrix[self.begin : self.end]

    def meets(self, other: Part) -> bool:
        """Whether both have elements in common, or inputs along different axes."""
        is_apart = self.index != other.index or self.end <= other.begin or other.end <= self.begin
        return self.axes != other.axes or not is_apart

    def is_whole(self, parameter: Tensor) -> bool:
        """Whether it is all of a parameter, as it is."""
        return self.axes == (0, 1) and (self.begin, self.end) == (0, parameter.shape[0])

    def name(self, parameter: Tensor) -> str:
        """Return what follows the name of the parameter."""
        has_all = self.end - self.begin == parameter.shape[self.axes[0]]
        return "".join(f"[{i}]" for i in self.index) + f"[{self.begin}:{self.end}]" * (not has_all)


def whole(parameter: Tensor) -> Part:
    """Return all of a parameter whose outputs come first."""
    return Part((), 0, parameter.shape[0], (0, 1))


def part_of(parameter: Tensor, view: Tensor) -> Part | None:
    """Return which part of a parameter a view is, outputs first.

    ``None`` if it is no such part, or has not all inputs of its outputs.
    """
    if view is parameter:
        return whole(parameter)
    rank = parameter.ndim
    offset = int(view.storage_offset()) - int(parameter.storage_offset())
    starts = _starts(parameter, offset)
    orders: list[tuple[int, ...]] = [(rank - 2, rank - 1), (rank - 1, rank - 2)]
    if view.ndim != 2:
        orders = [tuple(range(rank))] * (view.ndim == rank > 2)
    for axes in orders if starts else ():
        outputs, *others = axes
        begin, end = starts[outputs], starts[outputs] + view.shape[0]
        if (
            _steps(view, range(view.ndim)) == _steps(parameter, axes, view.shape)
            and end <= parameter.shape[outputs]
            and all(starts[axis] == 0 for axis in others)
            and view.shape[1:] == tuple(parameter.shape[axis] for axis in others)
        ):
            return Part(starts[: rank - view.ndim], begin, end, (outputs, others[0]))
    return None


def storage_of(tensor: Tensor) -> int | None:
    """Return what tells the memory of a tensor from that of others."""
    if tensor.layout is not torch.strided or tensor.is_meta:
        return None
    return int(tensor.untyped_storage()._cdata)


def _starts(parameter: Tensor, offset: int) -> tuple[int, ...]:
    """Return where along each axis an element is; empty for nowhere."""
    starts = [0] * parameter.ndim
    steps = parameter.stride()
    axes = [axis for axis, n in enumerate(parameter.shape) if n > 1]
    for axis in sorted(axes, key=steps.__getitem__, reverse=True):
        starts[axis], offset = divmod(offset, steps[axis])
    is_inside = offset == 0 and all(
        0 <= start < n for start, n in zip(starts, parameter.shape, strict=True)
    )
    return tuple(starts) if is_inside else ()


def _steps(tensor: Tensor, axes: Iterable[int], shape: Sequence[int] = ()) -> list[int]:
    """Return the strides along axes, 0 where there is but one element."""
    sizes = shape or [tensor.shape[axis] for axis in axes]
    return [tensor.stride(axis) * (n > 1) for axis, n in zip(axes, sizes, strict=True)]


def assembled(values: Mapping[Part, Compressed], shape: Sequence[int]) -> Compressed:
    """Return the value of a parameter of a shape, of those of all its parts.

    Raises
    ------
    UnsupportedError
        If parts of a matrix share scales or tables in such groups that it can have neither.
    """
    matrices = []
    outputs, inputs = next(iter(values)).axes
    for _, parts in groupby(sorted(values), key=lambda part: part.index):
        matrix = joined([values[part] for part in parts])
        matrices.append(transposed(matrix) if outputs > inputs else matrix)
    stack = tuple(shape[: min(outputs, inputs)])
    return stacked(matrices, stack) if stack else matrices[0]


def missing(parts: Iterable[Part], shape: Sequence[int]) -> Iterator[Part]:
    """Yield what a parameter of a shape has beside some of its parts."""
    known = sorted(parts)
    axes = known[0].axes
    for index in np.ndindex(*shape[: min(axes)]):
        begin = 0
        for part in (part for part in known if part.index == index):
            if part.begin > begin:
                yield Part(index, begin, part.begin, axes)
            begin = part.end
        if begin < shape[axes[0]]:
            yield Part(index, begin, shape[axes[0]], axes)
