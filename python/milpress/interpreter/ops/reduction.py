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


# Over which axes, and whether these are kept, torch's functions take in that order.
l1_norm = _over_axes("reduce_l1_norm", lambda x, *over: x.abs().sum(*over))
l2_norm = _over_axes("reduce_l2_norm", lambda x, *over: real(x).square().sum(*over).sqrt())
log_sum = _over_axes("reduce_log_sum", lambda x, *over: real(x).sum(*over).log())
log_sum_exp = _over_axes("reduce_log_sum_exp", lambda x, *over: real(x).logsumexp(*over))
greatest = _over_axes("reduce_max", torch.amax)
mean = _over_axes("reduce_mean", lambda x, *over: real(x).mean(*over))
least = _over_axes("reduce_min", torch.amin)
product = _over_axes("reduce_prod", _prod)
total = _over_axes("reduce_sum", torch.sum)
sum_square = _over_axes("reduce_sum_square", lambda x, *over: x.square().sum(*over))


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
