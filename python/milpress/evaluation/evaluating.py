"""How far a compressed model's outputs, and values inside it, are from the original's."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from milpress.errors import ConfigError
from milpress.evaluation.boxes import Boxes
from milpress.plain import json
from milpress.progress import Progress
from milpress.samples.data import Data, Samples
from milpress.show import decibels, escaped, human_snr, named_table

if TYPE_CHECKING:
    from rich.table import Table

    from milpress.interpreter import Program

Metric: TypeAlias = Literal["snr", "cosine", "top1", "kl", "max_error"]
METRICS: tuple[Metric, ...] = get_args(Metric)

# The least positive float16: what a probability that vanished may have been.
_LEAST_PROBABILITY = 2.0**-24
# Probabilities rounded to float16 add up to 1 up to half a last place; twice that.
_SUM_TOLERANCE = 2.0**-10
_HELD_BYTES = 1 << 30

_HEADINGS = {
    "snr": "SNR dB",
    "cosine": "cosine",
    "top1": "top-1",
    "kl": "KL",
    "max_error": "max error",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputEvaluation:
    """What was found of one output; a metric that was not asked for, or does not apply, is None.

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
    kl_of
        ``"probabilities"`` or ``"softmax"``, which of both.
    max_error
        Greatest magnitude of an error.
    """

    name: str
    snr_db: float | None = None
    cosine: float | None = None
    top1: float | None = None
    kl: float | None = None
    kl_of: str = ""
    max_error: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the findings as JSON can hold them."""
        metrics = json.record(self, "snr_db", "cosine", "top1", "kl", "max_error")
        found = {name: value for name, value in metrics.items() if value is not None}
        return {"name": self.name, **found} | ({} if self.kl is None else {"kl_of": self.kl_of})


@dataclass(frozen=True, slots=True, kw_only=True)
class OpEvaluation:
    """What was found of one value inside the model.

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
    snr_db: float
    own_snr_db: float

    def to_dict(self) -> dict[str, Any]:
        """Return the findings as JSON can hold them."""
        return json.record(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What `evaluate` found.

    Parameters
    ----------
    original, compressed
        The packages.
    n_samples
        How many samples both were run on.
    is_random
        Whether the samples were random, which says little of real ones.
    precision
        As the runs were asked for.
    outputs
        What was found of each output, in the order of the model's description.
    ops
        What was found of values inside, the greatest error of an op's own first; empty if not asked
        for.
    n_uncompared
        Values inside that only one of the models has, or has in another shape.
    notes
        What else there is to know: stages of pipelines that were passed by, boxes that were kept,
        pictures that were resized.
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
        """Return the findings as JSON can hold them."""
        return {"version": 1, **json.record(self)}

    def __rich__(self) -> Table:
        """Return the outputs as a table."""
        shown = [
            metric
            for metric in METRICS
            if any(_value(output, metric) is not None for output in self.outputs)
        ]
        table = named_table("output")
        for metric in shown:
            table.add_column(_HEADINGS[metric], justify="right")
        for output in self.outputs:
            table.add_row(escaped(output.name), *(_shown(output, metric) for metric in shown))
        return table

    def ops_table(self, *, most: int | None = None) -> Table:
        """Return the values inside as a table, of which ``most`` are shown at most."""
        table = named_table("value", "op")
        for heading in ("own SNR dB", "with errors before it"):
            table.add_column(heading, justify="right")
        for op in self.ops[:most]:
            table.add_row(
                escaped(op.name),
                escaped(op.op_type),
                human_snr(op.own_snr_db),
                human_snr(op.snr_db),
            )
        return table


def evaluate(
    original: str | os.PathLike[str],
    compressed: str | os.PathLike[str],
    data: Data,
    *,
    metrics: Collection[Metric] = METRICS,
    per_op: bool = False,
    function: str | None = None,
    precision: Literal["float32", "float16"] = "float32",
    seed: int = 0,
    progress: Progress | None = None,
) -> Evaluation:
    """Run a model and what was made of it on samples, and compare.

    Both are run by the interpreter, one sample after the other; the memory that takes does not grow
    with their number.

    Parameters
    ----------
    original, compressed
        Paths of the two packages.
    data
        The samples: an ``.npz`` file, an ``.npy`` file, a folder of them; a dictionary of arrays or
        several of them; or `RandomSamples`. See `Samples`. A stateful model begins
        every sample with states of zero.
    metrics
        Which of ``"snr"``, ``"cosine"``, ``"top1"``, ``"kl"`` and ``"max_error"`` are computed.
    per_op
        Whether every value inside that both models have is compared too: as it is, and when its op
        is given the original's values, which shows the error of that op alone. Takes a further run
        of the compressed model for each sample.
    function
        Which function of packages with several.
    precision
        Whether values that the program declares as float16 are rounded to it.
    seed
        Where random numbers start from in each run.
    progress
        Called with samples done, samples in all and what is at hand.

    Returns
    -------
    Evaluation
        What was found of each output, and of each value inside.

    Raises
    ------
    ConfigError
        If the packages don't take and give the same, or a metric is unknown.
    InputError
        If a sample is not what the model takes.
    UnsupportedOpError
        If the interpreter does not cover an op.
    DependencyError
        If torch is not installed.
    PackageError
        If one is no package of ML programs.
    """
    unknown = [metric for metric in metrics if metric not in METRICS]
    if unknown or not metrics:
        msg = f"a metric must be one of {', '.join(METRICS)}, got {', '.join(unknown) or 'none'}"
        raise ConfigError(msg)
    from milpress.interpreter import load

    one, other = (
        load(path, function, precision=precision, seed=seed) for path in (original, compressed)
    )
    _check_alike(one, other)
    samples = Samples(data, one.inputs)
    outputs = {feature.name: _Output() for feature in one.outputs}
    boxes = Boxes(one, other)
    inside = _Inside(one, other, boxes) if per_op else None
    note = progress or (lambda *_: None)
    for i, sample in enumerate(samples):
        note(i, len(samples), "comparing")
        made = (
            [boxes.original(sample).outputs, boxes.compressed(sample).outputs]
            if inside is None
            else inside.run(sample)
        )
        for name, output in outputs.items():
            output.add(made[0][name], made[1][name])
    note(len(samples), len(samples), "")
    return Evaluation(
        original=str(original),
        compressed=str(compressed),
        n_samples=len(samples),
        is_random=samples.is_random,
        precision=precision,
        outputs=tuple(output.found(name, metrics) for name, output in outputs.items()),
        ops=() if inside is None else inside.found(),
        n_uncompared=0 if inside is None else inside.n_uncompared,
        notes=(*one.notes, *samples.notes, *boxes.notes),
    )


def _check_alike(original: Program, compressed: Program) -> None:
    for what in ("inputs", "outputs"):
        names = [[feature.name for feature in getattr(p, what)] for p in (original, compressed)]
        if sorted(names[0]) != sorted(names[1]):
            msg = (
                f"both models must have the same {what}, got {', '.join(names[0])} and "
                f"{', '.join(names[1])}"
            )
            raise ConfigError(msg)


class _Output:
    """Adds up what the metrics of one output need."""

    def __init__(self) -> None:
        self._errors = _Errors()
        self._is_label = False
        self._n_samples = 0
        self._cosine = 0.0
        self._n_rows = 0
        self._row_size = 0
        self._n_agreeing = 0
        self._kl_probabilities = 0.0
        self._kl_softmax = 0.0
        self._are_probabilities = True

    def add(self, one: Any, other: Any) -> None:
        """Add one sample's."""
        self._n_samples += 1
        if isinstance(one, dict):
            one, other = (np.array([made[label] for label in one]) for made in (one, other))
        if not isinstance(one, np.ndarray):
            self._is_label = True
            self._n_rows += 1
            self._n_agreeing += one == other
            return
        if one.shape != other.shape:
            shapes = f"{list(one.shape)} and {list(other.shape)}"
            msg = f"an output must have the same shape in both models, got {shapes}"
            raise ConfigError(msg)
        one, other = np.atleast_1d(one).astype(float), np.atleast_1d(other).astype(float)
        self._errors.add(one, other)
        # Infinities make these metrics no number.
        with np.errstate(invalid="ignore"):
            self._cosine += _cosine(one.reshape(-1), other.reshape(-1))
            self._add_rows(one, other)

    def _add_rows(self, one: NDArray[np.float64], other: NDArray[np.float64]) -> None:
        self._row_size = one.shape[-1]
        if self._row_size < 2:
            return
        rows = [array.reshape(-1, self._row_size) for array in (one, other)]
        self._n_rows += len(rows[0])
        self._n_agreeing += int((rows[0].argmax(-1) == rows[1].argmax(-1)).sum())
        self._kl_softmax += _kl(*(_log_softmax(array) for array in rows))
        self._are_probabilities &= all(_are_probabilities(array) for array in rows)
        if self._are_probabilities:
            self._kl_probabilities += _kl(
                *(np.log(array.clip(_LEAST_PROBABILITY)) for array in rows)
            )

    def found(self, name: str, metrics: Collection[Metric]) -> OutputEvaluation:
        """Return the metrics."""
        top1 = self._n_agreeing / self._n_rows if self._n_rows and "top1" in metrics else None
        if self._is_label:
            return OutputEvaluation(name=name, top1=top1)
        total = self._kl_probabilities if self._are_probabilities else self._kl_softmax
        return OutputEvaluation(
            name=name,
            snr_db=self._errors.snr_db if "snr" in metrics else None,
            cosine=self._cosine / self._n_samples if "cosine" in metrics else None,
            top1=top1,
            kl=total / self._n_rows if self._n_rows and "kl" in metrics else None,
            kl_of="probabilities" if self._are_probabilities else "softmax",
            max_error=self._errors.greatest if "max_error" in metrics else None,
        )


class _Errors:
    """Adds up squares of values and errors; where both are infinite or no number, there is none."""

    def __init__(self) -> None:
        self.signal = 0.0
        self.noise = 0.0
        self.greatest = 0.0

    def add(self, one: NDArray[Any], other: NDArray[Any]) -> None:
        """Add some values of the original, and of the compressed model."""
        finite = np.isfinite(one)
        if not (finite.all() and np.isfinite(other).all()):
            alike = (one == other) | (np.isnan(one) & np.isnan(other))
            if not (alike | (finite & np.isfinite(other))).all():
                self.noise = self.greatest = math.inf
            kept = finite & np.isfinite(other)
            one, other = one[kept], other[kept]
        error = other - one
        self.signal += float(np.vdot(one, one))
        self.noise += float(np.vdot(error, error))
        self.greatest = max(self.greatest, float(np.abs(error).max(initial=0)))

    @property
    def snr_db(self) -> float:
        """Signal-to-noise ratio; minus infinity where only one is finite."""
        return -math.inf if self.noise == math.inf else decibels(self.signal, self.noise) or 0.0


class _Inside:
    """Compares what both models compute inside.

    The original's values of one sample are kept, beyond some size in a file, while the other runs
    twice: as it is, and with each value replaced by the original's once it is compared.
    """

    def __init__(self, original: Program, compressed: Program, boxes: Boxes) -> None:
        self._boxes = boxes
        self._kinds = original.op_types
        theirs = compressed.values
        kinds = original.values
        self._names = [
            name for name, kind in kinds.items() if kind is not None and theirs.get(name) == kind
        ]
        self._apart = set(kinds.keys() ^ theirs.keys())
        self._apart |= {name for name in kinds if name in theirs and kinds[name] != theirs[name]}
        self._compared = {
            name
            for name in self._kinds
            if (kind := kinds[name]) is not None and kind.dtype.is_float
        }
        self._carried: dict[str, _Errors] = {}
        self._own: dict[str, _Errors] = {}

    @property
    def n_uncompared(self) -> int:
        """How many values could not be compared."""
        return len(self._apart)

    def run(self, sample: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Run both models on a sample, and return their outputs."""
        with _Kept() as kept:
            first = self._boxes.original(sample, self._names, kept.add)
            kept.rewind()

            def compare(name: str, value: Any) -> None:
                self._add(self._carried, name, kept.next(name), value)

            second = self._boxes.compressed(sample, self._names, compare)
            kept.rewind()

            def replace(name: str, value: Any) -> Any:
                expected = kept.next(name)
                self._add(self._own, name, expected, value)
                same = expected is not None and expected.shape == value.shape
                return expected if same else value

            self._boxes.compressed(sample, self._names, replace=replace)
        return [first.outputs, second.outputs]

    def _add(self, errors: dict[str, _Errors], name: str, expected: Any, value: Any) -> None:
        if name not in self._compared:
            return
        if expected is None or expected.shape != value.shape:
            self._apart.add(name)
            return
        one, other = (tensor.numpy().astype(np.float64) for tensor in (expected, value))
        errors.setdefault(name, _Errors()).add(one, other)

    def found(self) -> tuple[OpEvaluation, ...]:
        """Return what was found, the greatest errors of ops' own first."""
        found = [
            OpEvaluation(
                name=name,
                op_type=self._kinds[name],
                snr_db=self._carried[name].snr_db,
                own_snr_db=self._own[name].snr_db,
            )
            for name in self._names
            if name in self._carried and name in self._own
        ]
        return tuple(sorted(found, key=lambda op: (op.own_snr_db, op.snr_db)))


class _Kept:
    """Values that a run computed, to be read again in order; beyond some size in a file."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=_HELD_BYTES)  # noqa: SIM115
        self._places: dict[str, list[tuple[int, Any, Any]]] = {}
        self._left: dict[str, Iterator[tuple[int, Any, Any]]] = {}

    def __enter__(self) -> _Kept:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, name: str, value: Any) -> None:
        """Keep a value."""
        array = np.ascontiguousarray(value.numpy())
        place = (self._file.tell(), array.dtype, tuple(value.shape))
        self._file.write(array.tobytes())
        self._places.setdefault(name, []).append(place)

    def rewind(self) -> None:
        """Begin to read again."""
        self._left = {name: iter(places) for name, places in self._places.items()}

    def next(self, name: str) -> Any:
        """Return a value as it was computed first, the next time as second; None at the end."""
        import torch

        place = next(self._left.get(name, iter(())), None)
        if place is None:
            return None
        offset, dtype, shape = place
        self._file.seek(offset)
        data = bytearray(self._file.read(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize))
        return torch.from_numpy(np.frombuffer(data, dtype).reshape(shape))


def _cosine(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    lengths = float(np.linalg.norm(one)), float(np.linalg.norm(other))
    if 0 in lengths:
        return float(lengths[0] == lengths[1])
    return float(np.dot(one / lengths[0], other / lengths[1]))


def _log_softmax(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = rows - rows.max(-1, keepdims=True)
    logs: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return logs


def _are_probabilities(rows: NDArray[np.float64]) -> bool:
    sums = np.abs(rows.sum(-1) - 1)
    return bool((rows >= 0).all() and (sums <= _SUM_TOLERANCE).all())


def _kl(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Return the sum of the divergences of rows of logarithms."""
    return float((np.exp(one) * (one - other)).sum())


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
