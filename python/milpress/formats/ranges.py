"""Ranges of values that are seen one array after the other, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from milpress.errors import ConfigError
from milpress.formats import QuantizeConfig

CalibrationKind: TypeAlias = Literal["minmax", "percentile", "mse", "entropy"]
Engine: TypeAlias = Literal["interpreter", "coreml"]

# Bins of a histogram. With 8-bit codes a bin is at most a sixteenth of a step.
_MAX_BINS = 8192
# A float32 has no finer values than this below its exponent.
_MANTISSA_BITS = 24
# Shares of the whole range that are tried: a sixteenth of an octave apart, down to 1/256.
_SHARES = tuple(2.0 ** (-i / 16) for i in range(129))
_ELEMENTS_AT_ONCE = 1 << 20


class Range(NamedTuple):
    """The least and the greatest value that integers are to stand for."""

    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationConfig:
    """How the range of activations is found from what they were in samples.

    Parameters
    ----------
    calibration
        ``"minmax"`` holds all that was seen; ``"percentile"`` leaves out the outermost on both
        sides; ``"mse"`` has the least squared error; ``"entropy"`` the least divergence of the
        distribution (Kullback and Leibler's).
    percentile
        With ``"percentile"``: how many values in a hundred the range holds.
    engine
        What runs the model on the samples: ``"interpreter"``, on any machine, or ``"coreml"``, on
        a Mac.
    """

    calibration: CalibrationKind = "minmax"
    percentile: float = 99.99
    engine: Engine = "interpreter"

    def __post_init__(self) -> None:
        if self.calibration not in get_args(CalibrationKind):
            msg = (
                f"calibration must be one of {get_args(CalibrationKind)}, got {self.calibration!r}"
            )
            raise ConfigError(msg)
        if (
            isinstance(self.percentile, bool)
            or not isinstance(self.percentile, (int, float))
            or not 50 < self.percentile <= 100
        ):
            msg = f"percentile must be above 50 and at most 100, got {self.percentile!r}"
            raise ConfigError(msg)
        if self.engine not in get_args(Engine):
            msg = f"engine must be one of {get_args(Engine)}, got {self.engine!r}"
            raise ConfigError(msg)

    def observer(self) -> Observer:
        """Return what looks at values in such a way."""
        return Observer(with_histogram=self.calibration != "minmax")


class Observer:
    """Looks at arrays of values, one after the other, and keeps a bounded summary.

    Of values that are not finite it is noted only that there were some. The summary does not depend
    on the order of the arrays, nor on how values are spread over them: the width of a bin is a
    power of two, so that bins of one width are unions of those of a smaller one.

    Parameters
    ----------
    with_histogram
        Whether values are counted, beyond noting the least and the greatest.

    Attributes
    ----------
    seen
        The least and the greatest finite value so far; ``None`` before the first.
    has_infinities, has_nans
        Whether a value was infinite, or no number.
    """

    def __init__(self, *, with_histogram: bool) -> None:
        self._with_histogram = with_histogram
        self.seen: Range | None = None
        self.has_infinities = self.has_nans = False
        # Zeros are exact in whatever range, and counted apart; the histogram is of the others.
        self._n_zeros = 0
        self._counted: Range | None = None
        self._exponent = 0
        self._first = 0
        self._counts: NDArray[np.int64] = np.zeros(0, np.int64)

    @classmethod
    def union(cls, parts: Sequence[Observer]) -> Observer:
        """Return what would be known had one observer seen what several saw, all of one kind."""
        whole = cls(with_histogram=parts[0]._with_histogram)
        for part in parts:
            whole._join(part)
        return whole

    def _join(self, other: Observer) -> None:
        self.has_infinities |= other.has_infinities
        self.has_nans |= other.has_nans
        if other.seen is not None:
            self.seen = _union(self.seen, other.seen)
        self._n_zeros += other._n_zeros
        if other._counted is None:
            return
        self._counted = _union(self._counted, other._counted)
        counted = Observer(with_histogram=True)
        counted._exponent, counted._first = other._exponent, other._first
        counted._counts = other._counts
        for each in (self, counted):
            each._widen(_exponent(self._counted))
        self._insert(counted._first, counted._counts)

    def add(self, values: NDArray[Any]) -> None:
        """Look at an array."""
        flat = np.ascontiguousarray(values).reshape(-1)
        for start in range(0, flat.size, _ELEMENTS_AT_ONCE):
            self._add(flat[start : start + _ELEMENTS_AT_ONCE])

    def _add(self, values: NDArray[Any]) -> None:
        extremes = _range_of(values)
        if not all(map(math.isfinite, extremes)):
            self.has_infinities |= bool(np.isinf(values).any())
            self.has_nans |= bool(np.isnan(values).any())
            values = values[np.isfinite(values)]
            if not values.size:
                return
            extremes = _range_of(values)
        self.seen = _union(self.seen, extremes)
        if not self._with_histogram:
            return
        nonzeros = values[values != 0]
        self._n_zeros += values.size - nonzeros.size
        if nonzeros.size:
            self._counted = _union(self._counted, _range_of(nonzeros))
            self._widen(_exponent(self._counted))
            # Products with powers of two are exact.
            places = np.floor(nonzeros.astype(np.float64) * 2.0**-self._exponent).astype(np.int64)
            first = int(places.min())
            self._insert(first, np.bincount(places - first))

    def _widen(self, exponent: int) -> None:
        """Merge neighbours until bins have that width."""
        if not self._counts.size:
            self._exponent = exponent
        while self._exponent < exponent:
            before = self._first % 2
            pairs = np.pad(self._counts, (before, (before + self._counts.size) % 2))
            self._counts = pairs.reshape(-1, 2).sum(axis=1)
            self._first //= 2
            self._exponent += 1

    def _insert(self, first: int, counts: NDArray[np.int64]) -> None:
        """Add counts of neighbouring bins, of which the first has that place."""
        if not self._counts.size:
            self._first = first
        begin = min(self._first, first)
        end = self._first + self._counts.size
        n_behind = max(first + counts.size - end, 0)
        self._counts = np.pad(self._counts, (self._first - begin, n_behind))
        self._first = begin
        self._counts[first - begin : first - begin + counts.size] += counts

    def range(self, config: CalibrationConfig, codes: QuantizeConfig) -> Range | None:
        """Return the range of what was seen, for codes of a kind.

        ``None`` if nothing finite was seen.
        """
        seen = self.seen
        if seen is None or config.calibration == "minmax" or not self._counts.size:
            return seen
        # The outermost bins reach no further than what was seen.
        places = np.arange(self._counts.size + 1, dtype=np.float64) + self._first
        edges = (places * 2.0**self._exponent).clip(*seen).astype(np.float64)
        if config.calibration == "percentile":
            return self._percentile(edges, config.percentile)
        filled = np.flatnonzero(self._counts)
        centers = ((edges[:-1] + edges[1:]) / 2)[filled]
        counts = self._counts[filled].astype(np.float64)
        cost = _squared_error if config.calibration == "mse" else _divergence
        whole = Range(min(seen.low, 0.0), max(seen.high, 0.0))
        return _least(whole, codes, lambda tried: cost(centers, counts, tried, codes))

    def _percentile(self, edges: NDArray[np.float64], percentile: float) -> Range:
        """Return the narrowest range of whole bins that leaves out no more than is allowed."""
        at_zero = min(max(-self._first, 0), self._counts.size)
        counts = np.insert(self._counts, at_zero, self._n_zeros)
        lows, highs = np.insert(edges[:-1], at_zero, 0.0), np.insert(edges[1:], at_zero, 0.0)
        allowed = math.floor(int(counts.sum()) * (100 - percentile) / 200)
        low = int(np.searchsorted(np.cumsum(counts), allowed, side="right"))
        high = int(np.searchsorted(np.cumsum(counts[::-1]), allowed, side="right"))
        return Range(float(lows[low]), float(highs[counts.size - 1 - high]))


def _range_of(values: NDArray[Any]) -> Range:
    return Range(float(values.min()), float(values.max()))


def _union(one: Range | None, other: Range) -> Range:
    return other if one is None else Range(min(one.low, other.low), max(one.high, other.high))


def _exponent(seen: Range) -> int:
    """Return the least exponent of a bin's width for a range: it never falls as ranges grow."""
    greatest = max(abs(seen.low), abs(seen.high))
    exponent = math.frexp(greatest)[1] - _MANTISSA_BITS
    if seen.high > seen.low:
        bits = _MAX_BINS.bit_length()
        exponent = max(exponent, math.frexp(seen.high - seen.low)[1] - bits)
    while (
        math.floor(math.ldexp(seen.high, -exponent)) - math.floor(math.ldexp(seen.low, -exponent))
        >= _MAX_BINS
    ):
        exponent += 1
    return exponent


def _least(seen: Range, codes: QuantizeConfig, cost: Callable[[Range], float]) -> Range:
    """Return the range of least cost among shares of the whole; the widest of equals."""
    low, high = seen
    if not codes.offset:
        low, high = -max(-low, high), max(-low, high)
    best = min((Range(low * share, high * share) for share in _SHARES), key=cost)
    if codes.offset and low < 0 < high:
        for _ in range(2):  # either end by itself, and once more
            best = min(best, *(Range(low * share, best.high) for share in _SHARES), key=cost)
            best = min(best, *(Range(best.low, high * share) for share in _SHARES), key=cost)
    return best


def _levels(tried: Range, codes: QuantizeConfig) -> tuple[float, float, float]:
    """Return step, least and greatest value of codes for a range."""
    first, last = codes.code_range
    if not codes.offset:
        bound = max(-tried.low, tried.high)
        step = 2 * bound / (last - first)
        return step, -bound, bound
    step = (tried.high - tried.low) / (last - first)
    zero = round(first - tried.low / step) if step else first
    return step, (first - zero) * step, (last - zero) * step


def _squared_error(
    centers: NDArray[np.float64], counts: NDArray[np.float64], tried: Range, codes: QuantizeConfig
) -> float:
    step, low, high = _levels(tried, codes)
    if not step:
        return math.inf
    held = (np.rint(centers / step) * step).clip(low, high)
    return float(counts @ np.square(centers - held))


def _divergence(
    centers: NDArray[np.float64], counts: NDArray[np.float64], tried: Range, codes: QuantizeConfig
) -> float:
    """Return the divergence of what codes tell of the distribution from the distribution.

    A code tells how many values it stands for, those beyond the range included, and nothing of
    which of the bins these are in.
    """
    step, low, high = _levels(tried, codes)
    if not step:
        return math.inf
    places = np.rint((centers.clip(low, high) - low) / step).astype(np.int64)
    told = np.bincount(places, weights=counts)[places] / np.bincount(places)[places]
    return float(counts @ np.log(counts / told))
