"""Compressed weights in a graph: writing their ``constexpr_*`` ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from milpress.formats import (
    Compressed,
    PalettizeConfig,
    PruneConfig,
    QuantizeConfig,
    Sparse,
    Treatment,
)
from milpress.mil import proto, values
from milpress.mil.chains import stages
from milpress.mil.graph import Node, new_const
from milpress.mil.values import Tensor, WeightSink

Namer: TypeAlias = Callable[[str], str]
_SUFFIXES = {PalettizeConfig: "palettized", QuantizeConfig: "quantized", PruneConfig: "sparsified"}


def emit(
    value: Compressed,
    node: Node,
    *,
    names: Namer,
    name: str,
    early: bool,
    file_name: str | None,
    sink: WeightSink,
) -> list[proto.Operation]:
    """Turn an op into the last ``constexpr_*`` op of a compressed value, in place.

    Returns the ops that have to stand before it, if the value takes a chain of them. Below CoreML8
    (``early``) the parameters are attributes, from there on inputs.
    """
    made: dict[str, proto.Operation] = {}
    written: dict[int, proto.Value] = {}
    *inner, last = stages(value, early=early)
    for stage in (*inner, last):
        stage_name = name if stage is last else names(f"{name}_{stage.role}")
        op = proto.Operation(type=stage.kind)
        op.attributes["name"].CopyFrom(values.string(stage_name))
        for parameter, given in stage.parameters.items():
            if not isinstance(given, Tensor):
                role, output = given
                source = made[role].outputs[output.index].name
                op.inputs[parameter].arguments.add().name = source
                continue
            stored = (
                op.attributes[parameter] if early else op.inputs[parameter].arguments.add().value
            )
            if id(given) in written:
                stored.CopyFrom(written[id(given)])
            else:
                values.write(stored, given, file_name=file_name, early=early, sink=sink)
                written[id(given)] = stored
        for output in stage.outputs:
            ending = f"_{output.index}" if len(stage.outputs) > 1 else ""
            item = op.outputs.add(name=f"{stage_name}{ending}")
            values.set_type(item.type, output.dtype, output.shape)
        made[stage.role] = op
    made[last.role].outputs.add(name=name).type.CopyFrom(node.op.outputs[0].type)
    node.op.CopyFrom(made[last.role])
    return [made[stage.role] for stage in inner]


def const_of(
    tensor: Tensor, name: str, *, file_name: str | None, sink: WeightSink
) -> proto.Operation:
    """Return the ``const`` op of a tensor."""
    value = proto.Value()
    values.write(value, tensor, file_name=file_name, early=False, sink=sink)
    return new_const(name, value)


def payload_bytes(value: Compressed, *, early: bool) -> int:
    """Return how many bytes `emit` stores for a value."""
    stored = {
        id(given): given
        for stage in stages(value, early=early)
        for given in stage.parameters.values()
        if isinstance(given, Tensor)
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
