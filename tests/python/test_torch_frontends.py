"""What ``milpress.torch.convert`` does before coremltools sees a module, and when it can't."""

from __future__ import annotations

from typing import Any

import coremltools as ct
import numpy as np
import pytest
import torch
import zoo
from torch import nn
from torch.nn import functional as F  # noqa: N812

import milpress as cto
from milpress.errors import ConfigError, UnsupportedError
from milpress.interpreter import load
from milpress.torch._frontends import decompositions

SETTINGS = {"compute_precision": ct.precision.FLOAT32}


class Layer(nn.Module):
    """A compressed layer, and some function of what it gives."""

    def __init__(self, function: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 6)
        self.function = function
        config = cto.torch.palettization.PostTrainingPalettizerConfig.from_dict(
            {"global_config": {"n_bits": 1}}
        )
        cto.torch.palettization.PostTrainingPalettizer(self, config).compress(inplace=True)

    def forward(self, x: torch.Tensor, *others: Any) -> Any:
        return self.function(self.layer(x), *others)


X = torch.linspace(-2, 3, 24).reshape(4, 6)

# Each is one that coremltools has no lowering of, or another than torch's.
FUNCTIONS: dict[str, Any] = {
    "acosh": lambda y: torch.acosh(1 + y.abs()),
    "asinh": torch.asinh,
    "bilinear": lambda y: F.bilinear(y, y.flip(1), torch.ones(2, 6, 6).tril()),
    "cdist": lambda y: torch.cdist(y, y + 1),
    "clamp by tensors": lambda y: torch.clamp(y, -y.abs() / 2, y * y),
    "copysign": lambda y: torch.copysign(y.roll(1, 0), y),
    "cross": lambda y: torch.linalg.cross(y[:, :3], y[:, 3:]),
    "cummax": lambda y: torch.cummax(y, 1)[0],
    "cummin": lambda y: torch.cummin(y, 0)[0],
    "cumsum from the end": lambda y: torch.cumsum(y[None], -2),
    "diag embed": lambda y: torch.diag_embed(y, offset=-1),
    "diagonal": lambda y: torch.diagonal(y, 1),
    "diagonal below": lambda y: torch.diagonal(y, -2),
    "diff": torch.diff,
    "fmax": lambda y: torch.fmax(y.log(), y),
    "fmin": lambda y: torch.fmin(y, y.log()),
    "fmod": lambda y: torch.fmod(y * 3, 2.0),
    "full slice": lambda y: y[slice(-0, None), :],
    "gelu": F.gelu,
    "gelu by tanh": lambda y: F.gelu(y, approximate="tanh"),
    "histc": lambda y: torch.histc(y, 5, -1, 2),
    "histc of all": lambda y: torch.histc(y, 4),
    "isclose": lambda y: torch.isclose(y, y.round(), atol=0.2).float(),
    "kthvalue": lambda y: torch.kthvalue(y, 2, 1)[0],
    "masked scatter": lambda y: y.masked_scatter(y > 0, torch.arange(24.0)),
    "median": torch.median,
    "median along": lambda y: torch.median(y, 1)[0],
    "new ones": lambda y: y.new_ones(3, 6) * y[0],
    "negative pad": lambda y: F.pad(y, (2, -1, -1, 0), value=0.5),
    "reciprocal": lambda y: torch.reciprocal(y / 1000) / 1000,
    "rms norm": lambda y: F.rms_norm(y * 1000, (6,), eps=0.5),
    "rms norm of small numbers": lambda y: F.rms_norm(y / 1000, (4, 6), X, eps=1e-6),
    "scatter a whole number": lambda y: y.scatter(1, torch.arange(4)[:, None], 1),
    "signbit": lambda y: torch.signbit(y).float(),
    "stable sort": lambda y: torch.sort(y, dim=1, stable=True, descending=True)[0],
    "trunc": torch.trunc,
    "var and mean": lambda y: torch.stack(torch.var_mean(y, 1)),
    "where a number": lambda y: torch.where(y > 0, y, -1e4).softmax(-1),
    "where numbers": lambda y: torch.where(y > 0, 1.5, -2) * y,
    "xor": lambda y: torch.logical_xor(y > 0, y > 1).float() + ((y > 0) ^ (y > 2)),
}


# coremltools has a lowering of these, which fails.
STUMBLED_OVER: dict[str, Any] = {
    "cosine similarity": lambda y: F.cosine_similarity(y, y.roll(1, 0)),
    "pad in a circle": lambda y: F.pad(y[None], (1, 2), mode="circular"),
}


def run(module: nn.Module, inputs: tuple[Any, ...], path: Any, **settings: Any) -> Any:
    """Convert a module, and return what the model gives and its report."""
    made = cto.torch.convert(module, inputs, path, **SETTINGS, **settings)
    program = load(path)
    tensors = [item for item in torch.utils._pytree.tree_leaves(inputs) if torch.is_tensor(item)]
    arrays = {
        feature.name: tensor.numpy().astype(np.float32 if tensor.is_floating_point() else np.int32)
        for feature, tensor in zip(program.inputs, tensors, strict=True)
    }
    return list(program(**arrays).values()), made.compression_report


@pytest.mark.parametrize("functions", [FUNCTIONS, STUMBLED_OVER], ids=["known", "stumbled over"])
def test_ops_that_coremltools_lacks_or_has_wrong_are_written_by_others(functions, tmp_path):
    module = Layer(lambda y: tuple(function(y) for function in functions.values()))
    found, report = run(module, (X,), tmp_path / "model.mlpackage", frontend="export")
    assert report.notes == ()
    with torch.no_grad():
        expected = module(X)
    for name, own, theirs in zip(functions, found, expected, strict=True):
        theirs = theirs.numpy()
        # A hundred sums and functions of float32.
        tolerance = 100 * 2.0**-23 * max(np.abs(theirs).max(), 1)
        np.testing.assert_allclose(own.reshape(theirs.shape), theirs, atol=tolerance, err_msg=name)


TRACED: dict[str, Any] = {
    "ones": lambda y: y[:2, :3].new_ones(2, 3) + y[:2, :3],
    "ones of a type": lambda y: (y > 0).new_ones((), dtype=torch.float32) * y,
    "ones that are true": lambda y: torch.where((y > 0).new_ones(4, 6), y, -y),
    "ones of some size": lambda y: y.new_ones(y[y > 0].shape[0]),
    "differences": torch.diff,
    "differences along": lambda y: torch.diff(y, dim=0),
    "differences of differences": lambda y: torch.diff(y, n=2, prepend=y[:, :1] - 1, append=y),
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_has_ops_that_coremltools_lacks(tmp_path):
    module = Layer(lambda y: tuple(function(y) for function in TRACED.values()))
    found, _ = run(module, (X,), tmp_path / "model.mlpackage", frontend="trace")
    with torch.no_grad():
        expected = module(X)
    for name, array, tensor in zip(TRACED, found, expected, strict=True):
        np.testing.assert_allclose(array, tensor.numpy(), rtol=1e-5, atol=1e-5, err_msg=name)


def test_a_rule_that_does_not_fit_is_told_as_the_failure_that_it_was_to_mend(monkeypatch):
    def fails(*_: Any) -> Any:
        raise AssertionError

    rules = decompositions.known()
    monkeypatch.setattr(decompositions, "known", lambda: dict.fromkeys(rules, fails))
    monkeypatch.setattr(decompositions, "needed", lambda _: {})
    with pytest.raises(UnsupportedError, match=r"can't lower aten\.pad"):
        cto.torch.convert(Layer(STUMBLED_OVER["pad in a circle"]), (X,), frontend="export")


@pytest.mark.parametrize("n_rows", [3, 9])
def test_groups_of_rows_have_matrices_of_their_own(n_rows):
    x, matrices = torch.randn(n_rows, 6), torch.randn(4, 6, 5)
    ends = torch.tensor([1, 1, 2, n_rows - 1], dtype=torch.int32)
    found = decompositions._grouped_mm(x, matrices, ends)
    first = 0
    for matrix, end in zip(matrices, ends.tolist(), strict=True):
        torch.testing.assert_close(found[first:end], x[first:end] @ matrix)
        first = end


def test_what_a_user_has_registered_is_taken(tmp_path, monkeypatch):
    from coremltools.converters.mil import Builder as mb  # noqa: N813
    from coremltools.converters.mil.frontend.torch import ops, torch_op_registry

    registry = torch_op_registry._TORCH_OPS_REGISTRY
    monkeypatch.setattr(registry, "name_to_func_mapping", {**registry.name_to_func_mapping})

    @torch_op_registry.register_torch_op(override=True)
    def asinh(context, node):
        context.add(mb.mul(x=ops._get_inputs(context, node)[0], y=2.0, name=node.name))

    module = Layer(torch.asinh)
    ((found,), _) = run(module, (X,), tmp_path / "model.mlpackage")
    np.testing.assert_allclose(found, 2 * module.layer(X).detach(), atol=1e-6)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_where_export_fails_a_trace_is_made_and_the_report_says_so(tmp_path):
    module = Layer(lambda y: y * float(module.layer.bias.numpy()[0]))
    module.layer.bias.requires_grad_(False)
    ((found,), report) = run(module, (X,), tmp_path / "model.mlpackage")
    np.testing.assert_allclose(found, module(X).detach(), atol=1e-6)
    (note,) = report.notes
    assert note.startswith("converted by torch.jit.trace, as by torch.export it can't be: torch ")


def test_an_op_that_nobody_lowers_is_named_with_its_place_and_what_to_try():
    module = nn.Sequential(Layer(torch.relu), Layer(lambda y: torch.mode(y)[0]))
    with pytest.raises(UnsupportedError) as raised:
        cto.torch.convert(module, (X,))
    text = str(raised.value)
    assert "by torch.export, coremltools has no lowering of aten.mode.default in 1 (" in text
    assert "test_torch_frontends.py, line " in text
    assert "by torch.jit.trace, coremltools can't lower aten.mode in 1: " in text
    assert "register_torch_op" in text
    for frontend, other in (("export", "trace"), ("trace", "export")):
        with pytest.raises(UnsupportedError, match=f"try frontend='{other}'") as raised:
            cto.torch.convert(module, (X,), frontend=frontend)
        assert f"by torch.{'jit.' * (other == 'export')}{frontend}, " in str(raised.value)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_path_that_hangs_on_values_is_traced_only_if_a_trace_is_asked_for(tmp_path):
    module = Layer(lambda y: y + 1 if y.sum() > 0 else y - 1)
    with pytest.raises(UnsupportedError, match="would keep the path that the example inputs take"):
        cto.torch.convert(module, (X,))
    ((found,), report) = run(module, (X,), tmp_path / "model.mlpackage", frontend="trace")
    np.testing.assert_allclose(found, module(X).detach(), atol=1e-6)
    assert report.notes == ()


def test_experts_that_run_one_by_one_are_told_what_to_be():
    network, inputs = zoo.build("mixtral")
    network.network.set_experts_implementation("eager")
    config = cto.torch.quantization.PostTrainingQuantizerConfig()
    network = cto.torch.quantization.PostTrainingQuantizer(network, config).compress()
    with pytest.raises(UnsupportedError, match=r"set_experts_implementation\('grouped_mm'\)"):
        cto.torch.convert(network, inputs)


class Counting(Layer):
    """A layer that adds up what it has given."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(4, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.total.add_(self.layer(x))
        return self.total * 1


def test_buffers_that_a_module_writes_to_become_states(tmp_path):
    module = Counting()
    path = tmp_path / "model.mlpackage"
    cto.torch.convert(module, (X,), path, **SETTINGS)
    assert not module.total.any()
    program = load(path)
    state = program.make_state()
    for _ in range(3):
        (found,) = program(state=state, x=X.numpy()).values()
        expected = module(X).detach().numpy()
    # States are float16.
    np.testing.assert_allclose(found, expected, atol=3 * 2.0**-11 * np.abs(expected).max())


def test_a_trace_makes_states_of_those_that_are_named_alone(tmp_path):
    module = Counting()
    with pytest.raises(UnsupportedError, match="writes to total, of which a trace makes no states"):
        cto.torch.convert(module, (X,), frontend="trace")
    assert not module.total.any()
    state = ct.StateType(ct.TensorType(shape=(4, 6), dtype=np.float16), name="total")
    path = tmp_path / "model.mlpackage"
    cto.torch.convert(module, (X,), path, frontend="trace", states=[state], **SETTINGS)
    assert load(path).make_state()["total"].shape == (4, 6)
    assert not module.total.any()


@pytest.mark.parametrize("frontend", ["export", "trace"])
def test_inputs_of_other_types_and_inside_of_others_are_taken_one_by_one(frontend, tmp_path):
    def function(y, pair, scale, sizes, nothing):
        mask, counts = pair
        assert nothing is None
        kept = torch.where(mask, y * scale, 0.0)
        return {"kept": kept, "more": (kept + sizes["n"], None), "counts": counts * 2}

    module = Layer(function)
    mask, counts = X > 0, torch.arange(6, dtype=torch.uint8)
    inputs = (X, (mask, counts), 2, {"n": torch.tensor([3.0]).double()}, None)
    path = tmp_path / "model.mlpackage"
    found, _ = run(module, inputs, path, frontend=frontend)
    expected = module(*inputs)
    flat = (expected["kept"], expected["more"][0], expected["counts"])
    for own, theirs in zip(found, flat, strict=True):
        np.testing.assert_allclose(own, theirs.detach(), atol=1e-5)
    assert "forward" not in vars(module)


def test_inputs_keep_the_names_of_parameters(tmp_path):
    module = Layer(lambda y, *_: y)
    module.forward = lambda x, pair: module.layer(x) * pair[0] + pair[1]
    cto.torch.convert(module, (X, (X, X > 0)), tmp_path / "model.mlpackage")
    names = [item.name for item in load(tmp_path / "model.mlpackage").inputs]
    assert names == ["x", "pair_0", "pair_1"]
    assert module.forward.__name__ == "<lambda>"


def test_wrong_arguments_are_told_apart_from_modules_that_can_t_be_converted():
    module = Layer(torch.relu)
    with pytest.raises(ConfigError, match="can't be called with example_inputs: mat1 and mat2"):
        cto.torch.convert(module, (X.T,))
    with pytest.raises(
        ConfigError, match=r"compute_precison is no argument of coremltools.convert"
    ):
        cto.torch.convert(module, (X,), compute_precison=ct.precision.FLOAT32)
    shapes = {"x": {0: torch.export.Dim("batch")}}
    with pytest.raises(ConfigError, match="dynamic_shapes are for frontend='export'"):
        cto.torch.convert(module, (X,), frontend="trace", dynamic_shapes=shapes)
    with pytest.raises(ConfigError, match="must hold a tensor"):
        cto.torch.convert(module, (1, None))


def test_sizes_that_differ_from_call_to_call(tmp_path):
    module = Layer(lambda y: torch.where(y > 0, y, -1.0).cumsum(-2))
    module.forward = lambda x: module.function(module.layer(x))
    path = tmp_path / "model.mlpackage"
    shapes = {"x": {0: torch.export.Dim("rows", min=2, max=9)}}
    cto.torch.convert(module, (X,), path, dynamic_shapes=shapes, **SETTINGS)
    (found,) = load(path)(x=X[:3].numpy()).values()
    np.testing.assert_allclose(found, module(X[:3]).detach(), atol=1e-5)
