"""What a model takes and gives: descriptions, and the way from a user's arrays and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from milpress.errors import InputError, PackageError
from milpress.mil.values import TensorType

Kind = Literal["array", "image", "text", "number", "dictionary"]
Layout = Literal["", "RGB", "BGR", "gray", "gray float16"]

_KINDS: dict[str | None, Kind] = {
    "multiArrayType": "array",
    "imageType": "image",
    "stringType": "text",
    "int64Type": "number",
    "doubleType": "number",
    "dictionaryType": "dictionary",
}
_LAYOUTS: dict[int, Layout] = {10: "gray", 20: "RGB", 30: "BGR", 40: "gray float16"}


class Probabilities(dict[Any, float]):
    """The probability of each label, and the tensor that they are of, which has gradients."""

    def __init__(self, labels: Sequence[Any], tensor: Tensor) -> None:
        super().__init__(zip(labels, tensor.tolist(), strict=True))
        self.tensor = tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Feature:
    """An input or output of a model.

    Parameters
    ----------
    name
        Its name.
    kind
        ``"array"``; ``"image"``; or, of classifiers, ``"text"``, ``"number"``, ``"dictionary"``.
    dtype
        Element type that the program declares, such as ``"float16"``; empty if it is no tensor.
    shape
        Shape that the program declares; ``None`` where it varies.
    shapes
        The shapes that an input may have, if they are enumerated.
    bounds
        Least and greatest size of each dimension (``None`` is no limit), if there are any.
    layout
        Of an image: ``"RGB"``, ``"BGR"``, ``"gray"`` or ``"gray float16"``; else empty.
    default
        What fills an optional input that is not given; ``None`` if it must be given.
    default_shape
        Shape of an optional input that is not given.
    origin
        Where an input comes from that is no input of the package, in words; else empty.
    is_unused
        Whether nothing that is run takes it: it may be given, and is not looked at.
    """

    name: str
    kind: Kind
    dtype: str = ""
    shape: tuple[int | None, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()
    bounds: tuple[tuple[int, int | None], ...] = ()
    layout: Layout = ""
    default: float | None = None
    default_shape: tuple[int, ...] = ()
    origin: str = ""
    is_unused: bool = False

    @property
    def is_required(self) -> bool:
        """Whether an input must be given."""
        return self.default is None and not self.is_unused

    @property
    def shape_text(self) -> str:
        """The shapes that it may have, as people read them."""
        if self.shapes:
            return " or ".join(_times(shape) for shape in self.shapes)
        if self.bounds:
            return _times(
                f"{low}..{high or ''}" if low != high else low for low, high in self.bounds
            )
        return _times(self.shape)

    def admits(self, shape: tuple[int, ...]) -> bool:
        """Whether an input may have a shape."""
        if self.is_unused:
            return True
        if self.shapes:
            return shape in self.shapes
        bounds = self.bounds or tuple((size or 0, size) for size in self.shape)
        return len(shape) == len(bounds) and all(
            low <= size and (high is None or size <= high)
            for size, (low, high) in zip(shape, bounds, strict=True)
        )


def described(item: Any, declared: TensorType | None) -> Feature:
    """Return a feature by its description in a package and the type that the program declares.

    Raises
    ------
    PackageError
        If it is of a kind that no ML program has.
    """
    which = item.type.WhichOneof("choice")
    if which not in _KINDS:
        msg = f"{item.name}: a feature must be an array, an image or a label, got {which}"
        raise PackageError(msg)
    kind = _KINDS[which]
    if declared is None:
        return Feature(name=item.name, kind=kind)
    if kind == "image":
        return _image(item, declared)
    array = item.type.multiArrayType
    shapes = tuple(tuple(each.shape) for each in array.enumeratedShapes.shapes)
    bounds = tuple(size_range(size) for size in array.shapeRange.sizeRanges)
    default = array.WhichOneof("choice")
    return Feature(
        name=item.name,
        kind=kind,
        dtype=declared.dtype.name,
        shape=declared.shape,
        shapes=shapes,
        bounds=bounds,
        default=getattr(array, default) if item.type.isOptional and default else None,
        default_shape=tuple(array.shape),
    )


def _image(item: Any, declared: TensorType) -> Feature:
    image = item.type.imageType
    if image.colorSpace not in _LAYOUTS or len(declared.shape) != 4:
        msg = (
            f"{item.name}: an image must be RGB, BGR or gray and a tensor of rank 4, got color "
            f"space {image.colorSpace} and rank {len(declared.shape)}"
        )
        raise PackageError(msg)
    layout = _LAYOUTS[image.colorSpace]
    n_channels = 3 if layout in ("RGB", "BGR") else 1
    shapes = tuple((1, n_channels, s.height, s.width) for s in image.enumeratedSizes.sizes)
    bounds: tuple[tuple[int, int | None], ...] = ()
    if image.HasField("imageSizeRange"):
        sizes = (image.imageSizeRange.heightRange, image.imageSizeRange.widthRange)
        bounds = ((1, 1), (n_channels, n_channels), *(size_range(size) for size in sizes))
    return Feature(
        name=item.name,
        kind="image",
        dtype=declared.dtype.name,
        shape=declared.shape,
        shapes=shapes,
        bounds=bounds,
        layout=layout,
    )


def size_range(size: Any) -> tuple[int, int | None]:
    """Return the least and the greatest size that a description allows; ``None`` is no limit."""
    return size.lowerBound, size.upperBound if size.upperBound >= 0 else None


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

    Raises
    ------
    InputError
        If it is of a type or shape that the input can't have.
    """
    array = _array(feature, given)
    return _fitting(feature, _pixels(feature, array) if feature.kind == "image" else array)


def _fitting(feature: Feature, tensor: Tensor) -> Tensor:
    if not feature.admits(tuple(tensor.shape)):
        got = _times(tensor.shape)
        msg = f"input {feature.name!r} must have the shape {feature.shape_text}, got {got}"
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
    exact = planes if feature.layout == "gray float16" else planes.clamp(0, 255)
    with torch.no_grad():
        rounded = (
            exact.to(torch.float16).to(exact.dtype)
            if feature.layout == "gray float16"
            else exact.round()
        )
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
        msg = f"input {feature.name!r} must be an array, got: {error}"
        raise InputError(msg) from error
    kind = _kind_of(array)
    is_float = feature.dtype.startswith("float")
    if kind not in ("float", "integer") and (is_float or kind != "bool"):
        msg = f"input {feature.name!r} must hold numbers, got {array.dtype}"
        raise InputError(msg)
    if not is_float and kind == "float":
        msg = f"input {feature.name!r} must hold {feature.dtype}, got {array.dtype}"
        raise InputError(msg)
    if isinstance(array, np.ndarray):
        array = torch.from_numpy(np.array(array, np.float32 if is_float else np.int64))
    tensor = array.to(torch.float32 if is_float else torch.int64)
    if not is_float and tensor.numel():
        limits = torch.iinfo(torch.int32)
        if tensor.min() < limits.min or tensor.max() > limits.max:
            msg = f"input {feature.name!r} must hold numbers of 32 bits, got larger ones"
            raise InputError(msg)
    return tensor


def _kind_of(array: Any) -> str:
    if isinstance(array, Tensor):
        if array.dtype.is_floating_point:
            return "float"
        return "other" if array.is_complex() else "bool" if array.dtype == torch.bool else "integer"
    return {"f": "float", "i": "integer", "u": "integer", "b": "bool"}.get(
        array.dtype.kind, "other"
    )


def _pixels(feature: Feature, array: Tensor) -> Tensor:
    """Return an image as the program takes it: one image, its planes, rows and columns."""
    if array.ndim == 4:
        return array
    if feature.layout in ("RGB", "BGR"):
        if array.ndim != 3 or array.shape[-1] != 3:
            msg = (
                f"image {feature.name!r} must be an array of height x width x 3, got "
                f"{_times(array.shape)}"
            )
            raise InputError(msg)
        planes = array.permute(2, 0, 1)
        return (planes.flip(0) if feature.layout == "BGR" else planes)[None]
    if array.ndim != 2:
        msg = (
            f"image {feature.name!r} must be an array of height x width, got {_times(array.shape)}"
        )
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


def _times(shape: Iterable[Any]) -> str:
    return "x".join("?" if size is None else str(size) for size in shape) or "a scalar"
