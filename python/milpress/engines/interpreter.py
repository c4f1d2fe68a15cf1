"""The interpreter as an engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from milpress.mil.package import Package


class InterpreterEngine:
    """Runs a package by the interpreter; see `Engine`.

    Parameters
    ----------
    package
        An open package; changes to its model count.
    function
        Name of the function to run; by default the one that Core ML would take.
    """

    def __init__(self, package: Package, function: str | None) -> None:
        from milpress.interpreter import load

        self._program = load(package, function)
        self.inputs = self._program.inputs
        self.notes = self._program.notes

    def intermediate(
        self, sample: Mapping[str, Any], names: Sequence[str], observe: Callable[[str, Any], None]
    ) -> None:
        """Run a sample, and call ``observe`` with name and array of each named value."""
        from milpress.interpreter.program import run_once

        def show(name: str, value: Any) -> None:
            observe(name, value.numpy())

        run_once(self._program, sample, taps=names, observe=show)
