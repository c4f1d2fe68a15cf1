"""A program as a torch module."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from milpress.errors import ExecutionError
from milpress.interpreter.binding import Frame, Function
from milpress.interpreter.constants import Weight, held_as
from milpress.interpreter.features import filled, passed_on
from milpress.interpreter.states import Cell
from milpress.mil.features import Feature, Probabilities


class ProgramModule(nn.Module):
    """A program whose weights are parameters and whose other constants and states are buffers.

    Made by `milpress.interpreter.Program.to_torch`. Parameters don't ask for gradients. Gradients
    flow through what a call writes to a state and reads again, and end where a call begins: what a
    state was before is a number. Random numbers start from the seed in each call.
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
        read = set(function.block.outputs)
        for step in function.block.all_steps():
            read.update(step.slots_read(), *(block.outputs for block in step.blocks))
        for slot in sorted(read):
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
        given = dict(zip(self._inputs, inputs, strict=True))
        return _one_or_all(self.run(given, torch.Generator().manual_seed(self._seed)))

    def run(self, given: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Any]:
        """Return the outputs by name."""
        function = self._function
        frame = Frame(list(function.stored), generator)
        for slot, name in self._attributes.items():
            frame.slots[slot] = getattr(self, name)
        # A copy, as gradients may want what the state was when it has changed.
        cells = {name: Cell(getattr(self, name).detach().clone()) for name in self._states.values()}
        for slot, name in self._states.items():
            frame.slots[slot] = cells[name]
        for name in self._inputs:
            parameter = function.inputs[name]
            frame.write(parameter.slot, parameter.cast(given[name]))
        outputs = dict(zip(function.outputs, function.block.run(frame), strict=True))
        for name, cell in cells.items():
            getattr(self, name).copy_(cell.read().detach())
        return {name: outputs[name] for name in self._outputs}


class Stage(NamedTuple):
    """A module of a pipeline, and the features that it takes and gives.

    The prefix is what stands before the names of its weights.
    """

    module: ProgramModule | PipelineModule
    prefix: str
    inputs: tuple[Feature, ...]
    outputs: tuple[Feature, ...]


class PipelineModule(nn.Module):
    """Programs in order, each of which takes what those before it gave.

    Made by `milpress.interpreter.Program.to_torch`, of which the rest is as of `ProgramModule`.
    Images that one program hands to the next are rounded to pixels; gradients go through that.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        inputs: tuple[Feature, ...],
        outputs: tuple[Feature, ...],
        seed: int,
    ) -> None:
        super().__init__()
        # By a plain list too, which has types.
        self.stages = nn.ModuleList(stage.module for stage in stages)
        self._stages = tuple(stages)
        self._inputs = inputs
        self._outputs = outputs
        self._seed = seed

    @property
    def attributes(self) -> dict[str, str]:
        """Path of the attribute that holds each weight and constant, by its name in the program."""
        return {
            stage.prefix + name: f"stages.{i}.{path}"
            for i, stage in enumerate(self._stages)
            for name, path in stage.module.attributes.items()
        }

    def reset_states(self) -> None:
        """Set all states to zero."""
        for stage in self._stages:
            stage.module.reset_states()

    def forward(self, *inputs: Tensor) -> Any:
        """Return the output, or the outputs as a tuple."""
        given = {feature.name: tensor for feature, tensor in zip(self._inputs, inputs, strict=True)}
        return _one_or_all(self.run(given, torch.Generator().manual_seed(self._seed)))

    def run(self, given: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Any]:
        """Return the outputs by name."""
        givers = {feature.name: feature for feature in self._inputs}
        known: dict[str, Any] = dict(given)
        computed: set[str] = set()
        for stage in self._stages:
            own = {
                feature.name: passed_on(
                    givers[feature.name],
                    feature,
                    known[feature.name],
                    is_computed=feature.name in computed,
                )
                if feature.name in known
                else filled(feature)
                for feature in stage.inputs
            }
            known |= stage.module.run(own, generator)
            givers |= {feature.name: feature for feature in stage.outputs}
            computed |= {feature.name for feature in stage.outputs}
        return {feature.name: known[feature.name] for feature in self._outputs}


def called(module: ProgramModule | PipelineModule, inputs: Sequence[Tensor]) -> list[Any]:
    """Return all outputs of a call that begins with states of zero; probabilities as a tensor.

    Raises
    ------
    ExecutionError
        If the inputs can't be computed.
    """
    module.reset_states()
    try:
        output = module(*inputs)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        msg = f"the model can't compute the samples: {error}"
        raise ExecutionError(msg) from error
    outputs = output if isinstance(output, tuple) else (output,)
    return [each.tensor if isinstance(each, Probabilities) else each for each in outputs]


def _one_or_all(outputs: Mapping[str, Any]) -> Any:
    results = tuple(outputs.values())
    return results[0] if len(results) == 1 else results
