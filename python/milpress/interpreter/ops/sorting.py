"""Sorting and cumulative sums along an axis."""

from __future__ import annotations

import torch
from torch import Tensor

from milpress.interpreter.operator import operator
from milpress.interpreter.ops.torch_types import converted


@operator("argsort")
def argsort(x: Tensor, axis: int = -1, ascending: bool = False) -> Tensor:
    return torch.argsort(x, dim=axis, descending=not ascending, stable=True)


@operator("topk", added={6: ("sort", "return_indices"), 7: ("output_indices_dtype",)})
def topk(
    x: Tensor,
    k: int = 1,
    axis: int = -1,
    ascending: bool = False,
    sort: bool = True,  # noqa: ARG001 - without it, any order will do
    return_indices: bool = True,
    output_indices_dtype: str = "int32",
) -> Tensor | tuple[Tensor, Tensor]:
    count = x.shape[axis] if k == -1 else k
    # Stable sorting gives the first of equal values, whereas torch.topk promises none.
    values, indices = torch.sort(x, dim=axis, descending=not ascending, stable=True)
    values, indices = values.narrow(axis, 0, count), indices.narrow(axis, 0, count)
    return (values, converted(indices, output_indices_dtype)) if return_indices else values


@operator("cumsum")
def cumsum(x: Tensor, axis: int = 0, exclusive: bool = False, reverse: bool = False) -> Tensor:
    if reverse:
        x = x.flip(axis)
    total = x.cumsum(axis)
    if exclusive:
        total = total.roll(1, axis)
        total.select(axis, 0).zero_()
    return total.flip(axis) if reverse else total
