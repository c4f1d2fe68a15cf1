"""Comparison of the values that two models compute inside."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from milpress.evaluation.boxes import Boxes
from milpress.evaluation.metrics import ErrorSums
from milpress.evaluation.results import OpEvaluation

if TYPE_CHECKING:
    from milpress.interpreter import Program

_HELD_BYTES = 1 << 30


class IntermediateValues:
    """Errors of the values that two models compute inside.

    The original's values for one sample are kept, beyond some size in a file, while the other model
    runs twice: as it is, and with each value replaced by the original's once it is compared.
    """

    def __init__(self, original: Program, compressed: Program, boxes: Boxes) -> None:
        self._boxes = boxes
        self._kinds = original.op_types
        theirs = compressed.values
        kinds = original.values
        self._names = [
            name for name, kind in kinds.items() if kind is not None and theirs.get(name) == kind
        ]
        self._apart = set(kinds.keys() ^ theirs.keys())
        self._apart |= {name for name in kinds if name in theirs and kinds[name] != theirs[name]}
        self._compared = {
            name
            for name in self._kinds
            if (kind := kinds[name]) is not None and kind.dtype.is_float
        }
        self._carried: dict[str, ErrorSums] = {}
        self._own: dict[str, ErrorSums] = {}

    @property
    def n_uncompared(self) -> int:
        """How many values could not be compared."""
        return len(self._apart)

    def run(self, sample: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Run both models on a sample, and return their outputs."""
        with tempfile.SpooledTemporaryFile(max_size=_HELD_BYTES) as file:
            store = _ValueStore(file)
            first = self._boxes.original(sample, self._names, store.add)
            store.rewind()

            def compare(name: str, value: Any) -> None:
                self._add(self._carried, name, store.next(name), value)

            second = self._boxes.compressed(sample, self._names, compare)
            store.rewind()

            def replace(name: str, value: Any) -> Any:
                expected = store.next(name)
                self._add(self._own, name, expected, value)
                same = expected is not None and expected.shape == value.shape
                return expected if same else value

            self._boxes.compressed(sample, self._names, replace=replace)
        return [first.outputs, second.outputs]

    def _add(self, errors: dict[str, ErrorSums], name: str, expected: Any, value: Any) -> None:
        if name not in self._compared:
            return
        if expected is None or expected.shape != value.shape:
            self._apart.add(name)
            return
        one, other = (tensor.numpy().astype(np.float64) for tensor in (expected, value))
        errors.setdefault(name, ErrorSums()).add(one, other)

    def evaluations(self) -> tuple[OpEvaluation, ...]:
        """Return the errors of each value, the greatest errors of ops' own first."""
        ops = [
            OpEvaluation(
                name=name,
                op_type=self._kinds[name],
                snr_db=self._carried[name].snr_db,
                own_snr_db=self._own[name].snr_db,
            )
            for name in self._names
            if name in self._carried and name in self._own
        ]
        return tuple(sorted(ops, key=lambda op: (op.own_snr_db, op.snr_db)))


class _ValueStore:
    """Values that a run computed, in a file, to be read again in order."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._places: dict[str, list[tuple[int, Any, Any]]] = {}
        self._unread: dict[str, Iterator[tuple[int, Any, Any]]] = {}

    def add(self, name: str, value: Any) -> None:
        """Keep a value."""
        array = np.ascontiguousarray(value.numpy())
        place = (self._file.tell(), array.dtype, tuple(value.shape))
        self._file.write(array.tobytes())
        self._places.setdefault(name, []).append(place)

    def rewind(self) -> None:
        """Begin to read again."""
        self._unread = {name: iter(places) for name, places in self._places.items()}

    def next(self, name: str) -> Any:
        """Return a value as it was computed first, the next time as second; None at the end."""
        import torch

        place = next(self._unread.get(name, iter(())), None)
        if place is None:
            return None
        offset, dtype, shape = place
        self._file.seek(offset)
        data = bytearray(self._file.read(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize))
        return torch.from_numpy(np.frombuffer(data, dtype).reshape(shape))
