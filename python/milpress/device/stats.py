"""Statistics of latencies: order statistics, and intervals by resampling whole rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from milpress.errors import ConfigError

# Enough that the ends of a 95 % interval move by less than what rounds differ by.
_N_RESAMPLES = 1000


class Interval(NamedTuple):
    """A 95 % interval."""

    low: float
    high: float


class Ratio(NamedTuple):
    """How many times longer one takes than another: the median over rounds, and its interval."""

    value: float
    interval: Interval
    n_rounds: int


def median(values: Sequence[float]) -> float:
    """Return the value in the middle, or the mean of the two there."""
    return float(np.median(np.asarray(values, np.float64)))


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the value that so many percent are below, between neighbours by straight line."""
    return float(np.percentile(np.asarray(values, np.float64), percent))


def order_statistics(values: Sequence[float]) -> dict[str, float]:
    """Return the statistics of a `milpress.device.schema.Distribution` that have no interval."""
    return {
        "median": median(values),
        "p90": percentile(values, 90),
        "p99": percentile(values, 99),
        "minimum": min(values),
        "maximum": max(values),
    }


def median_interval(rounds: Sequence[Sequence[float]]) -> Interval:
    """Return a bootstrap interval of the median of all samples.

    Samples of a round are alike, as they share what the machine does at that time, so whole rounds
    are drawn; a single round is resampled by itself. The draw is the same in every call.

    Raises
    ------
    ConfigError
        If there is no sample.
    """
    kept = [np.asarray(each, np.float64) for each in rounds if len(each)]
    if not kept:
        msg = "an interval needs at least 1 sample"
        raise ConfigError(msg)
    rng = np.random.default_rng(0)
    if len(kept) == 1:
        draws = rng.integers(0, len(kept[0]), (_N_RESAMPLES, len(kept[0])))
        return _ends(np.median(kept[0][draws], axis=1))
    draws = rng.integers(0, len(kept), (_N_RESAMPLES, len(kept)))
    if len({len(each) for each in kept}) == 1:
        return _ends(np.median(np.array(kept)[draws].reshape(_N_RESAMPLES, -1), axis=1))
    return _ends(np.array([np.median(np.concatenate([kept[i] for i in draw])) for draw in draws]))


def paired_ratio(
    baseline: Mapping[int, Sequence[float]], other: Mapping[int, Sequence[float]]
) -> Ratio | None:
    """Return the ratio of two configurations that took turns; ``None`` if they share no round.

    Parameters
    ----------
    baseline, other
        Samples by the index of their round. What slows the machine in a round slows both, so the
        medians of each round are divided, and the rounds are what is resampled.
    """
    shared = [i for i in baseline if i in other and len(baseline[i]) and len(other[i])]
    if not shared:
        return None
    ratios = np.array([median(other[i]) / median(baseline[i]) for i in shared])
    draws = np.random.default_rng(0).integers(0, len(ratios), (_N_RESAMPLES, len(ratios)))
    return Ratio(
        float(np.median(ratios)), _ends(np.median(ratios[draws], axis=1)), n_rounds=len(ratios)
    )


def relative_half_width(value: float, interval: Interval) -> float:
    """Return half the width of an interval, as a share of the value."""
    return (interval.high - interval.low) / 2 / value if value > 0 else float("inf")


def _ends(medians: NDArray[np.float64]) -> Interval:
    low, high = np.percentile(medians, (2.5, 97.5))
    return Interval(float(low), float(high))
