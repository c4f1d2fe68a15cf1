"""A program as a torch module."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from milpress.interpreter.constants import Weight, held_as
from milpress.interpreter.graph import Block, Frame, Function
from milpress.interpreter.states import Cell


class ProgramModule(nn.Module):
    """A program whose weights are parameters and whose other constants and states are buffers.

    Made by `milpress.interpreter.Program.to_torch`. Parameters don't ask for gradients. Gradients
    flow through what a call writes to a state and reads again, and end where a call begins: what a
    state was before is a number.

    Parameters
    ----------
    function
        What is run.
    inputs, outputs
        Names of what is taken and given, in order.
    seed
        Where random numbers start from, in each call.
    """

    def __init__(
        self, function: Function, inputs: tuple[str, ...], outputs: tuple[str, ...], seed: int
    ) -> None:
        super().__init__()
        self._function = function
        self._inputs = inputs
        self._outputs = outputs
        self._seed = seed
        self._attributes: dict[int, str] = {}
        for slot in sorted(set(_slots_read(function.block))):
            self._register(slot, function.stored[slot])
        self._states: dict[int, str] = {}
        for name, parameter in function.inputs.items():
            if parameter.is_state:
                kind = parameter.type
                zeros = torch.zeros(kind.fixed_shape, dtype=held_as(kind.dtype))
                self._states[parameter.slot] = self._free_name(name)
                self.register_buffer(self._states[parameter.slot], zeros)

    @property
    def attributes(self) -> dict[str, str]:
        """Name of the attribute that holds each weight and constant, by its name in the program."""
        names = self._function.names
        return {names[slot]: name for slot, name in self._attributes.items() if slot in names}

    def reset_states(self) -> None:
        """Set all states to zero."""
        for name in self._states.values():
            self.get_buffer(name).zero_()

    def _register(self, slot: int, value: Any) -> None:
        if isinstance(value, Weight):
            value = value.tensor()
        if not isinstance(value, Tensor) or not value.ndim:
            return
        name = self._free_name(self._function.names.get(slot, f"constant_{slot}"))
        if value.is_floating_point():
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))
        else:
            self.register_buffer(name, value)
        self._attributes[slot] = name

    def _free_name(self, name: str) -> str:
        """Return the name as an attribute can have it, if need be with underscores behind."""
        free = re.sub(r"\W", "_", name)
        while hasattr(self, free):
            free += "_"
        return free

    def forward(self, *inputs: Tensor) -> Any:
        """Return the output, or the outputs as a tuple."""
        function = self._function
        frame = Frame(list(function.stored), torch.Generator().manual_seed(self._seed))
        for slot, name in self._attributes.items():
            frame.slots[slot] = getattr(self, name)
        # A copy, as gradients may want what the state was when it has changed.
        cells = {name: Cell(getattr(self, name).detach().clone()) for name in self._states.values()}
        for slot, name in self._states.items():
            frame.slots[slot] = cells[name]
        for name, tensor in zip(self._inputs, inputs, strict=True):
            parameter = function.inputs[name]
            frame.write(parameter.slot, parameter.cast(tensor))
        made = dict(zip(function.outputs, function.block.run(frame), strict=True))
        for name, cell in cells.items():
            getattr(self, name).copy_(cell.read().detach())
        results = tuple(made[name] for name in self._outputs)
        return results[0] if len(results) == 1 else results


def _slots_read(block: Block) -> Iterator[int]:
    """Yield every slot that is read in a block or in one inside."""
    yield from block.outputs
    for step in block.steps:
        yield from step.slots_read()
        for inner in step.blocks:
            yield from _slots_read(inner)
