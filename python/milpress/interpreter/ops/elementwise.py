"""Elementwise ops, with broadcasting."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from milpress.interpreter.operator import Operator, of_one, operator
from milpress.interpreter.ops.torch_types import converted, real


def _of_two(name: str, function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    @operator(name)
    def apply(x: Tensor, y: Tensor) -> Tensor:
        return function(x, y)

    return apply


# Ops that torch has by MIL's names.
ALIKE_OF_ONE = [
    of_one(name, getattr(torch, name))
    for name in (
        "abs acos asin atan atanh ceil cos cosh erf exp exp2 floor logical_not round sign sin sinh "
        "sqrt square tan tanh"
    ).split()
]
ALIKE_OF_TWO = [
    _of_two(name, getattr(torch, name))
    for name in (
        "add greater greater_equal less less_equal logical_and logical_or logical_xor maximum "
        "minimum mul not_equal pow sub"
    ).split()
]

equal = _of_two("equal", torch.eq)
floor_div = _of_two("floor_div", lambda x, y: torch.div(x, y, rounding_mode="floor"))
modulo = _of_two("mod", torch.remainder)  # has the divisor's sign
real_div = _of_two("real_div", lambda x, y: torch.div(real(x), real(y)))


@operator("identity")
def identity(x: object) -> object:  # a list as well
    return x


@operator("inverse")
def inverse(x: Tensor, epsilon: float = 1e-4) -> Tensor:
    return torch.reciprocal(x + epsilon)


@operator("log")
def logarithm(x: Tensor, epsilon: float = 1e-45) -> Tensor:
    return torch.log(x + epsilon)


@operator("rsqrt")
def reciprocal_square_root(x: Tensor, epsilon: float = 1e-12) -> Tensor:
    return torch.rsqrt(x + epsilon)


@operator("clip")
def clip(x: Tensor, alpha: float, beta: float) -> Tensor:
    return torch.clamp(x, alpha, beta)


@operator("threshold")
def threshold(x: Tensor, alpha: float) -> Tensor:
    return torch.clamp(x, min=alpha)


@operator("cast")
def cast(x: Tensor, dtype: str) -> Tensor:
    return converted(x, dtype)


@operator("select")
def select(cond: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(cond.to(torch.bool), a, b)
