"""DKMPalettizer: differentiable k-means, its tables, and what is exported."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from coremltools.optimize.torch import palettization as reference
from torch import nn
from torch_models import IDS, layers

import milpress as cto
from milpress.errors import ConfigError, LifecycleError, UnsupportedError
from milpress.formats import PalettizeConfig, palettize
from milpress.torch import _metadata
from milpress.torch._module_weights import ModuleWeight, weights_of
from milpress.torch.palettization import _dkm
from milpress.torch.registration import KINDS

P = cto.torch.palettization


def prepared(model: nn.Module, home=P, **settings):
    """Return a copy of a model that is prepared, and its palettizer."""
    settings = {"weight_threshold": 0, **settings}
    config = home.DKMPalettizerConfig.from_dict({"global_config": settings})
    palettizer = home.DKMPalettizer(model, config)
    return palettizer.prepare(), palettizer


def naive(x, table, settings, kept=None):
    """Attend as the paper has it, all at once, for autograd to differentiate."""
    kept = torch.ones_like(x[..., 0]) if kept is None else kept
    before = None
    for _ in range(settings.n_iterations):
        distance = (x[:, :, None] - table[:, None]).square().sum(dim=3)
        if settings.keep_zero:
            bonus = torch.zeros_like(distance)
            bonus[..., 0] = settings.zero_bonus
            if settings.zero_bonus == 0:
                bonus[..., 0][(x != 0).any(dim=2)] = -torch.inf
            distance = distance - bonus
        logits = -distance / settings.tau
        if settings.mode == "topk":
            least = logits.topk(2, dim=2).values[..., -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        attention = logits.softmax(dim=2)
        if settings.mode == "hard":
            attention = torch.zeros_like(distance).scatter(2, distance.argmin(2, True), 1)
        if settings.mode == "dkm":
            attention = attention.clamp(min=settings.least)
        mass = (attention * kept[..., None]).sum(dim=1)[..., None]
        total = (attention * kept[..., None]).mT @ x
        table = torch.where(mass > 0, total / torch.where(mass > 0, mass, 1), table)
        if settings.keep_zero:
            table = torch.cat([torch.zeros_like(table[:, :1]), table[:, 1:]], dim=1)
        inertia = (distance.amin(dim=2) * kept).sum(dim=1)
        if before is not None and ((inertia - before).abs() <= settings.epsilon).all():
            break
        before = inertia
    return attention @ table * kept[..., None], table


CASES = [
    _dkm.AttentionSettings(
        tau=0.5, epsilon=0, mode=mode, keep_zero=keep_zero, zero_bonus=bonus, least=0.01
    )
    for mode, (keep_zero, bonus) in itertools.product(
        ("dkm", "topk", "hard"), ((False, 0.0), (True, 0.01), (True, 0.0))
    )
] + [_dkm.AttentionSettings(tau=0.5, epsilon=5.0, n_iterations=9, least=0.0)]


@pytest.mark.parametrize("some_pruned", [False, True])
@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("settings", CASES, ids=str)
def test_attention_in_parts_and_its_gradient_are_those_of_the_paper(
    settings, dim, some_pruned, monkeypatch
):
    monkeypatch.setattr(_dkm, "_PART", 24)  # six weights at a time
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 17, dim, dtype=torch.float64, generator=generator)
    x[0, 0] = 0
    x.requires_grad_()
    table = torch.randn(3, 4, dim, dtype=torch.float64, generator=generator)
    if settings.keep_zero:
        table[:, 0] = 0
    kept = (torch.rand(3, 17, generator=generator) > 0.3).double() if some_pruned else None
    direction = torch.randn(3, 17, dim, dtype=torch.float64, generator=generator)
    ours, theirs = (attend(x, table, settings, kept) for attend in (_dkm.attend, naive))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)
    slopes = [torch.autograd.grad((made * direction).sum(), x)[0] for made, _ in (ours, theirs)]
    torch.testing.assert_close(*slopes)


@pytest.mark.parametrize("dim", [1, 2])
def test_the_gradient_is_that_of_finite_differences(dim):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 9, dim, dtype=torch.float64, generator=generator, requires_grad=True)
    table = torch.randn(2, 4, dim, dtype=torch.float64, generator=generator)
    settings = _dkm.AttentionSettings(tau=0.5, epsilon=0, least=0)
    assert torch.autograd.gradcheck(lambda x: _dkm.attend(x, table, settings)[0], (x,))


def test_gumbel_noise_is_the_same_in_both_directions():
    x = torch.randn(1, 50, 1, dtype=torch.float64, requires_grad=True)
    table = torch.randn(1, 4, 1, dtype=torch.float64)
    settings = _dkm.AttentionSettings(tau=0.5, epsilon=0, mode="gsm")

    def attend(x):
        torch.manual_seed(3)
        return _dkm.attend(x, table, settings)[0]

    assert torch.autograd.gradcheck(attend, (x,))
    assert not torch.equal(attend(x), _dkm.attend(x, table, settings)[0])


def test_one_pass_is_as_with_coremltools_from_the_same_tables():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 48))
    settings = {"n_bits": 3, "prune_threshold": 0.0}
    ours, _ = prepared(net, **settings)
    theirs, _ = prepared(copy.deepcopy(net), reference, **settings)
    x = torch.randn(5, 64)
    ours(x)
    start = ours[0].weight_fake_quant.centroids.clone()
    theirs(x)
    theirs[0].weight_fake_quant.centroids = [start[0].clone()]
    outputs = []
    for model in (ours, theirs):
        model.zero_grad()
        output = model(x)
        output.square().sum().backward()
        outputs.append((output, model[0].weight.grad))
    (output, slope), (their_output, their_slope) = outputs
    torch.testing.assert_close(output, their_output, rtol=1e-4, atol=1e-5)
    # cdist takes squared distances from products: rounding of weights of 0.1 by 2^-24, over 1e-4.
    torch.testing.assert_close(slope, their_slope, rtol=1e-2, atol=1e-2 * float(slope.abs().max()))
    torch.testing.assert_close(
        ours[0].weight_fake_quant.centroids[0],
        theirs[0].weight_fake_quant.centroids[0],
        rtol=1e-4,
        atol=1e-6,
    )


SETTINGS = {
    "4 bits": {"n_bits": 4},
    "2 bits": {"n_bits": 2},
    "groups": {"n_bits": 2, "granularity": "per_grouped_channel", "group_size": 8},
    "vectors": {"n_bits": 4, "cluster_dim": 2},
    "vectors along inputs": {"n_bits": 4, "cluster_dim": 2, "cluster_permute": "inputs"},
    "scales": {"n_bits": 3, "enable_per_channel_scale": True},
    "scales of magnitudes": {
        "n_bits": 3,
        "enable_per_channel_scale": True,
        "per_channel_scaling_factor_scheme": "abs",
    },
    "int8 table": {"n_bits": 4, "lut_dtype": "i8"},
    "uint8 tables with scales": {
        "n_bits": 2,
        "lut_dtype": "u8",
        "enable_per_channel_scale": True,
    },
    "float16 table": {"n_bits": 4, "lut_dtype": "f16"},
    "bfloat16 table": {"n_bits": 4, "lut_dtype": "bf16"},
    "zero": {"n_bits": 3, "enforce_zero": True},
    "zero for zeros": {"n_bits": 3, "enforce_zero": True, "prune_threshold": 0.0},
    "two nearest": {"n_bits": 3, "palett_mode": "topk"},
    "noise": {"n_bits": 3, "palett_mode": "gsm"},
    "nearest": {"n_bits": 3, "palett_mode": "hard"},
    "half of the groups": {
        "n_bits": 2,
        "granularity": "per_grouped_channel",
        "group_size": 8,
        "percentage_palett_enable": 0.5,
    },
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(24, 16),
        nn.Conv1d(24, 16, 3),
        nn.Conv2d(24, 16, (2, 3)),
        nn.Conv3d(24, 16, 2),
        nn.ConvTranspose2d(24, 16, 2),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_what_evaluation_computes_is_just_what_is_exported(layer, settings):
    settings = dict(settings)
    weight = ModuleWeight("0", layer, "weight")
    if "cluster_permute" in settings:
        first = weight.axes[1]
        others = [axis for axis in range(layer.weight.ndim) if axis != first]
        settings["cluster_permute"] = (first, *others)
    torch.manual_seed(0)
    model, palettizer = prepared(nn.Sequential(layer), **settings)
    x = torch.randn(4, 24, *[6] * (layer.weight.ndim - 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        palettizer.step()
    assert model[0].weight.grad.abs().max() > 0
    finalized = palettizer.finalize()
    with torch.no_grad():
        assert torch.equal(finalized(x), model.eval()(x))
    assert not hasattr(finalized[0], "weight_fake_quant")
    exported = finalized[0].weight.detach()
    stored = _metadata.read(
        ModuleWeight("0", finalized[0], "weight")
    )  # raises if a weight is no entry
    np.testing.assert_array_equal(stored.dense(), exported.numpy())
    limit = 2 ** settings["n_bits"] * settings.get("cluster_dim", 1)
    if "group_size" not in settings and not settings.get("enable_per_channel_scale"):
        assert exported.unique().numel() <= limit
    if settings.get("enforce_zero"):
        assert (exported == 0).any() or settings.get("prune_threshold") == 0


def test_tables_begin_as_the_exact_ones():
    model, _ = prepared(nn.Sequential(nn.Linear(64, 32)), n_bits=4)
    model.eval()(torch.zeros(1, 64))
    weight = model[0].weight.detach().numpy()
    expected = palettize(weight, PalettizeConfig(bits=4)).entries.reshape(-1)
    np.testing.assert_array_equal(model[0].weight_fake_quant.centroids.reshape(-1), expected)


def test_training_brings_weights_near_their_entries_and_lowers_the_loss():
    torch.manual_seed(0)
    x = torch.randn(256, 16)
    y = torch.tanh(x @ torch.randn(16, 4))
    net = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x), y).backward()
        optimizer.step()
    model, palettizer = prepared(net, n_bits=2, palett_tau=1e-2)
    model.eval()
    with torch.no_grad():
        before = float(nn.functional.mse_loss(model(x), y))
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        palettizer.step()
    with torch.no_grad():
        after = float(nn.functional.mse_loss(palettizer.finalize()(x), y))
    assert after < before / 2


def test_every_kind_of_module_is_palettized_attention_with_its_output_projection():
    model, palettizer = prepared(layers(), n_bits=4)
    model(IDS).square().sum().backward()
    for weight in weights_of(model, KINDS):
        assert weight.tensor.grad.abs().max() > 0, weight.name
    finalized = palettizer.finalize()
    with torch.no_grad():
        assert torch.equal(finalized(IDS), model.eval()(IDS))
    for weight in weights_of(finalized, KINDS):
        assert weight.tensor.unique().numel() <= 16, weight.name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_floats_are_palettized_in_their_own_type(dtype):
    model, palettizer = prepared(nn.Sequential(nn.Linear(32, 32)).to(dtype), n_bits=3)
    x = torch.randn(4, 32, dtype=dtype)
    model(x).float().square().sum().backward()
    finalized = palettizer.finalize()
    assert finalized[0].weight.dtype == dtype
    assert finalized[0].weight.unique().numel() == 8
    assert torch.equal(finalized(x), model.eval()(x))
    _metadata.read(ModuleWeight("0", finalized[0], "weight"))


def test_tied_weights_have_one_table():
    net = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))
    net[2].weight = net[0].weight
    model, palettizer = prepared(net, n_bits=2)
    model(torch.randn(4, 32)).sum().backward()
    assert model[0].weight_fake_quant is model[2].weight_fake_quant
    finalized = palettizer.finalize()
    assert finalized[0].weight is finalized[2].weight
    assert finalized[0].weight.unique().numel() == 4


def test_the_default_is_that_of_coremltools_and_small_weights_are_left():
    net = nn.Sequential(nn.Conv2d(16, 32, 3), nn.Linear(64, 64), nn.Linear(8, 8))
    model = P.DKMPalettizer(net).prepare()
    assert [getattr(m, "weight_fake_quant", None) is not None for m in model] == [1, 1, 0]
    assert (model[0].weight_fake_quant.n_bits, model[1].weight_fake_quant.n_bits) == (2, 4)


def test_of_a_list_the_config_with_the_greatest_threshold_that_is_exceeded_holds():
    sizes = [{"n_bits": 2, "weight_threshold": 1000}, {"n_bits": 6, "weight_threshold": 100}]
    config = P.DKMPalettizerConfig.from_dict({"module_type_configs": {"Linear": sizes}})
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(20, 20), nn.Linear(5, 5))
    model = P.DKMPalettizer(net, config).prepare()
    bits = [getattr(m, "weight_fake_quant", None) for m in model]
    assert [fake and fake.n_bits for fake in bits] == [2, 6, None]
    again = P.DKMPalettizerConfig.from_dict(config.as_dict())
    assert again == config


@pytest.mark.parametrize(
    "settings",
    [
        {"n_bits": 5},
        {"n_bits": 0},
        {"channel_axis": 1},
        {"lut_dtype": "i4"},
        {"palett_mode": "soft"},
        {"palett_tau": 0.0},
        {"kmeans_max_iter": 0},
        {"kmeans_init": "random"},
        {"milestone": -1},
        {"cluster_permute": (0, 0)},
        {"cluster_permute": 1},
        {"percentage_palett_enable": 2.0},
        {"granularity": "per_grouped_channel"},
        {"group_size": 4},
        {"cluster_dim": 2, "enable_per_channel_scale": True},
        {"partition_size": 100},
        {"cluster_dtype": "oc_last"},
        {"dtype": torch.int8},
        {"quantize_activations": 1},
    ],
    ids=str,
)
def test_a_bad_setting_is_a_config_error(settings):
    with pytest.raises(ConfigError):
        P.DKMPalettizerConfig.from_dict({"global_config": settings})


@pytest.mark.parametrize(
    ("layer", "settings"),
    [
        (nn.Linear(6, 7), {"cluster_dim": 2}),
        (nn.Linear(6, 7), {"granularity": "per_grouped_channel", "group_size": 2}),
        (nn.Linear(6, 7), {"cluster_permute": (0, 1, 2)}),
    ],
)
def test_what_does_not_fit_is_left_with_a_reason(layer, settings, caplog):
    model, palettizer = prepared(nn.Sequential(layer), **settings)
    assert list(palettizer.left) == ["0.weight"]
    assert "Left as it is" in caplog.text
    assert not hasattr(model[0], "weight_fake_quant")


def test_weights_that_never_ran_are_left_with_a_warning(caplog):
    net = nn.Sequential(nn.Linear(32, 32))
    _, palettizer = prepared(net)
    finalized = palettizer.finalize()
    assert torch.equal(finalized[0].weight, net[0].weight)
    assert "the model did not run" in caplog.text


def test_a_weight_that_is_not_finite_is_an_error():
    net = nn.Sequential(nn.Linear(8, 8))
    with torch.no_grad():
        net[0].weight[0, 0] = torch.nan
    model, _ = prepared(net)
    with pytest.raises(UnsupportedError, match=r"is not finite .* can't be palettized"):
        model(torch.zeros(1, 8))


def test_a_channel_of_zeros_has_no_scale_of_zero():
    net = nn.Sequential(nn.Linear(8, 8, bias=False))
    with torch.no_grad():
        net[0].weight[3] = 0
    model, palettizer = prepared(net, n_bits=4, enable_per_channel_scale=True)
    model(torch.randn(2, 8)).sum().backward()
    assert torch.isfinite(model[0].weight.grad).all()
    assert torch.isfinite(palettizer.finalize()[0].weight).all()


def test_a_model_prepared_for_pruning_is_refused():
    pruner = cto.torch.pruning.MagnitudePruner(nn.Sequential(nn.Linear(8, 8)))
    with pytest.raises(LifecycleError, match="before pruning"):
        P.DKMPalettizer(pruner.prepare()).prepare()


def test_pruned_weights_stay_zero_and_leave_the_table_to_the_others():
    torch.manual_seed(0)
    model, palettizer = prepared(nn.Sequential(nn.Linear(32, 32)), n_bits=2)
    pruner = cto.torch.pruning.MagnitudePruner(model)
    pruner.prepare(inplace=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    x = torch.randn(8, 32)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        palettizer.step()
        pruner.step()
    with pytest.raises(LifecycleError, match="finalize palettization before pruning"):
        pruner.finalize()
    output = model.eval()(x)
    finalized = pruner.finalize(palettizer.finalize())
    weight = finalized[0].weight.detach()
    assert int((weight == 0).sum()) == 512
    assert weight[weight != 0].unique().numel() == 4
    assert torch.equal(finalized(x), output)
    assert finalized.get_buffer("0._COREML_/weight/compression_type").tolist() == [1, 2]
    _metadata.read(ModuleWeight("0", finalized[0], "weight"))


def test_vectors_of_pruned_weights_are_an_error():
    model, _ = prepared(nn.Sequential(nn.Linear(8, 8)), n_bits=2, cluster_dim=2)
    cto.torch.pruning.MagnitudePruner(model).prepare(inplace=True)
    with pytest.raises(UnsupportedError, match="by vectors"):
        model(torch.zeros(1, 8))
