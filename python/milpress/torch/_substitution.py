"""Other weights for the time of a forward pass.

A module whose weight is pruned, palettized or quantized while it is trained stays what it is: its
class, and the names of its parameters. Before it runs, a hook puts the tensor that it is to compute
with where the module looks for its weight, as an attribute of the instance, which hides the
parameter; afterwards the attribute is gone. Hooks are plain objects that refer to no module, so a
model with them can be copied, saved and compiled.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from milpress.torch import _metadata
from milpress.torch._module_weights import ModuleWeight, attention_around, weights_of
from milpress.torch.registration import Kinds

if TYPE_CHECKING:
    from typing_extensions import Self


class Hooks(ABC):
    """What is done before and after a module runs."""

    @abstractmethod
    def before(self, host: nn.Module, _args: Any) -> None:
        """Do what comes before."""

    @abstractmethod
    def after(self, host: nn.Module, _args: Any, _output: Any) -> None:
        """Do what comes after."""

    def attach(self, host: nn.Module, *, first: bool = False) -> None:
        """Do it whenever a module runs; ``first`` lets other hooks come later."""
        host.register_forward_pre_hook(self.before, prepend=first)
        host.register_forward_hook(self.after, always_call=True)

    def detach(self, host: nn.Module) -> None:
        """Undo `attach`."""
        for hooks in (host._forward_pre_hooks, host._forward_hooks):
            for key in [k for k, hook in hooks.items() if getattr(hook, "__self__", None) is self]:
                del hooks[key]
                host._forward_hooks_always_called.pop(key, None)

    @classmethod
    def of(cls, host: nn.Module) -> list[Self]:
        """Return those of this class that a module has."""
        hooks = (getattr(hook, "__self__", None) for hook in host._forward_pre_hooks.values())
        return [hook for hook in hooks if isinstance(hook, cls)]


class Substitution(Hooks):
    """Puts other tensors in the place of weights of a module while a module around it runs.

    Parameters
    ----------
    path
        The module that holds the weights, as seen from the one that runs; empty for itself.
    names
        The weights.
    """

    # What the model is prepared for.
    purpose: ClassVar[str]

    def __init__(self, path: str, names: tuple[str, ...]) -> None:
        self.path = path
        self.names = names
        # Those that were pruned for good: what is zero stays zero.
        self.sparse: tuple[str, ...] = ()

    def attach(self, host: nn.Module, *, first: bool = False) -> None:
        """Do it whenever a module runs; ``first`` lets other hooks come later."""
        owner = host.get_submodule(self.path)
        weights = [ModuleWeight("", owner, name) for name in self.names]
        self.sparse = tuple(w.parameter_name for w in weights if _metadata.is_pruned(w))
        super().attach(host, first=first)

    def original(self, owner: nn.Module, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return a weight, and 0 where it is pruned, else 1; ``None`` where it is not.

        What is zero for good gets no gradient.
        """
        weight: torch.Tensor = getattr(owner, name)
        if name not in self.sparse:
            return weight, owner._buffers.get(f"{name}_mask")
        kept = weight.detach().ne(0).to(weight.dtype)
        return weight * kept, kept

    @abstractmethod
    def substitute(self, owner: nn.Module, name: str) -> torch.Tensor:
        """Return what a module is to compute with instead of one of its weights."""

    def before(self, host: nn.Module, _args: Any) -> None:
        """Hide the weights."""
        owner = host.get_submodule(self.path)
        for name in self.names:
            # nn.Module's own __setattr__ takes nothing but parameters in the place of one.
            object.__setattr__(owner, name, self.substitute(owner, name))
        refer(owner)

    def after(self, host: nn.Module, _args: Any, _output: Any) -> None:
        """Show the weights again."""
        owner = host.get_submodule(self.path)
        for name in self.names:
            if name in owner.__dict__:
                object.__delattr__(owner, name)
        refer(owner)


def refer(owner: nn.Module) -> None:
    """Let a recurrent layer, which has its weights in a list as well, see those of its names."""
    if isinstance(owner, nn.RNNBase):
        weights = [getattr(owner, name, None) for name in owner._flat_weights_names]
        object.__setattr__(owner, "_flat_weights", weights)


class ZerosKept(Substitution):
    """Keeps what was pruned for good at zero while something else of the model is trained."""

    def __init__(self, path: str, names: tuple[str, ...], purpose: str) -> None:
        super().__init__(path, names)
        self.purpose = purpose  # type: ignore[misc]

    def substitute(self, owner: nn.Module, name: str) -> torch.Tensor:
        """Return a weight that gets no gradient where it is zero."""
        return self.original(owner, name)[0]


def places(model: nn.Module, kinds: Kinds) -> list[tuple[list[ModuleWeight], nn.Module, str]]:
    """Return the weights of each module, what computes with them, and the path from there.

    Attention computes with the weight of its output projection, whose own ``forward`` never runs.
    """
    hosted = []
    for name, weights in groupby(weights_of(model, kinds), attrgetter("module_name")):
        owned = list(weights)
        attention = attention_around(model, name)
        host, path = (owned[0].module, "") if attention is None else (attention[1], "out_proj")
        hosted.append((owned, host, path))
    return hosted


def plain(model: nn.Module) -> nn.Module:
    """Return the model inside what ``torch.compile`` and ``DistributedDataParallel`` put around."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner
