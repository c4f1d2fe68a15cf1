"""Rounding with error feedback: GPTQ and SparseGPT, onto integers, lookup tables and zeros.

What rounding a column of a weight does to the output of its layer is made up for, as well as the
inputs allow, by the columns that are rounded later (Frantar et al. 2022, arXiv 2210.17323; Frantar
and Alistarh 2023, arXiv 2301.00774).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

import milpress._core as _core
from milpress.errors import ConfigError
from milpress.formats.factor import Factor, FeedbackConfig, factor_bytes, factorize
from milpress.formats.joint import Compressed, Masked, Treatment, masked
from milpress.formats.palette import KMeans, Palette, PalettizeConfig, Uniform
from milpress.formats.palette import palettize as palettize_nearest
from milpress.formats.quantized import Blocks, PerBlock, PerTensor, QuantizeConfig, Quantized
from milpress.formats.rows import Floats, frozen
from milpress.formats.sparse import PruneConfig, Sparse, sparsify

__all__ = [
    "Factor",
    "Factors",
    "FeedbackConfig",
    "compress",
    "factor_bytes",
    "factorize",
    "fits",
    "palettize",
    "power_of_inputs",
    "prune",
    "quantize",
    "suits",
]

_F32: TypeAlias = NDArray[np.float32]
# One of all columns, or one for each block of them, in their order: errors stay within blocks.
Factors: TypeAlias = Factor | Sequence[Factor]
_Rounded: TypeAlias = tuple[_F32, NDArray[np.uint8], _F32, NDArray[np.uint8]]


def power_of_inputs(factor: Factors, shape: tuple[int, ...]) -> _F32:
    """Return what an error of each element of a weight counts, if it is not fed back."""
    power = np.concatenate([part.power for part in _parts(factor)], axis=1)
    rows = np.repeat(power, shape[0] // len(power), axis=0)
    greatest = float(rows.max())
    rows = rows / greatest if greatest > 0 else np.ones_like(rows)
    return np.ascontiguousarray(rows.reshape(shape), np.float32)


def fits(factor: Factors, treatment: Treatment) -> bool:
    """Whether no n:m run of a treatment crosses the blocks of columns of factors."""
    runs = treatment.n_m if isinstance(treatment, PruneConfig) else None
    return runs is None or all(begin % runs[1] == 0 for begin in _begins(factor))


def _parts(factor: Factors) -> tuple[Factor, ...]:
    return (factor,) if isinstance(factor, Factor) else tuple(factor)


def _begins(factor: Factors) -> list[int]:
    widths = [part.power.shape[1] for part in _parts(factor)]
    return [0, *accumulate(widths[:-1])]


def suits(weight: Any, treatment: Treatment) -> bool:
    """Whether errors of a treatment can be fed back: of a dense or pruned weight, to single values.

    Output channels are the weight's first axis, input channels its second one.
    """
    if isinstance(weight, Sparse):
        return not isinstance(treatment, PruneConfig)
    if not isinstance(weight, np.ndarray):
        return False
    if isinstance(treatment, PalettizeConfig):
        return treatment.vector_size == 1 and isinstance(treatment.table, (KMeans, Uniform))
    if isinstance(treatment, QuantizeConfig):
        return not isinstance(treatment.granularity, Blocks)
    if treatment.n_m is not None:
        return treatment.axis in (None, 1)
    return treatment.sparsity is not None and treatment.block_size is None


def compress(
    weight: Floats | Sparse,
    treatment: Treatment,
    factor: Factors,
    config: FeedbackConfig | None = None,
    *,
    importance: Any = None,
) -> Compressed:
    """Do what `milpress.formats.compress` does, with error feedback, where it `suits`.

    Parameters
    ----------
    weight
        A dense weight, or a pruned one, whose zeros stay.
    treatment
        What to do.
    factor, config
        What is known of the inputs, all together or in blocks of columns, and how errors are fed
        back.
    importance
        Weight of each element in the squared error that tables make least; ``None`` takes the power
        of the inputs.
    """
    kept = weight.mask() if isinstance(weight, Sparse) else None
    dense = weight.dense() if isinstance(weight, Sparse) else weight
    if isinstance(treatment, PruneConfig):
        return prune(dense, treatment, factor, config)
    if isinstance(treatment, QuantizeConfig):
        return quantize(dense, treatment, factor, config, kept=kept)
    share = power_of_inputs(factor, dense.shape) if importance is None else importance
    share = share if kept is None else share * kept
    tables = palettize_nearest(dense, treatment, importance=share)
    return palettize(dense, tables, factor, config, kept=kept)


def quantize(
    weight: Floats,
    treatment: QuantizeConfig,
    factor: Factors,
    config: FeedbackConfig | None = None,
    *,
    pruning: PruneConfig | None = None,
    kept: NDArray[np.bool_] | None = None,
    bits: int | None = None,
    representable: Callable[[_F32], _F32] | None = None,
) -> Quantized | Masked:
    """Replace a weight by integer codes with a scale for each block, with error feedback.

    A range is that of coremltools' ``LayerwiseCompressor``: ``2**bits`` codes from the least to the
    greatest weight, or from minus to plus the greatest magnitude; with ``range="mse"`` the one that
    `milpress.formats.quantize` finds. Blocks get theirs when it is their turn, so that it suits
    what was fed back; in activation order all have it from the weight as it was.

    Parameters
    ----------
    weight
        float16 or float32; output channels are its first axis, input channels its second one.
    treatment
        What to round to: per tensor, per channel, or per block of input channels.
    factor, config
        What is known of the inputs, and how errors are fed back.
    pruning
        Which weights become zero besides: ``sparsity`` or ``n_m``.
    kept
        Of the weight's shape: elements that are not zero already; ``None`` for all.
    bits
        Width of the codes that are used, if less than that of the type.
    representable
        Rounds scales to what the weight's type can hold; by default to that of the array.

    Raises
    ------
    ConfigError
        If the granularity is another one, or a block does not divide the input channels.
    """
    bits = treatment.bits if bits is None else bits
    grid = _Linear(weight, treatment, bits, len(_parts(factor)[0].power), representable)
    codes, mask, _ = _feed_back(weight, grid, factor, config, pruning, kept)
    middle = 2 ** (bits - 1)
    scale, offset = grid.found()
    if treatment.signed:
        codes = (codes.astype(np.int16) - middle).astype(np.int8)
        offset = offset - middle
    has_offset = treatment.offset or not treatment.signed
    value = Quantized(
        codes=frozen(codes),
        scale=frozen(scale.astype(weight.dtype)),
        offset=frozen(offset.astype(codes.dtype)) if has_offset else None,
        bits=treatment.bits,
    )
    return value if mask is None else masked(value, mask)


def palettize(
    weight: Floats,
    tables: Palette,
    factor: Factors,
    config: FeedbackConfig | None = None,
    *,
    scale: Floats | None = None,
    pruning: PruneConfig | None = None,
    kept: NDArray[np.bool_] | None = None,
) -> Palette | Masked:
    """Replace a weight by indices into tables that are given, with error feedback.

    Parameters
    ----------
    weight
        float16 or float32; output channels are its first axis, input channels its second one.
    tables
        A palette of the weight, of single values; its indices are not used.
    factor, config
        What is known of the inputs, and how errors are fed back.
    scale
        One for each output channel, of the weight's rank: the tables are of the weight divided by
        it.
    pruning
        Which weights become zero besides: ``sparsity`` or ``n_m``.
    kept
        Of the weight's shape: elements that are not zero already; ``None`` for all.
    """
    grid = _Tables(weight.shape, tables, len(_parts(factor)[0].power))
    scaled = weight
    if scale is not None:
        scaled = np.divide(weight, scale, dtype=np.float32)
    codes, mask, _ = _feed_back(scaled, grid, factor, config, pruning, kept)
    value = replace(tables, codes=frozen(codes))
    return value if mask is None else masked(value, mask)


def prune(
    weight: Floats,
    pruning: PruneConfig,
    factor: Factors,
    config: FeedbackConfig | None = None,
    *,
    kept: NDArray[np.bool_] | None = None,
    representable: Callable[[_F32], _F32] | None = None,
) -> Sparse:
    """Make weights zero and change the others so that the layer's output suffers least.

    Parameters
    ----------
    weight
        float16 or float32; output channels are its first axis, input channels its second one.
    pruning
        How many: ``sparsity`` or ``n_m``.
    factor, config
        What is known of the inputs, and how errors are fed back.
    kept
        Of the weight's shape: elements that are not zero already; ``None`` for all.
    representable
        Rounds weights to what their type can hold; by default to that of the array.
    """
    _, _, dense = _feed_back(weight, None, factor, config, pruning, kept)
    dense = dense if representable is None else representable(dense)
    return sparsify(dense.astype(weight.dtype), PruneConfig(threshold=0.0))


@dataclass(frozen=True, slots=True)
class _Panel:
    """Columns that are rounded together, and all that is to come after them."""

    begin: int
    end: int
    weights: _F32
    factor: _F32
    pending: _F32


class _Grid(Protocol):
    """What columns are rounded to."""

    def prepare(self, g: int, rows: _F32, order: NDArray[np.intp] | None) -> int:
        """Look at the rows of a conv group; return how many columns may pass between panels."""

    def round(
        self, panel: _Panel, kept: NDArray[np.uint8] | None, n_m: tuple[int, int]
    ) -> _Rounded:
        """Round a panel of it."""


class _Linear:
    """Integers."""

    def __init__(
        self,
        weight: Floats,
        treatment: QuantizeConfig,
        bits: int,
        n_groups: int,
        representable: Callable[[_F32], _F32] | None,
    ) -> None:
        n_outputs, n_inputs = weight.shape[:2]
        block = n_inputs
        if isinstance(treatment.granularity, PerBlock):
            block = treatment.granularity.size
        if n_inputs % block:
            msg = f"block_size must divide the {n_inputs} input channels, got {block}"
            raise ConfigError(msg)
        n_blocks = n_inputs // block
        self._treatment = treatment
        self._bits = bits
        self._width = math.prod(weight.shape[1:]) // n_blocks
        self._dtype = weight.dtype
        self._representable = representable
        self._shape = (n_outputs, n_blocks, *[1] * (weight.ndim - 2))
        by_row = (n_groups, n_outputs // n_groups, n_blocks)
        self._scales: _F32 = np.empty(by_row, np.float32)
        self._offsets: _F32 = np.empty(by_row, np.float32)
        self._settled = isinstance(treatment.granularity, PerTensor)
        if self._settled:
            scale, offset = self._range(weight.reshape(1, -1).astype(np.float32))
            self._scales[:], self._offsets[:] = scale, offset
        self._g = 0
        self._late = False
        self._groups = np.zeros(0, np.uint32)

    def found(self) -> tuple[_F32, _F32]:
        """Return scales and offsets, of the weight's rank."""
        scales, offsets = (part.reshape(self._shape) for part in (self._scales, self._offsets))
        return (scales[:1], offsets[:1]) if self._settled else (scales, offsets)

    def prepare(self, g: int, rows: _F32, order: NDArray[np.intp] | None) -> int:
        n_cols = rows.shape[1]
        n_blocks = n_cols // self._width
        groups = np.arange(n_cols) // self._width
        self._groups = (groups if order is None else groups[order]).astype(np.uint32)
        self._g = g
        self._late = not self._settled and n_blocks > 1 and order is None
        if not self._settled and not self._late:
            for i in range(n_blocks):
                self._set(i, rows[:, i * self._width : (i + 1) * self._width])
        return self._width if self._late else int(n_cols)

    def round(
        self, panel: _Panel, kept: NDArray[np.uint8] | None, n_m: tuple[int, int]
    ) -> _Rounded:
        if self._late and panel.begin % self._width == 0:
            self._set(panel.begin // self._width, panel.pending[:, : self._width])
        return _core.compensate_linear(
            panel.weights,
            panel.factor,
            self._scales[self._g],
            self._offsets[self._g],
            self._groups[panel.begin : panel.end],
            2**self._bits - 1,
            kept,
            *n_m,
        )

    def _set(self, block: int, columns: _F32) -> None:
        found = self._range(np.ascontiguousarray(columns))
        self._scales[self._g, :, block], self._offsets[self._g, :, block] = found

    def _range(self, rows: _F32) -> tuple[_F32, _F32]:
        """Return the scale and offset of each row."""
        middle = 2 ** (self._bits - 1)
        if self._treatment.range == "mse":
            _, scale, signed = _core.quantize_mse(rows, -middle, middle - 1, self._treatment.offset)
            shift = np.zeros(len(rows), np.int8) if signed is None else signed
            return self._held(scale), shift.astype(np.float32) + np.float32(middle)
        high = np.maximum(rows.max(axis=1), 0)
        low = np.minimum(rows.min(axis=1), 0)
        if not self._treatment.offset:
            high = np.maximum(high, -low)
            low = -high
        empty = high == low
        high[empty], low[empty] = 1, -1
        scale = self._held((high - low) / np.float32(2**self._bits - 1))
        offset = np.full(len(rows), middle, np.float32)
        if self._treatment.offset:
            offset = np.rint(-low / scale).clip(0, 2**self._bits - 1).astype(np.float32)
        return scale, offset

    def _held(self, scale: NDArray[np.floating[Any]]) -> _F32:
        """Return scales as they will be stored, none of them zero."""
        info = np.finfo(self._dtype)
        rounded = scale.astype(np.float32)
        if self._representable is not None:
            rounded = self._representable(rounded)
        rounded = rounded.clip(-info.max, info.max).astype(self._dtype).astype(np.float32)
        return np.where(rounded == 0, np.float32(info.smallest_subnormal), rounded)


class _Tables:
    """The entries of lookup tables."""

    def __init__(self, shape: tuple[int, ...], tables: Palette, n_groups: int) -> None:
        if tables.vector_size != 1:
            msg = f"tables must be of single values, got vectors of {tables.vector_size}"
            raise ConfigError(msg)
        group_shape = tables.group_shape
        n_columns = tables.lut.shape[1]
        self._luts = np.ascontiguousarray(tables.rows()[1], np.float32)
        row = np.arange(shape[0]) // group_shape[0]
        lut_of = row[:, None] * n_columns + np.arange(n_columns)
        self._lut_of = lut_of.astype(np.uint32).reshape(n_groups, -1, n_columns)
        taps = math.prod(shape[2:])
        self._column_groups = np.arange(math.prod(shape[1:])) // taps // group_shape[1]
        self._g = 0
        self._groups = np.zeros(0, np.uint32)

    def prepare(self, g: int, rows: _F32, order: NDArray[np.intp] | None) -> int:
        groups = self._column_groups
        self._groups = (groups if order is None else groups[order]).astype(np.uint32)
        self._g = g
        return int(rows.shape[1])

    def round(
        self, panel: _Panel, kept: NDArray[np.uint8] | None, n_m: tuple[int, int]
    ) -> _Rounded:
        return _core.compensate_lut(
            panel.weights,
            panel.factor,
            self._luts,
            self._lut_of[self._g],
            self._groups[panel.begin : panel.end],
            kept,
            *n_m,
        )


def _feed_back(
    weight: Floats,
    grid: _Grid | None,
    factor: Factors,
    config: FeedbackConfig | None,
    pruning: PruneConfig | None,
    kept: NDArray[np.bool_] | None,
) -> tuple[NDArray[np.uint8], NDArray[np.bool_] | None, _F32]:
    """Return codes, what is left of the weight (``None`` for all), and the weight itself."""
    panel_size = (config or FeedbackConfig()).panel_size
    n_m = (0, 0)
    if pruning is not None and pruning.n_m is not None:
        n_m = pruning.n_m
        panel_size = -(-panel_size // n_m[1]) * n_m[1]
    begins = _begins(factor)
    parts = _parts(factor)
    n_groups = len(parts[0].power)
    shape = weight.shape
    # A copy of its own, which is rounded in place.
    matrices = np.array(weight, np.float32).reshape(n_groups, shape[0] // n_groups, -1)
    codes = np.zeros(matrices.shape, np.uint8)
    is_masked = pruning is not None or kept is not None
    mask = np.ones(matrices.shape if is_masked else 0, np.uint8)
    if kept is not None:
        mask = np.array(kept, np.uint8).reshape(matrices.shape)
    n_cols = matrices.shape[2]
    for g, rows in enumerate(matrices):
        order = None
        if parts[0].order is not None:
            orders = (
                part.order[g] + begin
                for part, begin in zip(parts, begins, strict=True)
                if part.order is not None
            )
            order = np.concatenate(list(orders))
        stride = n_cols if grid is None else grid.prepare(g, rows, order)
        rows = rows if order is None else np.ascontiguousarray(rows[:, order])
        zeros = None if not is_masked else mask[g] if order is None else mask[g][:, order]
        found = np.zeros(rows.shape, np.uint8)
        for begin, end in pairwise(_edges(n_cols, panel_size, stride, begins)):
            i = bisect_right(begins, begin) - 1
            upper = parts[i].upper[g, begin - begins[i] :, :]
            upper, last = upper[: end - begin], begins[i] + upper.shape[1]
            pending = rows[:, begin:]
            panel = _Panel(
                begin,
                end,
                np.ascontiguousarray(rows[:, begin:end]),
                np.ascontiguousarray(upper[:, begin - begins[i] : end - begins[i]]),
                pending,
            )
            part = None
            if zeros is not None:
                part = np.ascontiguousarray(zeros[:, begin:end])
                if pruning is not None and pruning.sparsity is not None:
                    part = _without_least(panel, part, pruning.sparsity)
            if grid is None:
                rounded = _core.compensate(panel.weights, panel.factor, part, *n_m)
            else:
                rounded = grid.round(panel, part, n_m)
            rows[:, begin:end], made, errors, left = rounded
            if made.size:
                found[:, begin:end] = made
            if zeros is not None:
                zeros[:, begin:end] = left
            if end < last:
                rows[:, end:last] -= errors @ upper[:, end - begins[i] :]
        where = slice(None) if order is None else order
        matrices[g][:, where] = rows
        codes[g][:, where] = found
        if zeros is not None:
            mask[g][:, where] = zeros
    left_over = mask.reshape(shape).view(np.bool_) if is_masked else None
    return codes.reshape(shape), left_over, matrices.reshape(shape)


def _edges(n_cols: int, panel_size: int, stride: int, begins: Sequence[int]) -> list[int]:
    """Return where panels begin and end: none is larger than asked for, nor crosses a stride."""
    return sorted({*range(0, n_cols, panel_size), *range(0, n_cols, stride), *begins, n_cols})


def _without_least(panel: _Panel, kept: NDArray[np.uint8], sparsity: float) -> NDArray[np.uint8]:
    """Drop the part of a panel that is the cheapest to do without, what is zero first."""
    loss = np.square(panel.weights / np.diagonal(panel.factor))
    loss[kept == 0] = -1
    n_rows = len(loss)
    # As many over all panels together as of the weight as a whole.
    n_zeros = int(n_rows * panel.end * sparsity) - int(n_rows * panel.begin * sparsity)
    if n_zeros == 0:
        return kept
    left: NDArray[np.uint8] = kept.copy()
    left.reshape(-1)[np.argpartition(loss.reshape(-1), n_zeros - 1)[:n_zeros]] = 0
    return left
