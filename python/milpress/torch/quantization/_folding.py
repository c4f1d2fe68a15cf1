"""Layers with rounded weights, and the batch normalization that is folded into them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from milpress.torch._lifecycle import QUANTIZATION
from milpress.torch._module_weights import ModuleWeight
from milpress.torch._substitution import Hooks, Substitution, plain
from milpress.torch.quantization.quantization_config import ModuleLinearQuantizerConfig


@dataclass(frozen=True, slots=True)
class RoundedLayer:
    """A module whose weight is rounded, and the batch normalization that is folded into it."""

    name: str
    config: ModuleLinearQuantizerConfig
    norm: str | None


class RoundedWeight(Substitution):
    """Lets a layer compute with its rounded weights.

    Where batch normalization follows, it is the weight multiplied by the scale of each channel that
    is rounded, as it will be exported, and then divided by it again. The normalization is not a
    module of this layer, which must not own it.
    """

    purpose = QUANTIZATION

    def __init__(
        self, path: str, names: tuple[str, ...], norm: nn.Module | None = None, output: int = 0
    ) -> None:
        super().__init__(path, names)
        self.norm = norm
        self.output = output

    def substitute(self, owner: nn.Module, name: str) -> torch.Tensor:
        """Return the rounded weight."""
        weight, _ = self.original(owner, name)
        fake: Any = owner.get_submodule(f"{name}_fake_quant")
        if self.norm is None:
            rounded: torch.Tensor = fake(weight)
            return rounded
        scale = channel_scale(self.norm, weight.ndim, self.output, owner)
        # A channel that normalization multiplies by zero has no say in the output.
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        folded: torch.Tensor = fake(weight * scale) / scale
        return folded


class _Frozen(Hooks):
    """Keeps batch normalization to its running statistics."""

    def before(self, module: nn.Module, _args: Any) -> None:
        """Let it compute as in evaluation."""
        module.__dict__["_was_training"] = module.training
        module.training = False

    def after(self, module: nn.Module, _args: Any, _output: Any) -> None:
        """Give it its mode back."""
        module.training = module.__dict__.pop("_was_training", module.training)


def freeze(model: nn.Module) -> None:
    """Keep the batch normalizations that are folded to their running statistics."""
    for module in plain(model).modules():
        for rounded in RoundedWeight.of(module):
            norm = rounded.norm
            if norm is not None and not norm.__dict__.get("freeze_bn", False):
                _Frozen().attach(norm)
                norm.__dict__["freeze_bn"] = True


def thaw(module: nn.Module) -> None:
    """Undo `freeze`."""
    for frozen in _Frozen.of(module):
        frozen.detach(module)
    module.__dict__.pop("freeze_bn", None)


def channel_scale(norm: Any, rank: int, output: int, owner: Any) -> torch.Tensor:
    """Return what batch normalization multiplies each output channel by, in a weight's shape."""
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    groups = int(getattr(owner, "groups", 1))
    if output == 1 and groups > 1:
        # Input channels of a group have the output channels of that group.
        n_inputs = owner.in_channels // groups
        parted: torch.Tensor = scale.reshape(groups, -1).repeat_interleave(n_inputs, dim=0)
        return parted.reshape(*parted.shape, *[1] * (rank - 2))
    shape = [1] * rank
    shape[output] = -1
    spread: torch.Tensor = scale.reshape(shape)
    return spread


@torch.no_grad()
def fold(layer: Any, norm: Any) -> None:
    """Fold batch normalization into the layer before it."""
    weight = ModuleWeight("", layer, "weight")
    parameter = layer._parameters["weight"]
    parameter.copy_(parameter * channel_scale(norm, parameter.ndim, weight.axes[0], layer))
    scale = (norm.running_var + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight
    bias = torch.zeros_like(norm.running_mean) if layer.bias is None else layer.bias
    bias = (bias - norm.running_mean) * scale
    bias = bias if norm.bias is None else bias + norm.bias
    if layer.bias is None:
        layer.register_parameter("bias", nn.Parameter(bias))
    else:
        layer.bias.copy_(bias)
