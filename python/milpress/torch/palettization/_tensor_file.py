"""Files of named tensors as torch saves them, of which memory holds one at a time."""

from __future__ import annotations

import math
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from milpress.errors import StorageError
from milpress.plain.files import system_errors

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]

# Of a file in a zip archive: a header of this size, the last fields of which are the lengths of its
# name and of what comes between that and the file's bytes.
_HEADER = 30
_LENGTHS = struct.Struct("<HH")


class TensorFile(Mapping[str, torch.Tensor]):
    """Named tensors of float32 in a file that ``torch.load`` reads.

    Each is read when it is asked for, and may be written in place.

    Parameters
    ----------
    path
        The file, in which tensors are in the order of ``shapes`` and nothing else is.
    shapes
        Their shapes, by name.
    """

    def __init__(self, path: Path, shapes: Shapes) -> None:
        self.path = path
        self.shapes = dict(shapes)
        self._offsets = dict(zip(shapes, _record_offsets(path), strict=True))

    @classmethod
    def create(
        cls, path: Path, shapes: Shapes, content: Callable[[Any], Any] = lambda tensors: tensors
    ) -> TensorFile:
        """Make a file of zeros.

        Parameters
        ----------
        path, shapes
            As of the class.
        content
            Returns what ``torch.load`` is to find, which holds no other tensors.
        """
        # Nothing of it is read, so that it takes no memory, and one does for all.
        blank = np.empty(max(map(math.prod, shapes.values()), default=0), np.float32)
        tensors = {
            name: torch.from_numpy(blank[: math.prod(shape)].reshape(shape))
            for name, shape in shapes.items()
        }
        with system_errors(path), torch.serialization.skip_data():
            torch.save(content(tensors), path)
        return cls(path, shapes)

    def __getitem__(self, name: str) -> torch.Tensor:
        """Read a tensor."""
        shape = self.shapes[name]
        with system_errors(self.path), self.path.open("rb") as file:
            file.seek(self._offsets[name])
            values = np.fromfile(file, np.float32, math.prod(shape))
        if values.size != math.prod(shape):
            msg = f"{name} ends too early; something else has changed the file"
            raise StorageError(0, msg, str(self.path))
        return torch.from_numpy(values.reshape(shape))

    def __setitem__(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor, of the same shape."""
        values = np.ascontiguousarray(tensor.numpy(), np.float32)
        assert values.shape == self.shapes[name]  # noqa: S101 - for our own mistakes
        with system_errors(self.path), self.path.open("r+b") as file:
            file.seek(self._offsets[name])
            file.write(values.data)

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def _record_offsets(path: Path) -> Iterator[int]:
    """Yield where the bytes of each tensor begin; torch numbers them as it meets them."""
    with system_errors(path), path.open("rb") as file, zipfile.ZipFile(file) as archive:
        headers = {info.filename: info.header_offset for info in archive.infolist()}
        root = next(iter(headers)).partition("/")[0]
        n_tensors = sum(name.startswith(f"{root}/data/") for name in headers)
        for i in range(n_tensors):
            begin = headers[f"{root}/data/{i}"] + _HEADER
            file.seek(begin - _LENGTHS.size)
            yield begin + sum(_LENGTHS.unpack(file.read(_LENGTHS.size)))
