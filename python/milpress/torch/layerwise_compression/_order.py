"""The order in which samples come to layers, and what they bring."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import nn

from milpress.torch.layerwise_compression._activations import Activations
from milpress.torch.layerwise_compression._calibrated_weights import CalibratedWeights
from milpress.torch.layerwise_compression._held_state import HeldState
from milpress.torch.layerwise_compression._layer_files import LayerFiles
from milpress.torch.layerwise_compression._layers import CalibratedLayer
from milpress.torch.layerwise_compression._lockstep import Lockstep
from milpress.torch.layerwise_compression._paths import Paths
from milpress.torch.layerwise_compression._products import Product, Watch, told_products
from milpress.torch.layerwise_compression.algorithms import OBSCompressionAlgorithm

_Trace: TypeAlias = tuple["weakref.ref[torch.Tensor]", int | None]


@dataclass(frozen=True, slots=True)
class _LayerInput:
    """What a run brings to a layer."""

    value: torch.Tensor
    mask: torch.Tensor | None

    def add_to(self, layer: CalibratedLayer, activations: Activations | None) -> None:
        """Give it to the algorithm of a layer."""
        algorithm = layer.begin()
        value = self.value if activations is None else activations.fetched(self.value)
        if isinstance(algorithm, OBSCompressionAlgorithm):
            algorithm.add_batch(value, mask=self.mask)
        else:
            value = value.clone()  # which the algorithm may keep
            algorithm.add_batch(value, layer.module.forward(value))

    def trace(self) -> _Trace:
        """Return what tells it from others without keeping it alive."""
        # torch does not count changes of tensors that were made in inference mode.
        return weakref.ref(self.value), None if self.value.is_inference() else self.value._version

    def has_left(self, trace: _Trace) -> bool:
        """Whether a trace is its own."""
        return trace[1] is not None and trace[0]() is self.value and trace == self.trace()


class Order:
    """Layers as samples come to them.

    Parameters
    ----------
    model, weights
        The model, and those of its weights that are to be compressed.
    calls
        What runs each sample.
    masks
        Which part of each is no padding; ``None`` for all.
    files
        Where layers are kept that were compressed before.
    activation_memory
        Bytes that waiting samples may take in memory; ``None`` for any.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: CalibratedWeights,
        calls: Sequence[Callable[[], Any]],
        masks: Sequence[torch.Tensor | None],
        files: LayerFiles,
        activation_memory: int | None,
    ) -> None:
        self._weights = weights
        self._watch = Watch(weights.watch_for, self._arrive)
        self._calls = calls
        self._masks = masks
        self._files = files
        self._model = model
        self._held = HeldState(model)
        self._activations = None if activation_memory is None else Activations(activation_memory)
        self._runs = Lockstep([partial(self._run, i) for i in range(len(calls))], self._leave)
        self._record: list[int] = []
        self._late: dict[int, set[int]] = {}

    def __iter__(self) -> Iterator[CalibratedLayer]:
        """Yield layers as samples come to them, with an algorithm that has seen what they bring.

        A layer that a sample comes to several times is yielded at the last time. Embeddings come
        first, and what no sample came to of weights that are used in parts comes last.
        """
        last: Any = None
        traces: dict[int, _Trace] = {}
        with ExitStack() as stack:
            stack.callback(self._held.close)
            if self._activations is not None:
                stack.callback(self._activations.clear)
            for module in self._model.modules():
                if self._weights.told(module):
                    handle = module.register_forward_pre_hook(self._tell, with_kwargs=True)
                    stack.callback(handle.remove)
            first = self._path(0)
            for layer in self._weights.layers:
                self._restore(layer)
            self._paths = Paths(len(self._calls), self._path, self._open(first))
            for layer in self._weights.lookups():
                if not self._restore(layer):
                    yield layer
                    self._late[layer.place] = set()
                layer.algorithm = None
            self._held.refresh()
            for place, inputs in self._runs.stops(self._paths.choose):
                layer = self._weights.layers[place]
                if self._restore(layer):
                    self._held.refresh()
                    continue
                new_traces = {number: layer_input.trace() for number, layer_input in inputs.items()}
                is_first = layer.algorithm is None
                algorithm = layer.begin()
                is_same = traces.keys() == new_traces.keys() and all(
                    layer_input.has_left(traces[number]) for number, layer_input in inputs.items()
                )
                if is_same and is_first and _can_share(algorithm, last):
                    algorithm.share(last)
                else:
                    last = None
                    for layer_input in inputs.values():
                        layer_input.add_to(layer, self._activations)
                inputs.clear()
                yield layer
                self._late[place] = set()
                last, traces, layer.algorithm = algorithm, new_traces, None
                self._held.refresh()
        for layer in self._weights.rest():
            if not self._restore(layer):
                yield layer
            layer.algorithm = None

    def _restore(self, layer: CalibratedLayer) -> bool:
        """Whether a layer was compressed before, and is so now."""
        state = None if layer.is_done else self._files.load(layer)
        if state is not None:
            layer.restore(state)
        return state is not None

    def _open(self, path: Sequence[int]) -> list[int]:
        """Return the places of a path that are not done."""
        return [place for place in path if not self._weights.layers[place].is_done]

    def notes(self) -> list[str]:
        """Return what of the order is to be known."""
        late = [
            f"{self._weights.layers[place].name} ({len(numbers)})"
            for place, numbers in self._late.items()
            if numbers
        ]
        crossed = [self._weights.layers[place].name for place in self._paths.crossed]
        notes = []
        if crossed:
            notes.append(
                "Layers that were compressed before all samples came to them, as samples come to "
                f"them in different orders: {', '.join(crossed)}."
            )
        if late:
            notes.append(
                "Layers that samples came to when they were compressed already, so that these did "
                f"not count, and how many: {', '.join(late)}."
            )
        return notes

    def _run(self, number: int) -> None:
        """Run a sample, which waits at layers."""
        if self._activations is None:
            recording: AbstractContextManager[None] = nullcontext()
        else:
            recording = self._activations.recording(number)
        try:
            with recording, self._watch:
                self._calls[number]()
        finally:
            self._held.end()

    def _leave(self) -> Callable[[], None]:
        """Do what is to be done where a run gives way; return what it does when it goes on."""
        torch.clear_autocast_cache()  # which all threads share, of weights as they were
        put_back = self._held.leave()
        number = self._runs.current()
        if self._activations is None or number is None:
            return put_back
        read_back = self._activations.leave(number)

        def go_on() -> None:
            read_back()
            put_back()

        return go_on

    def _path(self, number: int) -> list[int]:
        """Return the places that a sample comes to when it is run alone."""
        path: list[int] = []
        self._record = path
        try:
            with torch.no_grad(), self._watch:
                self._calls[number]()
        finally:
            self._held.end()
        return self._open(path)

    def _tell(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Show the products that a module says that it is going to make."""
        for name in self._weights.told(module):
            for product in told_products(module, name, args, kwargs):
                self._arrive(product)

    def _arrive(self, product: Product) -> None:
        """Do what is to be done where a product is about to be made."""
        layer, number = self._weights.layer_of(product), self._runs.current()
        if layer is None:
            return
        if number is None:
            self._record.append(layer.place)
        elif layer.is_done:
            if layer.place in self._late:
                self._late[layer.place].add(number)
        else:
            layer_input = _LayerInput(product.value, self._masks[number])
            if not self._paths.comes_again(number, layer.place):
                self._runs.wait(layer.place, layer_input)
            elif self._activations is None:
                layer_input.add_to(layer, None)
            else:
                with self._activations.not_recording():
                    layer_input.add_to(layer, self._activations)


def _can_share(algorithm: Any, last: Any) -> bool:
    return all(
        isinstance(each, OBSCompressionAlgorithm) and isinstance(each.weight.module, nn.Linear)
        for each in (algorithm, last)
    )
