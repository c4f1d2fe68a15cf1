"""Results of an evaluation: figures of outputs and of intermediate values, as tables and JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from milpress.plain import json
from milpress.plain.structure import Metric as Number
from milpress.show import escaped, human_snr, named_table

if TYPE_CHECKING:
    from rich.table import Table

Metric: TypeAlias = Literal["snr", "cosine", "top1", "kl", "max_error"]
METRICS: tuple[Metric, ...] = get_args(Metric)

_HEADINGS = {
    "snr": "SNR dB",
    "cosine": "cosine",
    "top1": "top-1",
    "kl": "KL",
    "max_error": "max error",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputEvaluation:
    """Metrics of one output; one that was not chosen, or does not apply, is ``None``.

    Parameters
    ----------
    name
        The output.
    snr_db
        Signal-to-noise ratio of all samples together.
    cosine
        Cosine similarity of a sample's whole output, on average.
    top1
        Share of rows (along the last axis) whose greatest element is at the same place; of a label,
        share of samples with the same one.
    kl
        Kullback-Leibler divergence of the compressed model's rows from the original's, in nats, on
        average. Outputs that are no probabilities are taken through softmax first.
    max_error
        Greatest magnitude of an error.
    kl_of
        ``"probabilities"`` or ``"softmax"``: what the divergence is of.
    """

    name: str
    snr_db: Number | None = None
    cosine: Number | None = None
    top1: Number | None = None
    kl: Number | None = None
    max_error: Number | None = None
    kl_of: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the metrics as JSON can hold them."""
        metrics = {key: value for key, value in json.record(self).items() if value is not None}
        if self.kl is None:
            del metrics["kl_of"]
        return metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class OpEvaluation:
    """Error of one intermediate value.

    Parameters
    ----------
    name
        The value.
    op_type
        Type of the op that computes it.
    snr_db
        Signal-to-noise ratio, with all errors that come from ops before it.
    own_snr_db
        Signal-to-noise ratio when the op is given what it is given in the original: its own error.
    """

    name: str
    op_type: str
    snr_db: Number
    own_snr_db: Number

    def to_dict(self) -> dict[str, Any]:
        """Return the errors as JSON can hold them."""
        return json.record(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Results of `evaluate`.

    Parameters
    ----------
    original, compressed
        The packages.
    n_samples
        How many samples both were run on.
    is_random
        Whether the samples were random, which says little of real ones.
    precision
        Of the runs: ``"float32"`` or ``"float16"``.
    outputs
        Metrics of each output, in the order of the model's description.
    ops
        Errors of intermediate values, the greatest error of an op's own first; empty unless
        ``per_op`` was set.
    n_uncompared
        Intermediate values that only one of the models has, or has in another shape.
    notes
        Remarks: stages of pipelines that were passed by, boxes that were kept, pictures that were
        resized.
    """

    original: str
    compressed: str
    n_samples: int
    is_random: bool
    precision: str
    outputs: tuple[OutputEvaluation, ...]
    ops: tuple[OpEvaluation, ...] = ()
    n_uncompared: int = 0
    notes: tuple[str, ...] = ()

    @property
    def snr_db(self) -> float | None:
        """The least signal-to-noise ratio of an output."""
        ratios = [output.snr_db for output in self.outputs if output.snr_db is not None]
        return min(ratios, default=None)

    @property
    def summary(self) -> str:
        """One line, and a warning if the inputs were random."""
        words = [f"{self.n_samples} sample{'s' * (self.n_samples != 1)} ({self.precision})"]
        if self.snr_db is not None:
            words.append(f"SNR {human_snr(self.snr_db)} dB")
        agreeing = [output.top1 for output in self.outputs if output.top1 is not None]
        if agreeing:
            words.append(f"top-1 agreement {min(agreeing):.1%}")
        if self.is_random:
            words.append("random inputs, which say little of real ones")
        return "; ".join(words)

    def to_dict(self) -> dict[str, Any]:
        """Return the results as JSON can hold them."""
        return {"version": 1, **json.record(self)}

    def __rich__(self) -> Table:
        """Return the outputs as a table."""
        shown = [
            metric
            for metric in METRICS
            if any(_value(output, metric) is not None for output in self.outputs)
        ]
        table = named_table("output", right=[_HEADINGS[metric] for metric in shown])
        for output in self.outputs:
            table.add_row(escaped(output.name), *(_shown(output, metric) for metric in shown))
        return table

    def ops_table(self, *, most: int | None = None) -> Table:
        """Return the intermediate values as a table, of which ``most`` are shown at most."""
        table = named_table("value", "op", right=("own SNR dB", "with errors before it"))
        for op in self.ops[:most]:
            table.add_row(
                escaped(op.name),
                escaped(op.op_type),
                human_snr(op.own_snr_db),
                human_snr(op.snr_db),
            )
        return table


def _value(output: OutputEvaluation, metric: Metric) -> float | None:
    value: float | None = getattr(output, "snr_db" if metric == "snr" else metric)
    return value


def _shown(output: OutputEvaluation, metric: Metric) -> str:
    value = _value(output, metric)
    if value is None:
        return ""
    if metric == "snr":
        return human_snr(value)
    if metric == "kl" and output.kl_of == "softmax":
        return f"{value:.4g} (softmax)"
    return {"cosine": f"{value:.6f}", "top1": f"{value:.1%}"}.get(metric, f"{value:.4g}")
