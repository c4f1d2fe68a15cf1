"""Drivers of benchmarks, each in a process of its own."""

from __future__ import annotations

import abc
import importlib
import itertools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from milpress.errors import ConfigError
from milpress.plain.arrays import Arrays
from milpress.samples.files import read_samples, write_samples

# Loaded on use: most import something large.
_HOMES = {
    "coreml": "CoreMLDriver",
    "iphone": "IPhoneDriver",
    "interpreter": "InterpreterDriver",
    "fake": "FakeDriver",
}
# To replay is to run nothing: `milpress.device.replay` does.
DRIVERS = ("coreml", "iphone", "interpreter", "replay", "fake")


class Driver(abc.ABC):
    """A model on something that can run it.

    Every method returns what JSON can hold. Times are milliseconds; ``None`` or nothing stands for
    what a driver can't tell. An error is any exception; its text is kept.
    """

    def __init__(self) -> None:
        self._samples: list[Arrays] = []
        self._next = 0

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return ``device`` and ``tool``, as the schema has them; ``kind`` of the numbers."""

    @abc.abstractmethod
    def compile(self, package: str, units: str, folder: str) -> dict[str, Any]:
        """Make a package ready to load in a new folder: ``ms``, and the ``path`` to load."""

    @abc.abstractmethod
    def load(self, path: str, units: str) -> dict[str, Any]:
        """Load what `compile` made: ``ms``."""

    def predict(self, n: int) -> dict[str, Any]:
        """Predict so many times, the samples in turn: ``core_ms`` (or ``None``), ``e2e_ms``."""
        core, e2e = [], []
        for sample in self._in_turn(n):
            started = time.perf_counter()
            self.output(sample)
            e2e.append(ms_since(started))
            core.append(self._duration())
        return {"core_ms": None if None in core else core, "e2e_ms": e2e}

    def _duration(self) -> float | None:
        """Return the milliseconds that the last prediction took by Core ML itself."""
        return None

    @abc.abstractmethod
    def output(self, sample: Arrays) -> Mapping[str, Any]:
        """Return the outputs for one sample."""

    def feed(self, inputs: str) -> dict[str, Any]:
        """Take the samples of a file as inputs of all that follows; the answer is empty."""
        self._samples = read_samples(inputs)
        return {}

    def outputs(self, path: str) -> dict[str, Any]:
        """Write the outputs for every sample to a file; the answer is empty."""
        write_samples(Path(path), map(self.output, self._samples))
        return {}

    def memory(self) -> dict[str, Any]:
        """Return ``bytes``, ``peak`` and ``method``."""
        return {}

    def thermal(self) -> dict[str, Any]:
        """Return ``state``: ``"nominal"`` or another."""
        return {"state": None}

    def placement(self) -> dict[str, Any]:
        """Return ``source`` and ``ops``, as the schema has them."""
        return {}

    def throughput(self, batch: int) -> dict[str, Any]:
        """Hand over so many samples at once: ``ms``."""
        del batch
        return {"ms": None}

    def energy(self, seconds: float) -> dict[str, Any]:
        """Return mean power while predicting, and ``method``."""
        del seconds
        return {}

    def _in_turn(self, n: int) -> list[Arrays]:
        """Return so many samples, from where the last turn ended."""
        begin = self._next
        self._next = (begin + n) % len(self._samples)
        return list(itertools.islice(itertools.cycle(self._samples), begin, begin + n))


def ms_since(started: float) -> float:
    """Return the milliseconds since `time.perf_counter` gave a number."""
    return 1e3 * (time.perf_counter() - started)


def ms_of(nanoseconds: int | None) -> float | None:
    """Return milliseconds, if there is a number."""
    return None if nanoseconds is None else nanoseconds / 1e6


def create(name: str, options: dict[str, Any]) -> Driver:
    """Return a driver by its name.

    Raises
    ------
    ConfigError
        If there is none of that name.
    """
    if name not in _HOMES:
        msg = f"a driver must be one of {', '.join(_HOMES)}, got {name!r}"
        raise ConfigError(msg)
    module = importlib.import_module(f"milpress.device.drivers.{name}")
    driver: Driver = getattr(module, _HOMES[name])(**options)
    return driver
