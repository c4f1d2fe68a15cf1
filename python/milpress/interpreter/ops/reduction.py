"""Reductions along axes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from milpress.interpreter.operator import Operator, operator
from milpress.interpreter.ops.torch_types import converted, positive, real


def _over_axes(name: str, function: Callable[[Tensor, list[int], bool], Tensor]) -> Operator:
    @operator(name)
    def reduce(x: Tensor, axes: list[int] | None = None, keep_dims: bool = False) -> Tensor:
        along = range(x.dim()) if axes is None else axes
        dims = sorted({positive(axis, x.dim()) for axis in along})
        if not dims:  # torch would take an empty list for every axis
            return function(x.unsqueeze(0), [0], False)
        return function(x, dims, keep_dims)

    return reduce


def _prod(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    for dim in reversed(dims):
        x = torch.prod(x, dim, keepdim=keep)
    return x


l1_norm = _over_axes("reduce_l1_norm", lambda x, dims, keep: x.abs().sum(dims, keepdim=keep))
l2_norm = _over_axes(
    "reduce_l2_norm", lambda x, dims, keep: real(x).square().sum(dims, keepdim=keep).sqrt()
)
log_sum = _over_axes("reduce_log_sum", lambda x, dims, keep: real(x).sum(dims, keepdim=keep).log())
log_sum_exp = _over_axes(
    "reduce_log_sum_exp", lambda x, dims, keep: real(x).logsumexp(dims, keepdim=keep)
)
greatest = _over_axes("reduce_max", lambda x, dims, keep: x.amax(dims, keepdim=keep))
mean = _over_axes("reduce_mean", lambda x, dims, keep: real(x).mean(dims, keepdim=keep))
least = _over_axes("reduce_min", lambda x, dims, keep: x.amin(dims, keepdim=keep))
product = _over_axes("reduce_prod", _prod)
total = _over_axes("reduce_sum", lambda x, dims, keep: x.sum(dims, keepdim=keep))
sum_square = _over_axes(
    "reduce_sum_square", lambda x, dims, keep: x.square().sum(dims, keepdim=keep)
)


@operator("reduce_argmax", added={7: ("output_dtype",)})
def argmax(
    x: Tensor, axis: int = -1, keep_dims: bool = False, output_dtype: str = "int32"
) -> Tensor:
    return converted(torch.argmax(x, axis, keepdim=keep_dims), output_dtype)


@operator("reduce_argmin", added={7: ("output_dtype",)})
def argmin(
    x: Tensor, axis: int = -1, keep_dims: bool = False, output_dtype: str = "int32"
) -> Tensor:
    return converted(torch.argmin(x, axis, keepdim=keep_dims), output_dtype)
