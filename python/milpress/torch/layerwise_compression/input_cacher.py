"""Inputs of the first layer that is to be compressed."""

from __future__ import annotations

import contextlib
import re
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import torch
from torch import nn

from milpress.errors import ConfigError
from milpress.torch.layerwise_compression._registry import Registered

__all__ = ["DefaultInputCacher", "FirstLayerInputCacher", "GPTFirstLayerInputCacher"]


class FirstLayerInputCacher(Registered):
    """Finds what goes into the first of the layers that are to be compressed.

    `LayerwiseCompressor` runs the model itself and needs none; it uses those of other classes than
    these, which its config may name.

    Parameters
    ----------
    model
        The model.
    layers
        The layers: regular expressions for their names, or modules; ``None`` for all children.
    """

    def __init__(self, model: nn.Module, layers: Any) -> None:
        self._model = model
        self._layers = layers

    @abstractmethod
    def cache(
        self, dataloader: Iterable[Any], nsamples: int, device: str
    ) -> tuple[list[Any], dict[str, Any]]:
        """Return the inputs of the layer, one for each batch, and its keyword arguments."""


@FirstLayerInputCacher.register("default")
class DefaultInputCacher(FirstLayerInputCacher):
    """Takes the batches themselves: the first layer is the first of the model."""

    def cache(
        self, dataloader: Iterable[Any], nsamples: int, device: str
    ) -> tuple[list[Any], dict[str, Any]]:
        """Return the batches."""
        return [moved(batch, device) for batch in islice(dataloader, nsamples)], {}


@FirstLayerInputCacher.register("gpt")
class GPTFirstLayerInputCacher(FirstLayerInputCacher):
    """Runs the model up to the first layer that is to be compressed."""

    def cache(
        self, dataloader: Iterable[Any], nsamples: int, device: str
    ) -> tuple[list[Any], dict[str, Any]]:
        """Return what the first layer is called with; keyword arguments are those of all batches.

        Raises
        ------
        ConfigError
            If there is no such layer.
        """
        modules = self._model.named_modules()
        first = next((module for name, module in modules if self._is_first(name, module)), None)
        if first is None:
            msg = f"layers must name a module of the model, got {self._layers!r}"
            raise ConfigError(msg)
        inputs: list[Any] = []
        kwargs: dict[str, Any] = {}

        def keep(_module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
            inputs.append(args)
            kwargs.update(given)
            raise _Reached

        with first.register_forward_pre_hook(keep, with_kwargs=True):
            for batch in islice(dataloader, nsamples):
                with contextlib.suppress(_Reached):
                    call(self._model, moved(batch, device))
        return inputs, kwargs

    def _is_first(self, name: str, module: nn.Module) -> bool:
        layers = self._layers
        wanted = layers if isinstance(layers, str) or layers is None else next(iter(layers), None)
        if wanted is None:
            return module is next(self._model.children(), None)
        return bool(re.fullmatch(wanted, name)) if isinstance(wanted, str) else module is wanted


class _Reached(Exception):
    """The first layer was reached."""


def call(model: nn.Module, batch: Any) -> Any:
    """Run a model on a batch: a tensor, or arguments in a tuple, list or mapping."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    return model(batch)


def moved(batch: Any, device: Any) -> Any:
    """Return a batch with its tensors on a device."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: moved(item, device) for key, item in batch.items()}
    if isinstance(batch, (tuple, list)):
        return tuple(moved(item, device) for item in batch)
    return batch
