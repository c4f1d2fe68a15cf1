"""Pairs of ``quantize`` and ``dequantize``: their insertion, and the removal of recorded ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Generic, NamedTuple

import numpy as np

from milpress.errors import fail_verification as fail
from milpress.mil import dtypes, values
from milpress.mil.activation_sites import QuantizationPoints, Setting
from milpress.mil.graph import Graph, Node, Scope, Use, Value, new_const, new_op
from milpress.mil.program import ProgramGraph
from milpress.mil.values import TensorType


class Parameters(NamedTuple):
    """How values become integers: ``code = value / scale + zero_point``, in a type.

    ``zero_point`` is ``None`` where it is zero; the scale is of the values' own type.
    """

    scale: np.floating[Any]
    zero_point: int | None
    dtype: str


def insert(
    graph: Graph,
    points: QuantizationPoints[Setting],
    parameters: Callable[[Value, Setting], Parameters | None],
) -> dict[str, str]:
    """Put the pairs into a graph, in place.

    Parameters
    ----------
    graph
        The graph that was looked at; it is of no use afterwards.
    points
        Where.
    parameters
        Gives those of a value under a setting, ``None`` to leave the value.

    Returns
    -------
    dict
        Name of each ``dequantize`` and of the ``quantize`` before it.
    """
    return _Inserter(graph, parameters).run(points)


class _Inserter(Generic[Setting]):
    def __init__(
        self, graph: Graph, parameters: Callable[[Value, Setting], Parameters | None]
    ) -> None:
        self._graph = graph
        self._parameters = parameters
        self._pairs: dict[str, str] = {}
        # Value quantized at once -> its codes, their parameters, and the name for other uses.
        self._after: dict[Value, tuple[str, Parameters, str]] = {}
        # Kind, what is taken and how -> where such ops were inserted, and their names.
        self._inserted: dict[tuple[str, str, Parameters], list[tuple[Scope, str]]] = {}
        self._n = {"quantize": 0, "dequantize": 0}

    def run(self, points: QuantizationPoints[Setting]) -> dict[str, str]:
        before: dict[Node, list[tuple[Use, Value, Parameters]]] = {}
        own: dict[tuple[Node, str], Parameters] = {}
        for use, value, setting in points.before:
            parameters = self._parameters(value, setting)
            if parameters is not None:
                own[use.place] = parameters
                before.setdefault(use.node, []).append((use, value, parameters))
        behind: dict[Node, tuple[Value, Parameters]] = {}
        for value, (node, setting) in points.after.items():
            parameters = self._parameters(value, setting)
            if parameters is not None:
                behind[self._next(node)] = value, parameters
        for node in self._graph.nodes:
            if node in behind:
                value, parameters = behind[node]
                uses = [] if value.producer is None else value.producer.uses
                plain = [use for use in uses if own.get(use.place) != parameters]
                self._quantize_at_once(value, parameters, node, plain)
            for use, value, parameters in before.get(node, []):
                self._quantize_before(use, value, parameters)
        self._graph.apply()
        return self._pairs

    def _quantize_at_once(
        self, value: Value, wanted: Parameters, node: Node, plain: list[Use]
    ) -> None:
        """Quantize a value as soon as it is there, for all that takes it; ``plain`` as it is."""
        codes = self._inserted_op("quantize", value.name, value, wanted, node)
        dense = value.name
        if plain:
            dense = self._inserted_op("dequantize", codes, value, wanted, node)
        for use in plain:
            use.binding.name = dense
        self._after[value] = codes, wanted, dense

    def _quantize_before(self, use: Use, value: Value, wanted: Parameters) -> None:
        codes, parameters, source = self._after.get(value, ("", None, value.name))
        if parameters != wanted:
            codes = self._inserted_op("quantize", source, value, wanted, use.node)
        use.binding.name = self._inserted_op("dequantize", codes, value, wanted, use.node)

    def _next(self, node: Node) -> Node:
        nodes = iter(self._graph.nodes)
        for each in nodes:
            if each is node:
                break
        return next(each for each in nodes if each.scope is node.scope)

    def _inserted_op(
        self, kind: str, source: str, value: Value, wanted: Parameters, before: Node
    ) -> str:
        """Return the name of a value's codes, or of what they stand for.

        The op that makes it is put before another one, unless such an op is there already.
        """
        inserted = self._inserted.setdefault((kind, source, wanted), [])
        for scope, name in inserted:
            if _sees(before.scope, scope):
                return name
        name = self._graph.unique_name(f"{kind}_{self._n[kind]}")
        inserted.append((before.scope, name))
        self._n[kind] += 1
        op = new_op(kind, name, input=source)
        op.outputs[0].type.CopyFrom(value.declared)
        settings = {"scale": values.immediate(wanted.scale)}
        if wanted.zero_point is not None:
            zero_point = np.dtype(wanted.dtype).type(wanted.zero_point)
            settings["zero_point"] = values.immediate(zero_point)
        if kind == "quantize":
            settings["output_dtype"] = values.string(wanted.dtype)
            op.outputs[0].type.tensorType.dataType = dtypes.by_name(wanted.dtype).mil
        else:
            self._pairs[name] = source
        for parameter, setting in settings.items():
            const = new_const(self._graph.unique_name(f"{name}_{parameter}_0"), setting)
            op.inputs[parameter].arguments.add(name=const.outputs[0].name)
            self._graph.insert_before(before, [const])
        self._graph.insert_before(before, [op])
        return name


def _sees(scope: Scope, outer: Scope) -> bool:
    place: Scope | None = scope
    while place is not None and place is not outer:
        place = place.parent
    return place is outer


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
    stripped: list[tuple[str, Parameters]] = []
    removed: dict[Node, None] = {}
    for name, codes in mine.items():
        quantize, parameters = quantizes[codes]
        dequantize, others = _checked(name, "dequantize", named, graph)
        if others._replace(dtype="") != parameters._replace(dtype=""):
            fail(f"{name}: its scale or zero point differs from that of {codes}")
        if f"{graph.prefix}{_source(dequantize)}" != codes:
            fail(f"{name}: it must take {codes}, got {_source(dequantize)}")
        if dequantize.type != _type_of_source(quantize):
            fail(f"{name}: its type differs from that of what is quantized")
        removed.update(dict.fromkeys((quantize, dequantize)))
        stripped.append((name, parameters))
    for node in removed:
        for use in node.uses if node.op.type == "quantize" else ():
            if use.node not in removed:
                fail(f"{graph.prefix}{node.name}: its codes have a use other than dequantize")
        if node.is_block_output:
            fail(f"{graph.prefix}{node.name}: added to the model, but a block returns it")
    for node in [node for node in removed if node.op.type == "dequantize"]:
        for use in node.uses:
            use.binding.name = _origin(node, graph, removed)
    for node in list(removed):
        for parameter in ("scale", "zero_point", "output_dtype"):
            producer = graph.producer(node, parameter)
            if producer is not None and all(use.node in removed for use in producer[0].uses):
                removed[producer[0]] = None
    graph.remove(removed)
    graph.apply()
    return stripped


def _origin(node: Node, graph: Graph, removed: Mapping[Node, None]) -> str:
    """Return the name of the value that a chain of removed pairs begins with."""
    while True:
        producer = graph.producer(node, "input")
        if producer is None or producer[0] not in removed:
            return _source(node)
        node = producer[0]


def _source(node: Node) -> str:
    return node.op.inputs["input"].arguments[0].name


def _type_of_source(node: Node) -> TensorType | None:
    return node.scope.value(_source(node)).type


def _checked(
    name: str, kind: str, named: Mapping[str, Node], graph: ProgramGraph
) -> tuple[Node, Parameters]:
    node = named.get(name)
    if node is None or node.op.type != kind or not node.op.inputs["input"].arguments:
        fail(f"{name}: the record names this {kind}, which the model does not have")
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
        fail(f"{name}: the scale must be one positive number of the type of the values")
    point = None if zero_point is None else values.read(zero_point, graph.source).values
    codes = node.type if kind == "quantize" else _type_of_source(node)
    dtype = "" if codes is None else codes.dtype.name
    if dtype not in ("int8", "uint8") or (
        point is not None and (point.size != 1 or point.dtype.name != dtype)
    ):
        fail(f"{name}: codes and zero point must be int8 or uint8, one and the same")
    offset = None if point is None else int(point)
    return node, Parameters(stored.reshape(-1)[0], offset, dtype)
