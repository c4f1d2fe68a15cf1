"""Palettization: indices into lookup tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from milpress import _core
from milpress.errors import ConfigError
from milpress.formats._layout import (
    Floats,
    as_weight,
    block_grid,
    from_rows,
    frozen,
    normalized_axis,
    to_rows,
)

Bits = Literal[1, 2, 3, 4, 6, 8]


@dataclass(frozen=True, slots=True, kw_only=True)
class PalettizeConfig:
    """How to replace a weight by indices into lookup tables.

    Parameters
    ----------
    bits
        Width of an index. A table has ``2**bits`` entries.
    group_size
        Output channels that share a table; ``None`` gives the whole weight one table.
    """

    bits: Bits = 4
    group_size: int | None = None

    def __post_init__(self) -> None:
        if self.bits not in get_args(Bits):
            msg = f"bits must be one of {get_args(Bits)}, got {self.bits}"
            raise ConfigError(msg)
        if self.group_size is not None and (
            isinstance(self.group_size, bool) or self.group_size < 1
        ):
            msg = f"group_size must be at least 1, got {self.group_size}"
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
        the number of groups along each axis of ``codes``.
    bits
        Width of an index.
    vector_axis
        Axis along which the elements of a vector lie, if ``vector_size`` is above 1.
    """

    codes: NDArray[np.uint8]
    lut: Floats
    bits: int
    vector_axis: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense weight."""
        shape = list(self.codes.shape)
        if self.vector_axis is not None:
            shape[self.vector_axis] *= self.lut.shape[-1]
        return tuple(shape)

    @property
    def group_shape(self) -> tuple[int, ...]:
        """Indices along each axis that share a table."""
        n_groups = self.lut.shape[: self.codes.ndim]
        return tuple(size // n for size, n in zip(self.codes.shape, n_groups, strict=True))

    @property
    def n_payload_bits(self) -> int:
        """Bits that indices and tables take when stored."""
        return self.codes.size * self.bits + self.lut.size * self.lut.itemsize * 8

    def rows(self) -> tuple[NDArray[np.uint8], Floats]:
        """Return indices and tables as the rows that kernels take, one a group."""
        n_entries, vector_size = self.lut.shape[-2:]
        if vector_size != 1:
            msg = f"rows are for tables of single values, got vectors of {vector_size}"
            raise ConfigError(msg)
        return to_rows(self.codes, self.group_shape), self.lut.reshape(-1, n_entries)

    def dense(self) -> Floats:
        """Return the weight, each index replaced by its entry."""
        if self.lut.shape[-1] == 1:
            codes, luts = self.rows()
            return from_rows(_core.lut_to_dense(codes, luts), self.codes.shape, self.group_shape)
        rank = self.codes.ndim
        lut = self.lut
        for axis, block in enumerate(self.group_shape):
            lut = np.repeat(lut, block, axis)
        entries = np.take_along_axis(
            lut, self.codes.astype(np.intp)[..., None, None], axis=rank
        ).squeeze(rank)
        axis = normalized_axis(0 if self.vector_axis is None else self.vector_axis, rank)
        return np.ascontiguousarray(np.moveaxis(entries, -1, axis + 1)).reshape(self.shape)


def palettize(
    weight: Any,
    config: PalettizeConfig | None = None,
    *,
    channel_axis: int = 0,
    importance: Any = None,
) -> Palette:
    """Replace a weight by indices into tables of values.

    The tables minimise the squared error exactly (Groenlund et al. 2017, arXiv 1701.07204), each
    index names the nearest entry.

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

    Raises
    ------
    ConfigError
        If the group size does not divide the channels.
    UnsupportedError
        If the weight is of another type, or not finite.

    Examples
    --------
    >>> palettize(np.float32([0, 1, 2, 3]), PalettizeConfig(bits=2)).codes
    array([0, 1, 2, 3], dtype=uint8)
    """
    config = config or PalettizeConfig()
    array = as_weight(weight)
    group_shape = list(array.shape)
    if config.group_size is not None:
        axis = normalized_axis(channel_axis, array.ndim)
        if array.shape[axis] % config.group_size != 0:
            msg = (
                f"group_size must divide the {array.shape[axis]} output channels, "
                f"got {config.group_size}"
            )
            raise ConfigError(msg)
        group_shape[axis] = config.group_size
    shape = tuple(group_shape)
    rows = to_rows(array, shape)
    row_importance = None
    if importance is not None:
        row_importance = to_rows(_checked_importance(importance, array.shape), shape)
    luts = _core.kmeans1d(rows, 2**config.bits, row_importance)
    codes = from_rows(_core.lut_assign(rows, luts), array.shape, shape)
    n_groups = block_grid(array.shape, shape)
    return Palette(
        codes=frozen(codes),
        lut=frozen(luts.reshape(*n_groups, 2**config.bits, 1)),
        bits=config.bits,
    )


def _checked_importance(importance: Any, shape: tuple[int, ...]) -> NDArray[np.float32]:
    array = np.asarray(importance, np.float32)
    if array.shape != shape:
        msg = f"importance must have the shape of the weight, {shape}, got {array.shape}"
        raise ConfigError(msg)
    if not (np.isfinite(array).all() and (array >= 0).all()):
        msg = "importance must be finite and not negative, got other values"
        raise ConfigError(msg)
    return array
