"""Packages damaged at random, and the damages that once brought out errors of others."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mutation import MODEL
from packages import RECIPES, SEEDS, run_case, seeds

import milpress
from milpress.errors import CompressionError, PackageError, UnsupportedError, VerificationError
from milpress.mil import proto, values
from milpress.mil.records import TREATMENTS


@pytest.mark.parametrize("first", range(0, 200, 20))
def test_a_package_damaged_at_random_brings_out_errors_of_ours_only(first, tmp_path):
    corpus = seeds()
    for seed in range(first, first + 20):
        run_case(seed, corpus, tmp_path / "case")


def test_every_seed_is_whole():
    for path in sorted(SEEDS.iterdir()):
        assert milpress.verify(path, path).n_unchanged > 0


def all_ops(block: Any) -> Iterator[Any]:
    for op in block.operations:
        yield op
        for inner in op.blocks:
            yield from all_ops(inner)


class Damaged:
    """The model of a seed, to be changed."""

    def __init__(self, name: str) -> None:
        self._source = SEEDS / f"{name}.mlpackage"
        self.model = proto.Model.FromString((self._source / MODEL).read_bytes())

    @property
    def block(self) -> Any:
        (function,) = self.model.mlProgram.functions.values()
        (block,) = function.block_specializations.values()
        return block

    def op(self, kind: str) -> Any:
        return next(op for op in all_ops(self.block) if op.type == kind)

    def value(self, kind: str, parameter: str) -> Any:
        """The value of an op's parameter, wherever it is kept."""
        op = self.op(kind)
        if parameter in op.attributes:
            return op.attributes[parameter]
        binding = op.inputs[parameter].arguments[0]
        if binding.WhichOneof("choice") == "value":
            return binding.value
        return next(
            maker.attributes["val"]
            for maker in all_ops(self.block)
            if maker.outputs[0].name == binding.name
        )

    def saved(self, folder: Path) -> Path:
        path = folder / "model.mlpackage"
        shutil.copytree(self._source, path)
        (path / MODEL).write_bytes(self.model.SerializeToString(deterministic=True))
        return path


def set_shape(value: Any, *shape: int) -> None:
    dimensions = value.type.tensorType.dimensions
    del dimensions[:]
    for size in shape:
        dimensions.add().constant.size = size


def vector_axis_beyond_the_rank(d: Damaged) -> None:
    vectors = next(op for op in all_ops(d.block) if "vector_axis" in op.inputs)
    vectors.inputs["vector_axis"].arguments[0].value.immediateValue.tensor.ints.values[0] = 7


def channel_axis_beyond_the_rank(d: Damaged) -> None:
    d.value("constexpr_affine_dequantize", "axis").immediateValue.tensor.ints.values[0] = 9


def table_of_one_entry(d: Damaged) -> None:
    lut = d.value("constexpr_lut_to_dense", "lut")
    set_shape(lut, 1)
    lut.immediateValue.tensor.bytes.values = bytes(2)


def table_of_bfloat16(d: Damaged) -> None:
    d.value("constexpr_lut_to_dense", "lut").type.tensorType.dataType = 13


def stored_values_in_two_dimensions(d: Damaged) -> None:
    set_shape(d.value("constexpr_sparse_blockwise_shift_scale", "nonzero_data"), 8, 16)


def fewer_values_than_the_mask_keeps(d: Damaged) -> None:
    nonzeros = d.value("constexpr_sparse_to_dense", "nonzero_data")
    set_shape(nonzeros, 16)
    nonzeros.immediateValue.tensor.bytes.values = bytes(32)


def shape_beyond_all_memory(d: Damaged) -> None:
    shape = d.value("constexpr_sparse_to_dense", "shape")
    shape.type.tensorType.dataType = 24
    shape.immediateValue.tensor.longInts.values.extend([2**31, 2**31])


def negative_shape(d: Damaged) -> None:
    shape = d.value("constexpr_lut_to_dense", "shape")
    shape.type.tensorType.dataType = 23
    shape.immediateValue.tensor.ints.values.extend([-16, -16])


def op_that_decodes_from_itself(d: Damaged) -> None:
    # By its name it uses the op before it, which has the same.
    op = d.op("constexpr_sparse_to_dense")
    op.inputs["nonzero_data"].arguments[0].name = op.outputs[0].name
    again = d.block.operations.add()
    again.CopyFrom(op)


def chain_that_doubles_with_each_op(d: Damaged) -> None:
    ops = d.block.operations
    last = d.op("constexpr_blockwise_shift_scale")
    for i in range(64):
        op = ops.add(type=last.type)
        op.outputs.add(name=f"twice{i}").type.CopyFrom(last.outputs[0].type)
        for parameter in ("data", "scale"):
            op.inputs[parameter].arguments.add().name = last.outputs[0].name
        last = op


def record_of_a_sparsity_in_words(d: Damaged) -> None:
    record = {"steps": [{"prune": {"sparsity": "half"}}], "weights": {"a": "b"}}
    text = json.dumps({"version": 1, "treatments": [record]})
    d.model.description.metadata.userDefined[TREATMENTS] = text


@pytest.mark.parametrize(
    ("name", "damage", "match"),
    [
        ("each-iOS18", vector_axis_beyond_the_rank, "an axis must be from -2 to 1, got 7"),
        ("early-iOS16", channel_axis_beyond_the_rank, "an axis must be from -2 to 1, got 9"),
        ("early-iOS16", table_of_one_entry, "must"),
        ("early-iOS16", table_of_bfloat16, "must make the declared float16, got bfloat16"),
        ("pruned-quantized-iOS18", stored_values_in_two_dimensions, r"keeps, 128, got .*\(8, 16"),
        ("early-iOS16", fewer_values_than_the_mask_keeps, r"keeps, 128, got .*\(16,"),
        ("early-iOS16", shape_beyond_all_memory, "4611686018427387904 codes of 1 bits must be"),
        ("early-iOS16", negative_shape, "a shape must be a vector of sizes"),
        ("pruned-quantized-iOS18", op_that_decodes_from_itself, "that nothing defines"),
        (
            "each-iOS18",
            chain_that_doubles_with_each_op,
            "one weight is decoded by more than 256 ops",
        ),
        ("each-iOS18", record_of_a_sparsity_in_words, "is not a record of version 1.*'half'"),
    ],
)
def test_what_does_not_fit_is_refused(name, damage, match, tmp_path):
    damaged = Damaged(name)
    damage(damaged)
    path = damaged.saved(tmp_path)
    with pytest.raises(PackageError, match=match):
        milpress.decompress(path, tmp_path / "out.mlpackage")
    for recipe in RECIPES:  # which may not need what is damaged
        with contextlib.suppress(CompressionError):
            milpress.compress(path, tmp_path / "out.mlpackage", recipe, dry_run=True)


def test_a_name_is_defined_once(tmp_path):
    damaged = Damaged("each-iOS18")
    damaged.block.operations.add().CopyFrom(damaged.op("constexpr_blockwise_shift_scale"))
    with pytest.raises(PackageError, match=r"a name must be defined once, got .* again"):
        milpress.inspect(damaged.saved(tmp_path))


def test_a_table_of_ios16_must_have_entries_for_whole_bits_to_be_raised(tmp_path):
    damaged = Damaged("early-iOS16")
    table_of_one_entry(damaged)
    path = damaged.saved(tmp_path)
    with pytest.raises(PackageError, match=r"2, 4, 16, 64 or 256 entries, got the shape \(1,\)"):
        milpress.compress(path, tmp_path / "out.mlpackage", RECIPES[3], dry_run=True)


def test_a_parameter_that_is_bound_to_nothing_is_no_obstacle_to_inspecting(tmp_path):
    damaged = Damaged("each-iOS18")
    del damaged.op("constexpr_lut_to_dense").inputs["indices"].arguments[:]
    kinds = [weight.stored_as for weight in milpress.inspect(damaged.saved(tmp_path)).weights]
    assert "lut_to_dense" in kinds


def test_text_where_a_number_of_groups_belongs_counts_as_unknown(tmp_path):
    damaged = Damaged("branches-iOS17")
    damaged.value("conv", "groups").immediateValue.tensor.strings.values.append("two")
    path = damaged.saved(tmp_path)
    report = milpress.compress(path, tmp_path / "out", RECIPES[4], dry_run=True)
    assert any(weight.name.startswith("conv") for weight in report.asked)


def test_the_bounds_of_a_clip_are_known_in_float16_too(tmp_path):
    path = Damaged("branches-iOS15").saved(tmp_path)
    report = milpress.compress(path, tmp_path / "out.mlpackage", RECIPES[5])
    assert "raised from iOS15 to iOS18" in report.notes


@pytest.mark.parametrize("axis", [-5, 5, 2**40])
def test_an_axis_that_data_does_not_have_can_not_be_raised(axis, tmp_path):
    damaged = Damaged("branches-iOS15")
    given = damaged.value("gather", "axis").immediateValue.tensor
    given.longInts.values.append(axis)
    path = damaged.saved(tmp_path)
    with pytest.raises(UnsupportedError, match="an index may be negative on an axis of unknown"):
        milpress.compress(path, tmp_path / "out", RECIPES[3], dry_run=True)


def test_a_message_is_one_printable_line_whatever_a_package_names(tmp_path):
    damaged = Damaged("early-iOS16")
    name = "a\x1b[31m\nb\u202e"
    damaged.op("linear").attributes[name].CopyFrom(values.string("x"))
    with pytest.raises(VerificationError) as caught:
        milpress.verify(SEEDS / "early-iOS16.mlpackage", damaged.saved(tmp_path))
    assert r"a\x1b[31m\nb\u202e" in str(caught.value)
    assert str(caught.value).isprintable()
