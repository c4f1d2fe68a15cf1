"""What a model is prepared for, and what may be done to it then.

Several preparations go together where they work on the same model, and on different weights of it
or in turn: pruning comes last, as it hides the weights that the others look for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

from torch import nn

from milpress.errors import LifecycleError
from milpress.torch import _metadata
from milpress.torch._module_weights import ModuleWeight
from milpress.torch._substitution import Substitution, plain

PRUNING, PALETTIZATION, QUANTIZATION = "pruning", "palettization", "quantization"

_SUCCESSOR = "_milpress_successor"


class Fake(nn.Module):
    """A layer that does, while a model is trained, what will be done to it for good.

    A checkpoint that holds nothing of such a layer, as one of the float model, leaves it as it is.
    """

    purpose: ClassVar[str]
    # Whether it returns what it is given, and learns nothing of it.
    is_asleep = False

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        if not any(key.startswith(prefix) for key in state_dict):
            state_dict.update(self.state_dict(prefix=prefix))
        super()._load_from_state_dict(state_dict, prefix, *arguments)


class Final(nn.Module):
    """A layer of a finalized model that no gradient passes."""


@contextlib.contextmanager
def asleep(model: nn.Module) -> Iterator[None]:
    """Have a model compute as if it were not prepared, pruning aside, for the time of a block."""
    fakes = [module for module in model.modules() if isinstance(module, Fake)]
    try:
        for fake in fakes:
            fake.is_asleep = True
        yield
    finally:
        for fake in fakes:
            fake.is_asleep = False


def purposes(model: nn.Module) -> list[str]:
    """Return what a model is prepared for."""
    found = set()
    for module in plain(model).modules():
        if isinstance(module, Fake):
            found.add(module.purpose)
        found.update(hook.purpose for hook in Substitution.of(module))
    return sorted(found)


def check_joining(model: nn.Module, purpose: str, *, inplace: bool) -> None:
    """Raise `LifecycleError` if a model can't be prepared for a purpose, too."""
    others = purposes(model)
    if purpose in others:
        msg = (
            f"the model is prepared for {purpose} already: train it as it is, or prepare the "
            "original model with one config for all of its layers"
        )
        raise LifecycleError(msg)
    if PRUNING in others:
        msg = f"prepare {purpose} before pruning: this model is prepared for pruning already"
        raise LifecycleError(msg)
    if others and not inplace:
        msg = (
            f"a model that is prepared for {' and '.join(others)} must be prepared for {purpose} "
            "with inplace=True, so that both work on the same model"
        )
        raise LifecycleError(msg)
    if any(isinstance(module, Final) for module in plain(model).modules()):
        msg = (
            "the model is finalized after quantization: no gradient passes its rounded "
            f"activations; prepare {purpose} before quantization is finalized"
        )
        raise LifecycleError(msg)


def check_unclaimed(weights: Iterable[ModuleWeight], purpose: str) -> None:
    """Raise `LifecycleError` if training would undo what is done to weights, or will be."""
    for weight in weights:
        if _metadata.is_coded(weight):
            what = "is compressed already, which training would undo"
        elif purpose != PRUNING and hasattr(weight.module, f"{weight.parameter_name}_fake_quant"):
            fake = getattr(weight.module, f"{weight.parameter_name}_fake_quant")
            what = f"is prepared for {getattr(fake, 'purpose', 'quantization')} already"
        else:
            continue
        leave = "a config of None"
        if purpose == QUANTIZATION:
            leave = 'weight_dtype="float32", which still rounds activations'
        msg = f"{weight.name} {what}: leave its module out of {purpose} by {leave}"
        raise LifecycleError(msg)


def check_prepared(model: nn.Module, purpose: str) -> None:
    """Raise `LifecycleError` if nothing of a preparation is in a model that is to be finalized."""
    if purpose not in purposes(model):
        msg = (
            f"the model to finalize is not prepared for {purpose}, or finalized already: give "
            "finalize the model that prepare returned, or what the other optimizers made of it"
        )
        raise LifecycleError(msg)


def check_last(model: nn.Module, purpose: str) -> None:
    """Raise `LifecycleError` if a model is still prepared for something else."""
    others = [other for other in purposes(model) if other != purpose]
    if others:
        msg = (
            f"finalize {' and '.join(others)} before {purpose}: this model is still prepared for it"
        )
        raise LifecycleError(msg)


def check_finalized(model: nn.Module) -> None:
    """Raise `LifecycleError` if a model is prepared for something."""
    found = purposes(model)
    if found:
        msg = f"the model is prepared for {' and '.join(found)}: finalize it first"
        raise LifecycleError(msg)


def succeed(model: nn.Module, successor: nn.Module) -> None:
    """Say that another model with the same modules, such as a graph, has taken a model's place."""
    if successor is not model:
        model.__dict__[_SUCCESSOR] = successor


def latest(model: nn.Module) -> nn.Module:
    """Return the model that has taken a model's place, or itself."""
    while isinstance(successor := model.__dict__.get(_SUCCESSOR), nn.Module):
        model = successor
    return model
