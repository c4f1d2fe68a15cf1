"""Laws of scalar k-means, with the plain dynamic program in NumPy as oracle."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

import milpress._core as _core

N_MAX = 24


def bell(rng, n):
    return 0.05 * rng.standard_normal(n)


def uniform(rng, n):
    return rng.uniform(-1, 1, n)


def integer_grid(rng, n):
    return rng.integers(-32, 33, n)


def few_distinct(rng, n):
    return np.sin(rng.integers(0, 5, n))


def tight_clusters(rng, n):
    return rng.integers(-1, 3, n) * (1 + 2.0**-8 * rng.uniform(-1, 1, n))


def all_equal(rng, n):
    return np.full(n, rng.standard_normal())


def fewer_than_entries(rng, n):
    return rng.standard_normal(rng.integers(0, 4))


SHAPES = [bell, uniform, integer_grid, few_distinct, tight_clusters, all_equal, fewer_than_entries]


def least_error(values: NDArray[np.float64], shares: NDArray[np.float64], k: int) -> float:
    """Return the squared error of the best `k` clusters, by the dynamic program of O(k n^2)."""
    order = np.argsort(values, kind="stable")
    x, w = values[order], shares[order]
    n = len(x)
    # cost[i, j]: the error of the values [i, j) around their mean, term by term.
    places = np.arange(n)
    begins, ends = places[:, None, None], np.arange(n + 1)[None, :, None]
    members = np.where((places >= begins) & (places < ends), w, 0.0)
    totals = members.sum(axis=-1)
    means = (members * x).sum(axis=-1) / np.where(totals > 0, totals, 1)
    cost = (members * (x - means[..., None]) ** 2).sum(axis=-1)
    cost[places[:, None] >= np.arange(n + 1)] = np.inf
    best = np.full(n + 1, np.inf)
    best[0] = 0
    for _ in range(k):
        best = np.minimum(best, (best[:n, None] + cost).min(axis=0, initial=np.inf))
    return float(best[n])


def check_case(rng, shape, dtype, *, weighted: bool) -> None:
    weights = shape(rng, int(rng.integers(1, N_MAX + 1))).astype(dtype)
    k = int(rng.integers(4, 9)) if shape is fewer_than_entries else int(rng.integers(1, 9))
    importance = np.exp(2 * rng.standard_normal(len(weights))).astype(np.float32)
    lut = _core.kmeans1d(weights[None], k, importance[None] if weighted else None)[0]
    assert lut.dtype == dtype
    assert (np.diff(lut) >= 0).all()
    values = weights.astype(np.float64)
    shares = importance.astype(np.float64) if weighted else np.ones(len(values))
    error = shares * ((values[:, None] - lut.astype(np.float64)) ** 2).min(axis=1, initial=np.inf)
    # A mean rounded by d adds share * d^2, and d is at most half a unit in the last place.
    info = np.finfo(dtype)
    place = np.maximum(np.abs(values).max(initial=0) * info.eps, info.smallest_subnormal) / 2
    optimum = least_error(values, shares, k)
    assert error.sum() <= optimum * (1 + 1e-6) + shares.sum() * place**2


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n_cases", [50, pytest.param(2500, marks=pytest.mark.large)])
def test_the_squared_error_is_the_least_there_is(n_cases, shape, dtype, weighted):
    rng = np.random.default_rng(n_cases)
    for _ in range(n_cases):
        check_case(rng, shape, dtype, weighted=weighted)


@pytest.mark.parametrize("n_entries", [4, 16, 64, 256])
def test_a_row_is_as_good_among_others_as_it_is_alone(n_entries):
    # The search of a row begins where that of the row before ended.
    rng = np.random.default_rng(n_entries)
    scales = np.array([1e-3, 1, 30, 1e-2, 1, 1])[:, None]
    rows = (scales * rng.standard_t(4, (6, 4000))).astype(np.float16)
    rows[4] = rows[3, 0]
    together = _core.kmeans1d(rows, n_entries, None).astype(np.float64)
    for row, lut in zip(rows, together, strict=True):
        alone = _core.kmeans1d(row[None], n_entries, None)[0].astype(np.float64)
        errors = [
            np.sum(np.min((row.astype(np.float64)[:, None] - table) ** 2, axis=1))
            for table in (lut, alone)
        ]
        # Among optima of one error, rounding to float16 may favour either.
        assert errors[0] == pytest.approx(errors[1], rel=1e-6, abs=0)
