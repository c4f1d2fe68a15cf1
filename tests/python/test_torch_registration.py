"""Weights of modules that torch does not have, and rows for those that are left."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import parametrizations, weight_norm

import milpress.torch
from milpress.errors import CompressionError
from milpress.torch import palettization as P  # noqa: N812
from milpress.torch import pruning
from milpress.torch import quantization as Q  # noqa: N812
from milpress.torch._converted_weights import compressed_weights
from milpress.torch.registration import KINDS, axes_of_weights, register_module

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")


class Stack(nn.Module):
    """Matrices of shape ``(output, inputs)``, of which each multiplies a part of the input."""

    def __init__(self, n: int = 3, output: int = 8, inputs: int = 16) -> None:
        super().__init__()
        self.up = nn.Parameter(
            torch.randn(n, output, inputs) * torch.arange(1.0, n + 1)[:, None, None]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(F.linear(x, self.up[i]) for i in range(self.up.shape[0]))


class Turned(Stack):
    """The same with matrices of shape ``(inputs, output)``, multiplied in one go."""

    def __init__(self) -> None:
        super().__init__(output=16, inputs=8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm(x.expand(self.up.shape[0], *x.shape), self.up).sum(0)


register_module(Stack, "up", axes=(1, 2))
register_module(Turned, {"up": (2, 1)})


def palettizer(model: nn.Module, **settings: Any) -> P.PostTrainingPalettizer:
    config = P.PostTrainingPalettizerConfig.from_dict({"global_config": settings})
    return P.PostTrainingPalettizer(model, config)


def quantizer(model: nn.Module, **settings: Any) -> Q.PostTrainingQuantizer:
    config = Q.PostTrainingQuantizerConfig.from_dict({"global_config": settings})
    return Q.PostTrainingQuantizer(model, config)


GROUPED = {"n_bits": 2, "granularity": "per_grouped_channel", "group_size": 4}
TREATMENTS = {
    "tensor": (palettizer, {"n_bits": 2}),
    "grouped": (palettizer, GROUPED),
    "inputs": (palettizer, {**GROUPED, "channel_axis": 1}),
    "vectors": (palettizer, {"n_bits": 2, "cluster_dim": 2}),
    "scaled": (palettizer, {"n_bits": 2, "enable_per_channel_scale": True}),
    "integers": (palettizer, {"n_bits": 2, "lut_dtype": "int8"}),
    "int4": (quantizer, {"weight_dtype": "int4"}),
    "uint4": (quantizer, {"weight_dtype": "uint4", "quantization_scheme": "affine"}),
    "blocks": (quantizer, {"weight_dtype": "int4", "granularity": "per_block", "block_size": 4}),
    "whole": (quantizer, {"granularity": "per_tensor"}),
}


# k-means of vectors depends on their order.
@pytest.mark.parametrize(
    ("kind", "name"),
    [(Stack, name) for name in TREATMENTS]
    + [(Turned, name) for name in TREATMENTS if name != "vectors"],
)
def test_each_matrix_of_a_stack_is_compressed_as_a_linear_layer_would_be(kind, name):
    torch.manual_seed(0)
    stack = kind()
    make, settings = TREATMENTS[name]
    linear = nn.ModuleList(nn.Linear(16, 8, bias=False) for _ in stack.up)
    for layer, matrix in zip(linear, stack.up, strict=True):
        layer.weight = nn.Parameter(
            matrix.detach().mT.clone() if kind is Turned else matrix.detach()
        )
    for_stack = make(stack, **settings)
    made = for_stack.compress()
    expected = [layer.weight for layer in make(linear, **settings).compress()]
    for matrix, weight in zip(made.up, expected, strict=True):
        assert torch.equal(matrix.mT if kind is Turned else matrix, weight)
    assert for_stack.report().left == {}
    (read_back,) = compressed_weights(made)
    assert np.array_equal(read_back.stored.dense(), made.up.detach().numpy())


@pytest.mark.parametrize("kind", [Stack, Turned])
@pytest.mark.parametrize("frontend", ["export", "trace"])
@pytest.mark.parametrize("name", ["grouped", "vectors", "blocks"])
def test_stacks_are_stored_compressed_whole_or_in_matrices(kind, frontend, name):
    torch.manual_seed(0)
    make, settings = TREATMENTS[name]
    made = make(kind(), **settings).compress()
    x = torch.randn(5, 16)
    model = milpress.torch.convert(made, (x,), frontend=frontend, skip_model_load=True)
    (weight,) = model.compression_report.weights
    assert (weight.status, weight.note, model.compression_report.verified) == (
        "compressed",
        "",
        True,
    )


def test_a_transposed_matrix_has_the_tables_of_the_matrix():
    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(16, 8))

    register_module(Conv1D, axes=(1, 0))
    layer = Conv1D()
    linear = nn.Linear(16, 8)
    linear.weight = nn.Parameter(layer.weight.detach().T.clone())
    made = palettizer(layer, **GROUPED).compress()
    assert torch.equal(made.weight.T, palettizer(linear, **GROUPED).compress().weight)


def test_layers_of_transformers_are_known():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 20}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    mixtral = transformers.MixtralConfig(**sizes, **heads, num_local_experts=4)
    gpt_oss = transformers.GptOssConfig(**sizes, **heads, num_local_experts=4, head_dim=8)
    gpt2 = transformers.GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2, n_positions=8)
    axes = {
        transformers.MixtralForCausalLM(mixtral): {"gate_up_proj": (1, 2), "down_proj": (1, 2)},
        transformers.GptOssForCausalLM(gpt_oss): {"gate_up_proj": (2, 1), "down_proj": (2, 1)},
        transformers.GPT2LMHeadModel(gpt2): {"weight": (1, 0)},
    }
    for model, expected in axes.items():
        own = [module for module in model.modules() if not isinstance(module, KINDS)]
        assert expected in [axes_of_weights(module) for module in own]
        report = palettizer(model)
        report.compress(inplace=True)
        rows = {id(model.get_parameter(name)) for name in report.report()}
        assert rows == {id(p) for p in model.parameters() if p.ndim > 1}


class Everything(nn.Module):
    """One of each weight that no class of torch multiplies by."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(8, 8)
        self.places = nn.Parameter(torch.randn(1, 4, 8))
        self.out = nn.Parameter(torch.randn(8, 8))
        self.scale = nn.Parameter(torch.ones(8))
        self.whole = nn.Parameter(torch.ones(2, 2, dtype=torch.int32), requires_grad=False)
        self.normed = parametrizations.weight_norm(nn.Linear(8, 8))
        self.hooked = weight_norm(nn.Linear(8, 8))
        self.attention = nn.MultiheadAttention(8, 2, add_bias_kv=True)
        self.tied = nn.Linear(8, 8)
        self.same = nn.Parameter(torch.ones(()))
        self.same = self.tied.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.hooked(self.normed(self.plain(x) + self.places))
        return F.linear(self.tied(self.attention(x, x, x)[0]), self.out)


REASONS = {
    "places": "what Everything multiplies by is not known",
    "out": "register_module",
    "normed.parametrizations.weight.original0": "normed.weight is computed from it",
    "normed.parametrizations.weight.original1": "by a parametrization",
    "hooked.weight_g": "weight is computed from it",
    "hooked.weight_v": "weight is computed from it",
    "attention.bias_k": "no weight that MultiheadAttention multiplies by",
    "attention.bias_v": "no weight that MultiheadAttention multiplies by",
}


@pytest.mark.parametrize("kind", ["palettizer", "quantizer", "sensitive"])
def test_each_parameter_of_two_and_more_axes_has_a_row(kind):
    model = Everything()
    if kind == "sensitive":
        optimizer = P.SKMPalettizer(model)
        optimizer.compress([torch.randn(2, 4, 8)], lambda m, x: m(x).square().sum())
    else:
        optimizer = palettizer(model) if kind == "palettizer" else quantizer(model)
        optimizer.compress()
    report = optimizer.report()
    floats = [p for p in model.parameters() if p.ndim > 1 and p.is_floating_point()]
    assert {id(model.get_parameter(name)) for name in report} == {id(p) for p in floats}
    assert report.left.keys() == REASONS.keys()
    for name, reason in REASONS.items():
        assert reason in report.left[name]
        assert report[name]["#params"] == model.get_parameter(name).numel()


def test_what_the_config_leaves_has_no_row():
    optimizer = P.PostTrainingPalettizer(
        Everything(),
        P.PostTrainingPalettizerConfig.from_dict(
            {"module_type_configs": {"Linear": {"n_bits": 4}}}
        ),
    )
    optimizer.compress()
    assert "out" not in optimizer.report()
    assert optimizer.report().left.keys() == {"hooked.weight_g", "hooked.weight_v"}


@pytest.mark.parametrize(("group_size", "n_tables"), [(None, 1), (4, 2)])
@pytest.mark.parametrize("kind", [Stack, Turned])
def test_differentiable_k_means_gives_each_matrix_its_tables(kind, group_size, n_tables):
    settings: dict[str, Any] = {"n_bits": 1, "weight_threshold": 0}
    if group_size:
        settings |= {"granularity": "per_grouped_channel", "group_size": group_size}
    torch.manual_seed(0)
    made = kind()
    optimizer = P.DKMPalettizer(made, P.DKMPalettizerConfig.from_dict({"global_config": settings}))
    prepared = optimizer.prepare()
    with torch.no_grad():
        prepared(torch.randn(4, 16))
    weights = optimizer.finalize().up.detach()
    matrices = weights.mT if kind is Turned else weights
    groups = matrices.reshape(len(matrices) * n_tables, -1)
    assert all(len(group.unique()) == 2 for group in groups)
    assert weights.unique().numel() == 2 * len(groups)


@pytest.mark.parametrize("kind", [Stack, Turned])
def test_a_pattern_of_zeros_lies_along_the_inputs_of_each_matrix(kind):
    config = pruning.MagnitudePrunerConfig.from_dict({"global_config": {"n_m_ratio": [3, 4]}})
    optimizer = pruning.MagnitudePruner(kind(), config)
    optimizer.prepare()
    optimizer.step()
    finalized = optimizer.finalize()
    assert [name for name, _ in finalized.named_parameters()] == ["up"]
    rows = (finalized.up.mT if kind is Turned else finalized.up).reshape(-1, 4)
    assert (rows != 0).sum(dim=1).eq(1).all()


def test_matrices_of_a_stack_are_pruned_by_element_for_they_are_no_kernels():
    config = pruning.MagnitudePrunerConfig.from_dict(
        {"global_config": {"granularity": "per_kernel"}}
    )
    stack = Stack()
    optimizer = pruning.MagnitudePruner(stack, config)
    optimizer.prepare()
    optimizer.step()
    kept = optimizer.finalize().up.detach().abs()
    assert (kept > 0).sum() * 2 == kept.numel()
    assert kept[kept > 0].min() >= stack.up.abs().median()


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, lambda matrix: matrix.abs().amax(1, keepdim=True)),
        ({"weight_per_channel": False}, lambda matrix: matrix.abs().max()),
        (
            {"weight_dtype": "qint4", "block_size": 4},
            lambda matrix: matrix.abs().unflatten(1, (-1, 4)).amax(2).repeat_interleave(4, 1),
        ),
    ],
)
@pytest.mark.parametrize("kind", [Stack, Turned])
def test_each_matrix_of_a_stack_has_scales_of_its_own_in_training(kind, settings, scale):
    torch.manual_seed(0)
    model, x = nn.Sequential(kind()), torch.randn(5, 16)
    config = Q.LinearQuantizerConfig.from_dict({"global_config": settings})
    optimizer = Q.LinearQuantizer(model, config)
    prepared = optimizer.prepare((x,))
    prepared(x).sum().backward()
    row = optimizer.report()["0"]
    assert row["per_channel"] == settings.get("weight_per_channel", True)
    output = prepared.eval()(x)
    finalized = optimizer.finalize()
    assert torch.equal(finalized(x), output)
    steps = 7.5 if "block_size" in settings else 127.5
    stacks = (m.get_parameter("0.up").detach() for m in (model, finalized))
    for before, after in zip(*stacks, strict=True):
        before, after = (before.mT, after.mT) if kind is Turned else (before, after)
        size = scale(before) / steps
        # Half a step, where symmetric integers end one short of it.
        assert ((before - after).abs() <= 0.501 * size).all()
        assert torch.allclose(after / size, (after / size).round(), atol=1e-3)
    converted = milpress.torch.convert(finalized, (x,), skip_model_load=True)
    (weight,) = converted.compression_report.weights
    assert (weight.status, weight.note) == ("compressed", "")


class Holder(nn.Module):
    """A registered weight beside a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Parameter(torch.randn(4, 8))
        self.inner = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(torch.relu(self.inner(x)), self.out)


register_module(Holder, "out")


def test_a_registered_module_with_layers_inside_is_looked_into_in_training():
    model, x = Holder(), torch.randn(5, 8)
    optimizer = Q.LinearQuantizer(nn.Sequential(model))
    prepared = optimizer.prepare((x,))
    prepared(x).sum().backward()
    assert {"0", "0.inner"} < set(optimizer.report())
    assert optimizer.report().left == {}
    finalized = optimizer.finalize()
    assert not torch.equal(finalized.get_parameter("0.out"), model.out)
    assert torch.equal(finalized(x), prepared.eval()(x))


def test_layers_of_transformers_are_quantized_in_training():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 20}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    mixtral = transformers.MixtralConfig(**sizes, **heads, num_local_experts=4)
    gpt2 = transformers.GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2, n_positions=8)
    ids = torch.arange(6)[None]
    for model, left in (
        (transformers.MixtralForCausalLM(mixtral), {"model.layers.0.mlp.gate.weight"}),
        (transformers.GPT2LMHeadModel(gpt2), set()),
    ):
        optimizer = Q.LinearQuantizer(model)
        prepared = optimizer.prepare((ids,))
        prepared(ids).logits.sum().backward()
        assert set(optimizer.report().left) == left
        expected = prepared.eval()(ids).logits
        assert torch.equal(optimizer.finalize()(ids).logits, expected)


def test_a_class_inherits_and_can_be_registered_anew():
    class Heir(Stack):
        pass

    assert axes_of_weights(Heir()) == {"up": (1, 2)}
    register_module(Heir, ("up", "down"), axes=(2, 1))
    assert axes_of_weights(Heir()) == dict.fromkeys(("up", "down"), (2, 1))
    assert Heir in palettizer(Heir()).supported_modules


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((Stack(), "up"), "cls must be a class of modules"),
        ((int, "up"), "cls must be a class of modules"),
        ((Stack, []), "at least one"),
        ((Stack, [3]), "must be names, got 3"),
        ((Stack, "up", (0, 0)), "two different numbers"),
        ((Stack, "up", (0, -1)), "two different numbers"),
        ((Stack, "up", 1), "two different numbers"),
        ((Stack, {"up": (0, 1, 2)}), "two different numbers"),
    ],
)
def test_what_is_no_registration_is_refused(arguments, message):
    with pytest.raises(CompressionError, match=message):
        register_module(*arguments)


@pytest.mark.parametrize("axes", [(0, 2), (3, 1)])
def test_axes_that_a_parameter_has_not_leave_it(axes):
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

    register_module(Odd, "weight", axes)
    optimizer = palettizer(Odd())
    optimizer.compress()
    assert optimizer.report().left == {
        "weight": f"register_module says that its axes are {axes}, but it has 2"
    }
