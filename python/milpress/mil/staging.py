"""A package as it is written: beside its destination, and moved there when it is whole."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

import milpress._core as _core
from milpress.errors import (
    DestinationError,
    PackageError,
    StorageError,
)
from milpress.mil import proto
from milpress.mil.package import Package, n_package_bytes
from milpress.mil.values import Blob
from milpress.plain import files
from milpress.plain.files import system_errors


class Counter:
    """A sink that only adds up sizes, for a dry run."""

    path: Path | None = None

    def __init__(self, package: Package) -> None:
        self._ends: dict[str, int] = {}
        replaced = {package.model_path, *map(package.weight_path, package.weight_files)}
        self._rest = n_package_bytes(package.path) - sum(p.stat().st_size for p in replaced)

    @property
    def n_bytes(self) -> int:
        """Size of the package."""
        return self._rest + sum(self._ends.values())

    def finish(self, model: proto.Model) -> None:
        """Count the model."""
        self._rest += model.ByteSize()

    def commit(self) -> None:
        """Do nothing."""

    def write(self, file_name: str, _dtype: int, data: NDArray[np.uint8], _padding: int) -> int:
        """Count a blob."""
        return self._add(file_name, data.size)

    def copy(self, file_name: str, blob: Blob, _dtype: int, _padding: int) -> int:
        """Count a blob."""
        return self._add(file_name, blob.info.n_bytes)

    def _add(self, file_name: str, n_bytes: int) -> int:
        offset = -(-self._ends.get(file_name, 64) // 64) * 64
        self._ends[file_name] = offset + 64 + n_bytes
        return offset


class Staged:
    """A package being written beside its destination, in a hidden folder of its own.

    Files that the writer does not replace are copied from the source. Nothing reaches the
    destination before `commit`; leaving the ``with`` block without it leaves nothing behind, and
    what a killed process left is removed by the next run.
    """

    def __init__(self, source: Package, destination: Path, *, force: bool) -> None:
        self._source = source
        self._destination = destination
        self._force = force
        self._writers: dict[str, _core.BlobWriter] = {}
        self._lock: int | None = None

    def __enter__(self) -> Staged:
        check_destination(self._source.path, self._destination, force=self._force)
        with system_errors(self._destination):
            _sweep(self._destination)
            self._folder, self._lock = _create_stage(self._destination)
        self.path = self._folder / "new.mlpackage"
        return self

    def __exit__(self, *_: object) -> None:
        self._writers.clear()
        files.end_draft(self._folder)
        if self._lock is not None:
            os.close(self._lock)

    def copy_rest(self, weight_files: set[str]) -> None:
        """Copy all that is neither the model nor one of the named weight files."""
        replaced = {self._source.weight_path(name) for name in weight_files}
        replaced.add(self._source.model_path)
        with system_errors(self._destination):
            self.path.mkdir()
            for path in sorted(self._source.path.rglob("*")):
                if path.is_dir() and path.is_symlink():
                    msg = f"{path}: a symbolic link, which a package must not hold"
                    raise PackageError(msg)
                if path.is_dir():
                    self._path_of(path).mkdir()
                elif not path.is_file() or path.is_symlink():
                    msg = f"{path}: not a plain file; a package must hold no others"
                    raise PackageError(msg)
                elif path not in replaced:
                    shutil.copyfile(path, self._path_of(path))

    def write(self, file_name: str, dtype: int, data: NDArray[np.uint8], padding_bits: int) -> int:
        """Append a blob to a weight file and return its offset."""
        with system_errors(self._destination):
            return self._writer(file_name).write(dtype, data, padding_bits)

    def copy(self, file_name: str, blob: Blob, dtype: int, padding_bits: int) -> int:
        """Append the data of a blob of the source and return its new offset."""
        with system_errors(self._destination):
            try:
                return self._writer(file_name).copy(*blob, dtype, padding_bits)
            except _core.BlobError as error:
                raise PackageError(str(error)) from error

    def finish(self, model: proto.Model) -> None:
        """Write the model and close the weight files."""
        with system_errors(self._destination):
            for writer in self._writers.values():
                writer.close()
            self._writers.clear()
        self.write_model(model.SerializeToString(deterministic=True))

    def write_model(self, data: bytes) -> None:
        """Write the model as it is serialized."""
        with system_errors(self._destination):
            self._path_of(self._source.model_path).write_bytes(data)

    def commit(self) -> None:
        """Move the package to its destination; an existing one is deleted once that is done."""
        check_destination(self._source.path, self._destination, force=self._force)
        with system_errors(self._destination):
            if self._destination.exists():
                self._destination.rename(self._folder / "previous.mlpackage")
            self.path.rename(self._destination)

    @property
    def n_bytes(self) -> int:
        """Size of the package as it is written."""
        return n_package_bytes(self.path)

    def _path_of(self, source_path: Path) -> Path:
        return self.path / source_path.relative_to(self._source.path)

    def _writer(self, file_name: str) -> _core.BlobWriter:
        if file_name not in self._writers:
            path = self._path_of(self._source.weight_path(file_name))
            self._writers[file_name] = _core.BlobWriter(path)
        return self._writers[file_name]


# Where a package goes.
Sink: TypeAlias = Staged | Counter


def check_destination(source: Path, destination: Path, *, force: bool) -> None:
    """Refuse a destination that must not be written.

    Raises
    ------
    DestinationError
        If it is the source, inside it or around it; taken, without ``force``; or no package.
    PackageNotFoundError
        If its parent folder does not exist.
    """
    real, real_source = destination.resolve(), source.resolve()
    if real == real_source or real in real_source.parents or real_source in real.parents:
        msg = f"{destination}: the destination must be apart from the source {source}"
        raise DestinationError(msg)
    files.check_free(destination, force=force, is_package=True)
    if not os.path.lexists(destination):
        return
    if destination.is_symlink() or not (destination / "Manifest.json").is_file():
        msg = f"{destination} exists and is not an .mlpackage, so it is not replaced"
        raise DestinationError(msg)


def _create_stage(destination: Path) -> tuple[Path, int]:
    # The lock tells a folder in use from one whose process was killed. It is taken after the
    # folder exists; whoever finds it unlocked in between deletes it, and we try again.
    def take_back(folder: Path) -> None:
        with contextlib.suppress(OSError):
            _restore(folder, destination)
        files.remove(folder)

    for _ in range(100):
        folder = files.draft_of(destination.absolute(), take_back)
        try:
            folder.mkdir()
        except OSError:
            files.end_draft(folder)
            raise
        with contextlib.suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if folder.exists():
                return folder, descriptor
            os.close(descriptor)
        files.end_draft(folder)
    msg = f"{destination}: no temporary folder could be made beside it"
    raise StorageError(msg)


def _sweep(destination: Path) -> None:
    """Remove what a killed run left beside this destination."""
    pattern = f".{destination.name}{files.DRAFT_MARK}"
    for folder in destination.absolute().parent.iterdir():
        if not folder.name.startswith(pattern) or folder.is_symlink() or not folder.is_dir():
            continue
        with contextlib.suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _restore(folder, destination)
                shutil.rmtree(folder)
            finally:
                os.close(descriptor)


def _restore(folder: Path, destination: Path) -> None:
    """Put a package that was moved aside back, unless a new one has taken its place."""
    previous = folder / "previous.mlpackage"
    if previous.exists() and not destination.exists():
        previous.rename(destination)


def save_copy(package: Package, destination: Path, *, force: bool) -> None:
    """Copy a package, byte for byte.

    Raises
    ------
    CompressionError
        If the destination can't be written.
    """
    with Staged(package, destination, force=force) as staged:
        staged.copy_rest(set())
        staged.write_model(package.model_bytes)
        staged.commit()


def save_changed(package: Package, destination: Path) -> None:
    """Write an open package with what was changed in its model; its weight files stay as they are.

    Raises
    ------
    CompressionError
        If the destination can't be written.
    """
    with Staged(package, destination, force=False) as staged:
        staged.copy_rest(set())
        staged.finish(package.model)
        staged.commit()
