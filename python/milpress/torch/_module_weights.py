"""The weights of a torch model: parameters that Core ML can hold compressed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize

from milpress.formats.rows import Floats
from milpress.torch.registration import KINDS, Axes, Kinds, axes_of_weights


@dataclass(frozen=True, slots=True)
class ModuleWeight:
    """A parameter of a module, or a matrix of one that is a stack of them.

    Parameters
    ----------
    module_name, module
        The module, and its name in the model, empty for the model itself.
    parameter_name
        Name in the module.
    index
        Which matrix of the stack; empty for the whole parameter.
    """

    module_name: str
    module: nn.Module
    parameter_name: str
    index: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """Name in the model, as in its state dict."""
        parts = (self.module_name, self.parameter_name)
        name = ".".join(part for part in parts if part)
        return f"{name}{list(self.index)}" if self.index else name

    @property
    def tensor(self) -> torch.Tensor | None:
        """The parameter; ``None`` where the module computes its weight instead of holding it."""
        parameter = self.module._parameters.get(self.parameter_name)
        return parameter[self.index] if self.index and parameter is not None else parameter

    @property
    def has_shape(self) -> bool:
        """Whether it is a parameter with a shape; one of a lazy module gets it by the first run."""
        return self.tensor is not None and not nn.parameter.is_lazy(self.tensor)

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape; ``(0,)`` where there is none yet."""
        return tuple(self.tensor.shape) if self.tensor is not None and self.has_shape else (0,)

    @property
    def dtype(self) -> torch.dtype | None:
        """Its type; ``None`` where the module computes its weight."""
        return None if self.tensor is None else self.tensor.dtype

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def axes(self) -> Axes:
        """Axes of output and input channels."""
        output, inputs = axes_of_weights(self.module).get(self.parameter_name, (0, 1))
        return output - len(self.index), inputs - len(self.index)

    @property
    def n_conv_groups(self) -> int:
        """Groups of a grouped convolution, which no vector may cross."""
        return int(getattr(self.module, "groups", 1))

    def matrices(self) -> list[ModuleWeight]:
        """Return the matrices of a stack, of which each is a weight; else the weight itself."""
        n_axes = min(self.axes)
        return [replace(self, index=index) for index in np.ndindex(self.shape[:n_axes])]


def weights_of(model: nn.Module, kinds: Kinds) -> Iterator[ModuleWeight]:
    """Yield the weights of the modules of some kinds, in order, each module once.

    Those of registered classes, and of layers of transformers, are among them.
    """
    for name, module in model.named_modules():
        for parameter_name in axes_of_weights(module, kinds):
            yield ModuleWeight(name, module, parameter_name)


def parameters_of(model: nn.Module) -> Iterator[ModuleWeight]:
    """Yield the floating parameters of two and more axes, or without a shape yet, in order."""
    for name, module in model.named_modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            has_shape = not nn.parameter.is_lazy(parameter)
            if parameter.is_floating_point() and (not has_shape or parameter.ndim > 1):
                yield ModuleWeight(name, module, parameter_name)


def others_of(
    model: nn.Module, weights: Iterable[ModuleWeight]
) -> Iterator[tuple[ModuleWeight, str]]:
    """Yield the parameters with a shape of two and more axes that are not among some weights.

    Each comes with the reason; tied ones are yielded once.
    """
    known = {id(weight.tensor) for weight in weights}
    for weight in parameters_of(model):
        if weight.has_shape and id(weight.tensor) not in known:
            known.add(id(weight.tensor))
            yield weight, why_other(weight)


def why_other(weight: ModuleWeight) -> str:
    """Return why a parameter is none of the weights that are known of its module."""
    module = weight.module
    kind = type(module).__name__
    if isinstance(module, parametrize.ParametrizationList):
        owner, _, computed = weight.module_name.partition("parametrizations.")
        return (
            f"{owner}{computed} is computed from it, by a parametrization; "
            "torch.nn.utils.parametrize.remove_parametrizations makes that a weight"
        )
    computed = next((n for n in axes_of_weights(module) if n not in module._parameters), "")
    if computed:
        return f"{computed} is computed from it; make that a parameter of its own first"
    if isinstance(module, KINDS):
        return f"it is no weight that {kind} multiplies by"
    return f"what {kind} multiplies by is not known, milpress.torch.register_module says it"


def attention_around(model: nn.Module, name: str) -> tuple[str, nn.Module] | None:
    """Return the attention, by its name, whose output projection a module is."""
    holder, _, own_name = name.rpartition(".")
    module = model.get_submodule(holder) if own_name == "out_proj" else None
    return (holder, module) if isinstance(module, nn.MultiheadAttention) else None


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
