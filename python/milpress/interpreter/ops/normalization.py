"""Normalization."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from milpress.interpreter.operator import operator
from milpress.interpreter.ops.torch_types import positive


def _standardized(x: Tensor, dims: list[int], epsilon: float) -> Tensor:
    centered = x - x.mean(dims, keepdim=True)
    variance = centered.square().mean(dims, keepdim=True)
    return centered / torch.sqrt(variance + epsilon)


def _scaled(x: Tensor, gamma: Tensor | None, beta: Tensor | None, shape: list[int]) -> Tensor:
    if gamma is not None:
        x = x * gamma.reshape(shape)
    return x if beta is None else x + beta.reshape(shape)


@operator("batch_norm")
def batch_norm(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-5,
) -> Tensor:
    return functional.batch_norm(x, mean, variance, gamma, beta, eps=epsilon)


@operator("instance_norm")
def instance_norm(
    x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, epsilon: float = 1e-5
) -> Tensor:
    normal = _standardized(x, list(range(2, x.dim())), epsilon)
    return _scaled(normal, gamma, beta, [1, -1] + [1] * (x.dim() - 2))


@operator("layer_norm")
def layer_norm(
    x: Tensor,
    axes: list[int] | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-5,
) -> Tensor:
    along = range(x.dim()) if axes is None else axes
    dims = sorted({positive(axis, x.dim()) for axis in along})
    if dims == list(range(x.dim() - len(dims), x.dim())):
        return functional.layer_norm(x, x.shape[dims[0] :], gamma, beta, epsilon)
    shape = [size if dim in dims else 1 for dim, size in enumerate(x.shape)]
    return _scaled(_standardized(x, dims, epsilon), gamma, beta, shape)


@operator("l2_norm")
def l2_norm(x: Tensor, epsilon: float = 1e-6) -> Tensor:
    return x / torch.sqrt(x.square().sum([-3, -2, -1], keepdim=True) + epsilon)


@operator("local_response_norm")
def local_response_norm(
    x: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Tensor:
    return functional.local_response_norm(x, size, alpha, beta, k)
