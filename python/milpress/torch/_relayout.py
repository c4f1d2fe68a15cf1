"""Compressed weights in another layout: of another type, transposed, with rows in another order."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

import milpress._core as _core
from milpress.errors import UnsupportedError
from milpress.formats import Compressed, Masked, Palette, Quantized, Sparse
from milpress.formats.joint import masked
from milpress.formats.rows import Floats


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
    made = _cast_scale(lut, dtype) if isinstance(lut, Quantized) else _rounded(lut, dtype)
    return replace(value, lut=made)


def _cast_scale(value: Quantized, dtype: Any) -> Quantized:
    return replace(value, scale=_rounded(value.scale, dtype))


def _rounded(array: Floats, dtype: Any) -> Floats:
    with np.errstate(over="ignore"):
        rounded: Floats = array.astype(dtype)
    if not np.isfinite(rounded).all():
        msg = f"its tables or scales are beyond the range of {np.dtype(dtype)}"
        raise UnsupportedError(msg)
    return rounded


def transposed(value: Compressed) -> Compressed:
    """Return the value of a transposed matrix."""
    if isinstance(value, Masked):
        return _masked(transposed(value.value), value.mask().T)
    if isinstance(value, Sparse):
        return _sparse(np.ascontiguousarray(value.dense().T))
    if isinstance(value, Quantized):
        offset = None if value.offset is None else _swapped(value.offset)
        return replace(
            value, codes=_swapped(value.codes), scale=_swapped(value.scale), offset=offset
        )
    axis = None if value.vector_axis is None else 1 - value.vector_axis
    lut: Any = transposed(value.lut) if isinstance(value.lut, Quantized) else _swapped(value.lut)
    return replace(value, codes=_swapped(value.codes), lut=lut, vector_axis=axis)


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
    if isinstance(value, Quantized):
        n_rows = value.codes.shape[0]
        offset = None if value.offset is None else _taken_groups(value.offset, rows, n_rows)
        scale = _taken_groups(value.scale, rows, n_rows)
        return replace(
            value, codes=np.ascontiguousarray(value.codes[rows]), scale=scale, offset=offset
        )
    if value.vector_axis == 0:
        size = value.vector_size
        starts = rows[::size]
        whole = (starts[:, None] + np.arange(size)).reshape(-1)
        if not np.array_equal(whole, rows) or (starts % size).any():
            msg = "its rows stand in another order, which takes its vectors apart"
            raise UnsupportedError(msg)
        rows = starts // size
    n_rows = value.codes.shape[0]
    lut: Any
    if isinstance(value.lut, Quantized):
        inner = value.lut
        lut = replace(
            inner,
            codes=_taken_groups(inner.codes, rows, n_rows),
            scale=_taken_groups(inner.scale, rows, n_rows),
            offset=None if inner.offset is None else _taken_groups(inner.offset, rows, n_rows),
        )
    else:
        lut = _taken_groups(value.lut, rows, n_rows)
    return replace(value, codes=np.ascontiguousarray(value.codes[rows]), lut=lut)


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
