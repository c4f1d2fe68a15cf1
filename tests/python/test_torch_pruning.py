"""MagnitudePruner: masks, schedules and what coremltools would have done."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from coremltools.optimize.torch import pruning as reference
from torch import nn
from torch_models import IDS, layers

import milpress as cto
from milpress.errors import ConfigError
from milpress.torch._module_weights import weights_of
from milpress.torch.registration import KINDS

P = cto.torch.pruning


def prepared(model: nn.Module, home=P, **settings):
    """Return a copy of a model that is prepared, and its pruner."""
    config = home.MagnitudePrunerConfig.from_dict({"global_config": settings})
    pruner = home.MagnitudePruner(model, config)
    return pruner.prepare(), pruner


def channels_first(weight: torch.Tensor, layer: nn.Module) -> np.ndarray:
    """Return a weight with output channels first, input channels second."""
    array = weight.detach().double().numpy()
    transposed = isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
    return array.swapaxes(0, 1) if transposed else array


LAYERS = [
    nn.Linear(12, 8),
    nn.Embedding(8, 12),
    nn.Conv1d(12, 8, 3),
    nn.Conv2d(12, 8, (3, 2)),
    nn.Conv3d(12, 8, 2),
    nn.ConvTranspose1d(12, 8, 3),
    nn.ConvTranspose2d(12, 8, 2),
    nn.ConvTranspose3d(12, 8, 2),
]


def layer_name(layer: nn.Module) -> str:
    return type(layer).__name__


def least(scores: np.ndarray, n: int) -> np.ndarray:
    """Return where the ``n`` least of some scores are."""
    found = np.zeros(scores.size, bool)
    found[np.argsort(scores.reshape(-1), kind="stable")[:n]] = True
    return found.reshape(scores.shape)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.75, 1.0])
@pytest.mark.parametrize("granularity", ["per_scalar", "per_kernel", "per_channel"])
@pytest.mark.parametrize("layer", LAYERS, ids=layer_name)
def test_what_becomes_zero_has_the_least_norm_and_the_number_asked_for(
    layer, granularity, sparsity
):
    model, pruner = prepared(layer, granularity=granularity, target_sparsity=sparsity)
    pruner.step()
    weight = channels_first(layer.weight, layer)
    structured = weight.ndim > 2 and granularity != "per_scalar"
    axes = tuple(range(2 if granularity == "per_kernel" else 1, weight.ndim)) if structured else ()
    norms = np.sqrt(np.square(weight).sum(axis=axes, keepdims=True))
    zero = least(norms, math.floor(norms.size * sparsity))
    expected = np.where(zero, 0, weight)
    np.testing.assert_array_equal(channels_first(pruner.finalize().weight, layer), expected)
    np.testing.assert_array_equal(channels_first(model.weight, layer), expected)


@pytest.mark.parametrize("block_size", [2, 3, 8, 9])
@pytest.mark.parametrize("layer", LAYERS, ids=layer_name)
def test_blocks_of_output_channels_go_together_as_long_as_there_are_not_too_many(layer, block_size):
    _, pruner = prepared(layer, block_size=block_size)
    pruner.step()
    weight = channels_first(layer.weight, layer)
    zero = channels_first(pruner.finalize().weight, layer) == 0
    starts = range(0, len(weight), block_size)
    whole = np.stack([zero[start : start + block_size].all(axis=0) for start in starts])
    some = np.stack([zero[start : start + block_size].any(axis=0) for start in starts])
    np.testing.assert_array_equal(whole, some)
    norms = np.stack([np.square(weight[s : s + block_size]).sum(axis=0) for s in starts])
    if whole.any():
        assert norms[whole].max() <= norms[~whole].min()
    assert weight.size // 2 - min(block_size, len(weight)) < zero.sum() <= weight.size // 2


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize(("n", "m"), [(1, 2), (3, 4), (2, 5), (4, 4)])
@pytest.mark.parametrize("layer", LAYERS, ids=layer_name)
def test_n_of_m_neighbours_are_zero(layer, n, m, dim):
    _, pruner = prepared(layer, n_m_ratio=(n, m), dim=dim)
    pruner.step()
    weight = np.moveaxis(channels_first(layer.weight, layer), dim, -1)
    zero = np.moveaxis(channels_first(pruner.finalize().weight, layer), dim, -1) == 0
    for start in range(0, weight.shape[-1] // m * m, m):
        run = np.abs(weight[..., start : start + m])
        order = np.argsort(run, axis=-1, kind="stable")
        expected = np.zeros(run.shape, bool)
        np.put_along_axis(expected, order[..., :n], values=True, axis=-1)
        np.testing.assert_array_equal(zero[..., start : start + m], expected)


def test_each_output_channel_of_a_grouped_transposed_convolution_is_pruned_by_itself():
    layer = nn.ConvTranspose2d(8, 12, 3, groups=2)
    _, pruner = prepared(layer, granularity="per_channel")
    pruner.step()
    weight = pruner.finalize().weight.detach()
    zero = weight.reshape(2, 4, 6, 9).eq(0).all(dim=3).all(dim=1)
    norms = layer.weight.detach().reshape(2, 4, 6, 9).square().sum(dim=(1, 3))
    assert int(zero.sum()) == 6
    assert norms[zero].max() < norms[~zero].min()


def test_a_weight_that_begins_at_zero_can_still_be_trained():
    layer = nn.Linear(8, 8, bias=False)
    nn.init.zeros_(layer.weight)
    model, pruner = prepared(layer, scheduler={"update_steps": [1, 5]}, target_sparsity=0.25)
    assert model.weight_mask.all()
    pruner.step()
    assert model.weight_mask.all()
    for _ in range(4):
        pruner.step()
    assert int((model.weight_mask == 0).sum()) == 16


SETTINGS = {
    "elements": {"scheduler": {"update_steps": "range(1, 6, 2)"}, "target_sparsity": 0.7},
    "blocks": {"scheduler": {"begin_step": 2}, "block_size": 4},
    "channels": {"granularity": "per_channel", "initial_sparsity": 0.25},
    "kernels": {"granularity": "per_kernel", "scheduler": {"update_steps": [0, 1, 4]}},
    "n of m": {"n_m_ratio": (2, 4), "scheduler": {"update_steps": "range(6)"}},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_training_goes_as_with_coremltools_bit_for_bit(settings):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(4, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(256, 4)
    )
    x, y = torch.randn(6, 2, 4, 8, 8), torch.randn(6, 2, 4)
    states = []
    for home in (P, reference):
        model, pruner = prepared(copy.deepcopy(net), home, **settings)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for inputs, target in zip(x, y, strict=True):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(inputs), target).backward()
            optimizer.step()
            pruner.step()
        states.append((model.state_dict(), pruner.finalize().state_dict(), pruner.report()))
    (ours, final, report), (theirs, their_final, their_report) = states
    for mine, other in ((ours, theirs), (final, their_final)):
        assert list(mine) == list(other)
        for key in other:
            assert torch.equal(mine[key].float(), other[key].float()), key
    assert report.keys() == their_report.keys()
    for name, row in their_report.items():
        assert report[name] == pytest.approx(row, rel=1e-6)  # sums of float32


def test_every_kind_of_module_is_pruned_attention_with_its_output_projection():
    model, pruner = prepared(layers().train(), target_sparsity=0.75)
    pruner.step()
    model(IDS).square().sum().backward()
    trained = [name for name, _ in model.named_parameters() if name.endswith("_orig")]
    assert trained == [f"{w.name}_orig" for w in weights_of(layers(), KINDS)]
    for name in trained:
        gradient, mask = model.get_parameter(name).grad, model.get_buffer(name[:-4] + "mask")
        assert gradient[mask.bool()].any(), name
        assert not gradient[~mask.bool()].any(), name
    finalized = pruner.finalize().eval()
    with torch.no_grad():
        assert torch.equal(finalized(IDS), model.eval()(IDS))
    for weight in weights_of(finalized, KINDS):
        assert int((weight.tensor == 0).sum()) == math.floor(weight.size * 0.75), weight.name


def test_tied_weights_stay_tied():
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    net[2].weight = net[0].weight
    model, pruner = prepared(net)
    pruner.step()
    model(torch.randn(2, 8)).sum().backward()
    finalized = pruner.finalize()
    assert finalized[0].weight is finalized[2].weight
    assert int((finalized[0].weight == 0).sum()) == 32


def test_a_parameter_can_be_named():
    model, pruner = prepared(nn.Linear(8, 8), param_name="bias")
    pruner.step()
    assert int((model.bias_mask == 0).sum()) == 4
    assert int((pruner.finalize().bias == 0).sum()) == 4


class Halves(P.PruningScheduler):
    """A schedule of a user's own."""

    def compute_sparsity(self, step_count, prev_sparsity, config):
        return (prev_sparsity + config.target_sparsity) / 2


def test_a_schedule_of_ones_own_is_asked_at_each_step():
    config = P.MagnitudePrunerConfig(
        global_config=P.ModuleMagnitudePrunerConfig(scheduler=Halves(), target_sparsity=1.0)
    )
    pruner = P.MagnitudePruner(nn.Linear(8, 8), config)
    model = pruner.prepare()
    zeros = []
    for _ in range(4):
        pruner.step()
        zeros.append(int((model.weight_mask == 0).sum()))
    assert zeros == [32, 48, 56, 60]


@pytest.mark.parametrize(
    ("text", "steps"),
    [("range(5)", [0, 1, 2, 3, 4]), ("range(2,9, 3)", [2, 5, 8]), ("range( 3 , 5 )", [3, 4])],
)
def test_the_text_of_a_range_is_read(text, steps):
    assert P.PolynomialDecayScheduler(update_steps=text).update_steps.tolist() == steps


@pytest.mark.parametrize(
    "settings",
    [
        {"scheduler": {"update_steps": "range(__import__('os').getpid())"}},
        {"scheduler": {"update_steps": "range(1, 5, 0)"}},
        {"scheduler": {"update_steps": "list(range(3))"}},
        {"scheduler": {"update_steps": [1.5]}},
        {"scheduler": {"update_steps": 7}},
        {"scheduler": {"update_steps": [1], "begin_step": 2}},
        {"scheduler": {"begin_step": -1}},
        {"scheduler": {"begin_step": 1.0}},
        {"scheduler": {}},
        {"scheduler": "polynomial"},
        {"target_sparsity": 1.5},
        {"initial_sparsity": -0.1},
        {"granularity": "per_layer"},
        {"block_size": 0},
        {"dim": 2},
        {"n_m_ratio": (3, 2)},
        {"n_m_ratio": (1, 2, 3)},
        {"n_m_ratio": 2},
        {"n_m_ratio": (1, 2), "block_size": 2},
        {"n_m_ratio": (1, 2), "granularity": "per_kernel"},
        {"param_name": 3},
    ],
    ids=str,
)
def test_a_bad_setting_is_a_config_error_that_shows_it(settings):
    with pytest.raises(ConfigError, match=r"got|Invalid value"):
        P.MagnitudePrunerConfig.from_dict({"global_config": settings})


def test_a_schedule_that_leaves_its_range_is_an_error():
    class Wild(P.PruningScheduler):
        def compute_sparsity(self, step_count, prev_sparsity, config):
            return 1.5

    module = P.ModuleMagnitudePrunerConfig(scheduler=Wild())
    pruner = P.MagnitudePruner(nn.Linear(4, 4), P.MagnitudePrunerConfig(global_config=module))
    pruner.prepare()
    with pytest.raises(ConfigError, match=r"from 0 to 1, got 1\.5"):
        pruner.step()


def test_a_second_prepare_and_a_step_before_it_change_nothing(caplog):
    pruner = P.MagnitudePruner(nn.Linear(4, 4))
    pruner.step()
    model = pruner.prepare()
    assert pruner.prepare() is model
    assert len(caplog.records) == 2


def test_a_config_of_coremltools_is_taken():
    config = reference.MagnitudePrunerConfig.from_dict(
        {"global_config": {"scheduler": {"update_steps": "range(1, 3)"}, "target_sparsity": 0.25}}
    )
    pruner = P.MagnitudePruner(nn.Linear(4, 4), config)
    pruner.prepare()
    pruner.step()
    pruner.step()
    assert int((pruner.finalize().weight == 0).sum()) == 4
