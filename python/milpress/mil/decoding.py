"""The arithmetic of ``constexpr_*`` ops: parameters in, weights out.

What does not fit raises a ``ValueError``; who calls names the op.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from milpress import _core
from milpress.formats import Palette, Quantized
from milpress.mil.values import Tensor


def axis_of(tensor: Tensor, rank: int) -> int:
    """Return the axis that a parameter names."""
    if tensor.values.size != 1 or tensor.values.dtype.kind not in "iu":
        msg = f"an axis must be one integer, got {tensor.dtype.name}{list(tensor.values.shape)}"
        raise ValueError(msg)
    axis = int(tensor.values.reshape(-1)[0])
    if not -rank <= axis < rank:
        msg = f"an axis must be one of {rank}, got {axis}"
        raise ValueError(msg)
    return axis


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """Return the shape that a parameter of iOS16 holds."""
    sizes = tensor.values
    if sizes.ndim != 1 or sizes.dtype.kind not in "iu" or (sizes < 0).any():
        msg = f"a shape must be a vector of sizes, got {tensor.dtype.name}{list(sizes.shape)}"
        raise ValueError(msg)
    return tuple(int(size) for size in sizes)


def unpacked(packed: Tensor, bits: int, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Return the codes that a parameter of iOS16 holds as bytes."""
    n_codes = math.prod(shape)
    if packed.values.dtype != np.uint8 or packed.values.size != (n_codes * bits + 7) // 8:
        msg = (
            f"{n_codes} codes of {bits} bits must be {(n_codes * bits + 7) // 8} bytes of uint8, "
            f"got {packed.values.size} elements of {packed.dtype.name}"
        )
        raise ValueError(msg)
    return _core.unpack(packed.values.reshape(-1), bits, n_codes).reshape(shape)


def bitmask_of(mask: NDArray[Any]) -> NDArray[np.uint8]:
    """Return a mask, one element a code, as bits."""
    return _core.pack(np.ascontiguousarray(mask != 0).view(np.uint8).reshape(-1), 1)


def check_kept(mask: NDArray[Any], nonzeros: Tensor) -> None:
    """Refuse another number of values than a mask keeps."""
    n_kept = np.count_nonzero(mask)
    if nonzeros.values.shape != (n_kept,):
        msg = (
            f"there must be as many values as the mask keeps, {n_kept}, "
            f"got the shape {nonzeros.values.shape}"
        )
        raise ValueError(msg)


def check_blocks(shape: tuple[int, ...], grid: tuple[int, ...]) -> None:
    """Refuse numbers of blocks that don't divide a shape."""
    if len(shape) != len(grid) or any(
        n < 1 or size % n for size, n in zip(shape, grid, strict=True)
    ):
        msg = f"blocks must divide the shape {shape}, got {grid} of them"
        raise ValueError(msg)


def scattered(mask: Tensor, nonzeros: Tensor) -> Tensor:
    """Return values where a mask keeps them, and zeros elsewhere."""
    check_kept(mask.values, nonzeros)
    dense = np.zeros(mask.values.shape, nonzeros.values.dtype)
    dense[mask.values != 0] = nonzeros.values
    return Tensor(nonzeros.dtype, dense)


def quantized_of(data: Tensor, scale: Tensor, offset: Tensor | None) -> Quantized | None:
    """Return the value, or ``None`` where codes or offsets are of types that it can't hold."""
    if data.values.dtype not in (np.int8, np.uint8) or not scale.dtype.is_float:
        return None
    if offset is not None and offset.dtype != data.dtype:
        return None
    if data.dtype.bits not in (4, 8):
        return None
    check_blocks(data.values.shape, scale.values.shape)
    if offset is not None and offset.values.shape != scale.values.shape:
        msg = f"offset must have the shape of scale, {scale.values.shape}, got another"
        raise ValueError(msg)
    return Quantized(
        codes=data.values,
        scale=scale.values,
        offset=None if offset is None else offset.values,
        bits=data.dtype.bits,
    )


def spread(tensor: Tensor, data: Tensor, axis: int, like: Tensor | None = None) -> Tensor:
    """Give a vector or scalar of iOS16 the rank of the data."""
    numbers = tensor.values
    if like is not None and numbers.ndim == 0:
        numbers = np.full(like.values.shape, numbers)
    shape = [1] * data.values.ndim
    if numbers.ndim:
        shape[axis] = numbers.size
    return Tensor(tensor.dtype, numbers.reshape(shape))


def shift_scale(data: Tensor, scale: Tensor, offset: Tensor | None) -> NDArray[Any]:
    """Return ``scale * (data - offset)`` in the type of the scale."""
    shape = data.values.shape
    result = data.values.astype(scale.values.dtype)
    if offset is not None:
        result = result - _repeat(offset.values, shape).astype(scale.values.dtype)
    return np.asarray(result * _repeat(scale.values, shape))


def look_up(codes: NDArray[Any], lut: Tensor, vector_axis: Tensor | None) -> NDArray[Any]:
    """Return the entries that codes name, floats or integers."""
    axis = None if vector_axis is None else axis_of(vector_axis, codes.ndim)
    check_blocks(codes.shape, lut.values.shape[:-2])
    palette = Palette(codes=codes, lut=lut.values, bits=8, vector_axis=axis)
    if lut.dtype.is_float:
        return palette.dense()
    # Integer tables are looked up as floats, which hold every 8-bit integer exactly.
    as_float = Palette(codes=codes, lut=lut.values.astype(np.float32), bits=8, vector_axis=axis)
    return as_float.dense().astype(lut.values.dtype)


def _repeat(array: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    check_blocks(shape, array.shape[: len(shape)])
    for axis, size in enumerate(shape):
        array = np.repeat(array, size // array.shape[axis], axis)
    return array
