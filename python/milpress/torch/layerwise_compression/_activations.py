"""Memory that waiting runs hold: beyond a budget it is in files until they go on.

A mode of torch sees each tensor that a run makes. Where the run gives way, those that are still
alive are written to its file and their memory is freed under them; it is read back before anything
looks at them again.
"""

from __future__ import annotations

import contextlib
import ctypes
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.multiprocessing import reductions
from torch.utils import _python_dispatch

from milpress.errors import StorageError

# Which have no types.
UntypedStorage: Any = torch.UntypedStorage
StorageWeakRef: Any = reductions.StorageWeakRef


@dataclass(slots=True, eq=False)
class _Written:
    """Where the content of a storage is, while its memory is freed."""

    storage: Any
    path: Path
    offset: int
    n_bytes: int

    def read(self) -> Any:
        """Give the storage its memory back, and return it; ``None`` if nothing refers to it."""
        storage = _alive(self.storage)
        if storage is not None and storage.nbytes() == 0:
            storage.resize_(self.n_bytes)
            self.read_into(storage)
        return storage

    def read_into(self, storage: Any) -> None:
        """Have a storage hold the content."""
        with _said(self.path, "read"), self.path.open("rb") as file:
            file.seek(self.offset)
            _read(file, storage)


@dataclass(slots=True, eq=False)
class _Run:
    """What is known of the memory of a run."""

    number: int
    made: dict[int, Any] = field(default_factory=dict)
    n_resident: int = 0  # bytes, while it waits


class Activations:
    """Memory of runs that take turns.

    Parameters
    ----------
    budget
        Bytes that waiting runs may hold in memory, beside the model and the samples as they were
        given.
    """

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._runs: dict[int, _Run] = {}
        self._written: dict[int, _Written] = {}
        self._is_recording = True

    @contextlib.contextmanager
    def recording(self, number: int) -> Iterator[None]:
        """Look at what a run makes, in its thread."""
        run = self._runs[number] = _Run(number)
        # Not entered: what this would note of modes belongs to all threads, which take turns here.
        _python_dispatch._push_mode(_Recording(self, run))
        try:
            yield
        finally:
            _python_dispatch._pop_mode()
            del self._runs[number]
            if self._folder is not None:
                self._path(self._folder, number).unlink(missing_ok=True)

    @contextlib.contextmanager
    def not_recording(self) -> Iterator[None]:
        """Take what is made in the block for no part of a run."""
        before, self._is_recording = self._is_recording, False
        try:
            yield
        finally:
            self._is_recording = before

    def leave(self, number: int) -> Callable[[], None]:
        """Free the memory of a run that gives way, beyond the budget; return what undoes it.

        Raises
        ------
        StorageError
            If the system refuses to write the file.
        """
        run = self._runs[number]
        storages = {key: storage for key, ref in run.made.items() if (storage := _alive(ref))}
        run.made = {key: run.made[key] for key in storages}
        freeable = {key: s for key, s in storages.items() if s.nbytes() and s.resizable()}
        n_bytes = sum(storage.nbytes() for storage in freeable.values())
        written: list[_Written] = []
        if sum(other.n_resident for other in self._runs.values()) + n_bytes <= self._budget:
            run.n_resident = n_bytes
        elif freeable:
            with self.not_recording():
                written = self._write(run, freeable)

        def go_on() -> None:
            run.n_resident = 0
            with self.not_recording():
                for each in written:
                    each.read()
            for key in freeable if written else ():
                self._written.pop(key, None)

        return go_on

    def _write(self, run: _Run, storages: dict[int, Any]) -> list[_Written]:
        if self._folder is None:
            with _said(Path(tempfile.gettempdir()), "written"):
                self._folder = tempfile.TemporaryDirectory(prefix="milpress-")
        path = self._path(self._folder, run.number)
        written = {}
        with _said(path, "written"), path.open("wb") as file:
            for key, storage in storages.items():
                written[key] = _Written(run.made[key], path, file.tell(), storage.nbytes())
                _write(storage, file)
        for storage in storages.values():
            storage.resize_(0)
        self._written.update(written)
        return list(written.values())

    def _path(self, folder: tempfile.TemporaryDirectory[str], number: int) -> Path:
        return Path(folder.name) / f"{number}.bin"

    def fetched(self, tensor: Tensor) -> Tensor:
        """Return a tensor of a waiting run, or a copy if its memory is freed."""
        written = self._written.get(_key(tensor))
        if written is None:
            return tensor
        storage = UntypedStorage(written.n_bytes, device=tensor.device)
        written.read_into(storage)
        place = tensor.storage_offset(), tensor.shape, tensor.stride()
        return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(storage, *place)

    def note(self, run: _Run, made: Iterable[Tensor]) -> None:
        """Note what a run has made."""
        if self._is_recording:
            for tensor in made:
                storage = tensor.untyped_storage()
                if storage._cdata not in run.made:
                    run.made[storage._cdata] = StorageWeakRef(storage)

    def have(self, used: Iterable[Tensor]) -> None:
        """Give back the memory of what a run uses: another one may have made and shared it."""
        if self._written and self._is_recording:
            for tensor in used:
                written = self._written.pop(_key(tensor), None)
                if written is not None:
                    with self.not_recording():
                        written.read()
                    for run in self._runs.values():
                        run.made.pop(_key(tensor), None)

    def clear(self) -> None:
        """Delete the files."""
        if self._folder is not None:
            self._folder.cleanup()


class _Recording(_python_dispatch.TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The mode of a run."""

    supports_higher_order_operators = True

    def __init__(self, activations: Activations, run: _Run) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._activations = activations
        self._run = run

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self._activations.have(_tensors(args))
        self._activations.have(_tensors(kwargs.values()))
        result = func(*args, **kwargs)
        if not _is_alias(func):
            self._activations.note(self._run, _tensors((result,)))
        return result


def _is_alias(func: Any) -> bool:
    """Whether an operator returns nothing but what it was given, or views of that."""
    schema = getattr(func, "_schema", None)
    return schema is not None and all(each.alias_info is not None for each in schema.returns)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors among values that have memory of their own kind."""
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _tensors(value)
        elif type(value) in (Tensor, torch.nn.Parameter) and value.layout is torch.strided:
            yield value


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _alive(reference: Any) -> Any:
    return UntypedStorage._new_with_weak_ptr(reference.cdata)


def _write(storage: Any, file: BinaryIO) -> None:
    if storage.device.type != "cpu":
        storage = _bytes_of(storage).cpu().untyped_storage()
    file.write(_memory(storage))


def _read(file: BinaryIO, storage: Any) -> None:
    is_here = storage.device.type == "cpu"
    target = storage if is_here else UntypedStorage(storage.nbytes())
    if file.readinto(_memory(target)) != storage.nbytes():  # type: ignore[attr-defined]
        msg = "it was cut short"
        raise OSError(msg)
    if not is_here:
        _bytes_of(storage).copy_(_bytes_of(target))


def _memory(storage: Any) -> memoryview:
    # An array of NumPy's would forbid the storage to free its memory.
    return memoryview((ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())).cast("B")


def _bytes_of(storage: Any) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


@contextlib.contextmanager
def _said(path: Path, verb: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        msg = (
            f"{path}: activations of samples can't be {verb}: {error}; free some space, set TMPDIR "
            "to another folder, or allow a higher activation_memory"
        )
        raise StorageError(msg) from error
