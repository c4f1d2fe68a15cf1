"""The graph of a function: which op makes a value, who uses it, and edits in place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from milpress.errors import PackageError
from milpress.mil import proto, values
from milpress.mil.values import TensorType

CONSTEXPR = "constexpr_"

# Chains have two or three ops; without a bound, one that doubles with each op would never end.
_MAX_PARTS = 256


class Use(NamedTuple):
    """A place that names a value: a parameter of an op."""

    node: Node
    parameter: str
    binding: proto.Binding

    @property
    def place(self) -> tuple[Node, str]:
        """The op, and its parameter."""
        return self.node, self.parameter


@dataclass(eq=False, slots=True)
class Node:
    """An op where it stands.

    ``uses`` are the parameters that name one of its outputs; ``is_block_output`` says that a block
    returns one. ``n_parts`` counts the stored ops that a ``constexpr_*`` op decodes from, one that
    is reached in two ways twice.
    """

    op: proto.Operation
    scope: Scope
    uses: list[Use] = field(default_factory=list)
    is_block_output: bool = False
    n_parts: int = 0

    @property
    def name(self) -> str:
        """Name of the first output, or the op's type where there is none."""
        return self.op.outputs[0].name if self.op.outputs else self.op.type

    @property
    def op_name(self) -> str:
        """Name of the op itself, which tools that configure ops by name go by."""
        attributes = self.op.attributes
        named = values.read_string(attributes["name"]) if "name" in attributes else ""
        return named or self.name

    @property
    def is_stored(self) -> bool:
        """Whether the op holds a value known before the model runs."""
        return self.op.type == "const" or self.op.type.startswith(CONSTEXPR)

    @property
    def type(self) -> TensorType | None:
        """Type of the first output."""
        return values.type_of(self.op.outputs[0].type) if self.op.outputs else None

    def binding(self, parameter: str) -> proto.Binding | None:
        """Return what a parameter is bound to, the first of several; ``None`` for nothing."""
        if parameter not in self.op.inputs or not self.op.inputs[parameter].arguments:
            return None
        return self.op.inputs[parameter].arguments[0]


@dataclass(eq=False, slots=True)
class Scope:
    """The names that a block defines; those of the blocks around it are seen too."""

    block: proto.Block
    parent: Scope | None
    names: dict[str, tuple[Node | None, proto.ValueType]] = field(default_factory=dict)

    def value(self, name: str) -> Value:
        """Return the value that a name stands for here."""
        scope: Scope | None = self
        while scope is not None and name not in scope.names:
            scope = scope.parent
        return Value(scope or self, name)

    def find(self, name: str) -> tuple[Node | None, proto.ValueType] | None:
        """Return who makes a value (``None`` for an input) and its type, if it is known."""
        return self.value(name).scope.names.get(name)


class Value(NamedTuple):
    """A computed value: the scope that defines it, and its name there."""

    scope: Scope
    name: str

    @property
    def producer(self) -> Node | None:
        """The op that makes it; ``None`` for an input."""
        return self.scope.names[self.name][0]

    @property
    def declared(self) -> proto.ValueType:
        """Its type, as the program declares it."""
        return self.scope.names[self.name][1]

    @property
    def type(self) -> TensorType | None:
        """Its type, if it is a tensor."""
        return values.type_of(self.declared)


class Graph:
    """The ops of one block specialization, nested blocks included, in order.

    Raises
    ------
    PackageError
        If an op names a value that nothing defines, or a name is defined twice.
    """

    def __init__(self, function: proto.Function, block: proto.Block) -> None:
        self.nodes: list[Node] = []
        self.scopes: list[Scope] = []
        self._names: set[str] = set()
        self._before: dict[Node, list[proto.Operation]] = {}
        self._removed: set[Node] = set()
        self.is_applied = False
        inputs = Scope(block, None)
        for item in function.inputs:
            self._define(inputs, item, None)
        self._add_block(block, inputs)

    def _define(self, scope: Scope, item: proto.NamedValueType, node: Node | None) -> None:
        # What decodes a weight is found by name: an op must not come to stand for another.
        hidden = scope.find(item.name) if node is not None and node.is_stored else None
        if hidden is not None or (node is not None and item.name in scope.names):
            msg = f"a name must be defined once, got {item.name!r} again"
            raise PackageError(msg)
        scope.names[item.name] = (node, item.type)
        self._names.add(item.name)

    def _add_block(self, block: proto.Block, parent: Scope) -> None:
        scope = Scope(block, parent)
        self.scopes.append(scope)
        for item in block.inputs:
            self._define(scope, item, None)
        for op in block.operations:
            node = Node(op, scope)
            self.nodes.append(node)
            for parameter, binding in named_bindings(op):
                self._add_use(scope, Use(node, parameter, binding))
            for inner in op.blocks:
                self._add_block(inner, scope)
            for item in op.outputs:
                self._define(scope, item, node)
        for name in block.outputs:
            producer, _ = self._find(scope, name)
            if producer is not None:
                producer.is_block_output = True

    def _add_use(self, scope: Scope, use: Use) -> None:
        producer, _ = self._find(scope, use.binding.name)
        if producer is not None:
            producer.uses.append(use)
            if use.node.is_stored and producer.is_stored:
                use.node.n_parts += 1 + producer.n_parts
                if use.node.n_parts > _MAX_PARTS:
                    msg = (
                        f"{use.node.name}: one weight is decoded by more than {_MAX_PARTS} ops, "
                        "the most that milpress follows"
                    )
                    raise PackageError(msg)

    def _find(self, scope: Scope, name: str) -> tuple[Node | None, proto.ValueType]:
        definition = scope.find(name)
        if definition is None:
            msg = f"an op must use values that exist, got the name {name!r} that nothing defines"
            raise PackageError(msg)
        return definition

    def unique_name(self, name: str) -> str:
        """Return the name, with a number behind it if it is taken, and take it."""
        unique, i = name, 0
        while unique in self._names:
            unique, i = f"{name}_{i}", i + 1
        self._names.add(unique)
        return unique

    def value_type(self, node: Node, parameter: str) -> proto.ValueType | None:
        """Return the ``ValueType`` of what a parameter is bound to, or ``None``."""
        binding = node.binding(parameter)
        if binding is None:
            return None
        if binding.WhichOneof("choice") == "value":
            return binding.value.type
        return self._find(node.scope, binding.name)[1]

    def constant(self, node: Node, parameter: str) -> proto.Value | None:
        """Return the ``Value`` that a parameter is bound to, if it is a constant."""
        binding = node.binding(parameter)
        if binding is None:
            return None
        if binding.WhichOneof("choice") == "value":
            return binding.value
        producer, _ = self._find(node.scope, binding.name)
        if producer is None or producer.op.type != "const":
            return None
        return producer.op.attributes["val"]

    def scalar(self, node: Node, parameter: str) -> float | None:
        """Return the one number that a parameter is bound to; ``None`` if it is not known."""
        stored = self.constant(node, parameter)
        return None if stored is None else values.read_scalar(stored)

    def producer(self, node: Node, parameter: str) -> tuple[Node, str] | None:
        """Return the op that makes what a parameter is bound to, and the value's name."""
        binding = node.binding(parameter)
        if binding is None or binding.WhichOneof("choice") != "name":
            return None
        producer, _ = self._find(node.scope, binding.name)
        return None if producer is None else (producer, binding.name)

    def insert_before(self, node: Node, ops: Iterable[proto.Operation]) -> None:
        """Note ops to be put before another one by `apply`."""
        self._before.setdefault(node, []).extend(ops)

    def remove(self, nodes: Iterable[Node]) -> None:
        """Note ops to be taken out by `apply`, if nothing that stays uses them."""
        self._removed.update(nodes)

    def needed(self, nodes: Iterable[Node]) -> set[Node]:
        """Return those of some ops that other ops use, as the graph is by now."""
        candidates = set(nodes)
        if not candidates:
            return set()
        inserted = [op for ops in self._before.values() for op in ops]
        names = {name for scope in self.scopes for name in scope.block.outputs}
        for op in (*inserted, *(node.op for node in self.nodes if node not in candidates)):
            names.update(binding.name for _, binding in named_bindings(op))
        # An op that takes the place of another may have its name.
        names.difference_update(item.name for op in inserted for item in op.outputs)
        needed = set()
        # An op comes after those that it uses.
        for node in reversed(self.nodes):
            if node in candidates and any(item.name in names for item in node.op.outputs):
                needed.add(node)
                names.update(binding.name for _, binding in named_bindings(node.op))
        return needed

    def apply(self) -> None:
        """Carry out the noted insertions and removals. The graph is of no use afterwards."""
        self.is_applied = True
        self._removed -= self.needed(self._removed)
        changed = {id(node.scope) for node in (*self._before, *self._removed)}
        # Innermost blocks first: rebuilding a list copies its ops with the blocks in them.
        for scope in reversed([scope for scope in self.scopes if id(scope) in changed]):
            ops: list[proto.Operation] = []
            for node in self.nodes:
                if node.scope is scope:
                    ops.extend(self._before.get(node, []))
                    ops.extend([] if node in self._removed else [node.op])
            del scope.block.operations[:]
            scope.block.operations.extend(ops)


def named_bindings(op: proto.Operation) -> Iterator[tuple[str, proto.Binding]]:
    """Yield the parameters of an op that name a value; those in blocks of its own aside."""
    for parameter, argument in op.inputs.items():
        for binding in argument.arguments:
            if binding.WhichOneof("choice") == "name":
                yield parameter, binding


def new_op(kind: str, name: str, **inputs: str) -> proto.Operation:
    """Return an op that takes named values and has one output of its own name.

    The output's type is still to be said.
    """
    op = proto.Operation(type=kind)
    op.attributes["name"].CopyFrom(values.string(name))
    for parameter, source in inputs.items():
        op.inputs[parameter].arguments.add(name=source)
    op.outputs.add(name=name)
    return op


def new_const(name: str, value: proto.Value) -> proto.Operation:
    """Return the ``const`` op of a ``Value``."""
    op = new_op("const", name)
    op.attributes["val"].CopyFrom(value)
    op.outputs[0].type.CopyFrom(value.type)
    return op


def all_ops(block: proto.Block) -> Iterator[proto.Operation]:
    """Yield the ops of a block and of those inside it."""
    for op in block.operations:
        yield op
        for inner in op.blocks:
            yield from all_ops(inner)
