"""Ops of torch by way of others, for those that coremltools does not lower."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from milpress.torch._frontends.lowering import is_lowered, is_lowered_by_user

Rules: TypeAlias = dict[Any, Callable[..., Any]]

aten = torch.ops.aten
prims = torch.ops.prims


def known() -> Rules:
    """Return how to write ops by others: torch's own rules, and what neither has."""
    return {
        **torch._decomp.global_decomposition_table["post_autograd"],
        **dict(torch.export.default_decompositions().items()),  # type: ignore[no-untyped-call]
        **_missing(),
    }


def needed(rules: Rules) -> Rules:
    """Return those of the known rules that are of ops that coremltools can't lower as they are.

    What a user has registered with ``coremltools.converters.mil.register_torch_op`` it can.
    """
    corrected = {op: rule for op, rule in _corrections().items() if not is_lowered_by_user(op)}
    return {**{op: rule for op, rule in rules.items() if not is_lowered(op)}, **corrected}


def _missing() -> Rules:
    """Return rules for what neither coremltools nor torch writes by ops that coremltools lowers."""
    rules: Rules = {
        **_twins_of_prims(),
        aten._cdist_forward.default: _cdist,
        aten._trilinear.default: _trilinear,
        aten.alias.default: lambda x: x,
        aten.bitwise_or.Tensor: _if_bool(torch.logical_or),
        aten.bitwise_xor.Tensor: _if_bool(torch.logical_xor),
        aten.copysign.Tensor: lambda x, y: torch.where(torch.signbit(y), -x.abs(), x.abs()),
        aten.cross.default: _cross,
        aten.cummax.default: functools.partial(_cumulative, torch.max, -math.inf),
        aten.cummin.default: functools.partial(_cumulative, torch.min, math.inf),
        aten.diag_embed.default: _diag_embed,
        aten.fmax.default: functools.partial(_number, torch.maximum),
        aten.fmin.default: functools.partial(_number, torch.minimum),
        aten.histc.default: _histc,
        aten.kthvalue.default: _kthvalue,
        aten.masked_scatter.default: _masked_scatter,
        aten.median.default: _median,
        aten.median.dim: _median_along,
        aten.signbit.default: lambda x: (x < 0) | (1 / x < 0),  # also of zero
        aten.sort.stable: _sort,
        aten.var_mean.correction: _var_mean,
        prims.fmod.default: lambda x, y: x - y * torch.trunc(x / y),
        prims.trunc.default: lambda x: torch.where(x < 0, torch.ceil(x), torch.floor(x)),
    }
    if hasattr(torch.ops.transformers, "grouped_mm_fallback"):
        rules[torch.ops.transformers.grouped_mm_fallback.default] = _grouped_mm
    return rules


def _twins_of_prims() -> Rules:
    """Return the ops of ``aten`` for those, of the same names, in which torch's rules end."""
    names = "abs bitwise_and ceil eq exp floor ge gt le log lt mul ne neg sqrt sub".split()
    rules = {getattr(prims, name).default: getattr(torch, name) for name in names}
    return {**rules, prims.where.default: torch.where, prims.bitwise_or.default: torch.bitwise_or}


def _corrections() -> Rules:
    """Return rules for what coremltools lowers by another op, or not for all arguments."""
    return {
        aten.acosh.default: lambda x: torch.log(x + torch.sqrt(x * x - 1)),
        aten.asinh.default: _asinh,
        aten.clamp.Tensor: _clamp,
        aten.constant_pad_nd.default: _pad,
        aten.cumsum.default: _cumsum,
        aten.diagonal.default: _diagonal,
        aten.diagonal_copy.default: _diagonal,
        aten.gelu.default: _gelu,
        aten.reciprocal.default: lambda x: torch.full((), 1.0) / x,
        aten.rms_norm.default: _rms_norm,
        aten.scatter.value: _scatter,
        aten.where.Scalar: _where,
        aten.where.ScalarOther: _where,
        aten.where.ScalarSelf: _where,
    }


def _if_bool(op: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, y: op(x, y) if x.dtype == y.dtype == torch.bool else NotImplemented


def _number(op: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Return what an op says of two numbers, or the one of them that is a number."""
    return torch.where(torch.isnan(x), y, torch.where(torch.isnan(y), x, op(x, y)))


def _asinh(x: Tensor) -> Tensor:
    return torch.sign(x) * torch.log(x.abs() + torch.sqrt(x * x + 1))


def _clamp(x: Tensor, min: Tensor | None = None, max: Tensor | None = None) -> Tensor:  # noqa: A002
    above = x if min is None else torch.maximum(x, min)
    return above if max is None else torch.minimum(above, max)


def _cross(x: Tensor, y: Tensor, dim: int | None = None) -> Tensor:
    first = next(i for i, size in enumerate(x.shape) if size == 3) if dim is None else dim
    product: Tensor = torch.linalg.cross(x, y, dim=first)
    return product


def _cumsum(x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Any:
    if dim >= 0 and dtype is None:
        return NotImplemented
    return torch.cumsum(x if dtype is None else x.to(dtype), dim % x.ndim)


def _gelu(x: Tensor, *, approximate: str = "none") -> Any:
    if approximate == "none":
        return NotImplemented
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)
    return 0.5 * x * (1 + torch.tanh(inner))


def _rms_norm(
    x: Tensor, normalized_shape: list[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """Divide by the root mean square; squares are of numbers up to 1, for float16."""
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    axes = list(range(-len(normalized_shape), 0))
    greatest = x.abs().amax(axes, keepdim=True).clamp(min=math.sqrt(max(eps, 1e-12)))
    x = x / greatest
    square = (x * x).mean(axes, keepdim=True) + eps / greatest / greatest
    x = x * torch.rsqrt(square)
    return x if weight is None else x * weight


def _where(condition: Tensor, a: Tensor | float, b: Tensor | float) -> Tensor:
    """Choose between a tensor and a number, in the type that torch gives them together."""
    dtype = torch.result_type(a, b)
    return torch.where(condition, _as_tensor(a, dtype), _as_tensor(b, dtype))


def _as_tensor(value: Tensor | float, dtype: torch.dtype) -> Tensor:
    # torch.tensor makes a constant, which has no place in a program that is exported already.
    return value.to(dtype) if isinstance(value, Tensor) else torch.full((), value, dtype=dtype)


def _pad(x: Tensor, pad: list[int], value: float = 0) -> Any:
    """Cut off what negative numbers of a padding take away."""
    cuts = [max(-n, 0) if isinstance(n, int) else 0 for n in pad]
    if not any(cuts):
        return NotImplemented
    for i in range(len(pad) // 2):
        before, after = cuts[2 * i : 2 * i + 2]
        x = x.narrow(-1 - i, before, x.shape[-1 - i] - before - after)
    rest = [n + cut for n, cut in zip(pad, cuts, strict=True)]
    return torch.constant_pad_nd(x, rest, value) if any(rest) else x


def _scatter(x: Tensor, dim: int, index: Tensor, value: float) -> Tensor:
    """Put a number, in the type of what it is put into."""
    return torch.scatter(x, dim, index, torch.full(index.shape, value, dtype=x.dtype))


def _diagonal(x: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Tensor:
    n, m = x.shape[dim1], x.shape[dim2]
    length = min(n, m - offset) if offset >= 0 else min(n + offset, m)
    first = offset if offset >= 0 else -offset * m
    places = first + torch.arange(max(length, 0)) * (m + 1)
    return torch.movedim(x, (dim1, dim2), (-2, -1)).flatten(-2).index_select(-1, places)


def _diag_embed(x: Tensor, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Tensor:
    n = x.shape[-1] + abs(offset)
    row = torch.arange(n)
    is_on = row[None] == row[:, None] + offset  # (rows, columns)
    padding = (offset, 0) if offset >= 0 else (0, -offset)
    by_column = torch.nn.functional.pad(x, padding)[..., None, :]
    square = torch.where(is_on, by_column, torch.zeros((), dtype=x.dtype))
    return torch.movedim(square, (-2, -1), (dim1, dim2))


def _sort(
    x: Tensor,
    *,
    stable: bool | None,  # noqa: ARG001 - Core ML has one way to sort
    dim: int = -1,
    descending: bool = False,
) -> tuple[Tensor, Tensor]:
    values, places = torch.sort(x, dim, descending)
    return values, places


def _kthvalue(x: Tensor, k: int, dim: int = -1, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    found = (part.narrow(dim, k - 1, 1) for part in torch.sort(x, dim))
    values, places = (part if keepdim else part.squeeze(dim) for part in found)
    return values, places


def _median_along(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    return _kthvalue(x, (x.shape[dim] + 1) // 2, dim, keepdim)


def _median(x: Tensor) -> Tensor:
    return _median_along(x.reshape(-1), 0)[0]


def _cumulative(
    op: Callable[..., tuple[Tensor, Tensor]], start: float, x: Tensor, dim: int
) -> tuple[Tensor, Tensor]:
    """Return the greatest or least of what is up to each place, and where it is."""
    x = x.movedim(dim, -1)[..., None, :]
    is_before = torch.ones(x.shape[-1], x.shape[-1], dtype=torch.bool).tril()
    values, places = op(torch.where(is_before, x, torch.full((), start, dtype=x.dtype)), -1)
    return values.movedim(-1, dim), places.movedim(-1, dim)


def _masked_scatter(x: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    """Put the elements of a source, in order, where a mask is true."""
    mask = mask.expand(x.shape)
    place = torch.cumsum(mask.reshape(-1).to(torch.int64), 0) - 1
    taken = source.reshape(-1)[place.clamp(0, source.numel() - 1)].reshape(x.shape)
    return torch.where(mask, taken, x)


def _var_mean(
    x: Tensor, dim: list[int] | None = None, *, correction: float = 1, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    dim = list(range(x.ndim)) if dim is None else dim
    return torch.var(x, dim, correction=correction, keepdim=keepdim), torch.mean(x, dim, keepdim)


def _trilinear(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    expand1: list[int],
    expand2: list[int],
    expand3: list[int],
    sumdim: list[int],
    unroll_dim: int = 1,  # noqa: ARG001 - how to compute it
) -> Tensor:
    a, b, c = (
        functools.reduce(torch.unsqueeze, axes, tensor)
        for tensor, axes in ((a, expand1), (b, expand2), (c, expand3))
    )
    return (a * b * c).sum(sumdim)


def _cdist(a: Tensor, b: Tensor, p: float, mode: int | None) -> Tensor:  # noqa: ARG001
    distances: Tensor = torch.linalg.vector_norm(a[..., :, None, :] - b[..., None, :, :], p, -1)
    return distances


def _histc(x: Tensor, bins: int = 100, min: float = 0, max: float = 0) -> Tensor:  # noqa: A002
    """Count the elements that fall into each of some bins of equal width."""
    low, high = (x.min(), x.max()) if min == max else (min, max)
    places = (x.reshape(-1) - low) * (bins / (high - low))
    places = torch.where(x.reshape(-1) == high, bins - 1, places.floor())
    return (places == torch.arange(bins, dtype=x.dtype)[:, None]).to(x.dtype).sum(-1)


def _grouped_mm(x: Tensor, weights: Tensor, offs: Tensor) -> Tensor:
    """Multiply each group of rows by a matrix of its own; the groups end at ``offs``."""
    n = len(weights)
    group = (torch.arange(x.shape[0])[:, None] >= offs).to(torch.int64).sum(-1)
    if isinstance(x.shape[0], int) and x.shape[0] <= n:
        # As when a token is decoded: no more rows than matrices.
        return torch.bmm(x[:, None], weights[group.clamp(max=n - 1)])[:, 0]
    products = torch.matmul(x, weights)  # (matrices, rows, columns)
    is_own = (torch.arange(n)[:, None] == group).to(x.dtype)
    return (products * is_own[..., None]).sum(0)
