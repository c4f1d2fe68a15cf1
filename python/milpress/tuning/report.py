"""What tuning did: arrays, losses, and what was left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from milpress.plain import json
from milpress.show import escaped, named_table

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrayReport:
    """An array that was tuned, or why it was not.

    Parameters
    ----------
    name, parameter
        The op that stores it, and as which parameter.
    kind
        ``"tables"``, ``"scales"``, ``"values"``, ``"biases"`` or ``"norms"``.
    n_elements
        How many numbers it has.
    change
        How far it moved: root of the squares of the changes over that of the numbers.
    note
        Why it stays as it was; empty if it does not.
    """

    name: str
    parameter: str
    kind: str
    n_elements: int
    change: float = 0.0
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputReport:
    """The distance of an output from the original's, on the samples that were set aside.

    Parameters
    ----------
    name
        The output, with the function before it if there are several.
    loss
        ``"mse"`` (squared error over the original's power), ``"kl"`` or ``"kl of probabilities"``
        (nats a row).
    before, after
        The distance of the compressed package, and of what was written.
    """

    name: str
    loss: str
    before: float
    after: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneReport:
    """What `tune` did.

    Parameters
    ----------
    original, compressed, destination
        The packages.
    arrays
        The arrays that could be tuned.
    left
        Compressed weights that could not, by name, and why.
    outputs
        The distance of each output.
    before, after
        Mean distance of the outputs, on the samples that were set aside.
    n_steps
        Steps that were taken.
    best_step
        The one after which the state that was written was reached; 0 if none was better than the
        compressed package, of which the destination is then a copy.
    n_samples, n_validation
        Samples that were learned from, and that were set aside.
    notes
        Remarks.
    verified
        Whether the result was compared with both packages.
    seconds
        Wall time.
    """

    original: str
    compressed: str
    destination: str
    arrays: tuple[ArrayReport, ...]
    left: dict[str, str]
    outputs: tuple[OutputReport, ...]
    before: float
    after: float
    n_steps: int
    best_step: int
    n_samples: int
    n_validation: int
    notes: tuple[str, ...] = ()
    verified: bool = True
    seconds: float = 0.0

    @property
    def is_better(self) -> bool:
        """Whether anything was gained; if not, the destination is a copy."""
        return self.best_step > 0

    @property
    def summary(self) -> str:
        """One line."""
        if not self.is_better:
            return (
                f"Nothing gained in {self.n_steps} steps on {self.n_validation} samples set aside; "
                "the package is as it was"
            )
        tuned = [array for array in self.arrays if not array.note]
        return (
            f"Tuned {len(tuned)} arrays in {self.n_steps} steps: distance from the original "
            f"{self.before:.4g} -> {self.after:.4g} on {self.n_validation} samples set aside"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON can hold it."""
        fields = json.record(
            self,
            "original",
            "compressed",
            "destination",
            "arrays",
            "left",
            "outputs",
            "before",
            "after",
            "n_steps",
            "best_step",
            "n_samples",
            "n_validation",
            "notes",
            "verified",
            "seconds",
        )
        return {"version": 1, **fields}

    def __rich__(self) -> Table:
        """Return the arrays as a table, by kind."""
        table = named_table("tuned", right=["arrays", "numbers", "change"])
        for kind in dict.fromkeys(array.kind for array in self.arrays):
            own = [array for array in self.arrays if array.kind == kind and not array.note]
            n = sum(array.n_elements for array in own)
            squares = sum(array.n_elements * array.change**2 for array in own)
            change = (squares / n) ** 0.5 if n else 0.0
            table.add_row(escaped(kind), str(len(own)), f"{n:,}", f"{change:.2%}")
        return table
