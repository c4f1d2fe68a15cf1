"""Sources of samples: arrays, and files of arrays or pictures."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import numpy as np

from milpress.errors import InputError, PackageNotFoundError
from milpress.plain.arrays import read_arrays, read_shapes
from milpress.plain.files import system_errors
from milpress.samples.pictures import SUFFIXES, Picture, is_picture

if TYPE_CHECKING:
    from milpress.mil.features import Feature

_FILES = f".npz or .npy files, or pictures ({', '.join(SUFFIXES)})"
_N_NAMED = 3

Shape: TypeAlias = tuple[int, ...]
Inputs: TypeAlias = "Mapping[str, Feature]"


@dataclass(frozen=True, slots=True)
class Source:
    """Values that belong together, by the names of their inputs; those in files are read on use.

    Parameters
    ----------
    place
        Where they come from, for messages.
    values
        Arrays, pictures and paths of ``.npy`` files by name; or the path of an ``.npz`` file.
    """

    place: str
    values: Mapping[str, Any] | Path

    def shapes(self) -> dict[str, Shape]:
        """Return the shape of each array."""
        if isinstance(self.values, Path):
            return read_shapes(self.values)
        return {
            name: value.shape if isinstance(value, Picture) else tuple(np.shape(_read(value)))
            for name, value in self.values.items()
        }

    def arrays(self) -> dict[str, Any]:
        """Return the arrays."""
        if isinstance(self.values, Path):
            return dict(read_arrays(self.values))
        return {name: _read(value) for name, value in self.values.items()}

    @property
    def pictures(self) -> list[Picture]:
        """The pictures among them."""
        values = () if isinstance(self.values, Path) else self.values.values()
        return [value for value in values if isinstance(value, Picture)]


def _read(value: Any) -> Any:
    if isinstance(value, Picture):
        return value.array()
    if isinstance(value, Path):
        arrays = read_arrays(value)
        if "" not in arrays:
            msg = f"{value}: not an .npy file; name it .npz"
            raise InputError(msg)
        return arrays[""]
    return value


def sources_of(data: Any, inputs: Inputs) -> Iterator[Source]:
    """Yield the sources that samples come from.

    Raises
    ------
    InputError
        If they are of a kind that is no sample.
    PackageNotFoundError
        If there is no such file.
    """
    if isinstance(data, (str, os.PathLike)):
        yield from _in_files(Path(data), inputs)
    elif isinstance(data, Mapping):
        yield source_of("the samples", data, inputs)
    elif isinstance(data, Iterable) and not hasattr(data, "__array__"):
        for i, item in enumerate(data):
            if not isinstance(item, Mapping):
                msg = (
                    f"sample {i}: a sample must be a dictionary of arrays by input, got "
                    f"{type(item).__name__}"
                )
                raise InputError(msg)
            yield source_of(f"sample {i}", item, inputs)
    else:
        msg = (
            "samples must be a path, a dictionary of arrays by input or several of them, got "
            f"{type(data).__name__}"
        )
        raise InputError(msg)


def source_of(place: str, values: Mapping[str, Any], inputs: Inputs) -> Source:
    """Return a source of values, of which those that name pictures are read on use.

    Raises
    ------
    InputError
        If a path names no picture, or the input is no image.
    """
    return Source(
        place,
        {
            name: _picture_or_array(value, inputs[name]) if name in inputs else value
            for name, value in values.items()
        },
    )


def _in_files(path: Path, inputs: Inputs) -> Iterator[Source]:
    if not path.exists():
        msg = f"{path}: no such file or folder"
        raise PackageNotFoundError(msg)
    if not path.is_dir() and path.suffix not in (".npz", ".npy") and not is_picture(path):
        msg = f"{path}: not a file of samples; they are {_FILES}, or a folder of them"
        raise InputError(msg)
    with system_errors(path):
        files = sorted(path.iterdir()) if path.is_dir() else [path]
    files = [file for file in files if not file.name.startswith(".") or file == path]
    packed = [file for file in files if file.suffix == ".npz"]
    single = [file for file in files if file.suffix == ".npy"]
    pictures = [file for file in files if is_picture(file) and not file.is_dir()]
    if not (packed or single or pictures):
        _refuse_folder(path, files)
    if not any(feature.kind == "image" for feature in inputs.values()) and (packed or single):
        pictures = []  # They are of something else.
    by_name = _are_named_after_inputs([*single, *pictures], inputs)
    if pictures and (packed or (single and not by_name)):
        msg = (
            f"{path}: samples must be pictures or arrays, got {(packed or single)[0].name} "
            f"beside {pictures[0].name}"
        )
        raise InputError(msg)
    yield from (Source(str(file), file) for file in packed)
    if by_name:
        yield _by_name(path, [*single, *pictures], inputs)
    else:
        for file in (*single, *pictures):
            (name, *_) = _wanted(inputs)
            yield Source(str(file), {name: _file(file, name, inputs)})


def _wanted(inputs: Inputs) -> list[str]:
    """Names of the inputs that must be given, or of all that may be, if none must."""
    used = [name for name, feature in inputs.items() if not feature.is_unused]
    return [name for name in used if inputs[name].is_required] or used


def _are_named_after_inputs(files: Sequence[Path], inputs: Inputs) -> bool:
    """Whether files are one sample of several inputs, not a sample each of the only one."""
    named = [file for file in files if file.stem in inputs]
    used = [feature for feature in inputs.values() if not feature.is_unused]
    return len(used) != 1 and bool(files) and (bool(named) or len(_wanted(inputs)) != 1)


def _by_name(path: Path, files: Sequence[Path], inputs: Inputs) -> Source:
    values: dict[str, Any] = {}
    for file in files:
        if file.stem in values:
            msg = f"{path}: several files for input {file.stem!r}, such as {file.name}; keep one"
            raise InputError(msg)
        values[file.stem] = _file(file, file.stem, inputs) if file.stem in inputs else file
    return Source(str(path), values)


def _file(file: Path, name: str, inputs: Inputs) -> Any:
    return Picture(file, inputs[name]) if is_picture(file) else file


def _picture_or_array(value: Any, feature: Feature) -> Any:
    """Return the picture that a path names, or the value itself."""
    if not isinstance(value, (str, os.PathLike)):
        return value
    picture = Picture(Path(value), feature)
    if not picture.path.is_file():
        msg = f"{picture.path}: no such picture"
        raise PackageNotFoundError(msg)
    return picture


def _refuse_folder(path: Path, files: Sequence[Path]) -> NoReturn:
    names = [f"the folder {file.name}" if file.is_dir() else file.name for file in files]
    others = (
        f", but {', '.join(names[:_N_NAMED])}{', ...' * (len(names) > _N_NAMED)}" if names else ""
    )
    msg = f"{path}: no samples in it{others}; samples are {_FILES}"
    raise InputError(msg)
