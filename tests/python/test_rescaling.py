"""Scales of channels moved behind layers: nothing changes but where they stand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
from command_line import failed, run
from coremltools.converters.mil.mil import Builder as mb  # noqa: N813
from coremltools.converters.mil.mil import types
from oracles import ops_of
from small_models import TARGETS, linear, save, weight

import milpress
from milpress import formats as f
from milpress.compression.rescaling import _Behind, _check
from milpress.errors import ConfigError, UnsupportedError, VerificationError
from milpress.interpreter import load
from milpress.mil.package import Package


def uneven(*shape: int, dtype: type = np.float16, seed: int = 0) -> np.ndarray:
    """Return weights whose channels differ by up to 2**9, one of them zero."""
    factors = np.exp2(-np.random.default_rng(seed).uniform(0, 9, shape[0]))
    factors[1] = 0
    return (weight(*shape, seed=seed) * factors.reshape(-1, *[1] * (len(shape) - 1))).astype(dtype)


def network(path: Path, target: str = "iOS18", dtype: type = np.float16) -> Path:
    """A conv with a bias, a depthwise conv without, and a linear, whose channels are uneven."""
    element = types.fp16 if dtype is np.float16 else types.fp32

    @mb.program(
        input_specs=[mb.TensorSpec(shape=(1, 16, 8, 8), dtype=element)],
        opset_version=TARGETS[target],
    )
    def prog(x: Any) -> Any:
        x = mb.conv(
            x=x,
            weight=uneven(64, 16, 3, 3, dtype=dtype),
            bias=weight(64, dtype=dtype),
            pad_type="same",
            name="conv",
        )
        x = mb.relu(x=x)
        x = mb.conv(
            x=x, weight=uneven(64, 1, 7, 7, dtype=dtype, seed=1), groups=64, name="depthwise"
        )
        x = mb.reshape(x=x, shape=[1, 256])
        return mb.linear(
            x=x,
            weight=uneven(48, 256, dtype=dtype, seed=2),
            bias=weight(48, dtype=dtype, seed=1),
            name="linear",
        )

    return save(prog, path, target)


def outputs(package: Path, precision: str = "float32") -> np.ndarray:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((1, 16, 8, 8)).astype(np.float32)
    (made,) = load(package, precision=precision)(x=x).values()
    return made


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("target", ["iOS15", "iOS18"])
def test_outputs_are_the_same_to_the_last_bit(tmp_path, target, dtype):
    source = network(tmp_path / "in.mlpackage", target, dtype)
    out = tmp_path / "out.mlpackage"
    made = milpress.rescale(source, out)
    assert [layer.op_type for layer in made.rescaled] == ["conv", "conv", "linear"]
    assert [op[0] for op in ops_of(out)].count("mul") == 3
    np.testing.assert_array_equal(outputs(out), outputs(source))
    np.testing.assert_array_equal(outputs(out, "float16"), outputs(source, "float16"))
    ct.models.MLModel(str(out), skip_model_load=True)


def test_channels_become_alike_within_a_factor_of_2_up_to_the_limit(tmp_path):
    source = network(tmp_path / "in.mlpackage")
    out = tmp_path / "out.mlpackage"
    milpress.rescale(source, out, largest=16)
    package = Package(out)
    (graph,) = package.graphs
    for one in graph.weights:
        if len(one.shape) < 2 or one.size < 2049:
            continue
        dense = graph.decoder.dense(one.node).values.astype(float)
        greatest = np.abs(dense).reshape(one.shape[0], -1).max(axis=1)
        before = uneven(*one.shape, seed={64 * 49: 1, 48 * 256: 2}.get(one.size, 0))
        was = np.abs(before.astype(float)).reshape(one.shape[0], -1).max(axis=1)
        alive = was > 0
        grown = greatest[alive] / was[alive]
        assert set(grown) <= {1, 2, 4, 8, 16}
        assert ((greatest[alive] > was.max() / 2) | (grown == 16)).all()
        assert (greatest <= 2 * was.max()).all()


def test_one_table_then_suits_all_channels(tmp_path):
    source = network(tmp_path / "in.mlpackage")
    scaled = tmp_path / "scaled.mlpackage"
    milpress.rescale(source, scaled)
    errors, sizes = [], []
    for package in (source, scaled):
        small = tmp_path / "small.mlpackage"
        recipe = milpress.Recipe.of(f.PalettizeConfig(bits=4))
        sizes.append(milpress.compress(package, small, recipe, force=True).package_bytes_after)
        by_channel = np.square(outputs(small) - outputs(source)).reshape(-1)
        errors.append(np.median(by_channel / (np.square(outputs(source)).reshape(-1) + 1e-12)))
    # Channels that had two or three entries of the table to themselves have all of it.
    assert errors[1] < errors[0] / 2
    assert sizes[1] < 1.1 * sizes[0]


def test_layers_that_do_not_suit_stay_with_the_reason(build, tmp_path):
    made = milpress.rescale(build("layers"), tmp_path / "out.mlpackage", min_size=100)
    reasons = {layer.op_type: layer.reason for layer in made.layers if layer.reason}
    assert "not the weight of a conv or linear" in reasons["matmul"]
    shared = {
        layer.reason for layer in _layers_or_error(build("shared"), tmp_path / "shared.mlpackage")
    }
    assert "not used by one op" in str(shared)


def _layers_or_error(source: Path, out: Path) -> Any:
    try:
        return milpress.rescale(source, out).layers
    except UnsupportedError as error:
        return [type("Left", (), {"reason": str(error)})()]


def test_a_bias_that_would_exceed_its_type_keeps_its_layer_as_it_is(tmp_path):
    @mb.program(
        input_specs=[mb.TensorSpec(shape=(1, 64), dtype=types.fp16)],
        opset_version=TARGETS["iOS18"],
    )
    def prog(x: Any) -> Any:
        bias = np.full(96, 30_000, np.float16)
        return mb.linear(x=x, weight=uneven(96, 64), bias=bias, name="y")

    source = save(prog, tmp_path / "in.mlpackage", "iOS18")
    with pytest.raises(UnsupportedError, match="its bias would exceed float16"):
        milpress.rescale(source, tmp_path / "out.mlpackage")
    assert not (tmp_path / "out.mlpackage").exists()


def test_even_channels_are_left(tmp_path):
    source = tmp_path / "in.mlpackage"
    linear(np.where(weight(96, 64) > 0, np.float16(0.5), np.float16(-0.5))).save(str(source))
    with pytest.raises(UnsupportedError, match="its channels are of one size"):
        milpress.rescale(source, tmp_path / "out.mlpackage")


@pytest.mark.parametrize("largest", [0, 1, 3, 48, True])
def test_only_powers_of_two_are_taken(tmp_path, largest):
    with pytest.raises(ConfigError, match="largest must be a power of two"):
        milpress.rescale(tmp_path / "in.mlpackage", tmp_path / "out.mlpackage", largest=largest)


def test_a_result_that_is_not_the_same_is_noticed(tmp_path):
    source = network(tmp_path / "in.mlpackage")
    out = tmp_path / "out.mlpackage"
    made = milpress.rescale(source, out, name="glob:*linear*")
    package = Package(out)
    (graph,) = package.graphs
    (layer,) = made.rescaled
    scale = next(n.name for n in graph.nodes if n.name.startswith("linear_scale"))
    names = {layer.name: _Behind(None, scale)}
    # The bias is not among what is multiplied again, so it is another.
    with pytest.raises(VerificationError, match="does not give back the original bit for bit"):
        _check(Package(source), Package(out), names)


def test_the_command_line_rescales(tmp_path):
    source = network(tmp_path / "in.mlpackage")
    out = tmp_path / "out.mlpackage"
    shown = run("rescale", source, out).stdout
    assert "Rescaled 3 of 3 selected weights, without any error" in shown
    assert "got 3" in failed("rescale", source, out, "--force", "--largest", 3)
