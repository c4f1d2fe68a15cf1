"""Factors of many columns, in bands and in blocks, and the memory that they take."""

from __future__ import annotations

import threading
import tracemalloc
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from milpress.formats import (
    PalettizeConfig,
    PerBlock,
    PruneConfig,
    QuantizeConfig,
    error_feedback,
    palettize,
)
from milpress.formats import (
    factor as factoring,
)
from milpress.formats.error_feedback import FeedbackConfig
from milpress.kernels.threads import Room

RNG = np.random.default_rng


def second_moments(n: int, n_groups: int = 1, seed: int = 0) -> np.ndarray:
    """Return moments of inputs that depend on each other."""
    random = RNG(seed)
    x = random.normal(size=(n_groups, 4 * n, n)) @ random.normal(size=(n, n))
    return np.stack([each.T @ each for each in x]).astype(np.float32)


def weight(shape, seed: int = 1) -> np.ndarray:
    return RNG(seed).normal(size=shape).astype(np.float32)


@pytest.fixture
def bands(monkeypatch) -> None:
    """Compute factors of more than 16 columns in bands of 24."""
    monkeypatch.setattr(factoring, "_WHOLE", 16)
    monkeypatch.setattr(factoring, "_BAND", 24)


@pytest.mark.usefixtures("bands")
@pytest.mark.parametrize("n", [17, 24, 100])
@pytest.mark.parametrize("activation_order", [False, True])
def test_a_factor_in_bands_is_the_factor_of_the_inverse(n, activation_order):
    moments = second_moments(n, 2)
    config = FeedbackConfig(activation_order=activation_order, dampening=0.01)
    found = error_feedback.factorize(moments, config, evenly=2.5)
    for g in range(2):
        h = moments[g].astype(np.float64) + 2.5 * np.eye(n)
        h += 0.01 * h.diagonal().mean() * np.eye(n)
        if activation_order:
            h = h[np.ix_(found.order[g], found.order[g])]
        oracle = np.linalg.cholesky(np.linalg.inv(h)).T
        # Rounding to float32, and what the condition makes of that to float64.
        bound = n * 2.0**-52 * np.linalg.cond(h) * np.abs(oracle).max()
        np.testing.assert_allclose(found.upper[g], oracle, rtol=2.0**-24, atol=bound)
        assert not np.tril(found.upper[g], -1).any()


@pytest.mark.usefixtures("bands")
def test_inputs_in_bands_that_depend_on_each_other_wholly_take_more_dampening():
    moments = np.ones((1, 60, 60), np.float32)
    assert error_feedback.factorize(moments, FeedbackConfig(dampening=0.0)).dampening > 0


def test_what_counts_evenly_is_added_to_the_diagonal():
    moments = second_moments(20, 2)
    added = moments + np.float32(4) * np.eye(20, dtype=np.float32)
    config = FeedbackConfig()
    found, expected = (
        error_feedback.factorize(moments, config, evenly=4.0),
        error_feedback.factorize(added, config),
    )
    np.testing.assert_allclose(found.power, expected.power, rtol=2.0**-23)
    # The sum was rounded to float32 there; the condition makes more of it.
    bound = 2.0**-24 * np.linalg.cond(added).max() * np.abs(expected.upper).max()
    np.testing.assert_allclose(found.upper, expected.upper, rtol=0, atol=bound)


@pytest.mark.parametrize(("n", "n_groups"), [(700, 1), (700, 2), (500, 1), (100, 40)])
def test_a_factor_takes_no_more_memory_than_it_says(n, n_groups, monkeypatch):
    monkeypatch.setattr(factoring, "_WHOLE", 512)
    monkeypatch.setattr(factoring, "_BAND", 32)
    moments = np.zeros((n_groups, n, n), np.float32)
    moments[:, range(n), range(n)] = RNG(0).random(n, np.float32) + 1
    error_feedback.factorize(moments, FeedbackConfig())  # what is loaded at first does not count
    tracemalloc.start()
    try:
        error_feedback.factorize(moments, FeedbackConfig())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # A few blocks of a band, vectors, and Python's own objects.
    fixed = 64 * 32 * 32 + 64 * n * n_groups + 100_000
    assert peak <= error_feedback.factor_bytes(n_groups, n) + fixed


def test_a_large_factor_takes_a_third_of_what_lapack_takes():
    n = 2304
    moments = np.eye(n, dtype=np.float32)[None]
    tracemalloc.start()
    try:
        error_feedback.factorize(moments, FeedbackConfig())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # 36 n^2 by copies of the whole; 8 n^2, and bands of 256 rows, which fade with more columns.
    assert peak < 12 * n * n


def blocks_of(moments: np.ndarray, edges: list[int]) -> list[error_feedback.Factor]:
    return [
        error_feedback.factorize(moments[:, a:b, a:b], FeedbackConfig()) for a, b in pairwise(edges)
    ]


TREATMENTS = {
    "integers": QuantizeConfig(dtype="int4", granularity=PerBlock(4)),
    "tables": PalettizeConfig(bits=3, group_size=2),
    "n of m": PruneConfig(n_m=(2, 4)),
}


@pytest.mark.parametrize("kind", TREATMENTS)
@pytest.mark.parametrize("n_groups", [1, 2])
def test_blocks_of_columns_are_each_as_if_they_stood_alone(kind, n_groups):
    w, edges = weight((8, 40)), [0, 8, 24, 40]
    factors = blocks_of(second_moments(40, n_groups), edges)
    tables = palettize(w, PalettizeConfig(bits=3, group_size=2))

    def made(part: np.ndarray, columns: slice, factor: error_feedback.Factors) -> np.ndarray:
        if kind == "tables":
            own = replace(tables, codes=np.ascontiguousarray(tables.codes[:, columns]))
            return error_feedback.palettize(part, own, factor).dense()
        return error_feedback.compress(part, TREATMENTS[kind], factor).dense()

    together = made(w, slice(0, 40), factors)
    for factor, (begin, end) in zip(factors, pairwise(edges), strict=True):
        columns = slice(begin, end)
        alone = made(np.ascontiguousarray(w[:, columns]), columns, factor)
        np.testing.assert_array_equal(together[:, columns], alone)


def test_runs_of_zeros_do_not_cross_blocks():
    factors = blocks_of(second_moments(40), [0, 8, 24, 40])
    assert error_feedback.fits(factors, PruneConfig(n_m=(1, 4)))
    assert not error_feedback.fits(factors, PruneConfig(n_m=(1, 3)))
    assert error_feedback.fits(factors, PruneConfig(sparsity=0.5))
    assert error_feedback.fits(factors[0], PruneConfig(n_m=(1, 3)))


def test_room_is_given_in_the_order_in_which_it_is_asked_for():
    room, order = Room(10), []
    started, proceed = threading.Event(), threading.Event()

    def first() -> None:
        with room.taken(6):
            started.set()
            proceed.wait()

    def later(name: str, amount: int) -> None:
        with room.taken(amount):
            order.append(name)

    threads = [threading.Thread(target=first)]
    threads[0].start()
    started.wait()
    for i, (name, amount) in enumerate((("large", 1000), ("small", 1))):
        threads.append(threading.Thread(target=later, args=(name, amount)))
        threads[-1].start()
        while len(room._queue) <= i and not order:  # until it has asked
            pass
    assert order == []  # the small one would fit, but the large one asked before
    proceed.set()
    for thread in threads:
        thread.join()
    assert order == ["large", "small"]
    with room.taken(10):  # all was given back
        pass
