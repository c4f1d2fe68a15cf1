"""Convolutions, transposed ones and pools, over one to three spatial axes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from milpress.interpreter.operator import operator
from milpress.interpreter.ops.torch_types import padded

_CONV = (functional.conv1d, functional.conv2d, functional.conv3d)
_CONV_TRANSPOSE = (
    functional.conv_transpose1d,
    functional.conv_transpose2d,
    functional.conv_transpose3d,
)
_PAD_TYPES = ("valid", "custom", "same", "same_lower")
_AVG_POOL = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)
_MAX_POOL = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)


def window_pairs(
    pad_type: str,
    pad: Sequence[int] | None,
    sizes: Sequence[int],
    extents: Sequence[int],
    strides: Sequence[int],
) -> list[tuple[int, int]]:
    """Return how much is padded before and after each spatial axis.

    ``extents`` are the kernel's sizes with its dilation. The odd one of ``same`` comes after,
    that of ``same_lower`` before.
    """
    if pad_type == "custom" and pad is not None:
        return list(zip(pad[::2], pad[1::2], strict=True))
    if pad_type in ("custom", "valid"):
        return [(0, 0)] * len(sizes)
    if pad_type not in _PAD_TYPES:
        msg = f"pad_type must be one of {', '.join(_PAD_TYPES)}, got {pad_type}"
        raise ValueError(msg)
    pairs = []
    for size, extent, stride in zip(sizes, extents, strides, strict=True):
        amount = max(0, (math.ceil(size / stride) - 1) * stride + extent - size)
        less, more = amount // 2, amount - amount // 2
        pairs.append((less, more) if pad_type == "same" else (more, less))
    return pairs


def window_extents(sizes: Sequence[int], dilations: Sequence[int]) -> list[int]:
    return [(size - 1) * step + 1 for size, step in zip(sizes, dilations, strict=True)]


@operator("conv")
def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    strides: list[int] | None = None,
    pad_type: str = "valid",
    pad: list[int] | None = None,
    dilations: list[int] | None = None,
    groups: int = 1,
) -> Tensor:
    rank = x.dim() - 2
    strides = strides or [1] * rank
    dilations = dilations or [1] * rank
    extents = window_extents(weight.shape[2:], dilations)
    pairs = window_pairs(pad_type, pad, x.shape[2:], extents, strides)
    if all(before == after for before, after in pairs):
        even = [before for before, _ in pairs]
    else:
        x, even = padded(x, pairs), [0] * rank
    return _CONV[rank - 1](x, weight, bias, strides, even, dilations, groups)


def transposed_pairs(
    pad_type: str,
    pad: Sequence[int] | None,
    sizes: Sequence[int],
    full_sizes: Sequence[int],
    strides: Sequence[int],
    output_shape: Sequence[int] | None,
) -> list[tuple[int, int]]:
    """Return how much of the whole output is cut off before and after each spatial axis."""
    pairs = []
    for axis, (size, full, stride) in enumerate(zip(sizes, full_sizes, strides, strict=True)):
        before, after = (0, 0) if pad_type != "custom" or pad is None else pad[2 * axis :][:2]
        if output_shape is not None:
            wanted = output_shape[2 + axis]
        elif pad_type in ("same", "same_lower"):
            wanted = size * stride
        else:
            wanted = full - before - after
        if pad_type in ("same", "same_lower"):
            # As the convolution that this one undoes would have padded.
            amount = max(0, full - wanted)
            before = amount // 2 if pad_type == "same" else amount - amount // 2
        pairs.append((before, full - wanted - before))
    return pairs


@operator("conv_transpose")
def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pad: list[int] | None = None,
    output_shape: list[int] | None = None,
    pad_type: str = "valid",
    strides: list[int] | None = None,
    dilations: list[int] | None = None,
    groups: int = 1,
) -> Tensor:
    rank = x.dim() - 2
    strides = strides or [1] * rank
    dilations = dilations or [1] * rank
    if pad_type not in _PAD_TYPES:
        msg = f"pad_type must be one of {', '.join(_PAD_TYPES)}, got {pad_type}"
        raise ValueError(msg)
    y = _CONV_TRANSPOSE[rank - 1](x, weight, None, strides, 0, 0, groups, dilations)
    pairs = transposed_pairs(pad_type, pad, x.shape[2:], y.shape[2:], strides, output_shape)
    y = padded(y, [(-before, -after) for before, after in pairs])
    return y if bias is None else y + bias.reshape([-1] + [1] * rank)


def _pool_padding(
    x: Tensor,
    kernel_sizes: Sequence[int],
    strides: Sequence[int],
    pad_type: str,
    pad: Sequence[int] | None,
    ceil_mode: bool,
) -> tuple[list[tuple[int, int]], list[tuple[int, int]], list[int] | None]:
    """Return the padding of a pool, and what its last windows reach beyond that.

    Last comes each axis' padding, if torch's pools have it: even, and up to half a kernel.
    """
    pairs = window_pairs(pad_type, pad, x.shape[2:], kernel_sizes, strides)
    beyond = []
    is_even = True
    axes = zip(x.shape[2:], kernel_sizes, strides, pairs, strict=True)
    for size, kernel, stride, (before, after) in axes:
        whole = size + before + after
        count = math.ceil((whole - kernel) / stride) + 1
        if before + after > 0 and (count - 1) * stride >= size + before:
            count -= 1
        missing = (count - 1) * stride + kernel - whole if ceil_mode else 0
        beyond.append((0, max(0, missing)))
        is_even &= before == after and 2 * before <= kernel <= size and missing <= 0
    return pairs, beyond, [before for before, _ in pairs] if is_even else None


@operator("max_pool")
def max_pool(
    x: Tensor,
    kernel_sizes: list[int],
    pad_type: str,
    strides: list[int] | None = None,
    pad: list[int] | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    rank = x.dim() - 2
    strides = strides or [1] * rank
    pairs, beyond, even = _pool_padding(x, kernel_sizes, strides, pad_type, pad, ceil_mode)
    if even is None:
        x = padded(padded(x, pairs, -math.inf), beyond, -math.inf)
    return _MAX_POOL[rank - 1](x, kernel_sizes, strides, even or 0)


@operator("avg_pool")
def avg_pool(
    x: Tensor,
    kernel_sizes: list[int],
    pad_type: str,
    exclude_padding_from_average: bool = False,
    strides: list[int] | None = None,
    pad: list[int] | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    rank = x.dim() - 2
    strides = strides or [1] * rank
    pairs, beyond, even = _pool_padding(x, kernel_sizes, strides, pad_type, pad, ceil_mode)
    pool = _AVG_POOL[rank - 1]
    if even is not None:
        return pool(x, kernel_sizes, strides, even, False, not exclude_padding_from_average)
    mean = pool(padded(padded(x, pairs), beyond), kernel_sizes, strides)
    counted = torch.ones(1, 1, *x.shape[2:])
    counted = padded(counted, pairs, 0.0 if exclude_padding_from_average else 1.0)
    share = pool(padded(counted, beyond), kernel_sizes, strides)
    return mean / share


@operator("l2_pool")
def l2_pool(
    x: Tensor,
    kernel_sizes: list[int],
    pad_type: str,
    strides: list[int] | None = None,
    pad: list[int] | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    rank = x.dim() - 2
    strides = strides or [1] * rank
    pairs, beyond, _ = _pool_padding(x, kernel_sizes, strides, pad_type, pad, ceil_mode)
    squares = padded(padded(x.square(), pairs), beyond)
    mean = _AVG_POOL[rank - 1](squares, kernel_sizes, strides)
    return torch.sqrt(mean * math.prod(kernel_sizes))
