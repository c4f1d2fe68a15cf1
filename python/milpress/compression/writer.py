"""Writing the weights of a package anew, one at a time, and pointing its model to them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from milpress.compression.treating import Corrections, Order, Treated, treat
from milpress.errors import UnsupportedError, weight_errors
from milpress.formats import Compressed, Treatment
from milpress.kernels.device import kernels_for
from milpress.mil import constexpr, values
from milpress.mil.constexpr import Decoder
from milpress.mil.graph import Node
from milpress.mil.package import Package
from milpress.mil.staging import Sink
from milpress.mil.treatments import bias_digest
from milpress.mil.weights import Weight, blob_places, blob_values, weight_files


class Done(NamedTuple):
    """What `Rewriter.compress` did: bytes stored, treatments applied, and why others were not."""

    n_bytes: int
    treatments: tuple[Treatment, ...]
    notes: tuple[str, ...]
    corrections: Corrections
    fed_back: tuple[bool, ...] = ()


class _Written(NamedTuple):
    ops: list[Any]
    suffix: str
    done: Done


def is_own(bias: Node) -> bool:
    """Whether a constant is used once, so that it can change in place."""
    return len(bias.uses) == 1 and not bias.is_block_output


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
        self._ordered: set[Any] = set()
        self._kernels = kernels_for(None)

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

    def treated(self, order: Order) -> Treated | UnsupportedError | None:
        """Return what the treatments make of a weight, or why they make nothing.

        Changes nothing, so that it may run on any thread. ``None`` for a weight that shares the
        result of one ordered before.
        """
        if order.is_repeated:
            return None
        try:
            with weight_errors(order.weight.name):
                return self._treated(order)
        except UnsupportedError as error:
            return error

    def _treated(self, order: Order) -> Treated:
        decoder = Decoder(order.weight.graph, self._package)
        room = contextlib.nullcontext() if order.inputs is None else order.inputs.room()
        with room:
            return treat(order, decoder, self._kernels)

    def order(
        self, weight: Weight, treatments: Sequence[Treatment], *, early: bool, **advice: Any
    ) -> Order:
        """Return what is to be done to a weight; ``advice`` is what samples say of it."""
        stored = Decoder(weight.graph, self._package).stored_values(weight.node)
        key = self._key(weight, stored, treatments, early)
        is_repeated = key is not None and key in self._ordered
        self._ordered.add(key)
        n_bytes = sum(values.n_stored_bytes(value) for value in stored)
        return Order(weight, tuple(treatments), early, key, is_repeated, n_bytes, **advice)

    def compress(
        self, order: Order, made: Treated | UnsupportedError | None, *, may_grow: bool
    ) -> Done:
        """Turn a weight's op into the last ``constexpr`` op of what the treatments made of it.

        A treatment that does not suit what others made is not applied. Ops that have to stand
        before it, or are of no use anymore, are noted in the weight's graph.

        Raises
        ------
        UnsupportedError
            If the weight suits none of the treatments, or would get larger and may not; nothing has
            changed.
        """
        weight, early = order.weight, order.early
        node = weight.node
        known = self._compressed.get(order.key)
        if known is not None:
            self._adopt(weight, known)
            return known.done
        if isinstance(made, UnsupportedError):
            raise made
        # Nothing was made of a repeated weight; here the one ordered before it was left as it was.
        made = made or self._treated(order)
        value, suffix = made.value, made.suffix
        n_bytes = constexpr.payload_bytes(value, early=early)
        if n_bytes >= order.n_bytes and not may_grow:
            msg = f"would get larger: {order.n_bytes} bytes as it is, {n_bytes} compressed"
            raise UnsupportedError(msg)
        inner = self.store(weight, value, suffix=suffix, early=early)
        done = Done(n_bytes, made.treatments, made.notes, made.corrections, made.fed_back)
        if order.key is not None:
            self._compressed[order.key] = _Written([*inner, node.op], suffix, done)
        return done

    def store(
        self, weight: Weight, value: Compressed, *, suffix: str = "", early: bool = False
    ) -> list[Any]:
        """Turn a weight's op into the last ``constexpr`` op of a value.

        Returns the ops that have to stand before it. These, and ops that are of no use anymore, are
        noted in the weight's graph.
        """
        node = weight.node
        decoder = Decoder(weight.graph, self._package)
        name = f"{node.name}{suffix}"
        if suffix:
            name = weight.graph.unique_name(name)
        blob = next(
            (stored for stored in decoder.stored_values(node) if values.is_blob(stored)), None
        )
        file_name = self._default_file if blob is None else blob.blobFileValue.fileName
        weight.graph.remove(decoder.parts(node))
        inner = constexpr.emit(
            value,
            node,
            names=weight.graph.unique_name,
            name=name,
            early=early,
            file_name=file_name,
            sink=self._sink,
        )
        weight.graph.insert_before(node, inner)
        _rename_uses(node, name)
        return inner

    def bias_of(self, weight: Weight, layer: Node) -> Node | None:
        """Return the constant that is a layer's bias, if it is one; it may be cast."""
        found = weight.graph.producer(layer, "bias")
        if found is None or not found[0].is_stored:
            return None
        return None if constexpr.is_compressed(found[0], weight.graph) else found[0]

    def correct(self, weight: Weight, layer: Node, correction: NDArray[np.float64]) -> str:
        """Add to the bias of a layer; return the digest of the new one, empty if it can't have one.

        A bias of its own is changed in place. Where it has none, or others use it too, it gets one.
        """
        bias = self.bias_of(weight, layer)
        is_given = "bias" in layer.op.inputs and bool(layer.op.inputs["bias"].arguments)
        if bias is None and is_given:
            return ""
        decoder = Decoder(weight.graph, self._package)
        if bias is None:
            before = values.Tensor(weight.dtype, np.zeros(correction.shape, weight.dtype.storage))
        else:
            before = decoder.dense(bias)
        if before.dtype.name not in ("float16", "float32"):
            return ""
        with np.errstate(over="ignore"):
            after = (before.values + correction).astype(before.values.dtype)
        if after.shape != correction.shape or not np.isfinite(after).all():
            return ""
        tensor = values.Tensor(before.dtype, after)
        if bias is not None and is_own(bias):
            constexpr.emit_const(tensor, bias, file_name=self._default_file, sink=self._sink)
        else:
            name = weight.graph.unique_name(f"{layer.name}_bias")
            op = constexpr.const_of(tensor, name, file_name=self._default_file, sink=self._sink)
            weight.graph.insert_before(layer, [op])
            del layer.op.inputs["bias"].arguments[:]
            layer.op.inputs["bias"].arguments.add(name=name)
        return bias_digest(after)

    def _key(
        self, weight: Weight, stored: list[Any], treatments: Sequence[Treatment], early: bool
    ) -> Any:
        """Return what tells weights apart whose results can't be shared; None if none can be."""
        places = blob_places(stored)
        if not places:
            return None
        kind = (weight.node.op.type, weight.shape, weight.channel_axes)
        return (places, kind, tuple(treatments), early)

    def decompress(self, weight: Weight, decoder: Decoder) -> int:
        """Turn the ``constexpr`` op of a weight into a ``const``; return the size stored."""
        node = weight.node
        blob = next(blob_values(node.op), None)
        file_name = self._default_file if blob is None else blob.blobFileValue.fileName
        dense = decoder.dense(node)
        constexpr.emit_const(dense, node, file_name=file_name, sink=self._sink)
        return values.n_stored_bytes(node.op.attributes["val"])

    def _adopt(self, weight: Weight, known: _Written) -> None:
        """Make a weight's op, and those before it, twins of ones that are written already."""
        node = weight.node
        output_type = node.op.outputs[0].type
        name = f"{node.name}{known.suffix}"
        if known.suffix:
            name = weight.graph.unique_name(name)
        base = known.ops[-1].outputs[0].name
        renamed = {base: name}
        twins = [type(op).FromString(op.SerializeToString()) for op in known.ops]
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
        weight.graph.remove(Decoder(weight.graph, self._package).parts(node))
        weight.graph.insert_before(node, twins[:-1])
        node.op.CopyFrom(twins[-1])
        _rename_uses(node, name)


def _rename(op: Any, renamed: dict[str, str]) -> None:
    """Give an op, its outputs and what it uses other names."""
    own = values.read_string(op.attributes["name"])
    op.attributes["name"].CopyFrom(values.string(renamed.get(own, own)))
    for output in op.outputs:
        output.name = renamed.get(output.name, output.name)
    for argument in op.inputs.values():
        for binding in argument.arguments:
            if binding.WhichOneof("choice") == "name":
                binding.name = renamed.get(binding.name, binding.name)


def _rename_uses(node: Node, name: str) -> None:
    for use in node.uses:
        use.binding.name = name
