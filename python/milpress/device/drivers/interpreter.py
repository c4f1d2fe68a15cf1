"""A driver that runs models by the interpreter: on any machine, as a reference, not for speed."""

from __future__ import annotations

import importlib.metadata
import itertools
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milpress.device.drivers import Untold
from milpress.engines import inputs as files

if TYPE_CHECKING:
    from milpress.interpreter import Program


class InterpreterDriver(Untold):
    """Runs a package with torch on the processor of this machine.

    Parameters
    ----------
    function
        Which function of a package with several.
    precision
        As `milpress.interpreter.load` takes it.
    """

    def __init__(self, function: str | None = None, precision: Any = "float32") -> None:
        self._function = function
        self._precision = precision
        self._program: Program | None = None
        self._samples: list[files.Arrays] = []
        self._n = 0

    def describe(self) -> dict[str, Any]:
        """Return that this is a reference on a processor."""
        tool = {"torch": importlib.metadata.version("torch")}
        return {"kind": "cpu_reference", "device": None, "tool": tool}

    def compile(self, package: str, units: str, folder: str) -> dict[str, Any]:
        """Return the package itself: there is nothing to compile."""
        del units, folder
        return {"ms": None, "path": package}

    def load(self, path: str, units: str) -> dict[str, Any]:
        """Bind the program. Weights are decoded when they are needed first."""
        from milpress.interpreter import load

        del units
        started = time.perf_counter()
        self._program = load(path, self._function, precision=self._precision)
        return {"ms": _ms_since(started)}

    def feed(self, inputs: str) -> dict[str, Any]:
        """Read the samples."""
        self._samples = files.read(inputs)
        return {}

    def predict(self, n: int) -> dict[str, Any]:
        """Run the samples in turn, and time the whole call."""
        taken = []
        for sample in itertools.islice(itertools.cycle(self._samples), self._n, self._n + n):
            started = time.perf_counter()
            self._run(sample)
            taken.append(_ms_since(started))
        self._n = (self._n + n) % len(self._samples)
        return {"core_ms": None, "e2e_ms": taken}

    def outputs(self, path: str) -> dict[str, Any]:
        """Write the outputs for every sample."""
        files.write(Path(path), (self._run(sample) for sample in self._samples))
        return {}

    def _run(self, sample: files.Arrays) -> dict[str, Any]:
        if self._program is None:
            msg = "a model must be loaded, got none"
            raise RuntimeError(msg)
        state = self._program.make_state() if self._program.is_stateful else None
        return self._program.run(sample, state=state).outputs


def _ms_since(started: float) -> float:
    return 1e3 * (time.perf_counter() - started)
