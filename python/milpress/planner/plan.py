"""What a plan does to each weight, what is expected of it, and how that is shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from milpress.formats import Treatment
from milpress.plain import json, yaml
from milpress.planner.menu import KEEP
from milpress.recipe import Recipe, Step, describe, treatment_dict
from milpress.show import escaped, human_bytes, human_snr, named_table

if TYPE_CHECKING:
    from rich.table import Table

_N_SHOWN = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedWeight:
    """What a plan does to one weight.

    Parameters
    ----------
    name
        Its name.
    op_types
        Kinds of the ops that use it.
    shape
        Its shape.
    format
        The format's name, such as ``palette-4-group-16``; ``keep`` where it stays.
    treatment
        What is done, as it suits the shape; ``None`` where it stays.
    n_bytes
        Bytes that will be stored for it.
    snr_db
        What is expected of it: the signal-to-noise ratio of the weight; ``None`` where it stays.
    is_estimate
        Whether that was measured on a part of the weight.
    error
        What it adds to the error that the plan keeps small.
    shares_with
        The weight that its bytes are stored for, if it is another one.
    reason
        Why it stays, if nothing could be chosen.
    """

    name: str
    op_types: tuple[str, ...]
    shape: tuple[int, ...]
    format: str
    treatment: Treatment | None
    n_bytes: int
    snr_db: float | None
    is_estimate: bool
    error: float
    shares_with: str | None = None
    reason: str = ""

    @property
    def bits_per_weight(self) -> float:
        """Effective bits: all that will be stored, over the number of elements."""
        return 8 * self.n_bytes / math.prod(self.shape)

    @property
    def snr(self) -> str:
        """The signal-to-noise ratio as people read it; empty where the weight stays."""
        if self.snr_db is None:
            return ""
        return f"{'about ' if self.is_estimate else ''}{human_snr(self.snr_db)}"

    @property
    def summary(self) -> str:
        """What is expected of it, for a comment."""
        if self.treatment is None:
            return f"{self.reason or 'kept'}: {human_bytes(self.n_bytes)}"
        if self.shares_with is not None:
            return f"stored with {ascii(self.shares_with)[1:-1]}"
        return f"{human_bytes(self.n_bytes)}, {self.bits_per_weight:.2f} bits, {self.snr} dB"

    def to_dict(self) -> dict[str, Any]:
        """Return the weight's plan as JSON can hold it."""
        treatment = None if self.treatment is None else treatment_dict(self.treatment)
        names = [item.name for item in fields(self)]
        names.insert(names.index("n_bytes") + 1, "bits_per_weight")
        return json.record(self, *names) | {"treatment": treatment}


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """A size of the package, effective bits of the planned weights, and the score to be had."""

    package_bytes: int
    bits_per_weight: float
    snr_db: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A recipe that was chosen, and what is expected of it.

    Parameters
    ----------
    source
        The package it is for.
    recipe
        What `milpress.compress` is to do.
    weights
        What happens to each weight, in the order of the graph.
    n_bytes
        Bytes that will be stored for these weights.
    package_bytes
        Size of the package that the recipe makes.
    bits_per_weight
        Effective bits over these weights, those that stay included.
    snr_db
        The score: that of the mean relative error of the weights without samples, last layers
        counting four times; that of the outputs with samples.
    scored_by
        ``"weights"`` or ``"outputs"``.
    curve
        Sizes and scores that can be had, smallest first.
    knee
        The place on the curve from which more bytes bring little.
    notes
        What else there is to know.
    seconds
        Wall time.
    """

    source: str
    recipe: Recipe
    weights: tuple[PlannedWeight, ...]
    n_bytes: int
    package_bytes: int
    bits_per_weight: float
    snr_db: float
    scored_by: Literal["weights", "outputs"]
    curve: tuple[CurvePoint, ...]
    knee: int
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats that occur, most elements first."""
        sizes: dict[str, int] = {}
        for weight in self.weights:
            sizes[weight.format] = sizes.get(weight.format, 0) + math.prod(weight.shape)
        sizes.pop(KEEP, None)
        return tuple(sorted(sizes, key=lambda name: (-sizes[name], name)))

    @property
    def summary(self) -> str:
        """One line: sizes and score."""
        n = sum(weight.treatment is not None for weight in self.weights)
        return (
            f"{n} of {len(self.weights)} weights to be compressed in {len(self.formats)} formats: "
            f"{human_bytes(self.package_bytes)}, {self.bits_per_weight:.3f} bits per weight, "
            f"{human_snr(self.snr_db)} dB ({self.scored_by})"
        )

    def to_yaml(self) -> str:
        """Return the recipe as YAML, one weight a line, with what is expected of it behind.

        What is behind a ``#`` says nothing to `milpress.compress`: edit the lines as you like.
        """
        lines = [f"# {self.summary}", "version: 1"]
        if self.recipe.target is not None:
            lines.append(f"target: {self.recipe.target}")
        lines.extend(["steps:", "  - rules:"])
        rules = self.recipe.steps[0].rules
        for weight, rule in zip(self.weights, rules, strict=True):
            data = Recipe(steps=(Step(rules=(rule,)),)).to_dict()["steps"][0]["rules"][0]
            flow = yaml.text(data, default_flow_style=True, width=math.inf).strip()
            lines.append(f"      - {flow}  # {weight.summary}")
        return "\n".join(lines) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON can hold it."""
        sizes = ("n_bytes", "package_bytes", "bits_per_weight", "snr_db", "scored_by", "formats")
        names = ("source", "recipe", *sizes, "weights", "curve", "knee", "notes", "seconds")
        return {"version": 1, **json.record(self, *names)}

    def __rich__(self) -> Table:
        """Return the weights as a table."""
        left = ("weight", "used by", "shape", "treatment")
        table = named_table(*left, right=("bytes", "bits", "SNR dB"))
        for weight in self.weights:
            what = "keep" if weight.treatment is None else describe(weight.treatment)
            why = weight.reason or (weight.shares_with and f"as {weight.shares_with}")
            table.add_row(
                escaped(weight.name),
                escaped(", ".join(weight.op_types)),
                "x".join(map(str, weight.shape)),
                escaped(f"{what} ({why})" if why else what),
                human_bytes(weight.n_bytes),
                f"{weight.bits_per_weight:.2f}",
                weight.snr,
            )
        return table

    def curve_table(self) -> Table:
        """Return the curve of size against score as a table, with the knee and this plan marked."""
        table = named_table("size", right=("bits", "SNR dB"))
        table.add_column("")
        here = CurvePoint(
            package_bytes=self.package_bytes,
            bits_per_weight=self.bits_per_weight,
            snr_db=self.snr_db,
        )
        knee = self.curve[self.knee]
        marks = [(point, "") for point in _thinned(self.curve, _N_SHOWN) if point != knee]
        marks += [(knee, "knee"), (here, "this plan")]
        for point, mark in sorted(marks, key=lambda one: one[0].package_bytes):
            table.add_row(
                human_bytes(point.package_bytes),
                f"{point.bits_per_weight:.2f}",
                human_snr(point.snr_db),
                mark,
            )
        return table


def _thinned(points: Sequence[CurvePoint], n: int) -> list[CurvePoint]:
    """Return at most so many points, the first and the last among them, evenly by size."""
    if len(points) <= n:
        return list(points)
    low, high = points[0].package_bytes, points[-1].package_bytes
    places = {
        min(
            range(len(points)),
            key=lambda i: abs(points[i].package_bytes - (low + (high - low) * k / (n - 1))),
        )
        for k in range(n)
    }
    return [points[i] for i in sorted(places)]
