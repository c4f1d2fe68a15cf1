"""Driver for the interpreter: on any machine, as a reference, not for speed."""

from __future__ import annotations

import importlib.metadata
import time
from typing import TYPE_CHECKING, Any

from milpress.device.drivers import Driver, ms_since
from milpress.plain.arrays import Arrays

if TYPE_CHECKING:
    from milpress.interpreter import Program


class InterpreterDriver(Driver):
    """Runs a package with torch on the processor of this machine.

    Parameters
    ----------
    function
        Which function of a package with several.
    precision
        As `milpress.interpreter.load` takes it.
    """

    def __init__(self, function: str | None = None, precision: Any = "float32") -> None:
        super().__init__()
        self._function = function
        self._precision = precision
        self._program: Program | None = None

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
        return {"ms": ms_since(started)}

    def output(self, sample: Arrays) -> dict[str, Any]:
        """Run one sample."""
        from milpress.interpreter.program import run_once

        if self._program is None:
            msg = "no model is loaded"
            raise RuntimeError(msg)
        return run_once(self._program, sample).outputs
