"""The ops that the interpreter computes, by family."""

from __future__ import annotations

import types
from collections.abc import Mapping

from milpress.interpreter.operator import Operator
from milpress.interpreter.ops import (
    activation,
    convolution,
    detection,
    elementwise,
    indexing,
    layout,
    linear,
    normalization,
    quantization,
    randomness,
    recurrent,
    reduction,
    resizing,
    sorting,
)

_FAMILIES = (
    activation,
    convolution,
    detection,
    elementwise,
    indexing,
    layout,
    linear,
    normalization,
    quantization,
    randomness,
    recurrent,
    reduction,
    resizing,
    sorting,
)


def _collected() -> Mapping[str, tuple[Operator, ...]]:
    """Return the operators of each op, the one of the latest opset first."""
    found: dict[str, list[Operator]] = {}
    for family in _FAMILIES:
        for value in vars(family).values():
            if isinstance(value, Operator):
                for name in value.names:
                    found.setdefault(name, []).append(value)
    return types.MappingProxyType(
        {name: tuple(sorted(ops, key=lambda op: -op.since)) for name, ops in found.items()}
    )


OPERATORS = _collected()


def find(name: str, opset: int) -> Operator | None:
    """Return the operator of an op in an opset's version, or ``None`` if it is not covered."""
    return next((op for op in OPERATORS.get(name, ()) if op.since <= opset), None)
