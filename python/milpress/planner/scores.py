"""How much error a treatment makes in a weight, from the weight alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import milpress._core as _core
from milpress.formats import (
    Palette,
    PalettizeConfig,
    PerBlock,
    PerChannel,
    QuantizeConfig,
    Quantized,
    Treatment,
    compress,
)
from milpress.formats.rows import Floats, as_weight, to_rows

# Elements of a weight that a treatment is tried on, if trying it on all takes long.
SAMPLE_SIZE = 1 << 15
_LEAST_RUNS = 3
# Change it whenever the same weight and treatment may get another score.
VERSION = 1


class Score(NamedTuple):
    """Sums of squares of a weight and of its error; ``sampled`` if not all of it was tried."""

    signal: float
    noise: float
    sampled: bool = False

    @property
    def relative(self) -> float:
        """Noise for each unit of signal; 0 for a weight of zeros, which nothing harms."""
        return self.noise / self.signal if self.signal > 0 else 0.0


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
    known: _Counts | None = None
    found: dict[Treatment, Score] = {}
    for treatment in treatments:
        bits = _bits_of_one_table(treatment)
        if array.dtype == np.float16 and bits is not None:
            known = known or _Counts.of(array)
            found[treatment] = known.score(2**bits)
            continue
        part = array
        if sample_size is not None and array.size > sample_size:
            part = _sample(array, treatment, channel_axis, sample_size)
        value = compress(part, treatment, channel_axis=channel_axis, input_axis=input_axis)
        found[treatment] = score_of(part, value)._replace(sampled=part.size < array.size)
    return found


def score_of(weight: Floats, value: Any) -> Score:
    """Compare what a weight was made of with the weight."""
    if isinstance(value, Palette) and value.vector_size == 1:
        signal, noise, _ = _core.compare_palette(to_rows(weight, value.group_shape), *value.rows())
    elif isinstance(value, Quantized):
        signal, noise, _ = _core.compare_quantized(
            to_rows(weight, value.block_shape), *value.rows()
        )
    else:
        signal, noise, _ = _core.compare(weight.reshape(-1), value.dense().reshape(-1))
    return Score(signal, noise)


def _bits_of_one_table(treatment: Treatment) -> int | None:
    """Return the bits of the best table of single values for a whole weight, if it is that."""
    if isinstance(treatment, PalettizeConfig) and treatment == PalettizeConfig(bits=treatment.bits):
        return treatment.bits
    return None


class _Counts(NamedTuple):
    """The distinct values of a weight of float16, and how often each occurs."""

    values: NDArray[np.float64]
    counts: NDArray[np.float64]

    @classmethod
    def of(cls, array: Floats) -> _Counts:
        return cls(*_core.value_counts(array.reshape(-1)))

    def score(self, n_entries: int) -> Score:
        """Return what the best table of so many entries gives."""
        rows = self.values.astype(np.float16)[None]
        # float32 holds counts up to 2**24, and few weights have so many equal values.
        luts = _core.kmeans1d(rows, n_entries, self.counts.astype(np.float32)[None])
        error = self.values - luts[0][_core.lut_assign(rows, luts)[0]]
        squares = self.values * self.values
        return Score(float(self.counts @ squares), float(self.counts @ (error * error)))


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
        kept = _spread(array.size, min(size, array.size))
        return array.reshape(-1)[kept].reshape([-1 if i == axis else 1 for i in range(array.ndim)])
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
        if treatment.channel_scale:
            return treatment.group_size or 1
        return treatment.group_size or n_channels
    # Integers of the whole range are quick to try, and one channel may hold most of their error.
    if isinstance(treatment, QuantizeConfig) and treatment.range == "mse":
        return 1 if isinstance(treatment.granularity, (PerChannel, PerBlock)) else None
    return None
