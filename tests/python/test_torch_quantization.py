"""PostTrainingQuantizer: codes, scales, blocks and buffers of every kind of module."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from coremltools.optimize.torch import quantization as reference
from torch import nn
from torch_models import layers

import milpress as cto
from milpress import formats as f
from milpress.formats import Masked
from milpress.torch import _metadata
from milpress.torch._module_weights import ModuleWeight, weights_of
from milpress.torch.registration import KINDS

Q = cto.torch.quantization


def quantize(model: nn.Module, home=Q, **settings):
    """Return a quantized copy of a model, and the report."""
    config = home.PostTrainingQuantizerConfig.from_dict({"global_config": settings})
    quantizer = home.PostTrainingQuantizer(model, config)
    return quantizer.compress(), quantizer.report()


SETTINGS = {
    "int8": {},
    "int4 per tensor": {"weight_dtype": "int4", "granularity": "per_tensor"},
    "uint8 affine": {"weight_dtype": "uint8", "quantization_scheme": "affine"},
    "uint4": {"weight_dtype": "uint4"},
    "int4 in blocks": {"weight_dtype": "int4", "granularity": "per_block", "block_size": 8},
    "uint4 affine in blocks": {
        "weight_dtype": "uint4",
        "quantization_scheme": "affine",
        "granularity": "per_block",
        "block_size": (2, 4),
    },
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(16, 24),
        nn.Conv1d(16, 24, 3),
        nn.Conv2d(16, 24, 3),
        nn.Conv3d(16, 24, 3),
        nn.MultiheadAttention(16, 2),
        nn.MultiheadAttention(16, 2, kdim=24, vdim=24),
    ],
    ids=lambda layer: f"{type(layer).__name__}{getattr(layer, 'kdim', '')}",
)
def test_weights_and_buffers_are_those_of_coremltools_bit_for_bit(layer, settings):
    ours, theirs = (
        quantize(copy.deepcopy(layer), home, **settings)[0].state_dict() for home in (Q, reference)
    )
    assert {key for key in ours if "metadata_version" not in key} == set(theirs)
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key
        assert ours[key].dtype == value.dtype or "n_bits" in key, key


@pytest.mark.parametrize("kind", [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d])
def test_channels_of_a_transposed_convolution_lie_along_its_second_axis(kind):
    layer = kind(16, 24, 3)
    ours, theirs = (quantize(copy.deepcopy(layer), home)[0].state_dict() for home in (Q, reference))
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key
    ours, _ = quantize(layer, granularity="per_block", block_size=(3, 8))
    scale = ours.get_buffer("_COREML_/weight/quantization_scale")
    assert scale.shape == (2, 8, *[1] * (layer.weight.ndim - 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "settings", [*SETTINGS.values(), {"range": "mse", "weight_dtype": "int4"}], ids=str
)
def test_what_the_buffers_say_is_exactly_what_the_weights_are(dtype, settings):
    model, report = quantize(layers().to(dtype), **settings)
    assert list(report) == [w.name for w in weights_of(model, KINDS)]
    for found in weights_of(model, KINDS):
        if found.name not in report.left:
            _metadata.read(found)  # which compares each element
            assert found.tensor.dtype == dtype
    assert not report.left


def test_a_clipped_range_never_has_the_greater_error_and_uses_the_least_code():
    torch.manual_seed(1)
    layer = nn.Linear(64, 64)
    settings = {"weight_dtype": "int4", "granularity": "per_block", "block_size": 32}
    minmax, mse = (
        quantize(copy.deepcopy(layer), range=kind, **settings)[0] for kind in ("minmax", "mse")
    )
    weight = layer.weight.detach().numpy().reshape(-1, 32)
    errors = [
        np.square(model.weight.detach().numpy().reshape(-1, 32) - weight).sum(axis=1)
        for model in (minmax, mse)
    ]
    # The grid of ranges holds the plain one; sums of 32 squares in float32 round to 32 ulps.
    assert (errors[1] <= errors[0] * (1 + 32 * 2**-24)).all()
    assert errors[1].sum() < errors[0].sum()
    stored = _metadata.read(ModuleWeight("", mse, "weight")).value
    assert stored.codes.min() == -8
    assert (stored.scale < 0).any()


def test_an_embedding_is_quantized_row_by_row():
    layer = nn.Embedding(10, 4)
    model, _ = quantize(layer)
    scale = model.get_buffer("_COREML_/weight/quantization_scale")
    assert scale.shape == (10, 1)
    half_step = scale / 2 * (1 + 2**-22)  # and the rounding of a float32 division
    assert ((model.weight - layer.weight).abs() <= half_step).all()


def test_attention_has_one_config_unless_its_output_is_named():
    model = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2), "b": nn.Linear(8, 8)})
    module = Q.ModulePostTrainingQuantizerConfig
    config = Q.PostTrainingQuantizerConfig(
        module_type_configs={nn.MultiheadAttention: module(weight_dtype="int4")}
    )
    quantizer = Q.PostTrainingQuantizer(model, config)
    quantizer.compress()
    assert set(quantizer.report()) == {"a.in_proj_weight", "a.out_proj.weight"}
    config.set_module_name(r"a\.out_proj", None)
    quantizer = Q.PostTrainingQuantizer(model, config)
    quantizer.compress()
    assert set(quantizer.report()) == {"a.in_proj_weight"}


def test_float32_leaves_the_weights_and_is_no_row():
    model, report = quantize(nn.Linear(4, 4), weight_dtype="float32")
    assert not report
    assert not list(model.buffers())


@pytest.mark.parametrize(
    ("block_size", "shape"),
    [
        (4, (24, 4, 1, 1)),
        ((4,), (24, 4, 1, 1)),
        ((3, 4), (8, 4, 1, 1)),
        ((3, 0), (8, 1, 1, 1)),
        ((3, 16, 0, 3), (8, 1, 1, 1)),
        ((0, 4), (24, 4, 1, 1)),
        (16, (24, 1, 1, 1)),
        (0, (24, 1, 1, 1)),
    ],
)
def test_a_block_size_cuts_output_and_input_channels(block_size, shape):
    model, _ = quantize(nn.Conv2d(16, 24, 3), granularity="per_block", block_size=block_size)
    assert model.get_buffer("_COREML_/weight/quantization_scale").shape == shape


@pytest.mark.parametrize(
    ("block_size", "reason"),
    [
        (5, "block size 5 does not divide 16 input channels"),
        ((5, 4), "block size 5 does not divide 24 output channels"),
        (32, "block size 32 does not divide 16 input channels"),
        ((1, 4, 2), "cut output or input channels alone"),
        ((1, 4, 0, 0, 0), "at most 4 numbers"),
        ((0, 0), "must cut some axis"),
    ],
)
def test_a_block_size_that_does_not_suit_is_in_the_report_with_the_reason(block_size, reason):
    model, report = quantize(nn.Conv2d(16, 24, 3), granularity="per_block", block_size=block_size)
    assert reason in report.left["weight"]
    assert report["weight"]["error"] == 0
    assert not list(model.buffers())


def test_an_indivisible_block_takes_the_greatest_divisor_on_request():
    model, report = quantize(
        nn.Linear(24, 4), granularity="per_block", block_size=16, on_indivisible="divisor"
    )
    assert model.get_buffer("_COREML_/weight/quantization_scale").shape == (4, 2)
    assert "block size 12" in report["weight"]["note"]


@pytest.mark.parametrize(
    ("layer", "block_size", "shape"),
    [
        (nn.Linear(97, 4), 16, (4, 1)),
        (nn.Linear(4, 97), (16, 0), (1, 1)),
        (nn.Linear(97, 131), (16, 16), (1, 1)),
    ],
)
def test_prime_numbers_of_channels_are_one_block_on_request(layer, block_size, shape):
    settings = {"granularity": "per_block", "block_size": block_size}
    model, report = quantize(layer, **settings, on_indivisible="divisor")
    assert model.get_buffer("_COREML_/weight/quantization_scale").shape == shape
    assert "one block, as no block size from 2 to 16 divides" in report["weight"]["note"]
    _, report = quantize(layer, **settings)
    assert "block size 16 does not divide" in report.left["weight"]


def test_a_pruned_weight_keeps_its_zeros():
    layer = nn.Linear(32, 32)
    with torch.no_grad():
        layer.weight[layer.weight.abs() < 0.1] = 0
    layer.register_buffer("_COREML_/weight/compression_type", torch.tensor([1]))
    model, _ = quantize(layer, quantization_scheme="affine", weight_dtype="uint4")
    assert (model.weight[layer.weight == 0] == 0).all()
    assert model.get_buffer("_COREML_/weight/compression_type").tolist() == [1, 3]
    assert isinstance(_metadata.read(ModuleWeight("", model, "weight")).value, Masked)


def test_a_bfloat16_tensor_is_widened_exactly():
    tensor = torch.linspace(-3, 3, 64).reshape(8, 8).to(torch.bfloat16)
    wide_values = tensor.float().numpy()
    np.testing.assert_array_equal(f.quantize(tensor).codes, f.quantize(wide_values).codes)
