"""Arrays in ``.npz`` and ``.npy`` files."""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray

from milpress.errors import CompressionError, InputError, PackageNotFoundError
from milpress.plain.files import draft_in_place_of, system_errors

Arrays: TypeAlias = dict[str, NDArray[Any]]
# Its functions have no types.
_formats: Any = np.lib.format


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays by name to an ``.npz`` file: always the same bytes for the same arrays.

    Raises
    ------
    StorageError
        If the system refuses to.
    """
    # Not by np.savez, which may put times into the file and can't take every name.
    with (
        system_errors(path),
        draft_in_place_of(path) as draft,
        zipfile.ZipFile(draft, "w", zipfile.ZIP_STORED) as file,
    ):
        for name, array in arrays.items():
            with file.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                _formats.write_array(member, array, allow_pickle=False)


def read_arrays(path: Path) -> Arrays:
    """Return the arrays of an ``.npz`` file by name, or that of an ``.npy`` file under ``""``.

    The one of an ``.npy`` file is mapped into memory, and read where it is used.

    Raises
    ------
    PackageNotFoundError
        If there is no file.
    InputError
        If it is another file.
    StorageError
        If the system can't read it.
    """
    # What np.load opens by itself it leaves open if it can't read it.
    with _readable(path), path.open("rb") as file:
        if not _starts_as_zip(file):
            return {"": _formats.open_memmap(path, mode="r")}
        with np.load(file, allow_pickle=False) as content:
            return dict(content)


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what `read_arrays` returns, without reading it."""
    with _readable(path), path.open("rb") as file:
        if not _starts_as_zip(file):
            return {"": _read_shape(file)}
        with zipfile.ZipFile(file) as members:
            shapes = {}
            for name in members.namelist():
                with members.open(name) as member:
                    shapes[name.removesuffix(".npy")] = _read_shape(member)
            return shapes


def _starts_as_zip(file: BinaryIO) -> bool:
    start = file.read(2)
    file.seek(0)
    return start == b"PK"


def _read_shape(file: Any) -> tuple[int, ...]:
    major, _ = _formats.read_magic(file)
    shape, _, _ = getattr(_formats, f"read_array_header_{min(major, 2)}_0")(file)
    return tuple(shape)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    if not path.exists():
        msg = f"{path}: no such file"
        raise PackageNotFoundError(msg)
    try:
        with system_errors(path):
            yield
    except CompressionError:
        raise
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        msg = f"{path}: not a readable .npz or .npy file of numbers: {error}"
        raise InputError(msg) from error
