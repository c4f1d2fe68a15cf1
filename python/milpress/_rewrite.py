"""Writing the weights of a package anew, one at a time, and pointing its model to them."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from milpress import _core
from milpress.errors import UnsupportedError
from milpress.formats import PalettizeConfig, QuantizeConfig, palettize, quantize, sparsify
from milpress.mil import constexpr, values
from milpress.mil.constexpr import Compressed, Decoder
from milpress.mil.package import Package
from milpress.mil.program import Node
from milpress.mil.weights import Weight, blob_values, weight_files
from milpress.recipe import Treatment


class Sink(Protocol):
    """Where weight files go."""

    def write(self, file_name: str, dtype: int, data: NDArray[np.uint8], padding_bits: int) -> int:
        """Append a blob and return its offset."""

    def copy(
        self,
        file_name: str,
        reader: _core.BlobReader,
        info: _core.BlobInfo,
        dtype: int,
        padding_bits: int,
    ) -> int:
        """Append the data of another blob and return its offset."""


class Counter:
    """A sink that only adds up sizes, for a dry run."""

    def __init__(self) -> None:
        self._ends: dict[str, int] = {}

    @property
    def n_bytes(self) -> int:
        """Size of all weight files."""
        return sum(self._ends.values())

    def write(
        self,
        file_name: str,
        dtype: int,  # noqa: ARG002
        data: NDArray[np.uint8],
        padding_bits: int,  # noqa: ARG002
    ) -> int:
        """Count a blob."""
        return self._add(file_name, data.size)

    def copy(
        self,
        file_name: str,
        reader: _core.BlobReader,  # noqa: ARG002
        info: _core.BlobInfo,
        dtype: int,  # noqa: ARG002
        padding_bits: int,  # noqa: ARG002
    ) -> int:
        """Count a blob."""
        return self._add(file_name, info.n_bytes)

    def _add(self, file_name: str, n_bytes: int) -> int:
        offset = -(-self._ends.get(file_name, 64) // 64) * 64
        self._ends[file_name] = offset + 64 + n_bytes
        return offset


class _Written(NamedTuple):
    op: Any
    n_bytes: int
    suffix: str


class Rewriter:
    """Writes weights to a sink and edits the ops that hold them.

    A blob that several ops share is written once and stays shared.

    Parameters
    ----------
    package
        Where weights come from.
    sink
        Where they go.
    """

    def __init__(self, package: Package, sink: Sink) -> None:
        self._package = package
        self._sink = sink
        self._default_file = next(iter(weight_files(package)), None)
        self._copied: dict[tuple[str, int, int], int] = {}
        self._compressed: dict[Any, _Written] = {}

    def copy(self, node: Node) -> None:
        """Write what an op stores as it is."""
        for value in blob_values(node.op):
            where = value.blobFileValue
            dtype, shape = values.stored_type(value)
            key = (where.fileName, where.offset, dtype.mil)
            if key not in self._copied:
                reader, info = values.locate_blob(value, self._package)
                n_bits = dtype.bits * int(np.prod([size or 0 for size in shape], dtype=np.int64))
                self._copied[key] = self._sink.copy(
                    where.fileName, reader, info, dtype.blob or 0, -n_bits % 8
                )
            where.offset = self._copied[key]

    def compress(self, weight: Weight, treatment: Treatment, *, early: bool) -> int:
        """Turn a weight's ``const`` into a ``constexpr`` op; return the size of what is stored.

        Raises
        ------
        UnsupportedError
            If the weight does not suit the treatment, or would get larger; nothing has changed.
        """
        node = weight.node
        stored = node.op.attributes["val"]
        key = None
        if values.is_blob(stored):
            where = stored.blobFileValue
            axes = weight.channel_axes
            key = (where.fileName, where.offset, weight.shape, axes, treatment, early)
        known = self._compressed.get(key) if key is not None else None
        if known is not None:
            self._adopt(weight, known)
            return known.n_bytes
        value = _compressed(weight, treatment, values.read(stored, self._package).values)
        before = values.n_stored_bytes(stored)
        n_bytes = constexpr.payload_bytes(value, early=early)
        if n_bytes >= before:
            msg = f"would get larger: {before} bytes as it is, {n_bytes} compressed"
            raise UnsupportedError(msg)
        name = weight.graph.unique_name(constexpr.suffixed(node.name, value))
        file_name = where.fileName if key is not None else self._default_file
        constexpr.emit(value, node, name=name, early=early, file_name=file_name, sink=self._sink)
        _rename_uses(node, name)
        if key is not None:
            self._compressed[key] = _Written(node.op, n_bytes, constexpr.suffixed("", value))
        return n_bytes

    def decompress(self, weight: Weight, decoder: Decoder) -> int:
        """Turn the ``constexpr`` op of a weight into a ``const``; return the size stored."""
        node = weight.node
        blob = next(blob_values(node.op), None)
        file_name = self._default_file if blob is None else blob.blobFileValue.fileName
        dense = decoder.dense(node)
        constexpr.emit_const(dense, node, file_name=file_name, sink=self._sink)
        return values.n_stored_bytes(node.op.attributes["val"])

    def _adopt(self, weight: Weight, known: _Written) -> None:
        node = weight.node
        output_type = node.op.outputs[0].type
        name = weight.graph.unique_name(f"{node.name}{known.suffix}")
        twin = type(node.op).FromString(known.op.SerializeToString())
        twin.attributes["name"].CopyFrom(values.string(name))
        twin.outputs[0].name = name
        twin.outputs[0].type.CopyFrom(output_type)
        node.op.CopyFrom(twin)
        _rename_uses(node, name)


def _rename_uses(node: Node, name: str) -> None:
    for use in node.uses:
        use.binding.name = name


def _compressed(weight: Weight, treatment: Treatment, array: Any) -> Compressed:
    output, inputs = weight.channel_axes or (0, 1)
    if isinstance(treatment, PalettizeConfig):
        return palettize(array, treatment, channel_axis=output)
    if isinstance(treatment, QuantizeConfig):
        return quantize(array, treatment, channel_axis=output, input_axis=inputs)
    return sparsify(array, treatment)
