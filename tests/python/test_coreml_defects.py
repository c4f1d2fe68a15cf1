"""Where coremltools.optimize.coreml 9.0 is wrong or crashes, and what milpress.coreml does there.

Each test shows both. docs/compatibility.md says the same in words.
"""

from __future__ import annotations

import inspect
from typing import Any

import coremltools as ct
import coremltools.optimize as theirs
import numpy as np
import pytest
from coremltools.converters.mil.mil import Builder as mb  # noqa: N813
from coremltools.converters.mil.mil import types
from small_models import converted, linear, weight

import milpress as ours
from milpress.errors import ConfigError, UnsupportedError

QUANTIZE = "linear_quantize_weights", "OpLinearQuantizerConfig"
PALETTIZE = "palettize_weights", "OpPalettizerConfig"
PRUNE = "prune_weights", "OpMagnitudePrunerConfig"


def apply(library: Any, model: Any, step: tuple[str, str], **settings: Any) -> Any:
    """Return what a function of a library makes of a model; joint of one compressed already."""
    function, kind = step
    config = getattr(library.coreml, kind)(**settings)
    is_compressed = bool(constexprs(model))
    return getattr(library.coreml, function)(
        model, library.coreml.OptimizationConfig(config), joint_compression=is_compressed
    )


def constexprs(model: Any) -> list[Any]:
    operations = model._mil_program.functions["main"].operations
    return [op for op in operations if op.op_type.startswith("constexpr_")]


def dense_weight(model: Any) -> np.ndarray:
    """Return the weight of a linear layer, decoded by coremltools."""
    decoded = theirs.coreml.decompress_weights(model)
    (op,) = decoded._mil_program.functions["main"].find_ops(op_type="linear")
    return np.asarray(op.weight.val)


def both(values: np.ndarray, step: tuple[str, str], **settings: Any) -> tuple[Any, Any]:
    """Return what ours and coremltools make of the weight of a linear layer."""
    mine = apply(ours, linear(values), step, **settings)
    with np.errstate(all="ignore"):  # theirs is in float16
        reference = apply(theirs, linear(values), step, **settings)
    return dense_weight(mine), dense_weight(reference)


def compressed(model: Any) -> list[str]:
    """Return how ours treated the weights that it compressed."""
    return [report.treatment for report in model.compression_report.with_status("compressed")]


def relative_error(made: np.ndarray, values: np.ndarray) -> float:
    values = values.astype(np.float64)
    return float(np.linalg.norm(made - values) / np.linalg.norm(values))


# --- wrong results


def test_a_weight_that_is_left_keeps_its_values_although_scales_were_asked_for():
    values = weight(63, 64) * np.float16(19.5)
    settings = {
        "nbits": 4,
        "granularity": "per_grouped_channel",
        "group_size": 16,
        "enable_per_channel_scale": True,
    }
    mine, reference = both(values, PALETTIZE, **settings)
    np.testing.assert_array_equal(mine, values)
    assert np.abs(reference).max() <= 1 < np.abs(values).max()


def test_channel_scales_belong_to_output_channels_and_lower_the_error():
    values = weight(64, 64) * np.logspace(-2, 1, 64)[:, None].astype(np.float16)
    mine, reference = both(values, PALETTIZE, nbits=4, enable_per_channel_scale=True)
    assert relative_error(mine, values) < relative_error(reference, values)
    for row, made in zip(values, mine, strict=True):
        # A row's own table: 16 values over its range leave a small part of it.
        assert relative_error(made, row) < 0.2


def conv(target: str = "iOS18") -> Any:
    """Return a model of one convolution of 4,608 weights."""

    @mb.program(
        input_specs=[mb.TensorSpec(shape=(1, 16, 8, 8), dtype=types.fp16)],
        opset_version=getattr(ct.target, target),
    )
    def prog(x: Any) -> Any:
        return mb.conv(x=x, weight=weight(32, 16, 3, 3), name="y")

    return converted(prog, target)


def test_channel_scales_take_one_table_for_each_output_channel():
    tables = []
    for library in (ours, theirs):
        made = apply(library, conv(), PALETTIZE, nbits=4, enable_per_channel_scale=True)
        last = constexprs(made)[-1]
        assert last.op_type == "constexpr_lut_to_dense"
        tables.append(last.lut.shape)
    # coremltools: 2,304 entries for 4,608 weights, and a scale op before them.
    assert tables == [(32, 1, 1, 1, 16, 1), (1, 16, 3, 3, 16, 1)]


@pytest.mark.parametrize("scale", [1e-4, 400.0])
def test_norms_of_blocks_neither_underflow_nor_overflow(scale):
    rng = np.random.default_rng(0)
    values = (rng.standard_normal((64, 64)) * scale).astype(np.float16)
    mine, reference = both(values, PRUNE, target_sparsity=0.3, block_size=4)
    assert (mine == 0).mean() == pytest.approx(0.3, abs=4 / values.size)
    assert abs((reference == 0).mean() - 0.3) > 0.2


def test_exactly_as_many_weights_become_zero_as_asked_for():
    values = np.sign(weight(64, 64).astype(np.float32) + 0.01).astype(np.float16)
    mine, reference = both(values, PRUNE, target_sparsity=0.1)
    assert (mine == 0).sum() == int(values.size * 0.1)
    assert (reference == 0).all()


def test_large_float16_weights_are_pruned():
    values = weight(256, 260)  # float16 counts to 65,504
    mine, reference = both(values, PRUNE, target_sparsity=0.5)
    assert (mine == 0).sum() == values.size // 2
    np.testing.assert_array_equal(reference, values)


@pytest.mark.parametrize(("scale", "theirs_error"), [(1e5, np.nan), (1e-6, 0.5)])
def test_quantization_survives_the_range_of_float16(scale, theirs_error):
    rng = np.random.default_rng(1)
    values = (rng.uniform(-0.6, 0.6, (64, 64)) * scale).astype(np.float16)
    mine, reference = both(values, QUANTIZE, granularity="per_channel")
    half_step = np.abs(values.astype(np.float64)).max(axis=1, keepdims=True) / 254
    # A scale and a product, each rounded to float16, may add a last place of the greatest weight.
    last_place = np.spacing(np.abs(values).max(axis=1, keepdims=True)).astype(np.float64)
    assert (np.abs(mine - values.astype(np.float64)) <= half_step + last_place).all()
    if np.isnan(theirs_error):
        assert not np.isfinite(reference).all()
    else:
        assert relative_error(reference, values) > theirs_error


def test_a_table_of_a_pruned_weight_has_no_entry_for_zeros():
    values = weight(64, 64)
    errors = []
    for library in (ours, theirs):
        pruned = apply(library, linear(values), PRUNE, target_sparsity=0.5)
        made = apply(library, pruned, PALETTIZE, nbits=2)
        (lut,) = [op.lut.val for op in constexprs(made) if op.op_type == "constexpr_lut_to_sparse"]
        assert bool((lut == 0).any()) == (library is theirs)
        errors.append(relative_error(dense_weight(made), values))
    assert errors[0] < errors[1]


def lookup(table: np.ndarray) -> Any:
    """Return a model that looks up rows of integers."""

    @mb.program(
        input_specs=[mb.TensorSpec(shape=(5,), dtype=types.int32)], opset_version=ct.target.iOS18
    )
    def prog(ids: Any) -> Any:
        rows = mb.gather(x=table, indices=ids, axis=0, validate_indices=False, name="rows")
        return mb.cast(x=rows, dtype="fp32", name="y")

    return converted(prog, "iOS18")


@pytest.mark.parametrize(
    ("step", "settings", "low", "high"),
    [(PALETTIZE, {"nbits": 4}, 0, 2), (PRUNE, {"target_sparsity": 0.1}, -128, 128)],
)
def test_integer_constants_keep_their_values(step, settings, low, high):
    table = np.random.default_rng(4).integers(low, high, (120, 48)).astype(np.int8)
    results = []
    for library in (ours, theirs):
        made = theirs.coreml.decompress_weights(apply(library, lookup(table), step, **settings))
        (op,) = made._mil_program.functions["main"].find_ops(op_type="gather")
        results.append(np.asarray(op.x.val))
    np.testing.assert_array_equal(results[0], table)
    if step is PRUNE:  # the magnitude of -128 overflows to -128, the least of all
        assert (results[1][table == -128] == 0).all()


def test_integer_constants_are_no_error_of_quantization():
    table = np.random.default_rng(5).integers(0, 256, (120, 48)).astype(np.uint8)
    with pytest.raises(ValueError, match="Only floating numpy arrays"):
        apply(theirs, lookup(table), QUANTIZE)
    report = apply(ours, lookup(table), QUANTIZE).compression_report
    (found,) = [weight for weight in report.weights if weight.name == "rows_x_0"]
    assert (found.status, found.note) == ("not asked", "uint8, not a float")


# --- crashes


def test_a_pruned_weight_is_palettized_by_vectors():
    mine, reference = (
        apply(library, linear(weight(64, 64)), PRUNE, target_sparsity=0.5)
        for library in (ours, theirs)
    )
    with pytest.raises(IndexError, match="boolean"):
        apply(theirs, reference, PALETTIZE, nbits=4, cluster_dim=2)
    made = apply(ours, mine, PALETTIZE, nbits=4, cluster_dim=2)
    assert compressed(made) == ["palettize 4 bits, vectors of 2"]
    was, kept = (
        (dense_weight(model).reshape(32, 2, 64) != 0).any(axis=1) for model in (mine, made)
    )
    np.testing.assert_array_equal(kept, was)


def test_vectors_may_have_channel_scales():
    settings = {"nbits": 4, "cluster_dim": 2, "enable_per_channel_scale": True}
    with pytest.raises(ValueError, match="vector_axis"):
        apply(theirs, linear(weight(64, 64)), PALETTIZE, **settings)
    made = apply(ours, linear(weight(64, 64)), PALETTIZE, **settings)
    assert len(compressed(made)) == 1


def test_tables_of_a_convolution_are_quantized_in_ios26():
    with pytest.raises(ValueError, match="same rank, but got 4 vs 2"):
        apply(
            theirs,
            apply(theirs, conv("iOS26"), PALETTIZE, nbits=4),
            QUANTIZE,
            granularity="per_tensor",
        )
    palette = apply(ours, conv("iOS26"), PALETTIZE, nbits=4)
    made = apply(ours, palette, QUANTIZE, granularity="per_tensor")
    scaled, last = constexprs(made)
    assert scaled.data.dtype == types.int8
    assert scaled.data.shape == scaled.outputs[0].shape == (1, 1, 1, 1, 16, 1)
    assert last.op_type == "constexpr_lut_to_dense"


def test_three_bits_before_ios18_are_refused_in_one_sentence():
    with pytest.raises(ValueError, match="lut"):
        apply(theirs, linear(weight(64, 64), "iOS16"), PALETTIZE, nbits=3)
    with pytest.raises(UnsupportedError, match="3-bit palettization is supported since iOS18"):
        apply(ours, linear(weight(64, 64), "iOS16"), PALETTIZE, nbits=3)


def test_five_to_eight_distinct_values_take_four_bits_before_ios18():
    values = np.random.default_rng(2).integers(0, 6, (64, 64)).astype(np.float16)
    with pytest.raises(ValueError, match="lut"):
        apply(theirs, linear(values, "iOS16"), PALETTIZE, mode="unique")
    made = apply(ours, linear(values, "iOS16"), PALETTIZE, mode="unique")
    np.testing.assert_array_equal(dense_weight(made), values)


def test_a_model_may_be_given_by_keyword_and_functions_tell_their_parameters():
    config = {
        library: library.coreml.OptimizationConfig(library.coreml.OpPalettizerConfig(nbits=4))
        for library in (ours, theirs)
    }
    with pytest.raises(ValueError, match='must takes "mlmodel" as an input'):
        theirs.coreml.palettize_weights(mlmodel=linear(weight(64, 64)), config=config[theirs])
    made = ours.coreml.palettize_weights(mlmodel=linear(weight(64, 64)), config=config[ours])
    assert len(compressed(made)) == 1
    assert theirs.coreml.palettize_weights.__name__ == "decorator"
    assert ours.coreml.palettize_weights.__name__ == "palettize_weights"
    parameters = list(inspect.signature(ours.coreml.palettize_weights).parameters)
    assert parameters[:3] == ["mlmodel", "config", "joint_compression"]


def test_workers_can_be_asked_for_again_and_again():
    settings = {
        "nbits": 4,
        "granularity": "per_grouped_channel",
        "group_size": 32,
        "num_kmeans_workers": 2,
    }
    # coremltools' second call ends with "Pool not running" when an instance of its pass has gone.
    # It is not run here: its workers are forks, which may wait forever for threads of this process.
    model = linear(weight(64, 64))
    packages = [apply(ours, model, PALETTIZE, **settings) for _ in range(2)]
    np.testing.assert_array_equal(*(dense_weight(made) for made in packages))


def test_a_constant_that_only_the_model_returns_is_left():
    @mb.program(
        input_specs=[mb.TensorSpec(shape=(1, 64), dtype=types.fp16)], opset_version=ct.target.iOS18
    )
    def prog(x: Any) -> Any:
        returned = mb.const(val=weight(64, 64, seed=1), name="returned")
        return mb.linear(x=x, weight=weight(64, 64), name="y"), returned

    model = converted(prog, "iOS18")
    for library in (ours, theirs):
        config = library.coreml.OptimizationConfig(
            op_name_configs={"returned": library.coreml.OpPalettizerConfig(nbits=4)}
        )
        if library is theirs:
            with pytest.raises(IndexError):
                theirs.coreml.palettize_weights(model, config)
        else:
            made = ours.coreml.palettize_weights(model, config)
            (left,) = made.compression_report.with_status("left")
            assert (left.name, left.note) == ("returned", "a block returns it")


def test_codes_with_channel_scales_are_left_as_they_are():
    settings = {"nbits": 4, "enable_per_channel_scale": True}
    mine, reference = (
        apply(library, linear(weight(64, 64)), QUANTIZE) for library in (ours, theirs)
    )
    with pytest.raises(TypeError, match="divide"):
        apply(theirs, reference, PALETTIZE, **settings)
    made = apply(ours, mine, PALETTIZE, **settings)
    (left,) = made.compression_report.with_status("left")
    assert "singly and without further scales" in left.note
    np.testing.assert_array_equal(dense_weight(made), dense_weight(mine))


def test_vectors_of_no_elements_are_refused_with_the_config():
    with pytest.raises(ZeroDivisionError):
        apply(theirs, linear(weight(64, 64)), PALETTIZE, nbits=4, cluster_dim=0)
    with pytest.raises(ConfigError, match="cluster_dim"):
        ours.coreml.OpPalettizerConfig(nbits=4, cluster_dim=0)


def test_a_weight_threshold_of_none_is_the_default():
    with pytest.raises(ValueError, match="weight_threshold cannot be None"):
        apply(theirs, linear(weight(64, 64)), PALETTIZE, nbits=4, weight_threshold=None)
    for n_rows, n in ((64, 1), (32, 0)):  # 4,096 and 2,048 weights
        model = linear(weight(n_rows, 64))
        made = apply(ours, model, PALETTIZE, nbits=4, weight_threshold=None)
        assert len(compressed(made)) == n
