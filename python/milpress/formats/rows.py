"""Weights as kernels take them: arrays of floats, cut into rows that share parameters."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

import milpress._core as _core
from milpress.errors import ConfigError, UnsupportedError

Floats: TypeAlias = NDArray[np.floating[Any]]
# What is done where a group or block does not divide the channels.
OnIndivisible: TypeAlias = Literal["divisor", "leave"]


def as_weight(weight: Any) -> Floats:
    """Return what `as_float` does, after checking that all values are finite.

    Raises
    ------
    UnsupportedError
        If the weight is of another type, or holds values that are not finite.
    """
    array = as_float(weight)
    check_finite(array)
    return array


def as_float(weight: Any) -> Floats:
    """Return a weight as a C-contiguous float16 or float32 array, without a copy where possible.

    Takes NumPy arrays and torch CPU tensors. bfloat16 becomes float32, exactly.

    Raises
    ------
    UnsupportedError
        If the weight is of another type.
    """
    array = _as_array(weight)
    if array.dtype.name == "bfloat16":
        array = _widen_bfloat16(array.view(np.uint16))
    if array.dtype not in (np.float16, np.float32):
        msg = f"a weight must be float16, bfloat16 or float32, got {array.dtype}"
        raise UnsupportedError(msg)
    return np.ascontiguousarray(array)


def _as_array(weight: Any) -> NDArray[Any]:
    torch: Any = sys.modules.get("torch")
    if torch is not None and isinstance(weight, torch.Tensor):
        tensor = weight.detach()
        if tensor.device.type != "cpu":
            msg = f"a tensor must be on the CPU, got {tensor.device}"
            raise UnsupportedError(msg)
        if tensor.dtype == torch.bfloat16:
            return _widen_bfloat16(tensor.view(torch.int16).numpy().view(np.uint16))
        array: NDArray[Any] = tensor.numpy()
        return array
    return np.asarray(weight)


def _widen_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def check_finite(weight: Floats) -> None:
    """Refuse a weight that holds NaN or an infinity, and say where.

    Raises
    ------
    UnsupportedError
        If there is one.
    """
    first = _core.first_nonfinite(weight.reshape(-1))
    if first < weight.size:
        position = np.unravel_index(first, weight.shape)
        msg = f"a weight must be finite, got {weight[position]} at {[int(i) for i in position]}"
        raise UnsupportedError(msg)


def checked_importance(importance: Any, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return what the errors of a weight's elements are multiplied by.

    Raises
    ------
    ConfigError
        If it has another shape than the weight, or elements that are negative or not finite.
    """
    array = np.ascontiguousarray(importance, np.float32)
    if array.shape != shape:
        msg = f"importance must have the shape of the weight, {shape}, got {array.shape}"
        raise ConfigError(msg)
    if not (np.isfinite(array).all() and (array >= 0).all()):
        msg = "importance must be finite and not negative"
        raise ConfigError(msg)
    return array


def block_grid(shape: tuple[int, ...], block_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the number of blocks along each axis.

    Raises
    ------
    ConfigError
        If a block does not divide its axis.
    """
    for axis, (size, block) in enumerate(zip(shape, block_shape, strict=True)):
        if block < 1 or size % block != 0:
            msg = f"a block must divide axis {axis} of size {size}, got {block}"
            raise ConfigError(msg)
    return tuple(size // block for size, block in zip(shape, block_shape, strict=True))


def to_rows(array: NDArray[Any], block_shape: tuple[int, ...]) -> NDArray[Any]:
    """Return the array as ``(n_blocks, block_size)``; a copy only where blocks are scattered."""
    grid = block_grid(array.shape, block_shape)
    rank = array.ndim
    interleaved = [n for pair in zip(grid, block_shape, strict=True) for n in pair]
    order = [*range(0, 2 * rank, 2), *range(1, 2 * rank, 2)]
    rows = array.reshape(interleaved).transpose(order).reshape(math.prod(grid), -1)
    return np.ascontiguousarray(rows)


def from_rows(
    rows: NDArray[Any], shape: tuple[int, ...], block_shape: tuple[int, ...]
) -> NDArray[Any]:
    """Undo `to_rows`."""
    grid = block_grid(shape, block_shape)
    rank = len(shape)
    order = [axis for pair in zip(range(rank), range(rank, 2 * rank), strict=True) for axis in pair]
    whole = rows.reshape(grid + block_shape).transpose(order)
    return np.ascontiguousarray(whole).reshape(shape)


def spread(array: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """Return an array of that shape, in which each block has the value of its own."""
    for axis, size in enumerate(shape):
        array = np.repeat(array, size // array.shape[axis], axis)
    return array


def normalized_axis(axis: int, rank: int) -> int:
    """Return the axis counted from the front.

    Raises
    ------
    ConfigError
        If the weight has no such axis.
    """
    if not -rank <= axis < rank:
        msg = f"an axis must be from {-rank} to {rank - 1}, got {axis}"
        raise ConfigError(msg)
    return axis % rank


def packed_mask(mask: NDArray[Any]) -> NDArray[np.uint8]:
    """Return a mask as bits, the least significant first, set where it is not zero."""
    return _core.pack(np.ascontiguousarray(mask != 0).view(np.uint8).reshape(-1), 1)


def unpacked_mask(bitmask: NDArray[np.uint8], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Undo `packed_mask`."""
    return _core.unpack(bitmask, 1, math.prod(shape)).view(np.bool_).reshape(shape)


def frozen(array: NDArray[Any]) -> NDArray[Any]:
    """Return a view of the array that can't be written to."""
    view: NDArray[Any] = array.view()
    view.flags.writeable = False
    return view


def divisor_of(
    word: str,
    asked: int,
    shape: Sequence[int],
    axis: int,
    output: int,
    on_indivisible: OnIndivisible,
    multiple_of: int = 1,
) -> tuple[int | None, str]:
    """Return the largest group or block that divides the channels, and how it differs.

    All channels where that would be one by one; ``None`` where it is not to be another one.
    """
    n = shape[axis]
    channels = f"{n} {'output' if axis == output else 'input'} channel{'s' * (n > 1)}"
    if asked <= n and n % asked == 0:
        return asked, ""
    if on_indivisible == "leave":
        return None, f"{word} size {asked} does not divide {channels}"
    smaller = range(min(asked, n), 1, -1)
    size = next((size for size in smaller if n % size == 0 and size % multiple_of == 0), n)
    if size <= asked:
        return size, f"{word} size {size}, as {asked} does not divide {channels}"
    whole = "one table" if word == "group" else f"one {word}"
    least = max(2, multiple_of)
    sizes = f"from {least} to {asked}" if least < asked else f"of {asked}"
    return n, f"{whole}, as no {word} size {sizes} divides {channels}"


def largest_divisor(asked: int, n: int) -> int:
    """Return the largest divisor of a number of channels that is not above what is asked for."""
    return next(size for size in range(min(asked, n), 0, -1) if n % size == 0)
