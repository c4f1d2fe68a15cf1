"""The functions of milpress.coreml: what they take and tell beyond coremltools' own."""

from __future__ import annotations

import logging
from typing import Any

import coremltools as ct
import coremltools.optimize as theirs
import numpy as np
import pytest
from oracles import decoded
from small_models import linear, weight

import milpress as ours
from milpress.errors import CompressionError, ConfigError, UnsupportedError

QUANTIZE = "linear_quantize_weights", "OpLinearQuantizerConfig"
PALETTIZE = "palettize_weights", "OpPalettizerConfig"
PRUNE = "prune_weights", "OpMagnitudePrunerConfig"
THRESHOLD = "prune_weights", "OpThresholdPrunerConfig"


@pytest.mark.parametrize(
    ("function", "config"),
    [
        (QUANTIZE, {}),
        (PALETTIZE, {"nbits": 4}),
        (THRESHOLD, {"threshold": 0.05, "minimum_sparsity_percentile": 0.1}),
    ],
)
def test_paths_and_models_give_the_same_package(crepe_tiny, tmp_path, function, config):
    name, kind = function
    asked = ours.coreml.OptimizationConfig(getattr(ours.coreml, kind)(**config))
    by_path, by_model = tmp_path / "path.mlpackage", tmp_path / "model.mlpackage"
    getattr(ours.coreml, name)(crepe_tiny, asked, destination=by_path)
    model = ct.models.MLModel(str(crepe_tiny), skip_model_load=True)
    made = getattr(ours.coreml, name)(model, asked, destination=by_model)
    assert made.compression_report.verified
    for path in by_path.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (by_model / path.relative_to(by_path)).read_bytes()


def test_coremltools_own_configs_are_taken(crepe_tiny):
    config = theirs.coreml.OptimizationConfig(theirs.coreml.OpLinearQuantizerConfig())
    made = ours.coreml.linear_quantize_weights(crepe_tiny, config)
    assert len(made.compression_report.with_status("compressed")) == 7


def test_a_clipped_range_lowers_the_error(tmp_path):
    values = np.random.default_rng(3).standard_t(4, (64, 64)).astype(np.float16)
    errors = []
    for kind in ("minmax", "mse"):
        config = ours.coreml.OpLinearQuantizerConfig(
            dtype="int4", granularity="per_block", block_size=32, range=kind
        )
        out = tmp_path / f"{kind}.mlpackage"
        asked = ours.coreml.OptimizationConfig(config)
        ours.coreml.linear_quantize_weights(linear(values), asked, destination=out)
        made = decoded(out)["y_weight_0_quantized"].astype(np.float64)
        errors.append(np.linalg.norm(made - values))
    # Measured on real weights: 1.9 dB less.
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
