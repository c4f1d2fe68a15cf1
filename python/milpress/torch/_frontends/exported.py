"""Modules converted by way of ``torch.export``."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from milpress.torch._frontends import decompositions
from milpress.torch._frontends.decompositions import Rules
from milpress.torch._frontends.failure import FrontendError, gist
from milpress.torch._frontends.lowering import (
    described,
    described_as_lowered,
    failed_at,
    op_of,
    unlowered,
)

# How torch says that a branch or a shape hangs on the numbers in a tensor.
_ON_VALUES = ("data-dependent", "DataDependent", "unbacked")

_ONE_PATH = "a trace would keep the path that the example inputs take"
_NO_STATES = "a trace would not keep what the module writes to its buffers"


def by_export(
    module: nn.Module, inputs: tuple[Any, ...], dynamic_shapes: Any, settings: dict[str, Any]
) -> Any:
    """Return the model that coremltools makes of what ``torch.export`` gives.

    Ops that coremltools does not lower are written by others, and so are those that it stumbles
    over. Buffers that the module writes to become states.

    Raises
    ------
    FrontendError
        If torch or coremltools can't.
    """
    import coremltools as ct

    rules = decompositions.known()
    used = decompositions.needed(rules)
    program = _exported(module, inputs, dynamic_shapes, used)
    while True:
        no_trace = _why_no_trace(program)
        missing = unlowered(program.graph)
        if missing:
            msg = f"coremltools has no lowering of {', '.join(map(described, missing))}"
            raise FrontendError(msg, no_trace=no_trace)
        try:
            return ct.convert(program, **settings)
        except MemoryError:
            raise
        except Exception as error:
            node = failed_at(error)
            op = None if node is None else op_of(node.name, program.graph)
            what = "what torch exports" if node is None else described_as_lowered(node)
            failure = FrontendError(
                f"coremltools can't lower {what}: {gist(error)}", no_trace=no_trace
            )
            if op not in rules or op in used:
                raise failure from error
            used[op] = rules[op]
            try:
                program = _decomposed(program, used)
            except MemoryError:
                raise
            except Exception:  # of a rule that does not fit here
                raise failure from error


def _exported(
    module: nn.Module, inputs: tuple[Any, ...], dynamic_shapes: Any, rules: Rules
) -> ExportedProgram:
    try:
        program = torch.export.export(module, inputs, dynamic_shapes=dynamic_shapes, strict=False)
        return _decomposed(program, rules)
    except MemoryError:
        raise
    except Exception as error:
        on_values = any(text in f"{type(error)} {error}" for text in _ON_VALUES)
        msg = f"torch can't export it: {gist(error)}"
        raise FrontendError(msg, no_trace=_ONE_PATH if on_values else "") from error


def _decomposed(program: ExportedProgram, rules: Rules) -> ExportedProgram:
    """Write ops of a program by others, and drop what only checks types and sizes."""
    program = program.run_decompositions(rules)
    graph = program.graph_module.graph
    for node in reversed(graph.nodes):
        if node.op == "call_function" and not node.users and _is_check(node.target):
            graph.erase_node(node)
    graph.eliminate_dead_code()
    program.graph_module.recompile()
    return program


def _is_check(op: Any) -> bool:
    return any(part in str(op) for part in ("_assert_", "sym_constrain_range"))


def _why_no_trace(program: ExportedProgram) -> str:
    """Return why a trace would be another model than the program; empty if it would not."""
    if program.graph_signature.buffers_to_mutate:
        return _NO_STATES
    reads = any("_local_scalar_dense" in str(node.target) for node in program.graph.nodes)
    return _ONE_PATH if reads else ""
