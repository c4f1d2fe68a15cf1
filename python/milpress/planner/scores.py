"""How much error a treatment makes in a weight, from the weight alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from milpress.formats import (
    PalettizeConfig,
    PerBlock,
    PerChannel,
    QuantizeConfig,
    Treatment,
    compress,
)
from milpress.formats.fidelity import ValueCounts, fidelity
from milpress.formats.rows import Floats, as_weight
from milpress.planner.parts import part_of, takes_whole, whole

# Elements of a weight that a treatment is tried on, if trying it on all takes long.
SAMPLE_SIZE = 1 << 15
_LEAST_RUNS = 3
# What the row that suffers most counts of all that are looked up.
_WORST_SHARE = 0.05
# Change it whenever the same weight and treatment may get another score.
VERSION = 2


class Score(NamedTuple):
    """Sums of squares of a weight and of its error; ``sampled`` if not all of it was tried."""

    signal: float
    noise: float
    sampled: bool = False

    @property
    def relative(self) -> float:
        """Noise for each unit of signal; 0 for a weight of zeros, which nothing harms."""
        return self.noise / self.signal if self.signal > 0 else 0.0

    @classmethod
    def mean(cls, scores: Sequence[Score]) -> Score:
        """Return the mean relative error of several weights, as the noise of a signal of 1."""
        noise = sum(score.relative for score in scores) / len(scores)
        return cls(1.0, noise, any(score.sampled for score in scores))


def scores_of(
    weight: Any,
    treatments: Iterable[Treatment],
    *,
    channel_axis: int = 0,
    input_axis: int = 1,
    sample_size: int | None = SAMPLE_SIZE,
) -> dict[Treatment, Score]:
    """Return how much error each treatment makes in a weight.

    One table for a whole weight of float16 is made from the counts of its distinct values, which
    gives what compressing gives. Other treatments are tried on channels that lie evenly over the
    weight, ``sample_size`` elements in all, if it has more: tables and scales belong to channels,
    so those of the sample are just those that compressing makes.

    Parameters
    ----------
    weight
        A float16 or float32 array.
    treatments
        Those that suit its shape, without pruning.
    channel_axis, input_axis
        Axes of the output and input channels.
    sample_size
        ``None`` tries everything on the whole weight.

    Raises
    ------
    UnsupportedError
        If the weight is not finite.
    """
    array = as_weight(weight)
    counts: ValueCounts | None = None
    scores: dict[Treatment, Score] = {}
    for treatment in treatments:
        bits = _bits_of_one_table(treatment)
        if array.dtype == np.float16 and bits is not None:
            counts = counts or ValueCounts.of(array)
            signal, noise, _ = counts.fidelity(2**bits)
            scores[treatment] = Score(signal, noise)
            continue
        part = array
        size = None if sample_size is None else sample_size * _per_entry(treatment)
        if size is not None and array.size > size:
            part = _sample(array, treatment, channel_axis, size)
        value = compress(part, treatment, channel_axis=channel_axis, input_axis=input_axis)
        signal, noise, _ = fidelity(part, value)
        scores[treatment] = Score(signal, noise, part.size < array.size)
    return scores


def lookup_scores_of(
    weight: Any, treatments: Sequence[Treatment], *, channel_axis: int = 0, input_axis: int = 1
) -> dict[Treatment, Score]:
    """Return how much error each treatment makes in rows that are looked up.

    Each row counts with its own relative error, since what it goes into is mostly normalised. The
    row that suffers most counts a twentieth of all: which rows are looked up is not known, and some
    are by every input, such as those of tokens that begin a text, whose values tend to lie far out.

    Parameters
    ----------
    weight, treatments, channel_axis, input_axis
        As of `scores_of`; the output channels are the rows.

    Raises
    ------
    UnsupportedError
        If the weight is not finite.
    """
    array = as_weight(weight)
    rows = np.moveaxis(array, channel_axis, 0).reshape(array.shape[channel_axis], -1)
    power = np.square(rows, dtype=np.float32).sum(1)
    peaks = np.abs(rows).max(1).astype(np.float64) ** 2 / np.where(power > 0, power, 1)
    # High powers: the run of rows with the greatest peak comes first, not that with many.
    part = part_of(peaks**4, rows.shape[1], treatments)
    scores = {}
    for treatment in treatments:
        own = whole(len(rows)) if takes_whole(treatment) else part
        tried = own.of(array, channel_axis)
        value = own.compressed(tried, treatment, channel_axis, input_axis).dense()
        change = np.moveaxis(value.astype(np.float32) - tried, channel_axis, 0)
        noise = np.square(change.reshape(len(own.chosen), -1)).sum(1, dtype=np.float64)
        signal = power[own.chosen]
        relative = noise / np.where(signal > 0, signal, np.inf)
        mean = float(np.average(relative, weights=own.counts))
        worst = float(relative.max(initial=0.0))
        relative_of_all = (1 - _WORST_SHARE) * mean + _WORST_SHARE * worst
        scores[treatment] = Score(1.0, relative_of_all, len(own.chosen) < len(rows))
    return scores


def _per_entry(treatment: Treatment) -> int:
    """Return how much more to try of a table of vectors, which fits a small part too well."""
    return treatment.vector_size**2 if isinstance(treatment, PalettizeConfig) else 1


def _bits_of_one_table(treatment: Treatment) -> int | None:
    """Return the bits of the best table of single values for a whole weight, if it is that."""
    if isinstance(treatment, PalettizeConfig) and treatment == PalettizeConfig(bits=treatment.bits):
        return treatment.bits
    return None


def _sample(array: Floats, treatment: Treatment, axis: int, size: int) -> Floats:
    """Return channels of a weight, as many in a row as share what the treatment makes.

    One from each of equal stretches, at random from a fixed seed: at a fixed distance they may all
    play the same part, such as the first of every attention head.
    """
    n_channels = array.shape[axis]
    together = _channels_together(treatment, n_channels)
    if together is None:
        return array
    if together == n_channels:
        # One table for all, of floats too many to count.
        places = _spread(array.size, min(size, array.size))
        shape = [-1 if i == axis else 1 for i in range(array.ndim)]
        return array.reshape(-1)[places].reshape(shape)
    per_run = array.size // n_channels * together
    n_runs = min(n_channels // together, max(_LEAST_RUNS, size // per_run))
    firsts = _spread(n_channels // together, n_runs) * together
    channels = (firsts[:, None] + np.arange(together)).reshape(-1)
    return np.ascontiguousarray(array.take(channels, axis))


def _spread(n: int, n_chosen: int) -> NDArray[np.intp]:
    """Return one place from each of so many stretches of ``n`` places."""
    ends = np.linspace(0, n, n_chosen + 1).astype(np.intp)
    return np.random.default_rng(0).integers(ends[:-1], ends[1:])


def _channels_together(treatment: Treatment, n_channels: int) -> int | None:
    """Return how many neighbouring output channels share what a treatment makes.

    ``None`` if it can only be tried on the whole weight.
    """
    if isinstance(treatment, PalettizeConfig) and treatment.channel_axis is None:
        if treatment.vector_size > 1:
            return treatment.group_size or treatment.vector_size
        return treatment.group_size or (1 if treatment.channel_scale else n_channels)
    # Integers of the whole range are quick to try, and one channel may hold most of their error.
    if isinstance(treatment, QuantizeConfig) and treatment.range == "mse":
        return 1 if isinstance(treatment.granularity, (PerChannel, PerBlock)) else None
    return None
