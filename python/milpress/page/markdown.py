"""A page as Markdown: the same tables, every string escaped."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from milpress._version import __version__
from milpress.errors import printable
from milpress.page import words
from milpress.page.collect import Literature, Page
from milpress.show import human_bytes, human_snr


def render(page: Page) -> str:
    """Return the page."""
    parts = [f"# {_t(page.title)}"]
    parts += [f"> **{_t(b.name)}.** {_t(b.text)}" for b in words.banners(page)]
    parts += _packages(page)
    parts += _latencies(page)
    parts += _estimates(page)
    parts += _weights(page)
    failed = [entry for entry in words.failures(page) if entry.failure is not None]
    if failed:
        parts.append("## What failed")
        parts.append(
            "\n".join(
                f"- {_t(e.id)}: in {_t(e.failure.phase)}, {_t(e.failure.message)}"
                for e in failed
                if e.failure is not None
            )
        )
    notes = words.notes(page)
    if notes:
        parts += ["## Notes of the runs", "\n".join(f"- {_t(note)}" for note in notes)]
    for literature in page.contents(Literature):
        parts.append(f"## Published by {_t(literature.publisher)}, not measured here")
        for table in literature.tables:
            source = f"{table.device}; {table.method}. {table.note} Source: {table.source}"
            parts += [f"### {_t(table.title)}", _t(source), _table(table.columns, table.rows)]
    parts.append(f"Made by milpress {__version__} of:")
    parts.append("\n".join(f"- {_t(s.name)} ({s.what}), SHA-256 {s.sha256}" for s in page.sources))
    return "\n\n".join(parts) + "\n"


def _packages(page: Page) -> list[str]:
    metrics = words.metrics(page)
    rows = [
        [
            package.name,
            package.treatment,
            "" if package.n_bytes is None else human_bytes(package.n_bytes),
            "" if package.ratio is None else f"{package.ratio:.2f}x",
            f"{package.compression.bits_per_weight:.2f}" if package.compression else "",
            *(words.metric_words(name, package.metrics.get(name)) for name in metrics),
        ]
        for package in page.packages
    ]
    if not rows:
        return []
    head = ["package", "treatment", "size", "smaller", "bits"]
    return ["## Packages", _table([*head, *(words.SHORT_METRICS[name] for name in metrics)], rows)]


def _latencies(page: Page) -> list[str]:
    parts: list[str] = []
    for group in words.groups(page):
        name = words.KIND_NAMES[group.kind]
        parts.append(f"## Latency: {_t(group.title)} ({name}, {_t(group.where)})")
        if group.stamp:
            parts.append(f"**{group.stamp}**")
        rows = [
            [
                f"{run.package.name}, run {run.name}" if run.name else run.package.name,
                f"{run.latency.median:.3f}",
                f"{run.latency.ci95[0]:.3f} to {run.latency.ci95[1]:.3f}",
                f"{run.latency.p90:.3f}",
                f"{run.latency.p99:.3f}",
                str(len(run.latency.samples)),
            ]
            for run in group.runs
        ]
        head = ["package", f"{group.axis} ms", "95 % interval", "p90", "p99", "samples"]
        parts.append(_table(head, rows))
    return parts


def _estimates(page: Page) -> list[str]:
    rows = [
        [entry.id, f"{entry.estimate.estimate_ms:.3g}", entry.estimate.method]
        for entry in words.estimates(page)
        if entry.estimate is not None
    ]
    if not rows:
        return []
    return ["## Estimates, not measured", _table(["configuration", "estimate ms", "method"], rows)]


def _weights(page: Page) -> list[str]:
    parts: list[str] = []
    for package in page.packages:
        if package.compression is None:
            continue
        rows = [
            [
                weight.name,
                f"{weight.treatment or 'left'}{f' ({weight.note})' if weight.note else ''}",
                f"{weight.bits_per_weight:.2f}",
                "" if weight.snr_db is None else human_snr(weight.snr_db),
                human_bytes(weight.bytes_after),
            ]
            for weight in package.compression.weights
            if weight.status != "not asked"
        ]
        parts.append(f"## Weights of {_t(package.name)}")
        parts.append(_table(["weight", "treatment", "bits", "SNR dB", "stored"], rows))
    return parts


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        f"| {' | '.join(line if line == '---' else _t(line) for line in cells)} |"
        for cells in lines
    )


def _t(text: str) -> str:
    """Return text that is no markup: every character that could be is escaped."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~$&-])", r"\\\1", printable(text))
