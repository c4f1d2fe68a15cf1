"""A module's ``forward`` as Core ML calls it: tensors of its types in, a row of tensors out."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree

from milpress.errors import ConfigTypeError

# Core ML has no inputs of these types.
_GIVEN_AS = {
    torch.float64: torch.float32,
    torch.bool: torch.int32,
    torch.uint8: torch.int32,
    torch.int8: torch.int32,
    torch.int16: torch.int32,
}


@contextmanager
def flat(module: nn.Module, inputs: tuple[Any, ...]) -> Iterator[tuple[torch.Tensor, ...]]:
    """Have a module take a row of tensors of Core ML's types and give a row of tensors.

    Tensors of other types are given as 32-bit ones, those inside of others one by one, and what
    is no tensor stays as in the example. Inputs keep the names of the parameters of ``forward``.

    Yields
    ------
    The example inputs that the module takes inside of the block.

    Raises
    ------
    ConfigTypeError
        If no input is a tensor.
    """
    own = vars(module).get("forward")
    forward = module.forward
    if all(isinstance(item, torch.Tensor) and item.dtype not in _GIVEN_AS for item in inputs):
        tensors, call = inputs, forward
    else:
        tensors, call = _of_tensors(forward, inputs)

    @functools.wraps(call)
    def in_a_row(*arguments: Any, **keywords: Any) -> Any:
        result = call(*arguments, **keywords)
        if isinstance(result, torch.Tensor):
            return result
        leaves = [leaf for leaf in _pytree.tree_leaves(result) if leaf is not None]
        return tuple(leaves)

    module.forward = in_a_row
    try:
        yield tensors
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _of_tensors(
    forward: Callable[..., Any], inputs: tuple[Any, ...]
) -> tuple[tuple[torch.Tensor, ...], Callable[..., Any]]:
    """Return the tensors in inputs, and what takes them in the place of ``forward``."""
    paths, structure = _pytree.tree_flatten_with_path(inputs)
    leaves = [leaf for _, leaf in paths]
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    if not places:
        msg = "example_inputs must hold a tensor"
        raise ConfigTypeError(msg)

    def call(*tensors: torch.Tensor) -> Any:
        given = list(leaves)
        for i, tensor in zip(places, tensors, strict=True):
            given[i] = tensor.to(leaves[i].dtype)
        return forward(*_pytree.tree_unflatten(given, structure))

    names = _names(forward, len(inputs))
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [
        inspect.Parameter(_name(names, paths[i][0]), kind)  # one for each tensor
        for i in places
    ]
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return tuple(leaves[i].to(_GIVEN_AS.get(leaves[i].dtype)) for i in places), call


def _names(forward: Callable[..., Any], n: int) -> list[str]:
    """Return the names of the first parameters of a function."""
    names: list[str] = []
    for parameter in inspect.signature(forward).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            return names + [f"{parameter.name}_{i}" for i in range(n - len(names))]
        names.append(parameter.name)
    return names[:n]


def _name(names: list[str], path: tuple[Any, ...]) -> str:
    """Return the name of what is somewhere inside of an argument."""
    first, *others = path
    parts = [names[first.idx]]
    for key in others:
        parts.append(str(getattr(key, "idx", getattr(key, "key", getattr(key, "name", "")))))
    return "_".join(part for part in parts if part.isidentifier() or part.isdecimal())
