"""The weights of a torch model: parameters that Core ML can hold compressed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from milpress.formats.rows import Floats

Kinds: TypeAlias = tuple[type[nn.Module], ...]

CONVOLUTIONS: Kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED: Kinds = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
RECURRENT: Kinds = (nn.LSTM, nn.GRU)
KINDS: Kinds = (
    nn.Linear,
    nn.Embedding,
    *CONVOLUTIONS,
    *TRANSPOSED,
    nn.MultiheadAttention,
    *RECURRENT,
)
# Recurrent layers keep references to their weights, which no other tensor can take the place of.
TRAINABLE: Kinds = tuple(kind for kind in KINDS if kind not in RECURRENT)

_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass(frozen=True, slots=True)
class ModuleWeight:
    """A parameter of a module.

    Parameters
    ----------
    module_name, module
        The module, and its name in the model, empty for the model itself.
    parameter_name
        Name in the module.
    """

    module_name: str
    module: nn.Module
    parameter_name: str

    @property
    def name(self) -> str:
        """Name in the model, as in its state dict."""
        parts = (self.module_name, self.parameter_name)
        return ".".join(part for part in parts if part)

    @property
    def tensor(self) -> torch.Tensor | None:
        """The parameter; ``None`` where the module computes its weight instead of holding it."""
        return self.module._parameters.get(self.parameter_name)

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape; ``(0,)`` where there is none yet."""
        tensor = self.tensor
        return (0,) if tensor is None or nn.parameter.is_lazy(tensor) else tuple(tensor.shape)

    @property
    def dtype(self) -> torch.dtype | None:
        """Its type; ``None`` where the module computes its weight."""
        return None if self.tensor is None else self.tensor.dtype

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def axes(self) -> tuple[int, int]:
        """Axes of output and input channels."""
        return (1, 0) if isinstance(self.module, TRANSPOSED) else (0, 1)

    @property
    def n_conv_groups(self) -> int:
        """Groups of a grouped convolution, which no vector may cross."""
        return int(getattr(self.module, "groups", 1))


def weights_of(model: nn.Module, kinds: Kinds) -> Iterator[ModuleWeight]:
    """Yield the weights of the modules of some kinds, in order, each module once."""
    for name, module in model.named_modules():
        if isinstance(module, kinds):
            for parameter_name in _parameter_names(module):
                yield ModuleWeight(name, module, parameter_name)


def attention_around(model: nn.Module, name: str) -> tuple[str, nn.Module] | None:
    """Return the attention, by its name, whose output projection a module is."""
    holder, _, own_name = name.rpartition(".")
    module = model.get_submodule(holder) if own_name == "out_proj" else None
    return (holder, module) if isinstance(module, nn.MultiheadAttention) else None


def _parameter_names(module: nn.Module) -> tuple[str, ...]:
    if isinstance(module, nn.MultiheadAttention):
        return tuple(name for name in _PROJECTIONS if getattr(module, name, None) is not None)
    if isinstance(module, RECURRENT):
        names = [name for name, _ in module.named_parameters(recurse=False)]
        return tuple(name for name in names if name.startswith("weight_"))
    return ("weight",)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a parameter on the CPU, put together if it is spread over processes."""
    values: Any = tensor.detach()
    complete: torch.Tensor = values.full_tensor() if is_spread(tensor) else values
    return complete if complete.is_meta else complete.cpu()


def representable(values: Floats, dtype: torch.dtype | None) -> Floats:
    """Return values as a weight of a type has them, which NumPy may not have."""
    if dtype != torch.bfloat16:
        return values
    rounded: Floats = torch.tensor(values).to(dtype).float().numpy()
    return rounded


def is_spread(tensor: torch.Tensor) -> bool:
    """Whether a tensor is spread over processes, a ``DTensor``, whose class is slow to import."""
    return hasattr(tensor, "full_tensor")
