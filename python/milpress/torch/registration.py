"""Which parameters of a module are weights, and which of their axes are channels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import nn

from milpress.errors import ConfigError, ConfigTypeError

__all__ = ["register_module"]

Kinds: TypeAlias = tuple[type[nn.Module], ...]
Axes: TypeAlias = tuple[int, int]

CONVOLUTIONS: Kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED: Kinds = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
RECURRENT: Kinds = (nn.LSTM, nn.GRU)
KINDS: Kinds = (
    nn.Linear,
    nn.Embedding,
    nn.EmbeddingBag,
    *CONVOLUTIONS,
    *TRANSPOSED,
    nn.MultiheadAttention,
    *RECURRENT,
)

_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")

_registered: dict[type[nn.Module], dict[str, Axes]] = {}
_products: dict[type[nn.Module], dict[str, Callable[..., Any]]] = {}


def register_module(
    cls: type[nn.Module],
    parameters: str | Iterable[str] | Mapping[str, Axes] = "weight",
    axes: Axes = (0, 1),
    products: Mapping[str, Callable[..., Any]] | None = None,
) -> None:
    """Have a class of modules of your own compressed, and all that inherit from it.

    Without it, parameters of modules that torch and transformers don't have are left, with a row in
    the report that says so. A later call for the same class takes the place of the earlier one.

    Parameters
    ----------
    cls
        The class.
    parameters
        Names of the parameters that are weights; or a mapping from these to the axes of each.
    axes
        Axes of output and input channels of the parameters. Axes before both of them count the
        matrices of a stack, such as the experts of a mixture, and are 0 for the first: each matrix
        is compressed by itself. Axes behind both are those of a kernel.
    products
        For `LayerwiseCompressor`, functions by the names of parameters, which return what a
        parameter is multiplied by. They are called before the module runs, in their order, with
        the module and what its ``forward`` takes, and return a tensor of any floating type with the
        input channels along its last axis; of a stack, one for each matrix, or ``None`` where
        nothing comes to it. Only where a ``forward`` multiplies in a way of its own: products by
        `torch.nn.functional.linear`, ``@``, ``torch.einsum``, convolutions and the like are found.

    Raises
    ------
    ConfigTypeError
        If ``cls`` is no class of modules, a name is no text, or a product is no function.
    ConfigError
        If there is no name, axes are not two different numbers of at least 0, or there are products
        of what is no parameter of a matrix or a stack of them.

    Examples
    --------
    >>> class Experts(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.up = nn.Parameter(torch.randn(4, 64, 32))  # [expert, output, input]
    >>> register_module(Experts, "up", axes=(1, 2))
    """
    kind: Any = cls
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        msg = f"cls must be a class of modules, got {cls!r}"
        raise ConfigTypeError(msg)
    names = [parameters] if isinstance(parameters, str) else list(parameters)
    given = parameters if isinstance(parameters, Mapping) else dict.fromkeys(names, axes)
    if not given:
        msg = "parameters must name at least one parameter, got none"
        raise ConfigError(msg)
    checked = {_checked_name(name): _checked_axes(pair) for name, pair in given.items()}
    _products[cls] = _checked_products(products or {}, checked)
    _registered[cls] = checked


def _checked_name(name: Any) -> str:
    if not isinstance(name, str):
        msg = f"parameters must be names, got {name!r}"
        raise ConfigTypeError(msg)
    return name


def _checked_axes(axes: Any) -> Axes:
    pair = tuple(axes) if isinstance(axes, (tuple, list)) else ()
    if (
        len(pair) != 2
        or any(type(axis) is not int or axis < 0 for axis in pair)
        or pair[0] == pair[1]
    ):
        msg = f"axes must be two different numbers, of output and input channels, got {axes!r}"
        raise ConfigError(msg)
    return pair


def _checked_products(
    products: Mapping[str, Any], parameters: Mapping[str, Axes]
) -> dict[str, Callable[..., Any]]:
    for name, function in products.items():
        if name not in parameters:
            msg = f"products must be of {', '.join(parameters)}, got {name!r}"
            raise ConfigError(msg)
        if not callable(function):
            msg = f"products must be functions, got {function!r} for {name}"
            raise ConfigTypeError(msg)
        if abs(parameters[name][0] - parameters[name][1]) != 1:
            msg = f"the axes of {name} must be neighbours for its products, got {parameters[name]}"
            raise ConfigError(msg)
    return dict(products)


def products_of(module: nn.Module) -> Mapping[str, Callable[..., Any]]:
    """Return what says what parameters of a module are multiplied by, where that was registered."""
    kind = next((kind for kind in type(module).__mro__ if kind in _registered), None)
    return {} if kind is None else _products[kind]


def registered() -> Kinds:
    """Return the classes that were registered."""
    return tuple(_registered)


def axes_of_weights(module: nn.Module, kinds: Kinds = KINDS) -> dict[str, Axes]:
    """Return the axes of output and input channels of the weights of a module, by their names.

    Parameters
    ----------
    module
        The module. Weights that it may have and hasn't are not in the result.
    kinds
        The classes of torch whose weights are wanted; those that were registered, and those of
        transformers, always are.
    """
    for kind in type(module).__mro__:
        if kind in _registered:
            return _registered[kind]
    if isinstance(module, kinds):
        return _of_torch(module)
    return {} if isinstance(module, KINDS) else _of_transformers(module)


def _of_torch(module: nn.Module) -> dict[str, Axes]:
    if isinstance(module, nn.MultiheadAttention):
        names = [name for name in _PROJECTIONS if getattr(module, name, None) is not None]
        return dict.fromkeys(names, (0, 1))
    if isinstance(module, RECURRENT):
        names = [name for name, _ in module.named_parameters(recurse=False)]
        return dict.fromkeys([name for name in names if name.startswith("weight_")], (0, 1))
    return {"weight": (1, 0) if isinstance(module, TRANSPOSED) else (0, 1)}


# What mixtures of experts call their stacks of matrices.
_FIRST = ("gate_up_proj", "gate_proj", "up_proj")
_EXPERTS = (*_FIRST, "down_proj", "weight")


def _of_transformers(module: nn.Module) -> dict[str, Axes]:
    """Return the axes of the weights of layers of transformers, which is not imported for that."""
    kind = type(module)
    if kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers."):
        return {"weight": (1, 0)}
    if "Expert" not in kind.__name__ and not hasattr(module, "is_transposed"):
        return {}
    # Attributes, for a stack that is pruned while it is trained is no parameter of its name.
    tensors = {name: getattr(module, name, None) for name in _EXPERTS}
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in tensors.items()
        if isinstance(tensor, torch.Tensor) and tensor.ndim == 3
    }
    is_transposed = getattr(module, "is_transposed", None)
    if is_transposed is None:
        is_transposed = _is_transposed(shapes)
    return dict.fromkeys(shapes, (2, 1) if is_transposed else (1, 2))


def _is_transposed(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether matrices have the axis of inputs first: whatever comes in first goes out last."""
    first = next((shapes[name] for name in _FIRST if name in shapes), None)
    last = shapes.get("down_proj")
    if first is None or last is None:
        return False
    return first[1] == last[2] and first[2] != last[1]
