"""Weights in forms that other tools write and milpress doesn't: each command reads them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import coremltools as ct
import coremltools.optimize.coreml as cto
import numpy as np
import pytest
from coremltools.converters.mil.mil import Builder as mb  # noqa: N813
from coremltools.converters.mil.mil import types
from coremltools.optimize._utils import select_input_output_channel_axis
from oracles import assert_coremltools_agrees, decoded, ops_of
from small_models import PROGRAMS, TARGETS, save, weight

import milpress
from milpress import coreml, interpreter
from milpress import formats as f
from milpress.errors import PackageError, VerificationError
from milpress.mil import proto, values
from milpress.mil.graph import new_const
from milpress.mil.package import Package
from milpress.recipe import Recipe, Step

PALETTE = f.PalettizeConfig(bits=4)
CASTS = {"halves", "outer", "inner"}
MODEL = "Data/com.apple.CoreML/model.mlmodel"
WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"


def short(names: Any) -> set[str]:
    """Return the last parts of names, without the endings of treatments."""
    return {name.rpartition("/")[2].split("_")[0] for name in names}


def pipeline(build: Any, target: str, path: Path) -> Path:
    """Save a cast model behind another one that has no weights."""

    @mb.program(
        input_specs=[mb.TensorSpec(shape=(1, 64))],
        opset_version=TARGETS[target],
    )
    def doubled(x: Any) -> Any:
        return mb.add(x=x, y=x, name="between")

    first = save(doubled, path.with_name("first.mlpackage"), target)
    models = [
        ct.models.MLModel(str(each), skip_model_load=True)
        for each in (first, build("casts", target))
    ]
    spec = models[1].get_spec()
    ct.utils.rename_feature(spec, "x", "between", rename_outputs=False)
    second = ct.models.MLModel(spec, weights_dir=models[1].weights_dir, skip_model_load=True)
    ct.utils.make_pipeline(models[0], second).save(str(path))
    return path


def functions(build: Any, target: str, path: Path) -> Path:
    description = ct.utils.MultiFunctionDescriptor()
    for name in ("first", "second"):
        description.add_function(str(build("casts", target)), "main", name)
    description.default_function_name = "first"
    ct.utils.save_multifunction(description, str(path))
    return path


def alone(build: Any, target: str, path: Path) -> Path:
    return build("casts", target)


PLACES: dict[str, tuple[Callable[..., Path], str]] = {
    "early": (alone, "iOS16"),
    "late": (alone, "iOS18"),
    "pipeline": (pipeline, "iOS16"),
    "functions": (functions, "iOS18"),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_cast_weight_is_listed_compressed_and_decompressed(build, tmp_path, place):
    make, target = PLACES[place]
    source = make(build, target, tmp_path / "source.mlpackage")
    listed = [w for w in milpress.inspect(source).weights if short([w.name]) <= CASTS]
    assert short(w.name for w in listed) == CASTS
    assert {(w.dtype, w.stored_as, w.n_bytes) for w in listed} == {
        ("float32", "cast float16", 2 * 64 * 64)
    }
    before = decoded(source)

    small, dense = tmp_path / "small.mlpackage", tmp_path / "dense.mlpackage"
    report = milpress.compress(source, small, Recipe.of(PALETTE))
    assert short(w.name for w in report.with_status("compressed")) >= CASTS
    assert not any("constexpr_cast" in op for op, *_ in all_ops(small))
    checks = {check.name: check.promise for check in milpress.verify(source, small).weights}
    assert set(checks.values()) == {"nearest"}
    assert short(checks) >= CASTS

    milpress.decompress(source, dense)
    assert not any("constexpr" in op for op, *_ in all_ops(dense))
    after = decoded(dense)
    for name, array in before.items():
        assert array.dtype == np.float32
        assert after[name].tobytes() == array.tobytes()
    milpress.verify(source, dense)


def all_ops(path: Path) -> list[tuple[str]]:
    model = proto.Model.FromString((path / MODEL).read_bytes())
    parts = list(model.pipeline.models) or [model]
    return [
        (op.type,)
        for part in parts
        for function in part.mlProgram.functions.values()
        for block in function.block_specializations.values()
        for op in _nested(block)
    ]


def _nested(block: Any) -> Any:
    for op in block.operations:
        yield op
        for inner in op.blocks:
            yield from _nested(inner)


@pytest.mark.parametrize("target", ["iOS16", "iOS18"])
def test_a_cast_weight_decodes_as_coremltools_has_it(build, tmp_path, target):
    source = build("casts", target)
    assert_coremltools_agrees(source)
    small = tmp_path / "small.mlpackage"
    for treatment in (PALETTE, f.QuantizeConfig(), f.PruneConfig(sparsity=0.75)):
        milpress.compress(source, small, Recipe.of(treatment), force=True)
        assert_coremltools_agrees(small)
        assert {array.dtype.name for array in decoded(small).values()} == {"float32"}


def test_decompressing_makes_a_cast_weight_dense_as_coremltools_does(build, tmp_path):
    source, dense = build("casts"), tmp_path / "dense.mlpackage"
    milpress.decompress(source, dense)
    theirs = cto.decompress_weights(ct.models.MLModel(str(source), skip_model_load=True))
    assert not any(op.op_type == "constexpr_cast" for op in theirs._mil_program["main"].operations)
    assert "constexpr_cast" not in {op for op, *_ in ops_of(dense)}


def test_a_cast_weight_that_would_get_larger_is_left(build, tmp_path):
    out = tmp_path / "out.mlpackage"
    # Half of the values in float32 and a mask are more than all of them in float16.
    report = milpress.compress(build("casts"), out, Recipe.of(f.PruneConfig(sparsity=0.5)))
    left = {w.name: w.note for w in report.with_status("left")}
    assert left.keys() == CASTS
    assert all(
        note == "left as it is: compressed it would be larger (8,704 bytes instead of 8,192)"
        for note in left.values()
    )
    kept = [w.stored_as for w in milpress.inspect(out).weights if short([w.name]) <= CASTS]
    assert kept == ["cast float16"] * len(CASTS)


def test_a_cast_weight_is_left_in_the_face_of_coremltools_as_there(build, caplog):
    source = ct.models.MLModel(str(build("casts")), skip_model_load=True)
    config = cto.OptimizationConfig(cto.OpLinearQuantizerConfig(weight_threshold=10))
    theirs = cto.linear_quantize_weights(source, config)
    kinds = [op.op_type for op in theirs._mil_program["main"].operations]
    assert "constexpr_cast" in kinds
    own = coreml.OptimizationConfig(coreml.OpLinearQuantizerConfig(weight_threshold=10))
    coreml.linear_quantize_weights(source, own)
    said = {record.message for record in caplog.records if record.name.startswith("milpress")}
    reason = "stored as float16 and cast, which coremltools leaves. Skipped this op."
    assert said == {f"{name}: {reason}" for name in CASTS}


@pytest.mark.parametrize("target", ["iOS16", "iOS18"])
def test_a_cast_weight_is_planned_linted_and_run(build, target):
    source = build("casts", target)
    plan = milpress.plan(source, target_bits=5.0, use_cache=False, min_size=10)
    assert short(w.name for w in plan.weights) >= CASTS
    milpress.lint(source)
    x = np.linspace(-1, 1, 64, dtype=np.float32)[None]
    (made,) = interpreter.load(source)(x=x, flag=np.zeros(1, np.float32)).values()
    arrays = decoded(source)
    y = x.astype(np.float64)
    for name in ("halves", "second_weight_0", "inner"):
        y = y @ arrays[name].T.astype(np.float64)
    # Sums of 64 products in float32, three times over; the weights of a row are below 8 in all.
    bound = 3 * 64 * 2.0**-24 * 8**3
    np.testing.assert_allclose(np.asarray(made), y, rtol=0, atol=bound)


def test_an_ios16_cast_takes_its_ios18_form_when_raised(build, tmp_path):
    out = tmp_path / "out.mlpackage"
    recipe = Recipe.of(PALETTE, name="second_weight_0", target="iOS18")
    milpress.compress(build("casts", "iOS16"), out, recipe)
    assert_coremltools_agrees(out)
    assert ("constexpr_cast", ["name"], ["output_dtype", "source_val"], ["halves"]) in ops_of(out)


def test_a_changed_byte_of_a_cast_weight_is_found(build, tmp_path):
    bad = tmp_path / "bad.mlpackage"
    shutil.copytree(build("casts"), bad)
    data = bytearray((bad / WEIGHTS).read_bytes())
    data[128] ^= 1
    (bad / WEIGHTS).write_bytes(data)
    with pytest.raises(VerificationError, match="changed, though the record says"):
        milpress.verify(build("casts"), bad)


def test_cast_biases_are_made_dense_whatever_their_size_and_corrected(tmp_path):
    @mb.program(input_specs=[mb.TensorSpec(shape=(4, 64))], opset_version=TARGETS["iOS18"])
    def prog(x: Any) -> Any:
        def cast(name: str, *shape: int) -> Any:
            return mb.constexpr_cast(source_val=weight(*shape), output_dtype="fp32", name=name)

        x = mb.linear(x=x, weight=cast("first", 64, 64), bias=cast("long", 64), name="y")
        return mb.linear(x=x, weight=cast("second", 8, 64), bias=cast("short", 8), name="z")

    source, dense, out = (tmp_path / f"{name}.mlpackage" for name in ("in", "dense", "out"))
    save(prog, source, "iOS18")
    milpress.decompress(source, dense)
    assert {op for op, *_ in ops_of(dense)} == {"const", "linear"}
    assert_coremltools_agrees(dense)

    rng = np.random.default_rng(0)
    samples = [{"x": rng.standard_normal((4, 64)).astype(np.float32) + 1} for _ in range(4)]
    recipe = Recipe.of(f.PalettizeConfig(bits=2), min_size=10)
    milpress.compress(source, out, recipe, sample_data=samples, bias_correction=True)
    assert milpress.verify(source, out).n_corrected == 2

    # The mean of the first layer's outputs is what it was, as close as float32 sums are.
    before, after = decoded(source), decoded(out)
    mean = np.concatenate([sample["x"] for sample in samples]).astype(np.float64).mean(0)
    means = [
        mean @ arrays[name].T.astype(np.float64) + arrays["long"]
        for arrays, name in ((before, "first"), (after, "first_palettized"))
    ]
    assert np.abs(means[0] - mean @ after["first_palettized"].T - before["long"]).max() > 0.01
    np.testing.assert_allclose(means[1], means[0], rtol=0, atol=64 * 2.0**-24 * 8)


CODES = np.random.default_rng(0).integers(-120, 120, (64, 64)).astype(np.int8)
ZEROS = {
    "uint8 beyond int8": np.uint8(215),
    "uint8 within int8": np.uint8(3),
    "a fraction": np.float32(0.5),
    "whole": np.float32(-7),
    "a vector beside a scalar": np.arange(-32, 32).astype(np.int8),
    "a vector of float32": (np.arange(64) / 4).astype(np.float32),
}
EXACT = {"uint8 within int8", "whole", "a vector beside a scalar"}


def affine(path: Path, zero_point: Any) -> Path:
    """Save a layer of int8 codes with such a zero point, and a plain one behind it."""

    @mb.program(input_specs=[mb.TensorSpec(shape=(1, 64))], opset_version=TARGETS["iOS16"])
    def prog(x: Any) -> Any:
        made = mb.constexpr_affine_dequantize(
            quantized_data=CODES, zero_point=zero_point, scale=np.float32(0.5), axis=0, name="codes"
        )
        x = mb.linear(x=x, weight=made, name="first")
        return mb.linear(x=x, weight=weight(64, 64, dtype=np.float32), name="second")

    return save(prog, path, "iOS16")


@pytest.mark.parametrize("kind", ZEROS)
def test_codes_of_ios16_go_through_every_command_with_any_zero_point(tmp_path, kind):
    source, dense, small = (tmp_path / f"{name}.mlpackage" for name in ("in", "dense", "small"))
    affine(source, ZEROS[kind])
    zeros = np.asarray(ZEROS[kind], np.float64).reshape(-1, 1)
    expected = 0.5 * (CODES - zeros)  # exact in float32, as all of it are multiples of 1/8
    np.testing.assert_array_equal(decoded(source)["codes"], expected)
    listed = {w.name: w.stored_as for w in milpress.inspect(source).weights}
    assert listed["codes"] == "affine_dequantize int8"
    milpress.decompress(source, dense)
    np.testing.assert_array_equal(decoded(dense)["codes"], expected)
    milpress.verify(source, dense)
    milpress.lint(source)

    # Raised, the op stays what it is; the other weight is compressed.
    milpress.compress(source, small, Recipe.of(PALETTE, name="second_weight_0", target="iOS18"))
    np.testing.assert_array_equal(decoded(small)["codes"], expected)
    assert_coremltools_agrees(small)


@pytest.mark.parametrize("kind", ZEROS)
def test_codes_are_treated_again_where_their_type_holds_the_zero_point(tmp_path, kind):
    source, out = affine(tmp_path / "in.mlpackage", ZEROS[kind]), tmp_path / "out.mlpackage"
    recipe = Recipe(steps=(Step(treatment=f.PruneConfig(sparsity=0.5)),), target="iOS18")
    report = milpress.compress(source, out, recipe)
    (codes,) = (w for w in report.weights if w.name == "codes")
    if kind in EXACT:
        assert codes.status == "compressed"
        before, after = decoded(source)["codes"], decoded(out)["codes_sparsified"]
        np.testing.assert_array_equal(after, np.where(after != 0, before, 0))
    else:
        assert codes.status == "left"
        assert codes.note == "already compressed in a form that milpress can't compress further"
        np.testing.assert_array_equal(decoded(out)["codes"], decoded(source)["codes"])
    assert_coremltools_agrees(out)
    milpress.verify(source, out)


SHAPES = [(8, 16), (4, 8, 3, 3)]


@pytest.mark.parametrize(
    ("shape", "axis"), [(shape, axis) for shape in SHAPES for axis in range(-len(shape), 0)]
)
def test_vectors_along_an_axis_from_the_end_go_through_every_command(tmp_path, shape, axis):
    rng = np.random.default_rng(0)
    rank = len(shape)
    codes = rng.integers(0, 4, shape).astype(types.np_uint2_dtype)
    lut = rng.normal(size=(*[1] * rank, 4, 2)).astype(np.float32)
    wide = tuple(size * 2 if i == axis % rank else size for i, size in enumerate(shape))

    @mb.program(input_specs=[mb.TensorSpec(shape=wide)], opset_version=TARGETS["iOS18"])
    def prog(x: Any) -> Any:
        made = mb.constexpr_lut_to_dense(indices=codes, lut=lut, vector_axis=axis, name="w")
        return mb.add(x=x, y=made)

    source, dense, out = (tmp_path / f"{name}.mlpackage" for name in ("in", "dense", "out"))
    save(prog, source, "iOS18")
    vectors = lut.reshape(4, 2)[codes.astype(int)]
    expected = np.moveaxis(vectors, -1, axis % rank + 1).reshape(wide)
    milpress.decompress(source, dense)
    np.testing.assert_array_equal(decoded(dense)["w"], expected)
    (made,) = interpreter.load(source)(x=np.zeros(wide, np.float32)).values()
    np.testing.assert_array_equal(np.asarray(made), expected)
    milpress.compress(source, out, Recipe.of(f.PruneConfig(sparsity=0.75), min_size=10))
    kept = decoded(out)["w_sparsified"]
    np.testing.assert_array_equal(kept, np.where(kept != 0, expected, 0))
    assert np.count_nonzero(kept) == expected.size // 4
    assert_coremltools_agrees(out)


def assert_channels_lie_where_coremltools_has_them(prog: Any, path: Path) -> None:
    save(prog, path, "iOS18")
    (graph,) = Package(path).graphs
    found = {one.name: one.channel_axes for one in graph.weights}
    consts = {op.name: op for op in prog.functions["main"].operations if op.name in found}
    assert consts
    for name, op in consts.items():
        inputs, output = select_input_output_channel_axis(op)
        if found[name] is not None and len(op.outputs[0].shape) > 1:
            assert found[name] == (output, inputs), name


@pytest.mark.parametrize("kind", ["layers", "every_layer", "lookup"])
def test_channels_of_layers_lie_where_coremltools_has_them(tmp_path, kind):
    prog = PROGRAMS[kind]("iOS18", np.float32)
    assert_channels_lie_where_coremltools_has_them(prog, tmp_path / "in.mlpackage")


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("parameter", ["x", "y"])
def test_channels_of_a_factor_lie_where_coremltools_has_them(tmp_path, parameter, transposed, rank):
    array = weight(*[2] * (rank - 2), 24, 24)

    @mb.program(
        input_specs=[mb.TensorSpec(shape=array.shape, dtype=types.fp16)],
        opset_version=TARGETS["iOS18"],
    )
    def prog(x: Any) -> Any:
        factor = mb.const(val=array, name="w")
        other = "y" if parameter == "x" else "x"
        given = {parameter: factor, other: x, f"transpose_{parameter}": transposed}
        return mb.matmul(**given)

    assert_channels_lie_where_coremltools_has_them(prog, tmp_path / "in.mlpackage")


def with_shared_parts(source: Path, path: Path) -> Path:
    """Save a package of palettes such that those of matrices take their table from one constant."""
    shutil.copytree(source, path)
    package = Package(path)
    (function,) = package.model.mlProgram.functions.values()
    (block,) = function.block_specializations.values()
    palettes = [
        op
        for op in block.operations
        if op.type == "constexpr_lut_to_dense" and op.outputs[0].type.tensorType.rank == 2
    ]
    table = proto.Value()
    table.CopyFrom(palettes[0].inputs["lut"].arguments[0].value)
    for op in palettes:
        op.inputs["lut"].arguments[0].name = "table"
    rest = list(block.operations)
    del block.operations[:]
    block.operations.append(new_const("table", table))
    block.operations.extend(rest)
    package.model_path.write_bytes(package.model.SerializeToString())
    return path


def test_what_several_weights_decode_from_stays_as_long_as_one_does(build, tmp_path):
    small = tmp_path / "small.mlpackage"
    recipe = Recipe.of(f.PalettizeConfig(bits=6), min_size=10)
    milpress.compress(build("layers"), small, recipe)
    source = with_shared_parts(small, tmp_path / "in.mlpackage")
    before = decoded(source)
    names = [name for name, array in before.items() if array.ndim == 2]
    assert len(names) > 3
    for taken in (names[:1], names[-1:], names):
        out = tmp_path / "out.mlpackage"
        rules = {
            "steps": [{"prune": {"sparsity": 0.5}, "select": {"name": f"re:{'|'.join(taken)}"}}]
        }
        report = milpress.compress(source, out, Recipe.from_dict(rules), force=True)
        assert {w.name for w in report.with_status("compressed")} == set(taken)
        assert ("table" in {op[3][0] for op in ops_of(out)}) == (taken != names)
        after = decoded(out)
        for name in before.keys() - set(taken):
            np.testing.assert_array_equal(after[name], before[name])
        assert_coremltools_agrees(out)
    dense = tmp_path / "dense.mlpackage"
    milpress.decompress(source, dense)
    assert "table" not in {op[3][0] for op in ops_of(dense)}
    after = decoded(dense)
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)


def extra(kind: str) -> Any:
    """Return a value that is no tensor of numbers."""
    value = proto.Value()
    if kind == "text":
        return values.string("some text")
    if kind == "truth":
        value.type.tensorType.dataType = 1
        value.immediateValue.tensor.bools.values.append(True)
    elif kind == "list":
        value.type.listType.type.tensorType.dataType = 2
        value.type.listType.length.constant.size = 1
        value.immediateValue.list.values.append(values.string("some text"))
    elif kind == "tuple":  # fields 3 of a type and 2 of a value, which our schema leaves alone
        value.type.MergeFromString(b"\x1a\x00")
        value.immediateValue.MergeFromString(b"\x12\x00")
    elif kind == "dictionary":
        value.type.dictionaryType.SetInParent()
        value.immediateValue.MergeFromString(b"\x22\x00")
    return value


@pytest.mark.parametrize("kind", ["text", "truth", "list", "tuple", "dictionary", "nothing"])
@pytest.mark.parametrize("target", ["iOS16", "iOS18"])
def test_attributes_that_are_no_tensors_are_kept_and_in_nobodys_way(build, tmp_path, kind, target):
    source, small, dense = (tmp_path / f"{name}.mlpackage" for name in ("in", "small", "dense"))
    shutil.copytree(build("casts", target), source)
    model = proto.Model.FromString((source / MODEL).read_bytes())
    (function,) = model.mlProgram.functions.values()
    (block,) = function.block_specializations.values()
    for op in _nested(block):
        if op.type.startswith("const"):
            op.attributes["extra"].CopyFrom(extra(kind))
    unused = block.operations.add(type="const")
    unused.attributes["name"].CopyFrom(values.string("unused"))
    unused.attributes["val"].CopyFrom(extra(kind))
    unused.outputs.add(name="unused").type.CopyFrom(extra(kind).type)
    (source / MODEL).write_bytes(model.SerializeToString())

    before = decoded(source)
    assert before.keys() >= CASTS
    milpress.inspect(source)
    milpress.lint(source)
    milpress.compress(source, small, Recipe.of(PALETTE, name="second_weight_0"))
    milpress.decompress(source, dense)
    milpress.plan(source, target_bits=5.0, use_cache=False, min_size=10)
    coreml.get_weights_metadata(str(source), weight_threshold=10)
    interpreter.load(source)(x=np.zeros((1, 64), np.float32), flag=np.ones(1, np.float32))
    kept = proto.Model.FromString((small / MODEL).read_bytes())
    ops = next(iter(kept.mlProgram.functions["main"].block_specializations.values())).operations
    assert ops[-1].attributes["val"] == extra(kind)
    assert next(op for op in ops if op.type == "constexpr_cast").attributes["extra"] == extra(kind)


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        ("source_val", "halves: source_val: a stored value is not a tensor"),
        ("output", "halves: a tensor must have a data type that MIL knows, got number 99"),
    ],
)
def test_a_parameter_that_is_no_tensor_where_one_must_be_is_named(
    build, tmp_path, parameter, message
):
    source = tmp_path / "in.mlpackage"
    shutil.copytree(build("casts", "iOS16"), source)
    model = proto.Model.FromString((source / MODEL).read_bytes())
    block = model.mlProgram.functions["main"].block_specializations["CoreML6"]
    (op,) = (op for op in block.operations if op.outputs[0].name == "halves")
    if parameter == "output":
        op.outputs[0].type.tensorType.dataType = 99
    else:
        op.attributes[parameter].CopyFrom(extra("list"))
    (source / MODEL).write_bytes(model.SerializeToString())
    with pytest.raises(PackageError, match=message):
        milpress.decompress(source, tmp_path / "out.mlpackage")
