"""How many rows the tables have that the integer inputs of a function are looked up in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from milpress.mil import values
from milpress.mil.graph import Graph, Node, named_bindings

# What an index goes through on its way to a lookup: it is shaped, and counted from the front.
_HAND_ON = frozenset(
    ("add", "cast", "expand_dims", "identity", "reshape", "select", "slice_by_index", "squeeze")
)


def lookup_sizes(graph: Graph, inputs: Iterable[str]) -> dict[str, int]:
    """Return, of each input that is an index of lookups, how many rows the smallest table has.

    Examples
    --------
    Of a program that computes ``gather(x=embedding, indices=cast(tokens))``, with an embedding of
    30,522 rows, that is ``{"tokens": 30522}``.
    """
    origins = {name: {name} for name in inputs}
    sizes: dict[str, int] = {}
    for node in graph.nodes:
        read = list(_read(node))
        if node.op.type == "gather":
            n_rows = _n_rows(graph, node)
            indices = [name for parameter, name in read if parameter == "indices"]
            for name in origins.get(indices[0], ()) if indices and n_rows else ():
                sizes[name] = min(n_rows, sizes.get(name, n_rows))
        elif node.op.type in _HAND_ON:
            found = set[str]().union(*(origins.get(name, ()) for _, name in read))
            origins |= {item.name: found for item in node.op.outputs}
    return sizes


def _read(node: Node) -> Iterator[tuple[str, str]]:
    for parameter, binding in named_bindings(node.op):
        yield parameter, binding.name


def _n_rows(graph: Graph, node: Node) -> int:
    """Return the size of a lookup's table along its axis; 0 if it is not known."""
    kind = graph.value_type(node, "x")
    table = None if kind is None else values.type_of(kind)
    axis = int(graph.scalar(node, "axis") or 0)
    if table is None or not -len(table.shape) <= axis < len(table.shape):
        return 0
    return table.shape[axis] or 0
