"""What of a weight decides where it can run: how it is stored, and what uses it."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

from milpress.formats import (
    Blocks,
    PalettizeConfig,
    PerBlock,
    PerTensor,
    PruneConfig,
    QuantizeConfig,
    Treatment,
)
from milpress.mil import values
from milpress.mil.graph import Graph, Node
from milpress.mil.program import Weight
from milpress.mil.values import TensorType

_SPARSE = "constexpr_sparse_to_dense"
_SHIFT_SCALES = ("constexpr_blockwise_shift_scale", "constexpr_sparse_blockwise_shift_scale")
_LUTS = ("constexpr_lut_to_dense", "constexpr_lut_to_sparse")


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """Traits of a weight that facts speak of. ``None`` where one has no meaning.

    Parameters
    ----------
    dtype
        Type of its elements as ops see it.
    used_by
        Kinds of the ops that use it.
    activations
        ``int8`` if an op that uses it takes quantized activations too, else the type of floats.
    stateful
        Whether its function keeps states.
    form
        ``dense``, ``palette``, ``quantized``, ``sparse``, ``sparse palette`` or
        ``sparse quantized``.
    decoded_by
        Kinds of the ``constexpr_*`` ops that decode it, last first.
    bits
        Width of a code.
    codes
        Type of a code.
    granularity
        ``per_tensor``, ``per_channel``, ``per_group`` of output channels, or ``per_block``.
    channels_per_table
        Output channels that share a table.
    table
        Type of the entries of its tables as stored.
    vector_size
        Weights that one index stands for.
    values_per_table
        Numbers in a table: its entries, each of so many weights as a vector has.
    scaled_floats
        Whether a ``constexpr`` op multiplies floats by a scale.
    """

    dtype: str
    used_by: tuple[str, ...] = ()
    activations: str = "float"
    stateful: bool = False
    form: str = "dense"
    decoded_by: tuple[str, ...] = ()
    bits: int | None = None
    codes: str | None = None
    granularity: str | None = None
    channels_per_table: int | None = None
    table: str | None = None
    vector_size: int | None = None
    values_per_table: int | None = None
    scaled_floats: bool = False


NAMES = tuple(field.name for field in fields(Traits))


def is_stateful(graph: Graph) -> bool:
    """Whether a function keeps states between predictions."""
    return any(node.op.type in ("read_state", "write_state") for node in graph.nodes)


def traits_of(weight: Weight, *, stateful: bool = False) -> Traits:
    """Return the traits of a weight as it is stored."""
    base = _base(weight, weight.decoded_by, stateful)
    if not weight.is_compressed:
        return base
    node, graph = weight.node, weight.graph
    sparse = ""
    if node.op.type == _SPARSE:
        inner = graph.producer(node, "nonzero_data")
        if inner is None or not inner[0].is_stored or inner[0].op.type == "const":
            return replace(base, form="sparse")
        node, sparse = inner[0], "sparse "
    if node.op.type in _LUTS:
        return replace(base, form=f"{sparse}palette", **_of_palette(node, weight))
    if node.op.type == "constexpr_affine_dequantize":
        return replace(base, form="quantized", **_of_affine(node, graph))
    if node.op.type in _SHIFT_SCALES:
        return _of_shift_scale(base, node, weight, sparse)
    return base


def traits_after(weight: Weight, treatment: Treatment, *, stateful: bool = False) -> Traits:
    """Return the traits that a dense weight will have once it is palettized or quantized."""
    if isinstance(treatment, PalettizeConfig):
        return replace(
            _base(weight, ("constexpr_lut_to_dense",), stateful),
            form="palette",
            bits=treatment.bits,
            codes=f"uint{treatment.bits}",
            table=weight.dtype.name,
            vector_size=treatment.vector_size,
            values_per_table=2 ** (treatment.bits or 8) * treatment.vector_size,
            **_table_grid(weight, treatment),
        )
    if isinstance(treatment, PruneConfig):
        return replace(_base(weight, (), stateful), form="sparse")
    has_blocks = weight.graph.opset.has_blocks
    decoder = "blockwise_shift_scale" if has_blocks else "affine_dequantize"
    return replace(
        _base(weight, (f"constexpr_{decoder}",), stateful),
        form="quantized",
        bits=treatment.bits,
        codes=treatment.dtype,
        granularity=_granularity_of(treatment),
    )


def _base(weight: Weight, decoded_by: tuple[str, ...], stateful: bool) -> Traits:
    return Traits(
        dtype=weight.dtype.name,
        used_by=weight.op_types,
        activations=_activations(weight),
        stateful=stateful,
        decoded_by=decoded_by,
    )


def _table_grid(weight: Weight, treatment: PalettizeConfig) -> dict[str, Any]:
    output, _ = weight.channel_axes or (0, 1)
    rank = len(weight.shape)
    n_channels = weight.shape[output]
    if treatment.channel_scale:
        return {"granularity": "per_channel", "channels_per_table": 1}
    if treatment.group_size is None:
        return {"granularity": "per_tensor", "channels_per_table": n_channels}
    if treatment.channel_axis is not None and treatment.channel_axis % rank != output:
        return {"granularity": "per_block", "channels_per_table": n_channels}
    size = min(treatment.group_size, n_channels)
    return {"granularity": _group_name(size, n_channels), "channels_per_table": size}


def _group_name(size: int, n_channels: int) -> str:
    return "per_tensor" if size == n_channels else "per_channel" if size == 1 else "per_group"


def _granularity_of(treatment: QuantizeConfig) -> str:
    if isinstance(treatment.granularity, PerTensor):
        return "per_tensor"
    return "per_block" if isinstance(treatment.granularity, (PerBlock, Blocks)) else "per_channel"


def _activations(weight: Weight) -> str:
    producers = (
        weight.graph.producer(use.node, parameter)
        for use in weight.node.uses
        for parameter in use.node.op.inputs
    )
    is_quantized = any(each is not None and each[0].op.type == "dequantize" for each in producers)
    return "int8" if is_quantized else "float"


def _type(node: Node, graph: Graph, parameter: str) -> TensorType | None:
    """Return the type of a parameter of a ``constexpr`` op, wherever it is given."""
    if parameter in node.op.attributes:
        return values.type_of(node.op.attributes[parameter].type)
    kind = graph.value_type(node, parameter)
    return None if kind is None else values.type_of(kind)


def _of_palette(node: Node, weight: Weight) -> dict[str, Any]:
    graph = weight.graph
    lut = _type(node, graph, "lut")
    sparse = node.op.type == "constexpr_lut_to_sparse"
    indices = _type(node, graph, "indices_nonzero_data" if sparse else "indices")
    if lut is None or indices is None:
        return {}
    table, scaled_floats = lut.dtype.name, False
    producer = graph.producer(node, "lut")
    if producer is not None and producer[0].op.type == "constexpr_blockwise_shift_scale":
        data = _type(producer[0], graph, "data")
        if data is not None:
            table, scaled_floats = data.dtype.name, data.dtype.is_float
    rank = len(weight.shape)
    if len(lut.shape) != rank + 2:  # the form before CoreML8: one table
        bits = (int(lut.shape[0] or 1) - 1).bit_length()
        grid, vector_size = (1,) * rank, 1
    else:
        bits = indices.dtype.bits
        grid, vector_size = lut.fixed_shape[:rank], lut.fixed_shape[-1]
    output, _ = weight.channel_axes or (0, 1)
    n_channels = weight.shape[output]
    size = n_channels // grid[output]
    is_block = math.prod(grid) > grid[output]
    return {
        "table": table,
        "scaled_floats": scaled_floats,
        "bits": bits,
        "codes": f"uint{bits}",
        "vector_size": vector_size,
        "values_per_table": 2**bits * vector_size,
        "channels_per_table": size,
        "granularity": "per_block" if is_block else _group_name(size, n_channels),
    }


def _of_affine(node: Node, graph: Graph) -> dict[str, Any]:
    data, scale, zero_point = (
        _type(node, graph, parameter) for parameter in ("quantized_data", "scale", "zero_point")
    )
    if data is None or scale is None:
        return {}
    is_vector = any(
        kind is not None and kind.shape not in ((), (1,)) for kind in (scale, zero_point)
    )
    return {
        "bits": data.dtype.bits,
        "codes": data.dtype.name,
        "granularity": "per_channel" if is_vector else "per_tensor",
    }


def _of_shift_scale(base: Traits, node: Node, weight: Weight, sparse: str) -> Traits:
    graph = weight.graph
    parameter = "nonzero_data" if node.op.type.startswith("constexpr_sparse") else "data"
    data, scale = _type(node, graph, parameter), _type(node, graph, "scale")
    if data is None or scale is None:
        return base
    if data.dtype.is_float:
        data_op = graph.producer(node, parameter)
        if data_op is not None and data_op[0].op.type in _LUTS:
            inner = _of_palette(data_op[0], weight) | {"scaled_floats": True}
            return replace(base, form=f"{sparse}palette", **inner)
        return replace(base, form=f"{sparse}quantized", scaled_floats=True)
    output, _ = weight.channel_axes or (0, 1)
    grid = scale.fixed_shape
    granularity = "per_block"
    if math.prod(grid) == 1:
        granularity = "per_tensor"
    elif math.prod(grid) == grid[output] == weight.shape[output]:
        granularity = "per_channel"
    return replace(
        base,
        form=f"{sparse}quantized",
        bits=data.dtype.bits,
        codes=data.dtype.name,
        granularity=granularity,
    )
