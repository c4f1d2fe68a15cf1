"""Palettization: indices into lookup tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

import milpress._core as _core
from milpress.errors import ConfigError, UnsupportedError
from milpress.formats.order import distinct, distinct_rows
from milpress.formats.quantized import Quantized
from milpress.formats.rows import (
    Floats,
    as_weight,
    block_grid,
    checked_importance,
    from_rows,
    frozen,
    normalized_axis,
    to_rows,
)
from milpress.kernels.device import Placement, kernels_for, using

Bits = Literal[1, 2, 3, 4, 6, 8]
_MAX_ENTRIES = 256


@dataclass(frozen=True, slots=True)
class KMeans:
    """The table of least squared error: exact for single values, from ``seed`` for vectors."""

    seed: int = 0


@dataclass(frozen=True, slots=True)
class Uniform:
    """Entries evenly spaced from the least to the greatest weight."""


@dataclass(frozen=True, slots=True)
class Unique:
    """The weight's distinct values, of which there may be 256 at most; nothing is lost."""


@dataclass(frozen=True, slots=True)
class Custom:
    """The table and indices that a function makes of each group.

    ``function`` takes an array whose first axis is the channel axis, and returns the table, of
    ``2**bits`` entries, and one index for each weight, in order.
    """

    function: Callable[[NDArray[Any]], tuple[Any, Any]]


Table: TypeAlias = KMeans | Uniform | Unique | Custom


@dataclass(frozen=True, slots=True, kw_only=True)
class PalettizeConfig:
    """How to replace a weight by indices into lookup tables.

    Parameters
    ----------
    bits
        Width of an index. A table has ``2**bits`` entries. ``None`` with `Unique` and `Custom`,
        which find it themselves.
    group_size
        Channels that share a table; ``None`` gives the whole weight one table.
    channel_axis
        Axis along which groups and vectors lie; ``None`` for that of the output channels.
    vector_size
        Weights, consecutive along that axis, that one index stands for.
    channel_scale
        Whether each output channel is first divided by its greatest magnitude. The scales end up in
        the tables, of which each output channel then has its own.
    table
        How a table is made.
    """

    bits: Bits | None = 4
    group_size: int | None = None
    channel_axis: int | None = None
    vector_size: int = 1
    channel_scale: bool = False
    table: Table = KMeans()

    def __post_init__(self) -> None:
        if isinstance(self.table, (Unique, Custom)):
            if self.bits is not None:
                name = type(self.table).__name__
                msg = f"bits must be None with {name}, which finds them, got {self.bits}"
                raise ConfigError(msg)
        elif self.bits not in get_args(Bits):
            msg = f"bits must be one of {get_args(Bits)}, got {self.bits}"
            raise ConfigError(msg)
        if self.group_size is not None and (
            isinstance(self.group_size, bool) or self.group_size < 1
        ):
            msg = f"group_size must be at least 1, got {self.group_size}"
            raise ConfigError(msg)
        if isinstance(self.vector_size, bool) or self.vector_size < 1:
            msg = f"vector_size must be at least 1, got {self.vector_size}"
            raise ConfigError(msg)
        if self.vector_size > 1 and isinstance(self.table, Uniform):
            msg = f"vector_size must be 1 with Uniform, got {self.vector_size}"
            raise ConfigError(msg)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Palette:
    """A weight as indices into lookup tables.

    Parameters
    ----------
    codes
        uint8, one index for each weight, or for each vector of weights.
    lut
        float16 or float32 of shape ``(*n_groups, 2**bits, vector_size)``, where ``n_groups`` has
        the number of groups along each axis of ``codes``; or that in quantized form.
    bits
        Width of an index.
    vector_axis
        Axis of ``codes`` along which the elements of a vector lie, if ``vector_size`` is above 1.
        One that counts from the end is held as counted from the front.

    Raises
    ------
    ConfigError
        If ``codes`` has no such axis, or vectors have none.
    """

    codes: NDArray[np.uint8]
    lut: Floats | Quantized
    bits: int
    vector_axis: int | None = None

    def __post_init__(self) -> None:
        if self.vector_axis is not None:
            axis = normalized_axis(self.vector_axis, self.codes.ndim)
            object.__setattr__(self, "vector_axis", axis)
        elif self.vector_size > 1:
            msg = f"vectors of {self.vector_size} need a vector_axis"
            raise ConfigError(msg)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense weight."""
        shape = list(self.codes.shape)
        if self.vector_axis is not None:
            shape[self.vector_axis] *= self.vector_size
        return tuple(shape)

    @property
    def vector_size(self) -> int:
        """Weights that one index stands for."""
        return self.lut.shape[-1]

    @property
    def group_shape(self) -> tuple[int, ...]:
        """Indices along each axis that share a table."""
        n_groups = self.lut.shape[: self.codes.ndim]
        return tuple(size // n for size, n in zip(self.codes.shape, n_groups, strict=True))

    @property
    def entries(self) -> Floats:
        """The tables as floats."""
        return self.lut.dense() if isinstance(self.lut, Quantized) else self.lut

    @property
    def n_payload_bits(self) -> int:
        """Bits that indices and tables take when stored."""
        lut = self.lut
        lut_bits = lut.n_payload_bits if isinstance(lut, Quantized) else lut.nbytes * 8
        return self.codes.size * self.bits + lut_bits

    def rows(self) -> tuple[NDArray[np.uint8], Floats]:
        """Return indices and tables as the rows that kernels take, one a group."""
        codes = to_rows(self.codes, self.group_shape)
        return codes, self.entries.reshape(len(codes), -1)

    def vector_rows(self, weight: Floats) -> Floats:
        """Return a weight's vectors in the order of the indices of `rows`."""
        _, vectors = split_vectors(
            weight, self.vector_size, self.vector_axis or 0, self.group_shape
        )
        return vectors.reshape(len(vectors), -1)

    def dense(self) -> Floats:
        """Return the weight, each index replaced by its entry."""
        codes, luts = self.rows()
        if self.vector_size == 1:
            return from_rows(_core.lut_to_dense(codes, luts), self.codes.shape, self.group_shape)
        vectors = luts.reshape(len(codes), -1, self.vector_size)
        entries = np.take_along_axis(vectors, codes.astype(np.intp)[..., None], axis=1)
        return _joined(entries, self.codes.shape, self.group_shape, self.vector_axis or 0)


def palettize(
    weight: Any,
    config: PalettizeConfig | None = None,
    *,
    channel_axis: int = 0,
    importance: Any = None,
    device: Placement = None,
) -> Palette:
    """Replace a weight by indices into tables of values.

    For single values the k-means tables minimise the squared error exactly (Groenlund et al. 2017,
    arXiv 1701.07204), for vectors they come from k-means++ (Arthur and Vassilvitskii 2007) and
    Lloyd's iteration. Each index names the nearest entry.

    Parameters
    ----------
    weight
        float16, bfloat16 or float32 array or torch CPU tensor.
    config
        How; by default 4 bits and one table.
    channel_axis
        Axis of the output channels, along which groups are formed.
    importance
        Weight of each element in the squared error, of the same shape; ``None`` for equal weight.
        An element of importance 0 has no influence on a k-means table.
    device
        Where the kernels run: ``"cpu"``, ``"metal"`` or ``"auto"``; ``None`` for that of the
        workflow around, else the CPU. The result is the same.

    Raises
    ------
    ConfigError
        If the group size does not divide the channels, or the vector size the group.
    UnsupportedError
        If the weight is of another type, or not finite, or has too many distinct values.

    Examples
    --------
    >>> palettize(np.float32([0, 1, 2, 3]), PalettizeConfig(bits=2)).codes
    array([0, 1, 2, 3], dtype=uint8)
    """
    config = config or PalettizeConfig()
    array = as_weight(weight)
    output = normalized_axis(channel_axis, array.ndim)
    with using(device):
        if config.channel_scale:
            palette, scale = palettize_scaled(
                array, config, channel_axis=output, importance=importance
            )
            return fold(palette, scale, output, like=array)
        axis = _axis(config, output, array.ndim)
        share = None if importance is None else checked_importance(importance, array.shape)
        return _fitted(array, config, axis, share)


def palettize_scaled(
    weight: Any, config: PalettizeConfig, *, channel_axis: int = 0, importance: Any = None
) -> tuple[Palette, Floats]:
    """Palettize a weight whose output channels are divided by their greatest magnitude.

    Parameters
    ----------
    weight, config, channel_axis, importance
        As of `palettize`; ``channel_scale`` is taken as true.

    Returns
    -------
    Palette
        The palette of the divided weight.
    NDArray
        The scale of each output channel, of the weight's rank and type.
    """
    array = as_weight(weight)
    output = normalized_axis(channel_axis, array.ndim)
    axis = _axis(config, output, array.ndim)
    share = None if importance is None else checked_importance(importance, array.shape)
    scale = _channel_scale(array, output)
    # An error counts in units of the weight, not of the scaled weight.
    relative = (scale / scale.max()).astype(np.float32)
    share = relative**2 * (np.ones(array.shape, np.float32) if share is None else share)
    scaled = (array / scale.astype(np.float32)).astype(array.dtype)
    return _fitted(scaled, config, axis, share), scale.astype(array.dtype)


def _axis(config: PalettizeConfig, output: int, rank: int) -> int:
    axis = output if config.channel_axis is None else config.channel_axis
    return normalized_axis(axis, rank)


def folded_bytes(
    shape: tuple[int, ...], itemsize: int, config: PalettizeConfig, output: int, axis: int
) -> int:
    """Return the size of a palette's tables once a scale for each output channel is in them."""
    groups = [1] * len(shape)
    if config.group_size is not None:
        groups[axis] = shape[axis] // config.group_size
    groups[output] = shape[output] // (config.vector_size if axis == output else 1)
    return math.prod(groups) * int(2 ** (config.bits or 8)) * config.vector_size * itemsize


def _group_shape(shape: tuple[int, ...], config: PalettizeConfig, axis: int) -> tuple[int, ...]:
    size = shape[axis] if config.group_size is None else config.group_size
    if shape[axis] % size != 0:
        msg = f"group_size must divide the {shape[axis]} output channels, got {size}"
        raise ConfigError(msg)
    if size % config.vector_size != 0:
        msg = f"vector_size must divide the {size} channels of a group, got {config.vector_size}"
        raise ConfigError(msg)
    return (*shape[:axis], size // config.vector_size, *shape[axis + 1 :])


def _fitted(
    array: Floats, config: PalettizeConfig, axis: int, importance: NDArray[np.float32] | None
) -> Palette:
    """Make tables and indices of the groups, scales aside."""
    group_shape = _group_shape(array.shape, config, axis)
    if isinstance(config.table, Custom):
        return _custom(array, config.table, config.vector_size, axis, group_shape)
    if config.vector_size > 1:
        return _vectors(array, config, axis, group_shape, importance)
    rows = to_rows(array, group_shape)
    bits: int = config.bits or 0
    if isinstance(config.table, Uniform):
        luts = _uniform_tables(rows, bits)
    elif isinstance(config.table, Unique):
        luts, bits = _stacked([distinct(row) for row in rows])
    else:
        row_importance = None if importance is None else to_rows(importance, group_shape)
        luts = kernels_for(None).dispatch(_core.kmeans1d)(rows, 2**bits, row_importance)
    codes = kernels_for(None).dispatch(_core.lut_assign)(rows, luts)
    return _palette(codes, luts[..., None], array.shape, group_shape, bits)


def _uniform_tables(rows: Floats, bits: int) -> Floats:
    low, high = (edge.astype(np.float64)[:, None] for edge in (rows.min(axis=1), rows.max(axis=1)))
    steps = np.arange(2**bits) / (2**bits - 1)
    luts: Floats = (low + steps * (high - low)).astype(rows.dtype)
    return luts


def _vectors(
    array: Floats,
    config: PalettizeConfig,
    axis: int,
    group_shape: tuple[int, ...],
    importance: NDArray[np.float32] | None,
) -> Palette:
    size = config.vector_size
    index_shape, rows = split_vectors(array, size, axis, group_shape)
    n_groups = len(rows)
    bits: int = config.bits or 0
    if isinstance(config.table, Unique):
        tables, indices = zip(*map(distinct_rows, rows), strict=True)
        luts, bits = _stacked(tables)
        codes = np.stack(indices).astype(np.uint8)
    else:
        share = None
        if importance is not None:
            share = split_vectors(importance, size, axis, group_shape)[1].mean(axis=-1)
        seed = config.table.seed if isinstance(config.table, KMeans) else 0
        flat, codes = kernels_for(None).dispatch(_core.kmeans_vector)(
            rows.reshape(n_groups, -1), 2**bits, size, seed, share
        )
        luts = flat.reshape(n_groups, 2**bits, size)
    return _palette(codes, luts, index_shape, group_shape, bits, axis)


def _custom(
    array: Floats, table: Custom, vector_size: int, axis: int, group_shape: tuple[int, ...]
) -> Palette:
    front = np.swapaxes(array, 0, axis)
    parts = np.split(front, front.shape[0] // (group_shape[axis] * vector_size))
    results = [table.function(part) for part in parts]
    luts = [np.asarray(lut).reshape(-1, vector_size) for lut, _ in results]
    n_entries = len(luts[0])
    bits = max(n_entries - 1, 1).bit_length()
    if bits not in get_args(Bits) or any(len(lut) != 2**bits for lut in luts):
        msg = (
            "a custom table must have 2, 4, 8, 16, 64 or 256 entries, as many for each group, got "
            + ", ".join(str(size) for size in sorted({len(lut) for lut in luts}))
        )
        raise UnsupportedError(msg)
    codes = np.stack([np.asarray(indices).reshape(-1) for _, indices in results])
    n_codes = math.prod(array.shape) // vector_size // len(parts)
    if codes.shape[1] != n_codes or codes.min() < 0 or codes.max() >= n_entries:
        msg = (
            f"a custom function must return {n_codes} indices from 0 to {n_entries - 1}, got "
            f"{codes.shape[1]} from {codes.min()} to {codes.max()}"
        )
        raise UnsupportedError(msg)
    index_shape = list(front.shape)
    index_shape[0] //= vector_size
    indices = np.ascontiguousarray(
        np.swapaxes(codes.astype(np.uint8).reshape(index_shape), 0, axis)
    )
    n_groups = block_grid(indices.shape, group_shape)
    lut = np.stack(luts).astype(array.dtype).reshape(*n_groups, n_entries, vector_size)
    return Palette(
        codes=frozen(indices),
        lut=frozen(lut),
        bits=bits,
        vector_axis=axis if vector_size > 1 else None,
    )


def _palette(
    code_rows: NDArray[np.uint8],
    luts: Floats,
    index_shape: tuple[int, ...],
    group_shape: tuple[int, ...],
    bits: int,
    vector_axis: int | None = None,
) -> Palette:
    """Put together what was made of each group: ``luts`` has ``(n_groups, 2**bits, size)``."""
    return Palette(
        codes=frozen(from_rows(code_rows, index_shape, group_shape)),
        lut=frozen(luts.reshape(*block_grid(index_shape, group_shape), *luts.shape[1:])),
        bits=bits,
        vector_axis=vector_axis,
    )


def split_vectors(
    array: NDArray[Any], size: int, axis: int, group_shape: tuple[int, ...]
) -> tuple[tuple[int, ...], NDArray[Any]]:
    """Return the shape of the indices, and the vectors as ``(n_groups, n_vectors, size)``."""
    shape = array.shape
    index_shape = (*shape[:axis], shape[axis] // size, *shape[axis + 1 :])
    parts = array.reshape(*index_shape[: axis + 1], size, *shape[axis + 1 :])
    vectors = np.moveaxis(parts, axis + 1, -1)
    rows = to_rows(vectors, (*group_shape, size))
    return index_shape, rows.reshape(len(rows), -1, size)


def _joined(
    vectors: NDArray[Any], index_shape: tuple[int, ...], group_shape: tuple[int, ...], axis: int
) -> NDArray[Any]:
    """Undo `split_vectors`."""
    size = vectors.shape[-1]
    rows = vectors.reshape(len(vectors), -1)
    parts = np.moveaxis(from_rows(rows, (*index_shape, size), (*group_shape, size)), -1, axis + 1)
    shape = (*index_shape[:axis], index_shape[axis] * size, *index_shape[axis + 1 :])
    return np.ascontiguousarray(parts).reshape(shape)


def _stacked(tables: Sequence[NDArray[Any]]) -> tuple[NDArray[Any], int]:
    """Return tables filled up to one size with their last entries, and the width of an index."""
    n_entries = max(map(len, tables))
    if n_entries > _MAX_ENTRIES:
        msg = f"a weight must have at most {_MAX_ENTRIES} distinct values, got {n_entries}"
        raise UnsupportedError(msg)
    bits: int = next(bits for bits in get_args(Bits) if 2**bits >= n_entries)
    places = np.arange(2**bits)
    return np.stack([table[places.clip(max=len(table) - 1)] for table in tables]), bits


def _channel_scale(array: Floats, output: int) -> NDArray[np.float64]:
    """Return the greatest magnitude of each output channel, 1 where all are zero."""
    others = tuple(axis for axis in range(array.ndim) if axis != output)
    greatest = np.abs(array).max(axis=others, keepdims=True)
    scale: NDArray[np.float64] = greatest.astype(np.float64)
    scale[scale == 0] = 1
    return scale


def fold(palette: Palette, scale: NDArray[Any], output: int, like: Floats | None = None) -> Palette:
    """Multiply a scale for each output channel into the tables.

    Parameters
    ----------
    palette
        The palette of the divided weight.
    scale
        Of the weight's rank.
    output
        Axis of the output channels.
    like
        The weight; if given, single values are assigned to the entries anew.
    """
    n_rows = palette.codes.shape[output]
    lut = palette.entries.astype(np.float64)
    lut = np.repeat(lut, n_rows // lut.shape[output], axis=output)
    factors = scale.astype(np.float64)[..., None, None]
    if palette.vector_axis == output:
        factors = np.moveaxis(
            factors.reshape(*scale.shape[:output], n_rows, -1, *scale.shape[output + 1 :]),
            output + 1,
            -1,
        )[..., None, :]
    folded = (lut * factors).astype(palette.entries.dtype)
    whole = replace(palette, lut=frozen(folded))
    return whole if like is None or whole.vector_size > 1 else reassigned(whole, like)


def reassigned(palette: Palette, array: Floats) -> Palette:
    """Return the palette of single values with each index naming the entry nearest to a weight."""
    _, luts = palette.rows()
    rows = to_rows(array, palette.group_shape)
    codes = kernels_for(None).dispatch(_core.lut_assign)(rows, luts)
    codes = from_rows(codes, palette.codes.shape, palette.group_shape)
    return replace(palette, codes=frozen(codes), vector_axis=None)
