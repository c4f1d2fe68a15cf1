"""Evidence from memory and latency: when weights are decoded, and on which processor ops run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import cast

from milpress.device import schema, stats
from milpress.device.schema import Entry

# A weight counts as compressed, for what memory suggests, if it takes at most so much of its size.
_CLEARLY_SMALLER = 0.75


def with_evidence(entries: Sequence[Entry]) -> list[Entry]:
    """Add what memory and latency suggest of when weights are decoded."""
    baselines: dict[str, Entry] = {}
    for entry in entries:
        if entry.status == "ok":
            baselines.setdefault(entry.settings.compute_units, entry)
    on_cpu = {
        entry.model.sha256: entry for entry in entries if entry.settings.compute_units == "CPU_ONLY"
    }
    return [
        dataclasses.replace(
            entry,
            decompression=decompression(entry, baselines.get(entry.settings.compute_units)),
            warnings=(*entry.warnings, *_doubts(entry, on_cpu.get(entry.model.sha256))),
        )
        for entry in entries
    ]


def _doubts(entry: Entry, on_cpu: Entry | None) -> list[str]:
    """Return whether a model is no faster with the Neural Engine than without."""
    if entry.settings.compute_units != "CPU_AND_NE" or on_cpu is None:
        return []
    one, two = entry.latency, on_cpu.latency
    if one is None or two is None or one.ci95[0] > two.ci95[1] or one.ci95[1] < two.ci95[0]:
        return []
    return ["CPU_AND_NE takes as long as CPU_ONLY: the Neural Engine may not be used at all"]


def decompression(entry: Entry, baseline: Entry | None) -> schema.Decompression | None:
    """Return what the figures of a compressed model are consistent with; ``None`` if it is none.

    No interface tells when Core ML decodes weights: at load (ahead of time) or at each use (just in
    time). Memory that grows by the dense size speaks for the first, by the stored size for the
    second; a prediction faster than the baseline's, on a model bound by weights, for the second.
    """
    model = entry.model
    if entry.timing is None or model.weight_bytes > _CLEARLY_SMALLER * model.dense_weight_bytes:
        return None
    evidence: list[str] = []
    votes: set[str] = set()
    if entry.memory is not None:
        grown = entry.memory.model
        between = (model.weight_bytes + model.dense_weight_bytes) / 2
        vote = "jit" if grown < between else "aot"
        votes.add(vote)
        evidence.append(
            f"loading added {grown} bytes to the process, where weights take "
            f"{model.weight_bytes} as stored and {model.dense_weight_bytes} dense; memory of the "
            "Neural Engine may be outside the process"
        )
    if baseline is not None and baseline is not entry:
        ratio = ratio_of(baseline, entry)
        if ratio is not None and ratio.interval.high < 1:
            votes.add("jit")
            evidence.append(
                f"a prediction takes {ratio.value:.3f} times the baseline's "
                f"({ratio.interval.low:.3f} to {ratio.interval.high:.3f})"
            )
    verdict = f"consistent_with_{votes.pop()}" if len(votes) == 1 else "unknown"
    return schema.Decompression(
        kind=entry.timing.kind,
        verdict=cast("schema.Verdict", verdict),
        evidence=tuple(evidence),
    )


def ratio_of(baseline: Entry, entry: Entry) -> stats.Ratio | None:
    """Return how many times as long one entry takes as another that it took turns with."""
    both = latencies_of(baseline, entry)
    return both and stats.paired_ratio(both[0].by_round, both[1].by_round)


def latencies_of(
    baseline: Entry, entry: Entry
) -> tuple[schema.Distribution, schema.Distribution] | None:
    """Return latencies of two entries that can be compared: Core ML's own if both have them."""
    for name in ("core", "e2e"):
        one, two = (getattr(each.timing, name, None) for each in (baseline, entry))
        if one is not None and two is not None:
            return one, two
    return None
