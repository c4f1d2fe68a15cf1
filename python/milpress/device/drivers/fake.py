"""Driver that plays a script, for tests: nothing it says was measured."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from milpress.device.drivers import Driver
from milpress.plain.arrays import Arrays


class FakeDriver(Driver):
    """Plays scripted latencies, states and failures.

    ``core_ms`` are latencies by what the units are called, ``""`` being all others; they are
    repeated. ``states`` are thermal, one for each request, ``loads`` the milliseconds of each load;
    the last one stays. ``fail`` says what happens at a command: ``"error"``, ``"crash"``,
    ``"kill"`` or ``"hang"``; ``only`` for which units, if not for all.
    """

    def __init__(
        self,
        core_ms: dict[str, Sequence[float]] | None = None,
        states: Sequence[str] = ("nominal",),
        loads: Sequence[float] = (5.0,),
        fail: dict[str, str] | None = None,
        only: str = "",
    ) -> None:
        super().__init__()
        self._core_ms = core_ms or {"": (1.0,)}
        self._states = list(states)
        self._loads = list(loads)
        self._fail = fail or {}
        self._only = only
        self._units = ""
        self._n = 0

    def describe(self) -> dict[str, Any]:
        """Return that this is a fake."""
        return {"kind": "fake", "device": None, "tool": {}}

    def compile(self, package: str, units: str, folder: str) -> dict[str, Any]:
        """Make nothing."""
        self._units = units
        self._play("compile")
        return {"ms": 10.0, "path": f"{folder}/{Path(package).name}"}

    def load(self, path: str, units: str) -> dict[str, Any]:
        """Return the next scripted load."""
        del path
        self._units = units
        self._play("load")
        return {"ms": self._loads.pop(0) if len(self._loads) > 1 else self._loads[0]}

    def predict(self, n: int) -> dict[str, Any]:
        """Return the next scripted latencies, and calls that take a tenth more."""
        self._play("predict")
        script = self._core_ms.get(self._units, self._core_ms.get("", (1.0,)))
        core = [script[(self._n + i) % len(script)] for i in range(n)]
        self._n += n
        return {"core_ms": core, "e2e_ms": [1.1 * each for each in core]}

    def output(self, sample: Arrays) -> Arrays:
        """Return sums of the inputs."""
        return {"sum": np.array([array.sum() for array in sample.values()])}

    def memory(self) -> dict[str, Any]:
        """Return nothing, unless it fails."""
        self._play("memory")
        return {}

    def thermal(self) -> dict[str, Any]:
        """Return the next scripted state."""
        self._play("thermal")
        return {"state": self._states.pop(0) if len(self._states) > 1 else self._states[0]}

    def placement(self) -> dict[str, Any]:
        """Return nothing, unless it fails."""
        self._play("placement")
        return {}

    def throughput(self, batch: int) -> dict[str, Any]:
        """Return what the scripted latencies amount to."""
        self._play("throughput")
        return {"ms": sum(self.predict(batch)["core_ms"])}

    def energy(self, seconds: float) -> dict[str, Any]:
        """Return nothing, unless it fails."""
        del seconds
        self._play("energy")
        return {}

    def _play(self, command: str) -> None:
        if self._only and self._units != self._only:
            return
        event = self._fail.get(command)
        if event == "error":
            msg = f"{command} was to fail"
            raise RuntimeError(msg)
        if event == "crash":
            os.abort()
        if event == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if event == "hang":
            time.sleep(3600)
