"""Samples that a model is run on: from files, from arrays, or random."""

from __future__ import annotations

import contextlib
import hashlib
import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from milpress.errors import CompressionError, ConfigError, InputError, PackageNotFoundError
from milpress.plain.files import system_errors
from milpress.samples.pictures import SUFFIXES, Picture, is_picture

if TYPE_CHECKING:
    from milpress.mil.features import Feature

# Its functions have no types.
_formats: Any = np.lib.format

_FILES = f".npz or .npy files, or pictures ({', '.join(SUFFIXES)})"
_N_NAMED = 3

Shape: TypeAlias = tuple[int, ...]
Data: TypeAlias = (
    "str | os.PathLike[str] | RandomSamples | Mapping[str, Any] | Iterable[Mapping[str, Any]]"
)


_MOST_RANDOM = 10**9


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
        if self.n > _MOST_RANDOM:
            msg = f"there must be at most {_MOST_RANDOM} random samples, got {self.n}"
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

    @property
    def pictures(self) -> list[Picture]:
        """The pictures among them."""


@dataclass(frozen=True, slots=True)
class _Given:
    """Arrays, and files that hold one each, by the names of their inputs."""

    place: str
    given: Mapping[str, Any]

    def shapes(self) -> dict[str, Shape]:
        return {
            name: value.shape if isinstance(value, Picture) else tuple(np.shape(_read(value)))
            for name, value in self.given.items()
        }

    def arrays(self) -> Mapping[str, Any]:
        return {name: _read(value) for name, value in self.given.items()}

    @property
    def pictures(self) -> list[Picture]:
        return [value for value in self.given.values() if isinstance(value, Picture)]


def _read(value: Any) -> Any:
    if isinstance(value, Picture):
        return value.array()
    if isinstance(value, Path):
        with _reading(value):
            return np.load(value, mmap_mode="r", allow_pickle=False)
    return value


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

    @property
    def pictures(self) -> list[Picture]:
        return []

    def arrays(self) -> Mapping[str, Any]:
        with _reading(self.path), np.load(self.path, allow_pickle=False) as file:
            return dict(file)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Say of a file that is no array, or can't be read, which it is."""
    try:
        with system_errors(path):
            yield
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        if isinstance(error, CompressionError):
            raise
        msg = f"{path}: not an .npz or .npy file of numbers: {error}"
        raise InputError(msg) from error


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
        self._sources: list[_Source] = []
        self._counts: list[int | None] = []
        self.unsuited: dict[str, InputError] = {}
        for source in () if self._random else self._found(data):
            try:
                self._counts.append(self._count(source))
            except InputError as error:
                if not skips_unsuited:
                    raise
                self.unsuited[source.place] = error
            else:
                self._sources.append(source)
        if not len(self):
            msg = f"{_shown(data)}: no samples in it"
            raise next(iter(self.unsuited.values()), InputError(msg))

    @property
    def is_random(self) -> bool:
        """Whether they stand in for real ones."""
        return self._random is not None

    @property
    def notes(self) -> tuple[str, ...]:
        """What there is to know of how they were read, in sentences."""
        pictures = [picture for source in self._sources for picture in source.pictures]
        note = resized(pictures)
        return (note,) if note else ()

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
            yield self._given("the samples", data)
        elif isinstance(data, Iterable) and not hasattr(data, "__array__"):
            for i, item in enumerate(data):
                if not isinstance(item, Mapping):
                    msg = (
                        f"sample {i}: a sample must be a dictionary of arrays by input, got "
                        f"{type(item).__name__}"
                    )
                    raise InputError(msg)
                yield self._given(f"sample {i}", item)
        else:
            msg = (
                "samples must be a path, a dictionary of arrays by input or several of them, got "
                f"{type(data).__name__}"
            )
            raise InputError(msg)

    def _given(self, place: str, given: Mapping[str, Any]) -> _Given:
        """Return a sample, of which those values that name pictures are read when needed."""
        return _Given(
            place,
            {
                name: picture_or_array(value, self._inputs[name]) if name in self._inputs else value
                for name, value in given.items()
            },
        )

    def _in_files(self, path: Path) -> Iterator[_Source]:
        if not path.exists():
            msg = f"{path}: no such file or folder"
            raise PackageNotFoundError(msg)
        if not path.is_dir() and path.suffix not in (".npz", ".npy") and not is_picture(path):
            msg = f"{path}: samples must be {_FILES}, or a folder of them"
            raise InputError(msg)
        with system_errors(path):
            files = sorted(path.iterdir()) if path.is_dir() else [path]
        files = [file for file in files if not file.name.startswith(".") or file == path]
        packed = [file for file in files if file.suffix == ".npz"]
        single = [file for file in files if file.suffix == ".npy"]
        pictures = [file for file in files if is_picture(file) and not file.is_dir()]
        if not (packed or single or pictures):
            _refuse_folder(path, files)
        if not any(feature.kind == "image" for feature in self._inputs.values()) and (
            packed or single
        ):
            pictures = []  # They are of something else.
        by_name = self._are_named_after_inputs([*single, *pictures])
        if pictures and (packed or (single and not by_name)):
            msg = (
                f"{path}: samples must be pictures or arrays, got {(packed or single)[0].name} "
                f"beside {pictures[0].name}"
            )
            raise InputError(msg)
        yield from (_Npz(file) for file in packed)
        if by_name:
            yield self._by_name(path, [*single, *pictures])
        else:
            for file in (*single, *pictures):
                (name, *_) = self._wanted
                yield _Given(str(file), {name: self._file(file, name)})

    @property
    def _wanted(self) -> list[str]:
        """Names of the inputs that must be given, or of all that may be, if none must."""
        used = [name for name, feature in self._inputs.items() if not feature.is_unused]
        return [name for name in used if self._inputs[name].is_required] or used

    def _are_named_after_inputs(self, files: Sequence[Path]) -> bool:
        """Whether files are one sample of several inputs, not a sample each of the only one."""
        named = [file for file in files if file.stem in self._inputs]
        used = [feature for feature in self._inputs.values() if not feature.is_unused]
        return len(used) != 1 and bool(files) and (bool(named) or len(self._wanted) != 1)

    def _by_name(self, path: Path, files: Sequence[Path]) -> _Given:
        given: dict[str, Any] = {}
        for file in files:
            if file.stem in given:
                msg = (
                    f"{path}: there must be one file for each input, got {file.name} beside another"
                )
                raise InputError(msg)
            known = file.stem in self._inputs
            given[file.stem] = self._file(file, file.stem) if known else file
        return _Given(str(path), given)

    def _file(self, file: Path, name: str) -> Any:
        return Picture(file, self._inputs[name]) if is_picture(file) else file

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


def picture_or_array(value: Any, feature: Feature) -> Any:
    """Return what a user gives for an input: the picture that a path names, or the value itself.

    Raises
    ------
    InputError
        If the path names no picture, or the input is no image.
    """
    if not isinstance(value, (str, os.PathLike)):
        return value
    picture = Picture(Path(value), feature)
    if not picture.path.is_file():
        msg = f"{picture.path}: no such picture"
        raise PackageNotFoundError(msg)
    return picture


def opened(
    given: Mapping[str, Any], inputs: Sequence[Feature]
) -> tuple[dict[str, Any], list[Picture]]:
    """Return one sample with the pictures that paths name as arrays, and these pictures.

    Raises
    ------
    InputError
        As `picture_or_array`, or if a picture can't be read.
    """
    known = {feature.name: feature for feature in inputs}
    found = {
        name: picture_or_array(value, known[name]) if name in known else value
        for name, value in given.items()
    }
    pictures = [value for value in found.values() if isinstance(value, Picture)]
    return {name: _read(value) for name, value in found.items()}, pictures


def resized(pictures: Sequence[Picture]) -> str:
    """Return a sentence that says how many pictures are resized; empty if none is."""
    changed = [(one, *sizes) for one in pictures if (sizes := one.sizes())[0] != sizes[1]]
    if not changed:
        return ""
    first, before, after = changed[0]
    example = f"{before[0]}x{before[1]} to {after[0]}x{after[1]} (height x width)"
    if len(pictures) == 1:
        return f"{first.path.name} was resized from {example}"
    return (
        f"{len(changed)} of {len(pictures)} pictures were resized, {first.path.name} from {example}"
    )


def _refuse_folder(path: Path, files: Sequence[Path]) -> NoReturn:
    names = [f"the folder {file.name}" if file.is_dir() else file.name for file in files]
    others = (
        f", but {', '.join(names[:_N_NAMED])}{', ...' * (len(names) > _N_NAMED)}" if names else ""
    )
    msg = f"{path}: no samples in it{others}; samples are {_FILES}"
    raise InputError(msg)


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
