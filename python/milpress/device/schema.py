"""Results of benchmarks: values, and their JSON."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from milpress.device import stats
from milpress.plain import json
from milpress.plain.structure import Decibels

SCHEMA = "milpress-bench/1"

Kind: TypeAlias = Literal["measured", "cpu_reference", "estimate", "replay", "fake"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Status: TypeAlias = Literal["ok", "failed"]
Verdict: TypeAlias = Literal["consistent_with_jit", "consistent_with_aot", "unknown"]

APPLE_UNITS = ("CPU_ONLY", "CPU_AND_GPU", "CPU_AND_NE", "ALL")
INTERPRETER_UNITS = "INTERPRETER"
FAKE_UNITS_PREFIX = "FAKE:"
PROCESSORS = ("neural_engine", "gpu", "cpu", "none")


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """Latencies in milliseconds: every sample in the order taken, and what follows from them.

    ``rounds`` are the indices of the rounds that were kept, ``round_sizes`` how many samples each
    has. ``ci95`` is a 95 % interval of the median.
    """

    samples: tuple[float, ...]
    rounds: tuple[int, ...]
    round_sizes: tuple[int, ...]
    median: float
    p90: float
    p99: float
    minimum: float
    maximum: float
    ci95: tuple[float, float]

    @classmethod
    def of(cls, samples: Mapping[int, Sequence[float]]) -> Distribution:
        """Return what samples by the index of their round amount to."""
        flat = [sample for each in samples.values() for sample in each]
        interval = stats.median_interval(list(samples.values()))
        return cls(
            samples=tuple(flat),
            rounds=tuple(samples),
            round_sizes=tuple(len(each) for each in samples.values()),
            ci95=(interval.low, interval.high),
            **stats.order_statistics(flat),
        )

    @property
    def by_round(self) -> dict[int, tuple[float, ...]]:
        """The samples by the index of their round."""
        samples = iter(self.samples)
        sizes = zip(self.rounds, self.round_sizes, strict=True)
        return {index: tuple(itertools.islice(samples, size)) for index, size in sizes}


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What a replay replays: the kind, hash and name of the file."""

    kind: Kind
    sha256: str
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Where the numbers of a run come from, and what ran the models.

    They are ``"measured"`` on an Apple device by Core ML, a ``"cpu_reference"`` on any machine by
    other means, an ``"estimate"``, a ``"replay"`` of a file, its origin, or ``"fake"``, in tests.
    """

    kind: Kind
    driver: str
    origin: Origin | None = None

    @property
    def effective(self) -> Kind:
        """The kind, of a replay that of what it replays."""
        return self.origin.kind if self.kind == "replay" and self.origin else self.kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """The Apple device that models ran on; ``None`` where Core ML or the system does not say.

    ``model`` and ``chip`` are such as ``"Mac14,2"`` and ``"Apple M2"``, ``os`` and ``os_build``
    such as ``"macOS 15.1"`` and ``"24B83"``. ``compute_devices`` are what Core ML says it may use:
    of ``"cpu"``, ``"gpu"`` and ``"neural_engine"``. The last three fields spoil figures.
    """

    model: str
    chip: str
    os: str
    os_build: str
    neural_engine_cores: int | None = None
    compute_devices: tuple[str, ...] = ()
    is_virtual: bool | None = None
    low_power: bool | None = None
    on_battery: bool | None = None

    @property
    def has_neural_engine(self) -> bool:
        """Whether Core ML may use a Neural Engine there."""
        return "neural_engine" in self.compute_devices


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """The machine that the harness itself ran on."""

    system: str
    machine: str
    n_cores: int
    python: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """Versions of what took part; ``None`` of what did not."""

    milpress: str
    coremltools: str | None = None
    torch: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A package, as its bytes say.

    ``sha256`` is that of its files. Weights take ``weight_bytes`` as stored and
    ``dense_weight_bytes`` if all were dense; ``stored_as`` says how many are stored in each way,
    ``treatment`` what was done to them, in words: empty if that is not known.
    """

    name: str
    path: str
    sha256: str
    package_bytes: int
    weight_bytes: int
    dense_weight_bytes: int
    specification_version: int
    stored_as: dict[str, int]
    treatment: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a configuration was run: in Core ML's units, ``"INTERPRETER"`` or ``"FAKE:..."``.

    ``warmup`` predictions were discarded first, ``samples_per_round`` taken in a turn.
    ``input_seed`` is where random inputs started from, ``None`` if they were given, ``function``
    which one of a package with several.
    """

    compute_units: str
    warmup: int
    samples_per_round: int
    input_seed: int | None
    input_sha256: str
    interleaved_with: tuple[str, ...] = ()
    function: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Times in milliseconds; ``None`` where there is none.

    ``package_compile`` is from ``.mlpackage`` to ``.mlmodelc``, ``load_first`` at a new path,
    ``load_cached`` by new processes later. ``predict_first`` is none of the other predictions;
    of those, ``core`` is Core ML's own time, without conversion from and to Python, ``e2e`` that of
    the whole call.
    """

    kind: Kind
    package_compile: float | None = None
    load_first: float | None = None
    load_cached: tuple[float, ...] = ()
    predict_first: float | None = None
    core: Distribution | None = None
    e2e: Distribution | None = None

    @property
    def best(self) -> Distribution | None:
        """Core ML's own time if there is one, else the whole call's."""
        return self.core or self.e2e


@dataclass(frozen=True, slots=True, kw_only=True)
class Throughput:
    """Predictions handed over at once: how many, and how many were done in a second."""

    kind: Kind
    batch: int
    per_second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class OpPlacement:
    """Where an op is planned to run, where it might, and its share of the cost by Core ML."""

    name: str
    op_type: str
    preferred: str
    supported: tuple[str, ...] = ()
    cost: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Core ML's plan, which is what it anticipates, not what was observed."""

    kind: Kind
    source: str
    ops: tuple[OpPlacement, ...]

    @property
    def counts(self) -> dict[str, int]:
        """How many ops are planned for each processor, constants apart as ``"none"``."""
        return {name: sum(op.preferred == name for op in self.ops) for name in PROCESSORS}

    @property
    def costs(self) -> dict[str, float]:
        """Share of the cost of each processor."""
        return {
            name: sum(op.cost or 0.0 for op in self.ops if op.preferred == name)
            for name in PROCESSORS
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What the process that held the model took, in bytes."""

    kind: Kind
    method: str
    baseline: int
    after_load: int
    peak: int | None = None

    @property
    def model(self) -> int:
        """What loading added."""
        return max(0, self.after_load - self.baseline)


@dataclass(frozen=True, slots=True, kw_only=True)
class Thermal:
    """State of the device around the rounds, and how many were thrown away for it."""

    kind: Kind
    before: str
    after: str
    rejected_rounds: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Energy:
    """Mean power while predicting, in milliwatts, as the system estimates it."""

    kind: Kind
    method: str
    cpu_mw: float | None = None
    gpu_mw: float | None = None
    neural_engine_mw: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """How far the outputs of a unit are from the interpreter's of the same package."""

    kind: Kind
    reference: str
    snr_db: Decibels
    max_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """How far the outputs of a model are from the first model's, both run by the interpreter."""

    kind: Kind
    engine: str
    baseline: str
    n_samples: int
    is_random: bool
    snr_db: Decibels
    top1: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decompression:
    """What the figures suggest of when weights are decoded. It is never more than consistent."""

    kind: Kind
    verdict: Verdict
    evidence: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A latency that nobody measured, in fields that no measured one has."""

    kind: Kind
    estimate_ms: float
    method: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a configuration has no figures: in which phase, of what kind, and what was said."""

    phase: str
    reason: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A configuration: a model, how it was run, and what was found."""

    id: str
    status: Status
    model: Model
    settings: Settings
    failure: Failure | None = None
    timing: Timing | None = None
    throughput: Throughput | None = None
    placement: Placement | None = None
    memory: Memory | None = None
    thermal: Thermal | None = None
    energy: Energy | None = None
    parity: Parity | None = None
    accuracy: Accuracy | None = None
    decompression: Decompression | None = None
    estimate: Estimate | None = None
    warnings: tuple[str, ...] = ()

    @property
    def latency(self) -> Distribution | None:
        """Core ML's own latency, or that of the whole call."""
        return None if self.timing is None else self.timing.best


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A run of the benchmark."""

    run_id: str
    created: str
    tool: Tool
    provenance: Provenance
    host: Host
    entries: tuple[Entry, ...]
    device: Device | None = None
    warnings: tuple[str, ...] = ()
    schema: str = SCHEMA

    def to_dict(self) -> dict[str, Any]:
        """Return the run as JSON can hold it."""
        return json.record(self)
