"""Two graphs, one of which holds weights compressed: what differs must be what is recorded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from milpress.compression.judging import is_pruned, judge
from milpress.errors import fail_verification as fail
from milpress.errors import weight_errors
from milpress.formats import Sparse
from milpress.formats.fidelity import fidelity
from milpress.kernels.threads import in_order
from milpress.mil import proto, values
from milpress.mil.decode import is_compressed, is_constexpr
from milpress.mil.graph import Graph, Node, Scope
from milpress.mil.program import ProgramGraph
from milpress.mil.records import (
    TUNE,
    Promise,
    Step,
    TunedRecord,
    WeightRecords,
    array_digest,
    promise_of,
)
from milpress.progress import Progress
from milpress.show import decibels

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightCheck:
    """What was found of one weight that is stored otherwise than in the source.

    Parameters
    ----------
    name
        Name of the weight in the source.
    promise
        What was checked of every element: ``nearest`` (each index names the nearest entry of its
        table), ``half_step`` (each element within half a step), ``pruned`` (zeros exactly where
        pruned, the rest equal; where it is recorded how, in the number and structure asked for, and
        those of least magnitude), ``equal`` (same value, stored otherwise), ``tuned`` (the tuned
        arrays are those of the record, and zeros are where they should be), or ``none`` (nothing,
        but for the number of zeros that was asked for).
    snr_db
        Signal-to-noise ratio.
    signal, noise
        Sums of squares of source and error.
    """

    name: str
    promise: str
    signal: float
    noise: float

    @property
    def snr_db(self) -> float:
        """Signal-to-noise ratio in dB, infinite where the weight is equal."""
        return decibels(self.signal, self.noise) or 0.0


def paired(left: Sequence[_T], right: Sequence[_T], what: str) -> Iterator[tuple[_T, _T]]:
    """Yield pairs of what must be equally many."""
    if len(left) != len(right):
        fail(f"the packages must have equally many {what}, got {len(left)} and {len(right)}")
    return zip(left, right, strict=True)


class Comparison:
    """Compares one block of a function, nested blocks included, with its counterpart.

    Ops that compute must be the same one by one; what they use is compared by who makes it. Stored
    values are matched through the ops that use them.
    """

    def __init__(
        self,
        left: ProgramGraph,
        right: ProgramGraph,
        records: WeightRecords,
        before: WeightRecords,
        tuned: TunedRecord,
        tuned_before: TunedRecord,
    ) -> None:
        self._prefix = left.prefix
        self._graphs = (left, right)
        self._records = records
        self._before = before
        self._tuned = tuned
        self._tuned_before = tuned_before
        self._matches: dict[Node, Node] = {}
        self._sources: dict[Node, Node] = {}
        self._biases: set[Node] = set()
        self.n_unchanged = 0
        self.n_corrected = 0
        # The tuned arrays that are as recorded, by op and parameter.
        self.found_tuned: set[tuple[str, str]] = set()

    def run(self, note: Progress) -> list[WeightCheck]:
        """Compare all and return what was found of each weight; note each stored value."""
        left, right = self._graphs
        for blocks in paired(left.scopes, right.scopes, "blocks"):
            self._match_blocks(*blocks)
        computing = [[n for n in graph.nodes if not n.is_stored] for graph in self._graphs]
        for nodes in paired(computing[0], computing[1], "ops"):
            self.n_unchanged += self._match_ops(*nodes)
        self._match_unused(left, right)
        to_check = self._matches.keys() - self._biases
        pairs = [(node, self._matches[node]) for node in left.nodes if node in to_check]
        checks = in_order(lambda pair: self._check_stored(*pair), pairs)
        outcomes = []
        with contextlib.closing(checks):
            for i, outcome in enumerate(checks):
                outcomes.append(outcome)
                note(i, len(pairs), pairs[i][0].name)
        note(len(pairs), len(pairs), "")
        self.n_unchanged += sum(each for each in outcomes if isinstance(each, int))
        return [each for each in outcomes if isinstance(each, WeightCheck)]

    def _match_blocks(self, one: Scope, other: Scope) -> None:
        same = [
            [item.SerializeToString(deterministic=True) for item in scope.block.inputs]
            + [
                f"{key}={value.SerializeToString(deterministic=True)!r}".encode()
                for key, value in sorted(scope.block.attributes.items())
            ]
            for scope in (one, other)
        ]
        if same[0] != same[1]:
            fail("the inputs or attributes of a block changed")
        for name, other_name in paired(
            list(one.block.outputs), list(other.block.outputs), "outputs of a block"
        ):
            self._match_names(name, one, other_name, other, "a block's output")

    def _match_names(
        self, name: str, scope: Scope, other_name: str, other_scope: Scope, where: str
    ) -> None:
        node, _ = scope.find(name) or (None, None)
        other, _ = other_scope.find(other_name) or (None, None)
        if node is not None and other is not None and node.is_stored and other.is_stored:
            same = self._matches.setdefault(node, other) is other
            if not same or self._sources.setdefault(other, node) is not node:
                fail(f"{where}: {name} must have one counterpart, got {other_name} as another")
        elif name != other_name or (node is None) != (other is None):
            fail(f"{where} must use {name}, got {other_name}")

    def _match_ops(self, one: Node, other: Node) -> int:
        """Check that two ops are the same; return how many values they hold."""
        n_values = 0
        where = f"{self._prefix}{one.name}"
        kept = [self._kept_parts(node) for node in (one, other)]
        keys = [set(node.op.inputs) for node in (one, other)]
        digest = self._records.biases.get(where)
        if digest is not None and digest != self._before.biases.get(where):
            self._check_bias(one, other, digest)
            keys = [key - {"bias"} for key in keys]
        if kept[0] != kept[1] or keys[0] != keys[1]:
            fail(f"{where}: the op {one.op.type} changed")
        for key in sorted(set(one.op.attributes) | set(other.op.attributes)):
            if key not in one.op.attributes or key not in other.op.attributes:
                fail(f"{where}: the attribute {key} must be unchanged")
            n_values += self._match_values(
                one.op.attributes[key], other.op.attributes[key], where, key
            )
        for key in sorted(keys[0]):
            bindings = paired(
                list(one.op.inputs[key].arguments),
                list(other.op.inputs[key].arguments),
                f"values of {key}",
            )
            for binding, other_binding in bindings:
                kinds = binding.WhichOneof("choice"), other_binding.WhichOneof("choice")
                if kinds == ("name", "name"):
                    self._match_names(
                        binding.name, one.scope, other_binding.name, other.scope, where
                    )
                elif kinds == ("value", "value"):
                    n_values += self._match_values(binding.value, other_binding.value, where, key)
                else:
                    fail(f"{where}: {key} must be given in the same way")
        return n_values

    def _check_bias(self, one: Node, other: Node, digest: str) -> None:
        """Check that a layer's bias is as recorded, and that no other op uses it."""
        where = f"{self._prefix}{one.name}"
        before, after = (
            graph.producer(node, "bias")
            for graph, node in zip(self._graphs, (one, other), strict=True)
        )
        if after is None or after[0].op.type != "const":
            fail(f"{where}: the corrected bias is not a constant")
        node = after[0]
        tensor = self._graphs[1].decoder.dense(node)
        if array_digest(tensor.values) != digest:
            fail(f"{where}: the corrected bias differs from the one in the record")
        if before is not None and before[0].type != node.type:
            fail(f"{where}: the corrected bias must be {before[0].type}, got {node.type}")
        n_uses = len(node.uses) + node.is_block_output
        if n_uses != 1:
            fail(f"{where}: the corrected bias must be used once, got {n_uses} uses")
        self._biases.add(node)
        if before is not None and before[0].name == node.name:
            self._biases.add(before[0])
            self._matches[before[0]] = node
        self.n_corrected += 1

    def _kept_parts(self, node: Node) -> list[object]:
        outputs = [item.SerializeToString(deterministic=True) for item in node.op.outputs]
        return [node.op.type, outputs, len(node.op.blocks)]

    def _match_values(self, one: proto.Value, other: proto.Value, where: str, key: str) -> int:
        """Check that two values are the same, or of one type if tuned; return how many are same."""
        digest = self._tuned.digest(where, key)
        if digest is None or digest == self._tuned_before.digest(where, key):
            self._same_value(one, other, where)
            return 1
        types = [value.type.SerializeToString(deterministic=True) for value in (one, other)]
        if types[0] != types[1] or values.is_blob(one) != values.is_blob(other):
            fail(f"{where}: the tuned {key} must be of the type and shape that it had")
        return 0

    def _check_tuned(self, node: Node) -> int:
        """Check that tuned arrays of an op are as recorded; return how many there are."""
        where = f"{self._prefix}{node.name}"
        recorded = self._tuned.arrays.get(where, {})
        for parameter, digest in recorded.items():
            value = values.held(node.op, parameter)
            array = None if value is None else values.read(value, self._graphs[1].source).values
            if array is None or array_digest(array) != digest:
                fail(f"{where}: the tuned {parameter} differs from the one in the record")
            self.found_tuned.add((where, parameter))
        return len(recorded)

    def _same_value(self, one: proto.Value, other: proto.Value, where: str) -> None:
        if not values.is_blob(one) or not values.is_blob(other):
            same = one.SerializeToString(deterministic=True) == other.SerializeToString(
                deterministic=True
            )
        else:
            types = [value.type.SerializeToString(deterministic=True) for value in (one, other)]
            payloads = [
                values.read_payload(value, graph.source)
                for value, graph in zip((one, other), self._graphs, strict=True)
            ]
            same = types[0] == types[1] and np.array_equal(payloads[0], payloads[1])
        if not same:
            fail(f"{where}: changed, though the record says nothing was done to it")

    def _match_unused(self, left: Graph, right: Graph) -> None:
        """Match what no computing op uses by name, and refuse what has no counterpart."""
        reached = {id(node) for node in self._matches.values()}
        for node in list(self._matches.values()):
            reached.update(id(part) for part in self._parts(node, 1))
        reached.update(id(node) for node in self._biases)
        by_name = {
            node.name: node for node in right.nodes if node.is_stored and id(node) not in reached
        }
        own = {id(part) for node in self._matches for part in self._parts(node, 0)}
        for node in left.nodes:
            if node.is_stored and node not in self._matches and id(node) not in own:
                other = by_name.pop(node.name, None)
                if other is None:
                    fail(f"{self._prefix}{node.name}: missing in the compressed package")
                else:
                    self._matches[node] = other
        for name in by_name:
            fail(f"{self._prefix}{name}: added, though the source has no such value")

    def _parts(self, node: Node, side: int) -> Iterator[Node]:
        """Yield the stored ops that an op decodes from."""
        for key in sorted(node.op.inputs):
            producer = self._graphs[side].producer(node, key)
            if producer is not None:
                yield producer[0]
                yield from self._parts(producer[0], side)

    def _check_stored(self, one: Node, other: Node) -> WeightCheck | int:
        """Return what was found of a weight, or how many values are unchanged."""
        name = f"{self._prefix}{one.name}"
        with weight_errors(name):
            return self._check_as_recorded(one, other, name)

    def _check_as_recorded(self, one: Node, other: Node, name: str) -> WeightCheck | int:
        n_tuned = sum(self._check_tuned(node) for node in (other, *self._parts(other, 1)))
        steps = self._steps(name)
        if steps and TUNE in steps[-1] and not n_tuned:
            fail(f"{name}: the record says that it was tuned, but not what came of it")
        if is_constexpr(one) == is_constexpr(other) and not (is_constexpr(one) and steps):
            return self._check_unchanged(one, other, name)
        if all(TUNE in step for step in steps) and is_constexpr(other) and steps:
            self._check_unchanged(one, other, name)
            dense = [
                graph.decoder.dense(node).values
                for graph, node in zip(self._graphs, (one, other), strict=True)
            ]
            signal, noise, _ = fidelity(*dense)
            return WeightCheck(name=name, promise="tuned", signal=signal, noise=noise)
        if one.type != other.type:
            fail(f"{name}: the decoded weight must be {one.type}, got {other.type}")
        source = self._graphs[0].decoder.dense(one).values
        if not is_constexpr(other):
            return self._check_equal(source, other, name)
        if not self._records.by_source:
            return self._check_unpromised(source, other, name)
        if not steps:
            fail(f"{name}: changed, though the record says nothing was done to it")
        promise = promise_of(steps)
        if promise != "pruned" and is_compressed(one, self._graphs[0]):
            was_only_pruned = isinstance(self._graphs[0].decoder.value(one), Sparse)
            promise = promise if was_only_pruned else "none"
        return self._check_promise(source, other, name, promise, steps)

    def _steps(self, name: str) -> tuple[Step, ...]:
        """Return what was done to a weight beyond what had been done to it in the source."""
        known = self._before.find(name)
        before = () if known is None else known[1].steps
        record = self._records.by_source.get(name if known is None else known[0])
        if record is None:
            return ()
        if record.steps[: len(before)] != before:
            fail(f"{name}: its record does not continue the record of the source")
        return record.steps[len(before) :]

    def _check_unchanged(self, one: Node, other: Node, name: str) -> int:
        if one.op.type != other.op.type or one.name != other.name or one.type != other.type:
            fail(f"{name}: changed, though the record says nothing was done to it")
        parts = paired(list(self._parts(one, 0)), list(self._parts(other, 1)), f"parts of {name}")
        return self._match_ops(one, other) + sum(
            self._match_ops(part, other_part) for part, other_part in parts
        )

    def _check_equal(self, source: NDArray[np.floating], other: Node, name: str) -> WeightCheck:
        decoded = self._graphs[1].decoder.dense(other).values
        if source.dtype != decoded.dtype or source.tobytes() != decoded.tobytes():
            fail(f"{name}: the decompressed weight differs from what the source decodes to")
        signal, noise, _ = fidelity(source, source)
        return WeightCheck(name=name, promise="equal", signal=signal, noise=noise)

    def _check_unpromised(
        self, source: NDArray[np.floating], other: Node, name: str
    ) -> WeightCheck:
        """Report the error of a weight of which nothing is recorded."""
        value = self._graphs[1].decoder.value(other)
        decoded = self._graphs[1].decoder.dense(other).values if value is None else value.dense()
        kinds = [f"{array.dtype}{list(array.shape)}" for array in (source, decoded)]
        if kinds[0] != kinds[1]:
            fail(f"{name}: it must be decoded as {kinds[0]}, got {kinds[1]}")
        promise = "pruned" if value is not None and is_pruned(source, value) else "none"
        signal, noise, _ = fidelity(source, decoded)
        return WeightCheck(name=name, promise=promise, signal=signal, noise=noise)

    def _check_promise(
        self,
        source: NDArray[np.floating],
        other: Node,
        name: str,
        promise: Promise,
        steps: tuple[Step, ...],
    ) -> WeightCheck:
        value = self._graphs[1].decoder.value(other)
        if value is None:
            fail(f"{name}: the weight must be compressed as recorded, got {other.op.type}")
        signal, noise, wrong = judge(source, value, promise, steps)
        if wrong:
            fail(f"{name}: {wrong}")
        kept = "tuned" if TUNE in steps[-1] else promise
        return WeightCheck(name=name, promise=kept, signal=signal, noise=noise)
