"""Runs by what may stand in one chart: one kind of number, one device, one choice of units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from milpress.device.comparison import device_words, run_names, units_words
from milpress.device.schema import Distribution, Entry, Kind, Result
from milpress.page.collect import PackageResults, Page


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyRun:
    """An entry of a group, and its latency; ``name`` says which run, if the group is of several."""

    package: PackageResults
    entry: Entry
    latency: Distribution
    name: str

    @property
    def load_cached(self) -> float | None:
        """Median time of loading again."""
        times = sorted(self.entry.timing.load_cached) if self.entry.timing else []
        return times[len(times) // 2] if times else None


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyGroup:
    """Runs whose latencies may stand in one chart: one kind, one device, one choice of units."""

    kind: Kind
    effective: Kind
    title: str
    where: str
    is_core: bool
    runs: tuple[LatencyRun, ...]

    @property
    def axis(self) -> str:
        """What the latency is of."""
        what = "Core ML prediction" if self.is_core else "Whole call from Python"
        return f"{what}, median"

    @property
    def stamp(self) -> str:
        """What is written across a chart; empty if its numbers are what they seem."""
        if "fake" in (self.kind, self.effective):
            return "FAKE"
        return "REPLAY" if self.kind == "replay" else ""


def groups(page: Page) -> list[LatencyGroup]:
    """Return the runs with latencies, by what may stand in one chart."""
    comparable: dict[tuple[str, ...], list[tuple[Result, PackageResults, Entry]]] = {}
    for package in page.packages:
        for result, entry in package.runs:
            if entry.latency is None:
                continue
            key = (
                result.provenance.kind,
                result.provenance.effective,
                device_words(result),
                units_words(result, entry),
            )
            comparable.setdefault(key, []).append((result, package, entry))
    names = run_names(page.results)
    return [_group(runs, names) for runs in comparable.values()]


def _group(
    comparable: Sequence[tuple[Result, PackageResults, Entry]], names: dict[int, str]
) -> LatencyGroup:
    result, _, first = comparable[0]
    is_core = all(entry.timing and entry.timing.core for _, _, entry in comparable)
    is_of_several = len({id(result) for result, _, _ in comparable}) > 1
    runs = []
    for one, package, entry in comparable:
        latency = getattr(entry.timing, "core" if is_core else "e2e")
        if latency is not None:
            name = names[id(one)] if is_of_several else ""
            runs.append(LatencyRun(package=package, entry=entry, latency=latency, name=name))
    return LatencyGroup(
        kind=result.provenance.kind,
        effective=result.provenance.effective,
        title=units_words(result, first),
        where=device_words(result),
        is_core=is_core,
        runs=tuple(runs),
    )
