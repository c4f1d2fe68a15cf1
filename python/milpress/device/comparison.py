"""Comparison of results as tables, never of different kinds in one column."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from milpress.device.evidence import latencies_of, ratio_of
from milpress.device.schema import Distribution, Entry, Result
from milpress.device.stats import Ratio
from milpress.errors import ConfigError
from milpress.show import escaped, human_bytes, human_snr, named_table

if TYPE_CHECKING:
    from rich.table import Table

# What a time is, by the kind of its run.
KIND_WORDS = {
    "measured": "measured",
    "cpu_reference": "CPU reference, not a device",
    "estimate": "ESTIMATE, not measured",
    "replay": "REPLAY",
    "fake": "FAKE, not measured",
}


def device_words(result: Result) -> str:
    """Return what a run ran on."""
    if result.device is not None:
        device = result.device
        known = [word for word in (device.chip, device.model) if word != "unknown"]
        return f"{', '.join(known)}, {device.os} ({device.os_build})"
    return f"{result.host.system} on {result.host.machine}, {result.host.n_cores} cores"


def units_words(result: Result, entry: Entry) -> str:
    """Return the name of units; of a Neural Engine, only where there is one."""
    units = entry.settings.compute_units
    if result.provenance.effective == "cpu_reference":
        return "Interpreter"
    if (
        units in ("CPU_AND_NE", "ALL")
        and result.device is not None
        and not result.device.has_neural_engine
    ):
        return f"{units} (no Neural Engine here)"
    return units


def run_names(results: Sequence[Result]) -> dict[int, str]:
    """Return what each run is called beside others, by its identity: a number and when it was."""
    names: dict[int, str] = {}
    for result in results:
        if id(result) not in names:
            created = result.created[:16].replace("T", " ")
            names[id(result)] = f"{len(names) + 1}, {created}"
    return names


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A configuration beside its baseline.

    ``units``, ``where`` and ``run`` are in words. ``ratio`` is how many times the baseline's
    latency its own is, of rounds that took turns if ``is_paired``, otherwise of medians; ``None``
    if there is no baseline, or it is the baseline.
    """

    entry: Entry
    units: str
    where: str
    run: str = ""
    run_id: str = ""
    ratio: Ratio | float | None = None
    is_paired: bool = False

    @property
    def latency(self) -> Distribution | None:
        """Core ML's own latency, or that of the whole call."""
        return self.entry.latency


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What `compare` found: rows in the order of the results, all of one kind."""

    kind: str
    rows: tuple[Row, ...]

    @property
    def summary(self) -> str:
        """One line: what kind of numbers these are."""
        n_failed = sum(row.entry.status == "failed" for row in self.rows)
        failed = f", {n_failed} failed" if n_failed else ""
        return f"{len(self.rows)} configurations{failed}; {KIND_WORDS[self.kind]}"

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON can hold it."""
        return {
            "version": 1,
            "kind": self.kind,
            "rows": [
                {
                    "id": row.entry.id,
                    "run": row.run,
                    "run_id": row.run_id,
                    "machine": row.where,
                    "status": row.entry.status,
                    "median_ms": None if row.latency is None else row.latency.median,
                    "ratio": row.ratio.value if isinstance(row.ratio, Ratio) else row.ratio,
                    "ratio_ci95": list(row.ratio.interval)
                    if isinstance(row.ratio, Ratio)
                    else None,
                    "paired": row.is_paired,
                }
                for row in self.rows
            ],
        }

    def __rich__(self) -> Table:
        """Return the rows as a table."""
        several = len({row.where for row in self.rows}) > 1
        runs = len({row.run for row in self.rows}) > 1
        headings = ["configuration", "units"] + ["machine"] * several + ["run"] * runs
        numbers = ("size", "SNR dB", "median ms", "95 %", "p90", "p99", "ratio")
        table = named_table(*headings, right=numbers)
        for row in self.rows:
            entry, latency = row.entry, row.latency
            cells = [escaped(entry.model.name), escaped(row.units)]
            cells += [escaped(row.where)] if several else []
            cells += [escaped(row.run)] if runs else []
            cells.append(human_bytes(entry.model.package_bytes))
            cells.append("" if entry.accuracy is None else human_snr(entry.accuracy.snr_db))
            if entry.failure is not None:
                what = f"failed in {entry.failure.phase}: {entry.failure.message}"
                cells += ["failed", escaped(what)]
            elif latency is not None:
                cells.append(f"{latency.median:.3f}")
                cells.append(f"{latency.ci95[0]:.3f}-{latency.ci95[1]:.3f}")
                cells += [f"{latency.p90:.3f}", f"{latency.p99:.3f}", shown_ratio(row)]
            table.add_row(*cells)
        return table


def shown_ratio(row: Row) -> str:
    """Return a ratio as people read it; with its interval if it is of rounds that took turns."""
    if isinstance(row.ratio, Ratio):
        low, high = row.ratio.interval
        return f"{row.ratio.value:.3f} ({low:.3f}-{high:.3f})"
    return "" if row.ratio is None else f"{row.ratio:.3f} (of medians)"


def compare(results: Sequence[Result], *, baseline: str | None = None) -> Comparison:
    """Put the configurations of results beside each other.

    Parameters
    ----------
    results
        The results, of one kind.
    baseline
        The model that others are compared with, in each unit; by default the first one's.

    Raises
    ------
    ConfigError
        If the results are of different kinds, or there is no such model.
    """
    kinds = sorted({result.provenance.kind for result in results})
    if len(kinds) != 1:
        msg = f"results must be of one kind to stand in one table, got {' and '.join(kinds)}"
        raise ConfigError(msg)
    entries = [entry for result in results for entry in result.entries]
    names = list(dict.fromkeys(entry.model.name for entry in entries))
    if baseline is not None and baseline not in names:
        msg = f"the baseline must be one of {', '.join(names)}, got {baseline!r}"
        raise ConfigError(msg)
    baseline = baseline or (names[0] if names else "")
    runs = run_names(results)
    rows: list[Row] = []
    for result in results:
        rows += [_row(entry, result, entries, baseline, runs) for entry in result.entries]
    return Comparison(kind=kinds[0], rows=tuple(rows))


def _row(
    entry: Entry, result: Result, entries: Sequence[Entry], baseline: str, names: dict[int, str]
) -> Row:
    def is_reference(other: Entry) -> bool:
        return (
            other.model.name == baseline
            and other.settings.compute_units == entry.settings.compute_units
            and other.status == "ok"
        )

    row = Row(
        entry=entry,
        units=units_words(result, entry),
        where=device_words(result),
        run=names[id(result)],
        run_id=result.run_id,
    )
    if entry.status != "ok":
        return row
    within = next((each for each in result.entries if is_reference(each)), None)
    if within is entry:
        return row
    if within is not None and within.id in entry.settings.interleaved_with:
        ratio = ratio_of(within, entry)
        if ratio is not None:
            return replace(row, ratio=ratio, is_paired=True)
    other = within or next((each for each in entries if is_reference(each)), None)
    both = None if other is None else latencies_of(other, entry)
    return row if both is None else replace(row, ratio=both[1].median / both[0].median)
