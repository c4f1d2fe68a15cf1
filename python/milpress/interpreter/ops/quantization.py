"""Quantizing and dequantizing."""

from __future__ import annotations

import torch
from torch import Tensor

from milpress.interpreter.operator import operator
from milpress.interpreter.ops.torch_types import converted, limits


def _along(parameter: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """Return a scale or zero point in the shape that suits ``x``."""
    shape = [1] * x.dim()
    if axis is not None and parameter.numel() > 1:
        shape[axis] = -1
    return parameter.to(torch.float32).reshape(shape)


@operator("quantize", since=7)
def quantize(
    input: Tensor,  # noqa: A002 - MIL's name
    scale: Tensor,
    output_dtype: str,
    zero_point: Tensor | None = None,
    axis: int | None = None,
) -> Tensor:
    codes = torch.round(input / _along(scale, input, axis))
    if zero_point is not None:
        codes = codes + _along(zero_point, input, axis)
    return converted(codes.clamp(*limits(output_dtype)), output_dtype)


@operator("dequantize", since=7)
def dequantize(
    input: Tensor,  # noqa: A002 - MIL's name
    scale: Tensor,
    zero_point: Tensor | None = None,
    axis: int | None = None,
) -> Tensor:
    codes = input.to(torch.float32)
    if zero_point is not None:
        codes = codes - _along(zero_point, input, axis)
    return codes * _along(scale, input, axis)
