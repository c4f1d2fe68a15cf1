"""Interface of an engine, which runs a model and gives its intermediate values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from milpress.interpreter import Feature


class Engine(Protocol):
    """Runs a model on samples."""

    @property
    def inputs(self) -> tuple[Feature, ...]:
        """The model's inputs."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks on how the model is run."""

    def intermediate(
        self, sample: Mapping[str, Any], names: Sequence[str], observe: Callable[[str, Any], None]
    ) -> None:
        """Run a sample, and call ``observe`` with name and array of each named value."""
