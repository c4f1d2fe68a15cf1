"""Activation functions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from milpress.interpreter.operator import of_one, operator
from milpress.interpreter.ops.torch_types import check_choice


def _per_channel(parameter: Tensor, x: Tensor) -> Tensor:
    return parameter.reshape([1, -1] + [1] * (x.dim() - 2))


relu = of_one("relu", torch.relu)
relu6 = of_one("relu6", lambda x: torch.clamp(x, 0, 6))
sigmoid = of_one("sigmoid", torch.sigmoid)
silu = of_one("silu", functional.silu)
softplus = of_one("softplus", lambda x: torch.logaddexp(x, torch.zeros_like(x)))
softsign = of_one("softsign", functional.softsign)


@operator("softmax")
def softmax(x: Tensor, axis: int = -1) -> Tensor:
    return torch.softmax(x, axis)


@operator("gelu")
def gelu(x: Tensor, mode: str = "EXACT") -> Tensor:
    check_choice("mode", mode, "EXACT", "TANH_APPROXIMATION", "SIGMOID_APPROXIMATION")
    if mode == "EXACT":
        return functional.gelu(x)
    if mode == "TANH_APPROXIMATION":
        return functional.gelu(x, approximate="tanh")
    return x * torch.sigmoid(1.702 * x)


@operator("clamped_relu")
def clamped_relu(x: Tensor, alpha: float, beta: float) -> Tensor:
    return torch.where(x >= 0, x, alpha * x).clamp(max=beta)


@operator("elu")
def elu(x: Tensor, alpha: float) -> Tensor:
    # torch.where instead of functional.elu, which takes no alpha below 0.
    return torch.where(x > 0, x, alpha * torch.expm1(x))


@operator("leaky_relu")
def leaky_relu(x: Tensor, alpha: float) -> Tensor:
    return torch.where(x >= 0, x, alpha * x)


@operator("linear_activation")
def linear_activation(x: Tensor, alpha: float, beta: float) -> Tensor:
    return alpha * x + beta


@operator("prelu")
def prelu(x: Tensor, alpha: Tensor) -> Tensor:
    return torch.where(x > 0, x, _per_channel(alpha, x) * x)


@operator("scaled_tanh")
def scaled_tanh(x: Tensor, alpha: float, beta: float) -> Tensor:
    return alpha * torch.tanh(beta * x)


@operator("sigmoid_hard")
def sigmoid_hard(x: Tensor, alpha: float, beta: float) -> Tensor:
    return torch.clamp(alpha * x + beta, 0, 1)


@operator("softplus_parametric")
def softplus_parametric(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    scaled = _per_channel(beta, x) * x
    return _per_channel(alpha, x) * torch.logaddexp(scaled, torch.zeros_like(scaled))


@operator("thresholded_relu")
def thresholded_relu(x: Tensor, alpha: float) -> Tensor:
    return torch.where(x >= alpha, x, torch.zeros_like(x))
