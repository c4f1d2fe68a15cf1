"""milpress.coreml beside coremltools.optimize.coreml: same ops, same values, its defects gone."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import numpy as np
import pytest
from conftest import weight
from oracles import decoded, decompressed_by_coremltools, ops_of

import milpress as ours
from milpress.errors import CompressionError, ConfigError, UnsupportedError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import coremltools as ct
    import coremltools.optimize as theirs
    from coremltools.converters.mil.mil import Builder as mb  # noqa: N813
    from coremltools.converters.mil.mil import types

pytestmark = pytest.mark.filterwarnings("ignore")

QUANTIZE = "linear_quantize_weights", "OpLinearQuantizerConfig"
PALETTIZE = "palettize_weights", "OpPalettizerConfig"
PRUNE = "prune_weights", "OpMagnitudePrunerConfig"
THRESHOLD = "prune_weights", "OpThresholdPrunerConfig"

# (function, config), settings, from which target on
SETTINGS: dict[str, tuple[tuple[str, str], dict[str, Any], str]] = {
    "int8": (QUANTIZE, {}, "iOS16"),
    "int8 linear": (QUANTIZE, {"mode": "linear"}, "iOS16"),
    "uint8 per tensor": (QUANTIZE, {"dtype": "uint8", "granularity": "per_tensor"}, "iOS16"),
    "int4": (QUANTIZE, {"dtype": "int4"}, "iOS18"),
    "uint4 linear": (QUANTIZE, {"dtype": "uint4", "mode": "linear"}, "iOS18"),
    "int4 blocks": (
        QUANTIZE,
        {"dtype": "int4", "granularity": "per_block", "block_size": 8},
        "iOS18",
    ),
    "threshold": (THRESHOLD, {"threshold": 0.05, "minimum_sparsity_percentile": 0.1}, "iOS16"),
    "n:m": (PRUNE, {"n_m_ratio": (2, 4)}, "iOS16"),
    "n:m over outputs": (PRUNE, {"n_m_ratio": (1, 3), "dim": 0}, "iOS16"),
    "kmeans 1": (PALETTIZE, {"nbits": 1}, "iOS16"),
    "kmeans 4": (PALETTIZE, {"nbits": 4}, "iOS16"),
    "kmeans 3 groups": (
        PALETTIZE,
        {"nbits": 3, "granularity": "per_grouped_channel", "group_size": 8},
        "iOS18",
    ),
    "kmeans 2 input groups": (
        PALETTIZE,
        {"nbits": 2, "granularity": "per_grouped_channel", "group_size": 8, "channel_axis": 1},
        "iOS18",
    ),
    "uniform 4": (PALETTIZE, {"nbits": 4, "mode": "uniform"}, "iOS16"),
}
EXACT = ("int8", "uint8", "int4", "uint4", "threshold")


def compressed(library: Any, source: Any, setting: str, out: Any, **more: Any) -> Any:
    (function, config), settings, _ = SETTINGS[setting]
    op_config = getattr(library.coreml, config)(**settings, weight_threshold=100)
    model = ct.models.MLModel(str(source), skip_model_load=True)
    made = getattr(library.coreml, function)(
        model, library.coreml.OptimizationConfig(op_config), **more
    )
    made.save(str(out))
    return made


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize(
    ("setting", "target"),
    [
        (setting, target)
        for setting, (_, _, first) in SETTINGS.items()
        for target in ("iOS16", "iOS17", "iOS18", "iOS26")
        if target >= first
    ],
)
def test_results_equal_coremltools_or_are_better(build, tmp_path, setting, target, dtype):
    source = build("layers", target, dtype)
    one, other = tmp_path / "ours.mlpackage", tmp_path / "theirs.mlpackage"
    compressed(ours, source, setting, one)
    compressed(theirs, source, setting, other)
    # The other ops differ in order: coremltools runs its default passes on the user's graph.
    mine, reference = (
        sorted(op for op in ops_of(path) if op[0].startswith("constexpr_")) for path in (one, other)
    )
    assert mine == reference
    dense, mine, reference = decoded(source), decoded(one), decompressed_by_coremltools(other)
    for name, values in mine.items():
        if setting.startswith(EXACT):
            np.testing.assert_array_equal(values, reference[name], err_msg=name)
            continue
        origin = next(
            array
            for key, array in dense.items()
            if name.startswith((f"{key}_palettized", f"{key}_sparsified")) or name == key
        ).astype(np.float64)
        error = ((values - origin) ** 2).sum()
        expected = ((reference[name] - origin) ** 2).sum()
        # The entries of a uniform table are rounded once, coremltools' after each step: of 16 steps
        # in float16, that moves the error by less than 16 * 2**-11.
        slack = 16 * 2.0**-11 if setting.startswith("uniform") else 1e-12
        assert error <= expected * (1 + slack), name


@pytest.mark.parametrize("setting", ["int8", "kmeans 4", "threshold"])
def test_paths_and_models_give_the_same_package(crepe_tiny, tmp_path, setting):
    (function, config), settings, _ = SETTINGS[setting]
    asked = ours.coreml.OptimizationConfig(getattr(ours.coreml, config)(**settings))
    by_path, by_model = tmp_path / "path.mlpackage", tmp_path / "model.mlpackage"
    getattr(ours.coreml, function)(crepe_tiny, asked, destination=by_path)
    model = ct.models.MLModel(str(crepe_tiny), skip_model_load=True)
    made = getattr(ours.coreml, function)(model, asked, destination=by_model)
    assert made.compression_report.verified
    for path in by_path.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (by_model / path.relative_to(by_path)).read_bytes()


def linear(values: np.ndarray, target: Any = ct.target.iOS18) -> Any:
    """Return a model with one linear layer."""
    element = types.fp16 if values.dtype == np.float16 else types.fp32

    @mb.program(
        input_specs=[mb.TensorSpec(shape=(1, values.shape[1]), dtype=element)],
        opset_version=target,
    )
    def prog(x: Any) -> Any:
        return mb.linear(x=x, weight=values, name="y")

    return ct.convert(
        prog,
        minimum_deployment_target=target,
        compute_precision=ct.precision.FLOAT32,
        pass_pipeline=ct.PassPipeline.EMPTY,
        skip_model_load=True,
    )


def result(library: Any, values: np.ndarray, function: str, config: Any, **more: Any) -> np.ndarray:
    """Return what a library makes of the weight of a linear layer, decoded by coremltools."""
    coreml = library.coreml
    made = getattr(coreml, function)(linear(values), coreml.OptimizationConfig(config), **more)
    dense = theirs.coreml.decompress_weights(made)
    (op,) = dense._mil_program.functions["main"].find_ops(op_type="linear")
    return np.asarray(op.weight.val)


def both(values: np.ndarray, function: str, kind: str, **settings: Any) -> tuple[Any, Any]:
    return tuple(
        result(library, values, function, getattr(library.coreml, kind)(**settings))
        for library in (ours, theirs)
    )


def relative_error(made: np.ndarray, values: np.ndarray) -> float:
    values = values.astype(np.float64)
    return float(np.linalg.norm(made - values) / np.linalg.norm(values))


def test_a_weight_that_is_left_keeps_its_values_although_scales_were_asked_for():
    values = weight(63, 64) * np.float16(19.5)
    settings = {
        "nbits": 4,
        "granularity": "per_grouped_channel",
        "group_size": 16,
        "enable_per_channel_scale": True,
    }
    mine, reference = both(values, *PALETTIZE, **settings)
    np.testing.assert_array_equal(mine, values)
    assert np.abs(reference).max() <= 1 < np.abs(values).max()


def test_channel_scales_belong_to_output_channels_and_lower_the_error():
    values = weight(64, 64) * np.logspace(-2, 1, 64)[:, None].astype(np.float16)
    mine, reference = both(values, *PALETTIZE, nbits=4, enable_per_channel_scale=True)
    assert relative_error(mine, values) < relative_error(reference, values)
    for row, made in zip(values, mine, strict=True):
        # A row's own table: 16 values over its range leave a small part of it.
        assert relative_error(made, row) < 0.2


@pytest.mark.parametrize("scale", [1e-4, 400.0])
def test_norms_of_blocks_neither_underflow_nor_overflow(scale):
    rng = np.random.default_rng(0)
    values = (rng.standard_normal((64, 64)) * scale).astype(np.float16)
    mine, reference = both(values, *PRUNE, target_sparsity=0.3, block_size=4)
    assert (mine == 0).mean() == pytest.approx(0.3, abs=4 / values.size)
    assert abs((reference == 0).mean() - 0.3) > 0.2


def test_exactly_as_many_weights_become_zero_as_asked_for():
    values = np.sign(weight(64, 64).astype(np.float32) + 0.01).astype(np.float16)
    mine, reference = both(values, *PRUNE, target_sparsity=0.1)
    assert (mine == 0).sum() == int(values.size * 0.1)
    assert (reference == 0).all()


@pytest.mark.parametrize(("scale", "theirs_error"), [(1e5, np.nan), (1e-6, 0.5)])
def test_quantization_survives_the_range_of_float16(scale, theirs_error):
    rng = np.random.default_rng(1)
    values = (rng.uniform(-0.6, 0.6, (64, 64)) * scale).astype(np.float16)
    mine, reference = both(values, *QUANTIZE, granularity="per_channel")
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
        coreml = library.coreml
        pruned = coreml.prune_weights(
            linear(values),
            coreml.OptimizationConfig(coreml.OpMagnitudePrunerConfig(target_sparsity=0.5)),
        )
        made = coreml.palettize_weights(
            pruned,
            coreml.OptimizationConfig(coreml.OpPalettizerConfig(nbits=2)),
            joint_compression=True,
        )
        (op,) = made._mil_program.functions["main"].find_ops(op_type="constexpr_lut_to_sparse")
        dense = theirs.coreml.decompress_weights(made)
        (user,) = dense._mil_program.functions["main"].find_ops(op_type="linear")
        errors.append(relative_error(np.asarray(user.weight.val), values))
        has_zero = bool((np.asarray(op.lut.val) == 0).any())
        assert has_zero == (library is theirs)
    assert errors[0] < errors[1]


CRASHES = {
    "vectors with scales": (
        PALETTIZE,
        {"nbits": 4, "cluster_dim": 2, "enable_per_channel_scale": True},
        ct.target.iOS18,
    ),
    "unique values of 3 bits before iOS18": (PALETTIZE, {"mode": "unique"}, ct.target.iOS16),
}


@pytest.mark.parametrize("case", CRASHES)
def test_what_crashes_coremltools_works(case):
    (function, kind), settings, target = CRASHES[case]
    values = np.random.default_rng(2).integers(0, 6, (64, 64)).astype(np.float16)
    model = linear(values, target)
    config = theirs.coreml.OptimizationConfig(getattr(theirs.coreml, kind)(**settings))
    with pytest.raises(ValueError, match=r"vector_axis|nbits|LUT|lut"):
        getattr(theirs.coreml, function)(model, config)
    config = ours.coreml.OptimizationConfig(getattr(ours.coreml, kind)(**settings))
    made = getattr(ours.coreml, function)(model, config)
    assert made.compression_report.with_status("compressed")


@pytest.mark.parametrize("library", [ours, theirs])
def test_a_pruned_weight_is_palettized_by_vectors(library):
    coreml = library.coreml
    pruned = coreml.prune_weights(
        linear(weight(64, 64)),
        coreml.OptimizationConfig(coreml.OpMagnitudePrunerConfig(target_sparsity=0.5)),
    )
    config = coreml.OptimizationConfig(coreml.OpPalettizerConfig(nbits=4, cluster_dim=2))
    if library is theirs:
        with pytest.raises(IndexError):
            coreml.palettize_weights(pruned, config, joint_compression=True)
        return
    made = coreml.palettize_weights(pruned, config, joint_compression=True)
    (report,) = made.compression_report.with_status("compressed")
    assert report.treatment == "palettize 4 bits, vectors of 2"


def test_a_model_may_be_given_by_keyword():
    config = ours.coreml.OptimizationConfig(ours.coreml.OpPalettizerConfig(nbits=4))
    made = ours.coreml.palettize_weights(mlmodel=linear(weight(64, 64)), config=config)
    assert made.compression_report.with_status("compressed")


def test_coremltools_own_configs_are_taken(crepe_tiny):
    config = theirs.coreml.OptimizationConfig(theirs.coreml.OpLinearQuantizerConfig())
    made = ours.coreml.linear_quantize_weights(crepe_tiny, config)
    assert len(made.compression_report.with_status("compressed")) == 7


def test_a_clipped_range_lowers_the_error():
    values = np.random.default_rng(3).standard_t(4, (64, 64)).astype(np.float16)
    errors = []
    for kind in ("minmax", "mse"):
        config = ours.coreml.OpLinearQuantizerConfig(
            dtype="int4", granularity="per_block", block_size=32, range=kind
        )
        errors.append(relative_error(result(ours, values, QUANTIZE[0], config), values))
    # quality.md measured +1.9 dB on real weights.
    assert errors[1] < 0.9 * errors[0]


def test_a_group_size_that_does_not_divide_is_left_with_a_warning_or_made_smaller(caplog):
    settings = {"nbits": 4, "granularity": "per_grouped_channel", "group_size": 16}
    with caplog.at_level(logging.WARNING, "milpress"):
        left = ours.coreml.palettize_weights(
            linear(weight(60, 64)),
            ours.coreml.OptimizationConfig(ours.coreml.OpPalettizerConfig(**settings)),
        )
    assert not left.compression_report.with_status("compressed")
    assert "y_weight_0: group size 16 does not divide 60 output channels" in caplog.text
    made = ours.coreml.palettize_weights(
        linear(weight(60, 64)),
        ours.coreml.OptimizationConfig(
            ours.coreml.OpPalettizerConfig(**settings, on_indivisible="divisor")
        ),
    )
    (report,) = made.compression_report.with_status("compressed")
    assert "group size 15" in report.treatment
    with pytest.raises(UnsupportedError, match="group size 16 does not divide"):
        ours.coreml.palettize_weights(
            linear(weight(60, 64)),
            ours.coreml.OptimizationConfig(ours.coreml.OpPalettizerConfig(**settings)),
            on_unsupported="error",
        )


def test_a_name_that_matches_nothing_is_a_warning(caplog):
    config = ours.coreml.OptimizationConfig(
        ours.coreml.OpPalettizerConfig(nbits=4), op_name_configs={"glob:no_such*": None}
    )
    ours.coreml.palettize_weights(linear(weight(64, 64)), config)
    assert "'glob:no_such*', which nothing in the model matches" in caplog.text


def test_a_scale_whose_tables_would_outgrow_the_weight_is_dropped_and_said_to_be(build, tmp_path):
    config = ours.coreml.OptimizationConfig(
        ours.coreml.OpPalettizerConfig(nbits=6, enable_per_channel_scale=True, weight_threshold=100)
    )
    made = ours.coreml.palettize_weights(build("layers"), config)
    notes = {w.name: w.note for w in made.compression_report.with_status("compressed")}
    assert "without scales" in notes["depthwise_weight_0"]
    assert "without scales" not in notes["conv_weight_0"]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda m: ours.coreml.palettize_weights(
                m, ours.coreml.OptimizationConfig(ours.coreml.OpLinearQuantizerConfig())
            ),
            ConfigError,
            "palettize_weights only accept OpPalettizerConfig type config",
        ),
        (
            lambda m: ours.coreml.palettize_weights("no such path", _four_bits()),
            CompressionError,
            "no such path",
        ),
        (lambda m: ours.coreml.palettize_weights(m, 4), ConfigError, "int"),
        (
            lambda m: ours.coreml.palettize_weights(m, _four_bits(), on_unsupported="x"),
            ConfigError,
            "'leave' or 'error', got 'x'",
        ),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call(linear(weight(64, 64)))


def _four_bits() -> Any:
    return ours.coreml.OptimizationConfig(ours.coreml.OpPalettizerConfig(nbits=4))


def test_functions_of_a_package_share_what_is_compressed_once(build, tmp_path):
    description = ct.utils.MultiFunctionDescriptor()
    for name in ("one", "two"):
        description.add_function(str(build("layers")), "main", name)
    description.default_function_name = "one"
    source, alone = tmp_path / "functions.mlpackage", tmp_path / "alone.mlpackage"
    ct.utils.save_multifunction(description, str(source))
    model = ct.models.MLModel(str(source), skip_model_load=True)
    made = ours.coreml.palettize_weights(model, _four_bits(), destination=tmp_path / "out")
    assert len(made.compression_report.with_status("compressed")) % 2 == 0
    ours.coreml.palettize_weights(build("layers"), _four_bits(), destination=alone)
    shared, single = (
        sum(file.stat().st_size for file in path.rglob("weight.bin"))
        for path in (tmp_path / "out", alone)
    )
    assert shared == single
    with pytest.raises(ValueError, match="multifunction"):
        theirs.coreml.palettize_weights(
            model, theirs.coreml.OptimizationConfig(theirs.coreml.OpPalettizerConfig(nbits=4))
        )


def test_models_of_a_pipeline_are_compressed_each():
    first, second = (linear(weight(64, 64, dtype=np.float32, seed=seed)) for seed in range(2))
    spec = second.get_spec()
    ct.utils.rename_feature(spec, "x", "y")
    ct.utils.rename_feature(spec, spec.description.output[0].name, "z")
    second = ct.models.MLModel(spec, weights_dir=second.weights_dir, skip_model_load=True)
    pipeline = ct.utils.make_pipeline(first, second)
    made = ours.coreml.palettize_weights(pipeline, _four_bits())
    names = [report.name for report in made.compression_report.with_status("compressed")]
    assert [name.partition("/")[0] for name in names] == ["model0", "model1"]
    assert len(ours.verify(pipeline.package_path, made.package_path).weights) == 2


@pytest.mark.parametrize(("threshold", "n"), [(4095, 1), (4096, 0)])
def test_only_weights_of_more_elements_than_the_threshold_are_compressed(threshold, n):
    config = ours.coreml.OpPalettizerConfig(nbits=4, weight_threshold=threshold)
    made = ours.coreml.palettize_weights(
        linear(weight(64, 64)), ours.coreml.OptimizationConfig(config)
    )
    assert len(made.compression_report.with_status("compressed")) == n
