"""LinearQuantizer: what is rounded where, ranges, scales that are learnt, and folding."""

from __future__ import annotations

import copy

import pytest
import torch
from coremltools.optimize.torch import quantization as reference
from torch import nn
from torch.nn import functional

import milpress as cto
from milpress.errors import ConfigError
from milpress.torch import _metadata
from milpress.torch._module_weights import ModuleWeight
from milpress.torch.quantization import _fake_quantize
from milpress.torch.quantization._fake_quantize import (
    FakeQuantize,
    FixedQuantize,
    QuantizeDequantize,
)
from milpress.torch.quantization.quantization_config import ObserverType, QuantizationScheme

Q = cto.torch.quantization
SCHEMES = (QuantizationScheme.symmetric, QuantizationScheme.affine)


def prepared(model, inputs, home=Q, **settings):
    """Return a copy of a model that is prepared, and its quantizer."""
    config = home.LinearQuantizerConfig.from_dict({"global_config": settings})
    quantizer = home.LinearQuantizer(model, config)
    return quantizer.prepare((inputs,)), quantizer


def layer(**settings) -> FakeQuantize:
    settings = {
        "observer": ObserverType.min_max,
        "bits": 8,
        "signed": True,
        "scheme": QuantizationScheme.symmetric,
        **settings,
    }
    return FakeQuantize(settings.pop("observer"), **settings)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_is_that_of_torch(bits, signed, scheme):
    fake = layer(bits=bits, signed=signed, scheme=scheme)
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)) + 0.3
    found = fake(values)
    scale, offset = fake.integers()
    expected = torch.fake_quantize_per_tensor_affine(
        values, float(scale), int(offset), fake.quant_min, fake.quant_max
    )
    torch.testing.assert_close(found, expected, rtol=2.0**-22, atol=0)
    # The range has 2^bits - 1 steps, and no value is further than half of one from its integer.
    assert (found - values).abs().max() <= scale * (1.0 if scheme is SCHEMES[0] else 0.5) * 1.001


@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
@pytest.mark.parametrize("observer", ["moving_average_min_max", "min_max", "ema_min_max"])
def test_scales_follow_the_data_as_with_coremltools(observer, scheme):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3))
    settings = {
        "quantization_scheme": scheme,
        "weight_observer": observer,
        "activation_observer": observer,
    }
    x = torch.randn(4, 2, 3, 8, 8)
    ours, _ = prepared(net, x[0], **settings)
    theirs, _ = prepared(copy.deepcopy(net), x[0], reference, **settings)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (ours, theirs)]
    for batch in x:
        outputs = [model(batch) for model in (ours, theirs)]
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
        for output, optimizer in zip(outputs, optimizers, strict=True):
            optimizer.zero_grad()
            output.square().mean().backward()
            optimizer.step()
    for name, value in theirs.state_dict().items():
        if name.endswith(("scale", "zero_point", "weight", "min_val", "max_val")):
            found = ours.state_dict()[name].float().reshape(value.shape)
            torch.testing.assert_close(found, value.float(), rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_of_learnt_scales_are_those_of_the_papers(scheme):
    fake = layer(scheme=scheme, bits=4, signed=False, is_learnable=True).double()
    values = torch.randn(200, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1
    values.requires_grad_()
    fake(values)
    fake.enable_observer(False)
    with torch.no_grad():
        fake.scale.mul_(0.5)  # so that some values are clipped
    direction = torch.randn(200, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (fake(values) * direction).sum().backward()
    with torch.no_grad():
        offset = fake.zero_point.round()
        steps = values / fake.scale + offset
        low, high = steps.round() < fake.quant_min, steps.round() > fake.quant_max
        inside = ~(low | high)
        share = 1 / (200 * fake.quant_max) ** 0.5
        # d/ds of s (round(x / s)) is round(x / s) - x / s inside; of s (q - z), q - z outside.
        rounded = torch.where(inside, (steps.round() - steps), 0)
        clipped = torch.where(low, fake.quant_min - offset, fake.quant_max - offset)
        of_scale = torch.where(inside, rounded, clipped)
        of_offset = torch.where(inside, 0, -fake.scale)
    torch.testing.assert_close(values.grad, torch.where(inside, direction, 0))
    torch.testing.assert_close(fake.scale.grad, (of_scale * direction).sum()[None] * share)
    if scheme is QuantizationScheme.affine:
        torch.testing.assert_close(
            fake.zero_point.grad, (of_offset * direction).sum()[None] * share
        )
    assert low.any() or high.any()


def test_a_scale_that_is_learnt_moves_after_the_first_pass():
    model, _ = prepared(nn.Sequential(nn.Linear(8, 8)), torch.randn(4, 8), algorithm="learnable")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scales = []
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(16, 8)).square().mean().backward()
        optimizer.step()
        scales.append(model.get_submodule("0").weight_fake_quant.scale.detach().clone())
    assert not torch.equal(scales[0], scales[1])
    assert not torch.equal(scales[1], scales[2])


class Net(nn.Module):
    """Ops of each kind, with a shared and a fixed range."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.gate = nn.Conv2d(8, 8, 1)
        self.pool = nn.AvgPool2d(2)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = functional.relu(self.norm(self.conv(x)))
        y = x * torch.sigmoid(self.gate(x))
        z = self.pool(torch.cat([x, y], dim=1))
        return self.head(self.drop(z.mean((2, 3))))


def test_ops_count_as_one_and_values_of_one_range_share_a_layer():
    model, _ = prepared(Net(), torch.randn(2, 3, 8, 8))
    after: dict[str, str] = {}
    for node in model.graph.nodes:
        if node.op == "call_module" and node.target.startswith("activation_post_process"):
            after[node.args[0].name] = node.target
    assert {"conv", "norm", "gate"}.isdisjoint(after)
    assert "drop" not in after
    assert after["cat"] == after["pool"] == after["relu"] == after["mul"] == after["mean"]
    fixed = model.get_submodule(after["sigmoid"])
    assert isinstance(fixed, FixedQuantize)
    assert (float(fixed.scale), int(fixed.zero_point)) == (1 / 256, 0)
    assert model.get_submodule(after["x"]).scheme is QuantizationScheme.symmetric


def test_values_that_cannot_be_negative_have_all_integers_to_themselves():
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model, _ = prepared(net, torch.randn(2, 8))
    model(torch.randn(64, 8))
    after_relu = model.get_submodule("activation_post_process_1")
    assert after_relu.scheme is QuantizationScheme.affine
    assert int(after_relu.zero_point) == 0
    assert int(model.get_submodule("activation_post_process_2").zero_point) == 128


@pytest.mark.parametrize(
    ("layer_", "norm", "shape"),
    [
        (nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), (3, 4, 8)),
        (nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), (3, 4, 8, 8)),
        (nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6, affine=False), (3, 4, 8, 8)),
        (nn.Conv3d(4, 6, 3), nn.BatchNorm3d(6), (3, 4, 5, 5, 5)),
        (nn.ConvTranspose2d(4, 6, 3), nn.BatchNorm2d(6), (3, 4, 5, 5)),
        (nn.ConvTranspose1d(4, 6, 3, groups=2), nn.BatchNorm1d(6), (3, 4, 5)),
        (nn.Linear(4, 6), nn.BatchNorm1d(6), (3, 4)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_batch_normalization_is_folded_into_the_very_weight_that_was_rounded(layer_, norm, shape):
    torch.manual_seed(0)
    net = nn.Sequential(copy.deepcopy(layer_), copy.deepcopy(norm))
    with torch.no_grad():
        net[1].running_mean.normal_()
        net[1].running_var.uniform_(0.5, 2)
        if net[1].weight is not None:
            net[1].weight.normal_()
            net[1].weight[0] = 0  # a channel that is switched off
    model, quantizer = prepared(net, torch.randn(shape), activation_dtype=torch.float32)
    x = torch.randn(shape)
    model(x).square().sum().backward()
    assert torch.isfinite(model.get_submodule("0").weight.grad).all()
    finalized = quantizer.finalize()
    assert [name for name, _ in finalized.named_children()] == ["0"]
    torch.testing.assert_close(finalized(x), model.eval()(x), rtol=1e-4, atol=1e-5)
    _metadata.read(ModuleWeight("0", finalized.get_submodule("0"), "weight"))


def test_batch_normalization_over_another_axis_is_not_folded():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

        def forward(self, x):
            return self.norm(self.linear(x))

    x = torch.randn(4, 8, 8)
    model, quantizer = prepared(Odd(), x)
    model(x)
    finalized = quantizer.finalize()
    assert "norm" in dict(finalized.named_children())
    assert torch.equal(finalized(x), model.eval()(x))


def test_milestones_turn_on_and_off_what_they_say():
    model, quantizer = prepared(Net(), torch.randn(2, 3, 8, 8), milestones=[0, 1, 2, 3])
    fake = model.get_submodule("activation_post_process_0")
    states = []
    x = torch.randn(4, 3, 8, 8)
    for _ in range(5):
        mean = model.norm.running_mean.clone()
        low = fake.activation_post_process.min_val.clone()
        x = x * 2
        followed = model(x).requires_grad
        states.append(
            (
                not torch.equal(low, fake.activation_post_process.min_val),
                bool(fake.fake_quant_enabled),
                not torch.equal(mean, model.norm.running_mean),
            )
        )
        assert followed
        quantizer.step()
    assert states == [
        (False, False, True),
        (True, False, True),
        (True, True, True),
        (False, True, True),
        (False, True, False),
    ]
    assert model.norm.training


def test_a_config_of_none_leaves_a_layer_and_float32_what_it_names():
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 8))
    config = Q.LinearQuantizerConfig.from_dict(
        {
            "global_config": {},
            "module_name_configs": {"0": None, "2": {"activation_dtype": "float32"}},
            "module_type_configs": {"Tanh": None},
        }
    )
    model = Q.LinearQuantizer(net, config).prepare((torch.randn(2, 8),))
    has_layer = [hasattr(model.get_submodule(str(i)), "weight_fake_quant") for i in (0, 2, 3)]
    assert has_layer == [False, True, True]
    rounded = [
        node.args[0].name
        for node in model.graph.nodes
        if node.op == "call_module" and node.target.startswith("activation_post_process")
    ]
    assert rounded == ["_2", "_3"]


def test_integers_are_not_rounded():
    net = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 4))
    ids = torch.arange(6).reshape(2, 3)
    model, quantizer = prepared(net, ids)
    model(ids).sum().backward()
    finalized = quantizer.finalize()
    assert torch.equal(finalized(ids), model.eval()(ids))
    assert finalized.get_submodule("0").weight.unique().numel() <= 16 * 8
    _metadata.read(ModuleWeight("0", finalized.get_submodule("0"), "weight"))


def test_inputs_that_do_not_fit_only_cost_what_they_would_have_told():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())
    model, quantizer = prepared(net, torch.randn(1))
    x = torch.randn(2, 1, 8, 8)
    model(x)
    assert torch.equal(quantizer.finalize()(x), model.eval()(x))


def test_a_layer_that_is_used_twice_before_its_gradient_is_taken_has_the_right_one():
    model, _ = prepared(nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4), algorithm="learnable")
    (model(torch.randn(3, 4)) + model(torch.randn(3, 4))).sum().backward()


def test_tied_weights_are_rounded_alike():
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    net[2].weight = net[0].weight
    model, quantizer = prepared(net, torch.randn(2, 8), algorithm="learnable")
    model(torch.randn(4, 8)).sum().backward()
    finalized = quantizer.finalize()
    assert finalized.get_submodule("0").weight is finalized.get_submodule("2").weight
    x = torch.randn(3, 8)
    torch.testing.assert_close(finalized(x), model.eval()(x))


def test_what_is_to_be_preserved_is_on_each_of_the_models():
    class Model(nn.Sequential):
        def twice(self):
            return self.factor * 2

    net = Model(nn.Linear(4, 4))
    net.factor = 3
    config = Q.LinearQuantizerConfig(preserved_attributes=["twice", "factor"])
    quantizer = Q.LinearQuantizer(net, config)
    model = quantizer.prepare((torch.randn(1, 4),))
    model(torch.randn(2, 4))
    assert model.twice() == 6
    assert quantizer.finalize().twice() == 6
    config = Q.LinearQuantizerConfig(preserved_attributes=["missing"])
    with pytest.raises(ConfigError, match="got 'missing'"):
        Q.LinearQuantizer(net, config).prepare((torch.randn(1, 4),))


@pytest.mark.parametrize(
    "settings",
    [
        {"algorithm": "gptq"},
        {"weight_dtype": "int3"},
        {"weight_dtype": "qint8", "weight_n_bits": 3},
        {"activation_dtype": "qint8"},
        {"weight_observer": "histogram"},
        {"quantization_scheme": "both"},
        {"milestones": [1, 2]},
        {"milestones": [0, 1, 2, "3"]},
        {"weight_per_channel": 1},
        {"block_size": 0},
        {"block_size": 4, "weight_per_channel": False},
    ],
    ids=str,
)
def test_a_bad_setting_is_a_config_error(settings):
    with pytest.raises(ConfigError):
        Q.LinearQuantizerConfig.from_dict({"global_config": settings})


@pytest.mark.parametrize(
    "settings",
    [
        {"weight_dtype": "qint4"},
        {"weight_dtype": "quint4", "quantization_scheme": "affine", "weight_observer": "min_max"},
        {"weight_dtype": "qint4", "block_size": 8, "algorithm": "learnable"},
        {"milestones": [0, 1, -1, -1]},
    ],
    ids=str,
)
def test_a_config_survives_a_dictionary(settings):
    config = Q.LinearQuantizerConfig.from_dict({"global_config": settings})
    assert Q.LinearQuantizerConfig.from_dict(config.as_dict()) == config


@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
@pytest.mark.parametrize("dtype", ["qint8", "quint8", "qint4", "quint4"])
@pytest.mark.parametrize("size", [None, 4])
def test_weights_are_exported_just_as_they_were_rounded(dtype, scheme, size):
    torch.manual_seed(0)
    model, quantizer = prepared(
        nn.Sequential(nn.Conv2d(8, 6, 3)),
        torch.randn(1, 8, 5, 5),
        weight_dtype=dtype,
        quantization_scheme=scheme,
        block_size=size,
    )
    model(torch.randn(2, 8, 5, 5))
    layer_ = model.get_submodule("0")
    rounded = layer_.weight_fake_quant.eval()(layer_.weight)
    exported = quantizer.finalize().get_submodule("0")
    torch.testing.assert_close(exported.weight, rounded, rtol=1e-6, atol=1e-7)
    stored = _metadata.read(ModuleWeight("0", exported, "weight"))
    assert stored.value.bits == int(dtype[-1])


def test_the_ops_exist_where_torch_does_not_bring_them(monkeypatch):
    fake = layer(signed=False, scheme=QuantizationScheme.affine)
    fake(torch.randn(100))
    quantized = QuantizeDequantize(fake)
    x = torch.randn(50)
    assert torch.equal(quantized._exported(x), quantized(x))
    _fake_quantize._define_ops()  # does nothing where they are
    assert torch.equal(quantized._exported(x), quantized(x))


def test_a_report_has_a_row_for_each_place():
    model, quantizer = prepared(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), torch.randn(2, 8))
    model(torch.randn(4, 8))
    report = quantizer.report()
    kinds = [(name, row["type"]) for name, row in report.items()]
    assert kinds == [
        ("0", "weight"),
        ("activation_post_process_0", "activation"),
        ("activation_post_process_1", "activation"),
    ]
    # Uniform in half a step either way: its root mean square is a step over sqrt(12).
    step = float(model.get_submodule("0").weight_fake_quant.scale.max())
    assert 0 < report["0"]["error"] < step / 2


def test_a_layer_of_one_channel_is_reported_as_its_config_says():
    for per_channel in (True, False):
        ready, quantizer = prepared(
            nn.Sequential(nn.Linear(8, 1)), torch.randn(2, 8), weight_per_channel=per_channel
        )
        ready(torch.randn(2, 8)).sum().backward()
        assert quantizer.report()["0"]["per_channel"] == per_channel


def test_nothing_is_rounded_before_a_pool_that_is_left_out():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AvgPool2d(2), nn.Conv2d(4, 4, 3))
    config = Q.LinearQuantizerConfig.from_dict(
        {"global_config": {}, "module_name_configs": {"0": None, "1": None}}
    )
    graph = Q.LinearQuantizer(model, config).prepare((torch.zeros(1, 1, 12, 12),)).graph
    places = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    assert places == ["0", "1", "activation_post_process_0", "2", "activation_post_process_1"]


def test_a_range_shared_with_values_never_negative_has_an_offset():
    class Joined(nn.Module):
        def forward(self, x):
            return torch.cat([functional.relu(x), functional.leaky_relu(x)])

    model, _ = prepared(Joined(), torch.zeros(1, 4), quantization_scheme="symmetric")
    schemes = [fake.scheme for fake in model.modules() if isinstance(fake, FakeQuantize)]
    assert schemes == [QuantizationScheme.symmetric, QuantizationScheme.affine]


def test_inputs_come_first_and_are_rounded_behind_the_last_of_them():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, y):
            return self.first(x) + self.second(y)

    config = Q.LinearQuantizerConfig.from_dict({"global_config": {}})
    model = Q.LinearQuantizer(Sum(), config).prepare((torch.ones(2, 4), torch.ones(2, 4)))
    kinds = [node.op for node in model.graph.nodes]
    assert kinds[:2] == ["placeholder"] * 2
    rounded = [node.args[0].name for node in list(model.graph.nodes)[2:4]]
    assert sorted(rounded) == ["x", "y"]


def test_values_of_six_dimensions_are_moved_between_roundings():
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):  # of shape (1, 4, 4, 8), in windows of 2 x 2
            x = self.first(x).view(1, 2, 2, 2, 2, 8).permute(0, 1, 3, 2, 4, 5)
            return self.second(x.reshape(4, 4, 8))

    model, x = Windows(), torch.randn(1, 4, 4, 8)
    ready, quantizer = prepared(model, x)
    ready(x).sum().backward()
    finalized = quantizer.finalize()
    assert torch.equal(finalized(x), ready.eval()(x))
    converted = cto.torch.convert(finalized, (x,), skip_model_load=True)
    ops = [op.op_type for op in converted._mil_program.functions["main"].operations]
    # On either side of each layer, and of nothing between.
    assert ops.count("quantize") == 4
