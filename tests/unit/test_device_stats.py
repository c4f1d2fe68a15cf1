"""Statistics of latencies, beside the plainest way to compute them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from milpress.device import stats
from milpress.device.schema import Distribution
from milpress.errors import ConfigError

# Multiples of 1/8, so that means of two are exact.
latencies = st.integers(1, 800).map(lambda n: n / 8)


@given(st.lists(latencies, min_size=1, max_size=30), st.integers(0, 100))
def test_a_percentile_lies_on_the_line_between_neighbours(values, percent):
    ordered = sorted(values)
    position = percent / 100 * (len(ordered) - 1)
    low = ordered[math.floor(position)]
    high = ordered[math.ceil(position)]
    expected = low + (high - low) * (position - math.floor(position))
    # One rounding of the position, which moves the value by its slope, and two of the value.
    tolerance = 4 * 2**-52 * (100 * (high - low) + high)
    assert stats.percentile(values, percent) == pytest.approx(expected, abs=tolerance)


@given(st.lists(latencies, min_size=1, max_size=30))
def test_a_median_has_as_many_above_as_below(values):
    ordered = sorted(values)
    middle = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    assert stats.median(values) == sum(middle) / 2


# A busy machine may take long for a thousand resamples: no limit of time.
@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(latencies, min_size=1, max_size=6), min_size=1, max_size=6))
def test_an_interval_is_within_the_samples_and_the_same_each_time(rounds):
    flat = [sample for each in rounds for sample in each]
    interval = stats.median_interval(rounds)
    assert min(flat) <= interval.low <= interval.high <= max(flat)
    assert stats.median_interval(rounds) == interval


def test_an_interval_is_of_rounds_and_not_of_samples():
    # Rounds of one value each: a thousand samples, and yet only four things are known.
    rounds = [[float(value)] * 250 for value in (1, 2, 3, 4)]
    interval = stats.median_interval(rounds)
    assert interval.low == 1
    assert interval.high == 4
    assert stats.median_interval([[each for row in rounds for each in row]]) != interval


def test_an_interval_holds_the_median_about_as_often_as_it_says():
    rng = np.random.default_rng(5)
    n_runs, n_held = 300, 0
    for _ in range(n_runs):
        # The true median is 10; rounds differ, as do samples of a round.
        rounds = [10 + rng.normal(0, 0.3) + rng.normal(0, 1, 9) for _ in range(15)]
        interval = stats.median_interval(rounds)
        n_held += interval.low <= 10 <= interval.high
    # A bootstrap of 15 rounds is a little narrow; four standard deviations below 90 %.
    assert n_held / n_runs > 0.90 - 4 * math.sqrt(0.9 * 0.1 / n_runs)


def test_rounds_of_different_sizes_are_pooled():
    interval = stats.median_interval([[1.0], [1.0, 1.0, 1.0], []])
    assert interval == (1.0, 1.0)
    with pytest.raises(ConfigError, match="an interval needs at least 1 sample"):
        stats.median_interval([[]])


def test_a_paired_ratio_is_blind_to_what_slows_both():
    slowness = {0: 1.0, 1: 8.0, 2: 2.0, 3: 1.0}
    baseline = {i: [each, each, 4 * each] for i, each in slowness.items()}
    other = {i: [0.5 * each, 0.5 * each, each] for i, each in slowness.items()}
    assert stats.paired_ratio(baseline, other) == (0.5, (0.5, 0.5), 4)


def test_a_paired_ratio_takes_the_rounds_that_both_have():
    found = stats.paired_ratio({0: [1.0], 2: [1.0], 3: []}, {1: [9.0], 2: [3.0], 3: [1.0]})
    assert found == (3.0, (3.0, 3.0), 1)
    assert stats.paired_ratio({0: [1.0]}, {1: [1.0]}) is None


def test_a_distribution_gives_its_rounds_back():
    rounds = {0: (1.0, 2.0), 3: (4.0,), 5: (0.5, 0.25, 8.0)}
    made = Distribution.of(rounds)
    assert made.by_round == rounds
    assert (made.minimum, made.median, made.maximum) == (0.25, 1.5, 8.0)


@pytest.mark.parametrize(("value", "expected"), [(2.0, 0.25), (0.0, math.inf)])
def test_a_half_width_is_a_share_of_the_value(value, expected):
    assert stats.relative_half_width(value, stats.Interval(1.5, 2.5)) == expected
