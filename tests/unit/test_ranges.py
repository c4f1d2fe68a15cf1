"""Ranges out of streaming histograms, against NumPy on all values at once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from milpress.errors import ConfigError
from milpress.formats import PerTensor, QuantizeConfig, quantize
from milpress.formats.ranges import CalibrationConfig, Observer, Range

CODES = [
    QuantizeConfig(dtype=dtype, granularity=PerTensor(), offset=offset)
    for dtype in ("int8", "uint8")
    for offset in (False, True)
]
KINDS = ("minmax", "percentile", "mse", "entropy")

floats = st.floats(-(2.0**60), 2.0**60, width=32)
batches = st.lists(
    npst.arrays(np.float32, npst.array_shapes(max_dims=2, max_side=20), elements=floats),
    min_size=1,
    max_size=6,
)


def observed(arrays, *, with_histogram=True) -> Observer:
    observer = Observer(with_histogram=with_histogram)
    for array in arrays:
        observer.add(array)
    return observer


def heavy_tailed(seed: int, n: int = 200_000) -> np.ndarray:
    values = np.random.default_rng(seed).standard_t(3, n).astype(np.float32)
    values[::5] = 0
    return values


@given(arrays=batches, kind=st.sampled_from(KINDS), codes=st.sampled_from(CODES))
@settings(max_examples=60, deadline=None)
def test_ranges_depend_neither_on_the_order_of_arrays_nor_on_how_they_are_cut(arrays, kind, codes):
    config = CalibrationConfig(calibration=kind, percentile=90)
    together = observed([np.concatenate([array.reshape(-1) for array in arrays])])
    assert observed(arrays).range(config, codes) == together.range(config, codes)
    assert observed(arrays[::-1]).range(config, codes) == together.range(config, codes)


@given(arrays=batches, kind=st.sampled_from(KINDS), codes=st.sampled_from(CODES))
@settings(max_examples=60, deadline=None)
def test_observers_together_know_what_one_would(arrays, kind, codes):
    config = CalibrationConfig(calibration=kind, percentile=90)
    parts = [observed([array]) for array in arrays]
    alone = [part.range(config, codes) for part in parts]
    whole = Observer.union([*parts, observed([])])
    assert whole.seen == observed(arrays).seen
    assert whole.range(config, codes) == observed(arrays).range(config, codes)
    assert Observer.union([whole, *parts]).seen == whole.seen
    assert [part.range(config, codes) for part in parts] == alone


@given(arrays=batches)
@settings(max_examples=60, deadline=None)
def test_minmax_and_a_percentile_of_100_hold_just_what_was_seen(arrays):
    values = np.concatenate([array.reshape(-1) for array in arrays])
    whole = Range(float(values.min()), float(values.max()))
    observer = observed(arrays)
    assert observer.seen == whole
    every = CalibrationConfig(calibration="percentile", percentile=100)
    assert observer.range(every, CODES[0]) == whole
    assert observer.range(CalibrationConfig(), CODES[0]) == whole


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9, 99.99])
@pytest.mark.parametrize("make", [heavy_tailed, lambda seed: np.maximum(heavy_tailed(seed), 0)])
def test_a_percentile_is_numpys_to_a_bin_and_leaves_out_no_more(make, percentile):
    values = make(1)
    observer = observed(np.array_split(values, 7))
    found = observer.range(
        CalibrationConfig(calibration="percentile", percentile=percentile), CODES[0]
    )
    tail = (100 - percentile) / 2
    low = np.percentile(values, tail, method="lower")
    high = np.percentile(values, 100 - tail, method="higher")
    # A histogram has more than half of its 8192 bins filled from end to end.
    bin_width = (values.max() - values.min()) / 4096
    # NumPy counts from 0 to n - 1, we count values left out: one place apart at most.
    ordered = np.sort(values)
    slack = [
        np.abs(np.diff(ordered[i - 2 : i + 3])).max()
        for i in np.searchsorted(ordered, (low, high)).clip(2, values.size - 3)
    ]
    assert abs(found.low - low) <= bin_width + slack[0]
    assert abs(found.high - high) <= bin_width + slack[1]
    allowed = values.size * tail / 100
    assert (values < found.low).sum() <= allowed
    assert (values > found.high).sum() <= allowed


def squared_error(values: np.ndarray, found: Range, codes: QuantizeConfig) -> float:
    """Return the error of values that are quantized by the ops' own arithmetic, in float64."""
    made = quantize(np.float32([found.low, found.high]), codes)
    scale = float(made.scale.item())
    zero = 0 if made.offset is None else int(made.offset.item())
    least, greatest = codes.code_range
    held = (np.rint(values.astype(np.float64) / scale) + zero).clip(least, greatest) - zero
    return float(np.square(held * scale - values).sum())


@pytest.mark.parametrize("codes", CODES, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_a_range_of_least_squared_error_has_no_greater_error_than_any_other(codes, seed):
    values = heavy_tailed(seed)
    observer = observed(np.array_split(values, 5))
    errors = {
        kind: squared_error(
            values, observer.range(CalibrationConfig(calibration=kind), codes), codes
        )
        for kind in KINDS
    }
    # Values are taken to be in the middle of their bins. That moves the error of a candidate by
    # far less than a bin's share of a step, of which it has at most a sixteenth.
    assert all(errors["mse"] <= error * (1 + 1 / 16) for error in errors.values())
    assert errors["mse"] < errors["minmax"]


@pytest.mark.parametrize("kind", ["percentile", "mse", "entropy"])
def test_one_outlier_in_many_values_is_clipped(kind):
    values = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
    values[0] = 50
    found = observed([values]).range(CalibrationConfig(calibration=kind), CODES[0])
    # Holding 50 costs 1e5 * (50 / 127)**2 / 12 = 1292; clipping it at 25 costs 625 + 323.
    # The greatest of the other values is near 4.4.
    assert 2 < found.high < 35


@pytest.mark.parametrize("codes", CODES, ids=str)
def test_even_values_are_not_clipped(codes):
    values = np.linspace(-1, 1, 100_001, dtype=np.float32)
    for kind in ("mse", "entropy"):
        found = observed([values]).range(CalibrationConfig(calibration=kind), codes)
        # One candidate less than the whole is a sixteenth of an octave.
        assert found.high >= 2 ** (-1 / 16) - 1e-6, kind


def test_values_that_are_not_finite_are_noted_and_passed_over():
    observer = observed([np.float32([-np.inf, 1, np.nan, -2]), np.float32([np.inf])])
    assert observer.seen == Range(-2.0, 1.0)
    for whole in (observer, Observer.union([observed([np.float32([1])]), observer])):
        assert whole.has_infinities
        assert whole.has_nans
    assert not observed([np.float32([1, np.inf])]).has_nans
    assert not observed([np.float32([1, np.nan])]).has_infinities
    assert observed([np.float32([np.nan])]).range(CalibrationConfig(), CODES[0]) is None


@given(
    values=npst.arrays(np.float32, 200, elements=st.floats(width=32, allow_nan=False)),
)
@settings(max_examples=60, deadline=None)
def test_a_histogram_stays_small_whatever_the_values(values):
    observer = observed(np.array_split(values, 9))
    assert observer._counts.size <= 8192
    n_counted = observer._counts.sum() + observer._n_zeros
    assert n_counted == np.isfinite(values).sum()


@pytest.mark.parametrize("given", [{"calibration": "max"}, {"percentile": 0}, {"percentile": True}])
def test_a_setting_that_is_none_is_refused(given):
    with pytest.raises(ConfigError, match=r"must be .* got"):
        CalibrationConfig(**given)
