"""Which choice for each group, so that the sum of errors is least within a budget of bytes."""

from __future__ import annotations

import bisect
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np

from milpress.errors import UnsupportedError
from milpress.formats import Treatment

_MOST_CHANGES = 200
# With more groups than this the steps are so small that going by gain per byte loses nothing.
_MOST_FOR_PROGRAM = 64
_N_CELLS = 1 << 12
# Errors are known to a few hundredths.
_AS_GOOD_AS = 1.05


class Choice(NamedTuple):
    """What may be done to a group of weights.

    Parameters
    ----------
    format
        Its short name.
    n_bytes
        Bytes that the weights take then.
    error
        What it adds to the error that a plan keeps small.
    treatments
        The treatment of each of the weights; none if they stay.
    """

    format: str
    n_bytes: int
    error: float = 0.0
    treatments: tuple[Treatment, ...] = ()


# The choices that each group has.
Groups: TypeAlias = Sequence[Sequence[Choice]]


class Point(NamedTuple):
    """A point of the curve of size against error."""

    n_bytes: int
    error: float


@dataclass(frozen=True, slots=True)
class Solution:
    """A choice for each group."""

    choices: tuple[Choice, ...]

    @property
    def n_bytes(self) -> int:
        """Bytes of all choices."""
        return sum(choice.n_bytes for choice in self.choices)

    @property
    def error(self) -> float:
        """The sum of all errors, rounded once."""
        return math.fsum(choice.error for choice in self.choices)

    @property
    def formats(self) -> tuple[str, ...]:
        """The format chosen for each group."""
        return tuple(choice.format for choice in self.choices)


def hull(choices: Sequence[Choice]) -> list[int]:
    """Return the choices on the lower convex hull of size and error, smallest first."""
    order = sorted(range(len(choices)), key=lambda i: (choices[i].n_bytes, choices[i].error, i))
    on_hull: list[int] = []
    for i in order:
        if on_hull and choices[i].error >= choices[on_hull[-1]].error:
            continue
        while len(on_hull) > 1 and _slope(choices, on_hull[-2], i) >= _slope(
            choices, on_hull[-2], on_hull[-1]
        ):
            on_hull.pop()
        on_hull.append(i)
    return on_hull


def _slope(choices: Sequence[Choice], i: int, j: int) -> float:
    """Return how much error a byte takes away from one choice to a larger one."""
    gain = choices[i].error - choices[j].error
    extra = choices[j].n_bytes - choices[i].n_bytes
    return math.inf if extra <= 0 else gain / extra


def curve(groups: Groups) -> list[Point]:
    """Return sizes and errors of the best choices by gain per byte, smallest first.

    Each of these choices has the least error that any choice of at most its size has.
    """
    hulls = [hull(choices) for choices in groups]
    first = [choices[chosen[0]] for choices, chosen in zip(groups, hulls, strict=True)]
    n_bytes = sum(choice.n_bytes for choice in first)
    # Sums are taken exactly: thousands of differences would add up their rounding.
    errors = [choice.error for choice in first]
    points = [Point(n_bytes, math.fsum(errors))]
    for _, i, j in sorted(_steps(groups, hulls)):
        before, after = (groups[i][hulls[i][k]] for k in (j - 1, j))
        n_bytes += after.n_bytes - before.n_bytes
        errors[i] = after.error
        points.append(Point(n_bytes, math.fsum(errors)))
    return points


def _steps(groups: Groups, hulls: Sequence[Sequence[int]]) -> list[tuple[float, int, int]]:
    """Return all steps along the hulls as ``(-gain per byte, group, place on its hull)``."""
    return [
        (-_slope(groups[i], chosen[j - 1], chosen[j]), i, j)
        for i, chosen in enumerate(hulls)
        for j in range(1, len(chosen))
    ]


def solve(groups: Groups, budget: int, at_least: int = 0) -> Solution:
    """Make a choice for each group such that the sum of sizes is within the budget.

    For a few groups, one of ``at_least`` so many bytes is taken instead of a smaller one if its
    error is as good as the same.

    Steps along each group's hull are taken by gain per byte, as long as they fit. For a few groups
    a dynamic program over sizes, rounded up a little, is tried too. Then what is left of the budget
    is spent on single changes, and on pairs of which one group grows and another shrinks, while
    that lowers the error. The better of both is returned.

    Raises
    ------
    UnsupportedError
        If even the smallest choices don't fit.
    """
    least = _smallest(groups)
    used = _solution(groups, least).n_bytes
    if used > budget:
        msg = f"the budget must be at least {used} bytes, got {budget}"
        raise UnsupportedError(msg)
    starts = [_greedy(groups, least, budget)]
    if len(groups) <= _MOST_FOR_PROGRAM:
        starts.append(_program(groups, least, budget))
    solutions: list[Solution] = []
    for chosen in starts:
        for _ in range(_MOST_CHANGES):
            if not _improve(groups, chosen, budget):
                break
        solutions.append(_solution(groups, chosen))
    best = min(solutions, key=lambda one: (one.error, one.n_bytes))
    if best.n_bytes < at_least and len(groups) <= _MOST_FOR_PROGRAM:
        larger = _solution(groups, _program(groups, least, budget, at_least))
        if larger.n_bytes >= at_least and larger.error <= _AS_GOOD_AS * best.error:
            return larger
    return best


def smallest(groups: Groups) -> Solution:
    """Return the smallest choice for each group, of equals that of the least error."""
    return _solution(groups, _smallest(groups))


def _smallest(groups: Groups) -> list[int]:
    return [
        min(range(len(choices)), key=lambda i: (choices[i].n_bytes, choices[i].error))
        for choices in groups
    ]


def _solution(groups: Groups, chosen: Sequence[int]) -> Solution:
    return Solution(tuple(choices[i] for choices, i in zip(groups, chosen, strict=True)))


def _greedy(groups: Groups, least: Sequence[int], budget: int) -> list[int]:
    """Take steps along the hulls by gain per byte, as long as they fit."""
    hulls = [hull(choices) for choices in groups]
    chosen = list(least)
    used = _solution(groups, chosen).n_bytes
    heap = [step for step in _steps(groups, hulls) if step[2] == 1]
    heapq.heapify(heap)
    while heap:
        _, i, j = heapq.heappop(heap)
        before, after = (groups[i][hulls[i][k]] for k in (j - 1, j))
        extra = after.n_bytes - before.n_bytes
        if used + extra > budget:
            continue
        used += extra
        chosen[i] = hulls[i][j]
        if j + 1 < len(hulls[i]):
            heapq.heappush(heap, (-_slope(groups[i], hulls[i][j], hulls[i][j + 1]), i, j + 1))
    return chosen


def _program(groups: Groups, least: Sequence[int], budget: int, at_least: int = 0) -> list[int]:
    """Return the choice of least error between two sizes, counted in cells beyond the smallest.

    Where no choice is as large as ``at_least``, that of least error is returned.
    """
    used = _solution(groups, least).n_bytes
    cell = max(1, (budget - used) // _N_CELLS)
    n_cells = (budget - used) // cell
    errors = np.full(n_cells + 1, np.inf)
    errors[0] = 0
    taken = np.zeros((len(groups), n_cells + 1), np.intp)
    for i, choices in enumerate(groups):
        after = np.full(n_cells + 1, np.inf)
        for j, choice in enumerate(choices):
            n = _cells(choice, choices[least[i]], cell)
            if n <= n_cells:
                error = errors[: n_cells + 1 - n] + choice.error
                better = error < after[n:]
                after[n:][better] = error[better]
                taken[i, n:][better] = j
        errors = after
    # Each group's cells are rounded up by less than one.
    first = -(-(at_least - used) // cell) + len(groups) if at_least > used else 0
    if first > n_cells or not np.isfinite(errors[first:]).any():
        first = 0
    left = first + int(np.argmin(errors[first:]))
    chosen = [0] * len(groups)
    for i in reversed(range(len(groups))):
        chosen[i] = int(taken[i, left])
        left -= _cells(groups[i][chosen[i]], groups[i][least[i]], cell)
    return chosen


def _cells(choice: Choice, least: Choice, cell: int) -> int:
    return -(-(choice.n_bytes - least.n_bytes) // cell)


class _Move(NamedTuple):
    extra: int
    gain: float
    group: int
    choice: int


def _improve(groups: Groups, chosen: list[int], budget: int) -> bool:
    """Make the best change of one group, or of two at once, that fits and lowers the error."""
    slack = budget - _solution(groups, chosen).n_bytes
    ups: list[_Move] = []
    downs: list[_Move] = []
    for i, choices in enumerate(groups):
        now = choices[chosen[i]]
        for j, choice in enumerate(choices):
            move = _Move(choice.n_bytes - now.n_bytes, now.error - choice.error, i, j)
            if move.gain > 0:
                ups.append(move)
            elif move.extra < 0:
                downs.append(move)
    # Of the moves that free at least so many bytes, the two groups that lose least: one of them may
    # be the group that grows.
    downs.sort()
    cheapest: list[list[_Move]] = []
    best: list[_Move] = []
    for move in downs:
        by_group: dict[int, _Move] = {}
        for one in sorted([*best, move], key=lambda one: -one.gain):
            by_group.setdefault(one.group, one)
        best = list(by_group.values())[:2]
        cheapest.append(best)
    sizes = [move.extra for move in downs]
    gain = 0.0
    moves: tuple[_Move, ...] = ()
    for up in ups:
        if up.extra <= slack:
            if up.gain > gain:
                gain, moves = up.gain, (up,)
            continue
        last = bisect.bisect_right(sizes, slack - up.extra) - 1
        partners = cheapest[last] if last >= 0 else []
        partner = next((one for one in partners if one.group != up.group), None)
        if partner is not None and up.gain + partner.gain > gain:
            gain, moves = up.gain + partner.gain, (up, partner)
    for move in moves:
        chosen[move.group] = move.choice
    # Differences far below the errors themselves are rounding, and would go back and forth.
    return gain > 1e-12 * _solution(groups, chosen).error


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
