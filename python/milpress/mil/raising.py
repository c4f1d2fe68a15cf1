"""Programs raised to a later opset, in place, where that is exact."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from milpress.errors import PackageError, UnsupportedError
from milpress.mil import dtypes, opset, proto, values
from milpress.mil.graph import Graph, Node, new_const, new_op
from milpress.mil.opset import Opset, by_name
from milpress.mil.package import Package

# Ops of coremltools 9.0 that keep their meaning from iOS15 to iOS26, or gain optional inputs only,
# by the names that files have: write_state and read_state are its coreml_update_state.
_SAFE = frozenset(
    """
    abs acos add affine argsort asin atan atanh avg_pool band_part batch_norm batch_to_space cast
    ceil clamped_relu classify concat cond const constexpr_affine_dequantize conv conv_quantized
    conv_transpose cos cosh crop cumsum depth_to_space dequantize einsum elu equal erf exp exp2
    expand_dims fill fill_like flatten2d floor floor_div gelu greater greater_equal gru identity
    instance_norm inverse l2_norm l2_pool layer_norm leaky_relu less less_equal linear
    linear_activation list_gather list_length list_read list_scatter list_write
    local_response_norm log logical_and logical_not logical_or logical_xor lstm make_list matmul
    max_pool maximum minimum mod mul non_zero not_equal one_hot pad pixel_shuffle pixel_unshuffle
    pow prelu quantize random_bernoulli random_categorical random_normal random_uniform range_1d
    real_div reduce_argmax reduce_argmin reduce_l1_norm reduce_l2_norm reduce_log_sum
    reduce_log_sum_exp reduce_max reduce_mean reduce_min reduce_prod reduce_sum reduce_sum_square
    relu relu6 resample reshape reshape_like resize resize_bilinear resize_nearest_neighbor reverse
    reverse_sequence rnn round rsqrt scaled_tanh select shape sigmoid sigmoid_hard sign silu sin
    sinh slice_by_index slice_by_size sliding_windows softmax softplus softplus_parametric softsign
    space_to_batch space_to_depth split sqrt square squeeze stack sub tan tanh threshold
    thresholded_relu tile topk transpose upsample_bilinear upsample_nearest_neighbor while_loop
    constexpr_blockwise_shift_scale constexpr_lut_to_sparse
    constexpr_sparse_blockwise_shift_scale read_state scaled_dot_product_attention slice_update
    write_state
    """.split()
)
# Up to iOS16 a negative index counted from the end; from iOS17 it is out of bounds.
_INDEXED = {
    "gather": ("x", "indices"),
    "gather_along_axis": ("x", "indices"),
    "gather_nd": ("x", "indices"),
    "scatter": ("data", "indices"),
    "scatter_along_axis": ("data", "indices"),
    "scatter_nd": ("data", "indices"),
}
# op -> first opset in which it means something else, and what.
_CHANGED = {
    "crop_resize": (7, "its regions are given in another form"),
    "non_maximum_suppression": (7, "its score threshold is gone"),
}
# Shape of a table of iOS16 -> bits of an index.
_EARLY_TABLES: dict[tuple[int | None, ...], int] = {(2**bits,): bits for bits in (1, 2, 4, 6, 8)}
_REWRITTEN = ("constexpr_lut_to_dense", "constexpr_sparse_to_dense", "constexpr_cast")


def raise_to(model: proto.Model, function: proto.Function, target: Opset, package: Package) -> None:
    """Raise one function of a model to a later opset, in place; an earlier one changes nothing.

    Ops whose meaning changed are rewritten where that is exact: negative indices become
    explicit, iOS16's compressed weights take their iOS18 form.

    Raises
    ------
    UnsupportedError
        If an op would mean something else and can't be rewritten; it is named.
    """
    current = by_name(function.opset)
    if target <= current:
        return
    if len(function.block_specializations) != 1:
        msg = (
            f"a function with {len(function.block_specializations)} block specializations can't "
            "be raised to another opset, only one with a single block"
        )
        raise UnsupportedError(msg)
    (block,) = function.block_specializations.values()
    graph = Graph(function, block)
    for node in graph.nodes:
        _raise_op(node, graph, current, target, package)
    graph.apply()
    raised = function.block_specializations[target.name]
    raised.CopyFrom(function.block_specializations[current.name])
    del function.block_specializations[current.name]
    function.opset = target.name
    package.forget_graphs()
    model.specificationVersion = max(model.specificationVersion, target.specification)


def _crosses(current: Opset, target: Opset, version: int) -> bool:
    return current.version < version <= target.version


def _raise_op(node: Node, graph: Graph, current: Opset, target: Opset, package: Package) -> None:
    kind = node.op.type
    if kind in _CHANGED:
        if _crosses(current, target, _CHANGED[kind][0]):
            _refuse(node, current, target, _CHANGED[kind][1])
    elif kind == "clip":
        if _crosses(current, target, 7):
            _check_clip(node, graph, current, target)
    elif kind in _INDEXED:
        if _crosses(current, target, 7):
            _guard_indices(node, graph, current, target, package)
    elif kind in _REWRITTEN:
        if _crosses(current, target, 8):
            _modernize(node.op, package)
    elif kind not in _SAFE:
        _refuse(node, current, target, "milpress does not know the op")


def _refuse(node: Node, current: Opset, target: Opset, reason: str) -> NoReturn:
    msg = (
        f"{node.name}: {node.op.type} can't be raised from {current.target} to {target.target}: "
        f"{reason}; convert the model again with that target"
    )
    raise UnsupportedError(msg)


def _check_clip(node: Node, graph: Graph, current: Opset, target: Opset) -> None:
    low, high = (graph.scalar(node, parameter) for parameter in ("alpha", "beta"))
    if low is None or high is None or not low < high:
        _refuse(node, current, target, "alpha must be known and below beta")


def _guard_indices(
    node: Node, graph: Graph, current: Opset, target: Opset, package: Package
) -> None:
    data_name, index_name = _INDEXED[node.op.type]
    index_type = graph.value_type(node, index_name)
    if index_type is None:
        _refuse(node, current, target, f"it has no {index_name}")
    stored = graph.constant(node, index_name)
    if stored is not None:
        if (values.read(stored, package).values < 0).any():
            _refuse(node, current, target, "it has negative indices")
        return
    sizes = _indexed_sizes(node, data_name, graph)
    if sizes is None:
        _refuse(node, current, target, "an index may be negative on an axis of unknown size")
    graph.insert_before(node, _nonnegative(node, index_name, index_type, sizes, graph))


def _indexed_sizes(node: Node, data_name: str, graph: Graph) -> NDArray[np.int32] | None:
    """Return the sizes that indices refer to, as an array that broadcasts against them."""
    data_type = _tensor_type(graph.value_type(node, data_name))
    if data_type is None:
        return None
    if node.op.type.endswith("_nd"):
        index_type = _tensor_type(graph.value_type(node, "indices"))
        depth = index_type.shape[-1] if index_type is not None and index_type.shape else None
        start = _scalar(graph, node, "batch_dims")
        if depth is None or start is None:
            return None
        sizes = data_type.shape[start : start + depth] if start >= 0 else ()
        is_known = len(sizes) == depth and all(_is_int32(size) for size in sizes)
        return np.array(sizes, np.int32) if is_known else None
    axis = _scalar(graph, node, "axis")
    rank = len(data_type.shape)
    size = data_type.shape[axis] if axis is not None and -rank <= axis < rank else None
    return np.array(size, np.int32) if _is_int32(size) else None


def _is_int32(size: int | None) -> bool:
    return size is not None and size < 2**31


def _tensor_type(value_type: proto.ValueType | None) -> values.TensorType | None:
    return None if value_type is None else values.type_of(value_type)


def _scalar(graph: Graph, node: Node, parameter: str) -> int | None:
    """Return a parameter that is 0 by default, ``None`` if it is not known."""
    if parameter not in node.op.inputs:
        return 0
    number = graph.scalar(node, parameter)
    return number if isinstance(number, int) else None


def _nonnegative(
    node: Node,
    index_name: str,
    index_type: proto.ValueType,
    sizes: NDArray[np.int32],
    graph: Graph,
) -> Iterator[proto.Operation]:
    """Yield ops that add the size to negative indices, and make ``op`` use their result."""
    binding = node.op.inputs[index_name].arguments[0]
    base = graph.unique_name(f"{node.name}_{index_name}_nonnegative")
    names = {
        part: graph.unique_name(f"{base}_{part}")
        for part in ("zero", "size", "is_valid", "wrapped")
    }

    def combine(kind: str, name: str, dtype: int, **inputs: str) -> proto.Operation:
        op = new_op(kind, name, **inputs)
        op.outputs[0].type.CopyFrom(index_type)
        op.outputs[0].type.tensorType.dataType = dtype
        return op

    boolean, int32 = 1, 23
    indices = binding.name
    yield new_const(names["zero"], values.immediate(np.int32(0)))
    yield new_const(names["size"], values.immediate(sizes))
    yield combine("greater_equal", names["is_valid"], boolean, x=indices, y=names["zero"])
    yield combine("add", names["wrapped"], int32, x=indices, y=names["size"])
    yield combine("select", base, int32, cond=names["is_valid"], a=indices, b=names["wrapped"])
    binding.name = base


def _modernize(op: proto.Operation, package: Package) -> None:
    """Give an iOS16 compression op its iOS18 form: the bits stay, only their type is said anew."""
    shape = values.stored_type(op.outputs[0]).fixed_shape
    if op.type == "constexpr_lut_to_dense":
        lut = op.attributes["lut"]
        dtype, entries = values.stored_type(lut)
        if entries not in _EARLY_TABLES:
            msg = f"a table of iOS16 must have 2, 4, 16, 64 or 256 entries, got the shape {entries}"
            raise PackageError(msg)
        bits = _EARLY_TABLES[entries]
        _retype(op.attributes["indices"], f"uint{bits}", shape, package)
        values.set_type(lut.type, dtype, (1,) * len(shape) + (2**bits, 1))
    elif op.type == "constexpr_sparse_to_dense":
        _retype(op.attributes["mask"], "uint1", shape, package)
    for parameter in sorted(set(op.attributes) - {"name", "shape"}):
        op.inputs[parameter].arguments.add().value.CopyFrom(op.attributes[parameter])
        del op.attributes[parameter]
    if "shape" in op.attributes:
        del op.attributes["shape"]


def _retype(value: proto.Value, dtype_name: str, shape: tuple[int, ...], package: Package) -> None:
    if values.is_blob(value):
        where = value.blobFileValue
        package.retyped[where.fileName, where.offset] = values.stored_type(value).dtype
    values.set_type(value.type, dtypes.by_name(dtype_name), shape)


def raise_opsets(package: Package, target: str | None) -> list[str]:
    """Raise programs to the target, and iOS15 to the first that can be compressed."""
    asked = None if target is None else opset.by_target(target)
    notes: dict[str, None] = {}
    for program in package.programs:
        for function in program.functions.values():
            current = opset.by_name(function.opset)
            goal = max(asked or current, opset.FIRST_WITH_COMPRESSION)
            if goal > current:
                raise_to(program.model, function, goal, package)
                notes[f"raised from {current.target} to {goal.target}"] = None
        package.model.specificationVersion = max(
            package.model.specificationVersion, program.model.specificationVersion
        )
    return list(notes)
