"""Laws of layouts, ranges, tables and chains at their edges, with NumPy as oracle."""

from __future__ import annotations

import numpy as np
import pytest

from milpress import formats as f
from milpress.errors import ConfigError, UnsupportedError

NORMAL = np.random.default_rng(8).standard_normal((8, 24)).astype(np.float32)


# Quantized


@pytest.mark.parametrize(
    ("config", "least", "greatest", "offset"),
    [
        (f.QuantizeConfig(dtype="int8"), -127, 127, None),
        (f.QuantizeConfig(dtype="uint8"), 0, 254, 127),
        (f.QuantizeConfig(dtype="int4"), -7, 7, None),
        (f.QuantizeConfig(dtype="uint4"), 0, 14, 7),
        (f.QuantizeConfig(dtype="int8", offset=True), -128, 127, "any"),
        (f.QuantizeConfig(dtype="uint4", offset=True), 0, 15, "any"),
    ],
)
def test_codes_take_the_whole_range_and_no_more(config, least, greatest, offset):
    weight = np.float32([[-1, 1, 0.5, 0], [-3, 3, 1, 2]])
    value = f.quantize(weight, config)
    assert (value.codes.min(), value.codes.max()) == (least, greatest)
    if offset is None:
        assert value.offset is None
    elif offset != "any":
        assert (value.offset == offset).all()


@pytest.mark.parametrize("axes", [(0, 1), (1, 0)])
def test_blocks_lie_along_the_input_channels(axes):
    weight = np.random.default_rng(0).standard_normal((8, 12, 3, 3)).astype(np.float32)
    config = f.QuantizeConfig(granularity=f.PerBlock(4))
    output, inputs = axes
    value = f.quantize(weight, config, channel_axis=output, input_axis=inputs)
    expected = [1, 1, 1, 1]
    expected[output], expected[inputs] = weight.shape[output], weight.shape[inputs] // 4
    assert value.scale.shape == tuple(expected)


def test_a_block_without_a_size_spans_its_axis():
    value = f.quantize(NORMAL, f.QuantizeConfig(granularity=f.Blocks((0, 6))))
    assert value.scale.shape == (1, 4)
    with pytest.raises(ConfigError, match="a block must divide axis 1 of size 24, got 5"):
        f.quantize(NORMAL, f.QuantizeConfig(granularity=f.Blocks((0, 5))))


# Palettes


def test_uniform_tables_go_from_the_least_to_the_greatest_weight_in_equal_steps():
    value = f.palettize(NORMAL, f.PalettizeConfig(bits=3, table=f.Uniform()))
    expected = np.linspace(NORMAL.min().astype(np.float64), NORMAL.max().astype(np.float64), 8)
    # Each entry is rounded once to float32.
    np.testing.assert_allclose(value.lut.reshape(-1), expected, rtol=2.0**-23, atol=2.0**-24)


@pytest.mark.parametrize(
    ("n", "bits"), [(2, 1), (3, 2), (4, 2), (16, 4), (17, 6), (64, 6), (65, 8)]
)
def test_unique_tables_are_as_narrow_as_they_can_be(n, bits):
    weight = np.resize(np.arange(n, dtype=np.float32), (4, 50))
    value = f.palettize(weight, f.PalettizeConfig(bits=None, table=f.Unique()))
    assert value.bits == bits
    np.testing.assert_array_equal(value.dense(), weight)


def test_indices_into_tables_with_scales_name_the_nearest_entry():
    # Halves: the scaled weights and the tables are rounded, so that another entry may be nearer.
    sizes = np.logspace(-1, 1, 16, dtype=np.float32)[:, None]
    weight = np.random.default_rng(0).standard_normal((16, 256)) * sizes
    weight = weight.astype(np.float16)
    value = f.palettize(weight, f.PalettizeConfig(bits=6, channel_scale=True))
    entries = value.lut[..., 0].astype(np.float64)  # (16, 1, 64)
    distance = np.abs(weight.astype(np.float64)[..., None] - entries)
    chosen = np.take_along_axis(distance, value.codes[..., None].astype(np.intp), -1)[..., 0]
    np.testing.assert_array_equal(chosen, distance.min(axis=-1))


def test_what_is_left_of_a_scaled_channel_counts_by_the_square_of_its_scale():
    # Two channels of other shapes: the table suits the one that is ten times larger.
    rng = np.random.default_rng(1)
    weight = np.stack([rng.uniform(-1, 1, 64), 10 * rng.choice([-1, -0.3, 0.2, 1], 64)])
    weight = weight.astype(np.float32)
    value = f.palettize(weight, f.PalettizeConfig(bits=2, channel_scale=True))
    scale = np.abs(weight).max(axis=1, keepdims=True)
    share = np.broadcast_to((scale / scale.max()) ** 2, weight.shape)
    alone = f.palettize(weight / scale, f.PalettizeConfig(bits=2), importance=share)
    expected = scale.astype(np.float64) * alone.lut.reshape(1, -1)
    np.testing.assert_array_equal(value.lut[:, 0, :, 0], expected.astype(np.float32))


def test_errors_of_a_vector_count_by_the_mean_of_its_importance():
    config = f.PalettizeConfig(bits=2, vector_size=2)
    rng = np.random.default_rng(2)
    mean = rng.integers(1, 9, (4, 24)).astype(np.float32)
    spread = np.empty((8, 24), np.float32)
    spread[::2], spread[1::2] = mean + 1, mean - 1
    even = f.palettize(NORMAL, config, importance=np.repeat(mean, 2, axis=0))
    odd = f.palettize(NORMAL, config, importance=spread)
    np.testing.assert_array_equal(even.lut, odd.lut)
    np.testing.assert_array_equal(even.codes, odd.codes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda n: np.full(n, 4), "indices from 0 to 3, got 192 from 4 to 4"),
        (lambda n: np.full(n, -1), "indices from 0 to 3, got 192 from -1 to -1"),
        (lambda n: np.zeros(n - 1, np.int64), "must return 192 indices from 0 to 3, got 191"),
    ],
)
def test_a_custom_function_names_entries_of_its_table(make, message):
    table = f.Custom(lambda weight: (np.float32([-1, 0, 1, 2]), make(weight.size)))
    config = f.PalettizeConfig(bits=None, table=table)
    with pytest.raises(UnsupportedError, match=message):
        f.palettize(NORMAL, config)


# Pruned


@pytest.mark.parametrize(("threshold", "fraction"), [(0.5, 0.25), (2.5, 0.75)])
def test_just_the_least_fraction_of_zeros_is_taken(threshold, fraction):
    weight = np.float32([[0, 1, 2, 3]])
    enough = f.PruneConfig(threshold=threshold, min_sparsity=fraction)
    assert (f.sparsify(weight, enough).dense() == 0).sum() == 4 * fraction
    more = f.PruneConfig(threshold=threshold, min_sparsity=fraction + 0.01)
    with pytest.raises(UnsupportedError, match=rf"must be zero, got {fraction:.3f}"):
        f.sparsify(weight, more)


@pytest.mark.parametrize("axis", [0, 1])
def test_runs_and_blocks_take_half_of_their_axis_at_most(axis):
    size = NORMAL.shape[axis] // 2
    f.sparsify(NORMAL, f.PruneConfig(n_m=(1, size), axis=axis))
    f.sparsify(NORMAL, f.PruneConfig(sparsity=0.5, block_size=size, axis=axis))
    message = f"must be at most half of the {2 * size} channels, got {size + 1}"
    for config in (
        f.PruneConfig(n_m=(1, size + 1), axis=axis),
        f.PruneConfig(sparsity=0.5, block_size=size + 1, axis=axis),
    ):
        with pytest.raises(UnsupportedError, match=message):
            f.sparsify(NORMAL, config)


# Chains

MASK_OF_HALF = f.PruneConfig(sparsity=0.5)


def test_codes_outside_a_mask_are_zero():
    for coding in (f.PalettizeConfig(bits=4), f.QuantizeConfig(dtype="uint8", offset=True)):
        for configs in ((coding, MASK_OF_HALF), (MASK_OF_HALF, coding)):
            value = f.compress(f.compress(NORMAL, configs[0]), configs[1])
            assert (~value.code_mask()).sum() == NORMAL.size // 2
            assert not value.value.codes[~value.code_mask()].any()


def test_importance_counts_for_what_is_left_of_a_pruned_weight():
    sparse = f.sparsify(NORMAL, MASK_OF_HALF)
    importance = np.random.default_rng(3).integers(1, 50, NORMAL.shape).astype(np.float32)
    value = f.compress(sparse, f.PalettizeConfig(bits=2), importance=importance)
    alone = f.palettize(
        sparse.nonzeros, f.PalettizeConfig(bits=2), importance=importance[sparse.mask()]
    )
    even = f.compress(sparse, f.PalettizeConfig(bits=2))
    np.testing.assert_array_equal(value.value.lut.reshape(-1), alone.lut.reshape(-1))
    assert not np.array_equal(value.value.lut, even.value.lut)


def test_groups_of_a_pruned_weight_lie_along_its_output_channels():
    value = f.compress(
        f.sparsify(NORMAL, MASK_OF_HALF), f.PalettizeConfig(bits=2, group_size=8), channel_axis=1
    )
    assert value.value.lut.shape == (1, 3, 4, 1)
    value = f.compress(f.sparsify(NORMAL, MASK_OF_HALF), f.QuantizeConfig(), channel_axis=1)
    assert value.value.scale.shape == (1, 24)


@pytest.mark.parametrize("granularity", [f.PerTensor(), f.PerChannel()])
@pytest.mark.parametrize("offset", [False, True])
def test_as_many_entries_as_codes_lose_nothing_of_a_quantized_weight(granularity, offset):
    config = f.QuantizeConfig(dtype="uint8", granularity=granularity, offset=offset)
    before = f.quantize(NORMAL, config)
    value = f.compress(before, f.PalettizeConfig(bits=8))
    np.testing.assert_array_equal(value.dense(), before.dense())


def test_palettized_codes_name_the_nearest_of_rounded_means():
    before = f.quantize(NORMAL, f.QuantizeConfig(granularity=f.PerTensor()))
    value = f.compress(before, f.PalettizeConfig(bits=3))
    codes = before.codes.astype(np.float64)
    means = f.palettize(before.codes.astype(np.float32), f.PalettizeConfig(bits=3)).lut
    expected = np.rint(means.astype(np.float64)).reshape(-1)
    entries = value.lut.codes.reshape(-1).astype(np.float64)
    np.testing.assert_array_equal(entries, expected)
    distance = np.abs(codes[..., None] - entries)
    chosen = np.take_along_axis(distance, value.codes[..., None].astype(np.intp), -1)[..., 0]
    np.testing.assert_array_equal(chosen, distance.min(axis=-1))


def test_codes_halfway_between_rounded_entries_take_the_lower_one():
    weight = np.arange(-127, 101, dtype=np.float32).reshape(4, 57)  # their own codes
    before = f.quantize(weight, f.QuantizeConfig(granularity=f.PerTensor()))
    np.testing.assert_array_equal(before.codes, weight)
    value = f.compress(before, f.PalettizeConfig(bits=2, table=f.Uniform()))
    entries = np.float64([-127, -51, 24, 100])  # of -127, -51.3, 24.3 and 100
    np.testing.assert_array_equal(value.lut.codes.reshape(-1), entries)
    expected = np.abs(weight.astype(np.float64)[..., None] - entries).argmin(axis=-1)
    np.testing.assert_array_equal(value.codes, expected)
