"""Concatenations of a program, and the pieces that values are put together of."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from milpress.mil import proto
from milpress.mil.graph import Graph, Node, Scope, Value

# Ops that put values beside each other. Those of the first share a range, as in coremltools.
_SHARING = "concat"
_JOINING = frozenset({_SHARING, "stack"})
# Ops that leave the values of a tensor as large as they are, wherever they put them; and what they
# cut them to.
_EVERYTHING = (-math.inf, math.inf)
_CARRYING = dict.fromkeys(
    (
        "avg_pool",
        "batch_to_space",
        "cast",
        "depth_to_space",
        "expand_dims",
        "flatten2d",
        "identity",
        "max_pool",
        "pad",
        "pixel_shuffle",
        "pixel_unshuffle",
        "reshape",
        "resize",
        "resize_bilinear",
        "resize_nearest_neighbor",
        "reverse",
        "space_to_batch",
        "space_to_depth",
        "squeeze",
        "tile",
        "transpose",
        "upsample_bilinear",
        "upsample_nearest_neighbor",
    ),
    _EVERYTHING,
) | {"relu": (0.0, math.inf), "relu6": (0.0, 6.0)}


@dataclass(frozen=True, eq=False, slots=True)
class Join:
    """A concatenation: what it makes, and what it takes that is computed."""

    joined: Value
    parts: tuple[Value, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """What a part of a value is of: another value, or a stored one; cut to a range."""

    source: Value | Node
    low: float = -math.inf
    high: float = math.inf

    @property
    def name(self) -> str:
        """Name of what it is of."""
        return self.source.name

    def within(self, low: float, high: float) -> Piece:
        """Return the piece, cut to a range once more."""
        return Piece(self.source, min(max(self.low, low), high), min(max(self.high, low), high))


@dataclass(frozen=True, slots=True)
class Joins:
    """The concatenations of a graph, and the pieces of each value that is put together."""

    all: tuple[Join, ...]
    pieces: dict[Value, tuple[Piece, ...]]


def find(graph: Graph) -> Joins:
    """Return what joins the values of a graph, in order.

    Pieces are told apart as long as they are as they came: through chains of joins, and ops that
    move values, pool them or cut them off.
    """
    joins: list[Join] = []
    pieces: dict[Value, tuple[Piece, ...]] = {}
    for node in graph.nodes:
        kind = node.op.type
        if node.type is None or not node.type.dtype.is_float:
            continue
        joined = Value(node.scope, node.name)
        if kind in _JOINING and "values" in node.op.inputs:
            sources = [_source(node.scope, each) for each in node.op.inputs["values"].arguments]
            pieces[joined] = _unique(
                piece for source in sources if source is not None for piece in _of(source, pieces)
            )
            if kind == _SHARING:
                joins.append(Join(joined, tuple(s for s in sources if isinstance(s, Value))))
        elif kind in _CARRYING and len(node.op.inputs["x"].arguments) == 1:
            source = _source(node.scope, node.op.inputs["x"].arguments[0])
            if isinstance(source, Value) and source in pieces:
                pieces[joined] = _unique(each.within(*_CARRYING[kind]) for each in pieces[source])
    return Joins(tuple(joins), pieces)


def _source(scope: Scope, binding: proto.Binding) -> Value | Node | None:
    """Return the value or the stored op that is taken; ``None`` for a number in place."""
    if binding.WhichOneof("choice") != "name":
        return None
    value = scope.value(binding.name)
    producer = value.producer
    return producer if producer is not None and producer.is_stored else value


def _of(source: Value | Node, pieces: dict[Value, tuple[Piece, ...]]) -> tuple[Piece, ...]:
    known = pieces.get(source) if isinstance(source, Value) else None
    return (Piece(source),) if known is None else known


def _unique(pieces: Iterable[Piece]) -> tuple[Piece, ...]:
    return tuple(dict.fromkeys(pieces))
