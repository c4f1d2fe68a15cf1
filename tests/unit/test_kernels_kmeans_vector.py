"""Laws of vector k-means, with NumPy in float64 and scikit-learn as oracles."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from sklearn.cluster import KMeans

import milpress._core as _core


@st.composite
def tied(draw: st.DrawFn) -> np.ndarray:
    """Return `(n_groups, n_vectors, dim)` eighths: their distances are exact, ties are ties."""
    shape = draw(st.tuples(st.integers(1, 3), st.integers(0, 40), st.integers(1, 5)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n_values = draw(st.integers(1, 65))
    values = rng.integers(0, n_values, shape) / 8 - 4
    return values.astype(draw(st.sampled_from([np.float16, np.float32])))


def cluster(vectors, n_entries, seed=0, importance=None):
    n_groups, n_vectors, dim = vectors.shape
    luts, codes = _core.kmeans_vector(
        vectors.reshape(n_groups, n_vectors * dim), n_entries, dim, seed, importance
    )
    assert luts.dtype == vectors.dtype
    assert codes.shape == (n_groups, n_vectors)
    return luts.reshape(n_groups, n_entries, dim), codes


def squared_distances(vectors: np.ndarray, luts: np.ndarray) -> np.ndarray:
    differences = vectors[:, :, None].astype(np.float64) - luts[:, None].astype(np.float64)
    return np.sum(differences**2, axis=-1)


@given(vectors=tied(), n_entries=st.integers(1, 20))
def test_each_code_names_a_nearest_entry_of_an_ascending_table(vectors, n_entries):
    luts, codes = cluster(vectors, n_entries)
    for lut in luts:
        entries = [tuple(entry) for entry in lut.tolist()]
        assert entries == sorted(entries)
    distances = squared_distances(vectors, luts)
    chosen = np.take_along_axis(distances, codes[..., None].astype(np.intp), -1)[..., 0]
    # The kernel adds up `dim` squares in float32, each of a difference rounded once.
    slack = 1 + (vectors.shape[2] + 3) * 2.0**-23
    assert (chosen <= distances.min(axis=-1) * slack).all()


@given(vectors=tied(), n_entries=st.integers(1, 20))
def test_few_distinct_vectors_are_the_table_and_the_last_is_repeated(vectors, n_entries):
    luts, _ = cluster(vectors, n_entries)
    for row, lut in zip(vectors, luts, strict=True):
        distinct = np.unique(row, axis=0)
        if 0 < len(distinct) <= n_entries:
            np.testing.assert_array_equal(lut[: len(distinct)], distinct)
            assert (lut[len(distinct) :] == distinct[-1]).all()


@given(vectors=tied(), n_entries=st.integers(1, 20), data=st.data())
def test_vectors_at_other_than_a_nearest_entry_are_counted(vectors, n_entries, data):
    n_groups, _, dim = vectors.shape
    luts, codes = cluster(vectors, n_entries)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    moved = rng.integers(0, n_entries, codes.shape).astype(np.uint8)
    codes = np.where(rng.random(codes.shape) < 0.2, moved, codes)
    distances = squared_distances(vectors, luts)
    chosen = np.take_along_axis(distances, codes[..., None].astype(np.intp), -1)[..., 0]
    rounding = 1 + (dim + 3) * 2.0**-23  # of float32, which the kernel allows
    signal, noise, n_outside = _core.compare_vectors(
        vectors.reshape(n_groups, -1), dim, codes, luts.reshape(n_groups, -1)
    )
    assert n_outside == (chosen > distances.min(axis=-1) * rounding).sum()
    # Sums of float16 are in float32 within a chunk of 1,024.
    assert signal == pytest.approx((vectors.astype(np.float64) ** 2).sum(), rel=1e-5)
    assert noise == pytest.approx(chosen.sum(), rel=1e-5)


# A vector halfway between two entries, which sorting gives to the one that it wasn't fitted to.
halfway = np.float16(
    "-0.75 -0.5 1.25 2.625 -3.875 -3 1.75 2.625 -2.375 -1.875 2 -1.125 -2.125 1.75 -2.25 -1.25 0.5 "
    "-0.25 -3.5 -3.875 2 1.25 1.75 -0.25 1.625 -1.75 -0.875 1.5 -3.25 -2 -3.25 -0.875 2.75 "
    "-3.125".split()
)


@example(vectors=halfway[None, :, None], n_entries=10, seed=0)
@given(vectors=tied(), n_entries=st.integers(1, 20), seed=st.integers(0, 2**64 - 1))
def test_no_entry_would_be_better_at_the_mean_of_its_vectors(vectors, n_entries, seed):
    luts, codes = cluster(vectors, n_entries, seed)
    for row, lut, code in zip(vectors.astype(np.float64), luts, codes, strict=True):
        error = moved = 0.0
        for j in np.unique(code):
            members = row[code == j]
            error += ((members - lut[j].astype(np.float64)) ** 2).sum()
            moved += ((members - members.mean(axis=0)) ** 2).sum()
        # The kernel goes on while the means, rounded to the weights' type (off by half a place of
        # magnitudes up to 4), gain 1e-4 of the error; it adds up `dim` squares in float32.
        place = 2.0**-10 if vectors.dtype == np.float16 else 2.0**-23
        rounding = (1 + 2.0**-12) * row.size * place**2  # by way of float32
        slack = 1 + 2 * (vectors.shape[2] + 3) * 2.0**-23
        assert error * (1 - 1e-4) <= (moved + rounding) * slack


@given(vectors=tied(), n_entries=st.integers(1, 8), data=st.data())
def test_vectors_of_no_importance_get_codes_but_no_influence(vectors, n_entries, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    importance = rng.integers(1, 4, vectors.shape[:2]).astype(np.float32)
    outsiders = np.full((vectors.shape[0], 2, vectors.shape[2]), 9, vectors.dtype)
    luts, codes = cluster(vectors, n_entries, importance=importance)
    padded, padded_codes = cluster(
        np.concatenate([vectors, outsiders], axis=1),
        n_entries,
        importance=np.concatenate([importance, np.zeros((len(vectors), 2), np.float32)], axis=1),
    )
    if vectors.shape[1] > 0:
        np.testing.assert_array_equal(padded, luts)
        np.testing.assert_array_equal(padded_codes[:, :-2], codes)
        farthest = squared_distances(outsiders, luts)
        chosen = np.take_along_axis(farthest, padded_codes[:, -2:, None].astype(np.intp), -1)
        assert (chosen[..., 0] <= farthest.min(axis=-1) * (1 + 8 * 2.0**-23)).all()


# Both stop in a local minimum, and those of one weight differ by a few percent: 1.02 is a target,
# not a law of the method.
@pytest.mark.parametrize(
    ("n_vectors", "dim", "n_entries"),
    [(1000, 3, 16), (600, 4, 64), (5000, 4, 16), (3000, 8, 64), (20_000, 2, 16), (8000, 4, 256)],
)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_the_squared_error_is_at_most_1_02_of_scikit_learns(n_vectors, dim, n_entries, dtype):
    vectors = np.random.default_rng(7).standard_normal((1, n_vectors, dim)).astype(dtype)
    reference = KMeans(n_entries, init="k-means++", n_init=1, random_state=0)
    reference.fit(vectors[0].astype(np.float32))
    for seed in range(3):
        luts, codes = cluster(vectors, n_entries, seed)
        error = ((vectors[0].astype(np.float64) - luts[0][codes[0]]) ** 2).sum()
        assert error <= 1.02 * reference.inertia_


def test_the_table_is_the_same_on_one_thread_and_on_two():
    vectors = np.random.default_rng(8).standard_normal((1, 40_000, 2)).astype(np.float16)
    before = _core.set_thread_limit(1)
    one = cluster(vectors, 32)
    _core.set_thread_limit(2)
    two = cluster(vectors, 32)
    _core.set_thread_limit(before)
    np.testing.assert_array_equal(one[0], two[0])
    np.testing.assert_array_equal(one[1], two[1])


def test_vectors_need_the_exact_dtype_and_a_dim_that_divides_a_row():
    weight = np.zeros((2, 6), np.float32)
    with pytest.raises(TypeError):
        _core.kmeans_vector(weight.astype(np.float64), 4, 2, 0, None)
    with pytest.raises(TypeError):
        _core.kmeans_vector(weight, 4, 2, 0, np.ones((2, 3)))
    with pytest.raises(ValueError, match="dim must divide the 6 weights of a row, got 4"):
        _core.kmeans_vector(weight, 4, 4, 0, None)
    with pytest.raises(ValueError, match="dim must divide the 6 weights of a row, got 0"):
        _core.kmeans_vector(weight, 4, 0, 0, None)
    with pytest.raises(ValueError, match="1 to 256 entries of 2"):
        _core.kmeans_vector(weight, 257, 2, 0, None)
