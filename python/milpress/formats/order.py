"""Values in order and without repetition, halves by their bits.

NumPy's own sort of float16 leaves some arrays unsorted on processors with AVX-512 and without its
arithmetic of halves (seen with 2.3.5), and all that builds on it goes wrong with it. Integers in
the order of the halves are sorted instead; nothing else in the package gives NumPy halves to sort.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_SIGN = np.uint16(0x8000)
_INFINITY = np.uint16(0x7C00)
_NAN = np.uint16(0x7E00)


def ascending(array: NDArray[Any], axis: int = -1) -> NDArray[Any]:
    """Return an array sorted along an axis, NaN last.

    Parameters
    ----------
    array
        Of any type of number; a half's zeros become positive.
    axis
        The axis.
    """
    if array.dtype != np.float16:
        return np.sort(array, axis=axis)
    return _halves(np.sort(_keys(array), axis=axis))


def distinct(array: NDArray[Any]) -> NDArray[Any]:
    """Return the distinct values, ascending; the two zeros are one, and so is every NaN."""
    if array.dtype != np.float16:
        return np.unique(array)
    return _halves(np.unique(_keys(array)))


def distinct_rows(rows: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.intp]]:
    """Return a matrix's distinct rows in the order of their elements, and which each row is."""
    if rows.dtype != np.float16:
        values, inverse = np.unique(rows, axis=0, return_inverse=True)
    else:
        keys, inverse = np.unique(_keys(rows), axis=0, return_inverse=True)
        values = _halves(keys)
    return values, inverse.reshape(-1)


def _keys(halves: NDArray[np.float16]) -> NDArray[np.uint16]:
    """Return integers in the order of the halves: equal where they are, and greatest for NaN."""
    bits = halves.view(np.uint16)
    magnitude = bits & ~_SIGN
    bits = np.where(magnitude == 0, magnitude, bits)
    bits = np.where(magnitude > _INFINITY, _NAN, bits)
    return np.where(bits & _SIGN, ~bits, bits | _SIGN)


def _halves(keys: NDArray[np.uint16]) -> NDArray[np.float16]:
    """Undo `_keys`."""
    return np.where(keys & _SIGN, keys ^ _SIGN, ~keys).view(np.float16)
