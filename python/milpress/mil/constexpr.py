"""Compressed weights in a program: reading and writing its ``constexpr_*`` ops."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from milpress import _core
from milpress.errors import PackageError
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
from milpress.mil import dtypes, values
from milpress.mil.dtypes import DType
from milpress.mil.program import CONSTEXPR, Graph, Node, new_const
from milpress.mil.schema import messages
from milpress.mil.values import Tensor, WeightSink, WeightSource

Namer: TypeAlias = Callable[[str], str]

# The ops that `Decoder` knows.
DECODED = frozenset(
    f"{CONSTEXPR}{kind}"
    for kind in (
        "affine_dequantize",
        "blockwise_shift_scale",
        "cast",
        "lut_to_dense",
        "lut_to_sparse",
        "sparse_blockwise_shift_scale",
        "sparse_to_dense",
    )
)
_SUFFIXES = {PalettizeConfig: "palettized", QuantizeConfig: "quantized", PruneConfig: "sparsified"}


@dataclass(frozen=True, slots=True)
class _Output:
    """What an op makes for the next one: its place among the op's outputs, and its type."""

    index: int
    dtype: DType
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Stage:
    """An op of a chain: its parameters are stored, or outputs of the stage of that name."""

    kind: str
    role: str
    parameters: dict[str, Any]  # Tensor or (role, _Output)
    outputs: tuple[_Output, ...] = ()


def emit(
    value: Compressed,
    node: Node,
    *,
    names: Namer,
    name: str,
    early: bool,
    file_name: str | None,
    sink: WeightSink,
) -> list[Any]:
    """Turn an op into the last ``constexpr_*`` op of a compressed value, in place.

    Returns the ops that have to stand before it, if the value takes a chain of them. Below CoreML8
    (``early``) the parameters are attributes, from there on inputs.
    """
    made: dict[str, Any] = {}
    written: dict[int, Any] = {}
    *inner, last = _stages(value, early=early)
    for stage in (*inner, last):
        stage_name = name if stage is last else names(f"{name}_{stage.role}")
        op = messages().Operation(type=stage.kind)
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


def emit_const(tensor: Tensor, node: Node, *, file_name: str | None, sink: WeightSink) -> None:
    """Turn an op into the ``const`` op of a tensor, in place; its name stays."""
    node.op.CopyFrom(const_of(tensor, node.name, file_name=file_name, sink=sink))


def const_of(tensor: Tensor, name: str, *, file_name: str | None, sink: WeightSink) -> Any:
    """Return the ``const`` op of a tensor."""
    value = messages().Value()
    values.write(value, tensor, file_name=file_name, early=False, sink=sink)
    return new_const(name, value)


def payload_bytes(value: Compressed, *, early: bool) -> int:
    """Return how many bytes `emit` stores for a value."""
    stored = {
        id(given): given
        for stage in _stages(value, early=early)
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


def _stages(value: Compressed, *, early: bool) -> list[_Stage]:
    if isinstance(value, Masked):
        return _masked_stages(value)
    if isinstance(value, Quantized):
        if early:
            parameters = _early_parameters(value)
            return [_Stage("constexpr_affine_dequantize", "", parameters)]
        return [_Stage("constexpr_blockwise_shift_scale", "", _quantized_parameters(value))]
    if isinstance(value, Palette):
        if early:
            return [_Stage("constexpr_lut_to_dense", "", _early_parameters(value))]
        before, lut = _lut(value)
        parameters = {"indices": _codes(value, value.codes), "lut": lut, **_vector_axis(value)}
        return [*before, _Stage("constexpr_lut_to_dense", "", parameters)]
    if early:
        return [_Stage("constexpr_sparse_to_dense", "", _early_parameters(value))]
    mask = Tensor(dtypes.by_name("uint1"), value.mask().view(np.uint8))
    parameters = {"mask": mask, "nonzero_data": _tensor(value.nonzeros)}
    return [_Stage("constexpr_sparse_to_dense", "", parameters)]


def _masked_stages(value: Masked) -> list[_Stage]:
    inner = value.value
    uint1 = dtypes.by_name("uint1")
    mask = Tensor(uint1, value.code_mask().view(np.uint8))
    codes = _codes(inner, value.nonzero_codes())
    scale = inner.scale if isinstance(inner, Quantized) else inner.entries
    size = inner.vector_size if isinstance(inner, Palette) else 1
    kept = _Output(0, uint1, inner.shape)
    nonzeros = _Output(1, dtypes.of_array(scale), (codes.values.size * size,))
    if isinstance(inner, Palette):
        role = "nonzero_data_0_palettized"
        before, lut = _lut(inner, f"{role}_")
        parameters = {
            "indices_mask": mask,
            "indices_nonzero_data": codes,
            "lut": lut,
            **_vector_axis(inner),
        }
        stage = _Stage("constexpr_lut_to_sparse", role, parameters, (kept, nonzeros))
        last: dict[str, Any] = {"mask": (role, kept), "nonzero_data": (role, nonzeros)}
        return [*before, stage, _Stage("constexpr_sparse_to_dense", "", last)]
    role = "nonzero_data_0_quantized"
    quantized = _quantized_parameters(inner)
    del quantized["data"]
    parameters = {"data_mask": mask, "nonzero_data": codes, **quantized}
    stage = _Stage("constexpr_sparse_blockwise_shift_scale", role, parameters, (kept, nonzeros))
    last = {"mask": mask, "nonzero_data": (role, nonzeros)}
    return [stage, _Stage("constexpr_sparse_to_dense", "", last)]


def _codes(value: Palette | Quantized, codes: NDArray[Any]) -> Tensor:
    name = f"uint{value.bits}" if isinstance(value, Palette) else value.dtype
    return Tensor(dtypes.by_name(name), codes)


def _lut(value: Palette, prefix: str = "") -> tuple[list[_Stage], Tensor | tuple[str, _Output]]:
    """Return the stage that decodes a quantized table, if it is one, and the parameter."""
    lut = value.lut
    if not isinstance(lut, Quantized):
        return [], _tensor(lut)
    role = f"{prefix}lut_0_quantized"
    output = _Output(0, dtypes.of_array(lut.scale), lut.shape)
    parameters = _quantized_parameters(lut)
    stage = _Stage("constexpr_blockwise_shift_scale", role, parameters, (output,))
    return [stage], (role, output)


def _vector_axis(value: Palette) -> dict[str, Tensor]:
    return (
        {} if value.vector_axis is None else {"vector_axis": _tensor(np.int32(value.vector_axis))}
    )


def _quantized_parameters(value: Quantized) -> dict[str, Any]:
    parameters = {"data": _codes(value, value.codes), "scale": _tensor(value.scale)}
    if value.offset is not None:
        parameters["offset"] = _codes(value, value.offset)
    return parameters


def _early_parameters(value: Palette | Quantized | Sparse) -> dict[str, Any]:
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
        # iOS16 has no indices of 3 bits.
        bits = 4 if value.bits == 3 else value.bits
        lut = value.entries.reshape(-1)
        lut = np.pad(lut, (0, 2**bits - lut.size), "edge")
        return {"indices": _packed(value.codes, bits), "lut": _tensor(lut), "shape": shape}
    return {"mask": _tensor(value.bitmask), "nonzero_data": _tensor(value.nonzeros), "shape": shape}


def _packed(codes: NDArray[np.uint8], bits: int) -> Tensor:
    return _tensor(_core.pack(codes.reshape(-1), bits))


def _tensor(array: Any) -> Tensor:
    array = np.asarray(array)
    return Tensor(dtypes.of_array(array), array)


def is_constexpr(node: Node) -> bool:
    """Whether an op makes a weight from a compressed one."""
    return bool(node.op.type.startswith(CONSTEXPR))


def is_part(node: Node) -> bool:
    """Whether an op only serves to decode another one's weight."""
    return (
        node.is_stored
        and bool(node.uses)
        and not node.is_block_output
        and all(is_constexpr(use.node) for use in node.uses)
    )


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
        """Return all that is stored for an op and those it builds on, what they share once."""
        found: dict[Any, Any] = {}
        for value in self._stored_values(node):
            where = value.blobFileValue
            key = (where.fileName, where.offset) if values.is_blob(value) else id(value)
            found.setdefault(key, value)
        return list(found.values())

    def parts(self, node: Node) -> list[Node]:
        """Return the ops that an op decodes from, each once; no other op may use them."""
        found: dict[Node, None] = {}
        for key in sorted(node.op.inputs):
            producer = self._graph.producer(node, key)
            if producer is not None and producer[0].is_stored:
                found[producer[0]] = None
                found.update(dict.fromkeys(self.parts(producer[0])))
        return list(found)

    def _stored_values(self, node: Node) -> list[Any]:
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
                    found.extend(self._stored_values(producer[0]))
        return found

    def value(self, node: Node) -> Compressed | None:
        """Return what an op is made of, if that is one palette, quantized or sparse weight.

        Raises
        ------
        PackageError
            If its parameters don't fit each other.
        """
        with _fitting(node):
            made = self._value(node)
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
        with _fitting(node):
            return self._outputs(node)[-1] if made is None else _tensor(made.dense())

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
            found = self._graph.producer(node, "nonzero_data")
            if found is not None and is_constexpr(found[0]):
                return self._masked(node, found[0])
            return self._sparse(node)
        return None

    def _affine(self, node: Node) -> Quantized:
        data, scale, zero_point = (
            self._need(node, key) for key in ("quantized_data", "scale", "zero_point")
        )
        axis = _axis(self._need(node, "axis"), data.values.ndim)
        made = _quantized(
            data, _spread(scale, data, axis), _spread(zero_point, data, axis, like=scale)
        )
        if made is None:
            msg = f"{node.name}: data and zero point must be of one type of 8 bits"
            raise PackageError(msg)
        return made

    def _palette(self, node: Node) -> Palette | None:
        indices = self._need(node, "indices")
        if "shape" not in node.op.attributes:
            return self._palette_of(node, indices)
        lut = self._need(node, "lut")
        if not lut.dtype.is_float:
            msg = f"lut must be float16 or float32, got {lut.dtype.name}"
            raise ValueError(msg)
        shape = _shape(self._need(node, "shape"))
        bits = (lut.values.size - 1).bit_length()
        codes = _unpacked(indices, bits, shape)
        table = lut.values.reshape((1,) * len(shape) + (-1, 1))
        return Palette(codes=codes, lut=table, bits=bits)

    def _palette_of(self, node: Node, indices: Tensor) -> Palette | None:
        """Return the palette of an op of iOS18, whose table may be quantized."""
        lut = self._lut(node)
        if lut is None:
            return None
        axis = self._tensor(node, "vector_axis")
        rank = indices.values.ndim
        if len(lut.shape) != rank + 2 or lut.shape[rank] != 2**indices.dtype.bits:
            msg = f"lut must have {rank + 2} dimensions and 2**bits entries"
            raise ValueError(msg)
        _check_blocks(indices.values.shape, lut.shape[:rank])
        return Palette(
            codes=indices.values,
            lut=lut,
            bits=indices.dtype.bits,
            vector_axis=None if axis is None else _axis(axis, rank),
        )

    def _lut(self, node: Node) -> NDArray[Any] | Quantized | None:
        found = self._graph.producer(node, "lut")
        if found is not None and found[0].op.type == "constexpr_blockwise_shift_scale":
            made = self.value(found[0])
            if isinstance(made, Quantized):
                return made
        lut = self._need(node, "lut")
        return lut.values if lut.dtype.is_float else None

    def _masked(self, node: Node, inner: Node) -> Masked | None:
        """Return the value of a chain of two or three ops, if it is one that `emit` writes."""
        value: Palette | Quantized | None = None
        if inner.op.type == "constexpr_lut_to_sparse":
            mask = self._need(inner, "indices_mask")
            codes = _scattered(mask, self._need(inner, "indices_nonzero_data"))
            value = self._palette_of(inner, codes)
        elif inner.op.type == "constexpr_sparse_blockwise_shift_scale":
            mask = self._need(inner, "data_mask")
            codes = _scattered(mask, self._need(inner, "nonzero_data"))
            value = _quantized(codes, self._need(inner, "scale"), self._tensor(inner, "offset"))
        if value is None:
            return None
        bitmask = _bitmask(mask.values)
        made = Masked(bitmask=bitmask, value=value)
        same = np.array_equal(made.mask(), self._need(node, "mask").values != 0)
        return made if same else None

    def _sparse(self, node: Node) -> Sparse | None:
        mask, nonzeros = self._need(node, "mask"), self._need(node, "nonzero_data")
        if not nonzeros.dtype.is_float:
            return None
        if "shape" in node.op.attributes:
            kept = _unpacked(mask, 1, _shape(self._need(node, "shape")))
        else:
            kept = mask.values
        _check_kept(kept, nonzeros)
        return Sparse(shape=kept.shape, bitmask=_bitmask(kept), nonzeros=nonzeros.values)

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
            kept = np.repeat(kept, lut.values.shape[-1], _axis(axis, kept.ndim))
        return [Tensor(mask.dtype, kept), Tensor(lut.dtype, dense[kept != 0])]

    def _sparse_blockwise_shift_scale(self, node: Node) -> list[Tensor]:
        mask, scale = self._need(node, "data_mask"), self._need(node, "scale")
        data = _scattered(mask, self._need(node, "nonzero_data"))
        dense = _shift_scale(data, scale, self._tensor(node, "offset"))
        return [mask, Tensor(scale.dtype, dense[mask.values != 0])]

    def _cast(self, node: Node) -> list[Tensor]:
        return [_tensor(self._need(node, "source_val").values.astype(np.float32))]


@contextlib.contextmanager
def _fitting(node: Node) -> Iterator[None]:
    """Name the op whose parameters don't fit each other."""
    try:
        yield
    except (ValueError, KeyError, IndexError) as error:
        if isinstance(error, PackageError):
            raise
        msg = f"{node.name}: the parameters of {node.op.type} must fit each other: {error}"
        raise PackageError(msg) from error


def _axis(tensor: Tensor, rank: int) -> int:
    if tensor.values.size != 1 or tensor.values.dtype.kind not in "iu":
        msg = f"an axis must be one integer, got {tensor.dtype.name}{list(tensor.values.shape)}"
        raise ValueError(msg)
    axis = int(tensor.values.reshape(-1)[0])
    if not -rank <= axis < rank:
        msg = f"an axis must be one of {rank}, got {axis}"
        raise ValueError(msg)
    return axis


def _unpacked(packed: Tensor, bits: int, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    n_codes = math.prod(shape)
    if packed.values.dtype != np.uint8 or packed.values.size != (n_codes * bits + 7) // 8:
        msg = (
            f"{n_codes} codes of {bits} bits must be {(n_codes * bits + 7) // 8} bytes of uint8, "
            f"got {packed.values.size} elements of {packed.dtype.name}"
        )
        raise ValueError(msg)
    return _core.unpack(packed.values.reshape(-1), bits, n_codes).reshape(shape)


def _bitmask(mask: NDArray[Any]) -> NDArray[np.uint8]:
    return _core.pack(np.ascontiguousarray(mask != 0).view(np.uint8).reshape(-1), 1)


def _check_kept(mask: NDArray[Any], nonzeros: Tensor) -> None:
    n_kept = np.count_nonzero(mask)
    if nonzeros.values.shape != (n_kept,):
        msg = (
            f"there must be as many values as the mask keeps, {n_kept}, "
            f"got the shape {nonzeros.values.shape}"
        )
        raise ValueError(msg)


def _scattered(mask: Tensor, nonzeros: Tensor) -> Tensor:
    _check_kept(mask.values, nonzeros)
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
    sizes = tensor.values
    if sizes.ndim != 1 or sizes.dtype.kind not in "iu" or (sizes < 0).any():
        msg = f"a shape must be a vector of sizes, got {tensor.dtype.name}{list(sizes.shape)}"
        raise ValueError(msg)
    return tuple(int(size) for size in sizes)


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
    axis = None if vector_axis is None else _axis(vector_axis, codes.ndim)
    _check_blocks(codes.shape, lut.values.shape[:-2])
    palette = Palette(codes=codes, lut=lut.values, bits=8, vector_axis=axis)
    if lut.dtype.is_float:
        return palette.dense()
    # Integer tables are looked up as floats, which hold every 8-bit integer exactly.
    as_float = Palette(codes=codes, lut=lut.values.astype(np.float32), bits=8, vector_axis=axis)
    return as_float.dense().astype(lut.values.dtype)
