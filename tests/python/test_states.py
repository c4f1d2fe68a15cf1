"""Models with states: planned with samples, trained over several calls, raised to a later opset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coremltools.converters.mil.mil import Builder as mb  # noqa: N813
from coremltools.converters.mil.mil import types
from coremltools.converters.mil.mil.ops.registry import SSAOpRegistry
from small_models import TARGETS, save, weight

import milpress
from milpress import formats as f
from milpress.interpreter import load
from milpress.mil import raising
from milpress.mil.package import Package

INNER, OUTER = weight(48, 48), weight(40, 48, seed=1)


@pytest.fixture(scope="module")
def memory(tmp_path_factory) -> Path:
    """A layer whose output a state adds up and halves, and a layer that reads the state."""

    @mb.program(
        input_specs=[
            mb.TensorSpec((1, 48), types.fp16),
            mb.StateTensorSpec((1, 48), types.fp16),
        ],
        opset_version=TARGETS["iOS18"],
    )
    def prog(x: Any, memory: Any) -> Any:
        half = mb.mul(x=mb.read_state(input=memory), y=np.float16(0.5))
        sums = mb.add(x=half, y=mb.linear(x=x, weight=INNER, name="inner"))
        kept = mb.coreml_update_state(state=memory, value=sums)
        return mb.linear(x=kept, weight=OUTER, name="outer")

    return save(prog, tmp_path_factory.mktemp("states") / "memory.mlpackage", "iOS18")


def samples(n: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{"x": rng.standard_normal((1, 48)).astype(np.float32)} for _ in range(n)]


@pytest.mark.parametrize("exact", [False, True])
def test_plans_with_samples_begin_each_with_states_of_zero(memory, tmp_path, exact, monkeypatch):
    """The errors are those of plain runs, one treatment at a time."""
    from milpress.planner import calibrated

    made: list[Any] = []
    original = calibrated.calibrate

    def spy(package: Any, items: Any, *arguments: Any, **settings: Any) -> Any:
        made.append((items, original(package, items, *arguments, **settings)))
        return made[-1][1]

    monkeypatch.setattr(calibrated, "calibrate", spy)
    data = samples(4)
    milpress.plan(memory, target_bits=5, sample_data=data, exact=exact, use_cache=False)
    ((items, found),) = made
    program = load(memory)
    own = [program(state=program.make_state(), **one) for one in data]
    for item, errors in zip(items, found.errors, strict=True):
        out = tmp_path / "out.mlpackage"
        recipe = milpress.Recipe.of(f.PalettizeConfig(bits=3), name=item.name)
        milpress.compress(memory, out, recipe, force=True)
        other = load(out)
        noise = signal = 0.0
        for one, expected in zip(data, own, strict=True):
            ((name, values),) = expected.items()
            theirs = other(state=other.make_state(), **one)[name].astype(np.float64)
            noise += float(np.square(theirs - values).sum())
            signal += float(np.square(values.astype(np.float64)).sum())
        # Exact: only the order of sums differs. To first order signs are random: 32 draws, each of
        # which may be off by a deviation of sqrt(2), and the model is run to correct them or not.
        rel = 1e-3 if exact else 3 * np.sqrt(2 / 32)
        assert errors["palette-3"] == pytest.approx(noise / signal, rel=rel)


def test_gradients_of_a_call_flow_through_a_state_and_end_before_it(memory):
    """With kept = old / 2 + W x and y = V kept, the sum of y has the gradient V^T 1 x^T by W."""
    module = load(memory).to_torch()
    module.requires_grad_(True)
    (inner,) = [
        parameter for _, parameter in module.named_parameters() if parameter.shape == (48, 48)
    ]
    first, second = (torch.from_numpy(one["x"]) for one in samples(2))
    for x in (first, second):  # no reset between: the old state is a number
        inner.grad = None
        module(x).sum().backward()
        expected = np.outer(OUTER.astype(np.float64).sum(0), x.numpy()[0])
        # Sums of 40 products in float32.
        scale = np.abs(expected).max()
        np.testing.assert_allclose(inner.grad.numpy(), expected, atol=41 * 2.0**-24 * scale)
    total = INNER.astype(np.float64) @ (first.numpy()[0] / 2 + second.numpy()[0])
    np.testing.assert_allclose(
        module.memory.numpy()[0], total, atol=50 * 2.0**-24 * np.abs(total).max()
    )
    assert not module.memory.requires_grad
    module.reset_states()
    assert not module.memory.any()


def test_a_state_that_is_set_keeps_neither_history_nor_the_array(memory):
    program = load(memory)
    state = program.make_state()
    given = torch.ones(1, 48, requires_grad=True)
    state["memory"] = given * 1
    np.testing.assert_array_equal(state["memory"], np.ones((1, 48)))
    state["memory"] = (values := torch.ones(1, 48))
    values.zero_()
    assert state["memory"].all()


def test_a_stateful_model_is_raised(memory, tmp_path):
    paths = {target: tmp_path / f"{target}.mlpackage" for target in ("iOS18", "iOS26")}
    for target, path in paths.items():
        milpress.compress(memory, path, milpress.Recipe.of(f.QuantizeConfig(), target=target))
    assert {graph.function.opset for graph in Package(paths["iOS26"]).graphs} == {"CoreML9"}
    programs = [load(path) for path in paths.values()]
    states = [program.make_state() for program in programs]
    for sample in samples(2):
        as_it_was, raised = (
            program(state=state, **sample) for program, state in zip(programs, states, strict=True)
        )
        for name, values in as_it_was.items():
            np.testing.assert_array_equal(raised[name], values)


def test_every_op_that_coremltools_writes_is_known_by_the_name_that_files_have():
    # `const` with a symbol never leaves the converter; updating a state is two ops in a file.
    written = set(SSAOpRegistry.core_ops) - {"_const_symbolic"} | {"write_state"}
    known = {*raising._SAFE, *raising._INDEXED, *raising._CHANGED, *raising._REWRITTEN, "clip"}
    assert known == written
