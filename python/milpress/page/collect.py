"""Results of several commands, put together by the package that they are about."""

from __future__ import annotations

import math
import os
import posixpath
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeAlias

from milpress.device import files
from milpress.device.schema import Entry, Result
from milpress.errors import ConfigError, ResultError, printable
from milpress.plain.structure import Metric, structured

VERSION = 1
LITERATURE_SCHEMA = "milpress-literature/1"

# Metrics of an evaluation, in words, and whether more is better.
METRICS: dict[str, tuple[str, bool]] = {
    "snr_db": ("Signal-to-noise ratio of the output, dB", True),
    "top1": ("Top-1 agreement with the original", True),
    "cosine": ("Cosine similarity of the output", True),
    "kl": ("Kullback-Leibler divergence, nats", False),
    "max_error": ("Greatest error of the output", False),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """A weight of a compression report."""

    name: str
    op_types: tuple[str, ...]
    shape: tuple[int, ...]
    status: str
    treatment: str
    note: str
    bytes_before: int
    bytes_after: int
    bits_per_weight: float
    snr_db: Metric | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Compression:
    """What `milpress compress --json` prints."""

    source: str
    destination: str
    package_bytes_before: int
    package_bytes_after: int
    bits_per_weight: float
    snr_db: Metric | None
    weights: tuple[Weight, ...]
    version: int = 0
    notes: tuple[str, ...] = ()
    verified: bool = False
    asked: int = 0
    compressed: int = 0
    left: int = 0
    ratio: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputMetrics:
    """What an evaluation found of one output."""

    name: str
    snr_db: Metric | None = None
    cosine: Metric | None = None
    top1: Metric | None = None
    kl: Metric | None = None
    max_error: Metric | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OpMetrics:
    """What an evaluation found of a value inside."""

    name: str
    op_type: str
    snr_db: Metric
    own_snr_db: Metric


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """What `milpress evaluate --json` prints."""

    original: str
    compressed: str
    n_samples: int
    is_random: bool
    precision: str
    outputs: tuple[OutputMetrics, ...]
    version: int = 0
    ops: tuple[OpMetrics, ...] = ()
    n_uncompared: int = 0

    @property
    def metrics(self) -> dict[str, float]:
        """Each metric of the output that does worst in it."""
        found = {}
        for name, (_, more_is_better) in METRICS.items():
            values = [getattr(output, name) for output in self.outputs]
            numbers = [value for value in values if value is not None and not math.isnan(value)]
            if numbers:
                found[name] = min(numbers) if more_is_better else max(numbers)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedTable:
    """A table that somebody else published."""

    title: str
    source: str
    device: str
    method: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Literature:
    """Tables that somebody else published: nothing in them was measured here."""

    schema: str
    publisher: str
    tables: tuple[PublishedTable, ...]


Content: TypeAlias = "Compression | Evaluated | Result | Literature"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A file that the page is of."""

    name: str
    sha256: str
    content: Content

    @property
    def what(self) -> str:
        """What it holds, in a word."""
        return {
            Compression: "compression report",
            Evaluated: "evaluation",
            Result: "benchmark",
            Literature: "published tables",
        }[type(self.content)]


@dataclass(slots=True, kw_only=True)
class Package:
    """A package, and all that is known of it."""

    path: str
    name: str
    is_original: bool = False
    treatment: str = ""
    n_bytes: int | None = None
    original_bytes: int | None = None
    compression: Compression | None = None
    evaluation: Evaluated | None = None
    is_comparable: bool = True
    runs: list[tuple[Result, Entry]] = field(default_factory=list)

    @property
    def ratio(self) -> float | None:
        """How many times smaller it became."""
        if self.n_bytes and self.original_bytes and not self.is_original:
            return self.original_bytes / self.n_bytes
        return None

    @property
    def metrics(self) -> dict[str, float]:
        """How close its outputs are to the original's."""
        if self.is_original:
            return {"snr_db": math.inf, "top1": 1.0, "cosine": 1.0, "kl": 0.0, "max_error": 0.0}
        if not self.is_comparable:
            return {}
        if self.evaluation is not None:
            return self.evaluation.metrics
        for _, entry in self.runs:
            if entry.accuracy is not None:
                found = {"snr_db": float(entry.accuracy.snr_db)}
                if entry.accuracy.top1 is not None:
                    found["top1"] = entry.accuracy.top1
                return found
        return {}

    @property
    def metrics_source(self) -> str:
        """Where the metrics come from, in words."""
        if self.is_original:
            return "the original itself"
        if self.evaluation is not None:
            samples = "random samples" if self.evaluation.is_random else "samples"
            return (
                f"interpreter, {self.evaluation.precision}, {self.evaluation.n_samples} {samples}"
            )
        for _, entry in self.runs:
            if entry.accuracy is not None:
                samples = "random samples" if entry.accuracy.is_random else "samples"
                return f"{entry.accuracy.engine}, {entry.accuracy.n_samples} {samples}"
        return ""

    @property
    def is_random(self) -> bool:
        """Whether the metrics are of random inputs."""
        if self.is_original or not self.is_comparable:
            return False
        if self.evaluation is not None:
            return self.evaluation.is_random
        return any(e.accuracy is not None and e.accuracy.is_random for _, e in self.runs)

    @property
    def family(self) -> str:
        """The kind of treatment, for colours."""
        words = self.treatment.lower()
        if self.is_original or not words or words == "as it is":
            return "original" if self.is_original or words else "other"
        found = [
            family
            for family, marks in {
                "pruned": ("prune", "sparse"),
                "palette": ("palett",),
                "integer": ("quantize", "int4", "int8", "uint"),
            }.items()
            if any(mark in words for mark in marks)
        ]
        if "activations" in words:
            return "activations"
        return "joint" if len(found) > 1 else found[0] if found else "other"


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """What a page shows."""

    title: str
    sources: tuple[Source, ...]
    packages: tuple[Package, ...]

    def contents(self, kind: type[Any]) -> list[Any]:
        """Return the contents of a kind."""
        return [each.content for each in self.sources if isinstance(each.content, kind)]

    @property
    def results(self) -> list[Result]:
        """The benchmarks."""
        return self.contents(Result)

    @property
    def summary(self) -> str:
        """One line: what it is of."""
        n_runs = sum(len(result.entries) for result in self.results)
        return (
            f"{len(self.sources)} results of {len(self.packages)} packages, "
            f"{n_runs} configurations run"
        )


def collect(paths: Iterable[str | os.PathLike[str]], *, title: str | None = None) -> Page:
    """Read results and put them together.

    Raises
    ------
    ResultError
        If a file is none of those that are known, or is damaged.
    ConfigError
        If there is none.
    PackageNotFoundError
        If nothing is at a path.
    """
    sources = tuple(_source(Path(path)) for path in paths)
    if not sources:
        msg = "no result to show: give at least one"
        raise ConfigError(msg)
    packages = _Packages()
    for source in sources:
        content = source.content
        if isinstance(content, Compression):
            packages.add_compression(content)
        elif isinstance(content, Evaluated):
            packages.add_evaluation(content)
        elif isinstance(content, Result):
            packages.add_result(content)
    found = packages.all()
    _leave_out_other_accuracies(found)
    if title is None:
        names = [package.name for package in found if package.is_original]
        title = names[0] if names else (found[0].name if found else "Published tables")
    return Page(title=printable(title), sources=sources, packages=tuple(found))


def _leave_out_other_accuracies(packages: list[Package]) -> None:
    """Keep accuracies of one set of samples: that of most evaluations, or else of most runs."""
    made = [each for each in packages if not each.is_original and each.metrics]
    sources = [each.metrics_source for each in made]
    if len(set(sources)) < 2:
        return
    evaluated = [each.metrics_source for each in made if each.evaluation is not None]
    kept = max(evaluated or sources, key=(evaluated or sources).count)
    for each in made:
        each.is_comparable = each.metrics_source == kept


def _source(path: Path) -> Source:
    data, digest = files.read_json(path)
    return Source(name=path.name, sha256=digest, content=_content(data, str(path)))


def _content(data: Any, place: str) -> Content:
    keys = set(data) if isinstance(data, dict) else set()
    if keys and data.get("schema") == LITERATURE_SCHEMA:
        literature: Literature = structured(data, Literature, place)
        for table in literature.tables:
            if any(len(row) != len(table.columns) for row in table.rows):
                n = len(table.columns)
                msg = f"{place}: not every row of {table.title!r} has {n} cells"
                raise ResultError(msg)
        return literature
    if str(data.get("schema") if keys else "").startswith("milpress-bench/"):
        return files.parse(data, place)
    if {"original", "compressed", "outputs"} <= keys:
        _check_version(data, place)
        evaluated: Evaluated = structured(data, Evaluated, place, strict=False)
        _check_counts(evaluated, place)
        return evaluated
    if {"source", "destination", "weights"} <= keys:
        _check_version(data, place)
        compression: Compression = structured(data, Compression, place, strict=False)
        _check_counts(compression, place)
        for i, weight in enumerate(compression.weights):
            _check_counts(weight, f"{place}: weights[{i}]")
        return compression
    msg = (
        f"{place}: a report must be of what `milpress compress --json`, `evaluate --json` or "
        f"`bench` wrote, got {'another object' if keys else type(data).__name__}"
    )
    raise ResultError(msg)


def _check_version(data: dict[str, Any], place: str) -> None:
    version = data.get("version")
    if type(version) is not int or version != VERSION:
        msg = (
            f"{place}: version must be {VERSION}, got {version!r}; make the report again with this "
            "milpress"
        )
        raise ResultError(msg)


def _check_counts(content: Any, place: str) -> None:
    """Refuse negative counts, sizes and bits, which nothing has."""
    for item in fields(content):
        value = getattr(content, item.name)
        is_number = type(value) is int or (type(value) is float and item.name != "snr_db")
        if is_number and value < 0:
            msg = f"{place}: {item.name} must be at least 0, got {value}"
            raise ResultError(msg)


class _Packages:
    """Packages by path; by file name where paths differ and the name is one package's alone."""

    def __init__(self) -> None:
        self._found: list[Package] = []

    def all(self) -> list[Package]:
        originals = [package for package in self._found if package.is_original]
        return [*originals, *(package for package in self._found if not package.is_original)]

    def add_compression(self, content: Compression) -> None:
        original = self._at(content.source)
        original.n_bytes = original.n_bytes or content.package_bytes_before
        original.is_original = True
        package = self._at(content.destination)
        package.is_original = False
        package.compression = content
        package.n_bytes = content.package_bytes_after
        package.original_bytes = content.package_bytes_before
        package.treatment = package.treatment or _treatment(content)

    def add_evaluation(self, content: Evaluated) -> None:
        original = self._at(content.original)
        original.is_original = original.compression is None
        self._at(content.compressed).evaluation = content

    def add_result(self, content: Result) -> None:
        for i, entry in enumerate(content.entries):
            if entry.failure is not None and entry.failure.phase == "compress":
                continue
            package = self._at(entry.model.path)
            package.name = package.name if package.compression else entry.model.name
            package.n_bytes = entry.model.package_bytes
            package.treatment = package.treatment or entry.model.treatment
            package.runs.append((content, entry))
            baseline = content.entries[0].model
            if i == 0:
                package.is_original = package.compression is None
            else:
                package.original_bytes = package.original_bytes or baseline.package_bytes

    def _at(self, path: str) -> Package:
        path = posixpath.normpath(path.replace("\\", "/"))
        base = posixpath.basename(path)
        for package in self._found:
            if package.path == path:
                return package
        alike = [each for each in self._found if posixpath.basename(each.path) == base]
        if len(alike) == 1:
            return alike[0]
        name = base.removesuffix(".mlpackage") or path
        self._found.append(Package(path=path, name=name))
        return self._found[-1]


def _treatment(content: Compression) -> str:
    """Return the treatment of most bytes of weights, in words."""
    sizes: dict[str, int] = {}
    for weight in content.weights:
        if weight.status == "compressed":
            sizes[weight.treatment] = sizes.get(weight.treatment, 0) + weight.bytes_before
    return max(sizes, key=lambda name: sizes[name], default="")
