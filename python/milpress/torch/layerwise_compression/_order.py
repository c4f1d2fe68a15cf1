"""The order in which samples come to layers, and what they bring."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import nn

from milpress.torch.layerwise_compression._activations import Activations
from milpress.torch.layerwise_compression._held_state import HeldState
from milpress.torch.layerwise_compression._layers import CalibratedLayer
from milpress.torch.layerwise_compression._lockstep import Lockstep
from milpress.torch.layerwise_compression._paths import Paths
from milpress.torch.layerwise_compression.algorithms import OBSCompressionAlgorithm

_Trace: TypeAlias = tuple["weakref.ref[torch.Tensor]", int | None]


@dataclass(frozen=True, slots=True)
class _LayerInput:
    """What a run brings to a layer."""

    module: nn.Module
    value: torch.Tensor
    mask: torch.Tensor | None

    def add_to(self, algorithm: Any, activations: Activations | None) -> None:
        """Give it to the algorithm of the layer."""
        value = self.value if activations is None else activations.fetched(self.value)
        if isinstance(algorithm, OBSCompressionAlgorithm):
            algorithm.add_batch(value, mask=self.mask)
        else:
            value = value.clone()  # which the algorithm may keep
            algorithm.add_batch(value, self.module.forward(value))

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
    model, layers
        The model, and those of its layers that are to be compressed, if samples come to them.
    calls
        What runs each sample.
    masks
        Which part of each is no padding; ``None`` for all.
    activation_memory
        Bytes that waiting samples may take in memory; ``None`` for any.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[CalibratedLayer],
        calls: Sequence[Callable[[], Any]],
        masks: Sequence[torch.Tensor | None],
        activation_memory: int | None,
    ) -> None:
        self._layers = layers
        self._calls = calls
        self._masks = masks
        self._held = HeldState(model)
        self._activations = None if activation_memory is None else Activations(activation_memory)
        self._runs = Lockstep([partial(self._run, i) for i in range(len(calls))], self._leave)
        self._record: list[int] | None = None
        self._late: dict[int, set[int]] = {}

    def __iter__(self) -> Iterator[CalibratedLayer]:
        """Yield layers as samples come to them, with an algorithm that has seen what they bring.

        A layer that a sample comes to several times is yielded at the last time.
        """
        last: Any = None
        traces: dict[int, _Trace] = {}
        with self._arriving(), ExitStack() as stack:
            if self._activations is not None:
                stack.callback(self._activations.clear)
            self._paths = Paths(len(self._calls), self._path)
            for place, inputs in self._runs.stops(self._paths.choose):
                layer = self._layers[place]
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
                        layer_input.add_to(algorithm, self._activations)
                inputs.clear()
                yield layer
                self._late[place] = set()
                last, traces, layer.algorithm = algorithm, new_traces, None
                self._held.refresh()

    def notes(self) -> list[str]:
        """Return what of the order is to be known."""
        late = [
            f"{self._layers[place].weight.name} ({len(numbers)})"
            for place, numbers in self._late.items()
            if numbers
        ]
        crossed = [self._layers[place].weight.name for place in self._paths.crossed]
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
            with recording:
                self._calls[number]()
        finally:
            self._held.leave()

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
            with torch.no_grad():
                self._calls[number]()
        finally:
            self._record = None
            self._held.leave()
        return path

    def _arrive(self, layer: CalibratedLayer, module: nn.Module, value: torch.Tensor) -> None:
        """Do what is to be done where a layer is about to be run."""
        number = self._runs.current()
        if self._record is not None and not layer.is_done:
            self._record.append(layer.number)
        if number is None:
            return
        if layer.is_done:
            if layer.number in self._late:
                self._late[layer.number].add(number)
            return
        layer_input = _LayerInput(module, value, self._masks[number])
        if self._paths.comes_again(number, layer.number):
            with nullcontext() if self._activations is None else self._activations.not_recording():
                layer_input.add_to(layer.begin(), self._activations)
        else:
            self._runs.wait(layer.number, layer_input)

    @contextmanager
    def _arriving(self) -> Iterator[None]:
        """Look at what goes into the layers."""

        def hook(
            layer: CalibratedLayer, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> None:
            self._arrive(layer, module, args[0] if args else kwargs["input"])

        with ExitStack() as stack:
            for layer in self._layers:
                for task in layer.tasks:
                    register = task.weight.module.register_forward_pre_hook
                    stack.enter_context(register(partial(hook, layer), with_kwargs=True))
            yield


def _can_share(algorithm: Any, last: Any) -> bool:
    return all(
        isinstance(each, OBSCompressionAlgorithm) and isinstance(each.weight.module, nn.Linear)
        for each in (algorithm, last)
    )
