"""What the three optimizers that train have in common: models stay good citizens of torch."""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Callable

import coremltools as ct
import numpy as np
import pytest
import torch
from coremltools.optimize import torch as reference
from torch import multiprocessing, nn
from torch_training import (
    MAKERS,
    SHAPE,
    begun,
    finalized,
    learner,
    net,
    palettizer,
    prepare,
    pruner,
    quantizer,
    train_in_two,
)

import milpress as cto
from milpress.errors import ConfigError, LifecycleError
from milpress.interpreter import load
from milpress.torch.quantization._fake_quantize import QuantizeDequantize

EACH = pytest.mark.parametrize("makers", MAKERS.values(), ids=MAKERS)


def same_state(one: nn.Module, other: nn.Module) -> None:
    states = one.state_dict(), other.state_dict()
    assert list(states[0]) == list(states[1])
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key


def test_tests_compute_on_one_thread():
    assert torch.get_num_threads() == 1


@EACH
def test_modules_keep_their_classes_and_the_names_of_their_parameters(makers):
    training = begun(makers)
    modules = dict(training.model.named_modules())
    names = dict(training.model.named_parameters())
    for name, module in net().named_modules():
        if name and not isinstance(module, nn.Sequential):
            assert type(modules[name]) is type(module), name
    for name, _ in net().named_parameters():
        assert name in names or f"{name}_orig" in names, name


@EACH
def test_the_original_model_is_untouched_unless_inplace_is_set(makers):
    model = net()
    training = begun(makers, model)
    training.go(range(3))
    same_state(model, net())
    assert not any(module._forward_pre_hooks for module in model.modules())


class WithSpare(nn.Module):
    """A model with a part that computes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.spare = net(), nn.Linear(4, 4)

    def forward(self, x):
        return self.net(x)


@EACH
def test_a_prepared_model_takes_a_checkpoint_of_the_float_model(makers):
    training = begun(makers, WithSpare())
    other = WithSpare()
    torch.nn.init.normal_(other.net.first.weight)
    training.model.load_state_dict(other.state_dict())
    state = dict(training.model.named_parameters())
    for name, value in other.named_parameters():
        found = state.get(name, state.get(f"{name}_orig"))
        assert "spare" in name or torch.equal(found, value), name
    training.go(range(4))
    # Its own checkpoint is taken as it is, and not in part.
    checkpoint = training.model.state_dict()
    again = begun(makers, WithSpare()).model
    again.load_state_dict(checkpoint)
    same_state(again, training.model)
    for ending in ("weight_mask", ".scale", ".centroids"):
        key = next((name for name in checkpoint if name.endswith(ending)), None)
        if key is None:
            continue
        partial = {name: value for name, value in checkpoint.items() if name != key}
        with pytest.raises(RuntimeError, match="Missing key"):
            again.load_state_dict(partial)


def test_masks_are_of_the_weights_of_the_checkpoint():
    optimizer = pruner(nn.Sequential(nn.Linear(8, 8)), initial_sparsity=0.5)
    model = optimizer.prepare()
    checkpoint = nn.Sequential(nn.Linear(8, 8)).state_dict()
    model.load_state_dict(checkpoint)
    weight = checkpoint["0.weight"]
    expected = weight.abs() > weight.abs().flatten().kthvalue(32).values
    assert torch.equal(model[0].weight, weight * expected)


@EACH
def test_evaluation_changes_nothing_and_training_goes_on_after_it(makers):
    training = begun(makers)
    training.go(range(4))
    training.model.eval()
    assert not any(module.training for module in training.model.modules())
    before = copy.deepcopy(training.model.state_dict())
    x = torch.randn(7, *SHAPE)
    with torch.no_grad():
        assert torch.equal(training.model(x), training.model(x))
    for key, value in training.model.state_dict().items():
        assert torch.equal(value, before[key]), key
    training.model.train()
    assert all(module.training for module in training.model.modules())
    training.go(range(4, 6))


@EACH
def test_a_model_can_be_saved_whole_and_copied(makers):
    training = begun(makers)
    training.go(range(4))
    file = io.BytesIO()
    torch.save(training.model, file)
    file.seek(0)
    x = torch.randn(3, *SHAPE)
    output = training.model.eval()(x)
    for other in (torch.load(file, weights_only=False), copy.deepcopy(training.model)):
        assert torch.equal(other.eval()(x), output)
    loaded = finalized(training, copy.deepcopy(training.model))
    same_state(finalized(training), loaded)


@EACH
@pytest.mark.parametrize("step", [1, 2, 5, 7])
def test_a_checkpoint_at_any_step_goes_on_as_if_nothing_had_been(makers, step):
    straight = begun(makers)
    straight.go(range(9))
    first = begun(makers)
    first.go(range(step))
    file = io.BytesIO()
    torch.save(
        {
            "model": first.model.state_dict(),
            "adam": first.adam.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in first.optimizers],
        },
        file,
    )
    file.seek(0)
    checkpoint = torch.load(file, weights_only=True)
    second = begun(makers, net(seed=1))
    second.model.load_state_dict(checkpoint["model"])
    second.adam.load_state_dict(checkpoint["adam"])
    for optimizer, state in zip(second.optimizers, checkpoint["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    second.go(range(step, 9))
    same_state(second.model, straight.model)
    same_state(finalized(second), finalized(straight))


@pytest.mark.parametrize("maker", [pruner, palettizer, quantizer])
@pytest.mark.parametrize("state", [{}, {"step_count": -1}, {"step_count": 1.5}, None])
def test_the_state_of_an_optimizer_is_checked(maker, state):
    with pytest.raises(ConfigError, match="step_count, got"):
        maker(net()).load_state_dict(state)


@pytest.mark.parametrize(
    "name",
    [
        "pruner",
        "palettizer",
        "learner",
        *(pytest.param(name, marks=pytest.mark.large) for name in list(MAKERS)[4:]),
    ],
)
def test_a_compiled_model_trains_as_one_that_is_not(name):
    makers = MAKERS[name]
    plain, compiled = begun(makers), begun(makers)
    torch._dynamo.reset()
    plain.go(range(8))
    compiled.go(range(8), torch.compile(compiled.model, backend="eager"))
    for key, value in plain.model.state_dict().items():
        torch.testing.assert_close(compiled.model.state_dict()[key], value, msg=key)
    same_state(finalized(compiled, torch.compile(compiled.model)), finalized(compiled))


@EACH
def test_finalizing_needs_no_model_and_leaves_the_prepared_one_to_train_on(makers):
    training = begun(makers)
    training.go(range(8))
    x = torch.randn(3, *SHAPE)
    if len(makers) == 1:
        same_state(training.optimizers[0].finalize(), finalized(training, training.model))
    output = finalized(training)(x)
    # Batch normalization is folded: rounding of float32, which may move a value by a step.
    error = (training.model.eval()(x) - output).square().sum() / output.square().sum()
    assert error < 1e-4
    training.go(range(8, 9))
    inplace = copy.deepcopy(training.model)
    for optimizer in training.optimizers:
        assert optimizer.finalize(inplace, inplace=True) is inplace
    same_state(inplace, finalized(training))


def reference_keys(maker) -> set[str]:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    return set(prepare(maker(model, reference)).state_dict())


@pytest.mark.parametrize("maker", [pruner, quantizer, learner])
def test_the_state_has_the_names_of_coremltools(maker):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    ours = set(prepare(maker(model)).state_dict())
    # A learnable layer of coremltools has its epsilon twice.
    theirs = {k for k in reference_keys(maker) if not k.endswith(".eps")}
    assert {k for k in ours if not k.endswith(".eps")} == theirs


def test_the_state_of_a_palettizer_has_names_of_coremltools_and_tensors_alone():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    ours = prepare(palettizer(model)).state_dict()
    assert set(ours) <= reference_keys(palettizer)
    assert all(isinstance(value, torch.Tensor) for value in ours.values())


class Held(nn.Module):
    """Weights that layers hold, and weights that none does or that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.named = nn.Linear(64, 64), nn.Linear(64, 64)
        self.tied = nn.Linear(64, 64)
        self.tied.weight = self.layer.weight
        self.small = nn.Linear(64, 2)
        self.place = nn.Parameter(torch.zeros(1, 64))
        self.product = nn.Bilinear(64, 64, 4)
        self.old_norm = nn.utils.weight_norm(nn.Linear(64, 64))
        self.new_norm = nn.utils.parametrizations.weight_norm(nn.Linear(64, 64))
        self.spectral = nn.utils.spectral_norm(nn.Linear(64, 64))
        self.up = nn.ConvTranspose1d(64, 64, 1)
        self.recurrent = nn.LSTM(64, 64)

    def forward(self, x):
        x = self.tied(self.named(self.layer(x) + self.place))
        x = self.spectral(self.new_norm(self.old_norm(x)))
        x = self.recurrent(self.up(x[..., None])[..., 0])[0]
        return self.small(x) + self.product(x, x)[:, :2]


COMPUTED = {
    "old_norm.weight_g",
    "old_norm.weight_v",
    "new_norm.parametrizations.weight.original0",
    "new_norm.parametrizations.weight.original1",
    "spectral.weight_orig",
}


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("maker", [pruner, palettizer, quantizer])
def test_a_report_names_each_weight_that_is_left_and_why(maker):
    optimizer = maker(Held(), weight_threshold=200) if maker is palettizer else maker(Held())
    optimizer._config.set_module_name("named", None)
    x = torch.randn(2, 64)
    is_quantizer = maker is quantizer
    model = optimizer.prepare((x,)) if is_quantizer else optimizer.prepare()
    for _ in range(3):
        model(x).sum().backward()
        optimizer.step()
    report = optimizer.report()
    unknown = {"place", "product.weight"}
    reasons = {"is computed from it": COMPUTED, "multiplies by is not known": unknown}
    for reason, names in reasons.items():
        assert {name for name in report.left if reason in report.left[name]} == names
    rest = report.left.keys() - COMPUTED - unknown
    assert rest == ({"small.weight"} if maker is palettizer else set())
    assert all("weight_threshold" in report.left[name] for name in rest)
    # Each weight has one line: it is left, not asked for, or compressed.
    finalized = optimizer.finalize()
    done = [weight.name for weight in report.weights if weight.status == "compressed"]
    assert "layer.weight" in done
    assert "tied.weight" not in done
    buffers = dict(finalized.named_buffers())
    for name in done:
        holder, _, own_name = name.rpartition(".")
        prefix = "_MILPRESS_" if holder == "recurrent" else "_COREML_"
        assert f"{holder}.{prefix}/{own_name}/compression_type" in buffers
    names = {name for name, p in Held().named_parameters() if p.ndim > 1}
    assert names == {*done, *report.left, "named.weight"}
    assert f"Compressed {len(done)} of {len(done) + len(report.left)}" in report.summary


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_the_default_of_the_palettizer_leaves_no_kind_of_layer_without_a_word():
    optimizer = cto.torch.palettization.DKMPalettizer(Held())
    optimizer.prepare()
    left = optimizer.report().left
    assert left["up.weight"] == "the default says nothing of ConvTranspose1d"
    assert "weight_threshold" in left["small.weight"]


def test_a_weight_that_finalize_leaves_is_in_the_report():
    for maker in (palettizer, quantizer):
        optimizer = maker(net())
        model = prepare(optimizer)
        x = torch.randn(2, *SHAPE)
        model(x)
        optimizer.step()
        optimizer.step()
        model(x)
        with torch.no_grad():
            model.get_submodule("first").weight[0] = torch.nan
        optimizer.finalize()
        assert list(optimizer.report().left) == ["first.weight"]


def test_pruning_is_prepared_last_and_finalized_last():
    for maker in (palettizer, quantizer):
        pruned = pruner(net()).prepare()
        with pytest.raises(LifecycleError, match="before pruning"):
            prepare(maker(pruned))
        other = prepare(maker(net()))
        with pytest.raises(LifecycleError, match="inplace=True"):
            pruner(other).prepare()
        later = pruner(other)
        later.prepare(inplace=True)
        with pytest.raises(LifecycleError, match=r"finalize .*ization before pruning"):
            later.finalize()


@pytest.mark.parametrize("maker", [palettizer, quantizer])
def test_what_is_pruned_stays_zero_in_joint_compression(maker):
    training = begun((maker, pruner))
    training.go(range(9))
    model = finalized(training)
    for name in ("first", "second", "head.0", "head.2"):
        module = model.get_submodule(name)
        assert int((module.weight == 0).sum()) >= module.weight.numel() * 0.74, name
        kind = 2 if maker is palettizer else 3
        assert module.get_buffer("_COREML_/weight/compression_type").tolist() == [1, kind]


def decibels(expected: np.ndarray, found: np.ndarray) -> float:
    noise = np.square(expected.astype(np.float64) - found).sum()
    return 10 * np.log10(np.square(expected.astype(np.float64)).sum() / max(noise, 1e-300))


OPS = {
    "pruner": {"constexpr_sparse_to_dense"},
    "palettizer": {"constexpr_lut_to_dense"},
    "quantizer": {"constexpr_blockwise_shift_scale", "quantize", "dequantize"},
    "learner": {"constexpr_blockwise_shift_scale", "quantize", "dequantize"},
    "palettizer and pruner": {"constexpr_lut_to_sparse", "constexpr_sparse_to_dense"},
    "quantizer and pruner": {
        "constexpr_sparse_blockwise_shift_scale",
        "constexpr_sparse_to_dense",
        "quantize",
    },
}


BOTH = [(name, frontend) for name in MAKERS for frontend in ("export", "trace")]


@pytest.mark.parametrize(
    ("name", "frontend"),
    [
        pytest.param(*case, marks=() if i % 2 == i // 2 % 2 else pytest.mark.large)
        for i, case in enumerate(BOTH)
    ],
)
def test_coremltools_converts_what_is_finalized_and_it_computes_the_same(name, frontend, tmp_path):
    training = begun(MAKERS[name])
    training.go(range(9))
    model = finalized(training)
    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(9))
    settings = {
        "minimum_deployment_target": ct.target.iOS18,
        "compute_precision": ct.precision.FLOAT32,
        "skip_model_load": True,
    }
    if frontend == "trace":
        inputs = [ct.TensorType(shape=x.shape)]
        converted = ct.convert(torch.jit.trace(model, (x,)), inputs=inputs, **settings)
    else:
        exported = torch.export.export(model, (x,)).run_decompositions({})
        converted = ct.convert(exported, **settings)
    operations = converted._mil_program.functions["main"].operations
    assert {operation.op_type for operation in operations} >= OPS[name]
    converted.save(str(tmp_path / "model.mlpackage"))
    assert decibels(*outputs(tmp_path / "model.mlpackage", model, x)) > 60


def outputs(package, model: nn.Module, x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return what a model gives, and what a package does."""
    program = load(package)
    (key,) = program.inputs
    (output,) = program.run({key.name: x.numpy()}).outputs.values()
    return model(x).detach().numpy(), np.asarray(output)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(16, 24), (4, 16)),
    "conv1d": (lambda: nn.Conv1d(16, 24, 3), (2, 16, 9)),
    "conv2d": (lambda: nn.Conv2d(16, 24, 3), (2, 16, 9, 9)),
    "conv3d": (lambda: nn.Conv3d(16, 24, 3), (2, 16, 5, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(16, 24, 3), (2, 16, 5, 5)),
}
WAYS = {
    "pruner": lambda model: pruner(model, scheduler={"begin_step": 0}),
    "palettizer": lambda model: palettizer(model, milestone=0),
    "int8": lambda model: quantizer(model, milestones=None),
    "int4": lambda model: quantizer(model, milestones=None, weight_dtype="qint4"),
    "int4 in blocks": lambda model: quantizer(
        model, milestones=None, weight_dtype="qint4", block_size=8
    ),
    "uint8 with offsets": lambda model: quantizer(
        model, milestones=None, weight_dtype="quint8", quantization_scheme="affine"
    ),
}


# Where a value lies between two integers, the op of a trace may take the other one.
@pytest.mark.filterwarnings("ignore:Output nr 1. of the traced function does not match:Warning")
@pytest.mark.parametrize(
    ("layer", "way", "frontend"),
    [
        pytest.param(layer, way, frontend, marks=() if i % 9 == 0 else pytest.mark.large)
        for i, (layer, way, frontend) in enumerate(
            itertools.product(LAYERS, WAYS, ("export", "trace"))
        )
    ],
)
def test_every_layer_goes_through_our_converter_too(layer, way, frontend, tmp_path):
    torch.manual_seed(0)
    make, shape = LAYERS[layer]
    module = make()
    optimizer = WAYS[way](nn.Sequential(module))
    x = torch.randn(shape)
    is_quantizer = hasattr(optimizer, "enable_observer_sync")
    model = optimizer.prepare((x,)) if is_quantizer else optimizer.prepare()
    model(x).square().sum().backward()
    optimizer.step()
    model = optimizer.finalize().eval()
    path = tmp_path / "model.mlpackage"
    converted = cto.torch.convert(
        model,
        (x,),
        path,
        frontend=frontend,
        compute_precision=ct.precision.FLOAT32,
        skip_model_load=True,
    )
    report = converted.compression_report
    assert [weight.status for weight in report.weights] == ["compressed"]
    expected, given = outputs(path, model, x)
    errors = np.abs(expected - given)
    # Each product of a sum is rounded to float32, on either side.
    rounding = 2.0**-23 * module.weight.numel() / 24 * np.abs(expected).max()
    # A value between two integers may be rounded either way, an output itself or an input that
    # several outputs see. That moves few of them, by a step.
    steps = [each.scale for each in model.modules() if isinstance(each, QuantizeDequantize)]
    assert (errors <= rounding + max(steps, default=0)).all()
    assert (errors > rounding).mean() < (0.1 if steps else 1e-9)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("pruner", marks=pytest.mark.large),
        pytest.param("palettizer", marks=pytest.mark.large),
        "learner",
        pytest.param("quantizer and pruner", marks=pytest.mark.large),
    ],
)
def test_two_processes_end_with_the_same_model(name, tmp_path):
    multiprocessing.spawn(train_in_two, (name, str(tmp_path)), nprocs=2)
    states = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert list(states[0]["finalized"]) == list(states[1]["finalized"])
    for key, value in states[0]["prepared"].items():
        # Statistics of batch normalization are each process's own after its last pass.
        if "running" not in key:
            torch.testing.assert_close(states[1]["prepared"][key], value, msg=key)
