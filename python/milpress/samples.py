"""Samples that a model is run on: from files, from arrays, or random."""

from __future__ import annotations

import contextlib
import hashlib
import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from milpress.errors import CompressionError, ConfigError, InputError, PackageNotFoundError
from milpress.mil.package import system_errors

if TYPE_CHECKING:
    from milpress.interpreter import Feature

# Its functions have no types.
_formats: Any = np.lib.format

Shape: TypeAlias = tuple[int, ...]
Data: TypeAlias = (
    "str | os.PathLike[str] | RandomSamples | Mapping[str, Any] | Iterable[Mapping[str, Any]]"
)


@dataclass(frozen=True, slots=True)
class RandomSamples:
    """Random inputs, where there are no real ones.

    They show whether a model runs and that nothing is broken. They say little of how it will do:
    activations are not those of real inputs.

    Floats are normal with a deviation of 1, pixels even from 0 to 255, other integers 0 or 1.

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


class _Source(Protocol):
    """Arrays by the names of inputs that belong together; for a file, read when they are needed."""

    @property
    def place(self) -> str:
        """Where they come from, for messages."""

    def shapes(self) -> dict[str, Shape]:
        """Return the shape of each array."""

    def arrays(self) -> Mapping[str, Any]:
        """Return the arrays."""


@dataclass(frozen=True, slots=True)
class _Arrays:
    place: str
    given: Mapping[str, Any]

    def shapes(self) -> dict[str, Shape]:
        return {name: tuple(np.shape(array)) for name, array in self.given.items()}

    def arrays(self) -> Mapping[str, Any]:
        return self.given


@dataclass(frozen=True, slots=True)
class _Npz:
    path: Path

    @property
    def place(self) -> str:
        return str(self.path)

    def shapes(self) -> dict[str, Shape]:
        with _reading(self.path), zipfile.ZipFile(self.path) as file:
            found = {}
            for member in file.namelist():
                with file.open(member) as data:
                    major, _ = _formats.read_magic(data)
                    read = getattr(_formats, f"read_array_header_{min(major, 2)}_0")
                    found[member.removesuffix(".npy")] = tuple(read(data)[0])
            return found

    def arrays(self) -> Mapping[str, Any]:
        with _reading(self.path), np.load(self.path, allow_pickle=False) as file:
            return dict(file)


@dataclass(frozen=True, slots=True)
class _Npys:
    """Files that hold one array each, by the names of their inputs."""

    place: str
    paths: Mapping[str, Path]

    def shapes(self) -> dict[str, Shape]:
        return {name: tuple(array.shape) for name, array in self.arrays().items()}

    def arrays(self) -> Mapping[str, Any]:
        found = {}
        for name, path in self.paths.items():
            with _reading(path):
                found[name] = np.load(path, mmap_mode="r", allow_pickle=False)
        return found


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Say of a file that is no array, or can't be read, which it is."""
    try:
        with system_errors(path):
            yield
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        if isinstance(error, CompressionError):
            raise
        msg = f"{path}: samples must be .npz or .npy files of numbers, got: {error}"
        raise InputError(msg) from error


class Samples(Iterable[dict[str, Any]]):
    """The samples of a model's inputs, one after the other; no more than one file is in memory.

    Arrays that belong together (an ``.npz`` file, a dictionary) are one sample if each has a shape
    that its input admits. Otherwise the leading axis of every array counts samples, and what is
    left has the shape of the input, up to a leading 1.

    Parameters
    ----------
    data
        An ``.npz`` file with an array for each input; a folder of them; ``.npy`` files, which in a
        folder are named after the inputs unless the model has one only; a dictionary of arrays; or
        an iterable of them; or `RandomSamples`.
    inputs
        The model's.

    Raises
    ------
    InputError
        If an array is missing, unknown or of a shape that its input can't have; file and input are
        named.
    PackageNotFoundError
        If nothing is at the path.
    """

    def __init__(self, data: Data, inputs: Sequence[Feature]) -> None:
        self._inputs = {feature.name: feature for feature in inputs}
        self._random = data if isinstance(data, RandomSamples) else None
        self._sources = () if self._random else tuple(self._found(data))
        self._counts = [self._count(source) for source in self._sources]
        if not len(self):
            msg = f"{_shown(data)}: there must be samples, got none"
            raise InputError(msg)

    @property
    def is_random(self) -> bool:
        """Whether they stand in for real ones."""
        return self._random is not None

    @property
    def notes(self) -> tuple[str, ...]:
        """What there is to know of how they were read, in sentences."""
        return ()

    def __len__(self) -> int:
        if self._random is not None:
            return self._random.n
        return sum(1 if count is None else count for count in self._counts)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self._random is not None:
            yield from self._made(self._random)
        for source, count in zip(self._sources, self._counts, strict=True):
            arrays = source.arrays()
            if count is None:
                yield dict(arrays)
            else:
                for i in range(count):
                    yield {
                        name: self._sliced(self._inputs[name], np.asarray(array)[i])
                        for name, array in arrays.items()
                    }

    def digest(self) -> str:
        """Return what tells these samples from others: a hash of names, types, shapes, numbers."""
        digest = hashlib.sha256()
        for sample in self:
            for name in sorted(sample):
                array = np.ascontiguousarray(sample[name])
                digest.update(f"{name}\0{array.dtype.str}{array.shape}\0".encode())
                digest.update(array.tobytes())
        return digest.hexdigest()

    def _found(self, data: Any) -> Iterator[_Source]:
        if isinstance(data, (str, os.PathLike)):
            yield from self._in_files(Path(data))
        elif isinstance(data, Mapping):
            yield _Arrays("the samples", data)
        elif isinstance(data, Iterable) and not hasattr(data, "__array__"):
            for i, item in enumerate(data):
                if not isinstance(item, Mapping):
                    msg = (
                        f"sample {i}: a sample must be a dictionary of arrays by input, got "
                        f"{type(item).__name__}"
                    )
                    raise InputError(msg)
                yield _Arrays(f"sample {i}", item)
        else:
            msg = (
                "samples must be a path, a dictionary of arrays by input or several of them, got "
                f"{type(data).__name__}"
            )
            raise InputError(msg)

    def _in_files(self, path: Path) -> Iterator[_Source]:
        if not path.exists():
            msg = f"{path}: samples must be there, got nothing"
            raise PackageNotFoundError(msg)
        with system_errors(path):
            files = sorted(path.iterdir()) if path.is_dir() else [path]
        yield from (_Npz(file) for file in files if file.suffix == ".npz")
        single = [file for file in files if file.suffix == ".npy"]
        if not path.is_dir() and path.suffix not in (".npz", ".npy"):
            msg = f"{path}: samples must be an .npz or .npy file or a folder of them, got another"
            raise InputError(msg)
        if len(self._inputs) == 1:
            name = next(iter(self._inputs))
            yield from (_Npys(str(file), {name: file}) for file in single)
        elif single:
            yield _Npys(str(path), {file.stem: file for file in single})

    def _count(self, source: _Source) -> int | None:
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
            got = ", ".join(f"{count} of {name}" for name, count in counts.items())
            msg = f"{source.place}: every input must have as many samples, got {got}"
            raise InputError(msg)
        return next(iter(counts.values()))

    def _sliced(self, feature: Feature, array: NDArray[Any]) -> NDArray[Any]:
        return array if _takes(feature, array.shape) else array[None]

    def _made(self, random: RandomSamples) -> Iterator[dict[str, Any]]:
        rng = np.random.default_rng(random.seed)
        for _ in range(random.n):
            yield {
                name: _random_array(feature, rng)
                for name, feature in self._inputs.items()
                if feature.is_required or feature.kind in ("array", "image")
                if not feature.is_unused
            }


def _random_array(feature: Feature, rng: np.random.Generator) -> NDArray[Any]:
    shape = _typical_shape(feature)
    if feature.kind == "image":
        return rng.integers(0, 256, shape)
    if feature.dtype.startswith("float"):
        return rng.standard_normal(shape, np.float32)
    return rng.integers(0, 2, shape)


def _typical_shape(feature: Feature) -> Shape:
    if feature.default_shape and feature.admits(feature.default_shape):
        return feature.default_shape
    if feature.shapes:
        return feature.shapes[0]
    if feature.bounds:
        return tuple(max(low, 1) for low, _ in feature.bounds)
    return tuple(size or 1 for size in feature.shape)


def _takes(feature: Feature, shape: Shape) -> bool:
    """Whether an input takes an array of a shape, an image also as pixels."""
    if feature.kind == "image" and len(shape) != 4:
        if feature.layout in ("RGB", "BGR"):
            return len(shape) == 3 and shape[2] == 3 and feature.admits((1, 3, *shape[:2]))
        return len(shape) == 2 and feature.admits((1, 1, *shape))
    return feature.admits(shape)


def _shown(data: Any) -> str:
    return str(data) if isinstance(data, (str, os.PathLike)) else "the samples"
