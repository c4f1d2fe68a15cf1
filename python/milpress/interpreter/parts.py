"""Parts of a package as it runs: models of one function, and pipelines of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import torch

from milpress.errors import CompressionError, ExecutionError, UnsupportedOpError
from milpress.interpreter import features as io
from milpress.interpreter.binding import Frame, Function, Observe, Replace
from milpress.interpreter.module import PipelineModule, ProgramModule, Stage
from milpress.interpreter.states import State
from milpress.interpreter.suppression import Suppression
from milpress.mil.features import Feature

Part: TypeAlias = "Model | Pipeline | Suppression"


class Run(NamedTuple):
    """What all parts of a run share: ``names`` are those of the values to observe."""

    generator: torch.Generator
    state: State
    names: frozenset[str]
    observe: Observe | None
    replace: Replace | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model that is one function: tensors in the forms of features go in and out."""

    prefix: str
    function_name: str
    function: Function
    inputs: tuple[Feature, ...]
    outputs: tuple[Feature, ...]

    def without_suppression(self) -> Model:
        """Return itself."""
        return self

    def module(self, seed: int) -> ProgramModule:
        """Return the model as a torch module."""
        inputs = tuple(feature.name for feature in self.inputs)
        outputs = tuple(feature.name for feature in self.outputs)
        return ProgramModule(self.function, inputs, outputs, seed)

    def run(self, given: Mapping[str, Any], run: Run) -> dict[str, Any]:
        """Return the outputs in the forms of features."""
        function = self.function
        watched = {
            slot: name
            for name in run.names
            if name.startswith(self.prefix)
            for slot in function.slots_named(name.removeprefix(self.prefix))
        }
        frame = Frame(list(function.stored), run.generator, watched, run.observe, run.replace)
        self._fill(frame, given, run.state)
        with located(frame):
            results = function.block.run(frame)
        values = dict(zip(function.outputs, results, strict=True))
        return {
            feature.name: io.given_back(feature, values[feature.name]) for feature in self.outputs
        }

    # Apart from `run`, whose variables would keep inputs alive after their last reader ran.
    def _fill(self, frame: Frame, given: Mapping[str, Any], state: State) -> None:
        for feature in self.inputs:
            parameter = self.function.inputs[feature.name]
            tensor = io.taken(feature, given.get(feature.name))
            frame.write(parameter.slot, parameter.cast(tensor))
        for name, parameter in self.function.inputs.items():
            if parameter.is_state:
                frame.slots[parameter.slot] = state.cell(self.prefix + name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Passed:
    """A stage of a pipeline that can't be run, before all that can or behind it.

    ``text`` says which it is; ``is_behind``, whether it takes what others compute.
    """

    text: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    is_behind: bool = False

    @property
    def note(self) -> str:
        """A sentence that says what takes its place."""
        if self.is_behind:
            return f"{self.text} was passed by: what it takes is what comes out"
        gives = ", ".join(self.outputs)
        return f"{self.text} was passed by: what it gives, {gives}, must be given"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """Parts in order, each of which takes what those before it gave, and stages passed by.

    The prefix is empty: those of its models are whole.
    """

    parts: tuple[Part, ...]
    inputs: tuple[Feature, ...]
    outputs: tuple[Feature, ...]
    passed: tuple[Passed, ...] = ()
    prefix: str = ""

    def run(self, given: Mapping[str, Any], run: Run) -> dict[str, Any]:
        """Return the outputs in the forms of features."""
        known = dict(given)
        for part in self.parts:
            known.update(part.run(known, run))
        return {feature.name: known[feature.name] for feature in self.outputs}

    def module(self, seed: int) -> PipelineModule:
        """Return the pipeline, which chooses no boxes, as a torch module."""
        parts = [part for part in self.parts if not isinstance(part, Suppression)]
        return PipelineModule(
            [Stage(part.module(seed), part.prefix, part.inputs, part.outputs) for part in parts],
            tuple(feature for feature in self.inputs if not feature.is_unused),
            self.outputs,
            seed,
        )

    def without_suppression(self) -> Pipeline | None:
        """Return the pipeline up to the stages that choose boxes: what they take comes out."""
        parts: list[Part] = []
        known: dict[str, Feature] = {}
        lost: set[str] = set()
        ends: dict[str, Feature] = {}
        for part in self.parts:
            whole = {feature.name for feature in part.outputs}
            rest = part.without_suppression()
            if rest is None or any(feature.name in lost for feature in rest.inputs):
                ends |= {each.name: known[each.name] for each in part.inputs if each.name in known}
                lost |= whole
                continue
            own = {feature.name: feature for feature in rest.outputs}
            if whole - own.keys():
                ends |= {name: each for name, each in own.items() if name not in whole}
            lost = (lost | whole) - own.keys()
            known |= own
            parts.append(rest)
        if not parts:
            return None
        if not lost:
            return self
        outputs = [each for each in self.outputs if each.name in known and each.name not in lost]
        outputs += [feature for name, feature in ends.items() if feature not in outputs]
        taken = {feature.name for part in parts for feature in part.inputs}
        inputs = tuple(
            each if each.name in taken else replace(each, is_unused=True) for each in self.inputs
        )
        return replace(self, parts=tuple(parts), inputs=inputs, outputs=tuple(outputs))


def leaves(part: Part) -> Iterator[Model | Suppression]:
    """Yield the ML programs and the stages that choose boxes, in order."""
    if isinstance(part, Pipeline):
        for inner in part.parts:
            yield from leaves(inner)
    else:
        yield part


@contextlib.contextmanager
def located(frame: Frame) -> Iterator[None]:
    """Say of an error in an op where it stands."""
    try:
        yield
    except CompressionError:
        raise
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        step = frame.step
        if step is None:
            raise
        if isinstance(error, NotImplementedError):
            what = f"{step.kind} ({error})"
            raise UnsupportedOpError(step.kind, step.opset.target, step.place, what) from error
        msg = f"{step.place}: {step.kind} can't compute what it is given: {error}"
        raise ExecutionError(msg) from error
