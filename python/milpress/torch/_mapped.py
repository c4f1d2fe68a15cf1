"""A model whose values are in a file, of which memory has as much as there is room for."""

from __future__ import annotations

import contextlib
import mmap
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from milpress.plain.files import system_errors
from milpress.torch._safetensors import bytes_of
from milpress.torch._substitution import refer

_ALIGNMENT = 64
_TOUCHED = 256 * 2**20  # bytes of values that a run reads before they may leave memory


@contextlib.contextmanager
def mapped(
    model: nn.Module, values: Mapping[int, Callable[[], torch.Tensor]], folder: Path
) -> Iterator[None]:
    """Have other values in a model for the time of a block, in a temporary file.

    Afterwards it holds what it held before, and its modules have the buffers that they had.

    Parameters
    ----------
    model
        The model.
    values
        What reads the values of parameters and buffers, by the identity of these.
    folder
        Where the file is to be.
    """
    held: list[tuple[nn.Module, dict[str, Any], dict[str, Any]]] = [
        (module, dict(module._parameters), dict(module._buffers)) for module in model.modules()
    ]
    with contextlib.ExitStack() as stack:
        with system_errors(folder):
            file = _File(folder)
        stack.callback(file.close)
        known = _known(model)
        for number, read in values.items():
            with system_errors(folder), torch.no_grad():
                file.append(number, read().to(known[number].dtype))
        file.map()
        new: dict[int, Any] = {number: _like(known[number], file[number]) for number in values}
        try:
            for module, parameters, buffers in held:
                for own, before in _tensors(module, parameters, buffers):
                    own.update({name: new[id(t)] for name, t in before.items() if id(t) in new})
                refer(module)
                handle = module.register_forward_hook(file.passed)
                stack.callback(handle.remove)
            new.clear()
            yield
        finally:
            for module, parameters, buffers in held:
                for own, before in _tensors(module, parameters, buffers):
                    own.clear()
                    own.update(before)
                refer(module)


def _tensors(module: nn.Module, parameters: Any, buffers: Any) -> tuple[tuple[Any, Any], ...]:
    """Return what a module holds, each with what it held before."""
    return (module._parameters, parameters), (module._buffers, buffers)


def _known(model: nn.Module) -> dict[int, torch.Tensor]:
    tensors = [*model.parameters(), *model.buffers()]
    return {id(tensor): tensor for tensor in tensors}


def _like(tensor: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    is_parameter = isinstance(tensor, nn.Parameter)
    return nn.Parameter(values, requires_grad=False) if is_parameter else values


class _File:
    """Tensors one after the other in a file without a name."""

    def __init__(self, folder: Path) -> None:
        self._file: Any = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._places: dict[int, tuple[int, torch.dtype, torch.Size]] = {}
        self._map: mmap.mmap | None = None
        self._n_touched = 0

    def append(self, number: int, values: torch.Tensor) -> None:
        self._file.seek(-self._file.tell() % _ALIGNMENT, 1)
        self._places[number] = (self._file.tell(), values.dtype, values.shape)
        self._file.write(bytes_of(values.contiguous()))

    def map(self) -> None:
        """Have what was written in memory, as far as it is touched."""
        self._file.flush()
        if self._file.tell():
            self._map = mmap.mmap(self._file.fileno(), 0)

    def __getitem__(self, number: int) -> torch.Tensor:
        begin, dtype, shape = self._places[number]
        if self._map is None or shape.numel() == 0:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._map, dtype=dtype, count=shape.numel(), offset=begin).view(
            shape
        )

    def passed(self, module: nn.Module, *_: object) -> None:
        """Let values leave memory, once modules that ran have touched many."""
        self._n_touched += sum(each.nbytes for each in module.parameters(recurse=False))
        if self._n_touched > _TOUCHED and self._map is not None:
            self._n_touched = 0
            if hasattr(mmap, "MADV_DONTNEED"):
                # They are in the file, and come back when they are touched.
                self._map.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        self._file.close()
