"""Compressed weights in another layout: of another type, transposed, with rows in another order."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from milpress.errors import UnsupportedError
from milpress.formats import (
    Compressed,
    Masked,
    Palette,
    PruneConfig,
    Quantized,
    Sparse,
    sparsify,
)
from milpress.formats.joint import masked

_Relayout: TypeAlias = Callable[[NDArray[Any]], NDArray[Any]]


def cast(value: Compressed, dtype: Any) -> Compressed:
    """Return a value with tables, scales and non-zeros rounded to a type.

    Raises
    ------
    UnsupportedError
        If one of them is beyond the type's range.
    """
    rounded = functools.partial(_rounded, dtype=dtype)
    if isinstance(value, Sparse):
        return replace(value, nonzeros=rounded(value.nonzeros))
    return _arranged(value, rounded, rounded)


def _rounded(array: NDArray[Any], dtype: Any) -> NDArray[Any]:
    """Return floats in a type; integers stay as they are."""
    if array.dtype.kind != "f":
        return array
    with np.errstate(over="ignore"):
        rounded = array.astype(dtype)
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
    if own.ndim > 1 and np.array_equal(own.swapaxes(*_matrix_axes(own.ndim)), array):
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


def _matrix_axes(rank: int) -> tuple[int, int]:
    """Return the axes of a matrix, or of each of a stack of them."""
    return rank - 2, rank - 1


def transposed(value: Compressed) -> Compressed:
    """Return the value of a transposed matrix, or of a stack of which each is transposed."""
    axes = _matrix_axes(len(value.shape))

    def swapped(array: NDArray[Any]) -> NDArray[Any]:
        return np.ascontiguousarray(np.swapaxes(array, *axes))

    return _arranged(
        value, swapped, swapped, lambda axis: sum(axes) - axis if axis in axes else axis
    )


def matrix_of(value: Compressed, index: tuple[int, ...]) -> Compressed:
    """Return the value of a matrix of a stack, none of which shares a group with another."""

    def at_index(array: NDArray[Any]) -> NDArray[Any]:
        return np.ascontiguousarray(array[index])

    return _arranged(value, at_index, at_index, lambda axis: axis - len(index))


def taken(value: Compressed, rows: NDArray[np.intp]) -> Compressed:
    """Return the value whose row ``i`` is the row ``rows[i]`` of the given one.

    Raises
    ------
    UnsupportedError
        If this takes a vector of weights apart.
    """
    n_rows = value.shape[0]
    if isinstance(value, Palette) and value.vector_axis == 0:
        size = value.vector_size
        starts = rows[::size]
        whole = (starts[:, None] + np.arange(size)).reshape(-1)
        if not np.array_equal(whole, rows) or (starts % size).any():
            msg = "its rows stand in another order, which takes its vectors apart"
            raise UnsupportedError(msg)
        rows, n_rows = starts // size, n_rows // size
    of_groups = functools.partial(_taken_groups, rows=rows, n_rows=n_rows)
    return _arranged(value, lambda codes: np.ascontiguousarray(codes[rows]), of_groups)


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


def stacked(values: Sequence[Compressed], shape: tuple[int, ...]) -> Compressed:
    """Return the values of matrices as that of a stack of them, whose first axes have a shape."""
    first = values[0]

    def stack(arrays: Iterable[NDArray[Any]]) -> NDArray[Any]:
        parts = list(arrays)
        return np.stack(parts).reshape(*shape, *parts[0].shape)

    if isinstance(first, Sparse):
        return sparsify(stack(value.dense() for value in values), PruneConfig(threshold=0.0))
    parts: Any = values
    if isinstance(first, Masked):
        codes: Any = stacked([part.value for part in parts], shape)
        return masked(codes, stack(part.mask() for part in parts))
    codes = stack(part.codes for part in parts)
    if isinstance(first, Quantized):
        scale, offset = stack(part.scale for part in parts), None
        if any(part.offset is not None for part in parts):
            none = np.zeros(first.scale.shape, first.codes.dtype)
            offset = stack(none if part.offset is None else part.offset for part in parts)
        return replace(first, codes=codes, scale=scale, offset=offset)
    is_quantized = isinstance(first.lut, Quantized)
    lut: Any = (
        stacked([p.lut for p in parts], shape) if is_quantized else stack(p.lut for p in parts)
    )
    axis = None if first.vector_axis is None else first.vector_axis + len(shape)
    return replace(first, codes=codes, lut=lut, vector_axis=axis)


def joined(values: Sequence[Compressed]) -> Compressed:
    """Return the value that has the rows of several, one after the other.

    Raises
    ------
    UnsupportedError
        If their rows share scales or tables in groups of different sizes.
    """
    if len(values) == 1:
        return values[0]
    size = math.gcd(*(value.shape[0] for value in values))
    pieces = [
        taken(value, np.arange(begin, begin + size))
        for value in values
        for begin in range(0, value.shape[0], size)
    ]

    def merged(array: NDArray[Any]) -> NDArray[Any]:
        return array.reshape(-1, *array.shape[2:])

    try:
        stack = stacked(pieces, (len(pieces),))
    except ValueError as error:
        msg = "its parts have scales or tables of different numbers of rows"
        raise UnsupportedError(msg) from error
    return _arranged(stack, merged, merged, lambda axis: axis - 1)


def _arranged(
    value: Compressed,
    of_codes: _Relayout,
    of_groups: _Relayout,
    of_axis: Callable[[int], int] = lambda axis: axis,
) -> Compressed:
    """Return a value with its codes, and what belongs to groups of them, made into others.

    ``of_axis`` returns where an axis of the codes is then.
    """
    if isinstance(value, Masked):
        codes = _codes_arranged(value.value, of_codes, of_groups, of_axis)
        return masked(codes, of_codes(value.mask()))
    if isinstance(value, Sparse):
        return sparsify(of_codes(value.dense()), PruneConfig(threshold=0.0))
    return _codes_arranged(value, of_codes, of_groups, of_axis)


def _codes_arranged(
    value: Palette | Quantized,
    of_codes: _Relayout,
    of_groups: _Relayout,
    of_axis: Callable[[int], int],
) -> Palette | Quantized:
    if isinstance(value, Quantized):
        offset = None if value.offset is None else of_groups(value.offset)
        scale = of_groups(value.scale)
        return replace(value, codes=of_codes(value.codes), scale=scale, offset=offset)
    lut: Any = value.lut
    is_quantized = isinstance(lut, Quantized)
    lut = _codes_arranged(lut, of_groups, of_groups, of_axis) if is_quantized else of_groups(lut)
    axis = None if value.vector_axis is None else of_axis(value.vector_axis)
    return replace(value, codes=of_codes(value.codes), lut=lut, vector_axis=axis)
