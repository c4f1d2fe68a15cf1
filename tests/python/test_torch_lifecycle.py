"""Several optimizers that train one model, in every order: all have effect, or an error says so."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import milpress as cto
from milpress.errors import LifecycleError
from milpress.torch.quantization._fake_quantize import QuantizeDequantize

X = torch.randn(4, 24, generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 16))


def pruner(model):
    config = cto.torch.pruning.MagnitudePrunerConfig()
    return cto.torch.pruning.MagnitudePruner(model, config)


def palettizer(model):
    config = {"global_config": {"n_bits": 2, "weight_threshold": 0}}
    home = cto.torch.palettization
    return home.DKMPalettizer(model, home.DKMPalettizerConfig.from_dict(config))


def quantizer(model, **settings):
    home = cto.torch.quantization
    config = home.LinearQuantizerConfig.from_dict({"global_config": settings})
    return home.LinearQuantizer(model, config)


def activations(model):
    return quantizer(model, weight_dtype="float32")


MAKERS = {
    "pruner": pruner,
    "palettizer": palettizer,
    "quantizer": quantizer,
    "activations": activations,
}
EFFECTS = {
    "pruner": {"zeros"},
    "palettizer": {"palette"},
    "quantizer": {"scales", "activations"},
    "activations": {"activations"},
}


def prepare(optimizer, *, inplace: bool):
    example = ((X[:1],),) if hasattr(optimizer, "enable_observer_sync") else ()
    return optimizer.prepare(*example, inplace=inplace)


def train(model, *optimizers):
    adam = torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=0.1)
    model.train()
    for _ in range(3):
        adam.zero_grad()
        model(X).square().mean().backward()
        adam.step()
        for optimizer in optimizers:
            optimizer.step()


def effects(model) -> set[str]:
    """Return what was done to all weights, and whether activations are rounded."""
    words = {1: "zeros", 2: "palette", 3: "scales"}
    found = []
    for name in ("0", "2"):
        layer = model.get_submodule(name)
        kinds = getattr(layer, "_COREML_/weight/compression_type", torch.tensor([])).tolist()
        found.append({words[kind] for kind in kinds})
        if "zeros" in found[-1]:
            assert int((layer.weight == 0).sum()) == layer.weight.numel() // 2
        if "palette" in found[-1]:
            assert layer.weight.unique().numel() == 4 + ("zeros" in found[-1])
    assert found[0] == found[1]
    rounds = any(isinstance(module, QuantizeDequantize) for module in model.modules())
    return found[0] | ({"activations"} if rounds else set())


def assert_converts_with(model, names, frontend):
    expected = {
        "zeros": "sparse",
        "palette": "constexpr_lut",
        "scales": "blockwise_shift_scale",
        "activations": "quantize",
    }
    converted = cto.torch.convert(model, (X[:1],), frontend=frontend, skip_model_load=True)
    ops = {op.op_type for op in converted._mil_program.functions["main"].operations}
    for name in names:
        assert any(expected[name] in op for op in ops), (name, ops)


# What becomes of the second optimizer on a model that the first has prepared, with inplace=True.
JOINED = {
    ("pruner", "pruner"): "prepared for pruning already",
    ("pruner", "palettizer"): "prepare palettization before pruning",
    ("pruner", "quantizer"): "prepare quantization before pruning",
    ("pruner", "activations"): "prepare quantization before pruning",
    ("palettizer", "pruner"): {"palette", "zeros"},
    ("palettizer", "palettizer"): "prepared for palettization already",
    ("palettizer", "quantizer"): r'0\.weight is prepared for palettization already.*"float32"',
    ("palettizer", "activations"): {"palette", "activations"},
    ("quantizer", "pruner"): {"scales", "activations", "zeros"},
    ("quantizer", "palettizer"): r"0\.weight is prepared for quantization already.*None",
    ("quantizer", "quantizer"): "prepared for quantization already",
    ("quantizer", "activations"): "prepared for quantization already",
    ("activations", "pruner"): {"activations", "zeros"},
    ("activations", "palettizer"): {"activations", "palette"},
    ("activations", "quantizer"): "prepared for quantization already",
    ("activations", "activations"): "prepared for quantization already",
}
# The same where the first has finalized it.
IN_TURN = {
    ("pruner", "pruner"): {"zeros"},
    ("pruner", "palettizer"): {"zeros", "palette"},
    ("pruner", "quantizer"): {"zeros", "scales", "activations"},
    ("pruner", "activations"): {"zeros", "activations"},
    ("palettizer", "pruner"): r"0\.weight is compressed already",
    ("palettizer", "palettizer"): r"0\.weight is compressed already",
    ("palettizer", "quantizer"): r'0\.weight is compressed already.*"float32"',
    ("palettizer", "activations"): {"palette", "activations"},
    **dict.fromkeys(
        ((first, second) for first in ("quantizer", "activations") for second in MAKERS),
        "the model is finalized after quantization",
    ),
}


@pytest.mark.parametrize(
    ("pair", "outcome"), JOINED.items(), ids=lambda x: " ".join(x) if isinstance(x, tuple) else ""
)
def test_two_preparations_of_one_model_both_have_effect_or_the_second_is_refused(pair, outcome):
    first = MAKERS[pair[0]](net())
    model = prepare(first, inplace=False)
    second = MAKERS[pair[1]](model)
    if isinstance(outcome, str):
        with pytest.raises(LifecycleError, match=outcome):
            prepare(second, inplace=True)
        # The first goes on undisturbed.
        train(model, first)
        assert effects(first.finalize()) == EFFECTS[pair[0]]
        return
    both = prepare(second, inplace=True)
    train(both, first, second)
    output = both.eval()(X)
    finalized = second.finalize(first.finalize(both))
    assert effects(finalized) == outcome
    torch.testing.assert_close(finalized(X), output, rtol=1e-5, atol=1e-6)
    assert_converts_with(finalized, outcome, "export")
    # The optimizers know the model that both have prepared.
    assert effects(second.finalize(first.finalize())) == outcome
    if "pruner" in pair:
        with pytest.raises(LifecycleError, match="before pruning: this model is still prepared"):
            second.finalize()
    else:
        assert effects(first.finalize(second.finalize())) == outcome


@pytest.mark.parametrize("pair", JOINED, ids=" ".join)
def test_a_second_preparation_of_a_copy_is_refused(pair):
    """The first optimizer would not know of it."""
    model = prepare(MAKERS[pair[0]](net()), inplace=False)
    with pytest.raises(LifecycleError):
        prepare(MAKERS[pair[1]](model), inplace=False)


@pytest.mark.parametrize(
    ("pair", "outcome"), IN_TURN.items(), ids=lambda x: " ".join(x) if isinstance(x, tuple) else ""
)
def test_a_finalized_model_is_prepared_if_nothing_of_it_is_lost(pair, outcome):
    first = MAKERS[pair[0]](net())
    train(prepare(first, inplace=False), first)
    finalized = first.finalize()
    second = MAKERS[pair[1]](finalized)
    if isinstance(outcome, str):
        with pytest.raises(LifecycleError, match=outcome):
            prepare(second, inplace=False)
        return
    model = prepare(second, inplace=False)
    if pair[0] == "palettizer":
        model.requires_grad_(False)
        model(X)
    else:
        train(model, second)
    assert effects(second.finalize()) == outcome
    assert_converts_with(second.finalize(), outcome, "trace")


def test_a_palettized_model_that_is_trained_on_is_not_taken_for_palettized():
    first = palettizer(net())
    train(prepare(first, inplace=False), first)
    second = activations(first.finalize())
    train(prepare(second, inplace=False), second)
    with pytest.raises(cto.errors.UnsupportedError, match="as it was when it was compressed"):
        cto.torch.convert(second.finalize(), (X[:1],), skip_model_load=True)


@pytest.mark.parametrize("name", MAKERS)
def test_what_is_finalized_is_not_finalized_again(name):
    optimizer = MAKERS[name](net())
    train(prepare(optimizer, inplace=False), optimizer)
    finalized = optimizer.finalize(inplace=True)
    assert optimizer.finalize(inplace=True) is finalized
    assert effects(finalized) == EFFECTS[name]
    for model in (finalized, net()):
        with pytest.raises(LifecycleError, match=r"not prepared for .*, or finalized already"):
            optimizer.finalize(model)


@pytest.mark.parametrize("name", MAKERS)
def test_a_model_that_is_still_prepared_is_not_converted(name):
    model = prepare(MAKERS[name](net()), inplace=False)
    model(X)
    with pytest.raises(LifecycleError, match="finalize"):
        cto.torch.convert(model, (X[:1],), skip_model_load=True)


def test_a_copy_of_a_prepared_model_is_finalized_like_it():
    first = palettizer(net())
    model = copy.deepcopy(prepare(first, inplace=False))
    second = activations(model)
    both = prepare(second, inplace=True)
    train(both, first, second)
    assert effects(second.finalize(first.finalize(both))) == {"palette", "activations"}


def test_layers_are_shared_out_among_two_optimizers():
    home = cto.torch.palettization
    config = {"module_name_configs": {"0": {"n_bits": 2, "weight_threshold": 0}}}
    first = home.DKMPalettizer(net(), home.DKMPalettizerConfig.from_dict(config))
    model = prepare(first, inplace=False)
    home = cto.torch.quantization
    config = {"global_config": {}, "module_name_configs": {"0": {"weight_dtype": "float32"}}}
    second = home.LinearQuantizer(model, home.LinearQuantizerConfig.from_dict(config))
    both = prepare(second, inplace=True)
    train(both, first, second)
    finalized = second.finalize(first.finalize())
    kinds = [
        finalized.get_buffer(f"{name}._COREML_/weight/compression_type").tolist()
        for name in ("0", "2")
    ]
    assert kinds == [[2], [3]]
