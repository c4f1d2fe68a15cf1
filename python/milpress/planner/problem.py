"""Plans as a problem: what is asked for, and which choices meet it with the least error."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from milpress.errors import ConfigError, UnsupportedError
from milpress.mil.package import Package, n_package_bytes
from milpress.planner import search
from milpress.planner.groups import WeightGroup
from milpress.planner.menu import KEEP
from milpress.planner.plan import CurvePoint, Plan, PlannedWeight
from milpress.planner.search import Choice, Groups, Point, Solution
from milpress.planner.sizes import package_bytes
from milpress.recipe import DEFAULT_MIN_SIZE, Keep, Recipe, Rule, Select, Step
from milpress.show import decibels

_MOST_TRIES = 8
# The part of a budget that meets it.
_MET = 0.99
Errors: TypeAlias = Sequence[Mapping[str, float]]
# Returns the error of the outputs with a format for each group.
Run: TypeAlias = Callable[[Sequence[str]], float]
_MOST_UNIFORM = 3
_Kind: TypeAlias = Literal["bits", "size", "snr"]


@dataclass(frozen=True, slots=True)
class Goal:
    """What is asked of a plan: ``bits`` or ``size`` at most, or ``snr`` at least."""

    kind: _Kind
    number: float

    @classmethod
    def of(cls, bits: float | None, size: int | None, snr: float | None) -> Goal:
        """Return the goal that is given, which must be one."""
        numbers: dict[_Kind, float | None] = {"bits": bits, "size": size, "snr": snr}
        goals = [cls(kind, number) for kind, number in numbers.items() if number is not None]
        if len(goals) != 1:
            msg = (
                "one of target_bits, target_size and min_snr must be given, "
                f"got {' and '.join(goal.kind for goal in goals) or 'none'}"
            )
            raise ConfigError(msg)
        (goal,) = goals
        if not math.isfinite(goal.number) or (goal.kind != "snr" and goal.number <= 0):
            msg = f"the target must be a positive number, got {goal.number}"
            raise ConfigError(msg)
        return goal


class Problem:
    """Groups of weights, what is asked of them, and how plans are made of that."""

    def __init__(
        self,
        package: Package,
        groups: Sequence[WeightGroup],
        goal: Goal,
        *,
        target: str | None,
        min_size: int,
    ) -> None:
        self._package = package
        self._groups = groups
        self._open = [group for group in groups if group.choices]
        self._goal = goal
        self._target = target
        self._min_size = min(min_size, DEFAULT_MIN_SIZE)
        self._fixed_bytes = sum(group.n_bytes for group in groups if not group.choices)
        self._size = sum(group.size for group in groups)
        self._package_bytes: dict[tuple[str, ...], int] = {}

    def formats(self, errors: Errors) -> tuple[str, ...]:
        """Return formats for the errors of outputs, the rest of the package's size being guessed.

        Parameters
        ----------
        errors
            Of each group that has choices, the error of each format.
        """
        return self._solve_by_guess(self._choices(errors)).formats

    def plan(
        self,
        errors: Errors | None,
        max_formats: int | None,
        notes: Sequence[str],
        *,
        scored_by: Literal["weights", "outputs"] = "weights",
        others: Sequence[Errors] = (),
        run: Run | None = None,
    ) -> Plan:
        """Return the plan of least error; by those of weights if no others are given.

        With ``run``, plans by ``others`` and the best uniform settings of no larger size are run
        too, and the plan is what does best.
        """
        every = groups = self._choices(errors)
        if max_formats is not None:
            groups = self._with_few_formats(groups, max_formats)
        solution = self._solve(groups)
        if run is not None:
            plans = list(self._other_plans(others, every, max_formats))
            uniform = self._uniform(every, solution)
            # Only real samples can tell that something far smaller is better.
            if scored_by == "weights" and self._meets(solution):
                plans, uniform = (
                    [one for one in some if self._meets(one)] for some in (plans, uniform)
                )
            solution, note = _best([solution, *plans, *uniform[:_MOST_UNIFORM]], run)
            notes = [*notes, note]
        choices = dict(zip(self._open, solution.choices, strict=True))
        n_package = self._size_of(solution)
        n_bytes = solution.n_bytes + self._fixed_bytes
        points = search.curve(groups)
        curve = tuple(
            CurvePoint(
                package_bytes=point.n_bytes - solution.n_bytes + n_package,
                bits_per_weight=8 * (point.n_bytes + self._fixed_bytes) / self._size,
                snr_db=_snr_db(point.error),
            )
            for point in points
        )
        bits = 8 * n_bytes / self._size
        return Plan(
            source=str(self._package.path),
            recipe=self._recipe(solution),
            weights=tuple(
                weight for group in self._groups for weight in _planned(group, choices.get(group))
            ),
            n_bytes=n_bytes,
            package_bytes=n_package,
            bits_per_weight=bits,
            snr_db=_snr_db(solution.error),
            scored_by=scored_by,
            curve=curve,
            knee=search.knee(_compressed_part(points, groups)),
            notes=(*notes, *self._remarks(n_package, bits, points)),
        )

    def _choices(self, errors: Errors | None) -> Groups:
        """Return the choices of all groups that have some, each with its error."""
        whole = sum(group.share for group in self._open)
        if errors is None:
            errors = [
                {name: group.share / whole * score.relative for name, score in group.scores.items()}
                for group in self._open
            ]
        return [
            [choice._replace(error=known.get(name, 0.0)) for name, choice in group.choices.items()]
            for group, known in zip(self._open, errors, strict=True)
        ]

    def _other_plans(
        self, others: Sequence[Errors], groups: Groups, max_formats: int | None
    ) -> Iterator[Solution]:
        """Yield the plans by errors that are counted otherwise."""
        for errors in others if self._goal.kind != "snr" else ():
            choices = self._choices(errors)
            if max_formats is not None:
                choices = self._with_few_formats(choices, max_formats)
            yield _solution(groups, self._solve(choices).formats)

    def _uniform(self, groups: Groups, solution: Solution) -> list[Solution]:
        """Return the uniform settings within the budget, those of least error first."""
        names = list(dict.fromkeys(one.format for choices in groups for one in choices))
        found = []
        for name in names:
            formats = [_like(name, choices) for choices in groups]
            if name != KEEP and None not in formats:
                uniform = _solution(groups, [each or "" for each in formats])
                if self._fits(uniform, solution):
                    found.append(uniform)
        return sorted(found, key=lambda one: one.error)

    def _meets(self, solution: Solution) -> bool:
        """Whether a solution takes what it may, but for a hundredth."""
        if self._goal.kind == "size":
            return self._size_of(solution) >= _MET * self._goal.number
        bits = 8 * (solution.n_bytes + self._fixed_bytes) / self._size
        return self._goal.kind == "snr" or bits >= _MET * self._goal.number

    def _fits(self, other: Solution, solution: Solution) -> bool:
        """Whether another solution is within the budget that one is made for."""
        if other.n_bytes <= solution.n_bytes or self._goal.kind == "snr":
            return self._goal.kind != "snr"
        if self._goal.kind == "size":
            return self._size_of(other) <= self._goal.number
        return 8 * (other.n_bytes + self._fixed_bytes) <= self._goal.number * self._size

    def _solve(self, groups: Groups) -> Solution:
        if self._goal.kind == "bits":
            self._check_bits(groups)
            whole = self._goal.number * self._size / 8
            budget, floor = (int(part * whole) - self._fixed_bytes for part in (1, _MET))
            return search.solve(groups, budget, floor + 1)
        if self._goal.kind == "snr":
            return search.solve(groups, self._budget_for_snr(groups))
        return self._solve_within_size(groups)

    def _solve_by_guess(self, groups: Groups) -> Solution:
        """Solve, the size of the rest of the package being guessed."""
        if self._goal.kind != "size":
            return self._solve(groups)
        rest = n_package_bytes(self._package.path) - sum(group.n_bytes for group in self._groups)
        budget = int(self._goal.number) - rest - self._fixed_bytes
        least = search.smallest(groups)
        if budget < least.n_bytes:
            # By the guess nothing fits; by what the package takes the smallest may.
            self._check_size(least)
        return search.solve(groups, max(budget, least.n_bytes))

    def _check_bits(self, groups: Groups) -> None:
        """Refuse fewer bits than the smallest formats take, with what is left as it is."""
        least = search.smallest(groups).n_bytes + self._fixed_bytes
        if least > self._goal.number * self._size / 8:
            # Rounded up, so that what is said can be had.
            bits = math.ceil(8 * least / self._size * 100 + 1e-6) / 100
            msg = (
                f"{self._package.path}: target_bits must be at least {bits:.2f}, which the "
                f"smallest formats and what is left as it is take, got {self._goal.number:g}"
            )
            raise UnsupportedError(msg)

    def _check_size(self, least: Solution) -> None:
        """Refuse a size that no package gets down to."""
        n_bytes, size = self._size_of(least), int(self._goal.number)
        if n_bytes > size:
            msg = f"{self._package.path}: the package takes {n_bytes} bytes at least, got {size}"
            raise UnsupportedError(msg)

    def _budget_for_snr(self, groups: Groups) -> int:
        """Return the least budget on the curve that gives the score."""
        points = search.curve(groups)
        for point in points:
            if _snr_db(point.error) >= self._goal.number:
                return point.n_bytes
        msg = (
            f"{self._package.path}: the score can be {_snr_db(points[-1].error):.1f} dB at most, "
            f"got {self._goal.number:.1f}"
        )
        raise UnsupportedError(msg)

    def _solve_within_size(self, groups: Groups) -> Solution:
        """Solve such that the package has at most that size, whatever else is in it."""
        size = int(self._goal.number)
        best = search.smallest(groups)
        self._check_size(best)
        rest = self._size_of(best) - best.n_bytes
        for _ in range(_MOST_TRIES):
            try:
                solution = search.solve(groups, size - rest, int(_MET * size) - rest + 1)
            except UnsupportedError:
                break
            n_package = self._size_of(solution)
            if n_package <= size:
                best = solution
                if n_package - solution.n_bytes >= rest:
                    break
                rest = n_package - solution.n_bytes
            else:
                rest += n_package - size
        return best

    def _with_few_formats(self, groups: Groups, most: int) -> Groups:
        """Take formats out, each time the one that is missed least, until few enough are left."""
        while True:
            used = set(self._solve(groups).formats) - {KEEP}
            if len(used) <= most:
                return groups
            tries: list[tuple[float, float, str, Groups]] = []
            for name in sorted(used):
                rest = [[choice for choice in some if choice.format != name] for some in groups]
                if all(rest):
                    with contextlib.suppress(UnsupportedError):
                        solution = self._solve_by_guess(rest)
                        cost = (solution.error, float(solution.n_bytes))
                        cost = cost[::-1] if self._goal.kind == "snr" else cost
                        tries.append((*cost, name, rest))
            if not tries:
                msg = f"{self._package.path}: no plan with at most {most} formats was found"
                raise UnsupportedError(msg)
            _, _, _, groups = min(tries, key=lambda one: one[:3])

    def _size_of(self, solution: Solution) -> int:
        """Return the size of the package that a solution makes."""
        key = solution.formats
        if key not in self._package_bytes:
            source = self._package.reopened()
            self._package_bytes[key] = package_bytes(source, self._recipe(solution))
        return self._package_bytes[key]

    def _recipe(self, solution: Solution) -> Recipe:
        choices = dict(zip(self._open, solution.choices, strict=True))
        rules = tuple(
            Rule(
                select=Select(name=_exactly(weight.name), min_size=self._min_size),
                treatment=treatment or Keep(),
            )
            for group in self._groups
            for weight, treatment in zip(
                group.weights, group.treatments(choices.get(group)), strict=True
            )
        )
        return Recipe(steps=(Step(rules=rules),), target=self._target)

    def _remarks(self, n_package: int, bits: float, points: Sequence[Point]) -> list[str]:
        goal = self._goal
        number = {"bits": bits, "size": float(n_package), "snr": goal.number}[goal.kind]
        if number >= _MET * goal.number:
            return []
        most = points[-1].n_bytes + self._fixed_bytes
        if 8 * most / self._size <= bits:
            return ["the budget is more than all weights take with the least error"]
        return ["no choice within 1 % of the budget has as little error as this smaller one"]


def _best(solutions: Sequence[Solution], run: Run) -> tuple[Solution, str]:
    """Return the solution whose outputs have the least error, the first of equals, and which."""
    distinct = list({solution.formats: solution for solution in solutions}.values())
    errors = [run(solution.formats) for solution in distinct]
    best = min(range(len(distinct)), key=errors.__getitem__)
    snr = f"{_snr_db(errors[best]):.1f} dB"
    note = f"the model was run with {len(distinct)} plans and uniform settings: {snr} at best"
    return distinct[best], note


def _solution(groups: Groups, formats: Sequence[str]) -> Solution:
    return Solution(
        tuple(
            next(choice for choice in choices if choice.format == name)
            for choices, name in zip(groups, formats, strict=True)
        )
    )


def _like(name: str, choices: Sequence[Choice]) -> str | None:
    """Return a format that some weight has, or what comes nearest to it among its choices."""
    known = {choice.format for choice in choices}
    bits = re.sub(r"\D*(\d).*", r"\1", name)
    nearest = (name, f"palette-{bits}", f"int{bits}", KEEP)
    return next((each for each in nearest if each in known), None)


def _planned(group: WeightGroup, choice: Choice | None) -> list[PlannedWeight]:
    score = None if choice is None else group.scores.get(choice.format)
    n_bytes = group.n_bytes if choice is None else choice.n_bytes
    distinct = group.distinct
    treatments = group.treatments(choice)
    return [
        PlannedWeight(
            name=weight.name,
            op_types=weight.op_types,
            shape=weight.shape,
            format=KEEP if choice is None else choice.format,
            treatment=treatments[i],
            n_bytes=0 if i else n_bytes,
            snr_db=None if score is None else _snr_db(score.relative),
            is_estimate=score is not None and score.sampled,
            error=0.0 if choice is None or i else choice.error,
            shares_with=group.name if i and i not in distinct else None,
            reason=group.reason,
        )
        for i, weight in enumerate(group.weights)
    ]


def _snr_db(relative: float) -> float:
    """Return the signal-to-noise ratio of an error relative to its signal."""
    return -decibels(relative, 1.0)


def _compressed_part(points: Sequence[Point], groups: Groups) -> list[Point]:
    """Return the curve up to where every weight has the least error short of being kept."""
    most = sum(
        max((one.n_bytes for one in some if one.format != KEEP), default=some[0].n_bytes)
        for some in groups
    )
    return [point for point in points if point.n_bytes <= most] or [points[0]]


def _exactly(name: str) -> str:
    """Return the selection of a weight by its name, even if that looks like a pattern."""
    return f"re:{re.escape(name)}" if name.startswith(("re:", "glob:")) else name
