"""The order in which samples come to layers, and what they bring."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import nn

from milpress.torch.layerwise_compression._layers import CalibratedLayer
from milpress.torch.layerwise_compression._lockstep import Lockstep
from milpress.torch.layerwise_compression.algorithms import OBSCompressionAlgorithm

_Trace: TypeAlias = tuple["weakref.ref[torch.Tensor]", int]


@dataclass(frozen=True, slots=True)
class _LayerInput:
    """What a run brings to a layer."""

    module: nn.Module
    value: torch.Tensor
    mask: torch.Tensor | None

    def add_to(self, algorithm: Any) -> None:
        """Give it to the algorithm of the layer."""
        if isinstance(algorithm, OBSCompressionAlgorithm):
            algorithm.add_batch(self.value, mask=self.mask)
        else:
            algorithm.add_batch(self.value, self.module.forward(self.value))

    def trace(self) -> _Trace:
        """Return what tells it from others without keeping it alive."""
        return weakref.ref(self.value), self.value._version

    def has_left(self, trace: _Trace) -> bool:
        """Whether a trace is its own."""
        value, version = trace
        return value() is self.value and version == self.value._version


def in_order(
    layers: Sequence[CalibratedLayer],
    calls: Sequence[Callable[[], Any]],
    masks: Sequence[torch.Tensor | None],
) -> Iterator[CalibratedLayer]:
    """Yield layers as samples come to them, with an algorithm that has seen what they bring.

    A layer that a sample comes to several times is yielded at the last time.
    """
    _count_calls(layers, calls[0])
    runs = Lockstep(calls)

    def arrive(layer: CalibratedLayer, module: nn.Module, value: torch.Tensor) -> None:
        number = runs.current()
        if layer.is_done or number is None:
            return
        layer_input = _LayerInput(module, value, masks[number])
        seen = layer.seen[number] = layer.seen.get(number, 0) + 1
        if seen < layer.n_calls:
            layer_input.add_to(layer.begin())
        else:
            runs.wait(layer.number, layer_input)

    last: Any = None
    traces: dict[int, _Trace] = {}
    with _arriving(layers, arrive):
        for place, inputs in runs.stops():
            layer = layers[place]
            if layer.is_done:
                continue
            new_traces = {number: layer_input.trace() for number, layer_input in inputs.items()}
            algorithm = layer.begin()
            is_same = traces.keys() == new_traces.keys() and all(
                layer_input.has_left(traces[number]) for number, layer_input in inputs.items()
            )
            if is_same and layer.n_calls == 1 and _can_share(algorithm, last):
                algorithm.share(last)
            else:
                last = None
                for layer_input in inputs.values():
                    layer_input.add_to(algorithm)
            inputs.clear()
            yield layer
            last, traces, layer.algorithm = algorithm, new_traces, None


def _can_share(algorithm: Any, last: Any) -> bool:
    return all(
        isinstance(each, OBSCompressionAlgorithm) and isinstance(each.weight.module, nn.Linear)
        for each in (algorithm, last)
    )


def _count_calls(layers: Sequence[CalibratedLayer], first: Callable[[], Any]) -> None:
    """Find how often a sample comes to each layer."""
    counts = [0] * len(layers)

    def arrive(layer: CalibratedLayer, _module: nn.Module, _value: torch.Tensor) -> None:
        counts[layer.number] += 1

    with _arriving(layers, arrive), torch.no_grad():
        first()
    for layer, count in zip(layers, counts, strict=True):
        layer.n_calls = max(1, count)


@contextlib.contextmanager
def _arriving(
    layers: Sequence[CalibratedLayer],
    arrive: Callable[[CalibratedLayer, nn.Module, torch.Tensor], None],
) -> Iterator[None]:
    """Call a function whenever a layer is about to be run."""

    def hook(
        layer: CalibratedLayer, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        arrive(layer, module, args[0] if args else kwargs["input"])

    with contextlib.ExitStack() as stack:
        for layer in layers:
            for task in layer.tasks:
                register = task.weight.module.register_forward_pre_hook
                stack.enter_context(register(partial(hook, layer), with_kwargs=True))
        yield
