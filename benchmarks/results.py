"""What a run found: saved as JSON, printed as tables, and set into the documentation."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.measure import Figure, Line, from_dict, to_dict

SCHEMA = 1
FOLDER = Path(__file__).with_name("results")
PAGE = Path(__file__).parents[1] / "docs/performance.md"
PUBLISHED = "performance"
_BEGIN, _END = "<!-- results: begin -->", "<!-- results: end -->"
_PEERS = ("memcpy", "NumPy", "scikit-learn", "coremltools")


@dataclass(frozen=True, kw_only=True)
class Results:
    """A run.

    Parameters
    ----------
    machine
        What `machine.describe` said before the start.
    lines
        The lines, in the order of measurement.
    quick
        Whether sizes and rounds were cut down.
    warning
        What spoils the figures, if anything.
    """

    machine: dict[str, Any]
    lines: tuple[Line, ...] = field(default=())
    quick: bool = False
    warning: str = ""

    def figures(self) -> Iterator[tuple[Line, Figure]]:
        """Yield all figures with their lines."""
        return ((line, figure) for line in self.lines for figure in line.figures)

    @property
    def summary(self) -> str:
        """How many targets were reached."""
        judged = [figure.reached for _, figure in self.figures() if figure.reached is not None]
        return f"{sum(judged)} of {len(judged)} targets reached"


def dump(results: Results) -> str:
    """Return a run as JSON."""
    data = {
        "schema": SCHEMA,
        "quick": results.quick,
        "warning": results.warning,
        "machine": results.machine,
        "lines": [to_dict(line) for line in results.lines],
    }
    return json.dumps(data, indent=1) + "\n"


def parse(text: str) -> Results:
    """Undo `dump`."""
    data = json.loads(text)
    if data["schema"] != SCHEMA:
        msg = f"schema must be {SCHEMA}, got {data['schema']}"
        raise ValueError(msg)
    return Results(
        machine=data["machine"],
        lines=tuple(from_dict(line) for line in data["lines"]),
        quick=data["quick"],
        warning=data["warning"],
    )


def save(results: Results, name: str) -> Path:
    """Write a run to the results' folder, and return the path."""
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.json"
    path.write_text(dump(results))
    return path


def load(name: str) -> Results:
    """Read a run from the results' folder."""
    return parse((FOLDER / f"{name}.json").read_text())


def format_value(value: float, unit: str) -> str:
    """Return a figure's value as people read it."""
    if unit == "of memcpy":
        return f"{100 * value:.0f} %"
    if unit == "MB":
        return f"{value:.0f} MB"
    if unit == "error":
        return f"{value:.6f}"
    return f"{value:.1f} x" if value < 10 else f"{value:.0f} x"


def format_target(figure: Figure) -> str:
    """Return what a figure must reach, or nothing."""
    if figure.target is None:
        return ""
    sign = "≥" if figure.sense == "at least" else "≤"
    return f"{sign} {format_value(figure.target, figure.unit)}"


def format_reached(figure: Figure) -> str:
    """Return whether a figure is reached, or nothing."""
    return {True: "yes", False: "**no**", None: ""}[figure.reached]


def format_time(seconds: float) -> str:
    """Return a time an item in nanoseconds, to three digits."""
    nanoseconds = 1e9 * seconds
    return f"{nanoseconds:.0f}" if nanoseconds >= 100 else f"{nanoseconds:.3g}"


def show(results: Results, console: Console) -> None:
    """Print all times and all figures."""
    times = Table(title="Times by item", title_justify="left")
    for column in ("", "clock", "contender"):
        times.add_column(column)
    for column in ("median", "minimum", "runs"):
        times.add_column(column, justify="right")
    for line in results.lines:
        for i, (contender, entry) in enumerate(line.times.items()):
            times.add_row(
                "" if i else line.name,
                "" if i else line.clock,
                contender,
                f"{format_time(entry.median)} ns",
                f"{format_time(entry.minimum)} ns",
                str(len(entry.seconds)),
                end_section=i == len(line.times) - 1,
            )
    console.print(times)
    figures = Table(title="Figures", title_justify="left")
    figures.add_column("")
    figures.add_column("")
    for column in ("target", "measured", "of minima", "reached"):
        figures.add_column(column, justify="right")
    for line, figure in results.figures():
        minima = "" if figure.of_minima is None else format_value(figure.of_minima, figure.unit)
        figures.add_row(
            line.name,
            figure.label,
            format_target(figure),
            format_value(figure.measured, figure.unit),
            minima,
            {True: "[green]yes", False: "[red]no", None: ""}[figure.reached],
        )
    console.print(figures)
    console.print(results.summary)


def markdown(results: Results) -> str:
    """Return the part of the documentation that a run stands for."""
    machine = results.machine
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    parts = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['ram_mb'] / 1e3:.0f} GB of memory, "
        f"{', '.join(machine['flags'])}; {machine['system']}, {machine['compiler']}, "
        f"Python {machine['python']}, {versions}.",
    ]
    if results.quick:
        parts.append("These figures are of a quick run, with fewer rounds and smaller models.")
    if results.warning:
        parts.append(f"Warning: {results.warning}.")
    parts += [
        f"### Targets and whole models: {results.summary}",
        _table(
            ("line", "figure", "target", "measured", "of minima", "reached"),
            (
                (
                    line.name,
                    figure.label,
                    format_target(figure),
                    format_value(figure.measured, figure.unit),
                    "" if figure.of_minima is None else format_value(figure.of_minima, figure.unit),
                    format_reached(figure),
                )
                for line, figure in results.figures()
                if figure.target is not None or line.group == "models"
            ),
            n_left=2,
        ),
        "### Kernels: nanoseconds an item, CPU time, one thread, medians",
        _table(
            ("line", "item", "milpress", *_PEERS),
            (
                (
                    line.name,
                    line.item,
                    *(
                        format_time(line.times[name].median) if name in line.times else ""
                        for name in ("milpress", *_PEERS)
                    ),
                )
                for line in _by_clock(results.lines, "kernels", "cpu")
            ),
            n_left=2,
        ),
        "### Whole models: nanoseconds a weight, medians",
        _table(
            ("line", "clock", "contender", "median", "minimum"),
            (
                (
                    line.name,
                    line.clock,
                    contender,
                    format_time(times.median),
                    format_time(times.minimum),
                )
                for line in results.lines
                if line.group == "models"
                for contender, times in line.times.items()
            ),
            n_left=3,
        ),
        "### Remarks",
        "\n".join(
            f"- {line.name}: {line.note.rstrip('.')}." for line in results.lines if line.note
        ),
    ]
    return "\n\n".join(parts)


def set_into(page: str, results: Results) -> str:
    """Return a page with the part between its marks replaced by a run."""
    before, begin, rest = page.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        msg = f"the page must hold {_BEGIN} and {_END}, got neither or one"
        raise ValueError(msg)
    return f"{before}{begin}\n\n{markdown(results)}\n\n{end}{after}"


def _by_clock(lines: Iterable[Line], group: str, clock: str) -> Iterator[Line]:
    return (line for line in lines if line.group == group and line.clock == clock)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]], *, n_left: int) -> str:
    rule = ["---" if i < n_left else "---:" for i in range(len(head))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))
