"""What a package holds, without loading a single weight."""

from __future__ import annotations

import math
import os
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from milpress.errors import weight_errors
from milpress.mil import values
from milpress.mil.decode import is_constexpr
from milpress.mil.graph import Graph, Node
from milpress.mil.package import Package, n_package_bytes
from milpress.plain import json
from milpress.show import escaped, human_bytes, named_table

if TYPE_CHECKING:
    from rich.table import Table


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
    weights: list[StoredWeight] = []
    for graph in package.graphs:
        place = "/".join((*graph.place, graph.function_name))
        functions[place] = graph.opset.target
        op_counts.update(node.op.type for node in graph.nodes if not node.is_stored)
        for weight in graph.weights:
            with weight_errors(weight.name):
                stored = StoredWeight(
                    name=weight.name,
                    op_types=weight.op_types,
                    dtype=weight.dtype.name,
                    shape=weight.shape,
                    stored_as=_stored_as(weight.node, graph),
                    n_bytes=weight.n_bytes,
                )
            weights.append(stored)
    return Inspection(
        path=str(source),
        package_bytes=n_package_bytes(package.path),
        specification_version=package.model.specificationVersion,
        functions=tuple(functions.items()),
        op_counts=dict(sorted(op_counts.items(), key=lambda item: (-item[1], item[0]))),
        weights=tuple(weights),
    )


def _stored_as(node: Node, graph: Graph) -> str:
    """Return ``dense`` or the chain of decoding ops, innermost first, and the type of its codes."""
    if not is_constexpr(node):
        return "dense"
    chain = [_described(node)]
    for key in sorted(node.op.inputs):
        producer = graph.producer(node, key)
        if producer is not None and is_constexpr(producer[0]):
            chain.insert(0, _stored_as(producer[0], graph))
    return " > ".join(dict.fromkeys(chain))


def _described(node: Node) -> str:
    kind = str(node.op.type).removeprefix("constexpr_")
    for parameter in _CODES:
        stored, binding = None, node.binding(parameter)
        if parameter in node.op.attributes:
            stored = node.op.attributes[parameter]
        elif binding is not None and binding.WhichOneof("choice") == "value":
            stored = binding.value
        if stored is not None:
            return f"{kind} {values.stored_type(stored).dtype.name}"
    return kind


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredWeight:
    """A weight as it is stored.

    Parameters
    ----------
    name
        Its name in the graph.
    op_types
        Kinds of the ops that use it.
    dtype
        Type of its elements, as ops see it.
    shape
        Its shape.
    stored_as
        ``dense``, or the ops that decode it.
    n_bytes
        Size of what is stored.
    """

    name: str
    op_types: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]
    stored_as: str
    n_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Effective bits."""
        return 8 * self.n_bytes / math.prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What a package holds.

    Parameters
    ----------
    path
        The package.
    package_bytes
        Size of all files.
    specification_version
        Of the model.
    functions
        Name and deployment target of each function.
    op_counts
        How often each kind of op occurs, constants aside, most frequent first.
    weights
        Its weights, in the order of the graph.
    """

    path: str
    package_bytes: int
    specification_version: int
    functions: tuple[tuple[str, str], ...]
    op_counts: dict[str, int]
    weights: tuple[StoredWeight, ...]

    @property
    def summary(self) -> str:
        """One line: functions, targets, weights, size."""
        size = sum(math.prod(weight.shape) for weight in self.weights)
        functions = ", ".join(f"{name} ({target})" for name, target in self.functions)
        return (
            f"{functions}; {len(self.weights)} weights with {size:,} elements; "
            f"{human_bytes(self.package_bytes)}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the inspection as JSON can hold it."""
        names = ("dtype", "shape", "stored_as", "n_bytes", "bits_per_weight")
        return {
            "version": 1,
            **json.record(self, "path", "package_bytes", "specification_version"),
            "functions": [{"name": name, "target": target} for name, target in self.functions],
            "op_counts": self.op_counts,
            "weights": [json.record(each, "name", "op_types", *names) for each in self.weights],
        }

    def __rich__(self) -> Table:
        """Return the weights as a table."""
        table = named_table(
            "weight", "used by", "shape", "type", "stored as", right=("bytes", "bits")
        )
        for weight in self.weights:
            table.add_row(
                escaped(weight.name),
                escaped(", ".join(weight.op_types)),
                "x".join(map(str, weight.shape)),
                weight.dtype,
                escaped(weight.stored_as),
                human_bytes(weight.n_bytes),
                f"{weight.bits_per_weight:.2f}",
            )
        return table
