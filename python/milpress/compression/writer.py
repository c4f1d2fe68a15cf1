"""Writing the weights of a package anew, one at a time, and pointing its model to them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from milpress.compression.run import Run
from milpress.compression.treating import Job, Outcome
from milpress.errors import UnsupportedError
from milpress.formats import Compressed
from milpress.mil import decode, encode, proto, values
from milpress.mil.graph import Node, named_bindings, new_const
from milpress.mil.package import Package
from milpress.mil.program import Weight
from milpress.mil.records import array_digest
from milpress.mil.staging import Counter, Sink, Staged
from milpress.mil.values import blob_values

_T = TypeVar("_T")


class Written(NamedTuple):
    """What `WeightWriter.compress` wrote: the ops of a weight, last first, and of what outcome."""

    ops: list[proto.Operation]
    n_bytes: int
    outcome: Outcome


def is_own(bias: Node) -> bool:
    """Whether a constant is used once, so that it can change in place."""
    return len(bias.uses) == 1 and not bias.is_block_output


def bias_of(weight: Weight, layer: Node) -> Node | None:
    """Return the constant that is a layer's bias, if it is one; it may be cast."""
    producer = weight.graph.producer(layer, "bias")
    if producer is None or not producer[0].is_stored:
        return None
    return None if decode.is_compressed(producer[0], weight.graph) else producer[0]


class WeightWriter:
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
        self._default_file = next(iter(package.weight_files), None)
        self._copied: dict[tuple[str, int, int], int] = {}
        self._written: dict[Any, Written] = {}
        self._replaced: dict[tuple[str, int], int] = {}

    def commit(self, check: Callable[[Package, Package], _T] | None) -> tuple[_T | None, int]:
        """Finish the package, check it and move it to its destination.

        Parameters
        ----------
        check
            Called with the source as it was opened and the result, if one is written.

        Returns
        -------
        tuple
            What the check returned, and the size of the package.
        """
        self._sink.finish(self._package.model)
        checked = None
        if check is not None and self._sink.path is not None:
            checked = check(self._package.reopened(), Package(self._sink.path))
        n_bytes = self._sink.n_bytes
        self._sink.commit()
        return checked, n_bytes

    def copy(self, node: Node) -> None:
        """Write what an op stores as it is."""
        for value in blob_values(node.op):
            where = value.blobFileValue
            kind = values.stored_type(value)
            key = (where.fileName, where.offset, kind.dtype.mil)
            if key not in self._copied:
                blob = values.locate_blob(value, self._package)
                padding_bits = -kind.dtype.bits * kind.n_elements % 8
                self._copied[key] = self._sink.copy(
                    where.fileName, blob, kind.dtype.blob or 0, padding_bits
                )
            where.offset = self._copied[key]

    def replace(self, node: Node, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Write what an op stores as it is, but for parameters that have other numbers.

        These are stored where and as they were; those that share a blob get one again.
        """
        op = node.op
        held = {name: values.held(op, name) for name in arrays}
        places = {}
        for name, value in held.items():
            if value is not None and values.is_blob(value):
                places[name] = (value.blobFileValue.fileName, value.blobFileValue.offset)
                # Set aside, so that its old numbers are not copied.
                value.ClearField("blobFileValue")
        self.copy(node)
        for name, value in held.items():
            if value is None:
                msg = f"{node.name}: the op holds no {name}"
                raise KeyError(msg)
            dtype, _ = values.stored_type(value)
            place = places.get(name)
            if place is None:
                values.write(value, values.Tensor(dtype, arrays[name]))
                continue
            if place not in self._replaced:
                payload, padding_bits = values.packed(values.Tensor(dtype, arrays[name]))
                self._replaced[place] = self._sink.write(
                    place[0], dtype.blob or 0, payload, padding_bits
                )
            value.blobFileValue.fileName, value.blobFileValue.offset = (
                place[0],
                self._replaced[place],
            )

    def compress(self, job: Job, outcome: Outcome, *, may_grow: bool) -> Written:
        """Turn a weight's op into the last ``constexpr`` op of what treatments made of it.

        Ops that have to stand before it, or are of no use anymore, are noted in its graph.

        Raises
        ------
        UnsupportedError
            If the weight would get larger and may not; nothing has changed.
        """
        n_bytes = encode.payload_bytes(outcome.value, job.weight.graph.opset)
        if n_bytes >= job.n_bytes and not may_grow:
            msg = (
                f"left as it is: compressed it would be larger ({n_bytes:,} bytes instead of "
                f"{job.n_bytes:,})"
            )
            raise UnsupportedError(msg)
        inner = self.store(job.weight, outcome.value, suffix=outcome.suffix)
        written = Written([*inner, job.weight.node.op], n_bytes, outcome)
        if job.key is not None:
            self._written[job.key] = written
        return written

    def repeat(self, job: Job) -> Written | None:
        """Make a weight the twin of one that shares its blob; ``None`` if none is written yet."""
        written = self._written.get(job.key)
        if written is not None:
            self._adopt(job.weight, written)
        return written

    def store(
        self, weight: Weight, value: Compressed, *, suffix: str = ""
    ) -> list[proto.Operation]:
        """Turn a weight's op into the last ``constexpr`` op of a value.

        Returns the ops that have to stand before it. These, and ops that are of no use anymore, are
        noted in the weight's graph.
        """
        node = weight.node
        name = f"{node.name}{suffix}"
        if suffix:
            name = weight.graph.unique_name(name)
        blob = next((stored for stored in weight.stored if values.is_blob(stored)), None)
        file_name = self._default_file if blob is None else blob.blobFileValue.fileName
        weight.graph.remove(weight.parts)
        inner = encode.emit(
            value,
            node,
            names=weight.graph.unique_name,
            name=name,
            opset=weight.graph.opset,
            file_name=file_name,
            sink=self._sink,
        )
        weight.graph.insert_before(node, inner)
        _rename_uses(node, name)
        return inner

    def correct(self, weight: Weight, layer: Node, correction: NDArray[np.float64]) -> str:
        """Add to the bias of a layer; return the digest of the new one, empty if it can't have one.

        A bias of its own is changed in place. Where it has none, or others use it too, it gets one.
        """
        bias = bias_of(weight, layer)
        if bias is None and layer.binding("bias") is not None:
            return ""
        if bias is None:
            before = values.Tensor(weight.dtype, np.zeros(correction.shape, weight.dtype.storage))
        else:
            before = weight.graph.decoder.dense(bias)
        if before.dtype.name not in ("float16", "float32"):
            return ""
        with np.errstate(over="ignore"):
            after = (before.values + correction).astype(before.values.dtype)
        if after.shape != correction.shape or not np.isfinite(after).all():
            return ""
        tensor = values.Tensor(before.dtype, after)
        if bias is not None and is_own(bias):
            self.store_const(tensor, bias, self._default_file)
        else:
            name = weight.graph.unique_name(f"{layer.name}_bias")
            op = self.const(tensor, name, self._default_file)
            weight.graph.insert_before(layer, [op])
            del layer.op.inputs["bias"].arguments[:]
            layer.op.inputs["bias"].arguments.add(name=name)
        return array_digest(after)

    def store_const(self, tensor: values.Tensor, node: Node, file_name: str | None) -> None:
        """Turn an op into the ``const`` op of a tensor; its name stays."""
        node.op.CopyFrom(self.const(tensor, node.name, file_name))

    def const(self, tensor: values.Tensor, name: str, file_name: str | None) -> proto.Operation:
        """Return the ``const`` op of a tensor, which is stored in a file, or if small in itself."""
        value = proto.Value()
        values.write(value, tensor, file_name=file_name, sink=self._sink)
        return new_const(name, value)

    def decompress(self, weight: Weight) -> int:
        """Turn the ``constexpr`` op of a weight into a ``const``; return the size stored."""
        node = weight.node
        blob = next(blob_values(node.op), None)
        file_name = self._default_file if blob is None else blob.blobFileValue.fileName
        dense = weight.graph.decoder.dense(node)
        self.store_const(dense, node, file_name)
        return values.n_stored_bytes(node.op.attributes["val"])

    def _adopt(self, weight: Weight, written: Written) -> None:
        """Make a weight's op, and those before it, twins of ones that are written already."""
        node = weight.node
        output_type = node.op.outputs[0].type
        name = f"{node.name}{written.outcome.suffix}"
        if written.outcome.suffix:
            name = weight.graph.unique_name(name)
        base = written.ops[-1].outputs[0].name
        renamed = {base: name}
        twins = [type(op).FromString(op.SerializeToString()) for op in written.ops]
        for twin in twins[:-1]:
            old = values.read_string(twin.attributes["name"])
            new = weight.graph.unique_name(old.replace(base, name, 1))
            renamed[old] = new
            renamed.update(
                {output.name: output.name.replace(old, new, 1) for output in twin.outputs}
            )
        for twin in twins:
            _rename(twin, renamed)
        twins[-1].outputs[0].type.CopyFrom(output_type)
        weight.graph.remove(weight.parts)
        weight.graph.insert_before(node, twins[:-1])
        node.op.CopyFrom(twins[-1])
        _rename_uses(node, name)


@contextlib.contextmanager
def rewriting(
    package: Package, destination: str | os.PathLike[str], run: Run
) -> Iterator[WeightWriter]:
    """Give what writes a package anew beside its destination; a dry run counts its size alone.

    All but the model and the weight files is copied. Nothing reaches the destination before
    `WeightWriter.commit`, and nothing is left of it if the block ends without.
    """
    if run.dry_run:
        yield WeightWriter(package, Counter(package))
        return
    with Staged(package, Path(destination), force=run.force) as staged:
        staged.copy_rest(set(package.weight_files))
        yield WeightWriter(package, staged)


def _rename(op: proto.Operation, renamed: dict[str, str]) -> None:
    """Give an op, its outputs and what it uses other names."""
    own = values.read_string(op.attributes["name"])
    op.attributes["name"].CopyFrom(values.string(renamed.get(own, own)))
    for output in op.outputs:
        output.name = renamed.get(output.name, output.name)
    for _, binding in named_bindings(op):
        binding.name = renamed.get(binding.name, binding.name)


def _rename_uses(node: Node, name: str) -> None:
    for use in node.uses:
        use.binding.name = name
