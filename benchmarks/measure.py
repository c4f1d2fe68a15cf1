"""How a figure is made: contenders take turns, and a ratio is one of times from the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Clock = Literal["cpu", "wall"]
Sense = Literal["at least", "at most"]
CLOCKS: dict[Clock, Callable[[], float]] = {"cpu": time.process_time, "wall": time.perf_counter}


@dataclass(frozen=True, slots=True)
class Contender:
    """Work that takes part in a line, and the number of items (weights, say) that it handles.

    A slow contender may handle fewer items than its rivals; times are compared by item.
    """

    name: str
    work: Callable[[], object]
    n_items: int


@dataclass(frozen=True, slots=True)
class Times:
    """The seconds that the runs of a contender took, in their order."""

    n_items: int
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median, seconds an item."""
        return statistics.median(self.seconds) / self.n_items

    @property
    def minimum(self) -> float:
        """Minimum, seconds an item."""
        return min(self.seconds) / self.n_items


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A number that a line comes to, and what it must reach, if anything."""

    label: str
    unit: str
    measured: float
    of_minima: float | None = None
    target: float | None = None
    sense: Sense = "at least"

    @property
    def reached(self) -> bool | None:
        """Whether the target is reached; ``None`` without one."""
        if self.target is None:
            return None
        return (
            self.measured >= self.target
            if self.sense == "at least"
            else self.measured <= self.target
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A row of the report: who took how long, and what follows.

    Who runs the case that returns it gives it the case's group and name.
    """

    group: str = ""
    name: str = ""
    clock: Clock = "cpu"
    item: str = "weight"
    times: dict[str, Times] = field(default_factory=dict)
    figures: tuple[Figure, ...] = ()
    note: str = ""


Case = Callable[[], Line]


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much of the machine's time a line may take.

    Parameters
    ----------
    rounds
        Turns of a fast contender.
    budget
        Seconds after which a contender gets no further turn; each gets one.
    """

    rounds: int = 15
    budget: float = 3.0


def alternate(
    contenders: Sequence[Contender],
    effort: Effort,
    clock: Callable[[], float],
    *,
    wall: Callable[[], float] = time.perf_counter,
) -> dict[str, Times]:
    """Let contenders take turns, A B C A B C, and return their times.

    A first turn that takes less than a third of the budget counts as a warm-up and is not kept.
    """
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    spent = dict.fromkeys(seconds, 0.0)
    for i in range(effort.rounds + 1):
        for contender in contenders:
            if i > 0 and spent[contender.name] >= effort.budget:
                continue
            started, started_wall = clock(), wall()
            contender.work()
            took, took_wall = clock() - started, wall() - started_wall
            spent[contender.name] += took_wall
            if i > 0 or took_wall >= effort.budget / 3:
                seconds[contender.name].append(took)
    return {
        contender.name: Times(contender.n_items, tuple(seconds[contender.name]))
        for contender in contenders
    }


def time_ratio(
    times: dict[str, Times],
    of: str,
    to: str,
    *,
    label: str,
    unit: str = "x",
    target: float | None = None,
    sense: Sense = "at least",
) -> Figure:
    """Return the time of one contender in terms of another's, both by item.

    The figure is the ratio of medians; that of minima stands beside it.
    """
    return Figure(
        label=label,
        unit=unit,
        measured=times[of].median / times[to].median,
        of_minima=times[of].minimum / times[to].minimum,
        target=target,
        sense=sense,
    )


def speed_beside(
    times: dict[str, Times], peer: str, target: float | None = None, *, subject: str = "milpress"
) -> Figure:
    """Return how many times faster than a peer the subject handles an item."""
    unit = "of memcpy" if peer == "memcpy" else "x"
    label = f"speed beside {peer}"
    return time_ratio(times, peer, subject, label=label, unit=unit, target=target)


def two_threads(
    work: Callable[[int], object], n_items: int, effort: Effort, item: str = "weight"
) -> Line:
    """Return the line of work on two threads beside one, by the clock on the wall."""
    contenders = [
        Contender("two threads", lambda: work(2), n_items),
        Contender("one thread", lambda: work(1), n_items),
    ]
    times = alternate(contenders, effort, CLOCKS["wall"])
    figure = speed_beside(times, "one thread", 1.7, subject="two threads")
    return Line(clock="wall", item=item, times=times, figures=(figure,))


def to_dict(line: Line) -> dict[str, Any]:
    """Return a line as JSON can hold it."""
    return {
        "group": line.group,
        "name": line.name,
        "clock": line.clock,
        "item": line.item,
        "times": {
            name: {"n_items": times.n_items, "seconds": list(times.seconds)}
            for name, times in line.times.items()
        },
        "figures": [
            {
                "label": figure.label,
                "unit": figure.unit,
                "measured": figure.measured,
                "of_minima": figure.of_minima,
                "target": figure.target,
                "sense": figure.sense,
            }
            for figure in line.figures
        ],
        "note": line.note,
    }


def from_dict(data: dict[str, Any]) -> Line:
    """Undo `to_dict`."""
    times = {
        name: Times(entry["n_items"], tuple(entry["seconds"]))
        for name, entry in data["times"].items()
    }
    figures = tuple(Figure(**figure) for figure in data["figures"])
    return Line(**{**data, "times": times, "figures": figures})
