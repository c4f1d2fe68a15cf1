"""What a page says of kinds of numbers, the same in HTML and in Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from milpress.device.comparison import device_words, run_names, units_words
from milpress.device.schema import Distribution, Entry, Kind, Result
from milpress.errors import printable
from milpress.page.collect import METRICS, Evaluated, Literature, Package, Page
from milpress.show import human_snr

KIND_NAMES: dict[Kind, str] = {
    "measured": "Measured",
    "cpu_reference": "CPU reference",
    "estimate": "Estimate",
    "replay": "Replay",
    "fake": "Fake",
}
SHORT_METRICS = {
    "snr_db": "SNR, dB",
    "top1": "top-1",
    "cosine": "cosine",
    "kl": "KL, nats",
    "max_error": "max error",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Banner:
    """A sentence that must not be missed, and what it is about."""

    kind: str
    name: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """An entry of a group, and its latency; ``name`` says which run, if the group is of several."""

    package: Package
    entry: Entry
    latency: Distribution
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Runs whose latencies may stand in one chart: one kind, one device, one choice of units."""

    kind: Kind
    effective: Kind
    title: str
    where: str
    is_core: bool
    runs: tuple[Run, ...]

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


def banners(page: Page) -> Iterator[Banner]:
    """Yield what a reader must know of where the numbers come from."""
    for result in page.results:
        yield _result_banner(result)
        for warning in result.warnings:
            yield Banner(kind="caution", name="Caution", text=warning)
    if any(package.is_random for package in page.packages):
        yield Banner(
            kind="caution",
            name="Random inputs",
            text="Accuracy was computed on random inputs, which say little of real ones.",
        )
    others = [package.name for package in page.packages if not package.is_comparable]
    if others:
        yield Banner(
            kind="caution",
            name="Accuracy left out",
            text=f"That of {', '.join(others)} is of other samples than the rest.",
        )
    if page.contents(Evaluated) and not page.results:
        yield Banner(
            kind="info",
            name="No latencies",
            text="Accuracy is the interpreter's, on a CPU; nothing here was run on a device.",
        )
    for literature in page.contents(Literature):
        yield Banner(
            kind="info",
            name="Published",
            text=f"Tables by {literature.publisher} stand apart at the end. "
            "Nothing in them was measured here, and they are of other models.",
        )


def _result_banner(result: Result) -> Banner:
    kind, where = result.provenance.kind, device_words(result)
    texts = {
        "measured": f"Latencies are Core ML's on {where}. Placement is Core ML's plan, which is "
        "what it anticipates.",
        "cpu_reference": f"Latencies are of milpress' interpreter, on {where}. They are a "
        "reference for the harness and say nothing of an iPhone, a Mac or a Neural Engine.",
        "estimate": "Latencies are estimates. Nobody measured them.",
        "fake": "Latencies are invented, by a driver for tests. Don't use them for anything.",
    }
    text = texts.get(kind, "")
    if kind == "replay" and result.provenance.origin is not None:
        origin = result.provenance.origin
        what = KIND_NAMES[origin.kind].lower()
        text = (
            f"Recorded numbers ({what}, on {where}) played again from {origin.name}, "
            f"SHA-256 {origin.sha256[:16]}. Nothing was run for this."
        )
        if origin.kind == "fake":
            text += " What was recorded is fake."
    return Banner(kind=kind, name=KIND_NAMES[kind], text=text)


def groups(page: Page) -> list[Group]:
    """Return the runs with latencies, by what may stand in one chart."""
    found: dict[tuple[str, ...], list[tuple[Result, Package, Entry]]] = {}
    for package in page.packages:
        for result, entry in package.runs:
            if entry.timing is None or entry.timing.best is None:
                continue
            key = (
                result.provenance.kind,
                result.provenance.effective,
                device_words(result),
                units_words(result, entry),
            )
            found.setdefault(key, []).append((result, package, entry))
    names = run_names(page.results)
    return [_group(runs, names) for runs in found.values()]


def _group(found: Sequence[tuple[Result, Package, Entry]], names: dict[int, str]) -> Group:
    result, _, first = found[0]
    timings = [entry.timing for _, _, entry in found if entry.timing is not None]
    is_core = all(timing.core is not None for timing in timings)
    is_of_several = len({id(result) for result, _, _ in found}) > 1
    runs = []
    for one, package, entry in found:
        timing = entry.timing
        latency = None if timing is None else timing.core if is_core else timing.e2e
        if latency is not None:
            name = names[id(one)] if is_of_several else ""
            runs.append(Run(package=package, entry=entry, latency=latency, name=name))
    return Group(
        kind=result.provenance.kind,
        effective=result.provenance.effective,
        title=units_words(result, first),
        where=device_words(result),
        is_core=is_core,
        runs=tuple(runs),
    )


def metrics(page: Page) -> list[str]:
    """Return the metrics that some package other than an original has."""
    known = {
        name for package in page.packages if not package.is_original for name in package.metrics
    }
    return [name for name in METRICS if name in known]


def metric_words(name: str, value: float | None) -> str:
    """Return a metric as people read it."""
    if value is None:
        return ""
    if math.isnan(value):
        return "not a number"
    if name == "snr_db":
        return human_snr(value) if math.isfinite(value) or value > 0 else "none"
    if not math.isfinite(value):
        return "infinite"
    return {"top1": f"{value:.1%}", "cosine": f"{value:.6f}"}.get(name, f"{value:.4g}")


def estimates(page: Page) -> list[Entry]:
    """Return the entries with latencies that nobody measured."""
    return [entry for result in page.results for entry in result.entries if entry.estimate]


def failures(page: Page) -> list[Entry]:
    """Return the entries without figures."""
    return [entry for result in page.results for entry in result.entries if entry.failure]


def notes(page: Page) -> list[str]:
    """Return what runs warned of, each once with the entries that it is of."""
    found: dict[str, list[str]] = {}
    for result in page.results:
        for entry in result.entries:
            for warning in entry.warnings:
                found.setdefault(warning, []).append(entry.id)
    return [f"{printable(text)} ({len(ids)} configurations)" for text, ids in found.items()]
