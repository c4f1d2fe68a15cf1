"""Quantized activations: placement and ranges beside coremltools, and what they cost a model."""

from __future__ import annotations

from typing import Any

import coremltools as ct
import coremltools.optimize.coreml as cto
import numpy as np
import pytest
import torch
from coremltools.converters.mil.mil.passes.defs import optimize_quantization
from coremltools.optimize.coreml.experimental import _model_debugger
from oracles import ops_of
from sklearn.datasets import load_digits
from torch import nn

import milpress
from milpress import coreml, interpreter
from milpress.formats import QuantizeConfig
from milpress.formats.ranges import CalibrationConfig, Observer
from milpress.mil import values
from milpress.mil.package import Package


class Branches(nn.Module):
    """Layers that join: a sum, a concatenation, a pool."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.left = nn.Conv2d(8, 8, 3, padding=1)
        self.right = nn.Conv2d(8, 8, 1)
        self.last = nn.Linear(16 * 16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        left = torch.relu(self.left(x)) + x
        both = torch.cat([left, self.right(x)], dim=1)
        pooled = nn.functional.max_pool2d(both, 2)
        return self.last(pooled.flatten(1))


def converted(module: nn.Module, target: str) -> Any:
    example = torch.zeros(1, 1, 8, 8)
    return ct.convert(
        torch.jit.trace(module.eval(), example),
        inputs=[ct.TensorType("x", example.shape)],
        minimum_deployment_target=getattr(ct.target, target),
        skip_model_load=True,
    )


def samples(n: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{"x": rng.standard_normal((1, 1, 8, 8), np.float32)} for _ in range(n)]


def run_by_interpreter(monkeypatch, program) -> None:
    """Let coremltools see what our interpreter computes, as it can't predict here.

    The pass by which it goes on to make one scale of an addition 1 is left out: it changes values.
    """

    def predicted(self, inputs, names, compute_units=None):
        known = [name for name in names if name in program.values]
        taps = program.run(inputs, taps=known).taps
        return {name: np.asarray(value) for name, value in taps.items()}

    monkeypatch.setattr(
        _model_debugger.ModelDebugger, "predict_intermediate_outputs", predicted, raising=True
    )
    rescaling = optimize_quantization.distributive_quantized_binary_op_scale_normalization
    monkeypatch.setattr(rescaling, "apply", lambda self, prog: None)


def quantized(path) -> tuple[dict[str, float], dict[str, list[bool]]]:
    """Return the scale of each value that is quantized, and what each op takes dequantized."""
    scales, taken = {}, {}
    for graph in Package(path).graphs:
        for node in graph.nodes:
            if node.is_stored or node.op.type == "dequantize":
                continue
            if node.op.type == "quantize":
                (value,) = node.op.inputs["input"].arguments
                stored = graph.constant(node, "scale")
                scales[value.name] = float(values.read(stored, Package(path)).values)
            else:
                producers = [graph.producer(node, key) for key in sorted(node.op.inputs)]
                kinds = [found and found[0].op.type == "dequantize" for found in producers]
                taken[node.name] = [bool(kind) for kind in kinds]
    return scales, taken


@pytest.mark.parametrize("target", ["iOS17", "iOS18"])
@pytest.mark.parametrize("mode", ["linear_symmetric", "linear"])
def test_values_are_quantized_where_coremltools_does_by_the_same_scales(
    tmp_path, monkeypatch, target, mode
):
    torch.manual_seed(0)
    model = converted(Branches(), target)
    model.save(str(tmp_path / "source.mlpackage"))
    data = samples(1)  # of several, coremltools does not hold all ranges
    ours, theirs = tmp_path / "ours.mlpackage", tmp_path / "theirs.mlpackage"
    coreml.linear_quantize_activations(
        model, coreml.OptimizationConfig(coreml.OpLinearQuantizerConfig(mode=mode)), data
    ).save(str(ours))
    run_by_interpreter(monkeypatch, interpreter.load(tmp_path / "source.mlpackage"))
    cto.experimental.linear_quantize_activations(
        model,
        cto.OptimizationConfig(cto.experimental.OpActivationLinearQuantizerConfig(mode=mode)),
        data,
    ).save(str(theirs))
    mine, my_inputs = quantized(ours)
    reference, inputs = quantized(theirs)
    # coremltools goes on to reshape codes instead of floats, and to quantize a value once more
    # for each op that takes it.
    reshaped = {"input_cast_fp16"}
    assert len(mine) >= 7
    assert mine.keys() - reshaped == reference.keys() - reshaped
    for name in mine.keys() - reshaped:
        # Both round the scale to float16.
        assert mine[name] == pytest.approx(reference[name], rel=2**-10)
    joined = {"left_1_cast_fp16", "var_42_cast_fp16", "input_3_cast_fp16"}
    assert len({mine[name] for name in joined}) == 1  # what a concat takes and makes
    assert inputs.keys() >= my_inputs.keys() - reshaped
    for name in my_inputs.keys() - reshaped:
        assert my_inputs[name] == inputs[name]


def trained(images: torch.Tensor, labels: torch.Tensor) -> nn.Module:
    torch.manual_seed(0)
    model = Branches()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(12):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return model


def test_digits_in_8_bits_keep_their_accuracy_within_a_hundredth(tmp_path):
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    train, test = slice(0, 1400), slice(1400, None)
    module = trained(images[train], labels[train])
    source, out = tmp_path / "source.mlpackage", tmp_path / "out.mlpackage"
    model = converted(module, "iOS17")
    model.save(str(source))
    config = coreml.OptimizationConfig(coreml.OpLinearQuantizerConfig(weight_threshold=64))
    data = [{"x": image[None].numpy()} for image in images[:64]]
    activations = coreml.linear_quantize_activations(model, config, data)
    coreml.linear_quantize_weights(activations, config).save(str(out))

    def accuracy(path: Any) -> float:
        program = interpreter.load(path)
        (name,) = (feature.name for feature in program.outputs)
        found = [program(x=image[None].numpy())[name].argmax() for image in images[test]]
        return float(np.mean(np.array(found) == labels[test].numpy()))

    kinds = {op for op, *_ in ops_of(out)}
    assert {"quantize", "dequantize", "constexpr_affine_dequantize"} <= kinds
    assert accuracy(source) > 0.9
    assert accuracy(source) - accuracy(out) <= 0.01
    loaded = ct.models.MLModel(str(out), skip_model_load=True)
    assert loaded._mil_program is None or loaded._mil_program.functions


def test_a_model_with_quantized_activations_verifies_against_its_source(tmp_path):
    torch.manual_seed(0)
    model = converted(Branches(), "iOS17")
    source, out = tmp_path / "source.mlpackage", tmp_path / "out.mlpackage"
    model.save(str(source))
    config = coreml.OptimizationConfig(coreml.OpLinearQuantizerConfig())
    coreml.linear_quantize_activations(model, config, samples(2)).save(str(out))
    assert milpress.verify(source, out).weights == ()


@pytest.mark.parametrize("percentile", [90.0, 99.0])
def test_the_percentile_of_a_histogram_leaves_out_no_more_than_it_may(percentile):
    rng = np.random.default_rng(0)
    values = rng.standard_normal(20_000).astype(np.float32)
    observer = Observer(with_histogram=True)
    for part in np.split(values, 8):
        observer.add(part)
    config = CalibrationConfig(calibration="percentile", percentile=percentile)
    found = observer.range(config, QuantizeConfig())
    inside = np.mean((values >= found.low) & (values <= found.high))
    assert percentile / 100 <= inside < 1
