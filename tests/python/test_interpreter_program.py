"""Programs in the interpreter: blocks, lists, states, types, features, errors."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
import torch
from coremltools.converters.mil.mil import Builder as mb  # noqa: N813
from coremltools.converters.mil.mil import types
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_models import TARGETS, save, weight
from typer.testing import CliRunner

import milpress
from milpress.cli.app import app
from milpress.errors import (
    CompressionError,
    ConfigError,
    ExecutionError,
    InputError,
    ModelKindError,
    PackageError,
    UnsupportedOpError,
)
from milpress.formats import PalettizeConfig
from milpress.interpreter import Program, coverage, load
from milpress.interpreter.constants import tensor_of
from milpress.mil import dtypes
from milpress.mil.package import Package
from milpress.recipe import Recipe

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Return a function that saves the package of a function on MIL builders."""

    def made(
        body: Callable[..., Any], *inputs: Any, target: str = "iOS18", **settings: Any
    ) -> Path:
        program = mb.program(input_specs=list(inputs), opset_version=TARGETS[target])(body)
        return save(program, tmp_path / f"{body.__name__}.mlpackage", target, **settings)

    return made


def floats(*shape: int) -> Any:
    return mb.TensorSpec(shape=shape, dtype=types.fp32)


def halves(*shape: int) -> Any:
    return mb.TensorSpec(shape=shape, dtype=types.fp16)


def ints(*shape: int) -> Any:
    return mb.TensorSpec(shape=shape, dtype=types.int32)


def edited(path: Path, edit: Callable[[Any], None]) -> Package:
    """Return a package whose model was edited in memory."""
    model = Package(path).model
    edit(model)
    return Package(path, model_bytes=model.SerializeToString())


def ramp(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


# Blocks


def choosing(x, flag):
    outer = mb.add(x=x, y=np.float32(1), name="outer")
    chosen = mb.cond(
        pred=mb.squeeze(x=mb.cast(x=flag, dtype="bool")),
        _true_fn=lambda: mb.mul(x=outer, y=np.float32(2), name="doubled"),
        _false_fn=lambda: mb.sub(x=outer, y=x, name="one"),
    )
    return mb.add(x=chosen, y=outer, name="sum")


@pytest.mark.parametrize("target", TARGETS)
def test_cond_computes_the_branch_that_its_predicate_chooses(make, target):
    program = load(make(choosing, floats(2, 3), ints(1), target=target))
    x = ramp(2, 3)
    np.testing.assert_array_equal(program(x=x, flag=[1])["sum"], 3 * (x + 1))
    np.testing.assert_array_equal(program(x=x, flag=[0])["sum"], x + 2)


def test_a_tap_in_a_branch_not_taken_is_missing(make):
    program = load(make(choosing, floats(2, 3), ints(1)))
    taps = program.run({"x": ramp(2, 3), "flag": [1]}, taps=["doubled", "one", "outer"]).taps
    assert list(taps) == ["outer", "doubled"]


def powers(x, n):
    factor = mb.const(val=np.float32(3), name="factor")

    def unfinished(i, y):
        return mb.less(x=i, y=mb.squeeze(x=n))

    def step(i, y):
        return mb.add(x=i, y=1), mb.mul(x=y, y=factor, name="power")

    _, y = mb.while_loop(_cond=unfinished, _body=step, loop_vars=(0, x))
    return mb.add(x=y, y=x, name="sum")


@pytest.mark.parametrize("n", [0, 1, 5])
def test_while_loop_runs_as_long_as_its_condition_holds(make, n):
    program = load(make(powers, floats(2), ints(1)))
    x = np.float32([1, 2])
    np.testing.assert_array_equal(program(x=x, n=[n])["sum"], x * 3**n + x)


def test_every_turn_of_a_loop_is_observed(make):
    program = load(make(powers, floats(1), ints(1)))
    seen = []
    result = program.run(
        {"x": np.float32([1]), "n": [3]},
        taps=["power"],
        observe=lambda name, value: seen.append((name, value.item())),
    )
    assert seen == [("power", 3), ("power", 9), ("power", 27)]
    assert result.taps == {}


def shadowing(x, flag):
    def inner():
        return mb.mul(x=mb.add(x=x, y=np.float32(1), name="inner"), y=np.float32(2))

    y = mb.add(x=x, y=np.float32(10), name="outside")
    z = mb.cond(
        pred=mb.squeeze(x=mb.cast(x=flag, dtype="bool")),
        _true_fn=inner,
        _false_fn=lambda: mb.identity(x=x),
    )
    return mb.add(x=y, y=z, name="sum")


def test_a_name_in_a_block_hides_the_same_name_around_it_and_does_not_outlive_it(make):
    def rename(model: Any) -> None:
        block = model.mlProgram.functions["main"].block_specializations["CoreML8"]
        (cond,) = (op for op in block.operations if op.type == "cond")
        for op in cond.blocks[0].operations:
            for output in op.outputs:
                output.name = "outside" if output.name == "inner" else output.name
            for argument in op.inputs.values():
                for binding in argument.arguments:
                    binding.name = "outside" if binding.name == "inner" else binding.name

    package = edited(make(shadowing, floats(1), ints(1)), rename)
    assert load(package)(x=np.float32([1]), flag=[1])["sum"] == (1 + 10) + (1 + 1) * 2


def test_a_value_that_is_used_before_it_is_made_is_refused(make):
    def swap(model: Any) -> None:
        block = model.mlProgram.functions["main"].block_specializations["CoreML8"]
        ops = list(reversed(block.operations))
        kept = [type(op).FromString(op.SerializeToString()) for op in ops]
        del block.operations[:]
        block.operations.extend(kept)

    path = make(choosing, floats(2, 3), ints(1))
    with pytest.raises(PackageError, match="values that exist"):
        load(edited(path, swap))


# Lists


def listing(x, i):
    index = mb.squeeze(x=i)
    ls = mb.make_list(init_length=3, elem_shape=(2,), dtype="fp32", dynamic_length=False)
    ls = mb.list_scatter(ls=ls, indices=[2, 0], value=x)
    ls = mb.list_write(ls=ls, index=1, value=np.float32([7, 8]))
    read = mb.list_read(ls=ls, index=index, name="read")
    gathered = mb.list_gather(ls=ls, indices=[0, 1, 2, 1], name="gathered")
    length = mb.list_length(ls=ls, name="length")
    return read, gathered, length


def test_lists_keep_what_is_written_where_it_is_written(make):
    program = load(make(listing, floats(2, 2), ints(1)))
    x = np.float32([[1, 2], [3, 4]])
    made = program(x=x, i=[2])
    np.testing.assert_array_equal(made["read"], [1, 2])
    np.testing.assert_array_equal(made["gathered"], [[3, 4], [7, 8], [1, 2], [7, 8]])
    assert made["length"] == 3


def test_reading_a_list_out_of_its_bounds_is_an_error_that_says_where(make):
    program = load(make(listing, floats(2, 2), ints(1)))
    with pytest.raises(ExecutionError, match=r"main, op 'read': list_read .* length .* 3, got 5"):
        program(x=ramp(2, 2), i=[5])


def accumulating(x):
    ls = mb.make_list(init_length=1, elem_shape=(2,), dtype="fp32", dynamic_length=True)

    def unfinished(i, ls):
        return mb.less(x=i, y=4)

    def step(i, ls):
        row = mb.gather(x=x, indices=i, axis=0)
        return mb.add(x=i, y=1), mb.list_write(ls=ls, index=i, value=row)

    _, ls = mb.while_loop(_cond=unfinished, _body=step, loop_vars=(0, ls))
    return mb.list_gather(ls=ls, indices=[3, 2, 1, 0], name="reversed")


def test_a_list_without_fixed_length_grows(make):
    program = load(make(accumulating, floats(4, 2), target="iOS16"))
    x = ramp(4, 2)
    np.testing.assert_array_equal(program(x=x)["reversed"], x[::-1])


def growing(x, i):
    ls = mb.make_list(init_length=1, elem_shape=(2,), dtype="fp32", dynamic_length=True)
    untouched = mb.list_read(ls=ls, index=0, name="untouched")
    ls = mb.list_write(ls=ls, index=mb.squeeze(x=i), value=x)
    ls = mb.list_scatter(ls=ls, indices=[6], value=np.float32([[7, 8]]))
    gathered = mb.list_gather(ls=ls, indices=[0, 1, 2, 3, 4, 5, 6], name="gathered")
    return untouched, gathered


def of_unknown_shape(x, i):
    ls = mb.make_list(init_length=1, elem_shape=("n",), dtype="fp32", dynamic_length=True)
    ls = mb.list_write(ls=ls, index=mb.squeeze(x=i), value=x)
    return mb.list_gather(ls=ls, indices=[0, 1, 2, 3], name="gathered")


def test_a_list_that_grows_past_its_end_has_zeros_between(make):
    x = np.float32([3, 4])
    made = load(make(growing, floats(2), ints(1)))(x=x, i=[3])
    rows = np.zeros((7, 2))
    rows[3], rows[6] = x, [7, 8]
    np.testing.assert_array_equal(made["untouched"], [0, 0])
    np.testing.assert_array_equal(made["gathered"], rows)
    program = load(make(of_unknown_shape, floats(2), ints(1)))
    np.testing.assert_array_equal(program(x=x, i=[3])["gathered"], rows[:4])
    with pytest.raises(ExecutionError, match=r"index must be from 0 .* length .* 1, got -1"):
        program(x=x, i=[-1])


# States


def counting(total, x):
    before = mb.read_state(input=total, name="before")
    after = mb.coreml_update_state(state=total, value=mb.add(x=before, y=x), name="after")
    return mb.add(x=before, y=np.float16(0), name="old"), mb.mul(
        x=after, y=np.float16(2), name="new"
    )


@pytest.fixture
def counter(make) -> Path:
    return make(counting, mb.StateTensorSpec((2,), dtype=types.fp16), halves(2))


def test_a_state_is_kept_between_runs_and_read_as_it_was(counter):
    program = load(counter)
    state = program.make_state()
    program(x=[1, 2], state=state)
    made = program(x=[10, 20], state=state)
    np.testing.assert_array_equal(made["old"], [1, 2])
    np.testing.assert_array_equal(made["new"], [22, 44])
    np.testing.assert_array_equal(state["total"], [11, 22])


def test_states_are_independent_and_can_be_set(counter):
    program = load(counter)
    first, second = program.make_state(), program.make_state()
    program(x=[1, 2], state=first)
    np.testing.assert_array_equal(second["total"], [0, 0])
    second["total"] = [5, 6]
    np.testing.assert_array_equal(program(x=[0, 0], state=second)["old"], [5, 6])
    with pytest.raises(InputError, match=r"\[2\], got \[3\]"):
        second["total"] = [1, 2, 3]


def test_a_stateful_model_must_be_given_a_state_of_its_own(counter, make):
    program = load(counter)
    with pytest.raises(InputError, match="make_state"):
        program(x=[1, 2])
    other = load(make(powers, floats(1), ints(1))).make_state()
    with pytest.raises(InputError, match="'total'"):
        program(x=[1, 2], state=other)


# Types


def rounding(x):
    y = mb.add(x=x, y=np.float16(1), name="y")
    return mb.sub(x=y, y=np.float16(1), name="z")


def test_float16_rounds_each_value_and_float32_none(make):
    path = make(rounding, halves(1))
    # 2048 + 1 is no float16, and halfway rounds to even.
    assert load(path)(x=np.float16([2048]))["z"] == 2048
    assert load(path, precision="float16")(x=np.float16([2048]))["z"] == 2047
    assert load(path)(x=np.float32([1 / 3]))["z"].dtype == np.float32
    assert load(path, precision="float16")(x=np.float32([1 / 3]))["z"].dtype == np.float16


@pytest.mark.parametrize(
    ("name", "patterns", "expected"),
    [
        ("bool", np.array([True, False]), [1, 0]),
        ("float16", np.float16([65504, 2.0**-24]), [65504, 2.0**-24]),
        ("bfloat16", np.uint16([0x3F80, 0xC049, 0x7F80]), [1, -3.140625, np.inf]),
        ("float8e4m3fn", np.uint8([0x38, 0x7E, 0x81]), [1, 448, -(2.0**-9)]),
        ("float8e5m2", np.uint8([0x3C, 0x7B, 0x81]), [1, 57344, -(2.0**-16)]),
        ("int8", np.int8([-128, 127]), [-128, 127]),
        ("uint16", np.uint16([0, 65535]), [0, 65535]),
        ("uint32", np.uint32([0, 2**32 - 1]), [0, 2**32 - 1]),
        ("uint4", np.uint8([0, 15]), [0, 15]),
    ],
)
def test_stored_numbers_are_read_as_what_they_are(name, patterns, expected):
    for stored in (patterns, np.frombuffer(patterns.tobytes(), patterns.dtype)):
        assert tensor_of(dtypes.by_name(name), stored).tolist() == expected


def multiplying(x):
    return mb.mul(x=x, y=np.int32(4), name="y")


def test_int32_wraps_around(make):
    program = load(make(multiplying, ints(2)))
    np.testing.assert_array_equal(program(x=[2**30, 3])["y"], [0, 12])


def test_torch_in_gives_torch_out(make):
    program = load(make(multiplying, ints(2)))
    y = program(x=torch.tensor([1, 2]))["y"]
    assert torch.equal(y, torch.tensor([4, 8], dtype=torch.int32))


def keeping(total, x):
    mb.coreml_update_state(state=total, value=x)
    constant = mb.const(val=np.float16([3, 4]), name="constant")
    return mb.identity(x=constant, name="same"), mb.identity(x=x, name="back")


@pytest.mark.parametrize("kind", [np.float32, torch.tensor])
def test_what_is_given_and_what_comes_out_may_be_changed(make, kind):
    program = load(make(keeping, mb.StateTensorSpec((2,), dtype=types.fp16), halves(2)))
    state, x = program.make_state(), kind([1.0, 2.0])
    made = program(x=x, state=state)
    x[:], made["same"][:], made["back"][:] = 7, 8, 9
    assert state["total"].tolist() == [1, 2]
    assert program(x=x, state=state)["same"].tolist() == [3, 4]


def flipping(x):
    return mb.random_bernoulli(
        shape=np.int32([64]), prob=np.float32(0.5), name="flips"
    ), mb.identity(x=x, name="y")


def test_random_numbers_repeat_with_their_seed(make):
    path = make(flipping, floats(1))
    x = np.float32([0])
    program = load(path, seed=1)
    first = program(x=x)["flips"]
    np.testing.assert_array_equal(program(x=x)["flips"], first)
    np.testing.assert_array_equal(load(path).run({"x": x}, seed=1).outputs["flips"], first)
    assert (load(path, seed=2)(x=x)["flips"] != first).any()


# Running


def chain(x):
    for i in range(6):
        x = mb.add(x=x, y=np.float32(1), name=f"step{i}")
    return x


def test_a_value_is_freed_when_its_last_reader_has_run(make):
    program = load(make(chain, floats(5)))
    alive: list[weakref.ref] = []
    most = 0

    def observe(name: str, value: torch.Tensor) -> None:
        nonlocal most
        alive.append(weakref.ref(value))
        most = max(most, sum(ref() is not None for ref in alive))

    program.run({"x": ramp(5)}, taps=program.values, observe=observe)
    # The one that is read and the one that is made.
    assert (len(alive), most) == (7, 2)


def test_intermediate_values_have_the_declared_types(make):
    program = load(make(listing, floats(2, 2), ints(1)))
    result = program.run({"x": ramp(2, 2), "i": [0]}, taps=program.values)
    for name, kind in program.values.items():
        if kind is not None:
            assert (result.taps[name].dtype, result.taps[name].shape) == (
                kind.dtype.storage,
                kind.shape,
            )


def heavy(x):
    return mb.linear(x=x, weight=weight(64, 64, dtype=np.float32), name="y")


@pytest.mark.parametrize(("memory", "n_decoded"), [(1 << 20, 1), (0, 3)])
def test_weights_are_kept_within_the_memory_that_they_may_take(
    make, memory, n_decoded, monkeypatch
):
    from milpress.mil.decode import Decoder

    decoded = []
    dense = Decoder.dense
    monkeypatch.setattr(Decoder, "dense", lambda *a: decoded.append(a) or dense(*a))
    program = load(make(heavy, floats(1, 64)), weight_memory=memory)
    assert not decoded
    for _ in range(3):
        y = program(x=ramp(1, 64))["y"]
    np.testing.assert_allclose(
        y,
        ramp(1, 64).astype(np.float64) @ weight(64, 64, dtype=np.float32).T.astype(np.float64),
        rtol=64 * 2.0**-23,
        atol=64 * 64 * 2.0**-23,
    )
    assert len(decoded) == n_decoded


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"inputs must be x \(float32 2x2\), i \(int32 1\), got none"),
        ({"x": ramp(2, 2), "i": [0], "z": 1}, "got x, i, z"),
        ({"x": ramp(2, 3), "i": [0]}, "'x' must have the shape 2x2, got 2x3"),
        ({"x": ramp(4), "i": [0]}, "'x' must have the shape 2x2, got 4"),
        ({"x": np.full((2, 2), "a"), "i": [0]}, "'x' must hold numbers, got <U1"),
        ({"x": [[1], [1, 2]], "i": [0]}, "'x' is not an array"),
        ({"x": np.zeros((2, 2), complex), "i": [0]}, "'x' must hold numbers, got complex128"),
        ({"x": ramp(2, 2), "i": [0.5]}, "'i' must hold int32, got float64"),
        ({"x": ramp(2, 2), "i": [2**31]}, "'i' holds numbers that 32 bits can't hold"),
    ],
)
def test_wrong_inputs_are_refused(make, given, message):
    program = load(make(listing, floats(2, 2), ints(1)))
    with pytest.raises(InputError, match=message):
        program.run(given)


def test_a_tap_that_does_not_exist_is_refused(make):
    program = load(make(multiplying, ints(2)))
    with pytest.raises(InputError, match=r"taps .* nothing_such"):
        program.run({"x": [1, 2]}, taps=["nothing_such"])


def test_an_op_that_is_not_covered_is_named_when_the_program_is_loaded(make):
    def replace(model: Any) -> None:
        block = model.mlProgram.functions["main"].block_specializations["CoreML8"]
        block.operations[-1].type = "frobnicate"

    package = edited(make(multiplying, ints(2)), replace)
    with pytest.raises(UnsupportedOpError, match=r"main, op 'y'.*frobnicate, in iOS18") as caught:
        load(package)
    assert (caught.value.op, caught.value.opset) == ("frobnicate", "iOS18")
    assert isinstance(caught.value, NotImplementedError)
    assert [(each.op, each.is_covered) for each in coverage(package).ops] == [("frobnicate", False)]


def test_a_kind_of_compressed_weight_that_is_not_known_is_named_when_the_program_is_loaded(
    build, tmp_path
):
    def replace(model: Any) -> None:
        block = model.mlProgram.functions["main"].block_specializations["CoreML8"]
        for op in block.operations:
            if op.type == "constexpr_lut_to_dense":
                op.type = "constexpr_crystal_ball"

    recipe = Recipe.of(PalettizeConfig(bits=4))
    milpress.compress(build("layers"), tmp_path / "m.mlpackage", recipe)
    package = edited(tmp_path / "m.mlpackage", replace)
    with pytest.raises(UnsupportedOpError, match="constexpr_crystal_ball, in iOS18"):
        load(package)
    missing = {each.op for each in coverage(package).ops if not each.is_covered}
    assert missing == {"constexpr_crystal_ball"}


def test_a_parameter_that_is_not_covered_is_named_when_the_program_is_loaded(make):
    def add(model: Any) -> None:
        block = model.mlProgram.functions["main"].block_specializations["CoreML8"]
        block.operations[-1].inputs["fuzz"].arguments.add().name = "x"

    package = edited(make(multiplying, ints(2)), add)
    with pytest.raises(UnsupportedOpError, match="mul with fuzz"):
        load(package)
    assert coverage(package).ops[0].uncovered == "mul with fuzz"


def test_an_op_that_torch_has_not_for_a_type_is_named_when_it_runs(make):
    def replace(model: Any) -> None:
        op = model.mlProgram.functions["main"].block_specializations["CoreML8"].operations[-1]
        op.type = "silu"
        del op.inputs["y"]

    program = load(edited(make(multiplying, ints(2)), replace))
    with pytest.raises(UnsupportedOpError, match=r"main, op 'y'.*silu .*'Int'") as caught:
        program(x=[1, 2])
    assert caught.value.op == "silu"


def test_an_unknown_precision_or_function_is_refused(make):
    path = make(multiplying, ints(2))
    with pytest.raises(ConfigError, match="precision"):
        load(path, precision="float8")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="function must be one of main, got 'other'"):
        load(path, "other")


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 2**32), n_flips=st.integers(1, 20))
def test_a_damaged_model_runs_or_is_an_error_of_ours(build, seed, n_flips):
    # None of its ops makes more of what it is given.
    source = Package(build("nested", "iOS16"))
    rng = np.random.default_rng(seed)
    data = bytearray(source.model_bytes)
    for _ in range(n_flips):
        data[rng.integers(len(data))] = rng.integers(256)
    with contextlib.suppress(CompressionError):
        package = Package(source.path, model_bytes=bytes(data))
        coverage(package)
        program = load(package)
        inputs = {f.name: np.ones([size or 1 for size in f.shape]) for f in program.inputs}
        program.run(inputs, taps=program.values, state=program.make_state())


# Modules


def test_a_module_computes_what_the_program_does_and_can_be_exported(build):
    path = build("layers", "iOS16")
    program = load(path)
    module = program.to_torch()
    x = torch.from_numpy(weight(1, 48, 8, 8, dtype=np.float32))
    expected = program(x=x)["sum"]
    assert torch.equal(module(x), expected)
    exported = torch.export.export(module, (x,)).module()
    assert torch.equal(exported(x), expected)
    assert {"linear_weight_0", "conv_weight_0"} <= {name for name, _ in module.named_parameters()}


def test_the_states_of_a_module_are_buffers(counter):
    module = load(counter).to_torch()
    x = torch.tensor([1.0, 2.0])
    exported = torch.export.export(module, (x,)).module()
    for run in (module, exported):
        module.total.zero_()  # which both share
        run(x)
        old, new = run(10 * x)
        assert (old.tolist(), new.tolist()) == ([1, 2], [22, 44])


# Images and labels


class Affine(torch.nn.Module):
    SCALES = torch.tensor([1.0, 2.0, 4.0])

    def forward(self, image):
        return image * self.SCALES.reshape(3, 1, 1)


def converted(module: torch.nn.Module, example: Any, path: Path, **settings: Any) -> Path:
    traced = torch.jit.trace(module.eval(), example, check_trace=False)
    settings = {"minimum_deployment_target": ct.target.iOS16, **settings}
    model = ct.convert(
        traced, compute_precision=ct.precision.FLOAT32, skip_model_load=True, **settings
    )
    model.save(str(path))
    return path


@pytest.mark.parametrize("layout", ["RGB", "BGR"])
def test_an_image_is_rows_and_columns_of_red_green_and_blue(tmp_path, layout):
    path = converted(
        Affine(),
        torch.ones(1, 3, 4, 5),
        tmp_path / "image.mlpackage",
        inputs=[
            ct.ImageType("image", (1, 3, 4, 5), scale=0.5, bias=[1, 2, 3], color_layout=layout)
        ],
        outputs=[ct.TensorType("y", dtype=np.float32)],
    )
    program = load(path)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)
    planes = pixels.transpose(2, 0, 1)[:: 1 if layout == "RGB" else -1].astype(np.float32)
    expected = (planes * 0.5 + np.float32([1, 2, 3])[:, None, None]) * np.float32([1, 2, 4])[
        :, None, None
    ]
    np.testing.assert_array_equal(program(image=pixels)["y"], expected[None])
    np.testing.assert_array_equal(program(image=planes[None])["y"], expected[None])
    for wrong in (pixels[:3], pixels[:, :, :2], pixels[..., 0], pixels[None]):
        with pytest.raises(InputError, match="image"):
            program(image=wrong)


@pytest.mark.parametrize("layout", ["RGB", "BGR"])
def test_an_image_comes_out_as_it_went_in(tmp_path, layout):
    path = converted(
        torch.nn.ReLU(),
        torch.ones(1, 3, 4, 5),
        tmp_path / "image.mlpackage",
        inputs=[ct.ImageType("image", (1, 3, 4, 5), color_layout=layout)],
        outputs=[ct.ImageType("y", color_layout=layout)],
    )
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)
    np.testing.assert_array_equal(load(path)(image=pixels)["y"], pixels)


@pytest.mark.parametrize("layout", ["GRAYSCALE", "GRAYSCALE_FLOAT16"])
def test_a_gray_image_is_rows_and_columns(tmp_path, layout):
    layout = ct.colorlayout[layout]
    path = converted(
        torch.nn.ReLU(),
        torch.ones(1, 1, 4, 5),
        tmp_path / "gray.mlpackage",
        inputs=[ct.ImageType("image", (1, 1, 4, 5), color_layout=layout)],
        outputs=[ct.ImageType("y", color_layout=layout)],
    )
    dtype = np.uint8 if layout == ct.colorlayout.GRAYSCALE else np.float16
    pixels = np.arange(20).reshape(4, 5).astype(dtype)
    made = load(path)(image=pixels)["y"]
    np.testing.assert_array_equal(made, pixels)
    assert made.dtype == dtype


@pytest.mark.parametrize(
    ("shape", "right", "wrong"),
    [
        (ct.EnumeratedShapes([(1, 3, 4, 5), (1, 3, 6, 8)]), [(4, 5), (6, 8)], [(4, 8), (5, 5)]),
        ((1, 3, ct.RangeDim(4, 9), ct.RangeDim(5, 8)), [(4, 5), (9, 8)], [(4, 4), (10, 8)]),
    ],
)
def test_an_image_may_have_the_sizes_that_the_model_allows(tmp_path, shape, right, wrong):
    path = converted(
        torch.nn.ReLU(),
        torch.ones(1, 3, 4, 5),
        tmp_path / "sizes.mlpackage",
        inputs=[ct.ImageType("image", shape)],
        outputs=[ct.TensorType("y", dtype=np.float32)],
    )
    program = load(path)
    for size in right:
        pixels = ramp(*size, 3)
        made = program(image=pixels)["y"]
        np.testing.assert_array_equal(made, pixels.transpose(2, 0, 1)[None])
    for size in wrong:
        with pytest.raises(InputError, match="must have the shape 1x3x"):
            program(image=ramp(*size, 3))


@pytest.mark.parametrize("labels", [["cat", "dog", "eel"], [7, 8, 9]])
def test_a_classifier_gives_its_best_label_and_all_probabilities(tmp_path, labels):
    path = converted(
        torch.nn.Softmax(-1),
        torch.ones(1, 3),
        tmp_path / "classifier.mlpackage",
        inputs=[ct.TensorType("x", (1, 3))],
        classifier_config=ct.ClassifierConfig(labels),
        minimum_deployment_target=ct.target.iOS15,
    )
    made = load(path)(x=np.float32([[0, 2, 1]]))
    assert made["classLabel"] == labels[1]
    p = np.exp([0.0, 2.0, 1.0])
    assert list(made["classLabel_probs"]) == labels
    # Three operations in float32.
    np.testing.assert_allclose(list(made["classLabel_probs"].values()), p / p.sum(), rtol=2.0**-21)


# Shapes


class Doubling(torch.nn.Module):
    def forward(self, x):
        return x * 2


def test_enumerated_shapes_are_taken_and_no_others(tmp_path):
    shapes = ct.EnumeratedShapes([(1, 3, 8), (1, 3, 16)])
    path = converted(
        Doubling(),
        torch.ones(1, 3, 8),
        tmp_path / "m.mlpackage",
        inputs=[ct.TensorType("x", shapes)],
        outputs=[ct.TensorType("y")],
    )
    program = load(path)
    for n in (8, 16):
        np.testing.assert_array_equal(program(x=ramp(1, 3, n))["y"], 2 * ramp(1, 3, n))
    with pytest.raises(InputError, match="1x3x8 or 1x3x16, got 1x3x12"):
        program(x=ramp(1, 3, 12))


def test_sizes_within_their_bounds_are_taken_and_no_others(tmp_path):
    path = converted(
        Doubling(),
        torch.ones(1, 8),
        tmp_path / "m.mlpackage",
        inputs=[ct.TensorType("x", (1, ct.RangeDim(4, 16, default=8)))],
        outputs=[ct.TensorType("y")],
    )
    program = load(path)
    for n in (4, 16):
        np.testing.assert_array_equal(program(x=ramp(1, n))["y"], 2 * ramp(1, n))
    for n in (3, 17):
        with pytest.raises(InputError, match=rf"1x4\.\.16, got 1x{n}"):
            program(x=ramp(1, n))


class Sum(torch.nn.Module):
    def forward(self, x, y):
        return x + y


def test_an_optional_input_that_is_missing_has_its_default(tmp_path):
    default = np.full((1, 3), 7, np.float32)
    path = converted(
        Sum(),
        (torch.ones(1, 3), torch.ones(1, 3)),
        tmp_path / "m.mlpackage",
        inputs=[
            ct.TensorType("x", (1, 3)),
            ct.TensorType("y", (1, ct.RangeDim(3, 6, default=3)), default_value=default),
        ],
        outputs=[ct.TensorType("z")],
    )
    program = load(path)
    np.testing.assert_array_equal(program(x=ramp(1, 3))["z"], ramp(1, 3) + 7)
    np.testing.assert_array_equal(program(x=ramp(1, 3), y=ramp(1, 3))["z"], 2 * ramp(1, 3))


# Packages of several programs


def test_each_function_of_a_package_runs(make, tmp_path):
    def plus(x):
        return mb.add(x=x, y=np.float32(1), name="y")

    def times(x):
        return mb.mul(x=x, y=np.float32(3), name="y")

    paths = [make(plus, floats(2)), make(times, floats(2))]
    descriptor = ct.utils.MultiFunctionDescriptor()
    for path in paths:
        descriptor.add_function(str(path), "main", path.stem)
    descriptor.default_function_name = "times"
    ct.utils.save_multifunction(descriptor, str(tmp_path / "both.mlpackage"))
    both = tmp_path / "both.mlpackage"
    x = np.float32([1, 2])
    np.testing.assert_array_equal(load(both, "plus")(x=x)["y"], x + 1)
    np.testing.assert_array_equal(load(both, function="times")(x=x)["y"], x * 3)
    np.testing.assert_array_equal(load(both)(x=x)["y"], x * 3)
    with pytest.raises(ConfigError, match="one of plus, times, got 'main'"):
        load(both, "main")


@pytest.fixture
def pipeline(tmp_path) -> Path:
    models = []
    for i, module in enumerate((Affine(), torch.nn.AdaptiveAvgPool2d(1))):
        path = converted(
            module,
            torch.ones(1, 3, 4, 5),
            tmp_path / f"{i}.mlpackage",
            inputs=[
                ct.ImageType("image", (1, 3, 4, 5)) if i == 0 else ct.TensorType("y", (1, 3, 4, 5))
            ],
            outputs=[ct.TensorType("y" if i == 0 else "z", dtype=np.float32)],
        )
        models.append(ct.models.MLModel(str(path), skip_model_load=True))
    whole = ct.utils.make_pipeline(*models)
    whole.save(str(tmp_path / "pipeline.mlpackage"))
    return tmp_path / "pipeline.mlpackage"


def test_the_models_of_a_pipeline_run_in_order(pipeline):
    program = load(pipeline)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)
    assert [feature.name for feature in program.inputs] == ["image"]
    assert [feature.name for feature in program.outputs] == ["z"]
    result = program.run({"image": pixels}, taps=program.values)
    expected = pixels.mean((0, 1), dtype=np.float64) * [1, 2, 4]
    # A mean of 20 numbers and one product in float32.
    np.testing.assert_allclose(result.outputs["z"].reshape(-1), expected, rtol=21 * 2.0**-24)
    assert all(name.startswith(("model0/", "model1/")) for name in result.taps)
    module = program.to_torch()
    planes = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    np.testing.assert_array_equal(module(planes).numpy(), result.outputs["z"])
    with pytest.raises(ConfigError, match="pipeline"):
        load(pipeline, "main")


def test_a_pipeline_with_a_model_of_another_kind_is_refused(pipeline):
    def replace(model: Any) -> None:
        model.pipeline.models[1].ClearField("mlProgram")

    with pytest.raises(
        ModelKindError, match="of the pipeline is of a kind that Core ML does not have"
    ):
        load(edited(pipeline, replace))


# The command line


def invoke(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_run_prints_and_writes_the_outputs(make, tmp_path):
    path = make(listing, floats(2, 2), ints(1))
    np.save(tmp_path / "x.npy", ramp(2, 2))
    np.savez(tmp_path / "rest.npz", i=[1])
    arguments = [
        "run",
        path,
        "--input",
        f"x={tmp_path / 'x.npy'}",
        "--input",
        tmp_path / "rest.npz",
    ]
    shown = invoke(*arguments)
    assert shown.exit_code == 0, shown.output
    assert "gathered" in shown.output
    found = json.loads(invoke(*arguments, "--json", "--output", tmp_path).output)
    assert found["outputs"][0] == {
        "name": "read",
        "shape": [2],
        "dtype": "float32",
        "min": 7,
        "max": 8,
        "mean": 7.5,
    }
    with np.load(tmp_path / "outputs.npz") as written:
        assert written["read"].tolist() == [7, 8]
    taken = invoke(*arguments, "--output", tmp_path)
    assert isinstance(taken.exception, CompressionError)


def test_inspect_tells_which_ops_are_covered(make):
    path = make(choosing, floats(2, 3), ints(1))
    found = json.loads(invoke("inspect", path, "--ops", "--json").output)
    assert found["interpreter"]["covered"] is True
    assert {
        "function": "main",
        "target": "iOS18",
        "op": "add",
        "count": 2,
        "covered": True,
    } in found["interpreter"]["ops"]
    assert "all covered" in invoke("inspect", path, "--ops").output


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
sys.argv[1:] = {arguments}
from milpress.cli import root
raise SystemExit(root.run())
"""


def test_without_torch_only_what_needs_it_is_refused_in_one_sentence(make):
    path = str(make(multiplying, ints(2)))
    for arguments, code in (
        (["inspect", path], 0),
        (["inspect", path, "--ops"], 2),
        (["run", path], 2),
    ):
        ran = subprocess.run(
            [sys.executable, "-c", WITHOUT_TORCH.format(arguments=arguments)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == code, ran.stderr
        if code:
            assert ran.stderr.startswith("error: running models needs PyTorch")
            assert "pip install 'milpress[torch]'" in ran.stderr
            assert "Traceback" not in ran.stderr


def test_a_program_tells_what_it_takes_and_gives(make):
    program: Program = load(make(listing, floats(2, 2), ints(1)))
    assert [(f.name, f.kind, f.dtype, f.shape) for f in program.inputs] == [
        ("x", "array", "float32", (2, 2)),
        ("i", "array", "int32", (1,)),
    ]
    assert [f.name for f in program.outputs] == ["read", "gathered", "length"]
