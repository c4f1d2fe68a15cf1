"""The arithmetic of ``constexpr_*`` ops: parameters in, weights out.

What does not fit raises a ``ValueError``; who calls names the op.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

import milpress._core as _core
from milpress.formats import Palette, Quantized
from milpress.formats.rows import normalized_axis, spread
from milpress.mil.values import Tensor


def axis_of(tensor: Tensor, rank: int) -> int:
    """Return the axis that a parameter names, from the front or from the end, from the front."""
    if tensor.values.size != 1 or tensor.values.dtype.kind not in "iu":
        msg = f"an axis must be one integer, got {tensor.dtype.name}{list(tensor.values.shape)}"
        raise ValueError(msg)
    return normalized_axis(int(tensor.values.reshape(-1)[0]), rank)


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
    n_bytes = (n_codes * bits + 7) // 8
    if packed.values.dtype != np.uint8 or packed.values.size != n_bytes:
        msg = (
            f"{n_codes} codes of {bits} bits must be {n_bytes} bytes of uint8, "
            f"got {packed.values.size} elements of {packed.dtype.name}"
        )
        raise ValueError(msg)
    return _core.unpack(packed.values.reshape(-1), bits, n_codes).reshape(shape)


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
    is_byte = data.values.dtype in (np.int8, np.uint8)
    if not (is_byte and data.dtype.bits in (4, 8) and scale.dtype.is_float):
        return None
    if offset is not None and offset.dtype != data.dtype:
        return None
    check_blocks(data.values.shape, scale.values.shape)
    if offset is not None and offset.values.shape != scale.values.shape:
        msg = (
            f"offset must have the shape of scale, {scale.values.shape}, got {offset.values.shape}"
        )
        raise ValueError(msg)
    return Quantized(
        codes=data.values,
        scale=scale.values,
        offset=None if offset is None else offset.values,
        bits=data.dtype.bits,
    )


def affine_of(
    data: Tensor, scale: Tensor, zero_point: Tensor, axis: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return data, scale and zero point of iOS16 such that they broadcast.

    Scale and zero point are each a scalar or a vector along the axis. Each has the rank of the data
    afterwards, and both have one shape.
    """
    if data.dtype.name not in ("int8", "uint8"):
        msg = f"quantized_data must be int8 or uint8, got {data.dtype.name}"
        raise ValueError(msg)
    if not scale.dtype.is_float:
        msg = f"scale must be float16 or float32, got {scale.dtype.name}"
        raise ValueError(msg)
    if zero_point.dtype.name not in ("int8", "uint8") and not zero_point.dtype.is_float:
        msg = f"zero_point must be int8, uint8 or float32, got {zero_point.dtype.name}"
        raise ValueError(msg)
    shape = data.values.shape
    for name, numbers in (("scale", scale.values), ("zero_point", zero_point.values)):
        if numbers.ndim > 1 or numbers.size not in (1, shape[axis]):
            msg = (
                f"{name} must be a scalar or a vector of the {shape[axis]} elements of axis "
                f"{axis}, got the shape {numbers.shape}"
            )
            raise ValueError(msg)
    n = max(scale.values.size, zero_point.values.size)
    grid = tuple(n if i == axis else 1 for i in range(len(shape)))

    def filled(tensor: Tensor) -> Tensor:
        # Kernels take what lies in a row.
        return Tensor(tensor.dtype, np.full(n, tensor.values).reshape(grid))

    return data, filled(scale), filled(zero_point)


def offset_as(zero_point: Tensor, data: Tensor) -> Tensor | None:
    """Return a zero point in the type of the data, ``None`` where that can't hold it exactly."""
    if zero_point.dtype == data.dtype:
        return zero_point
    info = np.iinfo(data.values.dtype)
    wide = zero_point.values.astype(np.float64)
    # Not a number is in no range.
    if not ((wide >= info.min) & (wide <= info.max) & (wide == np.rint(wide))).all():
        return None
    return Tensor(data.dtype, wide.astype(data.values.dtype))


def affine(data: Tensor, scale: Tensor, zero_point: Tensor) -> NDArray[Any]:
    """Return ``scale * (data - zero_point)``, computed in float32, in the type of the scale."""
    shifted = data.values.astype(np.float32) - zero_point.values.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray((shifted * scale.values).astype(scale.values.dtype))


def shift_scale(data: Tensor, scale: Tensor, offset: Tensor | None) -> NDArray[Any]:
    """Return ``scale * (data - offset)`` in the type of the scale.

    An offset of float32 beside a scale of float16 is taken off as it is, as by coremltools.
    """
    shape = data.values.shape
    result = data.values.astype(scale.values.dtype)
    if offset is not None:
        result = result - _repeat(offset.values, shape)
    return np.asarray(result * _repeat(scale.values, shape)).astype(scale.values.dtype)


def look_up(codes: NDArray[Any], lut: Tensor, vector_axis: Tensor | None) -> NDArray[Any]:
    """Return the entries that codes name, floats or integers."""
    axis = None if vector_axis is None else axis_of(vector_axis, codes.ndim)
    check_blocks(codes.shape, lut.values.shape[:-2])
    # Integer tables are looked up as floats, which hold every 8-bit integer exactly.
    entries = lut.values if lut.dtype.is_float else lut.values.astype(np.float32)
    dense = Palette(codes=codes, lut=entries, bits=8, vector_axis=axis).dense()
    return dense.astype(lut.values.dtype, copy=False)


def _repeat(array: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    check_blocks(shape, array.shape[: len(shape)])
    return spread(array, shape)
