"""Columns of a weight rounded in panels, each panel's errors fed back to the columns behind it."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

import milpress._core as _core
from milpress.errors import ConfigError
from milpress.formats.factor import Factor, FeedbackConfig
from milpress.formats.palette import Palette
from milpress.formats.quantized import PerBlock, PerTensor, QuantizeConfig
from milpress.formats.rows import Floats
from milpress.formats.sparse import PruneConfig

F32: TypeAlias = NDArray[np.float32]
# One of all columns, or one for each block of them, in their order: errors stay within blocks.
Factors: TypeAlias = Factor | Sequence[Factor]
Rounded: TypeAlias = tuple[F32, NDArray[np.uint8], F32, NDArray[np.uint8]]


def blocks_of(factor: Factors) -> tuple[Factor, ...]:
    """Return the factors of all blocks of columns."""
    return (factor,) if isinstance(factor, Factor) else tuple(factor)


def begins_of(blocks: Sequence[Factor]) -> list[int]:
    """Return the first column of each block."""
    return [0, *accumulate(block.power.shape[1] for block in blocks[:-1])]


class Rounding:
    """A copy of a weight that is rounded a panel of columns after the other, in place.

    Its rows are in as many groups as the convolution has; columns are those of a matrix.
    """

    def __init__(
        self,
        weight: Floats,
        factor: Factors,
        config: FeedbackConfig | None,
        pruning: PruneConfig | None,
        kept: NDArray[np.bool_] | None,
    ) -> None:
        self._blocks = blocks_of(factor)
        self._begins = begins_of(self._blocks)
        self._shape = weight.shape
        self._sparsity = None if pruning is None else pruning.sparsity
        self._n_m = (0, 0) if pruning is None or pruning.n_m is None else pruning.n_m
        # No run of n:m crosses panels.
        run = max(self._n_m[1], 1)
        self._panel_size = -(-(config or FeedbackConfig()).panel_size // run) * run
        self.n_groups = len(self._blocks[0].power)
        by_group = (self.n_groups, self._shape[0] // self.n_groups, -1)
        self._weights = np.array(weight, np.float32).reshape(by_group)
        self._codes = np.zeros(self._weights.shape, np.uint8)
        self._kept: NDArray[np.uint8] | None = None
        if kept is not None:
            self._kept = np.array(kept, np.uint8).reshape(by_group)
        elif pruning is not None:
            self._kept = np.ones(self._weights.shape, np.uint8)

    def onto(self, grid: Grid) -> tuple[NDArray[np.uint8], NDArray[np.bool_] | None, F32]:
        """Return codes, what is left of the weight (``None`` for all), and the weight itself."""
        for g in range(self.n_groups):
            self._round_group(g, grid)
        kept = None if self._kept is None else self._kept.reshape(self._shape).view(np.bool_)
        return self._codes.reshape(self._shape), kept, self._weights.reshape(self._shape)

    def _round_group(self, g: int, grid: Grid) -> None:
        order = self._order(g)
        stride = grid.prepare(g, self._weights[g], is_in_order=isinstance(order, slice))
        rows = np.ascontiguousarray(self._weights[g][:, order])
        columns = np.arange(rows.shape[1], dtype=np.uint32)[order]
        starts = {*range(0, len(columns), self._panel_size), *range(0, len(columns), stride)}
        for begin, end in pairwise(sorted({*starts, *self._begins, len(columns)})):
            where = columns[begin:end]
            panel = self._panel(g, rows, where, begin)
            kept = None
            if self._kept is not None:
                kept = np.ascontiguousarray(self._kept[g][:, where])
                if self._sparsity is not None:
                    kept = panel.without_least(kept, self._sparsity)
            rows[:, begin:end], codes, errors, left = grid.round(panel, kept, self._n_m)
            if codes.size:
                self._codes[g][:, where] = codes
            if self._kept is not None:
                self._kept[g][:, where] = left
            if panel.behind.size:
                rows[:, end : end + panel.behind.shape[1]] -= errors @ panel.behind
        self._weights[g][:, order] = rows

    def _order(self, g: int) -> NDArray[np.intp] | slice:
        """Return the order in which a group's columns are rounded."""
        orders = [
            begin + block.order[g]
            for block, begin in zip(self._blocks, self._begins, strict=True)
            if block.order is not None
        ]
        return np.concatenate(orders) if orders else slice(None)

    def _panel(self, g: int, rows: F32, columns: NDArray[np.uint32], begin: int) -> Panel:
        i = bisect_right(self._begins, begin) - 1
        first = begin - self._begins[i]
        last = first + len(columns)
        upper = self._blocks[i].upper[g, first:last]
        return Panel(
            g=g,
            begin=begin,
            columns=columns,
            weights=np.ascontiguousarray(rows[:, begin : begin + len(columns)]),
            factor=np.ascontiguousarray(upper[:, first:last]),
            behind=upper[:, last:],
            pending=rows[:, begin:],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """Columns of a conv group that are rounded together."""

    g: int
    begin: int  # columns that were rounded before them
    columns: NDArray[np.uint32]  # their places in the weight
    weights: F32
    factor: F32  # at these columns
    behind: F32  # and at those that their errors are fed back to
    pending: F32  # the weight from these columns on

    def without_least(self, kept: NDArray[np.uint8], sparsity: float) -> NDArray[np.uint8]:
        """Drop the part that is the cheapest to do without, what is zero first."""
        loss = np.square(self.weights / np.diagonal(self.factor))
        loss[kept == 0] = -1
        n_rows = len(loss)
        # As many over all panels together as of the weight as a whole.
        end = self.begin + len(self.columns)
        n_zeros = int(n_rows * end * sparsity) - int(n_rows * self.begin * sparsity)
        if n_zeros == 0:
            return kept
        left: NDArray[np.uint8] = kept.copy()
        left.reshape(-1)[np.argpartition(loss.reshape(-1), n_zeros - 1)[:n_zeros]] = 0
        return left


class Grid:
    """What columns are rounded to: here to nothing, so that weights only become zero."""

    def prepare(self, g: int, rows: F32, *, is_in_order: bool) -> int:  # noqa: ARG002
        """Look at the rows of a conv group; return how many columns may pass between panels."""
        return int(rows.shape[1])

    def round(self, panel: Panel, kept: NDArray[np.uint8] | None, n_m: tuple[int, int]) -> Rounded:
        """Round a panel; return weights, codes, errors and what is left of it."""
        return _core.error_feedback(panel.weights, panel.factor, kept, *n_m)


class Integers(Grid):
    """Integers with a scale and an offset for each block of columns."""

    def __init__(
        self,
        weight: Floats,
        treatment: QuantizeConfig,
        bits: int,
        n_groups: int,
        representable: Callable[[F32], F32] | None,
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
        self._block_width: int = math.prod(weight.shape[1:]) // n_blocks
        self._dtype = weight.dtype
        self._representable = representable
        self._shape = (n_outputs, n_blocks, *[1] * (weight.ndim - 2))
        by_row = (n_groups, n_outputs // n_groups, n_blocks)
        self._scales: F32 = np.empty(by_row, np.float32)
        self._offsets: F32 = np.empty(by_row, np.float32)
        self._is_per_tensor = isinstance(treatment.granularity, PerTensor)
        if self._is_per_tensor:
            scale, offset = self._range(weight.reshape(1, -1).astype(np.float32))
            self._scales[:], self._offsets[:] = scale, offset
        self._are_blocks_in_turn = False

    def scale_and_offset(self) -> tuple[F32, F32]:
        """Return scales and offsets, of the weight's rank."""
        scale, offset = (each.reshape(self._shape) for each in (self._scales, self._offsets))
        return (scale[:1], offset[:1]) if self._is_per_tensor else (scale, offset)

    def prepare(self, g: int, rows: F32, *, is_in_order: bool) -> int:
        n_columns, width = int(rows.shape[1]), self._block_width
        if self._is_per_tensor:
            return n_columns
        self._are_blocks_in_turn = is_in_order and width < n_columns
        if self._are_blocks_in_turn:
            return width
        for begin in range(0, n_columns, width):
            self._set_range(g, begin, rows[:, begin:])
        return n_columns

    def round(self, panel: Panel, kept: NDArray[np.uint8] | None, n_m: tuple[int, int]) -> Rounded:
        if self._are_blocks_in_turn and panel.begin % self._block_width == 0:
            self._set_range(panel.g, panel.begin, panel.pending)
        return _core.error_feedback_linear(
            panel.weights,
            panel.factor,
            self._scales[panel.g],
            self._offsets[panel.g],
            panel.columns // np.uint32(self._block_width),
            2**self._bits - 1,
            kept,
            *n_m,
        )

    def _set_range(self, g: int, begin: int, pending: F32) -> None:
        """Find the scale and offset of the block that begins at a column, of what is there now."""
        scale, offset = self._range(np.ascontiguousarray(pending[:, : self._block_width]))
        block = begin // self._block_width
        self._scales[g, :, block], self._offsets[g, :, block] = scale, offset

    def _range(self, rows: F32) -> tuple[F32, F32]:
        """Return the scale and offset of each row."""
        middle = 2 ** (self._bits - 1)
        if self._treatment.range == "mse":
            has_offset = self._treatment.offset
            _, scale, signed = _core.quantize_mse(rows, None, -middle, middle - 1, has_offset)
            shift = np.zeros(len(rows), np.int8) if signed is None else signed
            return self._as_stored(scale), shift.astype(np.float32) + np.float32(middle)
        high = np.maximum(rows.max(axis=1), 0)
        low = np.minimum(rows.min(axis=1), 0)
        if not self._treatment.offset:
            high = np.maximum(high, -low)
            low = -high
        empty = high == low
        high[empty], low[empty] = 1, -1
        scale = self._as_stored((high - low) / np.float32(2**self._bits - 1))
        offset = np.full(len(rows), middle, np.float32)
        if self._treatment.offset:
            offset = np.rint(-low / scale).clip(0, 2**self._bits - 1).astype(np.float32)
        return scale, offset

    def _as_stored(self, scale: NDArray[np.floating[Any]]) -> F32:
        """Return scales as they will be stored, none of them zero."""
        info = np.finfo(self._dtype)
        rounded = scale.astype(np.float32)
        if self._representable is not None:
            rounded = self._representable(rounded)
        rounded = rounded.clip(-info.max, info.max).astype(self._dtype).astype(np.float32)
        return np.where(rounded == 0, np.float32(info.smallest_subnormal), rounded)


class Tables(Grid):
    """The entries of lookup tables."""

    def __init__(self, shape: tuple[int, ...], tables: Palette, n_groups: int) -> None:
        if tables.vector_size != 1:
            msg = f"tables must be of single values, got vectors of {tables.vector_size}"
            raise ConfigError(msg)
        group_shape = tables.group_shape
        n_across = tables.lut.shape[1]
        self._luts = np.ascontiguousarray(tables.rows()[1], np.float32)
        first_of_row = np.arange(shape[0]) // group_shape[0] * n_across
        lut_of = first_of_row[:, None] + np.arange(n_across)
        self._lut_of = lut_of.astype(np.uint32).reshape(n_groups, -1, n_across)
        self._group_width = np.uint32(math.prod(shape[2:]) * group_shape[1])

    def round(self, panel: Panel, kept: NDArray[np.uint8] | None, n_m: tuple[int, int]) -> Rounded:
        return _core.error_feedback_lut(
            panel.weights,
            panel.factor,
            self._luts,
            self._lut_of[panel.g],
            panel.columns // self._group_width,
            kept,
            *n_m,
        )
