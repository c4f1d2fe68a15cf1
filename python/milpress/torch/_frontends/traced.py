"""Modules converted by way of ``torch.jit.trace``."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from milpress.torch._frontends import trace_ops
from milpress.torch._frontends.failure import FrontendError, gist
from milpress.torch._frontends.lowering import described_as_lowered, failed_at
from milpress.torch._modes import keeping_buffers


def by_trace(module: nn.Module, inputs: tuple[torch.Tensor, ...], settings: dict[str, Any]) -> Any:
    """Return the model that coremltools makes of a trace of a module.

    Raises
    ------
    FrontendError
        If torch or coremltools can't, or if the module writes to buffers that are no states.
    """
    import coremltools as ct

    trace_ops.register()
    with keeping_buffers(module) as written:
        try:
            traced = torch.jit.trace(module, inputs, check_trace=False)  # type: ignore[no-untyped-call]
        except MemoryError:
            raise
        except Exception as error:
            msg = f"torch can't trace it: {gist(error)}"
            raise FrontendError(msg) from error
    if written and "states" not in settings:
        msg = (
            f"the module writes to {', '.join(written)}, of which a trace makes no states unless "
            "states= names them"
        )
        raise FrontendError(msg)
    if "inputs" not in settings:
        settings = {**settings, "inputs": [_tensor_type(item) for item in inputs]}
    try:
        return ct.convert(traced, **settings)
    except MemoryError:
        raise
    except Exception as error:
        node = failed_at(error)
        what = "the trace" if node is None else described_as_lowered(node)
        msg = f"coremltools can't lower {what}: {gist(error)}"
        raise FrontendError(msg) from error


def _tensor_type(item: torch.Tensor) -> Any:
    import coremltools as ct

    kind = np.float32 if item.is_floating_point() else np.int32
    return ct.TensorType(shape=tuple(item.shape), dtype=kind)
