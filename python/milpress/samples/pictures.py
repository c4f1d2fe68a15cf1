"""Pictures in files, in the size and the colors that an input of a model has."""

from __future__ import annotations

import contextlib
import functools
import math
import struct
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from milpress.errors import DependencyError, InputError
from milpress.plain.files import system_errors

if TYPE_CHECKING:
    from milpress.mil.features import Feature

SUFFIXES = (".png", ".jpg", ".jpeg")
# What else may lie among pictures, and is none that is read.
_OTHERS = (
    ".avif .bmp .cr2 .dng .gif .heic .heif .jp2 .jxl .nef .psd .raw .svg .tga .tif .tiff .webp"
).split()
_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)
# Of the greatest number of 16 bits to that of 8.
_WIDE = 257
# What Pillow raises of a file that it can't read: a SyntaxError of PNGs that are cut off.
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error)


def is_picture(path: Path) -> bool:
    """Whether a file is named as a picture, of a kind that is read or another."""
    return path.suffix.lower() in (*SUFFIXES, *_OTHERS)


@dataclass(frozen=True)
class Picture:
    """A picture in a file, and the input that it is for.

    Raises
    ------
    InputError
        If the file is no PNG or JPEG, or the input no image.
    """

    path: Path
    feature: Feature

    def __post_init__(self) -> None:
        if self.path.suffix.lower() not in SUFFIXES:
            msg = (
                f"{self.path}: a picture must be a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} "
                f"file, got {self.path.suffix}; convert it"
            )
            raise InputError(msg)
        if self.feature.kind != "image":
            msg = (
                f"{self.path}: a picture must be for an input that is an image, got "
                f"{self.feature.name!r}, which is an array {self.feature.shape_text} of "
                f"{self.feature.dtype}; give what the model is to be given as .npy or .npz"
            )
            raise InputError(msg)

    @functools.cached_property
    def sizes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Height and width of the picture, and of what is made of it.

        Raises
        ------
        InputError
            If it can't be read.
        DependencyError
            If Pillow is not installed.
        """
        with self._opened() as opened:
            width, height = opened.size
            if opened.getexif().get(_ORIENTATION) in _TURNED:
                height, width = width, height
        return (height, width), _fitting_size(self.feature, height, width)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of `array`."""
        _, size = self.sizes
        return (*size, 3) if self.feature.layout in ("RGB", "BGR") else size

    def array(self) -> NDArray[Any]:
        """Return the pixels from 0 to 255, as they are seen: turned as the camera was held.

        They are resized to a size that the input may have. Red, green and blue are last, whatever
        layout the model wants; of a gray image, there are rows and columns only.
        """
        _, (height, width) = self.sizes
        with self._opened() as opened:
            from PIL import Image, ImageOps

            turned: Any = ImageOps.exif_transpose(opened)
            wide = turned.mode == "I" or turned.mode.startswith("I;16")
            if wide:
                turned = Image.fromarray(np.asarray(turned).astype(np.float32) / _WIDE)
            elif self.feature.layout in ("RGB", "BGR"):
                turned = turned.convert("RGB")
            else:
                turned = turned.convert("L")
            if turned.size != (width, height):
                turned = turned.resize((width, height), Image.Resampling.BILINEAR)
            pixels = np.asarray(turned)
        if self.feature.layout == "gray float16":
            return pixels.astype(np.float32)
        if wide:
            pixels = pixels.round().clip(0, 255).astype(np.uint8)
        if self.feature.layout in ("RGB", "BGR") and pixels.ndim == 2:
            pixels = np.repeat(pixels[..., None], 3, 2)
        return pixels

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Any]:
        """Open the file, and say of one that can't be read which it is."""
        try:
            from PIL import Image
        except ModuleNotFoundError as error:
            msg = (
                f"{self.path}: reading pictures ({', '.join(SUFFIXES)}) needs Pillow; install it "
                "with: pip install 'milpress[images]'"
            )
            raise DependencyError(msg) from error
        try:
            with warnings.catch_warnings():
                # A large picture is no attack here; beyond twice the size, Pillow refuses.
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                with Image.open(self.path, formats=("PNG", "JPEG")) as opened:
                    yield opened
        except InputError:
            raise
        except (*_UNREADABLE, Image.DecompressionBombError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                with system_errors(self.path):
                    raise
            msg = f"{self.path}: not a PNG or JPEG picture that can be read: {error}"
            raise InputError(msg) from error


def resized(pictures: Sequence[Picture]) -> str:
    """Return a sentence that says how many pictures are resized; empty if none is."""
    changed = [(one, *one.sizes) for one in pictures if one.sizes[0] != one.sizes[1]]
    if not changed:
        return ""
    first, before, after = changed[0]
    example = f"{before[0]}x{before[1]} to {after[0]}x{after[1]} (height x width)"
    if len(pictures) == 1:
        return f"{first.path.name} was resized from {example}"
    return (
        f"{len(changed)} of {len(pictures)} pictures were resized, {first.path.name} from {example}"
    )


def _fitting_size(feature: Feature, height: int, width: int) -> tuple[int, int]:
    """Return a height and width that an input may have: those given if it may, or close ones."""
    n_channels = 3 if feature.layout in ("RGB", "BGR") else 1
    if feature.admits((1, n_channels, height, width)):
        return height, width
    if feature.shapes:
        # Sizes are compared by factors; of equally close ones, the first.
        rows, columns = min(
            (shape[2:] for shape in feature.shapes),
            key=lambda size: abs(math.log(size[0] / height)) + abs(math.log(size[1] / width)),
        )
        return rows, columns
    limits = feature.bounds[2:] or tuple((size or 1, size) for size in feature.shape[2:])
    sizes = (height, width)
    # As far as both sides allow, the picture keeps its proportions.
    shrunk = [high / size for size, (_, high) in zip(sizes, limits, strict=True) if high]
    grown = [low / size for size, (low, _) in zip(sizes, limits, strict=True)]
    factor = max(min([1.0, *shrunk]), *grown)
    fitting = [
        min(max(round(factor * size), low, 1), math.inf if high is None else high)
        for size, (low, high) in zip(sizes, limits, strict=True)
    ]
    return int(fitting[0]), int(fitting[1])
