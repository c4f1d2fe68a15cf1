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
    """What may be done to a group of weights, and how many bytes they take then.

    ``error`` is what it adds to the error that a plan keeps small; there are ``treatments`` of each
    of the weights, or none if they stay.
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


def hull(choices: Sequence[Choice]) -> list[Choice]:
    """Return the choices on the lower convex hull of size and error, smallest first."""
    points: list[Choice] = []
    for choice in sorted(choices, key=_by_size):
        if points and choice.error >= points[-1].error:
            continue
        while len(points) > 1 and _slope(points[-2], choice) >= _slope(points[-2], points[-1]):
            points.pop()
        points.append(choice)
    return points


def _by_size(choice: Choice) -> tuple[int, float]:
    return choice.n_bytes, choice.error


def _slope(small: Choice, large: Choice) -> float:
    """Return how much error a byte takes away from one choice to a larger one."""
    extra = large.n_bytes - small.n_bytes
    return math.inf if extra <= 0 else (small.error - large.error) / extra


def curve(groups: Groups) -> list[Point]:
    """Return sizes and errors of the best choices by gain per byte, smallest first.

    Each of these choices has the least error that any choice of at most its size has.
    """
    hulls = [hull(choices) for choices in groups]
    n_bytes = sum(choices[0].n_bytes for choices in hulls)
    # Sums are taken exactly: thousands of differences would add up their rounding.
    errors = [choices[0].error for choices in hulls]
    points = [Point(n_bytes, math.fsum(errors))]
    for _, i, j in sorted(_steps(hulls)):
        n_bytes += hulls[i][j].n_bytes - hulls[i][j - 1].n_bytes
        errors[i] = hulls[i][j].error
        points.append(Point(n_bytes, math.fsum(errors)))
    return points


def _steps(hulls: Groups) -> list[tuple[float, int, int]]:
    """Return all steps along the hulls as ``(-gain per byte, group, place on its hull)``."""
    return [
        (-_slope(choices[j - 1], choices[j]), i, j)
        for i, choices in enumerate(hulls)
        for j in range(1, len(choices))
    ]


def smallest(groups: Groups) -> Solution:
    """Return the smallest choice for each group, of equals that of the least error."""
    return Solution(tuple(min(choices, key=_by_size) for choices in groups))


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
    least = smallest(groups)
    if least.n_bytes > budget:
        msg = f"the budget must be at least {least.n_bytes} bytes, got {budget}"
        raise UnsupportedError(msg)
    starts = [_greedy(groups, least, budget)]
    if len(groups) <= _MOST_FOR_PROGRAM:
        starts.append(_program(groups, least, budget))
    best = min(
        (_improved(groups, one, budget) for one in starts), key=lambda s: (s.error, s.n_bytes)
    )
    if best.n_bytes < at_least and len(groups) <= _MOST_FOR_PROGRAM:
        larger = _program(groups, least, budget, at_least)
        if larger.n_bytes >= at_least and larger.error <= _AS_GOOD_AS * best.error:
            return larger
    return best


def _greedy(groups: Groups, least: Solution, budget: int) -> Solution:
    """Take steps along the hulls by gain per byte, as long as they fit."""
    hulls = [hull(choices) for choices in groups]
    chosen = list(least.choices)
    room = budget - least.n_bytes
    heap = [step for step in _steps(hulls) if step[2] == 1]
    heapq.heapify(heap)
    while heap:
        _, i, j = heapq.heappop(heap)
        extra = hulls[i][j].n_bytes - hulls[i][j - 1].n_bytes
        if extra > room:
            continue
        room -= extra
        chosen[i] = hulls[i][j]
        if j + 1 < len(hulls[i]):
            heapq.heappush(heap, (-_slope(hulls[i][j], hulls[i][j + 1]), i, j + 1))
    return Solution(tuple(chosen))


def _program(groups: Groups, least: Solution, budget: int, at_least: int = 0) -> Solution:
    """Return the choices of least error between two sizes, counted in cells beyond the smallest.

    Where no choices are as large as ``at_least``, those of least error are returned.
    """
    room = budget - least.n_bytes
    cell = max(1, room // _N_CELLS)
    n_cells = room // cell
    cells = [
        [-(-(choice.n_bytes - first.n_bytes) // cell) for choice in choices]
        for choices, first in zip(groups, least.choices, strict=True)
    ]
    errors = np.full(n_cells + 1, np.inf)
    errors[0] = 0
    taken = np.zeros((len(groups), n_cells + 1), np.intp)
    for i, choices in enumerate(groups):
        after = np.full(n_cells + 1, np.inf)
        for j, (choice, n) in enumerate(zip(choices, cells[i], strict=True)):
            if n <= n_cells:
                error = errors[: n_cells + 1 - n] + choice.error
                better = error < after[n:]
                after[n:][better] = error[better]
                taken[i, n:][better] = j
        errors = after
    # Each group's cells are rounded up by less than one.
    missing = at_least - least.n_bytes
    first = -(-missing // cell) + len(groups) if missing > 0 else 0
    if first > n_cells or not np.isfinite(errors[first:]).any():
        first = 0
    at = first + int(np.argmin(errors[first:]))
    chosen: list[Choice] = []
    for i in reversed(range(len(groups))):
        j = int(taken[i, at])
        chosen.append(groups[i][j])
        at -= cells[i][j]
    return Solution(tuple(reversed(chosen)))


class _Move(NamedTuple):
    extra: int
    gain: float
    group: int
    choice: int


def _improved(groups: Groups, solution: Solution, budget: int) -> Solution:
    """Change one group, or two at once, as long as that fits and lowers the error."""
    for _ in range(_MOST_CHANGES):
        moves = _best_moves(groups, solution, budget)
        chosen = list(solution.choices)
        for move in moves:
            chosen[move.group] = groups[move.group][move.choice]
        solution = Solution(tuple(chosen))
        # Differences far below the errors themselves are rounding, and would go back and forth.
        if sum(move.gain for move in moves) <= 1e-12 * solution.error:
            break
    return solution


def _best_moves(groups: Groups, solution: Solution, budget: int) -> tuple[_Move, ...]:
    slack = budget - solution.n_bytes
    ups: list[_Move] = []
    downs: list[_Move] = []
    for i, (choices, now) in enumerate(zip(groups, solution.choices, strict=True)):
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
    return moves


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
