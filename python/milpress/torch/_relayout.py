"""Compressed weights in another layout: of another type, transposed, with rows in another order."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

import milpress._core as _core
from milpress.errors import UnsupportedError
from milpress.formats import Compressed, Masked, Palette, Quantized, Sparse
from milpress.formats.joint import masked
from milpress.formats.rows import Floats

_Relayout: TypeAlias = Callable[[NDArray[Any]], NDArray[Any]]


def cast(value: Compressed, dtype: Any) -> Compressed:
    """Return a value with tables, scales and non-zeros rounded to a type.

    Raises
    ------
    UnsupportedError
        If one of them is beyond the type's range.
    """
    if isinstance(value, Masked):
        return replace(value, value=_cast_codes(value.value, dtype))
    if isinstance(value, Sparse):
        return replace(value, nonzeros=_rounded(value.nonzeros, dtype))
    return _cast_codes(value, dtype)


def _cast_codes(value: Palette | Quantized, dtype: Any) -> Palette | Quantized:
    if isinstance(value, Quantized):
        return _cast_scale(value, dtype)
    lut = value.lut
    lut = _cast_scale(lut, dtype) if isinstance(lut, Quantized) else _rounded(lut, dtype)
    return replace(value, lut=lut)


def _cast_scale(value: Quantized, dtype: Any) -> Quantized:
    return replace(value, scale=_rounded(value.scale, dtype))


def _rounded(array: Floats, dtype: Any) -> Floats:
    with np.errstate(over="ignore"):
        rounded: Floats = array.astype(dtype)
    if not np.isfinite(rounded).all():
        msg = f"its tables or scales are beyond the range of {np.dtype(dtype)}"
        raise UnsupportedError(msg)
    return rounded


def layout_of(
    own: NDArray[Any], array: NDArray[Any], *, in_rows: bool
) -> Callable[[Compressed], Compressed] | None:
    """Return what gives the value of a weight the layout of an array; ``None`` if they differ.

    Parameters
    ----------
    own
        The weight.
    array
        The same elements in another layout, perhaps.
    in_rows
        Whether the array may have some of the rows, in another order: Core ML has the gates of a
        recurrent layer in another order than torch, or in parts.
    """
    if np.array_equal(own, array):
        return lambda value: value
    if own.ndim == 2 and np.array_equal(own.T, array):
        return transposed
    rows = _rows_of(array, own) if in_rows else None
    return None if rows is None else functools.partial(taken, rows=rows)


def _rows_of(array: NDArray[Any], own: NDArray[Any]) -> NDArray[np.intp] | None:
    """Return which of its own rows each row is, ``None`` if one of them is another."""
    places: dict[bytes, list[int]] = {}
    for i, row in enumerate(own):
        places.setdefault(row.tobytes(), []).append(i)
    rows = []
    for row in array:
        same = places.get(row.tobytes())
        if not same:
            return None
        rows.append(same.pop(0))
    return np.array(rows, np.intp)


def transposed(value: Compressed) -> Compressed:
    """Return the value of a transposed matrix."""
    if isinstance(value, Masked):
        return _masked(transposed(value.value), value.mask().T)
    if isinstance(value, Sparse):
        return _sparse(np.ascontiguousarray(value.dense().T))
    if isinstance(value, Quantized):
        return _each(value, _swapped, _swapped)
    axis = None if value.vector_axis is None else 1 - value.vector_axis
    lut = value.lut
    lut = _each(lut, _swapped, _swapped) if isinstance(lut, Quantized) else _swapped(lut)
    return replace(value, codes=_swapped(value.codes), lut=lut, vector_axis=axis)


def _each(value: Quantized, of_codes: _Relayout, of_groups: _Relayout) -> Quantized:
    """Return a value with its codes, and what belongs to groups of them, in another layout."""
    offset = None if value.offset is None else of_groups(value.offset)
    return replace(value, codes=of_codes(value.codes), scale=of_groups(value.scale), offset=offset)


def _swapped(array: NDArray[Any]) -> NDArray[Any]:
    return np.ascontiguousarray(np.swapaxes(array, 0, 1))


def taken(value: Compressed, rows: NDArray[np.intp]) -> Compressed:
    """Return the value whose row ``i`` is the row ``rows[i]`` of the given one.

    Raises
    ------
    UnsupportedError
        If this takes a vector of weights apart.
    """
    if isinstance(value, Masked):
        return _masked(taken(value.value, rows), value.mask()[rows])
    if isinstance(value, Sparse):
        return _sparse(np.ascontiguousarray(value.dense()[rows]))
    n_rows = value.codes.shape[0]
    if isinstance(value, Palette) and value.vector_axis == 0:
        size = value.vector_size
        starts = rows[::size]
        whole = (starts[:, None] + np.arange(size)).reshape(-1)
        if not np.array_equal(whole, rows) or (starts % size).any():
            msg = "its rows stand in another order, which takes its vectors apart"
            raise UnsupportedError(msg)
        rows = starts // size

    def of_codes(codes: NDArray[Any]) -> NDArray[Any]:
        return np.ascontiguousarray(codes[rows])

    def of_groups(array: NDArray[Any]) -> NDArray[Any]:
        return _taken_groups(array, rows, n_rows)

    if isinstance(value, Quantized):
        return _each(value, of_codes, of_groups)
    lut = value.lut
    lut = _each(lut, of_groups, of_groups) if isinstance(lut, Quantized) else of_groups(lut)
    return replace(value, codes=of_codes(value.codes), lut=lut)


def _taken_groups(array: NDArray[Any], rows: NDArray[np.intp], n_rows: int) -> NDArray[Any]:
    """Return what belongs to groups of rows in another order, cut smaller where groups mix."""
    groups = rows // (n_rows // array.shape[0])
    size = next(
        size
        for size in range(len(rows), 0, -1)
        if len(rows) % size == 0
        and (groups.reshape(-1, size) == groups.reshape(-1, size)[:, :1]).all()
    )
    return np.ascontiguousarray(array[groups[::size]])


def _masked(value: Compressed, mask: NDArray[np.bool_]) -> Masked:
    if not isinstance(value, (Palette, Quantized)):
        msg = f"a mask belongs to codes, got {type(value).__name__}"
        raise UnsupportedError(msg)
    return masked(value, np.ascontiguousarray(mask))


def _sparse(dense: Floats) -> Sparse:
    bitmask = _core.keep_above(dense.reshape(-1), 0.0)
    return Sparse(
        shape=dense.shape, bitmask=bitmask, nonzeros=_core.compact(dense.reshape(-1), bitmask)
    )
