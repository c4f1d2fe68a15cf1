"""Which option of each item, so that the sum of errors is least within a budget of bytes."""

from __future__ import annotations

import bisect
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from milpress.errors import UnsupportedError

_MOST_CHANGES = 200
# With more items than this the steps are so small that going by gain per byte loses nothing.
_MOST_FOR_PROGRAM = 64
_N_CELLS = 1 << 12
# Errors are known to a few hundredths.
_AS_GOOD_AS = 1.05


class Option(NamedTuple):
    """What may be done to an item: its format, the bytes that takes, and the error it makes."""

    format: str
    n_bytes: int
    error: float


class Point(NamedTuple):
    """A point of the curve of size against error."""

    n_bytes: int
    error: float


@dataclass(frozen=True, slots=True)
class Solution:
    """The option chosen of each item, by its index."""

    chosen: tuple[int, ...]
    n_bytes: int
    error: float


def hull(options: Sequence[Option]) -> list[int]:
    """Return the options on the lower convex hull of size and error, smallest first."""
    order = sorted(range(len(options)), key=lambda i: (options[i].n_bytes, options[i].error, i))
    kept: list[int] = []
    for i in order:
        if kept and options[i].error >= options[kept[-1]].error:
            continue
        while len(kept) > 1 and _slope(options, kept[-2], i) >= _slope(options, kept[-2], kept[-1]):
            kept.pop()
        kept.append(i)
    return kept


def _slope(options: Sequence[Option], i: int, j: int) -> float:
    """Return how much error a byte takes away from one option to a larger one."""
    gain = options[i].error - options[j].error
    extra = options[j].n_bytes - options[i].n_bytes
    return math.inf if extra <= 0 else gain / extra


def curve(items: Sequence[Sequence[Option]]) -> list[Point]:
    """Return sizes and errors of the best choices by gain per byte, smallest first.

    Each of these choices has the least error that any choice of at most its size has.
    """
    hulls = [hull(options) for options in items]
    first = [options[chosen[0]] for options, chosen in zip(items, hulls, strict=True)]
    n_bytes = sum(option.n_bytes for option in first)
    # Sums are taken exactly: thousands of differences would add up their rounding.
    errors = [option.error for option in first]
    points = [Point(n_bytes, math.fsum(errors))]
    for _, i, j in sorted(_steps(items, hulls)):
        before, after = (items[i][hulls[i][k]] for k in (j - 1, j))
        n_bytes += after.n_bytes - before.n_bytes
        errors[i] = after.error
        points.append(Point(n_bytes, math.fsum(errors)))
    return points


def _steps(
    items: Sequence[Sequence[Option]], hulls: Sequence[Sequence[int]]
) -> list[tuple[float, int, int]]:
    """Return all steps along the hulls as ``(-gain per byte, item, place on its hull)``."""
    return [
        (-_slope(items[i], chosen[j - 1], chosen[j]), i, j)
        for i, chosen in enumerate(hulls)
        for j in range(1, len(chosen))
    ]


def solve(items: Sequence[Sequence[Option]], budget: int, at_least: int = 0) -> Solution:
    """Choose an option of each item such that the sum of sizes is within the budget.

    Of a few items, one of ``at_least`` so many bytes is taken instead of a smaller one if its error
    is as good as the same.

    Steps along each item's hull are taken by gain per byte, as long as they fit. For a few items a
    dynamic program over sizes, rounded up a little, is tried too. Then what is left of the budget
    is spent on single options, and on pairs of which one item grows and another shrinks, while
    that lowers the error. The better of both is returned.

    Raises
    ------
    UnsupportedError
        If even the smallest options don't fit.
    """
    hulls = [hull(options) for options in items]
    chosen = [indices[0] for indices in hulls]
    used = sum(options[i].n_bytes for options, i in zip(items, chosen, strict=True))
    if used > budget:
        msg = f"the budget must be at least {used} bytes, got {budget}"
        raise UnsupportedError(msg)
    choices = [_greedy(items, hulls, chosen, budget)]
    if len(items) <= _MOST_FOR_PROGRAM:
        choices.append(_program(items, chosen, budget))
    found: list[Solution] = []
    for choice in choices:
        for _ in range(_MOST_CHANGES):
            if not _improve(items, choice, budget):
                break
        found.append(_solution(items, choice))
    best = min(found, key=lambda one: (one.error, one.n_bytes))
    if best.n_bytes < at_least and len(items) <= _MOST_FOR_PROGRAM:
        larger = _solution(items, _program(items, chosen, budget, at_least))
        if larger.n_bytes >= at_least and larger.error <= _AS_GOOD_AS * best.error:
            return larger
    return best


def _solution(items: Sequence[Sequence[Option]], chosen: Sequence[int]) -> Solution:
    picked = [options[i] for options, i in zip(items, chosen, strict=True)]
    n_bytes = sum(option.n_bytes for option in picked)
    return Solution(tuple(chosen), n_bytes, math.fsum(option.error for option in picked))


def _greedy(
    items: Sequence[Sequence[Option]],
    hulls: Sequence[Sequence[int]],
    smallest: Sequence[int],
    budget: int,
) -> list[int]:
    """Take steps along the hulls by gain per byte, as long as they fit."""
    chosen = list(smallest)
    used = sum(options[i].n_bytes for options, i in zip(items, chosen, strict=True))
    heap = [step for step in _steps(items, hulls) if step[2] == 1]
    heapq.heapify(heap)
    while heap:
        _, i, j = heapq.heappop(heap)
        before, after = (items[i][hulls[i][k]] for k in (j - 1, j))
        extra = after.n_bytes - before.n_bytes
        if used + extra > budget:
            continue
        used += extra
        chosen[i] = hulls[i][j]
        if j + 1 < len(hulls[i]):
            heapq.heappush(heap, (-_slope(items[i], hulls[i][j], hulls[i][j + 1]), i, j + 1))
    return chosen


def _program(
    items: Sequence[Sequence[Option]], smallest: Sequence[int], budget: int, at_least: int = 0
) -> list[int]:
    """Return the choice of least error between two sizes, counted in cells beyond the smallest.

    Where no choice is as large as ``at_least``, that of least error is returned.
    """
    used = sum(options[i].n_bytes for options, i in zip(items, smallest, strict=True))
    cell = max(1, (budget - used) // _N_CELLS)
    n_cells = (budget - used) // cell
    least = np.full(n_cells + 1, np.inf)
    least[0] = 0
    taken = np.zeros((len(items), n_cells + 1), np.intp)
    for i, options in enumerate(items):
        after = np.full(n_cells + 1, np.inf)
        for j, option in enumerate(options):
            n = _cells(option, options[smallest[i]], cell)
            if n <= n_cells:
                error = least[: n_cells + 1 - n] + option.error
                better = error < after[n:]
                after[n:][better] = error[better]
                taken[i, n:][better] = j
        least = after
    # Each item's cells are rounded up by less than one.
    first = -(-(at_least - used) // cell) + len(items) if at_least > used else 0
    if first > n_cells or not np.isfinite(least[first:]).any():
        first = 0
    left = first + int(np.argmin(least[first:]))
    chosen = [0] * len(items)
    for i in reversed(range(len(items))):
        chosen[i] = int(taken[i, left])
        left -= _cells(items[i][chosen[i]], items[i][smallest[i]], cell)
    return chosen


def _cells(option: Option, smallest: Option, cell: int) -> int:
    return -(-(option.n_bytes - smallest.n_bytes) // cell)


class _Move(NamedTuple):
    extra: int
    gain: float
    item: int
    option: int


def _improve(items: Sequence[Sequence[Option]], chosen: list[int], budget: int) -> bool:
    """Make the best change of one item, or of two at once, that fits and lowers the error."""
    slack = budget - sum(options[i].n_bytes for options, i in zip(items, chosen, strict=True))
    ups: list[_Move] = []
    downs: list[_Move] = []
    for i, options in enumerate(items):
        now = options[chosen[i]]
        for j, option in enumerate(options):
            move = _Move(option.n_bytes - now.n_bytes, now.error - option.error, i, j)
            if move.gain > 0:
                ups.append(move)
            elif move.extra < 0:
                downs.append(move)
    # Of the moves that free at least so many bytes, the two items that lose least: one of them may
    # be the item that grows.
    downs.sort()
    cheapest: list[list[_Move]] = []
    best: list[_Move] = []
    for move in downs:
        by_item: dict[int, _Move] = {}
        for one in sorted([*best, move], key=lambda one: -one.gain):
            by_item.setdefault(one.item, one)
        best = list(by_item.values())[:2]
        cheapest.append(best)
    sizes = [move.extra for move in downs]
    found: tuple[float, tuple[_Move, ...]] = (0.0, ())
    for up in ups:
        if up.extra <= slack:
            found = max(found, (up.gain, (up,)), key=lambda one: one[0])
            continue
        last = bisect.bisect_right(sizes, slack - up.extra) - 1
        partners = cheapest[last] if last >= 0 else []
        partner = next((one for one in partners if one.item != up.item), None)
        if partner is not None and up.gain + partner.gain > found[0]:
            found = (up.gain + partner.gain, (up, partner))
    for move in found[1]:
        chosen[move.item] = move.option
    # Differences far below the errors themselves are rounding, and would go back and forth.
    total = math.fsum(options[i].error for options, i in zip(items, chosen, strict=True))
    return found[0] > 1e-12 * total


def knee(points: Sequence[Point]) -> int:
    """Return the point of a falling curve that is farthest below the line between its ends.

    Examples
    --------
    >>> knee([Point(0, 100), Point(1, 10), Point(2, 8), Point(10, 0)])
    1
    """
    first, last = points[0], points[-1]
    width, height = last.n_bytes - first.n_bytes, first.error - last.error
    if width <= 0 or height <= 0:
        return 0
    below = [
        (first.error - point.error) / height - (point.n_bytes - first.n_bytes) / width
        for point in points
    ]
    return max(range(len(points)), key=lambda i: (below[i], -i))
