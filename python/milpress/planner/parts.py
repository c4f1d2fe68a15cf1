"""Parts of weights that treatments are tried on: channels that count most, and others evenly."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from milpress.formats import (
    Compressed,
    PalettizeConfig,
    PerTensor,
    QuantizeConfig,
    Treatment,
    compress,
)

# Elements of a weight that treatments are tried on, if trying them on all takes long.
_PART_SIZE = 1 << 16
_LEAST_RUNS = 4
# Of the runs that are tried, those that count most; the rest lie evenly over the weight.
_TOP_SHARE = 4


class Part(NamedTuple):
    """Channels of a weight, in order.

    Parameters
    ----------
    chosen
        Their places.
    counts
        How many channels each stands for.
    is_top
        Which stand for themselves only.
    others
        The channels that the rest stand for.
    factor
        What these and the rest count together, beside the rest alone.
    """

    chosen: NDArray[np.intp]
    counts: NDArray[np.float64]
    is_top: NDArray[np.bool_]
    others: NDArray[np.intp]
    factor: float

    def of(self, weight: NDArray[Any], axis: int) -> NDArray[Any]:
        """Return these channels of a weight."""
        return np.ascontiguousarray(weight.take(self.chosen, axis))

    def compressed(
        self, array: NDArray[Any], treatment: Treatment, channel_axis: int, input_axis: int
    ) -> Compressed:
        """Treat what `of` returns, each channel counting as many as it stands for."""
        importance = None
        if isinstance(treatment, PalettizeConfig) and self.counts.max() > self.counts.min():
            shape = [-1 if i == channel_axis else 1 for i in range(array.ndim)]
            counts = self.counts.reshape(shape).astype(np.float32)
            importance = np.ascontiguousarray(np.broadcast_to(counts, array.shape))
        return compress(
            array,
            treatment,
            channel_axis=channel_axis,
            input_axis=input_axis,
            importance=importance,
        )


def whole(n_channels: int) -> Part:
    """Return all channels."""
    none = np.zeros(0, np.intp)
    ones = np.ones(n_channels)
    return Part(np.arange(n_channels), ones, ones > 0, none, 1.0)


def takes_whole(treatment: Treatment) -> bool:
    """Whether a treatment can only be tried on a whole weight."""
    return isinstance(treatment, QuantizeConfig) and isinstance(treatment.granularity, PerTensor)


def part_of(
    counts: NDArray[np.floating[Any]], n_places: int, treatments: Iterable[Treatment]
) -> Part:
    """Return the part of a weight that treatments are tried on.

    It consists of runs of channels that hold whole groups and vectors of all treatments: those that
    count most, and one from each of equal stretches of the others, at random from a fixed seed.

    Parameters
    ----------
    counts
        What each channel counts.
    n_places
        The size of a channel.
    treatments
        What is to be tried.
    """
    n_channels = len(counts)
    run = _run_length(treatments, n_channels)
    n_runs = n_channels // run
    n_tried = max(_LEAST_RUNS, _PART_SIZE // (run * n_places))
    if 2 * n_tried >= n_runs:
        return whole(n_channels)
    by_run = counts.astype(np.float64).reshape(n_runs, run).sum(1)
    n_top = max(1, n_tried // _TOP_SHARE)
    is_top = np.zeros(n_runs, np.bool_)
    is_top[np.argsort(-by_run, kind="stable")[:n_top]] = True
    below = np.flatnonzero(~is_top)
    ends = np.linspace(0, len(below), n_tried - n_top + 1).astype(np.intp)
    even = below[np.random.default_rng(0).integers(ends[:-1], ends[1:])]
    is_tried = is_top.copy()
    is_tried[even] = True
    runs = np.flatnonzero(is_tried)
    tried, all_below = by_run[even].sum(), by_run[below].sum()
    own = np.where(is_top[runs], 1.0, len(below) / len(even))
    return Part(
        _channels(runs, run),
        np.repeat(own, run),
        np.repeat(is_top[runs], run),
        _channels(np.flatnonzero(~is_tried), run),
        float(all_below / tried) if tried > 0 else 1.0,
    )


def _channels(runs: NDArray[np.intp], run: int) -> NDArray[np.intp]:
    return np.asarray((runs[:, None] * run + np.arange(run)).reshape(-1))


def _run_length(treatments: Iterable[Treatment], n_channels: int) -> int:
    """Return how many channels in a row hold whole groups and vectors of all treatments."""
    sizes = [1]
    for treatment in treatments:
        if isinstance(treatment, PalettizeConfig):
            if treatment.channel_axis is not None:
                return n_channels
            sizes += [treatment.group_size or 1, treatment.vector_size]
    length = math.lcm(*sizes)
    return length if n_channels % length == 0 else n_channels
