"""Reports on quantized activations, as tables and JSON."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from milpress.plain import json
from milpress.show import escaped, named_table

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Activation:
    """A computed value that is quantized.

    Parameters
    ----------
    name
        Its name in the graph.
    shape
        Its shape; ``None`` where that varies.
    dtype
        Type of the codes.
    scale, zero_point
        A code stands for ``scale * (code - zero_point)``.
    low, high
        The range that was found; NaN if none was, like the scale of what is left.
    note
        Why it is not quantized although it was selected; empty if it is.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str
    scale: float
    zero_point: int
    low: float
    high: float
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the activation as JSON can hold it; what is not known is ``None``."""
        numbers = {name: getattr(self, name) for name in ("scale", "low", "high")}
        return json.record(self) | {
            name: None if math.isnan(number) else number for name, number in numbers.items()
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationReport:
    """What was quantized, and from how many samples its ranges are.

    Parameters
    ----------
    activations
        Each value, once for each kind of codes.
    n_samples
        Samples that were run.
    n_pairs
        Pairs of ``quantize`` and ``dequantize`` that were inserted.
    notes
        Remarks on the whole model, such as a raised opset, and on concatenated values that have
        ranges of their own.
    shared
        Names of the values that have one range, for each range that several have.
    """

    activations: tuple[Activation, ...]
    n_samples: int
    n_pairs: int
    notes: tuple[str, ...] = ()
    shared: tuple[tuple[str, ...], ...] = ()

    @property
    def summary(self) -> str:
        """One line."""
        n_left = sum(bool(each.note) for each in self.activations)
        left = f", {n_left} left" if n_left else ""
        return (
            f"{len(self.activations) - n_left} activations quantized by {self.n_samples} "
            f"samples{left}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON can hold it."""
        return json.record(self, "n_samples", "n_pairs", "notes", "shared", "activations")

    def __rich__(self) -> Table:
        """Return the activations as a table."""
        table = named_table(
            "activation", "shape", "codes", right=("least", "greatest", "scale", "zero point")
        )
        for each in self.activations:
            table.add_row(
                escaped(each.name),
                "x".join("?" if size is None else str(size) for size in each.shape),
                escaped(each.note) if each.note else each.dtype,
                *("" if math.isnan(x) else f"{x:.4g}" for x in (each.low, each.high, each.scale)),
                "" if each.note else str(each.zero_point),
            )
        if self.shared:
            table.caption = "\n".join(
                f"one range: {escaped(', '.join(names))}" for names in self.shared
            )
            table.caption_justify = "left"
        return table
