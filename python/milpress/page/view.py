"""What templates show of a page: values in their order, and a few words about them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from milpress._version import __version__
from milpress.compression.report import Report
from milpress.device.comparison import units_words
from milpress.device.schema import PROCESSORS, Entry, Kind, Placement
from milpress.errors import printable
from milpress.page import captions
from milpress.page.collect import PackageResults, Page
from milpress.page.groups import LatencyGroup, groups
from milpress.page.metrics import METRICS, Metric
from milpress.page.sources import Literature
from milpress.plain import json
from milpress.show import human_bytes

# Rows beyond these are left out of tables of ops, and said to be.
_MOST_OPS = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """A figure to begin with; a ``unit`` is smaller than the value."""

    label: str
    value: str
    unit: str | None = None
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementRow:
    """Where the ops of a package are planned to run."""

    entry: Entry
    kind: Kind
    placement: Placement

    @property
    def processors(self) -> list[str]:
        """Those that run an op."""
        counts = self.placement.counts
        return [name for name in PROCESSORS if counts[name] and name != "none"]

    @property
    def n_ops(self) -> int:
        """How many ops are run."""
        return sum(self.placement.counts[name] for name in self.processors)

    @property
    def shares(self) -> str:
        """How much each processor runs, in words."""
        counts, costs = self.placement.counts, self.placement.costs
        return ", ".join(
            f"{captions.PROCESSOR_NAMES[name]} {counts[name]} ops ({costs[name]:.0%} of the cost)"
            for name in self.processors
        )


def view(page: Page) -> dict[str, Any]:
    """Return what templates are filled with, by name."""
    entries = [(result, entry) for result in page.results for entry in result.entries]
    known = {name for each in page.packages if not each.is_original for name in each.metrics}
    metrics = [metric for metric in METRICS if metric.name in known]
    compressed = [package for package in page.packages if package.compression is not None]
    latencies, placements = groups(page), _placements(page)
    # What people come for is the Neural Engine.
    neural = [units for units in placements if units.startswith("CPU_AND_NE")]
    return {
        "page": page,
        "version": __version__,
        "kinds": captions.KIND_NAMES,
        "processors": captions.PROCESSOR_NAMES,
        "n_compressed": sum(not package.is_original for package in page.packages),
        "created": max((result.created for result in page.results), default=""),
        "banners": list(captions.banners(page)),
        "tiles": list(_tiles(page, metrics, latencies))[:4],
        "metrics": metrics,
        "groups": latencies,
        "estimates": [entry for _, entry in entries if entry.estimate],
        "compressed": compressed,
        "most_ops": _MOST_OPS,
        "placements": placements,
        "opened": [*neural, *(placements if len(placements) == 1 else []), ""][0],
        "failures": [entry for _, entry in entries if entry.failure],
        "notes": captions.notes(page),
        "decompressions": [entry for _, entry in entries if entry.decompression],
        "literature": page.contents(Literature),
        "data": _printable(_data(page, metrics, latencies, compressed)),
    }


def _tiles(page: Page, metrics: list[Metric], latencies: list[LatencyGroup]) -> Iterator[Tile]:
    smaller = [package for package in page.packages if package.ratio]
    if smaller:
        smallest = min(smaller, key=lambda package: package.n_bytes or 0)
        size, _, unit = human_bytes(smallest.n_bytes or 0).partition(" ")
        before = human_bytes(smallest.original_bytes or 0)
        yield Tile(
            label="Smallest package",
            value=size,
            unit=unit,
            detail=f"{smallest.name}: {smallest.ratio:.1f}x smaller than {before}",
        )
    for metric in metrics[:1]:
        sign = 1 if metric.more_is_better else -1
        compared = [package for package in smaller if metric.name in package.metrics]
        if compared:
            closest = max(compared, key=lambda package: sign * package.metrics[metric.name])
            value = metric.words(closest.metrics[metric.name])
            size = human_bytes(closest.n_bytes or 0)
            yield Tile(
                label="Closest to the original",
                value=value,
                unit="dB" if metric.name == "snr_db" and value != "exact" else "",
                detail=f"{closest.name}, {size}, {closest.ratio:.1f}x smaller",
            )
    measured = [
        (run, group) for group in latencies if group.kind == "measured" for run in group.runs
    ]
    if measured:
        run, group = min(measured, key=lambda each: each[0].latency.median)
        yield Tile(
            label="Fastest prediction",
            value=f"{run.latency.median:.3g}",
            unit="ms",
            detail=f"{run.package.name}, {group.title}, measured on {group.where}",
        )
    reports = page.contents(Report)
    n_weights = sum(each.status == "compressed" for report in reports for each in report.weights)
    if n_weights:
        n_verified = sum(report.verified for report in reports)
        yield Tile(
            label="Weights compressed",
            value=f"{n_weights:,}",
            detail=f"in {len(reports)} packages, {n_verified} of them read back and verified",
        )
    runs = [entry for result in page.results for entry in result.entries if not entry.estimate]
    if runs:
        n_failed = sum(entry.status == "failed" for entry in runs)
        yield Tile(
            label="Configurations run",
            value=f"{len(runs) - n_failed}",
            unit=f"of {len(runs)}",
            detail=f"{n_failed} failed" if n_failed else "none failed",
        )


def _placements(page: Page) -> dict[str, list[PlacementRow]]:
    by_units: dict[str, list[PlacementRow]] = {}
    for result in page.results:
        for entry in result.entries:
            if entry.placement is not None:
                row = PlacementRow(
                    entry=entry, kind=result.provenance.kind, placement=entry.placement
                )
                by_units.setdefault(units_words(result, entry), []).append(row)
    return by_units


def _data(
    page: Page,
    metrics: list[Metric],
    latencies: list[LatencyGroup],
    compressed: list[PackageResults],
) -> dict[str, Any]:
    """Return what the script draws."""
    numbers = {id(package): i for i, package in enumerate(page.packages)}
    return {
        "metrics": [
            {"name": metric.name, "short": metric.short, "more": metric.more_is_better}
            for metric in metrics
        ],
        "packages": [
            {
                "name": package.name,
                "treatment": package.treatment,
                "family": package.family,
                "bytes": package.n_bytes,
                "ratio": package.ratio,
                "bits": package.compression and package.compression.bits_per_weight,
                "metrics": package.metrics,
                "metricsSource": package.metrics_source,
            }
            for package in page.packages
        ],
        "groups": [
            {
                "id": f"latency-{i}",
                "title": group.title,
                "axis": group.axis,
                "stamp": group.stamp,
                "kindText": captions.KIND_NAMES[group.kind],
                "runs": [
                    {
                        "package": numbers[id(run.package)],
                        "run": run.name,
                        **json.record(run.latency, "median", "ci95", "p90", "p99"),
                        "n": len(run.latency.samples),
                    }
                    for run in group.runs
                ],
            }
            for i, group in enumerate(latencies)
        ],
        "compressions": [
            {
                "family": package.family,
                "weights": [
                    {
                        "name": weight.name,
                        "ops": ", ".join(weight.op_types),
                        "shape": "x".join(map(str, weight.shape)),
                        "status": weight.status,
                        "treatment": weight.treatment,
                        "note": weight.note,
                        "bits": weight.bits_per_weight,
                        "snr": weight.snr_db,
                        "after": weight.bytes_after,
                    }
                    for weight in package.compression.weights
                    if weight.status != "not asked"
                ],
            }
            for package in compressed
            if package.compression is not None
        ],
    }


def _printable(data: Any) -> Any:
    """Return data whose texts neither steer a terminal nor the direction of writing."""
    if isinstance(data, dict):
        return {key: _printable(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_printable(value) for value in data]
    return printable(data) if isinstance(data, str) else data
