"""Rounding with error feedback, beside elimination of one input after the other in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest

from milpress.errors import ConfigError, UnsupportedError
from milpress.formats import (
    Masked,
    PalettizeConfig,
    PerBlock,
    PerChannel,
    PerTensor,
    PruneConfig,
    QuantizeConfig,
    error_feedback,
    palettize,
)
from milpress.formats.error_feedback import FeedbackConfig

RNG = np.random.default_rng


def inputs(n: int, n_rows: int = 200, seed: int = 0) -> np.ndarray:
    """Return inputs that depend on each other."""
    random = RNG(seed)
    mix = random.normal(size=(n, n)) * np.exp(random.normal(size=n))
    return (random.normal(size=(n_rows, n)) @ mix).astype(np.float32)


def second_moments(x: np.ndarray) -> np.ndarray:
    return (x.T @ x)[None]


def weight(shape, seed: int = 1) -> np.ndarray:
    return RNG(seed).normal(size=shape).astype(np.float32)


def eliminated(w, moments, dampening, nearest, order=None):
    """Round columns in order; after each, move the others to where the output's error is least.

    As Frantar and Alistarh 2022, "Optimal Brain Compression", arXiv 2208.11580, say it: with the
    inverse of the second moments, from which each rounded column is eliminated.
    """
    w = np.array(w, np.float64)
    h = np.array(moments, np.float64)
    n = len(h)
    h += dampening * h.diagonal().mean() * np.eye(n)
    inverse = np.linalg.inv(h)
    out = np.zeros_like(w)
    for j in range(n) if order is None else order:
        out[:, j] = nearest(w[:, j], j)
        error = (w[:, j] - out[:, j]) / inverse[j, j]
        w -= np.outer(error, inverse[j])
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return out


def output_error(w, made, x) -> float:
    return float(np.square((made.astype(np.float64) - w) @ x.T.astype(np.float64)).sum())


@pytest.mark.parametrize("panel_size", [1, 5, 128])
def test_integers_are_those_of_elimination_column_by_column(panel_size):
    x, w = inputs(24), weight((6, 24))
    config = FeedbackConfig(panel_size=panel_size)
    factor = error_feedback.factorize(second_moments(x), config)
    value = error_feedback.quantize(w, QuantizeConfig(dtype="int4"), factor, config)
    scale = 2 * np.abs(w).max(axis=1) / 15

    def nearest(column, _j):
        return np.clip(np.rint(column / scale), -8, 7) * scale

    oracle = eliminated(w, x.T @ x, 0.01, nearest)
    # Codes are the same, so only the scale's own rounding is left.
    np.testing.assert_allclose(value.dense(), oracle, rtol=2.0**-22)
    plain = np.clip(np.rint(w / scale[:, None]), -8, 7) * scale[:, None]
    assert output_error(w, value.dense(), x) < output_error(w, plain, x) / 2


def test_entries_of_tables_are_those_of_elimination_column_by_column():
    x, w = inputs(24), weight((8, 24))
    factor = error_feedback.factorize(second_moments(x), FeedbackConfig())
    tables = palettize(w, PalettizeConfig(bits=3, group_size=4))
    value = error_feedback.palettize(w, tables, factor)
    luts = tables.rows()[1]

    def nearest(column, _j):
        picked = [luts[i // 4][np.abs(luts[i // 4] - c).argmin()] for i, c in enumerate(column)]
        return np.array(picked)

    np.testing.assert_array_equal(value.dense(), eliminated(w, x.T @ x, 0.01, nearest))
    assert output_error(w, value.dense(), x) < output_error(w, tables.dense(), x)


def test_columns_of_groups_along_the_inputs_have_their_own_tables():
    x, w = inputs(4 * 3), weight((6, 4, 3))
    factor = error_feedback.factorize(second_moments(x), FeedbackConfig())
    tables = palettize(w, PalettizeConfig(bits=2, group_size=2, channel_axis=1))
    value = error_feedback.palettize(w, tables, factor)
    luts = tables.entries.reshape(2, 4)
    for i in range(2):
        assert set(np.unique(value.dense()[:, 2 * i : 2 * i + 2])) <= set(luts[i])

    def nearest(column, j):
        table = luts[j // 6]
        return table[np.abs(table - column[:, None]).argmin(axis=1)]

    oracle = eliminated(w.reshape(6, -1), x.T @ x, 0.01, nearest)
    np.testing.assert_array_equal(value.dense().reshape(6, -1), oracle)


def test_in_activation_order_columns_of_powerful_inputs_come_first():
    x, w = inputs(16), weight((5, 16))
    config = FeedbackConfig(activation_order=True, panel_size=4)
    factor = error_feedback.factorize(second_moments(x), config)
    treatment = QuantizeConfig(dtype="uint4", granularity=PerBlock(4), offset=True)
    value = error_feedback.quantize(w, treatment, factor, config)
    blocks = w.reshape(5, 4, 4)
    low, high = np.minimum(blocks.min(-1), 0), np.maximum(blocks.max(-1), 0)
    scale = ((high - low) / np.float32(15)).astype(np.float32)
    offset = np.rint(-low / scale)
    np.testing.assert_array_equal(value.scale, scale)
    np.testing.assert_array_equal(value.offset, offset)

    def nearest(column, j):
        s, z = scale[:, j // 4], offset[:, j // 4]
        return (np.clip(np.rint(column / s) + z, 0, 15) - z) * s

    order = np.argsort(-np.square(x.astype(np.float64)).sum(axis=0))
    oracle = eliminated(w, x.T @ x, 0.01, nearest, order)
    np.testing.assert_allclose(value.dense(), oracle, rtol=2.0**-22)


def test_a_block_has_the_scale_of_what_its_weights_are_when_it_begins():
    x, w = inputs(12), weight((4, 12))
    factor = error_feedback.factorize(second_moments(x), FeedbackConfig())
    treatment = QuantizeConfig(dtype="int4", granularity=PerBlock(4))
    value = error_feedback.quantize(w, treatment, factor)
    scales = np.zeros((4, 3))

    def nearest(column, j):
        if j % 4 == 0:
            scales[:, j // 4] = 2 * np.abs(pending[:, j : j + 4]).max(axis=1) / 15
        scale = scales[:, j // 4]
        return np.clip(np.rint(column / scale), -8, 7) * scale

    h = (x.T @ x).astype(np.float64)
    inverse = np.linalg.inv(h + 0.01 * h.diagonal().mean() * np.eye(12))
    pending = w.astype(np.float64)
    oracle = np.zeros_like(pending)
    for j in range(12):
        oracle[:, j] = nearest(pending[:, j], j)
        error = (pending[:, j] - oracle[:, j]) / inverse[j, j]
        pending -= np.outer(error, inverse[j])
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    # float32 moves a scale by some last places of the weights that it is of.
    np.testing.assert_allclose(value.scale, scales, rtol=2.0**-18)
    np.testing.assert_allclose(value.dense(), oracle, rtol=2.0**-18)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(("bits", "name"), [(3, "uint4"), (4, "int4"), (8, "uint8"), (8, "int8")])
def test_with_independent_inputs_weights_are_within_half_a_step(dtype, bits, name):
    w = weight((4, 32)).astype(dtype)
    w[0] = np.abs(w[0])  # a range about zero, though nothing is below it
    w[1] = 0
    factor = error_feedback.factorize(np.eye(32, dtype=np.float32)[None], FeedbackConfig())
    value = error_feedback.quantize(w, QuantizeConfig(dtype=name), factor, bits=bits)
    steps = value.scale.astype(np.float64)
    assert int(value.codes.max()) - int(value.codes.min()) < 2**bits
    # The greatest weight lies half a step beyond the last code; products round to the type.
    bound = 0.5 * steps + 2 * np.finfo(dtype).eps * np.abs(w)
    assert (np.abs(value.dense().astype(np.float64) - w) <= bound).all()


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 1.0])
def test_as_many_weights_become_zero_as_asked_for(sparsity):
    x, w = inputs(40), weight((7, 40))
    config = FeedbackConfig(panel_size=12)
    factor = error_feedback.factorize(second_moments(x), config)
    made = error_feedback.prune(w, PruneConfig(sparsity=sparsity), factor, config)
    assert int((made.dense() == 0).sum()) == math.floor(w.size * sparsity)
    if sparsity in (0.3, 0.5):
        plain = np.where(np.abs(w) > np.quantile(np.abs(w), sparsity), w, 0)
        assert output_error(w, made.dense(), x) < output_error(w, plain, x) / 2
    if sparsity == 0:
        np.testing.assert_array_equal(made.dense(), w)


def test_n_of_m_zeros_are_in_every_m_inputs():
    x, w = inputs(40), weight((7, 40))
    config = FeedbackConfig(panel_size=10)  # made a multiple of m
    factor = error_feedback.factorize(second_moments(x), config)
    made = error_feedback.prune(w, PruneConfig(n_m=(3, 4)), factor, config).dense()
    np.testing.assert_array_equal((made.reshape(7, 10, 4) == 0).sum(axis=2), 3)


def test_pruned_codes_are_zero_outside_the_mask_and_on_the_grid_inside():
    x, w = inputs(32), weight((6, 32))
    factor = error_feedback.factorize(second_moments(x), FeedbackConfig())
    treatment = QuantizeConfig(dtype="uint4")
    value = error_feedback.quantize(w, treatment, factor, pruning=PruneConfig(sparsity=0.5))
    assert isinstance(value, Masked)
    assert int(value.mask().sum()) == w.size // 2
    dense = value.dense()
    assert (dense[~value.mask()] == 0).all()
    inner = value.value.dense()
    np.testing.assert_array_equal(dense[value.mask()], inner[value.mask()])


def test_zeros_that_are_there_stay():
    x, w = inputs(32), weight((6, 32))
    w[RNG(3).random(w.shape) < 0.4] = 0
    factor = error_feedback.factorize(second_moments(x), FeedbackConfig())
    tables = palettize(w, PalettizeConfig(bits=2))
    value = error_feedback.palettize(w, tables, factor, kept=w != 0)
    np.testing.assert_array_equal(value.dense() == 0, w == 0)


def test_inputs_that_are_always_zero_are_rounded_by_themselves():
    x, w = inputs(10), weight((3, 10))
    x[:, [2, 7]] = 0
    factor = error_feedback.factorize(second_moments(x), FeedbackConfig())
    value = error_feedback.quantize(w, QuantizeConfig(dtype="int8"), factor)
    bound = 0.5 * value.scale + 2.0**-22 * np.abs(w)
    assert (np.abs(value.dense() - w) <= bound)[:, [2, 7]].all()
    nothing = error_feedback.factorize(np.zeros((1, 10, 10), np.float32), FeedbackConfig())
    assert (
        np.abs(error_feedback.quantize(w, QuantizeConfig(), nothing).dense() - w) <= bound
    ).all()


def test_each_group_of_a_convolution_is_as_if_it_stood_alone():
    w = weight((6, 4, 3))
    parts = [inputs(12, seed=seed) for seed in (0, 1)]
    config = FeedbackConfig(activation_order=True)
    both = error_feedback.factorize(np.concatenate([second_moments(x) for x in parts]), config)
    treatment = QuantizeConfig(granularity=PerBlock(2))
    value = error_feedback.quantize(w, treatment, both, config)
    for i, x in enumerate(parts):
        alone = error_feedback.factorize(second_moments(x), config)
        rows = slice(3 * i, 3 * i + 3)
        one = error_feedback.quantize(w[rows], treatment, alone, config)
        np.testing.assert_array_equal(value.dense()[rows], one.dense())


def test_a_scale_for_the_whole_weight_is_that_of_its_greatest():
    x, w = inputs(10), weight((3, 10))
    factor = error_feedback.factorize(second_moments(x), FeedbackConfig())
    value = error_feedback.quantize(w, QuantizeConfig(granularity=PerTensor()), factor)
    assert value.scale.shape == (1, 1)
    np.testing.assert_array_equal(value.scale, 2 * np.abs(w).max() / np.float32(255))


def test_clipped_ranges_suit_better_than_whole_ones():
    x, w = inputs(64), weight((16, 64))
    w[:, 5] *= 6
    factor = error_feedback.factorize(second_moments(x), FeedbackConfig())
    errors = {
        kind: output_error(
            w,
            error_feedback.quantize(
                w, QuantizeConfig(dtype="int4", granularity=PerChannel(), range=kind), factor
            ).dense(),
            x,
        )
        for kind in ("minmax", "mse")
    }
    assert errors["mse"] < errors["minmax"]


def test_float16_scales_that_would_be_zero_are_the_smallest_there_is():
    w = np.full((2, 8), 6e-8, np.float16)
    factor = error_feedback.factorize(np.eye(8, dtype=np.float32)[None], FeedbackConfig())
    value = error_feedback.quantize(w, QuantizeConfig(), factor)
    assert (value.scale > 0).all()
    assert np.isfinite(value.dense()).all()


def test_inputs_that_depend_on_each_other_wholly_are_no_obstacle():
    x, w = np.ones((50, 12), np.float32), weight((3, 12))
    config = FeedbackConfig(dampening=0.0)
    factor = error_feedback.factorize(second_moments(x), config)
    assert factor.dampening > 0
    value = error_feedback.quantize(w, QuantizeConfig(dtype="int4"), factor, config)
    # The errors of a row add up to less than its last column's.
    error = np.abs((value.dense() - w).sum(axis=1))
    assert (error <= 0.51 * value.scale[:, 0] + 0.01).all()


def test_bad_settings_and_inputs_are_refused():
    with pytest.raises(ConfigError, match="dampening must be finite"):
        FeedbackConfig(dampening=-1)
    with pytest.raises(ConfigError, match="panel_size must be at least 1"):
        FeedbackConfig(panel_size=0)
    with pytest.raises(UnsupportedError, match="inputs of the layer are not finite"):
        error_feedback.factorize(np.full((1, 2, 2), np.nan, np.float32), FeedbackConfig())
    factor = error_feedback.factorize(np.eye(6, dtype=np.float32)[None], FeedbackConfig())
    with pytest.raises(ConfigError, match="block_size must divide the 6 input channels, got 4"):
        error_feedback.quantize(weight((2, 6)), QuantizeConfig(granularity=PerBlock(4)), factor)
    vectors = palettize(weight((4, 6)), PalettizeConfig(bits=1, vector_size=2))
    with pytest.raises(ConfigError, match="tables must be of single values, got vectors of 2"):
        error_feedback.palettize(weight((4, 6)), vectors, factor)
