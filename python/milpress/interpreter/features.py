"""Conversion of inputs from arrays and of outputs back to arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from milpress.errors import InputError
from milpress.mil.features import Feature, times


def check_names(features: Sequence[Feature], given: Mapping[str, Any]) -> None:
    """Check that each input is given that must be, and nothing else.

    Raises
    ------
    InputError
        If it is not so.
    """
    known = {feature.name for feature in features}
    missing = any(given.get(each.name) is None and each.is_required for each in features)
    if missing or not given.keys() <= known:
        used = [each for each in features if not each.is_unused]
        wanted = ", ".join(f"{each.name} ({_described(each)})" for each in used) or "none"
        msg = f"the inputs must be {wanted}, got {', '.join(given) or 'none'}"
        raise InputError(msg)


def _described(feature: Feature) -> str:
    kind = f"{feature.layout} image" if feature.kind == "image" else feature.dtype
    origin = f", {feature.origin}" if feature.origin else ""
    return f"{kind} {feature.shape_text}{origin}"


def taken(feature: Feature, given: Any) -> Tensor:
    """Return what a user gives for an input as the tensor that the program takes.

    ``None`` stands for the default of an optional input.

    Raises
    ------
    InputError
        If it is of a type or shape that the input can't have.
    """
    if given is None and not feature.is_required:
        return filled(feature)
    array = _array(feature, given)
    return _fitting(feature, _pixels(feature, array) if feature.kind == "image" else array)


def _fitting(feature: Feature, tensor: Tensor) -> Tensor:
    if not feature.admits(tuple(tensor.shape)):
        shape = times(tensor.shape)
        msg = f"input {feature.name!r} must have the shape {feature.shape_text}, got {shape}"
        raise InputError(msg)
    return tensor


def passed_on(giver: Feature, taker: Feature, value: Any, *, is_computed: bool) -> Tensor:
    """Return a tensor that has the form of one feature as a model of a pipeline takes another.

    What an earlier model has computed is rounded, if it is an image, as it is by `given_back`; but
    gradients go through that.

    Raises
    ------
    InputError
        If it is of a type or shape that the input can't have.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return taken(taker, value)
    if not taker.dtype.startswith("float"):
        return taken(taker, value.detach())
    if giver.kind == "image":
        value = _as_pixels(giver, value) if is_computed else value
        if {giver.layout, taker.layout} == {"RGB", "BGR"}:
            value = value.flip(1)
    return _fitting(taker, value.to(torch.float32))


def _as_pixels(feature: Feature, planes: Tensor) -> Tensor:
    """Return planes as numbers that an image can hold, with the gradient of what is rounded."""
    is_half = feature.layout == "gray float16"
    exact = planes if is_half else planes.clamp(0, 255)
    with torch.no_grad():
        rounded = exact.to(torch.float16).to(exact.dtype) if is_half else exact.round()
    # What is added is zero, so that not a bit of the rounded number changes.
    return rounded + (exact - exact.detach()) if exact.requires_grad else rounded


def filled(feature: Feature) -> Tensor:
    """Return the default of an optional input."""
    dtype = torch.float32 if feature.dtype.startswith("float") else torch.int32
    return torch.full(feature.default_shape, feature.default or 0, dtype=dtype)


def _array(feature: Feature, given: Any) -> Tensor:
    """Return the given numbers as float32 or int64, as the input's type wants."""
    try:
        # A copy, as states may keep it.
        array = (
            given.detach().to("cpu", copy=True) if isinstance(given, Tensor) else np.asarray(given)
        )
    except ValueError as error:
        msg = f"input {feature.name!r} is not an array: {error}"
        raise InputError(msg) from error
    kind = _kind_of(array)
    is_float = feature.dtype.startswith("float")
    if kind not in "fiu" and (is_float or kind != "b"):
        msg = f"input {feature.name!r} must hold numbers, got {array.dtype}"
        raise InputError(msg)
    if not is_float and kind == "f":
        msg = f"input {feature.name!r} must hold {feature.dtype}, got {array.dtype}"
        raise InputError(msg)
    if isinstance(array, np.ndarray):
        array = torch.from_numpy(np.array(array, np.float32 if is_float else np.int64))
    tensor = array.to(torch.float32 if is_float else torch.int64)
    if not is_float and tensor.numel():
        limits = torch.iinfo(torch.int32)
        if tensor.min() < limits.min or tensor.max() > limits.max:
            msg = f"input {feature.name!r} holds numbers that 32 bits can't hold"
            raise InputError(msg)
    return tensor


def _kind_of(array: Any) -> str:
    """Return NumPy's letter for the kind of an array's elements."""
    if not isinstance(array, Tensor):
        return str(array.dtype.kind)
    if array.is_floating_point():
        return "f"
    return "c" if array.is_complex() else "b" if array.dtype == torch.bool else "i"


def _pixels(feature: Feature, array: Tensor) -> Tensor:
    """Return an image as the program takes it: one image, its planes, rows and columns."""
    if array.ndim == 4:
        return array
    if feature.layout in ("RGB", "BGR"):
        if array.ndim != 3 or array.shape[-1] != 3:
            msg = (
                f"image {feature.name!r} must be an array of height x width x 3, got "
                f"{times(array.shape)}"
            )
            raise InputError(msg)
        planes = array.permute(2, 0, 1)
        return (planes.flip(0) if feature.layout == "BGR" else planes)[None]
    if array.ndim != 2:
        msg = f"image {feature.name!r} must be an array of height x width, got {times(array.shape)}"
        raise InputError(msg)
    return array[None, None]


def given_back(feature: Feature, value: Any) -> Any:
    """Return an output of a program as a feature: images as pixels, labels as numbers."""
    if feature.kind == "number":
        return value.item()
    if feature.kind == "dictionary":
        return dict(value)
    if feature.kind != "image":
        return value
    planes = value[0]
    if feature.layout == "gray float16":
        return planes[0].to(torch.float16)
    pixels = planes.round().clamp(0, 255).to(torch.uint8)
    if feature.layout == "gray":
        return pixels[0]
    return (pixels.flip(0) if feature.layout == "BGR" else pixels).permute(1, 2, 0)
