"""Results of several commands, put together by the package that they are about."""

from __future__ import annotations

import math
import os
import posixpath
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from milpress.compression.report import Report
from milpress.device.schema import Entry, Result
from milpress.errors import ConfigError, printable
from milpress.evaluation.results import Evaluation
from milpress.page.metrics import METRICS
from milpress.page.sources import Source, read

# Words of a treatment by which its colour is chosen.
_FAMILIES = {
    "pruned": ("prune", "sparse"),
    "palette": ("palett",),
    "integer": ("quantize", "int4", "int8", "uint"),
}


@dataclass(slots=True, kw_only=True)
class PackageResults:
    """A package, and all that is known of it."""

    path: str
    name: str
    is_original: bool = False
    treatment: str = ""
    n_bytes: int | None = None
    original_bytes: int | None = None
    compression: Report | None = None
    evaluation: Evaluation | None = None
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
            return _worst(self.evaluation)
        for _, entry in self.runs:
            if entry.accuracy is not None:
                top1 = entry.accuracy.top1
                return {"snr_db": float(entry.accuracy.snr_db)} | (
                    {} if top1 is None else {"top1": top1}
                )
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
        families = [
            family for family, marks in _FAMILIES.items() if any(mark in words for mark in marks)
        ]
        if "activations" in words:
            return "activations"
        return "joint" if len(families) > 1 else families[0] if families else "other"


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """What a page shows."""

    title: str
    sources: tuple[Source, ...]
    packages: tuple[PackageResults, ...]

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
    sources = tuple(read(Path(path)) for path in paths)
    if not sources:
        msg = "no result to show: give at least one"
        raise ConfigError(msg)
    by_path = _Packages()
    for source in sources:
        content = source.content
        if isinstance(content, Report):
            by_path.add_compression(content)
        elif isinstance(content, Evaluation):
            by_path.add_evaluation(content)
        elif isinstance(content, Result):
            by_path.add_result(content)
    packages = by_path.originals_first()
    _leave_out_other_accuracies(packages)
    if title is None:
        title = packages[0].name if packages else "Published tables"
    return Page(title=printable(title), sources=sources, packages=tuple(packages))


def _worst(evaluation: Evaluation) -> dict[str, float]:
    """Return each metric of the output that does worst in it."""
    worst = {}
    for metric in METRICS:
        values = [getattr(output, metric.name) for output in evaluation.outputs]
        numbers = [value for value in values if value is not None and not math.isnan(value)]
        if numbers:
            worst[metric.name] = min(numbers) if metric.more_is_better else max(numbers)
    return worst


def _leave_out_other_accuracies(packages: list[PackageResults]) -> None:
    """Keep accuracies of one set of samples: that of most evaluations, or else of most runs."""
    compared = [each for each in packages if not each.is_original and each.metrics]
    sources = [each.metrics_source for each in compared]
    if len(set(sources)) < 2:
        return
    evaluated = [each.metrics_source for each in compared if each.evaluation is not None]
    most = max(evaluated or sources, key=(evaluated or sources).count)
    for each in compared:
        each.is_comparable = each.metrics_source == most


class _Packages:
    """Packages by path; by file name where paths differ and the name is one package's alone."""

    def __init__(self) -> None:
        self._packages: list[PackageResults] = []

    def originals_first(self) -> list[PackageResults]:
        return sorted(self._packages, key=lambda package: not package.is_original)

    def add_compression(self, content: Report) -> None:
        original = self._at(content.source)
        original.n_bytes = original.n_bytes or content.package_bytes_before
        original.is_original = True
        package = self._at(content.destination)
        package.is_original = False
        package.compression = content
        package.n_bytes = content.package_bytes_after
        package.original_bytes = content.package_bytes_before
        package.treatment = package.treatment or _treatment(content)

    def add_evaluation(self, content: Evaluation) -> None:
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

    def _at(self, path: str) -> PackageResults:
        path = posixpath.normpath(path.replace("\\", "/"))
        base = posixpath.basename(path)
        for package in self._packages:
            if package.path == path:
                return package
        alike = [each for each in self._packages if posixpath.basename(each.path) == base]
        if len(alike) == 1:
            return alike[0]
        name = base.removesuffix(".mlpackage") or path
        self._packages.append(PackageResults(path=path, name=name))
        return self._packages[-1]


def _treatment(content: Report) -> str:
    """Return the treatment of most bytes of weights, in words."""
    sizes: dict[str, int] = {}
    for weight in content.weights:
        if weight.status == "compressed":
            sizes[weight.treatment] = sizes.get(weight.treatment, 0) + weight.bytes_before
    return max(sizes, key=lambda name: sizes[name], default="")
