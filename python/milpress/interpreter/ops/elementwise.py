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


absolute = of_one("abs", torch.abs)
arccosine = of_one("acos", torch.acos)
arcsine = of_one("asin", torch.asin)
arctangent = of_one("atan", torch.atan)
area_tangent = of_one("atanh", torch.atanh)
ceiling = of_one("ceil", torch.ceil)
cosine = of_one("cos", torch.cos)
hyperbolic_cosine = of_one("cosh", torch.cosh)
error_function = of_one("erf", torch.erf)
exponential = of_one("exp", torch.exp)
exponential_of_two = of_one("exp2", torch.exp2)
floor = of_one("floor", torch.floor)
logical_not = of_one("logical_not", torch.logical_not)
rounded = of_one("round", torch.round)  # half to even
sign = of_one("sign", torch.sign)
sine = of_one("sin", torch.sin)
hyperbolic_sine = of_one("sinh", torch.sinh)
square_root = of_one("sqrt", torch.sqrt)
square = of_one("square", torch.square)
tangent = of_one("tan", torch.tan)
hyperbolic_tangent = of_one("tanh", torch.tanh)

add = _of_two("add", torch.add)
equal = _of_two("equal", torch.eq)
floor_div = _of_two("floor_div", lambda x, y: torch.div(x, y, rounding_mode="floor"))
greater = _of_two("greater", torch.gt)
greater_equal = _of_two("greater_equal", torch.ge)
less = _of_two("less", torch.lt)
less_equal = _of_two("less_equal", torch.le)
logical_and = _of_two("logical_and", torch.logical_and)
logical_or = _of_two("logical_or", torch.logical_or)
logical_xor = _of_two("logical_xor", torch.logical_xor)
maximum = _of_two("maximum", torch.maximum)
minimum = _of_two("minimum", torch.minimum)
modulo = _of_two("mod", torch.remainder)  # has the divisor's sign
multiply = _of_two("mul", torch.mul)
not_equal = _of_two("not_equal", torch.ne)
power = _of_two("pow", torch.pow)
real_div = _of_two("real_div", lambda x, y: torch.div(real(x), real(y)))
subtract = _of_two("sub", torch.sub)


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
