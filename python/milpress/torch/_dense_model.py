"""A compressed module as coremltools converts it if its buffers say nothing of compression."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import nn

from milpress.errors import ConfigTypeError
from milpress.torch import _metadata
from milpress.torch._modes import evaluating
from milpress.torch.registration import RECURRENT

Frontend: TypeAlias = Literal["export", "trace"]

# These would fold another op into a weight, which then is not what was compressed.
_FOLDING_PASSES = {"common::fuse_conv_batchnorm", "common::fuse_conv_scale"}


def dense_model(
    module: nn.Module,
    example_inputs: tuple[Any, ...],
    frontend: Frontend | None,
    dynamic_shapes: Any,
    settings: dict[str, Any],
) -> Any:
    """Convert a module without what its buffers say of compression."""
    import coremltools as ct

    settings = {
        "minimum_deployment_target": ct.target.iOS18,
        **settings,
        "convert_to": "mlprogram",
        "skip_model_load": True,  # it is the compressed model that is wanted
    }
    if "pass_pipeline" not in settings:
        pipeline = ct.PassPipeline.DEFAULT
        pipeline.remove_passes(_FOLDING_PASSES)
        settings["pass_pipeline"] = pipeline
    if any(_is_foreign(parameter) for parameter in module.parameters()):
        # Every smaller type is exact in float32, which is what coremltools converts best.
        module = copy.deepcopy(module).float().cpu()
        example_inputs = tuple(_widened(item) for item in example_inputs)
    if frontend is None:
        recurrent = any(isinstance(part, RECURRENT) for part in module.modules())
        frontend = "trace" if recurrent else "export"
    with _uncompressed(module):
        if frontend == "export":
            exported = torch.export.export(module, example_inputs, dynamic_shapes=dynamic_shapes)
            return ct.convert(exported.run_decompositions({}), **settings)
        traced = torch.jit.trace(module, example_inputs)  # type: ignore[no-untyped-call]
        if "inputs" not in settings:
            settings["inputs"] = [_tensor_type(ct, item) for item in example_inputs]
        return ct.convert(traced, **settings)


def _is_foreign(tensor: torch.Tensor) -> bool:
    """Whether a tensor is not on the CPU, or of floats of another width than 32 bits."""
    is_wide = tensor.dtype == torch.float32 or not tensor.is_floating_point()
    return tensor.device.type != "cpu" or not is_wide


def _widened(item: Any) -> Any:
    if not isinstance(item, torch.Tensor):
        return item
    return item.float().cpu() if item.is_floating_point() else item.cpu()


def _tensor_type(ct: Any, item: Any) -> Any:
    if not isinstance(item, torch.Tensor):
        msg = f"example_inputs must be tensors to be traced, got {type(item).__name__}"
        raise ConfigTypeError(msg)
    kind = np.float32 if item.is_floating_point() else np.int32
    return ct.TensorType(shape=tuple(item.shape), dtype=kind)


@contextlib.contextmanager
def _uncompressed(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode, and take away what its buffers say of compression."""
    before = [(part, dict(part._buffers)) for part in module.modules()]
    fast_attention = torch.backends.mha.get_fastpath_enabled()
    # An op of its own for inference, which coremltools does not know.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        for part, buffers in before:
            for name in buffers:
                if name.startswith((f"{_metadata.PREFIX}/", f"{_metadata.OWN_PREFIX}/")):
                    del part._buffers[name]
        with evaluating(module):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_attention)
        for part, buffers in before:
            part._buffers.clear()
            part._buffers.update(buffers)
