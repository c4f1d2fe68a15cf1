"""Moments against naive NumPy over tapped values, and what compression makes of them."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
import torch
from command_line import failed, run
from coremltools.converters.mil.mil import Builder as mb  # noqa: N813
from small_models import TARGETS, save, weight
from torch import nn

import milpress
from milpress.calibration.calibrating import calibrate
from milpress.calibration.input_statistics import Calibration, importance
from milpress.errors import ConfigError, InputError, VerificationError
from milpress.formats import (
    PalettizeConfig,
    PerBlock,
    PruneConfig,
    QuantizeConfig,
    palettize,
    quantize,
)
from milpress.interpreter import load
from milpress.mil.package import Package
from milpress.recipe import Recipe
from milpress.samples.data import RandomSamples


def model(path: Path, shape: tuple[int, ...], build: Any, dtype: Any = None) -> Path:
    kind = dtype or ct.converters.mil.mil.types.fp32
    specs = [mb.TensorSpec(shape=shape, dtype=kind)]
    return save(mb.program(input_specs=specs, opset_version=TARGETS["iOS18"])(build), path, "iOS18")


# Moments


@pytest.mark.parametrize(
    ("pad_type", "pad", "strides", "dilations", "groups"),
    [
        ("valid", None, [1, 1], [1, 1], 1),
        ("same", None, [2, 1], [1, 2], 2),
        ("same_lower", None, [2, 3], [1, 1], 4),
        ("custom", [2, 0, 1, 3], [1, 2], [2, 1], 1),
    ],
)
def test_moments_of_a_convolution_are_those_of_its_windows(
    pad_type, pad, strides, dilations, groups, tmp_path
):
    settings = {} if pad is None else {"pad": pad}
    array = weight(8, 4 // groups, 3, 2, dtype=np.float32)

    def build(x: Any) -> Any:
        return mb.conv(
            x=x,
            weight=array,
            pad_type=pad_type,
            strides=strides,
            dilations=dilations,
            groups=groups,
            name="conv",
            **settings,
        )

    path = model(tmp_path / "m.mlpackage", (2, 4, 9, 8), build)
    x = np.random.default_rng(0).standard_normal((3, 2, 4, 9, 8)).astype(np.float32)
    (layer,) = calibrate(path, {"x": x}).layers
    # The derivative of the sum of a channel by an element of its weight is the sum of all that the
    # element is multiplied by.
    expected = []
    for values in (x.astype(np.float64), x.astype(np.float64) ** 2):
        total = np.zeros(array.shape)
        for place in itertools.product(*map(range, array.shape)):
            one = np.zeros(array.shape, np.float32)
            one[place] = 1
            probe = torch.from_numpy(one).double()
            for sample in torch.from_numpy(values):
                total[place] += conv(sample, probe, pad_type, pad, strides, dilations, groups)
        expected.append(total)
    assert layer.layer == "conv"
    assert layer.kind == "conv"
    for found, total in zip((layer.first, layer.second), expected, strict=True):
        spread = np.repeat(found, len(array) // groups, 0) if groups > 1 else found
        # Sums of some hundred doubles in another order.
        np.testing.assert_allclose(
            np.broadcast_to(spread, array.shape), total, rtol=1e-9, atol=1e-9
        )
    outputs = load(path)(x=x[0])
    assert layer.count == sum(a.size for a in outputs.values()) // 8 * 3


def conv(x: Any, probe: Any, pad_type: str, pad: Any, strides: Any, dilations: Any, groups: int):
    """Return the sum of all outputs, computed with padding done by hand."""
    pairs = []
    for axis in range(2):
        size, extent = x.shape[2 + axis], (probe.shape[2 + axis] - 1) * dilations[axis] + 1
        amount = max(0, (math.ceil(size / strides[axis]) - 1) * strides[axis] + extent - size)
        half = (amount // 2, amount - amount // 2)
        if pad_type == "custom":
            half = tuple(pad[2 * axis : 2 * axis + 2])
        pairs.append({"valid": (0, 0), "same_lower": half[::-1]}.get(pad_type, half))
    padded = nn.functional.pad(x, (*pairs[1], *pairs[0]))
    made = nn.functional.conv2d(padded, probe, None, strides, 0, dilations, groups)
    return made.sum().item()


@pytest.mark.parametrize(
    ("settings", "groups"),
    [
        ({}, 1),
        ({"strides": [2, 2], "pad_type": "same"}, 2),
        ({"strides": [3, 2], "pad_type": "custom", "pad": [1, 0, 2, 1], "dilations": [1, 2]}, 1),
    ],
)
def test_moments_of_a_transposed_convolution_give_the_sum_of_its_outputs(
    settings, groups, tmp_path
):
    array = weight(4, 3, 3, 2, dtype=np.float32)

    def build(x: Any) -> Any:
        return mb.conv_transpose(x=x, weight=array, groups=groups, name="up", **settings)

    path = model(tmp_path / "m.mlpackage", (1, 4, 5, 6), build)
    x = np.random.default_rng(0).standard_normal((2, 1, 4, 5, 6)).astype(np.float32)
    (layer,) = calibrate(path, {"x": x}).layers
    outputs = np.stack([load(path)(x=each)[load(path).outputs[0].name] for each in x])
    means = outputs.astype(np.float64).mean((0, 1, 3, 4))
    # Outputs of float32 have half a last place of error for each of their 24 addends and more.
    np.testing.assert_allclose(layer.mean_error(array.astype(np.float64)), means, atol=1e-6)


def test_moments_of_matrices_are_those_of_their_inputs_columns(build):
    path = build("layers", dtype="fp32")
    rng = np.random.default_rng(0)
    samples = [{"x": rng.standard_normal((1, 48, 8, 8)).astype(np.float32)} for _ in range(3)]
    program = load(path)
    found = {each.layer: each for each in calibrate(path, samples).layers}
    assert found.keys() == {"conv", "depthwise", "transposed", "linear", "matmul", "matmul_t"}
    for name, given, axis in (("linear", "pooled", 1), ("matmul", "linear", 0)):
        taps = [program.run(sample, taps=[given]).taps[given] for sample in samples]
        rows = np.concatenate([tap.reshape(-1, tap.shape[-1]) for tap in taps]).astype(np.float64)
        layer = found[name]
        assert layer.first.shape[axis] == rows.shape[1]
        assert layer.count == len(rows)
        np.testing.assert_allclose(layer.first.reshape(-1), rows.sum(0), rtol=1e-12)
        np.testing.assert_allclose(layer.second.reshape(-1), (rows**2).sum(0), rtol=1e-12)


def recurrent(kind: str, direction: str, x: Any, arrays: dict[str, Any], **settings: Any) -> Any:
    n = 2 if direction == "bidirectional" else 1
    given = dict(arrays)
    for name in ("initial_h", "initial_c") if kind == "lstm" else ("initial_h",):
        given[name] = np.concatenate([arrays[name]] * n, -1)
    if n == 2:
        given |= {f"{name}_back": arrays[name][:, ::-1] for name in ("weight_ih", "weight_hh")}
    return getattr(mb, kind)(
        x=x, direction=direction, output_sequence=True, name="layer", **given, **settings
    )


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize(
    ("kind", "direction", "settings"),
    [
        ("lstm", "forward", {}),
        ("lstm", "reverse", {}),
        ("lstm", "bidirectional", {}),
        ("gru", "forward", {}),
        ("gru", "reverse", {"reset_after": True}),
        ("rnn", "reverse", {}),
    ],
)
def test_moments_of_recurrent_layers_are_those_of_what_each_step_reads(
    kind, direction, settings, tmp_path
):
    gates, n_inputs, hidden = {"lstm": 4, "gru": 3, "rnn": 1}[kind], 3, 5
    rng = np.random.default_rng(0)
    arrays = {
        "weight_ih": rng.standard_normal((gates * hidden, n_inputs)).astype(np.float32),
        "weight_hh": rng.standard_normal((gates * hidden, hidden)).astype(np.float32),
        "initial_h": rng.standard_normal((2, hidden)).astype(np.float32),
    }
    if kind == "lstm":
        arrays["initial_c"] = rng.standard_normal((2, hidden)).astype(np.float32)
    path = model(
        tmp_path / "m.mlpackage",
        (7, 2, n_inputs),
        lambda x: recurrent(kind, direction, x, arrays, **settings)[0],
    )
    x = rng.standard_normal((7, 2, n_inputs)).astype(np.float32)
    layers = {each.layer: each for each in calibrate(path, [{"x": x}]).layers}
    (made,) = load(path)(x=x).values()
    parts = ("",) if direction != "bidirectional" else ("", "back")
    assert len(layers) == 2 * len(parts)
    for i, part in enumerate(parts):
        # The output of a reversed layer stays in the order in which it read.
        steps = np.split(made.astype(np.float64), len(parts), -1)[i]
        is_back, read = direction == "reverse" or part == "back", x.astype(np.float64)
        if is_back:
            read = read[::-1]
        if part == "back":
            steps = steps[::-1]
        before = np.concatenate([arrays["initial_h"][None].astype(np.float64), steps[:-1]])
        blocks = np.repeat(before[None], 3 if kind == "gru" else 1, 0)
        if kind == "gru" and not settings:
            projected = read @ arrays["weight_ih"][:hidden].T
            reset = sigmoid(projected + before @ arrays["weight_hh"][:hidden].T)
            blocks[1] = reset * before
        suffix = f"_{part}" if part else ""
        for name, expected in (("weight_ih", read[None]), ("weight_hh", blocks)):
            layer = layers[next(n for n in layers if n.endswith(f": {name}{suffix}"))]
            assert layer.count == 14
            for total, values in ((layer.first, expected), (layer.second, expected**2)):
                # Activations are float32, sums of 14 of them double.
                np.testing.assert_allclose(total, values.sum((1, 2)), rtol=1e-5, atol=1e-5)
                assert layer.second_for(arrays[name].shape).shape == arrays[name].shape


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
def test_errors_of_recurrent_weights_are_weighed_and_fed_back(kind, tmp_path):
    gates, size = {"lstm": 4, "gru": 3, "rnn": 1}[kind], 32
    rng = np.random.default_rng(0)
    loud = rng.lognormal(0, 1.5, size).astype(np.float32)
    arrays = {
        name: rng.standard_normal((gates * size, size)).astype(np.float32) / 16
        for name in ("weight_ih", "weight_hh")
    }
    arrays |= {"initial_h": np.zeros((4, size), np.float32)}
    if kind == "lstm":
        arrays |= {"initial_c": np.zeros((4, size), np.float32)}
    source = model(
        tmp_path / "m.mlpackage", (9, 4, size), lambda x: recurrent(kind, "forward", x, arrays)[0]
    )
    mixing = rng.standard_normal((size, size))
    samples = {"x": (rng.standard_normal((8, 9, 4, size)) @ mixing * loud / 8).astype(np.float32)}
    snr = {}
    for name, options in (
        ("plain", {}),
        ("weighed", {"sample_data": samples}),
        ("fed back", {"sample_data": samples, "feedback": True}),
    ):
        out = tmp_path / f"{name}.mlpackage"
        report = milpress.compress(
            source, out, Recipe.of(PalettizeConfig(bits=3), min_size=512), **options
        )
        assert report.verified
        assert not any("not calibrated" in each.note for each in report.weights)
        snr[name] = milpress.evaluate(source, out, samples).outputs[0].snr_db
    assert snr["plain"] < snr["weighed"] < snr["fed back"]


def test_masked_positions_do_not_count(tmp_path):
    types = ct.converters.mil.mil.types
    array = weight(16, 8, dtype=np.float32)

    @mb.program(
        input_specs=[
            mb.TensorSpec(shape=(2, 5, 8), dtype=types.fp32),
            mb.TensorSpec(shape=(2, 5), dtype=types.int32),
        ],
        opset_version=TARGETS["iOS18"],
    )
    def prog(x: Any, attention_mask: Any) -> Any:
        y = mb.linear(x=x, weight=array, name="linear")
        m = mb.expand_dims(x=mb.cast(x=attention_mask, dtype="fp32"), axes=[2])
        return mb.mul(x=y, y=m)

    path = save(prog, tmp_path / "m.mlpackage", "iOS18")
    rng = np.random.default_rng(0)
    x, mask = rng.standard_normal((2, 5, 8)), rng.integers(0, 2, (2, 5))
    samples = {"x": x.astype(np.float32), "attention_mask": mask}
    (layer,) = calibrate(path, samples).layers
    kept = x.astype(np.float32).astype(np.float64)[mask.astype(bool)]
    assert layer.count == mask.sum()
    np.testing.assert_allclose(layer.second[0], (kept**2).sum(0), rtol=1e-12)
    with pytest.raises(ConfigError, match=r"mask must be one of the inputs .*, got 'ids'"):
        calibrate(path, samples, mask="ids")


def test_a_weight_that_several_layers_use_counts_for_all_of_them(build):
    both = [
        each
        for each in calibrate(build("shared"), RandomSamples(2)).layers
        if each.weight == "both"
    ]
    assert [each.layer for each in both] == ["first", "second"]
    total = importance(both, (64, 64))
    expected = sum(each.second for each in both)
    np.testing.assert_allclose(
        total[0], np.maximum(expected[0] / expected.mean(), 1e-3).astype(np.float32)
    )


def test_functions_that_the_samples_suit_are_run_and_moments_of_a_shared_blob_added(
    build, tmp_path
):
    source = tmp_path / "functions.mlpackage"
    description = ct.utils.MultiFunctionDescriptor()
    for name, kind in (("first", "shared"), ("second", "shared"), ("third", "layers")):
        description.add_function(str(build(kind)), "main", name)
    description.default_function_name = "first"
    ct.utils.save_multifunction(description, str(source))
    samples = {"x": np.random.default_rng(0).standard_normal((3, 2, 64)).astype(np.float32)}
    found = calibrate(source, samples)
    assert {each.weight for each in found.layers} == {
        f"{function}/{name}" for function in ("first", "second") for name in ("both", "torn")
    }
    out = tmp_path / "out.mlpackage"
    report = milpress.compress(
        source, out, Recipe.of(PalettizeConfig(bits=2)), sample_data=samples, bias_correction=True
    )
    notes = {each.name: each.note for each in report.with_status("compressed")}
    assert "not calibrated" not in notes["first/both"]
    assert all("not calibrated" in note for name, note in notes.items() if name.startswith("third"))
    with pytest.raises(InputError, match="input 'x' must have"):
        calibrate(source, {"x": np.zeros((3, 7))})


# The cache


def key(calibration: Calibration) -> tuple[str, str, int]:
    return calibration.package, calibration.data, calibration.n_samples


def test_a_cache_is_read_only_for_the_same_package_and_samples(build, tmp_path):
    path, cache = build("shared"), tmp_path / "cache.npz"
    first = calibrate(path, RandomSamples(2), cache=cache)
    loaded = Calibration.load(cache)
    assert key(loaded) == key(first)
    for one, other in zip(first.layers, loaded.layers, strict=True):
        assert one.layer == other.layer
        assert np.array_equal(one.first, other.first)
        assert np.array_equal(one.second, other.second)
    ran = []
    calibrate(path, RandomSamples(2), cache=cache, progress=lambda *call: ran.append(call))
    assert not ran
    again = calibrate(
        path, RandomSamples(2, seed=1), cache=cache, progress=lambda *c: ran.append(c)
    )
    assert ran
    assert key(again) != key(first)
    assert key(Calibration.load(cache)) == key(again)
    with pytest.raises(ConfigError, match="the calibration is of another package than"):
        calibrate(build("layers"), again)
    cache.write_bytes(b"PK other")
    with pytest.raises(InputError, match=r"cache\.npz: not a calibration that milpress saved"):
        calibrate(path, RandomSamples(2), cache=cache)


# Importance


def test_weighted_errors_are_not_above_those_of_unweighted_compression():
    rng = np.random.default_rng(0)
    array = rng.standard_normal((32, 64)).astype(np.float32)
    share = np.broadcast_to(rng.lognormal(0, 2, 64), array.shape).astype(np.float32)

    def error(made: Any) -> float:
        return float((share * (made.dense().astype(np.float64) - array) ** 2).sum())

    for bits, group in ((2, None), (4, 8)):
        config = PalettizeConfig(bits=bits, group_size=group)
        assert error(palettize(array, config, importance=share)) <= error(palettize(array, config))
    for dtype in ("int4", "int8"):
        config = QuantizeConfig(dtype=dtype, granularity=PerBlock(16), range="mse")
        assert error(quantize(array, config, importance=share)) < error(quantize(array, config))


@pytest.mark.parametrize(
    "treatment",
    [
        PalettizeConfig(bits=2, group_size=8),
        QuantizeConfig(dtype="int4", granularity=PerBlock(8), range="mse"),
    ],
    ids=["palettize", "quantize"],
)
def test_compression_with_samples_lessens_the_weighted_error_of_layers_and_verifies(
    treatment, build, tmp_path
):
    source = build("layers", dtype="fp32")
    rng = np.random.default_rng(0)
    # Channels of very different loudness.
    loud = rng.lognormal(0, 1.5, (48, 1, 1))
    samples = {"x": (rng.standard_normal((8, 1, 48, 8, 8)) * loud).astype(np.float32)}
    ratios = {}
    for name, data in (("plain", None), ("calibrated", samples)):
        out = tmp_path / f"{name}.mlpackage"
        report = milpress.compress(source, out, Recipe.of(treatment), sample_data=data)
        assert report.verified
        found = milpress.evaluate(source, out, samples, per_op=True)
        ratios[name] = {op.name: op.own_snr_db for op in found.ops}
    print({k: (v["conv"], v["linear"]) for k, v in ratios.items()})
    assert ratios["calibrated"]["conv"] > ratios["plain"]["conv"]
    assert Package(tmp_path / "calibrated.mlpackage").model_bytes


# Bias correction


def layer_means(source: Path, out: Path, samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Return, by layer, the mean error of each output channel when given the original's input."""
    one, other = load(source), load(out)
    names = [n for n, k in one.op_types.items() if k in ("conv", "linear", "conv_transpose")]
    errors: dict[str, list[Any]] = {}
    for sample in samples:
        kept = one.run(sample, taps=one.op_types).taps

        def replace(name: str, value: Any, kept: Any = kept) -> Any:
            if name in names:
                channels = np.moveaxis(kept[name] - value.numpy(), 1, 0)
                errors.setdefault(name, []).append(channels.reshape(len(channels), -1))
            return torch.from_numpy(kept[name])

        other.run(sample, taps=one.op_types, observe=lambda *_: None, replace=replace)
    return {name: np.concatenate(each, 1).mean(1) for name, each in errors.items()}


def test_the_mean_error_of_corrected_layers_vanishes_on_the_samples(build, tmp_path):
    source = build("layers", dtype="fp32")
    rng = np.random.default_rng(0)
    samples = [{"x": (1 + rng.standard_normal((1, 48, 8, 8))).astype(np.float32)} for _ in range(4)]
    means = {}
    for corrected in (False, True):
        out = tmp_path / f"{corrected}.mlpackage"
        report = milpress.compress(
            source,
            out,
            Recipe.of(PalettizeConfig(bits=2), min_size=100),
            sample_data=samples,
            bias_correction=corrected,
        )
        means[corrected] = layer_means(source, out, samples)
        found = milpress.verify(source, out)
        assert found.n_corrected == (4 if corrected else 0)
        assert report.verified
    assert means[True].keys() == {"conv", "depthwise", "transposed", "linear"}
    for name, after in means[True].items():
        # Some hundred float32 additions, each rounded to 2^-24 of outputs below 2^6.
        assert np.abs(after).max() < 2.0**-24 * 2**6 * 4, name
        assert np.abs(after).max() < np.abs(means[False][name]).max() / 1000, name


def test_a_bias_that_several_layers_share_is_corrected_for_each(tmp_path):
    bias = weight(16, dtype=np.float32)

    def build(x: Any) -> Any:
        shared = mb.const(val=bias, name="shared")
        y = mb.linear(x=x, weight=weight(16, 16, dtype=np.float32), bias=shared, name="one")
        y = mb.linear(x=y, weight=weight(16, 16, dtype=np.float32, seed=1), bias=shared, name="two")
        return mb.add(x=y, y=shared)

    source, out = model(tmp_path / "m.mlpackage", (3, 16), build), tmp_path / "out.mlpackage"
    rng = np.random.default_rng(0)
    samples = [{"x": (1 + rng.standard_normal((3, 16))).astype(np.float32)} for _ in range(3)]
    milpress.compress(
        source,
        out,
        Recipe.of(QuantizeConfig(), min_size=100),
        sample_data=samples,
        bias_correction=True,
    )
    assert milpress.verify(source, out).n_corrected == 2
    for after in layer_means(source, out, samples).values():
        assert np.abs(after).max() < 2.0**-24 * 2**3
    again = tmp_path / "again.mlpackage"
    milpress.compress(
        out,
        again,
        Recipe.of(PruneConfig(sparsity=0.75), min_size=100),
        sample_data=samples,
        bias_correction=True,
    )
    assert milpress.verify(out, again).n_corrected == 2
    milpress.decompress(again, tmp_path / "dense.mlpackage")


def test_a_bias_that_is_not_as_recorded_or_not_recorded_fails_verification(build, tmp_path):
    source, out = build("layers", dtype="fp32"), tmp_path / "out.mlpackage"
    milpress.compress(
        source,
        out,
        Recipe.of(PalettizeConfig(bits=4)),
        sample_data=RandomSamples(2),
        bias_correction=True,
    )
    package = Package(out)
    metadata = package.model.description.metadata.userDefined
    record = json.loads(metadata["com.milpress.treatments"])
    assert "linear" in record["biases"]
    for change in ("digest", "missing", "other"):
        changed = json.loads(json.dumps(record))
        if change == "digest":
            changed["biases"]["linear"] = "0" * 32
        elif change == "missing":
            del changed["biases"]["linear"]
        else:
            changed["biases"]["sum"] = "0" * 32
        metadata["com.milpress.treatments"] = json.dumps(changed)
        package.model_path.write_bytes(package.model.SerializeToString())
        with pytest.raises(VerificationError, match=r"bias|unchanged"):
            milpress.verify(source, out)


# Faces


def test_the_command_line_and_coreml_functions_calibrate_alike(build, tmp_path):
    source, data = build("layers", dtype="fp32"), tmp_path / "data.npz"
    rng = np.random.default_rng(0)
    np.savez(data, x=rng.standard_normal((4, 1, 48, 8, 8)).astype(np.float32))
    cache, out = tmp_path / "cache.npz", tmp_path / "out.mlpackage"
    options = ["--calibration-data", data, "--calibration-cache", cache, "--bias-correction"]
    printed = run("compress", source, out, "--palettize", 4, *options).stdout
    assert "calibrated with 4 samples" in printed
    known = Calibration.load(cache)
    twin, theirs = tmp_path / "twin.mlpackage", tmp_path / "theirs.mlpackage"
    milpress.compress(
        source, twin, Recipe.of(PalettizeConfig(bits=4)), sample_data=known, bias_correction=True
    )
    milpress.coreml.palettize_weights(
        str(source),
        milpress.coreml.OptimizationConfig(milpress.coreml.OpPalettizerConfig(nbits=4)),
        destination=theirs,
        sample_data=data,
        bias_correction=True,
    )
    written = [next(each.rglob("weight.bin")).read_bytes() for each in (out, twin, theirs)]
    assert written[0] == written[1] == written[2]
    run("compress", source, tmp_path / "int.mlpackage", "--quantize", "int8", *options)
    assert "can't be used without samples" in failed(
        "compress", source, tmp_path / "x.mlpackage", "--palettize", 4, "--bias-correction"
    )
    milpress.coreml.linear_quantize_weights(
        str(source),
        milpress.coreml.OptimizationConfig(milpress.coreml.OpLinearQuantizerConfig(range="mse")),
        sample_data=known,
    )


@pytest.mark.parametrize("kind", ["nested", "recurrent", "lookup", "awkward"])
def test_models_of_other_shapes_are_calibrated_corrected_and_verified(kind, build, tmp_path):
    out = tmp_path / "out.mlpackage"
    report = milpress.compress(
        build(kind),
        out,
        Recipe.of(PalettizeConfig(bits=4), min_size=100),
        sample_data=RandomSamples(3),
        bias_correction=True,
    )
    assert report.verified
    notes = {each.name: each.note for each in report.with_status("compressed")}
    uncalibrated = {name for name, note in notes.items() if "not calibrated" in note}
    # Rows are looked up there, not multiplied.
    assert uncalibrated == {name for name in notes if name.startswith("gather")}
    assert len(notes) >= 2
    assert load(out) is not None


def test_models_of_a_pipeline_are_calibrated_by_what_reaches_them(shared_pipeline, tmp_path):
    source, out = shared_pipeline, tmp_path / "out.mlpackage"
    found = {each.layer: each for each in calibrate(source, RandomSamples(2)).layers}
    layers = ("first", "second", "third")
    matmuls = {"model0/fourth", "model1/z"}
    assert set(found) == {f"model{i}/{name}" for i in (0, 1) for name in layers} | matmuls
    assert not np.array_equal(found["model0/first"].second, found["model1/first"].second)
    milpress.compress(
        source,
        out,
        Recipe.of(PalettizeConfig(bits=4)),
        sample_data=RandomSamples(2),
        bias_correction=True,
    )
    # Of each model first, second and third have, or get, a bias; the fourth is a matmul.
    assert milpress.verify(source, out).n_corrected == 6
