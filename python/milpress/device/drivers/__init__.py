"""What runs models: one class each, used inside a process of its own."""

from __future__ import annotations

import importlib
from typing import Any, Protocol

from milpress.errors import ConfigError

# Loaded on use: most import something large.
_HOMES = {
    "coreml": "CoreMLDriver",
    "iphone": "IPhoneDriver",
    "interpreter": "InterpreterDriver",
    "replay": "ReplayDriver",
    "fake": "FakeDriver",
}
DRIVERS = tuple(_HOMES)


class Driver(Protocol):
    """A model on something that can run it.

    Every method returns what JSON can hold. Times are milliseconds; ``None`` stands for what there
    is no way to tell. An error is any exception; its text is kept.
    """

    def describe(self) -> dict[str, Any]:
        """Return ``device`` and ``tool``, as the schema has them; ``kind`` of the numbers."""

    def compile(self, package: str, units: str, folder: str) -> dict[str, Any]:
        """Make a package ready to load in a new folder: ``ms``, and the ``path`` to load."""

    def load(self, path: str, units: str) -> dict[str, Any]:
        """Load what `compile` made: ``ms``."""

    def feed(self, inputs: str) -> dict[str, Any]:
        """Take the samples of a file as inputs of all that follows; the answer is empty."""

    def predict(self, n: int) -> dict[str, Any]:
        """Predict so many times, the samples in turn: ``core_ms`` (or ``None``), ``e2e_ms``."""

    def outputs(self, path: str) -> dict[str, Any]:
        """Write the outputs for every sample to a file; the answer is empty."""

    def memory(self) -> dict[str, Any]:
        """Return ``bytes``, ``peak`` and ``method``; nothing if it can't be told."""

    def thermal(self) -> dict[str, Any]:
        """Return ``state``: ``"nominal"`` or another; ``None`` if it can't be told."""

    def placement(self) -> dict[str, Any]:
        """Return ``source`` and ``ops``, as the schema has them; nothing if there are none."""

    def throughput(self, batch: int) -> dict[str, Any]:
        """Hand over so many samples at once: ``ms``; ``None`` if that can't be done."""

    def energy(self, seconds: float) -> dict[str, Any]:
        """Return mean power while predicting, and ``method``; nothing if it can't be told."""


class Untold:
    """The answers of a driver that can tell nothing but times."""

    def memory(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def thermal(self) -> dict[str, Any]:
        """Return that it can't be told."""
        return {"state": None}

    def placement(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def throughput(self, batch: int) -> dict[str, Any]:
        """Return that samples run one after the other."""
        del batch
        return {"ms": None}

    def energy(self, seconds: float) -> dict[str, Any]:
        """Return nothing."""
        del seconds
        return {}


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
