"""Checkpoints in the format of safetensors, of which memory holds one tensor at a time.

A file is the length of its header (8 bytes), the header (JSON: type, shape and place of each
tensor), and the tensors. A checkpoint is a file, or a folder of them, its shards, with an index.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch

from milpress.errors import PackageError, PackageNotFoundError
from milpress.plain import json
from milpress.plain.files import system_errors

if TYPE_CHECKING:
    from typing_extensions import Self

_GREATEST_HEADER = 100_000_000  # bytes, as the library has it
_CHUNK = 1 << 24
_TYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
_NAMES = {dtype: name for name, dtype in _TYPES.items()}


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor in a file: its type and shape, and the offset of its first byte."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    @property
    def n_bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


class Shard(Mapping[str, torch.Tensor]):
    """A file of named tensors, each of which is read when it is asked for.

    Raises
    ------
    PackageNotFoundError
        If there is no such file.
    PackageError
        If it is damaged, or no such file.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            msg = f"{path}: no such file"
            raise PackageNotFoundError(msg)
        self.path = path
        with system_errors(path), path.open("rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(_GREATEST_HEADER, size - 8):
                msg = f"{path}: not a file of safetensors, or cut off within its header"
                raise PackageError(msg)
            header = _header(path, file.read(length))
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        entries = {name: _entry(path, name, item, 8 + length) for name, item in header.items()}
        for name, entry in entries.items():
            if entry.begin + entry.n_bytes > size:
                msg = f"{path}: cut off, {name} ends beyond the file; copy it again"
                raise PackageError(msg)
        # As they come in the file, which is then read from front to back.
        self.entries = dict(sorted(entries.items(), key=lambda item: item[1].begin))

    def __getitem__(self, name: str) -> torch.Tensor:
        """Read a tensor."""
        entry = self.entries[name]
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        with system_errors(self.path), self.path.open("rb") as file:
            file.seek(entry.begin)
            n_bytes = file.readinto(bytes_of(tensor))
        if n_bytes < entry.n_bytes:
            msg = f"{self.path}: cut off within {name} while it was read"
            raise PackageError(msg)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a tensor."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def _header(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.read(text)
    except ValueError as error:
        msg = f"{path}: the header is damaged: {error}"
        raise PackageError(msg) from error
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__", {}), dict):
        msg = f"{path}: the header is damaged: it is no dictionary of tensors and metadata"
        raise PackageError(msg)
    return header


def _entry(path: Path, name: str, item: Any, base: int) -> Entry:
    try:
        begin, end = item["data_offsets"]
        entry = Entry(_TYPES[item["dtype"]], tuple(item["shape"]), base + begin)
        is_whole = all(type(n) is int and n >= 0 for n in (begin, end, *entry.shape))
        if is_whole and end - begin == entry.n_bytes:
            return entry
    except (KeyError, TypeError, ValueError):
        pass
    msg = f"{path}: what the header says of {name} is damaged, or of a type that torch lacks"
    raise PackageError(msg)


@dataclass(frozen=True, slots=True)
class Index:
    """The file that says which shard of a folder holds which tensor."""

    path: Path
    files: dict[str, str]
    metadata: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Index:
        """Read it.

        Raises
        ------
        PackageError
            If it is damaged, or names files elsewhere.
        """
        with system_errors(path):
            text = path.read_bytes()
        try:
            data = json.read(text)
            index = cls(path, dict(data["weight_map"]), dict(data.get("metadata") or {}))
            # A name that is no more than that can't climb out of the folder.
            is_sound = all(Path(file).name == file for file in index.files.values())
        except (AttributeError, KeyError, TypeError, ValueError):
            is_sound = False
        if not is_sound:
            msg = f"{path}: damaged, it must be JSON with the file of each tensor in weight_map"
            raise PackageError(msg)
        return index

    def shard(self, file: str) -> Shard:
        """Open a shard.

        Raises
        ------
        PackageNotFoundError
            If it is missing.
        """
        path = self.path.parent / file
        if not path.is_file():
            name = next(name for name, each in self.files.items() if each == file)
            msg = f"{path}: missing, though {self.path.name} says that it holds {name}"
            raise PackageNotFoundError(msg)
        return Shard(path)


def _only_file(folder: Path) -> Path:
    file = _only(folder, sorted(folder.glob("*.safetensors")), "files and no index")
    if file is None:
        msg = f"{folder}: holds no file of safetensors"
        raise PackageNotFoundError(msg)
    return file


def _only(folder: Path, paths: Sequence[Path], what: str) -> Path | None:
    """Return the one of some paths, if there is any."""
    if len(paths) > 1:
        msg = f"{folder}: holds {len(paths)} {what}; give the path of one file, or another folder"
        raise PackageError(msg)
    return paths[0] if paths else None


class Checkpoint:
    """A file of tensors, or a folder of such files with an index.

    Parameters
    ----------
    path
        The file; or the folder, with one file, or with ``*.safetensors.index.json`` and the shards
        that it names.

    Raises
    ------
    PackageNotFoundError
        If it, or one of its shards, is missing.
    PackageError
        If it is damaged, or a folder of several files without an index.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.index: Index | None = None
        index = None
        if path.is_dir():
            index = _only(path, sorted(path.glob("*.safetensors.index.json")), "indices")
        if index is None:
            shard = Shard(_only_file(path) if path.is_dir() else path)
            self.shards = {shard.path.name: shard}
            self.shard_of = dict.fromkeys(shard, shard)
            return
        self.index = Index.read(index)
        self.shards = {
            file: self.index.shard(file) for file in sorted(set(self.index.files.values()))
        }
        self.shard_of = {name: self.shards[file] for name, file in self.index.files.items()}
        for name, shard in self.shard_of.items():
            if name not in shard:
                msg = f"{shard.path}: lacks {name}, which {index.name} says is in it"
                raise PackageError(msg)

    def __contains__(self, name: str) -> bool:
        return name in self.shard_of

    def __iter__(self) -> Iterator[str]:
        return iter(self.shard_of)

    def __getitem__(self, name: str) -> torch.Tensor:
        """Read a tensor."""
        return self.shard_of[name][name]


class ShardWriter:
    """A file of named tensors that is written one after the other, and is there once it is closed.

    Tensors of 8 bytes an element come first and those of one last, so that all are aligned; until
    then, each size is in a file of its own that has no name.
    """

    def __init__(self, path: Path, metadata: Mapping[str, str]) -> None:
        self._path = path
        self._metadata = {"format": "pt", **metadata}
        self._entries: dict[str, Entry] = {}
        self._parts: dict[int, IO[bytes]] = {}
        self._open = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with self._open:
            if kind is None:
                self._close()

    @property
    def names(self) -> list[str]:
        """The tensors that were added."""
        return list(self._entries)

    @property
    def n_bytes(self) -> int:
        """Their size."""
        return sum(entry.n_bytes for entry in self._entries.values())

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor, on the CPU."""
        with system_errors(self._path):
            part = self._part(tensor.dtype.itemsize)
            self._entries[name] = Entry(tensor.dtype, tuple(tensor.shape), part.tell())
            part.write(bytes_of(tensor.contiguous()))

    def _part(self, size: int) -> IO[bytes]:
        """Return the file of the tensors of so many bytes an element."""
        if size not in self._parts:
            part: IO[bytes] = tempfile.TemporaryFile(dir=self._path.parent)  # noqa: SIM115
            self._parts[size] = self._open.enter_context(part)
        return self._parts[size]

    def _close(self) -> None:
        header: dict[str, Any] = {"__metadata__": self._metadata}
        sizes = sorted(self._parts, reverse=True)
        base = 0
        for size in sizes:
            for name, entry in self._entries.items():
                if entry.dtype.itemsize == size:
                    begin = base + entry.begin
                    header[name] = {
                        "dtype": _NAMES[entry.dtype],
                        "shape": list(entry.shape),
                        "data_offsets": [begin, begin + entry.n_bytes],
                    }
            base += self._parts[size].tell()
        text = json.text(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with system_errors(self._path), self._path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little"))
            file.write(text)
            for size in sizes:
                self._parts[size].seek(0)
                shutil.copyfileobj(self._parts[size], file, _CHUNK)
