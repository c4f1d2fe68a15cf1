"""What a package holds, without loading a single weight."""

from __future__ import annotations

import os
from collections import Counter

from milpress.errors import weight_errors
from milpress.mil import opset, values
from milpress.mil.constexpr import Decoder, is_constexpr
from milpress.mil.package import Package, n_package_bytes
from milpress.mil.program import Graph, Node
from milpress.mil.weights import sites, weights
from milpress.report import Inspection, StoredWeight

# What an op decodes a weight from.
_CODES = (
    "indices",
    "indices_nonzero_data",
    "data",
    "quantized_data",
    "nonzero_data",
    "source_val",
)


def inspect(source: str | os.PathLike[str]) -> Inspection:
    """List functions, ops and weights of a package.

    Parameters
    ----------
    source
        Path of an ``.mlpackage``.

    Raises
    ------
    PackageError
        If it is none, or not made of ML programs.
    """
    package = Package(source)
    functions: dict[str, str] = {}
    op_counts: Counter[str] = Counter()
    found: list[StoredWeight] = []
    for site in sites(package):
        place = "/".join((*site.program.place, site.function_name))
        functions[place] = opset.by_name(site.function.opset).target
        graph = site.graph
        op_counts.update(node.op.type for node in graph.nodes if not node.is_stored)
        decoder = Decoder(graph, package)
        for weight in weights(site.prefix, graph):
            with weight_errors(weight.name):
                stored = decoder.stored_values(weight.node)
            found.append(
                StoredWeight(
                    name=weight.name,
                    op_types=weight.op_types,
                    dtype=weight.dtype.name,
                    shape=weight.shape,
                    stored_as=_stored_as(weight.node, graph),
                    n_bytes=sum(values.n_stored_bytes(value) for value in stored),
                )
            )
    return Inspection(
        path=str(source),
        package_bytes=n_package_bytes(package.path),
        specification_version=package.model.specificationVersion,
        functions=tuple(functions.items()),
        op_counts=dict(sorted(op_counts.items(), key=lambda item: (-item[1], item[0]))),
        weights=tuple(found),
    )


def _stored_as(node: Node, graph: Graph) -> str:
    """Return ``dense`` or the chain of decoding ops, innermost first, and the type of its codes."""
    if not is_constexpr(node):
        return "dense"
    chain = [_described(node)]
    for key in sorted(node.op.inputs):
        found = graph.producer(node, key)
        if found is not None and is_constexpr(found[0]):
            chain.insert(0, _stored_as(found[0], graph))
    return " > ".join(dict.fromkeys(chain))


def _described(node: Node) -> str:
    kind = str(node.op.type).removeprefix("constexpr_")
    for parameter in _CODES:
        stored = None
        if parameter in node.op.attributes:
            stored = node.op.attributes[parameter]
        elif parameter in node.op.inputs:
            bindings = node.op.inputs[parameter].arguments
            inline = bindings and bindings[0].WhichOneof("choice") == "value"
            stored = bindings[0].value if inline else None
        if stored is not None:
            return f"{kind} {values.stored_type(stored).dtype.name}"
    return kind
