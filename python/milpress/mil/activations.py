"""Quantized activations in a program: pairs of ops, put where coremltools puts them.

What was inserted is recorded in the package's user metadata, so that `strip` can take it out
again and a verification can compare what is left with the source.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, NoReturn, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from milpress.errors import PackageError, VerificationError
from milpress.mil import dtypes, proto, values
from milpress.mil.graph import Graph, Node, Scope, new_const, new_op
from milpress.mil.joins import Value, home, type_of
from milpress.mil.program import ProgramGraph
from milpress.mil.values import TensorType
from milpress.plain import json

KEY = "com.milpress.activations"

Setting = TypeVar("Setting")

# What coremltools quantizes, by the parameters that must all be computed.
_INPUTS = {
    "conv": ("x",),
    "avg_pool": ("x",),
    "max_pool": ("x",),
    "linear": ("x",),
    "add": ("x", "y"),
}
# An op of the above and one of these behind it are one step of the hardware.
_FUSED = frozenset({"leaky_relu", "tanh", "scaled_tanh", "sigmoid", "relu", "relu6"})


class Parameters(NamedTuple):
    """How values become integers: ``code = value / scale + zero_point``, in a type.

    ``zero_point`` is ``None`` where it is zero; the scale is of the values' own type.
    """

    scale: np.floating[Any]
    zero_point: int | None
    dtype: str


class _Use(NamedTuple):
    node: Node
    parameter: str
    binding: proto.Binding

    @property
    def place(self) -> tuple[int, str]:
        return id(self.node), self.parameter


@dataclass(slots=True)
class Placement(Generic[Setting]):
    """Where activations of a graph are to be quantized, and as what settings say.

    ``before`` are inputs of ops that take quantized values; ``after`` are values that are quantized
    as soon as they are computed, with the op that makes them.
    """

    before: list[tuple[_Use, Value, Setting]] = field(default_factory=list)
    after: dict[Value, tuple[Node, Setting]] = field(default_factory=dict)
    types: dict[Value, TensorType] = field(default_factory=dict)

    @property
    def wanted(self) -> dict[Value, list[Setting]]:
        """The values to quantize, in order, and the settings for each."""
        found: dict[Value, list[Setting]] = {}
        for value, (_, setting) in self.after.items():
            found.setdefault(value, []).append(setting)
        for _, value, setting in self.before:
            if setting not in found.setdefault(value, []):
                found[value].append(setting)
        return found


class _Consumers:
    """Who uses each value of a graph."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._uses: dict[Value, list[_Use]] = {}
        for node in graph.nodes:
            for parameter, argument in node.op.inputs.items():
                for binding in argument.arguments:
                    if binding.WhichOneof("choice") == "name":
                        value = home(node.scope, binding.name)
                        self._uses.setdefault(value, []).append(_Use(node, parameter, binding))

    def of(self, value: Value) -> list[_Use]:
        return self._uses.get(value, [])

    def computed(self, node: Node, parameter: str) -> Value | None:
        """Return the float value that a parameter takes, if it is not known beforehand."""
        if parameter not in node.op.inputs or len(node.op.inputs[parameter].arguments) != 1:
            return None
        binding = node.op.inputs[parameter].arguments[0]
        if binding.WhichOneof("choice") != "name":
            return None
        producer = self.graph.producer(node, parameter)
        if producer is not None and producer[0].is_stored:
            return None
        value = home(node.scope, binding.name)
        kind = type_of(value)
        return value if kind is not None and kind.dtype.is_float else None


def place(graph: Graph, setting_of: Callable[[Node], Setting | None]) -> Placement[Setting]:
    """Find where coremltools would quantize activations.

    Inputs of convolutions, linear layers and pools are quantized, and those of additions of two
    computed values; then what such an op makes, after a relu or the like behind it, unless all that
    takes it quantizes it anyway. What a block returns stays as it is. Values that are quantized in
    the model already stay so.

    Parameters
    ----------
    graph
        The graph; nothing is changed in it.
    setting_of
        Gives the setting of an op, ``None`` to leave it.
    """
    consumers = _Consumers(graph)
    placement: Placement[Setting] = Placement()
    cores: list[tuple[Node, Setting]] = []
    for node in graph.nodes:
        parameters = _INPUTS.get(node.op.type, ())
        taken = [consumers.computed(node, parameter) for parameter in parameters]
        setting = setting_of(node) if taken and None not in taken else None
        if setting is None:
            continue
        cores.append((node, setting))
        for parameter, value in zip(parameters, taken, strict=True):
            if value is not None and _maker(value) != "dequantize":
                binding = node.op.inputs[parameter].arguments[0]
                use = _Use(node, parameter, binding)
                placement.before.append((use, value, setting))
                placement.types[value] = _float_type(value)
    quantizing = {use.place for use, _, _ in placement.before}
    for node, setting in cores:
        last = _last_of_step(node, consumers, quantizing)
        if last is not None:
            value = home(last.scope, last.name)
            placement.after[value] = (last, setting)
            placement.types[value] = _float_type(value)
    return placement


def _float_type(value: Value) -> TensorType:
    kind = type_of(value)
    assert kind is not None  # noqa: S101 - `computed` looked at it
    return kind


def _maker(value: Value) -> str:
    node = value.scope.names[value.name][0]
    return "" if node is None else node.op.type


def _last_of_step(
    core: Node, consumers: _Consumers, quantizing: set[tuple[int, str]]
) -> Node | None:
    """Return the op whose result is to be quantized after a core op; ``None`` for none."""

    def takers(node: Node) -> tuple[list[Node], int]:
        """Return the ops that take a result as it is, and how often it is quantized."""
        uses = consumers.of(home(node.scope, node.name))
        plain = [use.node for use in uses if use.place not in quantizing]
        return plain, len(uses) - len(plain)

    def is_quantized(plain: list[Node], n_quantized: int) -> bool:
        kinds = [node.op.type for node in plain] + ["quantize"] * n_quantized
        return kinds == ["quantize"]

    kind = core.type
    if kind is None or not kind.dtype.is_float:
        return None
    plain, n_quantized = takers(core)
    if (not plain and not n_quantized) or is_quantized(plain, n_quantized):
        return None
    if not plain or plain[0].op.type not in _FUSED or plain[0].scope is not core.scope:
        return core
    after = takers(plain[0])
    if not after[0] and not after[1]:
        return core
    return None if is_quantized(*after) else plain[0]


def insert(
    graph: Graph,
    placement: Placement[Setting],
    parameters: Callable[[Value, Setting], Parameters | None],
) -> dict[str, str]:
    """Put the pairs into a graph, in place.

    Parameters
    ----------
    graph
        The graph that was looked at; it is of no use afterwards.
    placement
        Where.
    parameters
        Gives those of a value under a setting, ``None`` to leave the value.

    Returns
    -------
    dict
        Name of each ``dequantize`` and of the ``quantize`` before it.
    """
    return _Inserter(graph, parameters).run(placement)


class _Inserter(Generic[Setting]):
    def __init__(
        self, graph: Graph, parameters: Callable[[Value, Setting], Parameters | None]
    ) -> None:
        self._graph = graph
        self._parameters = parameters
        self._made: dict[str, str] = {}
        # Value quantized at once -> its codes, their parameters, and the name for other uses.
        self._after: dict[Value, tuple[str, Parameters, str]] = {}
        self._quantized: list[tuple[str, Parameters, Scope, str]] = []
        self._dequantized: list[tuple[str, Scope, str]] = []
        self._n = {"quantize": 0, "dequantize": 0}

    def run(self, placement: Placement[Setting]) -> dict[str, str]:
        before: dict[Node, list[tuple[_Use, Value, Parameters]]] = {}
        own: dict[tuple[int, str], Parameters] = {}
        for use, value, setting in placement.before:
            found = self._parameters(value, setting)
            if found is not None:
                own[use.place] = found
                before.setdefault(use.node, []).append((use, value, found))
        behind: dict[Node, tuple[Value, Parameters]] = {}
        for value, (node, setting) in placement.after.items():
            found = self._parameters(value, setting)
            if found is not None:
                behind[self._next(node)] = value, found
        consumers = _Consumers(self._graph)
        for node in self._graph.nodes:
            if node in behind:
                value, found = behind[node]
                uses = consumers.of(value)
                self._quantize_at_once(
                    value, found, node, [use for use in uses if own.get(use.place) != found]
                )
            for use, value, found in before.get(node, []):
                self._quantize_before(use, value, found)
        self._graph.apply()
        return self._made

    def _quantize_at_once(
        self, value: Value, wanted: Parameters, node: Node, plain: list[_Use]
    ) -> None:
        """Quantize a value as soon as it is there, for all that takes it; ``plain`` as it is."""
        codes = self._quantize(value.name, value, wanted, node)
        dense = self._dequantize(codes, value, wanted, node) if plain else value.name
        for use in plain:
            use.binding.name = dense
        self._after[value] = codes, wanted, dense

    def _quantize_before(self, use: _Use, value: Value, wanted: Parameters) -> None:
        source = value.name
        if value in self._after:
            codes, known, source = self._after[value]
            if known == wanted:
                use.binding.name = self._dequantize(codes, value, wanted, use.node)
                return
        codes = self._quantize(source, value, wanted, use.node)
        use.binding.name = self._dequantize(codes, value, wanted, use.node)

    def _next(self, node: Node) -> Node:
        nodes = iter(self._graph.nodes)
        for each in nodes:
            if each is node:
                break
        return next(each for each in nodes if each.scope is node.scope)

    def _quantize(self, source: str, value: Value, wanted: Parameters, before: Node) -> str:
        """Return the name of the value's codes, which are made before an op if they aren't yet."""
        for name, parameters, scope, made in self._quantized:
            if (name, parameters) == (source, wanted) and _sees(before.scope, scope):
                return made
        name = self._insert("quantize", source, wanted, value, before)
        self._quantized.append((source, wanted, before.scope, name))
        return name

    def _dequantize(self, codes: str, value: Value, wanted: Parameters, before: Node) -> str:
        for name, scope, made in self._dequantized:
            if name == codes and _sees(before.scope, scope):
                return made
        name = self._insert("dequantize", codes, wanted, value, before)
        self._dequantized.append((codes, before.scope, name))
        self._made[name] = codes
        return name

    def _insert(
        self, kind: str, source: str, wanted: Parameters, value: Value, before: Node
    ) -> str:
        name = self._graph.unique_name(f"{kind}_{self._n[kind]}")
        self._n[kind] += 1
        op = new_op(kind, name)
        op.inputs["input"].arguments.add().name = source
        op.outputs[0].type.CopyFrom(value.scope.names[value.name][1])
        settings = {"scale": _number(wanted.scale)}
        if wanted.zero_point is not None:
            settings["zero_point"] = _number(np.dtype(wanted.dtype).type(wanted.zero_point))
        if kind == "quantize":
            settings["output_dtype"] = values.string(wanted.dtype)
            op.outputs[0].type.tensorType.dataType = dtypes.by_name(wanted.dtype).mil
        ops = []
        for parameter, number in settings.items():
            const = new_const(self._graph.unique_name(f"{name}_{parameter}_0"), number)
            op.inputs[parameter].arguments.add().name = const.outputs[0].name
            ops.append(const)
        self._graph.insert_before(before, [*ops, op])
        return name


def _sees(scope: Scope, outer: Scope) -> bool:
    place: Scope | None = scope
    while place is not None and place is not outer:
        place = place.parent
    return place is outer


def _number(number: ArrayLike) -> proto.Value:
    stored = proto.Value()
    values.write_numbers(stored, np.asarray(number).dtype.name, np.asarray(number))
    return stored


@dataclass(slots=True)
class Record:
    """What was inserted: each ``dequantize`` and the ``quantize`` before it, by their names.

    Names begin with the functions or models that they are in, like those of weights.
    """

    pairs: dict[str, str] = field(default_factory=dict)
    settings: list[dict[str, Any]] = field(default_factory=list)


def read(model: proto.Model) -> Record:
    """Return the record of a model; an empty one where there is none.

    Raises
    ------
    PackageError
        If the record is not of the form that `record` writes.
    """
    metadata = model.description.metadata.userDefined
    if KEY not in metadata:
        return Record()
    try:
        data = json.read(metadata[KEY])
        if data["version"] != 1:
            msg = f"version {data['version']!r}"
            raise ValueError(msg)
        pairs = {str(name): str(codes) for name, codes in data["pairs"].items()}
        return Record(pairs, [dict(setting) for setting in data["settings"]])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        msg = f"the user metadata {KEY} is not a record of version 1: {error}"
        raise PackageError(msg) from error


def record(model: proto.Model, made: Record) -> None:
    """Write a record into the model."""
    data = {"version": 1, "settings": made.settings, "pairs": made.pairs}
    model.description.metadata.userDefined[KEY] = json.text(data, separators=(",", ":"))


def forget(model: proto.Model) -> None:
    """Remove the record."""
    model.description.metadata.userDefined.pop(KEY, None)


def strip(graph: ProgramGraph, pairs: Mapping[str, str]) -> list[tuple[str, Parameters]]:
    """Take recorded pairs out of a graph again, in place.

    Returns the pairs of this graph, in order, with their parameters; ``source`` gives its weight
    files. The graph is of no use afterwards.

    Raises
    ------
    VerificationError
        If a recorded op is not there, or is not what was inserted: a ``dequantize`` of the codes
        that a ``quantize`` with the same parameters makes, a positive and finite scale of the type
        of the values, and nothing that uses the codes otherwise.
    """
    named = {f"{graph.prefix}{node.name}": node for node in graph.nodes}
    mine = {name: codes for name, codes in pairs.items() if name in named or codes in named}
    quantizes = {codes: _checked(codes, "quantize", named, graph) for codes in mine.values()}
    found: list[tuple[str, Parameters]] = []
    removed: dict[Node, None] = {}
    for name, codes in mine.items():
        dense, (quantize, given) = (
            _checked(name, "dequantize", named, graph),
            quantizes[codes],
        )
        if dense[1]._replace(dtype="") != given._replace(dtype=""):
            _fail(f"{name}: its scale or zero point differs from that of {codes}")
        if f"{graph.prefix}{_source(dense[0])}" != codes:
            _fail(f"{name}: it must take {codes}, got {_source(dense[0])}")
        if dense[0].type != _type_of_source(quantize):
            _fail(f"{name}: its type differs from that of what is quantized")
        removed.update(dict.fromkeys((quantize, dense[0])))
        found.append((name, given))
    for node in removed:
        for use in node.uses if node.op.type == "quantize" else ():
            if use.node not in removed:
                _fail(f"{graph.prefix}{node.name}: its codes have a use other than dequantize")
        if node.is_block_output:
            _fail(f"{graph.prefix}{node.name}: added to the model, but a block returns it")
    for node in [node for node in removed if node.op.type == "dequantize"]:
        for use in node.uses:
            use.binding.name = _origin(node, graph, removed)
    for node in list(removed):
        for parameter in ("scale", "zero_point", "output_dtype"):
            made = graph.producer(node, parameter)
            if made is not None and all(use.node in removed for use in made[0].uses):
                removed[made[0]] = None
    graph.remove(removed)
    graph.apply()
    return found


def _origin(node: Node, graph: Graph, removed: Mapping[Node, None]) -> str:
    """Return the name of the value that a chain of removed pairs begins with."""
    while True:
        found = graph.producer(node, "input")
        if found is None or found[0] not in removed:
            return _source(node)
        node = found[0]


def _source(node: Node) -> str:
    return node.op.inputs["input"].arguments[0].name


def _type_of_source(node: Node) -> TensorType | None:
    return type_of(home(node.scope, _source(node)))


def _checked(
    name: str, kind: str, named: Mapping[str, Node], graph: ProgramGraph
) -> tuple[Node, Parameters]:
    node = named.get(name)
    if node is None or node.op.type != kind or not node.op.inputs["input"].arguments:
        _fail(f"{name}: the record names this {kind}, which the model does not have")
    scale, zero_point = graph.constant(node, "scale"), graph.constant(node, "zero_point")
    stored = None if scale is None else values.read(scale, graph.source).values
    dense = _type_of_source(node) if kind == "quantize" else node.type
    if (
        stored is None
        or stored.size != 1
        or dense is None
        or stored.dtype != dense.dtype.storage
        or not 0 < float(stored) < math.inf
    ):
        _fail(f"{name}: the scale must be one positive number of the type of the values")
    point = None if zero_point is None else values.read(zero_point, graph.source).values
    codes = node.type if kind == "quantize" else _type_of_source(node)
    dtype = "" if codes is None else codes.dtype.name
    if dtype not in ("int8", "uint8") or (
        point is not None and (point.size != 1 or point.dtype.name != dtype)
    ):
        _fail(f"{name}: codes and zero point must be int8 or uint8, one and the same")
    known = None if point is None else int(point)
    return node, Parameters(stored.reshape(-1)[0], known, dtype)


def _fail(message: str) -> NoReturn:
    raise VerificationError(message)
