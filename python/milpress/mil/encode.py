"""Compressed weights as ``constexpr_*`` ops: which ops a value takes, and writing them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

import milpress._core as _core
from milpress.formats import (
    Compressed,
    Masked,
    Palette,
    PalettizeConfig,
    PruneConfig,
    QuantizeConfig,
    Quantized,
    Sparse,
    Treatment,
)
from milpress.mil import dtypes, proto, values
from milpress.mil.dtypes import DType
from milpress.mil.graph import Node
from milpress.mil.opset import Opset
from milpress.mil.values import Tensor, WeightSink

Namer: TypeAlias = Callable[[str], str]
_SUFFIXES = {PalettizeConfig: "palettized", QuantizeConfig: "quantized", PruneConfig: "sparsified"}


@dataclass(frozen=True, slots=True)
class Output:
    """What an op makes for the next one: its place among the op's outputs, and its type."""

    index: int
    dtype: DType
    shape: tuple[int, ...]


# The role of an op, and one of its outputs.
Reference: TypeAlias = tuple[str, Output]


@dataclass(frozen=True, slots=True)
class ConstexprOp:
    """An op of a chain: its parameters are stored, or outputs of the op of that role."""

    kind: str
    role: str
    parameters: dict[str, Tensor | Reference]
    outputs: tuple[Output, ...] = ()


def emit(
    value: Compressed,
    node: Node,
    *,
    names: Namer,
    name: str,
    opset: Opset,
    file_name: str | None,
    sink: WeightSink,
) -> list[proto.Operation]:
    """Turn an op into the last ``constexpr_*`` op of a compressed value, in place.

    Returns the ops that have to stand before it, if the value takes a chain of them. In an
    opset without blocks the parameters are attributes, from there on inputs.
    """
    ops: dict[str, proto.Operation] = {}
    written: dict[int, proto.Value] = {}
    *inner, last = constexpr_ops(value, opset)
    for each in (*inner, last):
        op_name = name if each is last else names(f"{name}_{each.role}")
        op = proto.Operation(type=each.kind)
        op.attributes["name"].CopyFrom(values.string(op_name))
        for parameter, operand in each.parameters.items():
            if not isinstance(operand, Tensor):
                role, output = operand
                source = ops[role].outputs[output.index].name
                op.inputs[parameter].arguments.add().name = source
                continue
            stored = (
                op.inputs[parameter].arguments.add().value
                if opset.has_blocks
                else op.attributes[parameter]
            )
            if id(operand) in written:
                stored.CopyFrom(written[id(operand)])
            else:
                values.write(stored, operand, file_name=file_name, opset=opset, sink=sink)
                written[id(operand)] = stored
        for output in each.outputs:
            ending = f"_{output.index}" if len(each.outputs) > 1 else ""
            item = op.outputs.add(name=f"{op_name}{ending}")
            values.set_type(item.type, output.dtype, output.shape)
        ops[each.role] = op
    ops[last.role].outputs.add(name=name).type.CopyFrom(node.op.outputs[0].type)
    node.op.CopyFrom(ops[last.role])
    return [ops[each.role] for each in inner]


def payload_bytes(value: Compressed, opset: Opset) -> int:
    """Return how many bytes `emit` stores for a value."""
    stored = {
        id(operand): operand
        for each in constexpr_ops(value, opset)
        for operand in each.parameters.values()
        if isinstance(operand, Tensor)
    }
    return sum(dtype.n_bytes(array.size) for dtype, array in stored.values())


def suffixed(name: str, before: Compressed | None, treatment: Treatment) -> str:
    """Return the name that coremltools gives what a treatment makes of a weight.

    ``before`` is what the weight was made of, ``None`` if it was dense: codes and tables of a
    compressed weight change under its name, only pruning renames it again.
    """
    if before is None or (isinstance(treatment, PruneConfig) and not isinstance(before, Sparse)):
        return f"{name}_{_SUFFIXES[type(treatment)]}"
    return name


def constexpr_ops(value: Compressed, opset: Opset) -> list[ConstexprOp]:
    """Return the ops that decode a value, those that others build on first."""
    if isinstance(value, Masked):
        return _masked_ops(value)
    if not opset.has_blocks:
        return [_ios16_op(value)]
    if isinstance(value, Quantized):
        return [ConstexprOp("constexpr_blockwise_shift_scale", "", _quantized_parameters(value))]
    if isinstance(value, Palette):
        before, lut = _lut(value)
        parameters = {"indices": _codes(value, value.codes), "lut": lut, **_vector_axis(value)}
        return [*before, ConstexprOp("constexpr_lut_to_dense", "", parameters)]
    mask = Tensor(dtypes.by_name("uint1"), value.mask().view(np.uint8))
    parameters = {"mask": mask, "nonzero_data": values.of_array(value.nonzeros)}
    return [ConstexprOp("constexpr_sparse_to_dense", "", parameters)]


def _masked_ops(value: Masked) -> list[ConstexprOp]:
    inner = value.value
    uint1 = dtypes.by_name("uint1")
    mask = Tensor(uint1, value.code_mask().view(np.uint8))
    codes = _codes(inner, value.nonzero_codes())
    scale = inner.scale if isinstance(inner, Quantized) else inner.entries
    size = inner.vector_size if isinstance(inner, Palette) else 1
    out_mask = Output(0, uint1, inner.shape)
    nonzeros = Output(1, dtypes.of_array(scale), (codes.values.size * size,))
    before: list[ConstexprOp] = []
    weight_mask: Tensor | Reference = mask
    if isinstance(inner, Palette):
        kind, role = "constexpr_lut_to_sparse", "nonzero_data_0_palettized"
        before, lut = _lut(inner, f"{role}_")
        parameters = {
            "indices_mask": mask,
            "indices_nonzero_data": codes,
            "lut": lut,
            **_vector_axis(inner),
        }
        weight_mask = (role, out_mask)
    else:
        kind, role = "constexpr_sparse_blockwise_shift_scale", "nonzero_data_0_quantized"
        quantized = _quantized_parameters(inner)
        del quantized["data"]
        parameters = {"data_mask": mask, "nonzero_data": codes, **quantized}
    op = ConstexprOp(kind, role, parameters, (out_mask, nonzeros))
    last = {"mask": weight_mask, "nonzero_data": (role, nonzeros)}
    return [*before, op, ConstexprOp("constexpr_sparse_to_dense", "", last)]


def _codes(value: Palette | Quantized, codes: NDArray[Any]) -> Tensor:
    name = f"uint{value.bits}" if isinstance(value, Palette) else value.dtype
    return Tensor(dtypes.by_name(name), codes)


def _lut(value: Palette, prefix: str = "") -> tuple[list[ConstexprOp], Tensor | Reference]:
    """Return the op that decodes a quantized table, if it is one, and the parameter."""
    lut = value.lut
    if not isinstance(lut, Quantized):
        return [], values.of_array(lut)
    role = f"{prefix}lut_0_quantized"
    output = Output(0, dtypes.of_array(lut.scale), lut.shape)
    parameters = _quantized_parameters(lut)
    op = ConstexprOp("constexpr_blockwise_shift_scale", role, parameters, (output,))
    return [op], (role, output)


def _vector_axis(value: Palette) -> dict[str, Tensor | Reference]:
    if value.vector_axis is None:
        return {}
    return {"vector_axis": values.of_array(np.int32(value.vector_axis))}


def _quantized_parameters(value: Quantized) -> dict[str, Tensor | Reference]:
    parameters: dict[str, Tensor | Reference] = {
        "data": _codes(value, value.codes),
        "scale": values.of_array(value.scale),
    }
    if value.offset is not None:
        parameters["offset"] = _codes(value, value.offset)
    return parameters


def _ios16_op(value: Palette | Quantized | Sparse) -> ConstexprOp:
    parameters: dict[str, Tensor | Reference]
    if isinstance(value, Quantized):
        axes = [axis for axis, n in enumerate(value.scale.shape) if n > 1]
        zero_point = np.zeros(value.scale.shape, value.codes.dtype)
        if value.offset is not None:
            zero_point = value.offset
        parameters = {
            "axis": values.of_array(np.int32(axes[0] if axes else 0)),
            "quantized_data": values.of_array(value.codes),
            "scale": values.of_array(value.scale.squeeze()),
            "zero_point": values.of_array(zero_point.squeeze()),
        }
        return ConstexprOp("constexpr_affine_dequantize", "", parameters)
    shape = values.of_array(np.array(value.shape, np.uint32))
    if isinstance(value, Palette):
        # iOS16 has no indices of 3 bits.
        bits = 4 if value.bits == 3 else value.bits
        lut = value.entries.reshape(-1)
        lut = np.pad(lut, (0, 2**bits - lut.size), "edge")
        codes = values.of_array(_core.pack(value.codes.reshape(-1), bits))
        parameters = {"indices": codes, "lut": values.of_array(lut), "shape": shape}
        return ConstexprOp("constexpr_lut_to_dense", "", parameters)
    parameters = {
        "mask": values.of_array(value.bitmask),
        "nonzero_data": values.of_array(value.nonzeros),
        "shape": shape,
    }
    return ConstexprOp("constexpr_sparse_to_dense", "", parameters)
