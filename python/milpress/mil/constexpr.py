"""Compressed weights in a program: reading and writing its ``constexpr_*`` ops."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from milpress import _core
from milpress.errors import PackageError
from milpress.formats import Palette, Quantized, Sparse
from milpress.mil import dtypes, values
from milpress.mil.program import CONSTEXPR, Graph, Node
from milpress.mil.schema import messages
from milpress.mil.values import Tensor, WeightSink, WeightSource

Compressed: TypeAlias = Palette | Quantized | Sparse

_SUFFIXES = {Palette: "palettized", Quantized: "quantized", Sparse: "sparsified"}


def emit(
    value: Compressed,
    node: Node,
    *,
    name: str,
    early: bool,
    file_name: str | None,
    sink: WeightSink,
) -> None:
    """Turn a ``const`` op into the ``constexpr_*`` op of a compressed value, in place.

    Below CoreML8 (``early``) the parameters are attributes, from there on inputs.
    """
    parameters = _early_parameters(value) if early else _parameters(value)
    kind = {
        Palette: "constexpr_lut_to_dense",
        Quantized: "constexpr_affine_dequantize" if early else "constexpr_blockwise_shift_scale",
        Sparse: "constexpr_sparse_to_dense",
    }[type(value)]
    op = messages().Operation(type=kind)
    op.attributes["name"].CopyFrom(values.string(name))
    for parameter, tensor in parameters.items():
        stored = op.attributes[parameter] if early else op.inputs[parameter].arguments.add().value
        values.write(stored, tensor, file_name=file_name, early=early, sink=sink)
    output = op.outputs.add(name=name)
    output.type.CopyFrom(node.op.outputs[0].type)
    node.op.CopyFrom(op)


def emit_const(tensor: Tensor, node: Node, *, file_name: str | None, sink: WeightSink) -> None:
    """Turn an op into the ``const`` op of a tensor, in place; its name stays."""
    name = node.name
    op = messages().Operation(type="const")
    op.attributes["name"].CopyFrom(values.string(name))
    values.write(op.attributes["val"], tensor, file_name=file_name, early=False, sink=sink)
    op.outputs.add(name=name).type.CopyFrom(op.attributes["val"].type)
    node.op.CopyFrom(op)


def payload_bytes(value: Compressed, *, early: bool) -> int:
    """Return how many bytes `emit` stores for a value."""
    parameters = _early_parameters(value) if early else _parameters(value)
    return sum(dtype.n_bytes(array.size) for dtype, array in parameters.values())


def suffixed(name: str, value: Compressed) -> str:
    """Return the name that coremltools gives the compressed form of a weight."""
    return f"{name}_{_SUFFIXES[type(value)]}"


def _parameters(value: Compressed) -> dict[str, Tensor]:
    if isinstance(value, Palette):
        parameters = {
            "indices": Tensor(dtypes.by_name(f"uint{value.bits}"), value.codes),
            "lut": _tensor(value.lut),
        }
        if value.vector_axis is not None:
            parameters["vector_axis"] = _tensor(np.int32(value.vector_axis))
        return parameters
    if isinstance(value, Quantized):
        dtype = dtypes.by_name(value.dtype)
        parameters = {"data": Tensor(dtype, value.codes), "scale": _tensor(value.scale)}
        if value.offset is not None:
            parameters["offset"] = Tensor(dtype, value.offset)
        return parameters
    mask = Tensor(dtypes.by_name("uint1"), value.mask().view(np.uint8))
    return {"mask": mask, "nonzero_data": _tensor(value.nonzeros)}


def _early_parameters(value: Compressed) -> dict[str, Tensor]:
    if isinstance(value, Quantized):
        axes = [axis for axis, n in enumerate(value.scale.shape) if n > 1]
        axis = axes[0] if axes else 0
        zero_point = np.zeros(value.scale.shape, value.codes.dtype)
        if value.offset is not None:
            zero_point = value.offset
        return {
            "axis": _tensor(np.int32(axis)),
            "quantized_data": _tensor(value.codes),
            "scale": _tensor(value.scale.squeeze()),
            "zero_point": _tensor(zero_point.squeeze()),
        }
    shape = _tensor(np.array(value.shape, np.uint32))
    if isinstance(value, Palette):
        indices = _packed(value.codes, value.bits)
        return {"indices": indices, "lut": _tensor(value.lut.reshape(-1)), "shape": shape}
    return {"mask": _tensor(value.bitmask), "nonzero_data": _tensor(value.nonzeros), "shape": shape}


def _packed(codes: NDArray[np.uint8], bits: int) -> Tensor:
    return _tensor(_core.pack(codes.reshape(-1), bits))


def _tensor(array: Any) -> Tensor:
    array = np.asarray(array)
    return Tensor(dtypes.of_array(array), array)


def is_constexpr(node: Node) -> bool:
    """Whether an op makes a weight from a compressed one."""
    return bool(node.op.type.startswith(CONSTEXPR))


class Decoder:
    """Decodes the ``constexpr_*`` ops of one graph, chains included.

    Parameters
    ----------
    graph
        The graph that the ops belong to.
    source
        Gives its weight files.
    """

    def __init__(self, graph: Graph, source: WeightSource) -> None:
        self._graph = graph
        self._source = source

    def stored_values(self, node: Node) -> list[Any]:
        """Return all that is stored for an op and those it builds on."""
        found = [node.op.attributes["val"]] if node.op.type == "const" else []
        if is_constexpr(node):
            for key in sorted(set(node.op.attributes) - {"name"}):
                found.append(node.op.attributes[key])
            for key in sorted(node.op.inputs):
                stored = self._graph.constant(node, key)
                producer = self._graph.producer(node, key)
                if stored is not None:
                    found.append(stored)
                elif producer is not None:
                    found.extend(self.stored_values(producer[0]))
        return found

    def value(self, node: Node) -> Compressed | None:
        """Return what an op is made of, if that is one palette, quantized or sparse weight.

        Raises
        ------
        PackageError
            If its parameters don't fit each other.
        """
        try:
            made = self._value(node)
        except (ValueError, KeyError) as error:
            if isinstance(error, PackageError):
                raise
            msg = f"{node.name}: the parameters of {node.op.type} must fit each other: {error}"
            raise PackageError(msg) from error
        if made is not None and node.type is not None and made.shape != node.type.shape:
            msg = (
                f"{node.name}: {node.op.type} must make the declared shape "
                f"{node.type.shape}, got {made.shape}"
            )
            raise PackageError(msg)
        return made

    def dense(self, node: Node) -> Tensor:
        """Return the weight that an op stands for.

        Raises
        ------
        PackageError
            If its parameters don't fit each other, or the op is not known.
        """
        if node.op.type == "const":
            return values.read(node.op.attributes["val"], self._source)
        made = self.value(node)
        if made is not None:
            return _tensor(made.dense())
        try:
            return self._outputs(node)[-1]
        except (ValueError, KeyError, IndexError) as error:
            if isinstance(error, PackageError):
                raise
            msg = f"{node.name}: the parameters of {node.op.type} must fit each other: {error}"
            raise PackageError(msg) from error

    def _tensor(self, node: Node, parameter: str) -> Tensor | None:
        if parameter in node.op.attributes:
            return values.read(node.op.attributes[parameter], self._source)
        stored = self._graph.constant(node, parameter)
        if stored is not None:
            return values.read(stored, self._source)
        found = self._graph.producer(node, parameter)
        if found is None:
            return None
        producer, name = found
        if not is_constexpr(producer):
            msg = f"{node.name}: {parameter} must be known beforehand, got {producer.op.type}"
            raise PackageError(msg)
        if len(producer.op.outputs) == 1:
            return self.dense(producer)
        names = [output.name for output in producer.op.outputs]
        return self._outputs(producer)[names.index(name)]

    def _need(self, node: Node, parameter: str) -> Tensor:
        tensor = self._tensor(node, parameter)
        if tensor is None:
            msg = f"{node.name}: {node.op.type} must have {parameter}, got none"
            raise PackageError(msg)
        return tensor

    def _value(self, node: Node) -> Compressed | None:
        kind = node.op.type
        if kind == "constexpr_affine_dequantize":
            return self._affine(node)
        if kind == "constexpr_blockwise_shift_scale":
            return _quantized(
                self._need(node, "data"), self._need(node, "scale"), self._tensor(node, "offset")
            )
        if kind == "constexpr_lut_to_dense":
            return self._palette(node)
        if kind == "constexpr_sparse_to_dense":
            return self._sparse(node)
        return None

    def _affine(self, node: Node) -> Quantized:
        data, scale, zero_point = (
            self._need(node, key) for key in ("quantized_data", "scale", "zero_point")
        )
        axis = int(self._need(node, "axis").values)
        made = _quantized(
            data, _spread(scale, data, axis), _spread(zero_point, data, axis, like=scale)
        )
        if made is None:
            msg = f"{node.name}: data and zero point must be of one type of 8 bits"
            raise PackageError(msg)
        return made

    def _palette(self, node: Node) -> Palette | None:
        indices, lut = self._need(node, "indices"), self._need(node, "lut")
        if not lut.dtype.is_float:
            return None
        if "shape" in node.op.attributes:
            shape = _shape(self._need(node, "shape"))
            bits = (lut.values.size - 1).bit_length()
            codes = _core.unpack(indices.values, bits, math.prod(shape)).reshape(shape)
            table = lut.values.reshape((1,) * len(shape) + (-1, 1))
            return Palette(codes=codes, lut=table, bits=bits)
        axis = self._tensor(node, "vector_axis")
        rank = indices.values.ndim
        lut_shape: tuple[int, ...] = lut.values.shape
        if len(lut_shape) != rank + 2 or lut_shape[rank] != 2**indices.dtype.bits:
            msg = f"lut must have {rank + 2} dimensions and 2**bits entries"
            raise ValueError(msg)
        _check_blocks(indices.values.shape, lut_shape[:rank])
        return Palette(
            codes=indices.values,
            lut=lut.values,
            bits=indices.dtype.bits,
            vector_axis=None if axis is None else int(axis.values),
        )

    def _sparse(self, node: Node) -> Sparse | None:
        mask, nonzeros = self._need(node, "mask"), self._need(node, "nonzero_data")
        if not nonzeros.dtype.is_float:
            return None
        if "shape" in node.op.attributes:
            shape, bitmask = _shape(self._need(node, "shape")), mask.values
        else:
            shape = mask.values.shape
            bitmask = _core.pack(mask.values.reshape(-1), 1)
        return Sparse(shape=shape, bitmask=bitmask, nonzeros=nonzeros.values)

    def _outputs(self, node: Node) -> list[Tensor]:
        """Return all outputs of an op that is no palette, quantized or sparse weight by itself."""
        decode = {
            "constexpr_sparse_to_dense": self._sparse_to_dense,
            "constexpr_lut_to_dense": self._lut_to_dense,
            "constexpr_blockwise_shift_scale": self._blockwise_shift_scale,
            "constexpr_lut_to_sparse": self._lut_to_sparse,
            "constexpr_sparse_blockwise_shift_scale": self._sparse_blockwise_shift_scale,
            "constexpr_cast": self._cast,
        }.get(node.op.type)
        if decode is None:
            msg = f"{node.name}: a compressed weight must be of a known kind, got {node.op.type}"
            raise PackageError(msg)
        return decode(node)

    def _sparse_to_dense(self, node: Node) -> list[Tensor]:
        return [_scattered(self._need(node, "mask"), self._need(node, "nonzero_data"))]

    def _lut_to_dense(self, node: Node) -> list[Tensor]:
        codes, lut = self._need(node, "indices"), self._need(node, "lut")
        axis = self._tensor(node, "vector_axis")
        return [Tensor(lut.dtype, _look_up(codes.values, lut, axis))]

    def _blockwise_shift_scale(self, node: Node) -> list[Tensor]:
        data, scale = self._need(node, "data"), self._need(node, "scale")
        return [Tensor(scale.dtype, _shift_scale(data, scale, self._tensor(node, "offset")))]

    def _lut_to_sparse(self, node: Node) -> list[Tensor]:
        mask, lut = self._need(node, "indices_mask"), self._need(node, "lut")
        codes = _scattered(mask, self._need(node, "indices_nonzero_data")).values
        axis = self._tensor(node, "vector_axis")
        dense = _look_up(codes, lut, axis)
        kept = mask.values
        if axis is not None:
            kept = np.repeat(kept, lut.values.shape[-1], int(axis.values))
        return [Tensor(mask.dtype, kept), Tensor(lut.dtype, dense[kept != 0])]

    def _sparse_blockwise_shift_scale(self, node: Node) -> list[Tensor]:
        mask, scale = self._need(node, "data_mask"), self._need(node, "scale")
        data = _scattered(mask, self._need(node, "nonzero_data"))
        dense = _shift_scale(data, scale, self._tensor(node, "offset"))
        return [mask, Tensor(scale.dtype, dense[mask.values != 0])]

    def _cast(self, node: Node) -> list[Tensor]:
        return [_tensor(self._need(node, "source_val").values.astype(np.float32))]


def _scattered(mask: Tensor, nonzeros: Tensor) -> Tensor:
    dense = np.zeros(mask.values.shape, nonzeros.values.dtype)
    dense[mask.values != 0] = nonzeros.values
    return Tensor(nonzeros.dtype, dense)


def _quantized(data: Tensor, scale: Tensor, offset: Tensor | None) -> Quantized | None:
    """Return the value, or ``None`` where codes or offsets are of types that it can't hold."""
    if data.values.dtype not in (np.int8, np.uint8) or not scale.dtype.is_float:
        return None
    if offset is not None and offset.dtype != data.dtype:
        return None
    if data.dtype.bits not in (4, 8):
        return None
    _check_blocks(data.values.shape, scale.values.shape)
    if offset is not None and offset.values.shape != scale.values.shape:
        msg = f"offset must have the shape of scale, {scale.values.shape}, got another"
        raise ValueError(msg)
    return Quantized(
        codes=data.values,
        scale=scale.values,
        offset=None if offset is None else offset.values,
        bits=data.dtype.bits,
    )


def _check_blocks(shape: tuple[int, ...], grid: tuple[int, ...]) -> None:
    if len(shape) != len(grid) or any(
        n < 1 or size % n for size, n in zip(shape, grid, strict=True)
    ):
        msg = f"blocks must divide the shape {shape}, got {grid} of them"
        raise ValueError(msg)


def _spread(tensor: Tensor, data: Tensor, axis: int, like: Tensor | None = None) -> Tensor:
    """Give a vector or scalar of iOS16 the rank of the data."""
    numbers = tensor.values
    if like is not None and numbers.ndim == 0:
        numbers = np.full(like.values.shape, numbers)
    shape = [1] * data.values.ndim
    if numbers.ndim:
        shape[axis] = numbers.size
    return Tensor(tensor.dtype, numbers.reshape(shape))


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(int(size) for size in tensor.values)


def _repeat(array: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    _check_blocks(shape, array.shape[: len(shape)])
    for axis, size in enumerate(shape):
        array = np.repeat(array, size // array.shape[axis], axis)
    return array


def _shift_scale(data: Tensor, scale: Tensor, offset: Tensor | None) -> NDArray[Any]:
    shape = data.values.shape
    result = data.values.astype(scale.values.dtype)
    if offset is not None:
        result = result - _repeat(offset.values, shape).astype(scale.values.dtype)
    return np.asarray(result * _repeat(scale.values, shape))


def _look_up(codes: NDArray[Any], lut: Tensor, vector_axis: Tensor | None) -> NDArray[Any]:
    axis = None if vector_axis is None else int(vector_axis.values)
    palette = Palette(codes=codes, lut=lut.values, bits=8, vector_axis=axis)
    if lut.dtype.is_float:
        return palette.dense()
    # Integer tables are looked up as floats, which hold every 8-bit integer exactly.
    as_float = Palette(codes=codes, lut=lut.values.astype(np.float32), bits=8, vector_axis=axis)
    return as_float.dense().astype(lut.values.dtype)
