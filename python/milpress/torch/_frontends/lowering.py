"""Which ops of torch coremltools lowers, and where the one stands that it can't."""

from __future__ import annotations

import operator
import re
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import fx

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def is_lowered(op: Any) -> bool:
    """Whether coremltools, or a user, has a lowering by the name of an op."""
    return _lowering(op) is not None and not _home(op).startswith("milpress.")


def is_lowered_by_user(op: Any) -> bool:
    """Whether that lowering is one that a user has registered."""
    return is_lowered(op) and not _home(op).startswith("coremltools.")


def _home(op: Any) -> str:
    return getattr(_lowering(op), "__module__", "coremltools.")


def _lowering(op: Any) -> Any:
    from coremltools.converters.mil.frontend.torch.torch_op_registry import _TORCH_OPS_REGISTRY

    is_op = isinstance(op, torch._ops.OpOverload)
    name = op.name() if is_op else getattr(op, "__name__", str(op))
    return _TORCH_OPS_REGISTRY.get_func(name)


def unlowered(graph: fx.Graph) -> list[fx.Node]:
    """Return calls of a graph that coremltools has no lowering of, the first of each op."""
    found: dict[Any, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "call_function" and not is_lowered(node.target):
            found.setdefault(node.target, node)
    return list(found.values())


def described(node: fx.Node) -> str:
    """Return the op of a node and where it stands, in words."""
    return f"{node.target}{_place(node.meta)}"


def failed_at(error: BaseException) -> Any:
    """Return the node that coremltools was at when it failed, one of its own kind, or none.

    coremltools tells it to its log alone.
    """
    from coremltools.converters.mil.frontend.torch.internal_graph import InternalTorchIRNode

    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        node = frame.f_locals.get("node")
        if isinstance(node, InternalTorchIRNode):
            return node
    return None


def op_of(name: str, graph: fx.Graph) -> Any:
    """Return the op of a node by its name, or the op of which it takes one of the results."""
    for node in graph.nodes:
        if node.name == name:
            return node.args[0].target if node.target is operator.getitem else node.target
    return None


def described_as_lowered(node: Any) -> str:
    """Return what coremltools calls an op and where it stands, in words."""
    if node.meta is not None:
        return f"aten.{node.kind}{_place(node.meta)}"
    modules = [name for name in node.get_scope_info()[0][:-1] if name]
    return f"aten.{node.kind}" + (f" in {'.'.join(modules)}" if modules else "")


def _place(meta: dict[str, Any]) -> str:
    """Return the module that a node is of, and the line outside of torch that it comes from."""
    modules = [path for path, _ in meta.get("nn_module_stack", {}).values() if path]
    place = f" in {modules[-1]}" if modules else ""
    frames = _FRAME.findall(meta.get("stack_trace") or "")
    folder = Path(torch.__file__).parent
    own = [frame for frame in frames if not Path(frame[0]).is_relative_to(folder)]
    return f"{place} ({Path(own[-1][0]).name}, line {own[-1][1]})" if own else place
