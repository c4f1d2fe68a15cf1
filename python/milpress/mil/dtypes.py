"""Element types: their numbers in MIL and in weight files, and the NumPy types that hold them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from milpress.errors import PackageError


@dataclass(frozen=True, slots=True)
class DType:
    """An element type.

    ``storage`` is the NumPy type in which elements are held in memory, one element each, and
    ``blob`` the type number in weight files (``None`` where weight files have none).
    """

    name: str
    mil: int
    blob: int | None
    bits: int
    storage: np.dtype[np.generic]
    immediate: str

    @property
    def is_float(self) -> bool:
        """Whether milpress computes with this type."""
        return self.name in ("float16", "float32")

    def n_bytes(self, n_elements: int) -> int:
        """Bytes that so many elements take when stored."""
        return (n_elements * self.bits + 7) // 8


def _dtype(name: str, mil: int, blob: int | None, bits: int, storage: str, field: str) -> DType:
    return DType(name, mil, blob, bits, np.dtype(storage), field)


_ALL = (
    _dtype("bool", 1, None, 8, "bool", "bools"),
    _dtype("float16", 10, 1, 16, "float16", "bytes"),
    _dtype("float32", 11, 2, 32, "float32", "floats"),
    _dtype("float64", 12, None, 64, "float64", "doubles"),
    _dtype("bfloat16", 13, 5, 16, "uint16", "bytes"),
    _dtype("int8", 21, 4, 8, "int8", "bytes"),
    _dtype("int16", 22, 6, 16, "int16", "ints"),
    _dtype("int32", 23, 14, 32, "int32", "ints"),
    _dtype("int64", 24, None, 64, "int64", "longInts"),
    _dtype("int4", 25, 8, 4, "int8", "bytes"),
    _dtype("uint8", 31, 3, 8, "uint8", "bytes"),
    _dtype("uint16", 32, 7, 16, "uint16", "ints"),
    _dtype("uint32", 33, 15, 32, "uint32", "bytes"),
    _dtype("uint64", 34, None, 64, "uint64", "bytes"),
    _dtype("uint4", 35, 11, 4, "uint8", "bytes"),
    _dtype("uint2", 36, 10, 2, "uint8", "bytes"),
    _dtype("uint1", 37, 9, 1, "uint8", "bytes"),
    _dtype("uint6", 38, 13, 6, "uint8", "bytes"),
    _dtype("uint3", 39, 12, 3, "uint8", "bytes"),
    _dtype("float8e4m3fn", 40, 16, 8, "uint8", "bytes"),
    _dtype("float8e5m2", 41, 17, 8, "uint8", "bytes"),
)
_BY_NAME = {dtype.name: dtype for dtype in _ALL}
_BY_MIL = {dtype.mil: dtype for dtype in _ALL}


def by_name(name: str) -> DType:
    """Return the type of that name."""
    return _BY_NAME[name]


def by_mil(number: int) -> DType:
    """Return the type with that number in a model.

    Raises
    ------
    PackageError
        If there is none.
    """
    if number not in _BY_MIL:
        msg = f"a tensor must have a data type that MIL knows, got number {number}"
        raise PackageError(msg)
    return _BY_MIL[number]


def of_array(array: NDArray[np.generic]) -> DType:
    """Return the type whose elements NumPy holds as they are."""
    return _BY_NAME[array.dtype.name]
