"""Inputs and outputs of a model, as it describes them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from milpress.errors import PackageError
from milpress.mil import proto
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
    n_rows
        Of an input that is an index of lookups: how many rows the smallest of the tables has.
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
    n_rows: int | None = None

    @property
    def is_required(self) -> bool:
        """Whether an input must be given."""
        return self.default is None and not self.is_unused

    @property
    def shape_text(self) -> str:
        """The shapes that it may have, as people read them."""
        if self.shapes:
            return " or ".join(times(shape) for shape in self.shapes)
        if self.bounds:
            return times(
                f"{low}..{high or ''}" if low != high else low for low, high in self.bounds
            )
        return times(self.shape)

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


def described(item: proto.FeatureDescription, declared: TensorType | None) -> Feature:
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
    array = item.type.multiArrayType
    layout: Layout = ""
    shapes = tuple(tuple(each.shape) for each in array.enumeratedShapes.shapes)
    bounds = tuple(size_range(size) for size in array.shapeRange.sizeRanges)
    if kind == "image":
        layout, shapes, bounds = _image(item, declared)
    default = array.WhichOneof("choice")
    return Feature(
        name=item.name,
        kind=kind,
        dtype=declared.dtype.name,
        shape=declared.shape,
        shapes=shapes,
        bounds=bounds,
        layout=layout,
        default=getattr(array, default) if item.type.isOptional and default else None,
        default_shape=tuple(array.shape),
    )


def _image(
    item: proto.FeatureDescription, declared: TensorType
) -> tuple[Layout, tuple[tuple[int, ...], ...], tuple[tuple[int, int | None], ...]]:
    """Return the layout of an image, the shapes that it may have, and their bounds."""
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
    return layout, shapes, bounds


def size_range(size: proto.SizeRange) -> tuple[int, int | None]:
    """Return the least and the greatest size that a description allows; ``None`` is no limit."""
    return size.lowerBound, size.upperBound if size.upperBound >= 0 else None


def times(shape: Iterable[Any]) -> str:
    """Return a shape in words: ``2x3``, with ``?`` for what is open."""
    return "x".join("?" if size is None else str(size) for size in shape) or "a scalar"
