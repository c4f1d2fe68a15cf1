"""Laws of stored values, graphs and decoders at their edges, on programs put together by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from milpress.errors import PackageError
from milpress.mil import dtypes, proto, values
from milpress.mil.dtypes import DType
from milpress.mil.graph import Graph, new_const, new_op
from milpress.mil.program import ProgramGraph
from milpress.mil.values import Tensor


class Source:
    """Weight files, of which there are none."""

    retyped: dict[tuple[str, int], DType] = {}  # noqa: RUF012

    def reader(self, file_name: str) -> Any:
        raise AssertionError(file_name)


class Sink:
    """Takes what is stored outside the model."""

    def __init__(self) -> None:
        self.n_written = 0

    def write(self, file_name: str, dtype: int, data: np.ndarray, padding_bits: int) -> int:
        self.n_written += 1
        return 64


def stored(array: Any, dtype: str | None = None) -> Any:
    """Return a value that is held in the model itself."""
    array = np.asarray(array)
    value = proto.Value()
    kind = dtypes.of_array(array) if dtype is None else dtypes.by_name(dtype)
    values.write(value, Tensor(kind, array), file_name=None, sink=Sink())
    return value


def const(name: str, array: Any, dtype: str | None = None) -> Any:
    return new_const(name, stored(array, dtype))


def op(kind: str, name: str, dtype: str, shape: tuple[int, ...], **inputs: Any) -> Any:
    """Return an op with inputs by name, or stored ones."""
    made = new_op(kind, name)
    values.set_type(made.outputs[0].type, dtypes.by_name(dtype), shape)
    for parameter, given in inputs.items():
        binding = made.inputs[parameter].arguments.add()
        if isinstance(given, str):
            binding.name = given
        else:
            binding.value.CopyFrom(given)
    return made


def graph_of(*ops: Any, outputs: tuple[str, ...] = ()) -> ProgramGraph:
    function = proto.Model().mlProgram.functions["main"]
    item = function.inputs.add(name="x")
    values.set_type(item.type, dtypes.by_name("float32"), (4, 4))
    block = function.block_specializations["CoreML8"]
    block.operations.extend(ops)
    block.outputs.extend(outputs)
    return ProgramGraph(function, block, Source())


def decoded(*ops: Any) -> np.ndarray:
    graph = graph_of(*ops)
    return graph.decoder.dense(graph.nodes[-1]).values


# Values


@pytest.mark.parametrize(("n", "is_blob"), [(9, False), (10, True)])
def test_ten_elements_go_to_the_weight_file(n, is_blob):
    value, sink = proto.Value(), Sink()
    tensor = Tensor(dtypes.by_name("float32"), np.arange(n, dtype=np.float32))
    values.write(value, tensor, file_name="@model_path/w", sink=sink)
    assert values.is_blob(value) == is_blob == bool(sink.n_written)


@pytest.mark.parametrize("dtype", ["int32", "float16"])
@pytest.mark.parametrize("n", [3, 5])
def test_an_immediate_value_has_as_many_elements_as_its_type(dtype, n):
    value = stored(np.arange(n), dtype) if dtype == "int32" else stored(np.zeros(n, np.float16))
    values.set_type(value.type, dtypes.by_name(dtype), (4,))
    with pytest.raises(PackageError, match=r"an immediate .* must have (4 elements|8 bytes), got"):
        values.read(value, Source())


# Graphs


def test_a_name_that_was_given_is_taken():
    graph = graph_of(const("w", np.zeros(4, np.float32)))
    assert [graph.unique_name(name) for name in ("w", "w", "v", "v")] == ["w_0", "w_1", "v", "v_0"]


@pytest.mark.parametrize("n", [256, 257])
def test_a_weight_is_decoded_by_256_ops_at_most(n):
    ops = [const(f"w{i}", np.zeros(4, np.float32)) for i in range(n)]
    last = new_op("constexpr_many", "last")
    for i in range(n):
        last.inputs["values"].arguments.add().name = f"w{i}"
    if n == 256:
        assert graph_of(*ops, last).nodes[-1].n_parts == n
    else:
        with pytest.raises(PackageError, match="one weight is decoded by more than 256 ops"):
            graph_of(*ops, last)


def test_changes_of_a_block_and_of_the_one_around_it_are_both_made():
    outer, inner = const("outer", np.zeros(4, np.float32)), const("inner", np.ones(4, np.float32))
    condition = new_op("cond", "cond")
    condition.blocks.add().operations.add().CopyFrom(inner)
    function = proto.Model().mlProgram.functions["main"]
    block = function.block_specializations["CoreML8"]
    block.operations.extend([outer, condition])
    graph = Graph(function, block)
    by_name = {node.name: node for node in graph.nodes}
    for name in ("outer", "inner"):
        graph.insert_before(by_name[name], [const(f"before_{name}", np.zeros(1, np.float32))])
    graph.apply()
    assert [each.outputs[0].name for each in block.operations] == ["before_outer", "outer", "cond"]
    inside = block.operations[2].blocks[0].operations
    assert [each.outputs[0].name for each in inside] == ["before_inner", "inner"]


@pytest.mark.parametrize("kind", ["const", "relu"])
def test_a_stored_value_in_a_block_hides_none_around_it(kind):
    condition = new_op("cond", "cond")
    condition.blocks.add().operations.add().CopyFrom(const("w", np.ones(4, np.float32)))
    outer = const("w", np.zeros(4, np.float32))
    if kind == "relu":
        outer = op("relu", "w", "float32", (4, 4), x="x")
    with pytest.raises(PackageError, match="a name must be defined once, got 'w' again"):
        graph_of(outer, condition)


# Weights

TRUE = np.array(True)


@pytest.mark.parametrize(
    ("kind", "parameter", "settings", "axes"),
    [
        ("linear", "weight", {}, (0, 1)),
        ("conv", "weight", {}, (0, 1)),
        ("conv_transpose", "weight", {}, (1, 0)),
        ("matmul", "y", {}, (1, 0)),
        ("matmul", "y", {"transpose_y": TRUE}, (0, 1)),
        ("matmul", "x", {}, (0, 1)),
        ("matmul", "x", {"transpose_x": TRUE}, (1, 0)),
        ("matmul", "y", {"transpose_x": TRUE}, (1, 0)),
    ],
)
def test_channels_lie_where_the_op_has_them(kind, parameter, settings, axes):
    other = {"weight": "x", "y": "x", "x": "y"}[parameter]
    stored_settings = {name: stored(value) for name, value in settings.items()}
    layer = op(kind, "y", "float32", (4, 4), **{parameter: "w", other: "x"}, **stored_settings)
    graph = graph_of(const("w", np.zeros((4, 4), np.float32)), layer)
    (weight,) = graph.weights
    assert weight.channel_axes == axes


@pytest.mark.parametrize(("n", "is_weight"), [(9, False), (10, True)])
def test_ten_elements_are_a_weight(n, is_weight):
    graph = graph_of(const("w", np.zeros(n, np.float32)), outputs=("w",))
    assert bool(graph.weights) == is_weight


# Decoding

CODES = np.arange(16, dtype=np.uint8).reshape(4, 4)


def quantized(scale: Any, offset: Any = None, dtype: str = "uint8", codes: Any = CODES) -> Any:
    given = {} if offset is None else {"offset": stored(offset, dtype)}
    return op(
        "constexpr_blockwise_shift_scale",
        "w",
        "float32",
        (4, 4),
        data=stored(codes, dtype),
        scale=stored(np.float32(scale)),
        **given,
    )


@pytest.mark.parametrize("dtype", ["uint8", "uint4", "uint2"])
def test_a_code_stands_for_its_scale_times_what_it_is_above_its_offset(dtype):
    codes = CODES % 4 if dtype == "uint2" else CODES
    scale, offset = np.float32([[1], [2], [3], [4]]), np.uint8([[0], [1], [2], [3]])
    expected = scale * (codes.astype(np.float32) - offset)
    found = decoded(quantized(scale, offset, dtype, codes))
    np.testing.assert_array_equal(found, expected)


def palette(lut: np.ndarray, codes: np.ndarray = CODES % 4) -> Any:
    indices = stored(codes.astype(np.uint8), "uint2")
    return op("constexpr_lut_to_dense", "w", "float32", (4, 4), indices=indices, lut=stored(lut))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (quantized(np.ones((3, 1))), r"blocks must divide the shape \(4, 4\), got \(3, 1\)"),
        (quantized(np.ones((0, 1))), r"blocks must divide the shape \(4, 4\), got \(0, 1\)"),
        (quantized(np.ones(4)), r"blocks must divide the shape \(4, 4\), got \(4,\)"),
        (
            quantized(np.ones((4, 1)), np.zeros((1, 1), np.uint8)),
            r"offset must have the shape of scale, \(4, 1\)",
        ),
        (palette(np.zeros((1, 1, 8, 1), np.float32)), "lut must have 4 dimensions and"),
        (palette(np.zeros((1, 4, 1), np.float32)), "lut must have 4 dimensions and"),
        (palette(np.zeros((3, 1, 4, 1), np.float32)), "blocks must divide the shape"),
        (quantized(np.ones((2, 1)), codes=CODES[:2]), r"must make the declared shape \(4, 4\)"),
    ],
)
def test_parameters_that_do_not_fit_each_other_are_refused(made, message):
    with pytest.raises(PackageError, match=message):
        decoded(made)


@pytest.mark.parametrize("n", [7, 9])
def test_a_sparse_weight_has_as_many_values_as_its_mask_keeps(n):
    mask = (CODES % 2).astype(np.uint8)
    made = op(
        "constexpr_sparse_to_dense",
        "w",
        "float32",
        (4, 4),
        mask=stored(mask, "uint1"),
        nonzero_data=stored(np.arange(n, dtype=np.float32)),
    )
    with pytest.raises(PackageError, match=rf"as many values as the mask keeps, 8, got .*\({n},\)"):
        decoded(made)
