"""Slicing, gathering and scattering."""

from __future__ import annotations

import math
import types
from collections.abc import Sequence

import torch
from torch import Tensor

from milpress.interpreter.operator import of_one, operator
from milpress.interpreter.ops.torch_types import positive

_IOS17 = 7
# What the parameter is before it exists: see `_checked`.
_UNVALIDATED = types.MappingProxyType({"validate_indices": None})


def _view(
    x: Tensor,
    begin: Sequence[int],
    end: Sequence[int],
    stride: Sequence[int] | None,
    masks: tuple[Sequence[bool] | None, Sequence[bool] | None, Sequence[bool] | None],
) -> tuple[Tensor, list[int]]:
    """Return a view of a slice, and the axes of it that must be flipped to have their order."""
    from_first, to_last, squeezed = (mask or [False] * x.dim() for mask in masks)
    flipped = []
    key: list[int | slice] = []
    for axis, size in enumerate(x.shape):
        first = None if from_first[axis] else begin[axis]
        if squeezed[axis]:
            key.append(first or 0)
            continue
        last = None if to_last[axis] else end[axis]
        place = slice(first, last, stride[axis] if stride else 1)
        if place.step < 0:
            taken = range(*place.indices(size))
            place = slice(taken[-1], taken[0] + 1, -taken.step) if taken else slice(0, 0)
            flipped.append(axis - sum(squeezed[:axis]))
        key.append(place)
    return x[tuple(key)], flipped


@operator("slice_by_index")
def slice_by_index(
    x: Tensor,
    begin: list[int],
    end: list[int],
    stride: list[int] | None = None,
    begin_mask: list[bool] | None = None,
    end_mask: list[bool] | None = None,
    squeeze_mask: list[bool] | None = None,
) -> Tensor:
    part, flipped = _view(x, begin, end, stride, (begin_mask, end_mask, squeeze_mask))
    return part.flip(flipped) if flipped else part


@operator("slice_by_size")
def slice_by_size(x: Tensor, begin: list[int], size: list[int]) -> Tensor:
    places = []
    for length, start, count in zip(x.shape, begin, size, strict=True):
        first = positive(start, length)
        places.append(slice(first, None if count == -1 else first + count))
    return x[tuple(places)]


@operator("slice_update", since=8)
def slice_update(
    x: Tensor,
    update: Tensor,
    begin: list[int],
    end: list[int],
    stride: list[int] | None = None,
    begin_mask: list[bool] | None = None,
    end_mask: list[bool] | None = None,
    squeeze_mask: list[bool] | None = None,
) -> Tensor:
    whole = x.clone()
    part, flipped = _view(whole, begin, end, stride, (begin_mask, end_mask, squeeze_mask))
    part.copy_(update.reshape(part.shape).flip(flipped))
    return whole


def _checked(indices: Tensor, size: int, validate: bool | None) -> Tensor:
    """Return indices as places in an axis.

    Negative ones count from the end. What lies outside after that is an error of torch before
    iOS17, where ``validate`` is ``None``; from then on, it is an error if validation is asked for,
    and else takes the nearest place: MIL leaves open which, but not that memory is safe.

    Raises
    ------
    IndexError
        If an index lies outside and validation is asked for.
    """
    places = indices.long()
    if validate and bool(((places < 0) | (places >= size)).any()):
        msg = f"indices must be in [0, {size}), got {places.min()} to {places.max()}"
        raise IndexError(msg)
    places = torch.where(places < 0, places + size, places)
    return places if validate is None else places.clamp(0, size - 1)


@operator("gather", added={6: ("batch_dims",), _IOS17: ("validate_indices",)}, before=_UNVALIDATED)
def gather(
    x: Tensor,
    indices: Tensor,
    axis: int = 0,
    batch_dims: int = 0,
    validate_indices: bool | None = False,
) -> Tensor:
    axis = positive(axis, x.dim())
    places = _checked(indices, x.shape[axis], validate_indices)
    shape = [*x.shape[:axis], *places.shape[batch_dims:], *x.shape[axis + 1 :]]
    if batch_dims == 0:
        return x.index_select(axis, places.reshape(-1)).reshape(shape)
    places = places.flatten(batch_dims) if places.dim() > batch_dims else places.unsqueeze(-1)
    between = [1] * (axis - batch_dims)
    after = [1] * (x.dim() - axis - 1)
    places = places.reshape([*places.shape[:batch_dims], *between, -1, *after])
    places = places.expand([*x.shape[:axis], places.shape[axis], *x.shape[axis + 1 :]])
    return torch.gather(x, axis, places).reshape(shape)


@operator("gather_along_axis", added={_IOS17: ("validate_indices",)}, before=_UNVALIDATED)
def gather_along_axis(
    x: Tensor, indices: Tensor, axis: int = 0, validate_indices: bool | None = False
) -> Tensor:
    return torch.gather(x, axis, _checked(indices, x.shape[axis], validate_indices))


def _flat(indices: Tensor, sizes: Sequence[int], validate: bool | None) -> Tensor:
    """Return where the places that the last axis of ``indices`` names lie in flattened axes."""
    flat = torch.zeros(indices.shape[:-1], dtype=torch.int64)
    for i, size in enumerate(sizes):
        flat = flat * size + _checked(indices[..., i], size, validate)
    return flat


@operator(
    "gather_nd", added={6: ("batch_dims",), _IOS17: ("validate_indices",)}, before=_UNVALIDATED
)
def gather_nd(
    x: Tensor, indices: Tensor, batch_dims: int = 0, validate_indices: bool | None = False
) -> Tensor:
    depth = indices.shape[-1]
    sizes = x.shape[batch_dims : batch_dims + depth]
    rest = x.shape[batch_dims + depth :]
    flat = _flat(indices, sizes, validate_indices)
    shape = [*indices.shape[:-1], *rest]
    x = x.reshape([*x.shape[:batch_dims], math.prod(sizes), *rest])
    gathered: Tensor = gather.function(x, flat, batch_dims, batch_dims, None)
    return gathered.reshape(shape)


_REDUCTIONS = {"add": "sum", "sub": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def _scattered(data: Tensor, axis: int, places: Tensor, updates: Tensor, mode: str) -> Tensor:
    """Return ``data`` with updates at places of the same shape along an axis."""
    if mode == "update":
        return data.scatter(axis, places, updates)
    if mode == "div":
        divisors = torch.ones_like(data).scatter_reduce(axis, places, updates, "prod")
        rounding = None if data.is_floating_point() else "trunc"
        return torch.div(data, divisors, rounding_mode=rounding)
    if mode not in _REDUCTIONS:
        msg = f"mode must be update, div, {', '.join(_REDUCTIONS)}, got {mode}"
        raise ValueError(msg)
    values = -updates if mode == "sub" else updates
    return data.scatter_reduce(axis, places, values, _REDUCTIONS[mode])


@operator("scatter", added={_IOS17: ("validate_indices",)}, before=_UNVALIDATED)
def scatter(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    axis: int = 0,
    mode: str = "add",
    validate_indices: bool | None = False,
) -> Tensor:
    axis = positive(axis, data.dim())
    places = _checked(indices, data.shape[axis], validate_indices).reshape(-1)
    values = updates.reshape([*data.shape[:axis], len(places), *data.shape[axis + 1 :]])
    places = places.reshape([-1] + [1] * (data.dim() - axis - 1)).expand(values.shape)
    return _scattered(data, axis, places, values, mode)


@operator("scatter_along_axis", added={_IOS17: ("validate_indices",)}, before=_UNVALIDATED)
def scatter_along_axis(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    axis: int = 0,
    mode: str = "add",
    validate_indices: bool | None = False,
) -> Tensor:
    places = _checked(indices, data.shape[axis], validate_indices)
    return _scattered(data, axis, places, updates, mode)


@operator("scatter_nd", added={_IOS17: ("validate_indices",)}, before=_UNVALIDATED)
def scatter_nd(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    mode: str = "add",
    validate_indices: bool | None = False,
) -> Tensor:
    depth = indices.shape[-1]
    flat = data.reshape([math.prod(data.shape[:depth]), *data.shape[depth:]])
    places = _flat(indices, data.shape[:depth], validate_indices)
    scattered: Tensor = scatter.function(flat, places, updates, 0, mode, None)
    return scattered.reshape(data.shape)


non_zero = of_one("non_zero", torch.nonzero)
