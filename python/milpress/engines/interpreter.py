"""The interpreter as what runs a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from milpress.mil.package import Package

if TYPE_CHECKING:
    from milpress.interpreter import Feature


class _Engine(Protocol):
    """Runs a model and shows values inside as arrays, each by its name."""

    @property
    def inputs(self) -> tuple[Feature, ...]: ...

    @property
    def notes(self) -> tuple[str, ...]: ...

    def look(
        self, sample: Mapping[str, Any], taps: Sequence[str], observe: Callable[[str, Any], None]
    ) -> None: ...


class _Interpreter:
    """Runs a model by the interpreter."""

    def __init__(self, package: Package, function: str | None) -> None:
        from milpress import interpreter

        self._program = interpreter.load(package, function)
        self.inputs = self._program.inputs
        self.notes = self._program.notes

    def look(
        self, sample: Mapping[str, Any], taps: Sequence[str], observe: Callable[[str, Any], None]
    ) -> None:
        def look(name: str, value: Any) -> None:
            observe(name, value.numpy())

        state = self._program.make_state() if self._program.is_stateful else None
        self._program.run(sample, taps=taps, observe=look, state=state)
