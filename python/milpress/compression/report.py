"""What happened to each weight: as a value, as a table, as JSON."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from milpress.calibration.activation_report import ActivationReport
from milpress.plain import json
from milpress.plain.structure import Metric
from milpress.show import decibels, escaped, human_bytes, human_snr, named_table

if TYPE_CHECKING:
    from rich.table import Table

Status = Literal["compressed", "left", "not asked"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightReport:
    """What happened to one weight.

    Parameters
    ----------
    name
        Name of the weight in the source.
    op_types
        Kinds of the ops that use it.
    shape
        Its shape.
    status
        Compressed; left although it was selected; or not selected ("not asked").
    treatment
        What was done, in words; empty where nothing was.
    note
        Why it was left, or how the treatment differs from the one in the recipe.
    bytes_before, bytes_after
        Size of what is stored for it.
    snr_db
        Signal-to-noise ratio of the decoded weight, infinite where it is equal; ``None`` where
        nothing was decoded.
    """

    name: str
    op_types: tuple[str, ...]
    shape: tuple[int, ...]
    status: Status
    treatment: str
    note: str
    bytes_before: int
    bytes_after: int
    snr_db: Metric | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bits_per_weight(self) -> float:
        """Effective bits: all that is stored, over the number of elements."""
        return 8 * self.bytes_after / self.size

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON can hold it; an infinite ratio becomes ``"inf"``."""
        names = [item.name for item in fields(self)]
        names.insert(names.index("snr_db"), "bits_per_weight")
        return json.record(self, *names)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What happened to a package.

    Parameters
    ----------
    source, destination
        Paths of the packages.
    weights
        What happened to each weight, in the order of the graph.
    package_bytes_before, package_bytes_after
        Size of all files.
    notes
        What concerns the whole package, such as a raised opset.
    verified
        Whether the result was read back and compared with the source.
    seconds
        Wall time.
    signal, noise
        Sums of squares over all compressed weights, of the source and of the error.
    activations
        What became of activations, if they were to be quantized.
    """

    source: str
    destination: str
    weights: tuple[WeightReport, ...]
    package_bytes_before: int
    package_bytes_after: int
    notes: tuple[str, ...] = ()
    verified: bool = False
    seconds: float = 0.0
    signal: float | None = None
    noise: float | None = None
    activations: ActivationReport | None = None

    def with_status(self, status: Status) -> tuple[WeightReport, ...]:
        """Return the weights of that status."""
        return tuple(weight for weight in self.weights if weight.status == status)

    @property
    def asked(self) -> tuple[WeightReport, ...]:
        """The weights that were selected."""
        return tuple(weight for weight in self.weights if weight.status != "not asked")

    @property
    def ratio(self) -> float:
        """How many times smaller the package became."""
        return self.package_bytes_before / self.package_bytes_after

    @property
    def bits_per_weight(self) -> float:
        """Effective bits over the selected weights, those left as they were included."""
        size = sum(weight.size for weight in self.asked)
        return 8 * sum(weight.bytes_after for weight in self.asked) / size if size else 0.0

    @property
    def snr_db(self) -> float | None:
        """Signal-to-noise ratio of all compressed weights together."""
        return decibels(self.signal, self.noise)

    @property
    def summary(self) -> str:
        """One line: how many of the selected weights were compressed; sizes."""
        verb = "Compressed"
        if self.asked and all(weight.treatment == "decompress" for weight in self.asked):
            verb = "Decompressed"
        return (
            f"{verb} {len(self.with_status('compressed'))} of {len(self.asked)} selected weights: "
            f"{human_bytes(self.package_bytes_before)} -> "
            f"{human_bytes(self.package_bytes_after)} ({self.ratio:.2f}x, "
            f"{self.bits_per_weight:.2f} bits per weight)"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON can hold it."""
        counts = {
            "asked": len(self.asked),
            "compressed": len(self.with_status("compressed")),
            "left": len(self.with_status("left")),
        }
        sizes = ("package_bytes_before", "package_bytes_after", "ratio", "bits_per_weight")
        others = ("snr_db", "verified", "seconds", "notes", "weights")
        activations = () if self.activations is None else ("activations",)
        return {
            "version": 1,
            **json.record(self, "source", "destination"),
            **counts,
            **json.record(self, *sizes, *others, *activations),
        }

    def __rich__(self) -> Table:
        """Return the selected weights as a table."""
        table = named_table(
            "weight", "used by", "shape", "treatment", right=("before", "after", "bits", "SNR dB")
        )
        for weight in self.asked:
            what = weight.treatment or "left"
            table.add_row(
                escaped(weight.name),
                escaped(", ".join(weight.op_types)),
                "x".join(map(str, weight.shape)),
                escaped(f"{what} ({weight.note})" if weight.note else what),
                human_bytes(weight.bytes_before),
                human_bytes(weight.bytes_after),
                f"{weight.bits_per_weight:.2f}",
                "" if weight.snr_db is None else human_snr(weight.snr_db),
            )
        return table
