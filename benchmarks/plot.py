"""One picture of a run: kernels beside `memcpy`, and all that coremltools can do beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import matplotlib as mpl
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks.measure import Figure
from benchmarks.results import Results, format_value

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {True: "#1b7f79", False: "#d9822b", None: "#9aa8b5"}
_LABELS = {True: "target reached", False: "target missed", None: "no target"}
_INK = "#22303c"
_GRID = "#e3e8ec"
_ROW_INCHES = 0.27


class Bar(NamedTuple):
    """A figure with the name that stands beside its bar."""

    name: str
    figure: Figure


def bars(results: Results, label: str) -> list[Bar]:
    """Return the figures that carry a label, in the order of the run."""
    return [Bar(line.name, figure) for line, figure in results.figures() if figure.label == label]


def draw(results: Results, path: Path) -> None:
    """Draw a run as PNG."""
    panels = [
        ("Kernels: speed beside memcpy (100 %)", bars(results, "speed beside memcpy"), 100.0),
        ("Speed beside coremltools (1 x)", bars(results, "speed beside coremltools"), 1.0),
    ]
    panels = [panel for panel in panels if panel[1]]
    if not panels:
        return
    most = max(len(entries) for _, entries, _ in panels)
    style = {
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
    }
    with mpl.rc_context(style):
        canvas = Canvas(figsize=(7.4 * len(panels), 1.9 + _ROW_INCHES * most))
        canvas.set_layout_engine("constrained", w_pad=0.15, h_pad=0.1)
        all_axes = canvas.subplots(1, len(panels), squeeze=False)[0]
        for axes, (title, entries, scale) in zip(all_axes, panels, strict=True):
            _draw_panel(axes, title, entries, scale)
        canvas.legend(handles=_legend(), loc="outside lower center", ncols=4, frameon=False)
        machine = results.machine
        canvas.suptitle(
            f"milpress {machine['versions']['milpress']} on one thread of {machine['cpu']}, "
            f"CPU time{', quick run' if results.quick else ''}",
            fontsize=11,
            fontweight="bold",
        )
        path.parent.mkdir(exist_ok=True)
        # Without the date and the version of the library, equal results give equal files.
        canvas.savefig(path, dpi=150, facecolor="white", metadata={"Software": None})


def _draw_panel(axes: Axes, title: str, entries: Sequence[Bar], scale: float) -> None:
    """Draw bars from top to bottom, each with its value and a mark at its target."""
    values = [scale * entry.figure.measured for entry in entries]
    marks = [scale * entry.figure.target for entry in entries if entry.figure.target is not None]
    axes.set_xscale("log")
    least, greatest = min([*values, *marks, scale]), max([*values, *marks, scale])
    axes.set_xlim(least / 2, greatest * 1.2)
    for i, (entry, value) in enumerate(zip(entries, values, strict=True)):
        axes.barh(i, value, height=0.68, color=_COLOURS[entry.figure.reached], zorder=2)
        if entry.figure.target is not None:
            target = scale * entry.figure.target
            axes.plot([target] * 2, [i - 0.42, i + 0.42], color=_INK, linewidth=2, zorder=4)
        # In a column of their own, where no mark strikes them out.
        axes.annotate(
            format_value(entry.figure.measured, entry.figure.unit),
            (1.09, i),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="center",
            color=_COLOURS[entry.figure.reached] if entry.figure.target else _INK,
            fontweight="bold",
        )
    axes.axvline(scale, color=_INK, linewidth=1, linestyle=(0, (4, 3)), zorder=3)
    axes.set_yticks(range(len(entries)), [entry.name for entry in entries])
    axes.set_ylim(len(entries) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
    suffix = " %" if scale > 1 else " x"
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}{suffix}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.grid(visible=True, color=_GRID, zorder=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")


def _legend() -> list[Patch | Line2D]:
    patches: list[Patch | Line2D] = [
        Patch(color=_COLOURS[reached], label=_LABELS[reached]) for reached in (True, False, None)
    ]
    tick = Line2D([], [], color=_INK, linewidth=2, marker="|", linestyle="", markersize=11)
    tick.set_markeredgewidth(2)
    tick.set_label("target")
    return [*patches, tick]
