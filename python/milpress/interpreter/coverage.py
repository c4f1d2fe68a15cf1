"""Coverage of a package by the interpreter, op by op."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from milpress.interpreter import ops
from milpress.mil.package import Package
from milpress.plain import json
from milpress.show import escaped, named_table

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class OpCoverage:
    """How often an op occurs in a function, and what of it the interpreter does not cover.

    ``function`` stands in a pipeline behind its model's name and a slash; ``target`` is that of its
    opset. ``uncovered`` is empty, the op's type, or parameters that it is used with.
    """

    function: str
    target: str
    op: str
    count: int
    uncovered: str

    @property
    def is_covered(self) -> bool:
        """Whether the interpreter runs it."""
        return not self.uncovered


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """The ops of a package, constants aside, by function, most frequent first."""

    ops: tuple[OpCoverage, ...]

    @property
    def summary(self) -> str:
        """One line: how many kinds of ops there are, and which of them are not covered."""
        kinds = {each.op for each in self.ops}
        missing = sorted({each.uncovered for each in self.ops if not each.is_covered})
        state = f"not covered: {', '.join(missing)}" if missing else "all covered"
        return f"{len(kinds)} kinds of ops, {state} by the interpreter"

    def to_dict(self) -> dict[str, Any]:
        """Return the coverage as JSON can hold it."""
        return {
            "covered": all(each.is_covered for each in self.ops),
            "ops": [
                json.record(each, "function", "target", "op", "count")
                | {"covered": each.is_covered}
                for each in self.ops
            ],
        }

    def __rich__(self) -> Table:
        """Return the ops as a table."""
        table = named_table("function", "opset", "op", right=["count"])
        table.add_column("interpreter")
        for each in self.ops:
            table.add_row(
                escaped(each.function),
                each.target,
                escaped(each.op),
                str(each.count),
                "yes" if each.is_covered else escaped(f"no: {each.uncovered}"),
            )
        return table


def coverage(source: str | os.PathLike[str] | Package) -> Coverage:
    """List the ops of a package and say which the interpreter covers, before it is run.

    Parameters
    ----------
    source
        Path of an ``.mlpackage``, or one that is open.

    Raises
    ------
    PackageError
        If it is none, or not made of ML programs.
    """
    package = source if isinstance(source, Package) else Package(source)
    rows: list[OpCoverage] = []
    for graph in package.graphs:
        place = "/".join((*graph.place, graph.function_name))
        version = graph.opset
        counts: Counter[str] = Counter()
        uncovered: dict[str, str] = {}
        for node in graph.nodes:
            lack = ops.uncovered(node.op, version.version)
            if lack or not node.is_stored:
                counts[node.op.type] += 1
                uncovered[node.op.type] = uncovered.get(node.op.type) or lack
        rows += [
            OpCoverage(
                function=place,
                target=version.target,
                op=op,
                count=count,
                uncovered=uncovered[op],
            )
            for op, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        ]
    return Coverage(ops=tuple(rows))
