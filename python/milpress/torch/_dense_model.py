"""A compressed module as coremltools converts it if its buffers say nothing of compression."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree

from milpress.torch import _metadata
from milpress.torch._frontends.converting import Frontend, converted
from milpress.torch._modes import evaluating

# These would fold another op into a weight, which then is not what was compressed.
_FOLDING_PASSES = {"common::fuse_conv_batchnorm", "common::fuse_conv_scale"}


def dense_model(
    module: nn.Module,
    example_inputs: tuple[Any, ...],
    frontend: Frontend | None,
    dynamic_shapes: Any,
    settings: dict[str, Any],
) -> tuple[Any, tuple[str, ...]]:
    """Convert a module without what its buffers say of compression.

    Returns
    -------
    The model, and what its report is to say of the conversion.
    """
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
        example_inputs = _pytree.tree_map(_widened, example_inputs)
    with _uncompressed(module), torch.no_grad():
        return converted(module, example_inputs, frontend, dynamic_shapes, settings)


def _is_foreign(tensor: torch.Tensor) -> bool:
    """Whether a tensor is not on the CPU, or of floats of another width than 32 bits."""
    is_wide = tensor.dtype == torch.float32 or not tensor.is_floating_point()
    return tensor.device.type != "cpu" or not is_wide


def _widened(item: Any) -> Any:
    if not isinstance(item, torch.Tensor):
        return item
    return item.float().cpu() if item.is_floating_point() else item.cpu()


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
