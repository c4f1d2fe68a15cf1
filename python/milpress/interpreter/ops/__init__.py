"""The ops that the interpreter computes, by family."""

from __future__ import annotations

import importlib
import pkgutil
import types
from collections.abc import Mapping

from milpress.interpreter.operator import Operator
from milpress.mil import proto
from milpress.mil.decode import DECODED

# Each module of this folder is a family.
_FAMILIES = [
    importlib.import_module(f"{__name__}.{module.name}")
    for module in pkgutil.iter_modules(__path__)
]


def _collected() -> Mapping[str, tuple[Operator, ...]]:
    """Return the operators of each op, the one of the latest opset first."""
    versions: dict[str, list[Operator]] = {}
    for family in _FAMILIES:
        for value in vars(family).values():
            for operator in value if isinstance(value, list) else [value]:
                if isinstance(operator, Operator):
                    versions.setdefault(operator.name, []).extend((operator, *operator.earlier))
    return types.MappingProxyType(
        {name: tuple(sorted(ops, key=lambda op: -op.since)) for name, ops in versions.items()}
    )


OPERATORS = _collected()


def find(name: str, opset: int) -> Operator | None:
    """Return the operator of an op in an opset's version, or ``None`` if it is not covered."""
    return next((op for op in OPERATORS.get(name, ()) if op.since <= opset), None)


def uncovered(op: proto.Operation, opset: int) -> str:
    """Return what of an op in an opset's version is not covered: its type, or parameters; or ""."""
    if op.type == "const" or op.type in DECODED:
        return ""
    operator = find(op.type, opset)
    if operator is None:
        return op.type
    given = {*op.inputs, *op.attributes} - {"name"}
    unknown = sorted(given - operator.forms.keys())
    return f"{op.type} with {', '.join(unknown)}" if unknown else ""
