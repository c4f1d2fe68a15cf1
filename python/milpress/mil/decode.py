"""Weights decoded from the ``constexpr_*`` ops and constants that a program stores."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from milpress.errors import PackageError, package_errors
from milpress.formats import (
    Compressed,
    Masked,
    Palette,
    Quantized,
    Sparse,
)
from milpress.formats.rows import packed_mask
from milpress.mil import decode_arithmetic as arithmetic
from milpress.mil import dtypes, proto, values
from milpress.mil.graph import CONSTEXPR, Graph, Node
from milpress.mil.values import Tensor, WeightSource

_CAST = f"{CONSTEXPR}cast"


def is_constexpr(node: Node) -> bool:
    """Whether an op makes a weight from a compressed one."""
    return node.op.type.startswith(CONSTEXPR)


def is_compressed(node: Node, graph: Graph) -> bool:
    """Whether an op makes a weight from codes or from what pruning left.

    One of a ``constexpr_cast`` is dense, as long as what it casts is: its values are all stored.
    """
    if not is_constexpr(node):
        return False
    if node.op.type != _CAST:
        return True
    producer = graph.producer(node, "source_val")
    return producer is not None and is_constexpr(producer[0])


def is_part(node: Node) -> bool:
    """Whether an op only serves to decode another one's weight."""
    return (
        node.is_stored
        and bool(node.uses)
        and not node.is_block_output
        and all(is_constexpr(use.node) for use in node.uses)
    )


def _is_early(node: Node) -> bool:
    """Whether an op has the form of iOS16, which holds codes as bytes and says the shape."""
    return "shape" in node.op.attributes or "shape" in node.op.inputs


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

    def stored_values(self, node: Node) -> list[proto.Value]:
        """Return all numbers that are stored for an op and those it builds on.

        What they share is returned once; a text, such as a type, is no number.
        """
        stored: dict[object, proto.Value] = {}
        for value in self._all_values(node):
            with package_errors(node.name):
                is_numeric = values.type_of(value.type) is not None
            if is_numeric:
                where = value.blobFileValue
                key = (where.fileName, where.offset) if values.is_blob(value) else id(value)
                stored.setdefault(key, value)
        return list(stored.values())

    def parts(self, node: Node) -> list[Node]:
        """Return the stored ops that an op decodes from, each once; others may use them too."""
        parts: dict[Node, None] = {}
        for key in sorted(node.op.inputs):
            producer = self._graph.producer(node, key)
            if producer is not None and producer[0].is_stored:
                parts[producer[0]] = None
                parts.update(dict.fromkeys(self.parts(producer[0])))
        return list(parts)

    def _all_values(self, node: Node) -> Iterator[proto.Value]:
        if node.op.type == "const":
            yield node.op.attributes["val"]
        if is_constexpr(node):
            for key in sorted(set(node.op.attributes) - {"name"}):
                yield node.op.attributes[key]
            for key in sorted(node.op.inputs):
                stored = self._graph.constant(node, key)
                producer = self._graph.producer(node, key)
                if stored is not None:
                    yield stored
                elif producer is not None:
                    yield from self._all_values(producer[0])

    def value(self, node: Node) -> Compressed | None:
        """Return what an op is made of, if that is one palette, quantized or sparse weight.

        Raises
        ------
        PackageError
            If its parameters don't fit each other.
        """
        with _fitting(node):
            value = self._value(node)
        if value is not None:
            _check_declared(node, "", value.shape)
        return value

    def dense(self, node: Node) -> Tensor:
        """Return the weight that an op stands for.

        Raises
        ------
        PackageError
            If its parameters don't fit each other, or the op is not known.
        """
        if node.op.type == "const":
            return self._read(node, "val", node.op.attributes["val"])
        value = self.value(node)
        with _fitting(node):
            tensor = self._outputs(node)[-1] if value is None else values.of_array(value.dense())
        if len(node.op.outputs) == 1:
            _check_declared(node, tensor.dtype.name, tensor.values.shape)
        return tensor

    def _read(self, node: Node, parameter: str, value: proto.Value) -> Tensor:
        with package_errors(f"{node.name}: {parameter}"):
            return values.read(value, self._source)

    def _tensor(self, node: Node, parameter: str) -> Tensor | None:
        if parameter in node.op.attributes:
            return self._read(node, parameter, node.op.attributes[parameter])
        stored = self._graph.constant(node, parameter)
        if stored is not None:
            return self._read(node, parameter, stored)
        source = self._graph.producer(node, parameter)
        if source is None:
            return None
        producer, name = source
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
            msg = f"{node.name}: {node.op.type} has no {parameter}"
            raise PackageError(msg)
        return tensor

    def _value(self, node: Node) -> Compressed | None:
        kind = node.op.type
        if kind == "constexpr_affine_dequantize":
            return self._affine(node)
        if kind == "constexpr_blockwise_shift_scale":
            return arithmetic.quantized_of(
                self._need(node, "data"), self._need(node, "scale"), self._tensor(node, "offset")
            )
        if kind == "constexpr_lut_to_dense":
            return self._palette(node)
        if kind == "constexpr_sparse_to_dense":
            source = self._graph.producer(node, "nonzero_data")
            if source is not None and is_constexpr(source[0]):
                return self._masked(node, source[0])
            return self._sparse(node)
        return None

    def _affine(self, node: Node) -> Quantized | None:
        """Return the value, or ``None`` where the codes' type can't hold the zero point."""
        data, scale, zero_point = self._affine_parameters(node)
        offset = arithmetic.offset_as(zero_point, data)
        return None if offset is None else arithmetic.quantized_of(data, scale, offset)

    def _affine_parameters(self, node: Node) -> tuple[Tensor, Tensor, Tensor]:
        data = self._need(node, "quantized_data")
        axis = arithmetic.axis_of(self._need(node, "axis"), data.values.ndim)
        return arithmetic.affine_of(
            data, self._need(node, "scale"), self._need(node, "zero_point"), axis
        )

    def _palette(self, node: Node) -> Palette | None:
        if not _is_early(node):
            return self._palette_of(node, self._need(node, "indices"))
        codes, lut = self._early_table(node)
        if not lut.dtype.is_float:
            return None
        return Palette(codes=codes.values, lut=lut.values, bits=codes.dtype.bits)

    def _early_table(self, node: Node) -> tuple[Tensor, Tensor]:
        """Return indices and table of an op of iOS16 as one of iOS18 has them."""
        lut, shape = self._need(node, "lut"), arithmetic.shape_of(self._need(node, "shape"))
        bits = max(lut.values.size - 1, 1).bit_length()
        if bits not in (1, 2, 4, 6, 8) or lut.values.shape != (2**bits,):
            msg = f"lut must be a vector of 2, 4, 16, 64 or 256, got the shape {lut.values.shape}"
            raise ValueError(msg)
        codes = arithmetic.unpacked(self._need(node, "indices"), bits, shape)
        table = lut.values.reshape((1,) * len(shape) + (-1, 1))
        return Tensor(dtypes.by_name(f"uint{bits}"), codes), Tensor(lut.dtype, table)

    def _palette_of(self, node: Node, indices: Tensor) -> Palette | None:
        """Return the palette of an op of iOS18, whose table may be quantized."""
        lut = self._lut(node)
        if lut is None:
            return None
        axis = self._tensor(node, "vector_axis")
        rank = indices.values.ndim
        if len(lut.shape) != rank + 2 or lut.shape[rank] != 2**indices.dtype.bits:
            msg = (
                f"lut must have {rank + 2} dimensions and {2**indices.dtype.bits} entries, got the "
                f"shape {lut.shape}"
            )
            raise ValueError(msg)
        arithmetic.check_blocks(indices.values.shape, lut.shape[:rank])
        return Palette(
            codes=indices.values,
            lut=lut,
            bits=indices.dtype.bits,
            vector_axis=None if axis is None else arithmetic.axis_of(axis, rank),
        )

    def _lut(self, node: Node) -> NDArray[Any] | Quantized | None:
        source = self._graph.producer(node, "lut")
        if source is not None and source[0].op.type == "constexpr_blockwise_shift_scale":
            table = self.value(source[0])
            if isinstance(table, Quantized):
                return table
        lut = self._need(node, "lut")
        return lut.values if lut.dtype.is_float else None

    def _masked(self, node: Node, inner: Node) -> Masked | None:
        """Return the value of a chain of two or three ops, if it is one that `emit` writes."""
        value: Palette | Quantized | None = None
        if inner.op.type == "constexpr_lut_to_sparse":
            mask = self._need(inner, "indices_mask")
            codes = arithmetic.scattered(mask, self._need(inner, "indices_nonzero_data"))
            value = self._palette_of(inner, codes)
        elif inner.op.type == "constexpr_sparse_blockwise_shift_scale":
            mask = self._need(inner, "data_mask")
            codes = arithmetic.scattered(mask, self._need(inner, "nonzero_data"))
            value = arithmetic.quantized_of(
                codes, self._need(inner, "scale"), self._tensor(inner, "offset")
            )
        if value is None:
            return None
        masked = Masked(bitmask=packed_mask(mask.values), value=value)
        same = np.array_equal(masked.mask(), self._need(node, "mask").values != 0)
        return masked if same else None

    def _sparse(self, node: Node) -> Sparse | None:
        mask, nonzeros = self._kept(node), self._need(node, "nonzero_data")
        if not nonzeros.dtype.is_float:
            return None
        arithmetic.check_kept(mask.values, nonzeros)
        return Sparse(
            shape=mask.values.shape,
            bitmask=packed_mask(mask.values),
            nonzeros=nonzeros.values,
        )

    def _kept(self, node: Node) -> Tensor:
        """Return the mask of an op, one element a weight."""
        mask = self._need(node, "mask")
        if not _is_early(node):
            return mask
        shape = arithmetic.shape_of(self._need(node, "shape"))
        return Tensor(dtypes.by_name("uint1"), arithmetic.unpacked(mask, 1, shape))

    def _outputs(self, node: Node) -> list[Tensor]:
        """Return all outputs of an op that is no palette, quantized or sparse weight by itself."""
        if node.op.type not in _OUTPUTS:
            msg = f"{node.name}: a compressed weight must be of a known kind, got {node.op.type}"
            raise PackageError(msg)
        return _OUTPUTS[node.op.type](self, node)

    def _affine_dequantize(self, node: Node) -> list[Tensor]:
        data, scale, zero_point = self._affine_parameters(node)
        return [Tensor(scale.dtype, arithmetic.affine(data, scale, zero_point))]

    def _sparse_to_dense(self, node: Node) -> list[Tensor]:
        return [arithmetic.scattered(self._kept(node), self._need(node, "nonzero_data"))]

    def _lut_to_dense(self, node: Node) -> list[Tensor]:
        if _is_early(node):
            codes, lut = self._early_table(node)
        else:
            codes, lut = self._need(node, "indices"), self._need(node, "lut")
        axis = self._tensor(node, "vector_axis")
        return [Tensor(lut.dtype, arithmetic.look_up(codes.values, lut, axis))]

    def _blockwise_shift_scale(self, node: Node) -> list[Tensor]:
        data, scale = self._need(node, "data"), self._need(node, "scale")
        dense = arithmetic.shift_scale(data, scale, self._tensor(node, "offset"))
        return [Tensor(scale.dtype, dense)]

    def _lut_to_sparse(self, node: Node) -> list[Tensor]:
        mask, lut = self._need(node, "indices_mask"), self._need(node, "lut")
        codes = arithmetic.scattered(mask, self._need(node, "indices_nonzero_data")).values
        axis = self._tensor(node, "vector_axis")
        dense = arithmetic.look_up(codes, lut, axis)
        is_nonzero = mask.values
        if axis is not None:
            is_nonzero = np.repeat(
                is_nonzero, lut.values.shape[-1], arithmetic.axis_of(axis, is_nonzero.ndim)
            )
        return [Tensor(mask.dtype, is_nonzero), Tensor(lut.dtype, dense[is_nonzero != 0])]

    def _sparse_blockwise_shift_scale(self, node: Node) -> list[Tensor]:
        mask, scale = self._need(node, "data_mask"), self._need(node, "scale")
        data = arithmetic.scattered(mask, self._need(node, "nonzero_data"))
        dense = arithmetic.shift_scale(data, scale, self._tensor(node, "offset"))
        return [mask, Tensor(scale.dtype, dense[mask.values != 0])]

    def _cast(self, node: Node) -> list[Tensor]:
        source = self._need(node, "source_val")
        if source.dtype.name != "float16":
            msg = f"source_val must be float16, got {source.dtype.name}"
            raise ValueError(msg)
        return [values.of_array(source.values.astype(np.float32))]


_OUTPUTS = {
    "constexpr_affine_dequantize": Decoder._affine_dequantize,
    "constexpr_sparse_to_dense": Decoder._sparse_to_dense,
    "constexpr_lut_to_dense": Decoder._lut_to_dense,
    "constexpr_blockwise_shift_scale": Decoder._blockwise_shift_scale,
    "constexpr_lut_to_sparse": Decoder._lut_to_sparse,
    "constexpr_sparse_blockwise_shift_scale": Decoder._sparse_blockwise_shift_scale,
    _CAST: Decoder._cast,
}
# The ops that `Decoder` knows.
DECODED = frozenset(_OUTPUTS)


def _check_declared(node: Node, dtype: str, shape: tuple[int, ...]) -> None:
    """Refuse another type (unless empty) or shape than an op's output declares."""
    declared = node.type
    if declared is None:
        return
    if shape != declared.shape:
        msg = (
            f"{node.name}: {node.op.type} must make the declared shape {declared.shape}, "
            f"got {shape}"
        )
        raise PackageError(msg)
    if dtype and dtype != declared.dtype.name:
        msg = (
            f"{node.name}: {node.op.type} must make the declared {declared.dtype.name}, got {dtype}"
        )
        raise PackageError(msg)


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
