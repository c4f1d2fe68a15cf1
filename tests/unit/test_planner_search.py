"""The search: never better than the exact knapsack, and equal to it where theory says so."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from milpress.errors import UnsupportedError
from milpress.planner.search import Choice, Point, curve, hull, knee, solve

# Errors are multiples of 1/64 so that sums are exact and ties are ties.
options = st.builds(
    lambda n_bytes, error: Choice("", n_bytes, error / 64), st.integers(1, 60), st.integers(0, 640)
)
items = st.lists(st.lists(options, min_size=1, max_size=6), min_size=1, max_size=6)


def knapsack(problem, budget):
    """Return the least error within the budget, by dynamic program over every number of bytes."""
    least = {0: 0.0}
    for choices in problem:
        after: dict[int, float] = {}
        for (used, error), option in itertools.product(least.items(), choices):
            n = used + option.n_bytes
            if n <= budget:
                after[n] = min(after.get(n, math.inf), error + option.error)
        least = after
    return min(least.values(), default=None)


@given(problem=items)
def test_each_point_of_the_curve_is_the_optimum_at_its_size(problem):
    points = curve(problem)
    for point in points:
        assert knapsack(problem, point.n_bytes) == point.error
    assert points == sorted(points, key=lambda one: (one.n_bytes, -one.error))


@given(problem=items, budget=st.integers(1, 400))
def test_a_solution_of_few_items_is_the_optimum(problem, budget):
    least = sum(min(option.n_bytes for option in choices) for choices in problem)
    if budget < least:
        with pytest.raises(UnsupportedError, match=f"at least {least} bytes, got {budget}"):
            solve(problem, budget)
        return
    found = solve(problem, budget)
    for choice, choices in zip(found.choices, problem, strict=True):
        assert choice in choices
    assert found.n_bytes == sum(choice.n_bytes for choice in found.choices) <= budget
    assert found.error == sum(choice.error for choice in found.choices)
    # Up to 4,096 bytes beyond the smallest options, the program behind it is exact.
    assert found.error == knapsack(problem, budget)


@given(problem=st.lists(st.lists(options, min_size=1, max_size=3), min_size=65, max_size=70))
def test_with_many_items_a_solution_lies_between_the_optimum_and_the_curve(problem):
    least = sum(min(option.n_bytes for option in choices) for choices in problem)
    budget = least + 100
    found = solve(problem, budget)
    assert found.n_bytes <= budget
    below = [point for point in curve(problem) if point.n_bytes <= budget]
    assert knapsack(problem, budget) <= found.error <= below[-1].error


@given(problem=items, budget=st.integers(100, 400))
def test_no_single_change_improves_a_solution(problem, budget):
    found = solve(problem, budget) if budget >= 360 else None
    if found is None:
        return
    for i, choices in enumerate(problem):
        now = found.choices[i]
        for option in choices:
            if option.error < now.error:
                assert found.n_bytes - now.n_bytes + option.n_bytes > budget


def test_a_pair_of_changes_fills_the_budget():
    # By gain per byte the first item takes all the room; the optimum gives it to the second.
    problem = [
        [Choice("small", 1, 10.0), Choice("large", 7, 3.0)],
        [Choice("small", 1, 10.0), Choice("large", 10, 1.0)],
    ]
    assert solve(problem, 11).choices == (problem[0][0], problem[1][1])


def test_the_hull_leaves_out_what_costs_more_and_spoils_more():
    offered = [
        Choice("a", 10, 1.0),
        Choice("worse and larger", 12, 1.5),
        Choice("b", 20, 0.5),
        Choice("above the line", 15, 0.9),
        Choice("same size, worse", 10, 2.0),
    ]
    assert hull(offered) == [offered[0], offered[2]]


def test_the_knee_is_the_farthest_point_below_the_line():
    assert knee([Point(0, 8.0), Point(1, 2.0), Point(2, 1.0), Point(8, 0.0)]) == 1
    assert knee([Point(3, 1.0)]) == 0
