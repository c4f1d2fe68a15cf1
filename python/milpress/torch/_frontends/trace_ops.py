"""Ops of traces that coremltools does not lower; programs of ``torch.export`` write them by others.

They are registered by coremltools' own hook, and only where neither coremltools nor a user has
lowered the op.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from milpress.torch._frontends.lowering import is_lowered


def register() -> None:
    """Let coremltools lower these ops from now on."""
    from coremltools.converters.mil import register_torch_op

    for lower in (diff, new_ones):
        if not is_lowered(lower.__name__):
            register_torch_op(lower, override=True)


def new_ones(context: Any, node: Any) -> None:
    """Make a tensor of ones, of the type of another unless one is given."""
    from coremltools.converters.mil import Builder as mb  # noqa: N813
    from coremltools.converters.mil.frontend.torch.ops import NUM_TO_DTYPE_STRING, _get_inputs
    from coremltools.converters.mil.mil import types

    like, shape, *rest = _get_inputs(context, node)
    kind = types.builtin_to_string(like.dtype)
    if rest and rest[0] is not None:
        kind = NUM_TO_DTYPE_STRING[rest[0].val]
    if isinstance(shape, list):
        shape = mb.concat(values=shape, axis=0)
    if shape.val is None:
        result = mb.cast(x=mb.fill(shape=shape, value=1.0), dtype=kind, name=node.name)
    else:
        dtype = types.nptype_from_builtin(types.string_to_builtin(kind))
        result = mb.const(val=np.ones(shape.val.astype(int), dtype), name=node.name)
    context.add(result)


def diff(context: Any, node: Any) -> None:
    """Take the differences of neighbours along an axis, some times."""
    from coremltools.converters.mil import Builder as mb  # noqa: N813
    from coremltools.converters.mil.frontend.torch.ops import _get_inputs

    given: list[Any] = [*_get_inputs(context, node), None, None]
    x, times, axis, before, after = given[:5]
    axis = axis.val % x.rank
    parts = [part for part in (before, x, after) if part is not None]
    if len(parts) > 1:
        x = mb.concat(values=parts, axis=axis)
    for _ in range(times.val):
        later = mb.slice_by_index(x=x, **_from_to(x.rank, axis, 1, None))
        x = mb.sub(x=later, y=mb.slice_by_index(x=x, **_from_to(x.rank, axis, 0, -1)))
    context.add(mb.identity(x=x, name=node.name))


def _from_to(rank: int, axis: int, begin: int, end: int | None) -> dict[str, Any]:
    """Return what `slice_by_index` is to take along one axis, all of the others."""
    is_whole = [i != axis for i in range(rank)]
    return {
        "begin": [begin if i == axis else 0 for i in range(rank)],
        "end": [(end or 0) if i == axis else 0 for i in range(rank)],
        "begin_mask": is_whole,
        "end_mask": [whole or end is None for whole in is_whole],
    }
