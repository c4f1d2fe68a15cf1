"""Samples that a model is run on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from milpress.errors import ConfigError, InputError
from milpress.samples.pictures import Picture, resized
from milpress.samples.sources import Shape, Source, source_of, sources_of

if TYPE_CHECKING:
    from milpress.mil.features import Feature

Data: TypeAlias = (
    "str | os.PathLike[str] | RandomSamples | Mapping[str, Any] | Iterable[Mapping[str, Any]]"
)
_MOST_RANDOM = 10**9
# Of random pixels, about those of photographs.
_MEAN_PIXEL = 128
_PIXEL_DEVIATION = 64
_PICTURE_RANK = 4


@dataclass(frozen=True, slots=True)
class RandomSamples:
    """Random inputs, where there are no real ones.

    They show whether a model runs, that nothing is broken, and roughly which of its weights matter.
    They say little of how it will do: activations are not those of real inputs.

    Arrays of four dimensions and pixels are noise of which large structures have most, as in
    photographs (its amplitude falls with the frequency); other floats are normal with a deviation
    of 1. Integers that are looked up in a table name any of its rows; others are 1, as in a mask.

    Parameters
    ----------
    n
        How many.
    seed
        Where random numbers start from.
    """

    n: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n < 1:
            msg = f"there must be at least 1 random sample, got {self.n}"
            raise ConfigError(msg)
        if self.n > _MOST_RANDOM:
            msg = f"there must be at most {_MOST_RANDOM} random samples, got {self.n}"
            raise ConfigError(msg)


class Samples(Iterable[dict[str, Any]]):
    """The samples of a model's inputs, one after the other; no more than one file is in memory.

    Arrays that belong together (an ``.npz`` file, a dictionary) are one sample if each has a shape
    that its input admits. Otherwise the leading axis of every array counts samples, and what is
    left has the shape of the input, up to a leading 1.

    Parameters
    ----------
    data
        An ``.npz`` file with an array for each input; a folder of them; ``.npy`` files, and of
        images pictures (PNG or JPEG), which in a folder are named after the inputs unless only one
        must be given; a dictionary of arrays or paths of pictures; or an iterable of them; or
        `RandomSamples`. A picture is resized to a size that its input may have: `notes` says so.
    inputs
        The model's.
    skips_unsuited
        Whether what the inputs can't take is left out, as long as there is something else:
        ``unsuited`` then tells what was wrong with it, by where it comes from.

    Raises
    ------
    InputError
        If an array is missing, unknown or of a shape that its input can't have, or a picture can't
        be read; file and input are named.
    DependencyError
        If there are pictures, and Pillow is not installed.
    PackageNotFoundError
        If nothing is at the path.
    """

    def __init__(
        self, data: Data, inputs: Sequence[Feature], *, skips_unsuited: bool = False
    ) -> None:
        self._inputs = {feature.name: feature for feature in inputs}
        self._random = data if isinstance(data, RandomSamples) else None
        self._sources: list[tuple[Source, int | None]] = []
        self.unsuited: dict[str, InputError] = {}
        for source in () if self._random else sources_of(data, self._inputs):
            try:
                count = self._count(source)
            except InputError as error:
                if not skips_unsuited:
                    raise
                self.unsuited[source.place] = error
            else:
                self._sources.append((source, count))
        if not len(self):
            place = data if isinstance(data, (str, os.PathLike)) else "the samples"
            msg = f"{place}: no samples in it"
            raise next(iter(self.unsuited.values()), InputError(msg))

    @property
    def is_random(self) -> bool:
        """Whether they stand in for real ones."""
        return self._random is not None

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks on how they were read."""
        note = resized([picture for source, _ in self._sources for picture in source.pictures])
        return (note,) if note else ()

    def __len__(self) -> int:
        if self._random is not None:
            return self._random.n
        return sum(1 if count is None else count for _, count in self._sources)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self._random is not None:
            rng = np.random.default_rng(self._random.seed)
            for _ in range(self._random.n):
                yield {
                    name: _random_array(feature, rng)
                    for name, feature in self._inputs.items()
                    if feature.is_required or feature.kind in ("array", "image")
                    if not feature.is_unused
                }
        for source, count in self._sources:
            arrays = source.arrays()
            if count is None:
                yield arrays
            else:
                for i in range(count):
                    yield {
                        name: _shaped(np.asarray(array)[i], self._inputs[name])
                        for name, array in arrays.items()
                    }

    def digest(self) -> str:
        """Return a hash of names, types, shapes and numbers."""
        digest = hashlib.sha256()
        for sample in self:
            for name in sorted(sample):
                array = np.ascontiguousarray(sample[name])
                digest.update(f"{name}\0{array.dtype.str}{array.shape}\0".encode())
                digest.update(array.tobytes())
        return digest.hexdigest()

    def _count(self, source: Source) -> int | None:
        """Return how many samples a source's leading axes count; ``None`` if it is one sample."""
        shapes = source.shapes()
        unknown = sorted(shapes.keys() - self._inputs.keys())
        missing = [
            name
            for name, feature in self._inputs.items()
            if name not in shapes and feature.is_required
        ]
        if unknown or missing:
            wanted = ", ".join(
                f"{name} ({feature.origin})" if feature.origin else name
                for name, feature in self._inputs.items()
                if not feature.is_unused
            )
            msg = (
                f"{source.place}: there must be an array for each of the inputs {wanted}, got "
                f"{', '.join(shapes) or 'none'}"
            )
            raise InputError(msg)
        if all(_takes(self._inputs[name], shape) for name, shape in shapes.items()):
            return None
        counts: dict[str, int] = {}
        for name, shape in shapes.items():
            feature = self._inputs[name]
            if not shape or not (_takes(feature, shape[1:]) or _takes(feature, (1, *shape[1:]))):
                msg = (
                    f"{source.place}: input {name!r} must have the shape {feature.shape_text}, or "
                    f"that behind a number of samples, got {'x'.join(map(str, shape)) or 'scalar'}"
                )
                raise InputError(msg)
            counts[name] = shape[0]
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"{count} of {name}" for name, count in counts.items())
            msg = f"{source.place}: every input must have as many samples, got {listed}"
            raise InputError(msg)
        return next(iter(counts.values()))


def opened(
    sample: Mapping[str, Any], inputs: Sequence[Feature]
) -> tuple[dict[str, Any], list[Picture]]:
    """Return one sample with the pictures that paths name as arrays, and these pictures.

    Raises
    ------
    InputError
        If a path names no picture that can be read, or the input is no image.
    """
    source = source_of("the sample", sample, {feature.name: feature for feature in inputs})
    return source.arrays(), source.pictures


def _random_array(feature: Feature, rng: np.random.Generator) -> NDArray[Any]:
    shape = _typical_shape(feature)
    if feature.kind == "image":
        pixels = _MEAN_PIXEL + _PIXEL_DEVIATION * _picture_like(shape, rng)
        return np.asarray(pixels.round().clip(0, 255), np.int64)
    if feature.dtype.startswith("float"):
        is_picture = len(shape) == _PICTURE_RANK and min(shape[2:]) > 1
        noise = _picture_like(shape, rng) if is_picture else rng.standard_normal(shape)
        return np.asarray(noise, np.float32)
    if feature.n_rows:
        return np.asarray(rng.integers(0, feature.n_rows, shape))
    return np.ones(shape, np.int64)


def _picture_like(shape: Shape, rng: np.random.Generator) -> NDArray[np.float64]:
    """Return noise of mean 0 and deviation 1 whose amplitude falls with its frequency."""
    height, width = shape[-2:]
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)
    frequency = np.hypot(rows, columns)
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.standard_normal(shape)) / frequency
    noise = np.fft.irfft2(spectrum, (height, width))
    deviation = noise.std(axis=(-2, -1), keepdims=True)
    return np.asarray(noise / np.where(deviation > 0, deviation, 1))


def _typical_shape(feature: Feature) -> Shape:
    if feature.default_shape and feature.admits(feature.default_shape):
        return feature.default_shape
    if feature.shapes:
        return feature.shapes[0]
    if feature.bounds:
        return tuple(max(low, 1) for low, _ in feature.bounds)
    return tuple(size or 1 for size in feature.shape)


def _shaped(array: NDArray[Any], feature: Feature) -> NDArray[Any]:
    return array if _takes(feature, array.shape) else array[None]


def _takes(feature: Feature, shape: Shape) -> bool:
    """Whether an input takes an array of a shape, an image also as pixels."""
    if feature.kind == "image" and len(shape) != 4:
        if feature.layout in ("RGB", "BGR"):
            return len(shape) == 3 and shape[2] == 3 and feature.admits((1, 3, *shape[:2]))
        return len(shape) == 2 and feature.admits((1, 1, *shape))
    return feature.admits(shape)
