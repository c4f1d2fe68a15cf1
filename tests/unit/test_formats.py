"""Laws of the numeric layer, with NumPy in float64 as oracle."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

import milpress._core as _core
from milpress import formats as f
from milpress.errors import CompressionError, ConfigError, UnsupportedError

# Multiples of 1/8 are exact in float16, so a tie is a tie for kernel and oracle alike.
eighths = st.integers(-64, 64).map(lambda n: n / 8)
shapes = npst.array_shapes(min_dims=2, max_dims=4, max_side=7)
dtypes = st.sampled_from([np.float16, np.float32])
tied = dtypes.flatmap(lambda dtype: npst.arrays(dtype, shapes, elements=eighths))
bits = st.sampled_from([1, 2, 3, 4, 6, 8])


def wide(dtype: type) -> st.SearchStrategy[np.ndarray]:
    """Return finite weights of any magnitude."""
    width = 16 if dtype is np.float16 else 32
    elements = st.floats(allow_nan=False, allow_infinity=False, width=width)
    return npst.arrays(dtype, shapes, elements=elements)


def best_squared_error(values: np.ndarray, k: int) -> float:
    """Return the least squared error of k clusters, by the plain dynamic program."""
    x = np.sort(values.astype(np.float64).reshape(-1))
    n = x.size
    best = np.full((k + 1, n + 1), np.inf)
    best[:, 0] = 0
    for j in range(1, k + 1):
        for end in range(1, n + 1):
            best[j, end] = min(
                best[j - 1, begin] + ((x[begin:end] - x[begin:end].mean()) ** 2).sum()
                for begin in range(end)
            )
    return float(best[k, n])


@given(weight=tied, n_bits=bits)
def test_each_code_names_the_nearest_entry_of_an_ascending_table(weight, n_bits):
    palette = f.palettize(weight, f.PalettizeConfig(bits=n_bits))
    lut = palette.lut.reshape(-1).astype(np.float64)
    assert (np.diff(lut) >= 0).all()
    distance = np.abs(weight.astype(np.float64)[..., None] - lut)
    chosen = np.take_along_axis(distance, palette.codes[..., None].astype(np.intp), -1)
    np.testing.assert_array_equal(chosen[..., 0], distance.min(axis=-1))
    assert palette.dense().dtype == weight.dtype


@settings(max_examples=40, deadline=None)
@given(
    weight=npst.arrays(np.float32, st.integers(1, 24).map(lambda n: (1, n)), elements=eighths),
    n_bits=st.sampled_from([1, 2, 3]),
)
def test_no_table_has_a_smaller_squared_error(weight, n_bits):
    dense = f.palettize(weight, f.PalettizeConfig(bits=n_bits)).dense().astype(np.float64)
    error = ((dense - weight) ** 2).sum()
    # Means are rounded to float32: relative 2^-24 of magnitudes up to 8, for 24 weights.
    assert error <= best_squared_error(weight, 2**n_bits) + 24 * (8 * 2.0**-24) ** 2 + 1e-12


@given(weight=tied)
def test_as_many_entries_as_distinct_values_lose_nothing(weight):
    few = np.round(weight)  # at most 17 values from -8 to 8
    assert np.array_equal(f.palettize(few, f.PalettizeConfig(bits=6)).dense(), few)


@given(data=st.data(), weight=tied)
def test_a_group_is_palettized_as_if_it_were_alone(data, weight):
    axis = data.draw(st.integers(-weight.ndim, weight.ndim - 1))
    n = weight.shape[axis]
    size = data.draw(st.sampled_from([d for d in range(1, n + 1) if n % d == 0]))
    config = f.PalettizeConfig(bits=2, group_size=size)
    whole = f.palettize(weight, config, channel_axis=axis).dense()
    parts = [
        f.palettize(part, f.PalettizeConfig(bits=2)).dense()
        for part in np.split(weight, n // size, axis)
    ]
    np.testing.assert_array_equal(whole, np.concatenate(parts, axis))


@given(data=st.data(), weight=tied)
def test_importance_counts_like_repetition(data, weight):
    counts = data.draw(npst.arrays(np.int64, weight.shape, elements=st.integers(1, 3)))
    config = f.PalettizeConfig(bits=1)
    weighted = f.palettize(weight, config, importance=counts).dense().astype(np.float64)
    flat = np.repeat(weight.reshape(-1), counts.reshape(-1))
    repeated = f.palettize(flat, config).dense().astype(np.float64)
    error = (counts * (weighted - weight) ** 2).sum()
    # Two optimal tables may differ; their errors may not, the rounding of means aside.
    unit = 2.0**-10 if weight.dtype == np.float16 else 2.0**-23
    slack = counts.sum() * (8 * unit) ** 2
    assert error == pytest.approx(((repeated - flat) ** 2).sum(), rel=1e-6, abs=slack)


@given(
    codes=npst.arrays(np.uint8, (4, 6), elements=st.integers(0, 3)),
    lut=npst.arrays(np.float32, (2, 3, 4, 2), elements=eighths),
    axis=st.sampled_from([0, 1]),
)
def test_vectors_are_laid_along_their_axis(codes, lut, axis):
    dense = f.Palette(codes=codes, lut=lut, bits=2, vector_axis=axis).dense()
    for row in range(4):
        for column in range(6):
            entry = lut[row // 2, column // 2, codes[row, column]]
            where = (slice(2 * row, 2 * row + 2), column)
            if axis == 1:
                where = (row, slice(2 * column, 2 * column + 2))
            np.testing.assert_array_equal(dense[where], entry)


configs = st.builds(
    f.QuantizeConfig,
    dtype=st.sampled_from(["int8", "uint8", "int4", "uint4"]),
    granularity=st.sampled_from([f.PerTensor(), f.PerChannel(), f.PerBlock(1)]),
    offset=st.booleans(),
)


@example(weight=np.float16([[65504, -65504]]), config=f.QuantizeConfig(), axes=(0, 1))
@given(
    weight=dtypes.flatmap(wide), config=configs, axes=st.sampled_from([(0, 1), (1, 0), (-1, -2)])
)
def test_every_weight_is_restored_within_half_a_step(weight, config, axes):
    value = f.quantize(weight, config, channel_axis=axes[0], input_axis=axes[1])
    scale = value.scale.astype(np.float64)
    for axis, size in enumerate(value.block_shape):
        scale = np.repeat(scale, size, axis)
    dense, source = value.dense().astype(np.float64), weight.astype(np.float64)
    # An infinity would make its own bound infinite.
    assert np.isfinite(dense).all()
    # Half a step, half a last place of quotient and of product, the spacing of subnormals.
    place, tiny = (2.0**-11, 2.0**-25) if weight.dtype == np.float16 else (2.0**-24, 2.0**-149)
    bound = scale / 2 + 1.01 * place * (np.abs(source) + np.abs(dense)) + tiny
    assert (np.abs(source - dense) <= bound).all()
    least, greatest = config.code_range
    assert value.codes.min() >= least
    assert value.codes.max() <= greatest


@given(weight=npst.arrays(np.float16, (3, 32), elements=eighths), size=st.sampled_from([4, 8, 16]))
def test_a_block_is_quantized_as_if_it_were_alone(weight, size):
    config = f.QuantizeConfig(dtype="int4", granularity=f.PerBlock(size))
    whole = f.quantize(weight, config).dense()
    for begin in range(0, 32, size):
        part = np.ascontiguousarray(weight[:, begin : begin + size])
        alone = f.quantize(part, f.QuantizeConfig(dtype="int4")).dense()
        np.testing.assert_array_equal(whole[:, begin : begin + size], alone)


@given(weight=tied, sparsity=st.floats(0, 1))
def test_exactly_the_smallest_go_and_the_rest_stays(weight, sparsity):
    n_zeros = int(np.floor(weight.size * sparsity))
    flat = weight.reshape(-1)
    expected = flat.copy()
    expected[np.argsort(np.abs(flat), kind="stable")[:n_zeros]] = 0
    value = f.sparsify(weight, f.PruneConfig(sparsity=sparsity))
    np.testing.assert_array_equal(value.dense().reshape(-1), expected)
    np.testing.assert_array_equal(value.mask().reshape(-1), expected != 0)
    np.testing.assert_array_equal(value.nonzeros, expected[expected != 0])


@given(weight=tied, threshold=st.integers(0, 16).map(lambda n: n / 8))
def test_weights_up_to_the_threshold_go(weight, threshold):
    dense = f.sparsify(weight, f.PruneConfig(threshold=threshold)).dense()
    np.testing.assert_array_equal(dense, np.where(np.abs(weight) > threshold, weight, 0))


@given(weight=tied)
def test_the_order_of_memory_does_not_matter(weight):
    for treat in (
        f.palettize,
        f.quantize,
        lambda array: f.sparsify(array, f.PruneConfig(sparsity=0.5)),
    ):
        expected = treat(weight).dense()
        np.testing.assert_array_equal(treat(np.asfortranarray(weight)).dense(), expected)
        np.testing.assert_array_equal(treat(weight[::-1].copy()[::-1]).dense(), expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_weight_that_is_not_finite_is_refused_with_its_position(bad, dtype):
    weight = np.ones((70, 90), dtype)
    weight[69, 3] = bad
    for treat in (
        f.palettize,
        f.quantize,
        lambda array: f.sparsify(array, f.PruneConfig(threshold=1.0)),
    ):
        with pytest.raises(UnsupportedError, match=r"must be finite, got .* at \[69, 3\]"):
            treat(weight)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: f.PalettizeConfig(bits=5), "bits must be one of .* got 5"),
        (lambda: f.PalettizeConfig(group_size=0), "group_size must be at least 1, got 0"),
        (lambda: f.QuantizeConfig(dtype="int2"), "dtype must be one of .* got 'int2'"),
        (lambda: f.QuantizeConfig(granularity="per_tensor"), "granularity must be"),
        (lambda: f.PerBlock(0), "block_size must be at least 1, got 0"),
        (lambda: f.PruneConfig(), "exactly one of"),
        (lambda: f.PruneConfig(sparsity=0.5, threshold=1.0), "exactly one of"),
        (lambda: f.PruneConfig(sparsity=-0.1), "sparsity must be from 0 to 1, got -0.1"),
        (lambda: f.PruneConfig(threshold=np.inf), "threshold must be finite"),
        (
            lambda: f.palettize(np.ones((5, 2), np.float32), f.PalettizeConfig(group_size=2)),
            "group_size must divide the 5 output channels, got 2",
        ),
        (
            lambda: f.quantize(
                np.ones((2, 5), np.float32), f.QuantizeConfig(granularity=f.PerBlock(2))
            ),
            "block_size must divide the 5 input channels, got 2",
        ),
        (
            lambda: f.palettize(np.ones(4, np.float32), importance=-np.ones(4)),
            "importance must be finite and not negative",
        ),
    ],
)
def test_wrong_settings_say_what_they_must_be(make, message):
    with pytest.raises(ConfigError, match=message) as caught:
        make()
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, CompressionError)


def test_other_types_of_weights_are_refused():
    with pytest.raises(UnsupportedError, match="float16, bfloat16 or float32, got int32"):
        f.quantize(np.ones((2, 2), np.int32))


def test_values_cannot_be_changed():
    value = f.quantize(np.ones((2, 2), np.float32))
    with pytest.raises(ValueError, match="read-only"):
        value.codes[0, 0] = 1
    with pytest.raises(AttributeError):
        value.bits = 4


def test_the_core_never_converts():
    weights = np.ones((4, 4), np.float64)
    with pytest.raises(TypeError):
        _core.quantize(weights, -7, 7, False)
    with pytest.raises(TypeError):
        _core.quantize(np.ones((4, 4), np.float32).T[:, ::2], -7, 7, False)


def test_results_are_the_same_on_any_number_of_threads():
    weight = np.random.default_rng(0).standard_normal((64, 5000)).astype(np.float16)
    results = []
    for threads in (1, 2, 3):
        before = _core.set_thread_limit(threads)
        try:
            palette = f.palettize(weight, f.PalettizeConfig(bits=4, group_size=4))
            value = f.quantize(weight, f.QuantizeConfig(granularity=f.PerTensor(), offset=True))
            sparse = f.sparsify(weight, f.PruneConfig(sparsity=0.3))
        finally:
            _core.set_thread_limit(before)
        arrays = (palette.codes, palette.lut, value.codes, value.scale, sparse.nonzeros)
        results.append([array.tobytes() for array in arrays])
    assert results[0] == results[1] == results[2]
