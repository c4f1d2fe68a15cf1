"""Functions ready to run: their ops in order, bound to the values that they read."""

from __future__ import annotations

import functools
import math
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from milpress.errors import PackageError, UnsupportedOpError
from milpress.interpreter import ops
from milpress.interpreter.constants import Budget, Caster, Weight, caster, constant, held_as
from milpress.interpreter.operator import Call, Operator
from milpress.mil import opset, proto, values
from milpress.mil.decode import is_constexpr
from milpress.mil.graph import Node
from milpress.mil.lookups import lookup_sizes
from milpress.mil.opset import Opset
from milpress.mil.program import ProgramGraph
from milpress.mil.values import TensorType, WeightSource

# Larger constants are decoded when they are first needed.
_MAX_EAGER_ELEMENTS = 1024

Observe = Callable[[str, Any], None]
Replace = Callable[[str, Any], Any]


@dataclass(slots=True)
class Frame:
    """What one run holds: by slot, constants and the values that still have readers."""

    slots: list[Any]
    generator: torch.Generator
    watched: Mapping[int, str] = field(default_factory=dict)
    observe: Observe | None = None
    replace: Replace | None = None
    step: Step | None = None

    def read(self, slot: int | list[int]) -> Any:
        """Return the value in a slot, or those in several; a weight is decoded."""
        if isinstance(slot, list):
            return [self.read(each) for each in slot]
        value = self.slots[slot]
        return value.tensor() if isinstance(value, Weight) else value

    def write(self, slot: int, value: Any) -> None:
        """Put a value, or what replaces it, into a slot, and show it to who watches it."""
        if slot in self.watched:
            if self.observe is not None:
                self.observe(self.watched[slot], value)
            if self.replace is not None:
                value = self.replace(self.watched[slot], value)
        self.slots[slot] = value

    def show(self, slot: int, operand: Callable[[], Tensor]) -> None:
        """Show what a weight is multiplied by to who watches the slot that stands for it."""
        if self.observe is not None and slot in self.watched:
            self.observe(self.watched[slot], operand())

    def drop(self, slots: Sequence[int]) -> None:
        """Let go of the values in some slots."""
        for slot in slots:
            self.slots[slot] = None


@dataclass(slots=True, kw_only=True)
class Step:
    """An op, bound: its settings are known, what else it takes is in slots.

    ``operands`` are the slots that stand for what its weights are multiplied by inside, ``spent``
    those that nobody reads any more once it has run.
    """

    kind: str
    place: str
    operator: Operator
    opset: Opset
    settings: dict[str, Any]
    reads: dict[str, int | list[int]]
    writes: list[tuple[int, Caster | None]]
    dtype: torch.dtype | None
    blocks: tuple[Block, ...]
    operands: dict[str, int]
    spent: tuple[int, ...] = ()

    def run(self, frame: Frame) -> None:
        """Compute the op."""
        frame.step = self
        arguments = {name: frame.read(slot) for name, slot in self.reads.items()}
        arguments = self.settings | self.operator.bound(arguments)
        if self.operator.takes_call:
            arguments["call"] = Call(
                dtype=self.dtype,
                generator=frame.generator,
                blocks=[functools.partial(block.run, frame) for block in self.blocks],
                show=lambda parameter, operand: frame.show(self.operands[parameter], operand),
            )
        output = self.operator.function(**arguments)
        if self.writes:
            results = output if isinstance(output, tuple) else (output,)
            for (slot, cast), result in zip(self.writes, results, strict=True):
                frame.write(slot, result if cast is None else cast(result))
        frame.drop(self.spent)

    def slots_read(self) -> Iterator[int]:
        """Yield the slots that the op and its blocks read from around it."""
        for slot in self.reads.values():
            yield from slot if isinstance(slot, list) else [slot]
        for block in self.blocks:
            yield from block.reads


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Steps in order, from the slots of the inputs to those of the outputs.

    ``reads`` are the slots around the block that it uses, ``owned`` those that are free after it.
    """

    inputs: tuple[int, ...]
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]
    reads: frozenset[int]
    owned: tuple[int, ...]

    def run(self, frame: Frame, *arguments: Any) -> tuple[Any, ...]:
        """Compute the outputs."""
        for slot, argument in zip(self.inputs, arguments, strict=True):
            frame.write(slot, argument)
        for step in self.steps:
            step.run(frame)
        results = tuple(frame.read(slot) for slot in self.outputs)
        frame.drop(self.owned)
        return results

    def all_steps(self) -> Iterator[Step]:
        """Yield the steps, behind each op those of the blocks that it has."""
        for step in self.steps:
            yield step
            for inner in step.blocks:
                yield from inner.all_steps()


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionInput:
    """An input of a function: its slot, its type as a tensor, and whether it is a state."""

    slot: int
    type: TensorType
    is_state: bool
    cast: Caster


@dataclass(frozen=True, slots=True, kw_only=True)
class Function:
    """A function, ready to run.

    ``stored`` is every slot as a run begins, constants and weights in theirs, and ``names`` are
    those of what is stored. ``watchable`` has slots and type of each value that is computed, by
    name, inputs included: more than one slot if nested blocks use the name for different values. A
    type is ``None`` where a value is no tensor. ``operands`` are slots that stand for what weights
    are multiplied by inside an op, which is no value of the program, by names that no value has.
    ``lookups`` are the inputs that are indices of lookups, with the rows of their smallest table.
    """

    inputs: dict[str, FunctionInput]
    outputs: tuple[str, ...]
    output_types: tuple[TensorType | None, ...]
    block: Block
    stored: list[Any]
    names: dict[int, str]
    watchable: dict[str, tuple[list[int], TensorType | None]]
    operands: dict[str, list[int]]
    lookups: dict[str, int]

    def slots_named(self, name: str) -> Sequence[int]:
        """Return the slots of the values or operands of a name."""
        if name in self.watchable:
            return self.watchable[name][0]
        return self.operands.get(name, ())

    @property
    def op_types(self) -> dict[str, str]:
        """Type of the op that computes each watchable value; inputs are not among them."""
        kinds = {slot: step.kind for step in self.block.all_steps() for slot, _ in step.writes}
        lasts = {name: slots[-1] for name, (slots, _) in self.watchable.items()}
        return {name: kinds[last] for name, last in lasts.items() if last in kinds}


def operand_name(value: str, parameter: str) -> str:
    """Return what is watched to see the operand of a weight of the op that computes a value."""
    return f"{value}: {parameter}"


class Binder:
    """Makes a function of a package ready to run: each value gets a slot, ops are bound to them.

    With ``rounds``, values that are declared as float16 are rounded to it. ``place`` is where the
    function stands, for messages.
    """

    def __init__(
        self,
        function: proto.Function,
        place: str,
        source: WeightSource,
        *,
        rounds: bool,
        budget: Budget,
    ) -> None:
        self._function = function
        self._place = place
        self._source = source
        self._rounds = rounds
        self._budget = budget
        self._opset = opset.by_name(function.opset)
        if function.opset not in function.block_specializations:
            msg = f"{place}: the function has no block for its opset {function.opset}"
            raise PackageError(msg)
        self._body = function.block_specializations[function.opset]
        graph = ProgramGraph(function, self._body, source)
        self._lookups = lookup_sizes(graph, (item.name for item in function.inputs))
        # The graph lists its nodes in the order in which this class walks the blocks.
        self._nodes = iter(graph.nodes)
        self._decoder = graph.decoder
        self._stored: list[Any] = []
        self._stored_names: dict[int, str] = {}
        self._types: list[TensorType | None] = []
        self._watchable: dict[str, tuple[list[int], TensorType | None]] = {}
        self._operands: dict[str, list[int]] = {}

    def function(self) -> Function:
        """Return the function, unless an op is not covered or the format is broken."""
        names: ChainMap[str, int] = ChainMap()
        inputs = {item.name: self._input(item, names) for item in self._function.inputs}
        block = self._block(self._body, names, first=0)
        return Function(
            inputs=inputs,
            outputs=tuple(self._body.outputs),
            output_types=tuple(self._types[slot] for slot in block.outputs),
            block=block,
            stored=self._stored,
            names=self._stored_names,
            watchable=self._watchable,
            operands=self._operands,
            lookups=self._lookups,
        )

    def _slot(self, value: Any = None, kind: TensorType | None = None) -> int:
        self._stored.append(value)
        self._types.append(kind)
        return len(self._stored) - 1

    def _value(self, item: proto.NamedValueType, names: ChainMap[str, int]) -> int:
        """Give a value that is computed a slot and its name."""
        kind = values.type_of(item.type)
        slot = self._slot(kind=kind)
        names[item.name] = slot
        self._watchable.setdefault(item.name, ([], kind))[0].append(slot)
        return slot

    def _input(self, item: proto.NamedValueType, names: ChainMap[str, int]) -> FunctionInput:
        is_state = item.type.HasField("stateType")
        kind = values.type_of(item.type.stateType.wrappedType if is_state else item.type)
        if kind is None:
            msg = f"{self._place}: an input must be a tensor or a state, got {item.name!r}"
            raise PackageError(msg)
        slot = self._slot(kind=kind) if is_state else self._value(item, names)
        names[item.name] = slot
        cast = caster(kind.dtype, rounds=self._rounds)
        return FunctionInput(slot=slot, type=kind, is_state=is_state, cast=cast)

    def _block(self, block: proto.Block, names: ChainMap[str, int], first: int) -> Block:
        """Bind a block, to which all slots from ``first`` on belong."""
        inputs = tuple(self._value(item, names) for item in block.inputs)
        steps = []
        for _ in block.operations:
            node = next(self._nodes)
            operator = self._operator(node)
            if operator is None:
                self._store(node, names)
            else:
                steps.append(self._step(node, operator, names))
        outputs = tuple(self._find(name, names) for name in block.outputs)
        needed = set(outputs)
        for step in reversed(steps):
            used = {*step.slots_read(), *(slot for slot, _ in step.writes)}
            computed = {slot for slot in used if slot >= first and self._stored[slot] is None}
            step.spent = tuple(sorted(computed - needed))
            needed |= used
        ends = {*inputs, *outputs}
        return Block(
            inputs=inputs,
            steps=tuple(steps),
            outputs=outputs,
            reads=frozenset(slot for slot in needed if slot < first),
            owned=tuple(s for s in sorted(ends) if s >= first and self._stored[s] is None),
        )

    def _store(self, node: Node, names: ChainMap[str, int]) -> None:
        if not node.op.outputs:
            return
        # Of several outputs, all but the last are masks, which only other such ops use.
        output = node.op.outputs[-1]
        kind = values.type_of(output.type)
        small = kind is None or (
            None not in kind.shape and math.prod(kind.fixed_shape) <= _MAX_EAGER_ELEMENTS
        )
        if small and not is_constexpr(node):
            value = self._constant(node.op.attributes["val"], node)
        else:
            value = Weight(node, self._decoder, self._budget)
        names[output.name] = self._slot(value, kind)
        self._stored_names[names[output.name]] = output.name

    def _constant(self, value: proto.Value, node: Node) -> Any:
        try:
            return constant(value, self._source)
        except PackageError as error:
            msg = f"{self._place_of(node)}: {error}"
            raise PackageError(msg) from error

    def _find(self, name: str, names: ChainMap[str, int]) -> int:
        if name not in names:
            msg = f"{self._place}: an op must use values that exist already, got {name!r}"
            raise PackageError(msg)
        return names[name]

    def _place_of(self, node: Node) -> str:
        return f"{self._place}, op {(node.name if node.op.outputs else node.op_name)!r}"

    def _operator(self, node: Node) -> Operator | None:
        """Return what computes an op; ``None`` if it is stored."""
        version = self._opset.version
        uncovered = ops.uncovered(node.op, version)
        if uncovered:
            place = self._place_of(node)
            raise UnsupportedOpError(node.op.type, self._opset.target, place, uncovered)
        return ops.find(node.op.type, version)

    def _step(self, node: Node, operator: Operator, names: ChainMap[str, int]) -> Step:
        op, place = node.op, self._place_of(node)
        settings: dict[str, Any] = {}
        reads: dict[str, int | list[int]] = {}
        for parameter, bindings in _bindings(op):
            slots = [self._bound(binding, names, node) for binding in bindings]
            held = [self._stored[slot] for slot in slots]
            is_known = all(value is not None for value in held)
            scalars = all(isinstance(value, Tensor) and not value.ndim for value in held)
            form, _ = operator.forms[parameter]
            single = len(slots) == 1 and form != "list[object]"
            if is_known and (scalars or form not in ("Tensor", "list[Tensor]")):
                known = [v.tensor() if isinstance(v, Weight) else v for v in held]
                settings[parameter] = known[0] if single else known
            else:
                reads[parameter] = slots[0] if single else slots
        try:
            settings = operator.bound(settings)
        except (TypeError, ValueError, RuntimeError) as error:
            msg = f"{place}: the constants of {op.type} must suit its parameters: {error}"
            raise PackageError(msg) from error
        blocks = tuple(
            self._block(block, names.new_child(), first=len(self._stored)) for block in op.blocks
        )
        writes = [(self._value(item, names), self._caster(item)) for item in op.outputs]
        first = self._types[writes[0][0]] if writes else None
        return Step(
            kind=op.type,
            place=place,
            operator=operator,
            opset=self._opset,
            settings=settings,
            reads=reads,
            writes=writes,
            dtype=None if first is None else held_as(first.dtype),
            blocks=blocks,
            operands={name: self._operand(node, name) for name in operator.operands},
        )

    def _operand(self, node: Node, parameter: str) -> int:
        slot = self._slot()
        self._operands.setdefault(operand_name(node.name, parameter), []).append(slot)
        return slot

    def _bound(self, binding: proto.Binding, names: ChainMap[str, int], node: Node) -> int:
        if binding.WhichOneof("choice") == "name":
            return self._find(binding.name, names)
        return self._slot(self._constant(binding.value, node))

    def _caster(self, item: proto.NamedValueType) -> Caster | None:
        kind = values.type_of(item.type)
        return None if kind is None else caster(kind.dtype, rounds=self._rounds)


def _bindings(op: proto.Operation) -> Iterator[tuple[str, Sequence[proto.Binding]]]:
    """Yield each parameter of an op and what it is bound to."""
    for name, argument in sorted(op.inputs.items()):
        if argument.arguments:
            yield name, argument.arguments
    for name, value in sorted(op.attributes.items()):
        if name != "name":  # the op's own
            yield name, [proto.Binding(value=value)]
