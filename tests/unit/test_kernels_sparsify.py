"""Laws of structured pruning masks, with NumPy in float64 as oracle."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

import milpress._core as _core

# Multiples of 1/8 are exact in float16, and their squares add up exactly: ties are ties.
eighths = st.integers(-8, 8).map(lambda n: n / 8)
shapes = st.tuples(st.integers(0, 3), st.integers(1, 19), st.integers(1, 5))
dtypes = st.sampled_from([np.float16, np.float32])
tied = dtypes.flatmap(lambda dtype: npst.arrays(dtype, shapes, elements=eighths))


def unpacked(bitmask: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return a mask of booleans, after checking that spare bits are 0."""
    bits = np.unpackbits(bitmask, bitorder="little")
    size = int(np.prod(shape))
    assert not bits[size:].any()
    return bits[:size].reshape(shape).astype(bool)


@given(
    weight=tied, n_m=st.integers(1, 9).flatmap(lambda m: st.tuples(st.integers(0, m), st.just(m)))
)
def test_n_of_every_m_channels_go_and_a_short_run_is_filled_up_with_zeros(weight, n_m):
    n, m = n_m
    n_outer, n_channels, n_inner = weight.shape
    n_runs = -(-n_channels // m)
    padded = np.zeros((n_outer, n_runs * m, n_inner))
    padded[:, :n_channels] = weight
    runs = np.abs(padded).reshape(n_outer, n_runs, m, n_inner)
    rank = np.argsort(np.argsort(runs, axis=2, kind="stable"), axis=2)
    expected = ((rank >= n) & (runs != 0)).reshape(padded.shape)[:, :n_channels]
    mask = _core.keep_n_m(weight.reshape(-1), *weight.shape, n, m)
    np.testing.assert_array_equal(unpacked(mask, weight.shape), expected)


@given(weight=tied, block_size=st.integers(1, 9), share=st.floats(0, 1))
def test_blocks_of_least_norm_go_until_the_next_would_be_too_many(weight, block_size, share):
    n_zeros = int(share * weight.size)
    n_outer, n_channels, n_inner = weight.shape
    blocks = [
        (outer, slice(first, first + block_size), inner)
        for outer in range(n_outer)
        for first in range(0, n_channels, block_size)
        for inner in range(n_inner)
    ]
    expected = weight != 0
    n_left = n_zeros
    for block in sorted(blocks, key=lambda block: np.sum(weight[block].astype(np.float64) ** 2)):
        n_left -= weight[block].size
        if n_left < 0:
            break
        expected[block] = False
    mask = _core.keep_blocks(weight.reshape(-1), *weight.shape, block_size, n_zeros)
    np.testing.assert_array_equal(unpacked(mask, weight.shape), expected)


def test_masks_are_refused_for_another_dtype_or_shape():
    weight = np.zeros(24, np.float32)
    with pytest.raises(TypeError):
        _core.keep_n_m(weight.astype(np.float64), 2, 4, 3, 2, 4)
    with pytest.raises(TypeError):
        _core.keep_blocks(weight[::2], 1, 4, 3, 2, 4)
    with pytest.raises(ValueError, match="shape must have 24 elements like weights, got 2 x 4 x 2"):
        _core.keep_n_m(weight, 2, 4, 2, 2, 4)
    with pytest.raises(ValueError, match="n_zeros must be at most 24, got 25"):
        _core.keep_blocks(weight, 2, 4, 3, 2, 25)
