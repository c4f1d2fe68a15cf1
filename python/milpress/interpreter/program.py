"""Programs that run: `load` makes one of a package."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from milpress.errors import (
    CompressionError,
    ConfigError,
    ExecutionError,
    InputError,
    ModelKindError,
    PackageError,
    UnsupportedError,
    UnsupportedOpError,
)
from milpress.interpreter import features as io
from milpress.interpreter.constants import Budget, held_as
from milpress.interpreter.features import Feature
from milpress.interpreter.graph import Frame, Function, Observe, Replace, bind
from milpress.interpreter.module import ProgramModule
from milpress.interpreter.moments import Layer, layers
from milpress.interpreter.states import State
from milpress.mil.package import Package, pipeline_models
from milpress.mil.values import TensorType

Precision = Literal["float32", "float16"]

_DEFAULT_WEIGHT_MEMORY = 2 << 30


class Result(NamedTuple):
    """What a run gives.

    Parameters
    ----------
    outputs
        The model's outputs by name.
    taps
        The tapped values by name, as tensors that the ops computed. A value that was computed
        several times, in a loop, is there as it was last; one in a branch not taken is missing.
    """

    outputs: dict[str, Any]
    taps: dict[str, Any]


def load(
    package: str | os.PathLike[str] | Package,
    function: str | None = None,
    *,
    precision: Precision = "float32",
    seed: int = 0,
    weight_memory: int = _DEFAULT_WEIGHT_MEMORY,
) -> Program:
    """Make the program of a package ready to run.

    Parameters
    ----------
    package
        Path of an ``.mlpackage``, or one that is open.
    function
        Which function of a package with several; by default the one that Core ML would take.
    precision
        ``"float32"`` computes every float in float32. ``"float16"`` computes likewise, then rounds
        each value that the program declares as float16 to what that can hold.
    seed
        Where random numbers start from, in each run.
    weight_memory
        How many bytes of decoded weights are kept between runs; the rest is decoded at each use.

    Returns
    -------
    Program
        A function on arrays, that can also tell values inside.

    Raises
    ------
    UnsupportedOpError
        If the interpreter does not cover an op.
    PackageError
        If the package breaks its format, or is not made of ML programs alone.
    ConfigError
        If there is no such function or precision.
    """
    if precision not in get_args(Precision):
        msg = f"precision must be one of {get_args(Precision)}, got {precision!r}"
        raise ConfigError(msg)
    if not isinstance(package, Package):
        package = Package(package)
    loader = _Loader(package, function, precision == "float16", Budget(weight_memory))
    return Program(loader.part(package.model, ()), precision=precision, seed=seed)


class _Run(NamedTuple):
    """What all parts of a run share."""

    generator: torch.Generator
    state: State
    taps: frozenset[str]
    observe: Observe | None
    replace: Replace | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Model:
    """A model that is one function: tensors in the forms of features go in and out."""

    prefix: str
    function_name: str
    function: Function
    inputs: tuple[Feature, ...]
    outputs: tuple[Feature, ...]

    @property
    def models(self) -> Iterator[_Model]:
        yield self

    def run(self, given: Mapping[str, Any], run: _Run) -> dict[str, Any]:
        function = self.function
        watched = {
            slot: tap
            for tap in run.taps
            if tap.startswith(self.prefix)
            for slot in function.slots_named(tap.removeprefix(self.prefix))
        }
        frame = Frame(list(function.stored), run.generator, watched, run.observe, run.replace)
        self._fill(frame, given, run.state)
        with _located(frame):
            results = function.block.run(frame)
        made = dict(zip(function.outputs, results, strict=True))
        return {
            feature.name: io.given_back(feature, made[feature.name]) for feature in self.outputs
        }

    # Apart from `run`, whose variables would keep inputs alive after their last reader ran.
    def _fill(self, frame: Frame, given: Mapping[str, Any], state: State) -> None:
        for feature in self.inputs:
            parameter = self.function.inputs[feature.name]
            value = given.get(feature.name)
            tensor = io.filled(feature) if value is None else io.taken(feature, value)
            frame.write(parameter.slot, parameter.cast(tensor))
        for name, parameter in self.function.inputs.items():
            if parameter.is_state:
                frame.slots[parameter.slot] = state.cell(self.prefix + name)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pipeline:
    """Models in order, each of which takes what those before it gave."""

    parts: tuple[_Model | _Pipeline, ...]
    inputs: tuple[Feature, ...]
    outputs: tuple[Feature, ...]

    @property
    def models(self) -> Iterator[_Model]:
        for part in self.parts:
            yield from part.models

    def run(self, given: Mapping[str, Any], run: _Run) -> dict[str, Any]:
        known = dict(given)
        for part in self.parts:
            known.update(part.run(known, run))
        return {feature.name: known[feature.name] for feature in self.outputs}


class Program:
    """A model that runs with torch, made by `load`.

    Called with its inputs by name, it returns its outputs by name. Inputs are NumPy arrays, or what
    NumPy makes one of, or torch tensors; if one is a torch tensor, the outputs are too.

    An image is an array of height x width x 3, of red, green and blue from 0 to 255 (height x width
    if it is gray), whatever layout the model wants; or, with four dimensions, just what the program
    takes. It must have the model's size. Scale and bias are part of the program. Images that come
    out have the same form, as ``uint8``.

    Floats come out as float32, with ``precision="float16"`` as the type that the program declares.
    A classifier's label is a ``str`` or ``int``, its probabilities a dictionary.
    """

    def __init__(self, part: _Model | _Pipeline, *, precision: Precision, seed: int) -> None:
        self._part = part
        self._precision = precision
        self._seed = seed

    @property
    def inputs(self) -> tuple[Feature, ...]:
        """The inputs, in the order of the model's description."""
        return self._part.inputs

    @property
    def outputs(self) -> tuple[Feature, ...]:
        """The outputs, in the order of the model's description."""
        return self._part.outputs

    @property
    def precision(self) -> Precision:
        """How floats that the program declares as float16 are computed."""
        return self._precision

    @property
    def values(self) -> dict[str, TensorType | None]:
        """Type of each value that can be tapped, in the order in which they are computed.

        Inputs are among them, constants are not. ``None`` stands for a value that is no tensor, and
        in a shape for a size that varies. In a pipeline a name begins with its model's and a slash.
        """
        return {
            model.prefix + name: kind
            for model in self._part.models
            for name, (_, kind) in model.function.watchable.items()
        }

    @property
    def op_types(self) -> dict[str, str]:
        """Type of the op that computes each of `values`; inputs are not among them."""
        return {
            model.prefix + name: kind
            for model in self._part.models
            for name, kind in model.function.op_types.items()
        }

    @property
    def functions(self) -> dict[str, str]:
        """Name of the function that is run of each model, by what its values' names begin with."""
        return {model.prefix: model.function_name for model in self._part.models}

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The ops that multiply what is computed by a stored weight."""
        return tuple(
            layer for model in self._part.models for layer in layers(model.prefix, model.function)
        )

    @property
    def is_stateful(self) -> bool:
        """Whether the model keeps states between runs."""
        return bool(self._states())

    def make_state(self) -> State:
        """Return new states, all zero."""
        return State(
            {
                name: torch.zeros(kind.fixed_shape, dtype=held_as(kind.dtype))
                for name, kind in self._states().items()
            }
        )

    def __call__(self, /, *, state: State | None = None, **inputs: Any) -> dict[str, Any]:
        """Return the outputs by name."""
        return self.run(inputs, state=state).outputs

    def run(
        self,
        inputs: Mapping[str, Any],
        *,
        taps: Iterable[str] = (),
        observe: Observe | None = None,
        replace: Replace | None = None,
        state: State | None = None,
        seed: int | None = None,
    ) -> Result:
        """Run the program, and look at values inside.

        Parameters
        ----------
        inputs
            By name. An optional one may be missing.
        taps
            Names of `values` that are wanted.
        observe
            Called with name and tensor of each tapped value as soon as it is computed, each time it
            is. The values are then not kept, so that one pass shows all of them in bounded memory.
        replace
            Called likewise, and returns what takes the value's place in all that is computed from
            it: a tensor of the same type and shape.
        state
            What the model keeps between runs, changed in place; from `make_state`.
        seed
            Instead of the program's.

        Returns
        -------
        Result
            The outputs, and the taps as arrays in the shape and the layout that the ops computed.

        Raises
        ------
        InputError
            If an input, a state or the name of a tap is missing, unknown or unsuitable.
        ExecutionError
            If an op can't compute what it is given.
        """
        wanted = frozenset(taps)
        self._check(inputs, wanted, state)
        kept: dict[str, Any] = {}
        generator = torch.Generator().manual_seed(self._seed if seed is None else seed)
        run = _Run(
            generator,
            state or State({}),
            wanted,
            kept.__setitem__ if observe is None else observe,
            replace,
        )
        with torch.no_grad():
            made = self._part.run(inputs, run)
        as_torch = any(isinstance(value, Tensor) for value in inputs.values())
        declared = {feature.name: feature.dtype for feature in self.outputs}
        return Result(
            {name: self._exported(value, declared[name], as_torch) for name, value in made.items()},
            {name: self._exported(value, "", as_torch) for name, value in kept.items()},
        )

    def to_torch(self) -> ProgramModule:
        """Return the program as a torch module, whose weights are its parameters and buffers.

        The module takes the inputs as tensors, by position in the order of `inputs`, and returns
        the outputs likewise: a tensor, or a tuple if there are several. Images are tensors as the
        program declares them. Its states are buffers. ``torch.export`` can trace it, unless the
        program's course or its shapes depend on computed values.

        Raises
        ------
        UnsupportedError
            If the model is a pipeline.
        """
        if not isinstance(self._part, _Model):
            msg = "only a single ML program becomes a module, got a pipeline"
            raise UnsupportedError(msg)
        inputs = tuple(feature.name for feature in self.inputs)
        outputs = tuple(feature.name for feature in self.outputs)
        return ProgramModule(self._part.function, inputs, outputs, self._seed)

    @property
    def _operands(self) -> set[str]:
        return {
            model.prefix + name for model in self._part.models for name in model.function.operands
        }

    def _states(self) -> dict[str, TensorType]:
        return {
            model.prefix + name: parameter.type
            for model in self._part.models
            for name, parameter in model.function.inputs.items()
            if parameter.is_state
        }

    def _check(self, inputs: Mapping[str, Any], taps: frozenset[str], state: State | None) -> None:
        io.check_names(self.inputs, inputs)
        known_taps = self.values.keys() | self._operands if taps else set()
        unknown = sorted(taps - known_taps)
        if unknown:
            msg = f"a tap must name a value that the program computes, got {', '.join(unknown)}"
            raise InputError(msg)
        if state is None and self.is_stateful:
            msg = "a stateful model must be given a state, from make_state(), got none"
            raise InputError(msg)

    def _exported(self, value: Any, dtype: str, as_torch: bool) -> Any:
        if not isinstance(value, Tensor):
            return value
        if dtype == "float16" and self._precision == "float16" and value.dtype == torch.float32:
            value = value.to(torch.float16)
        # A copy: it may be a constant, a state, or a view of another output.
        if as_torch:
            return value.clone(memory_format=torch.contiguous_format)
        return np.array(value.numpy(), np.uint16 if dtype == "uint16" else None, order="C")


@contextlib.contextmanager
def _located(frame: Frame) -> Iterator[None]:
    """Say of an error in an op where it stands."""
    try:
        yield
    except CompressionError:
        raise
    except NotImplementedError as error:
        step = frame.step
        if step is None:
            raise
        target = step.opset.target
        what = f"{step.kind} ({error})"
        raise UnsupportedOpError(step.kind, target, step.place, what) from error
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
        msg = f"{step.place}: {step.kind} must be able to compute what it is given, got: {error}"
        raise ExecutionError(msg) from error


class _Loader:
    """Makes the models of a package ready to run."""

    def __init__(
        self, package: Package, function: str | None, rounds: bool, budget: Budget
    ) -> None:
        self._package = package
        self._function = function
        self._rounds = rounds
        self._budget = budget

    def part(self, model: Any, place: tuple[str, ...]) -> _Model | _Pipeline:
        kind = model.WhichOneof("choice")
        if kind == "mlProgram":
            return self._model(model, place)
        if kind is None:
            msg = (
                f"{self._package.path}: every model of a pipeline must be an ML program, got "
                f"another kind for {'/'.join(place)!r}"
            )
            raise ModelKindError(msg)
        if self._function is not None:
            msg = f"function must not be given for a pipeline, got {self._function!r}"
            raise ConfigError(msg)
        parts = tuple(self.part(inner, (*place, name)) for name, inner in pipeline_models(model))
        return self._pipeline(model, parts)

    def _pipeline(self, model: Any, parts: tuple[_Model | _Pipeline, ...]) -> _Pipeline:
        takers = {feature.name: feature for part in reversed(parts) for feature in part.inputs}
        givers = {feature.name: feature for part in parts for feature in part.outputs}
        known = {item.name for item in model.description.input}
        for part in parts:
            unknown = {feature.name for feature in part.inputs} - known
            if unknown:
                msg = (
                    f"{self._package.path}: a model of a pipeline must take what the pipeline or "
                    f"a model before it gives, got {', '.join(sorted(unknown))}"
                )
                raise PackageError(msg)
            known |= {feature.name for feature in part.outputs}
        inputs = [item.name for item in model.description.input if item.name in takers]
        outputs = [item.name for item in model.description.output]
        lost = [name for name in outputs if name not in givers]
        if lost:
            msg = f"{self._package.path}: a pipeline must make its outputs, got none for {lost}"
            raise PackageError(msg)
        return _Pipeline(
            parts=parts,
            inputs=tuple(takers[name] for name in inputs),
            outputs=tuple(givers[name] for name in outputs),
        )

    def _model(self, model: Any, place: tuple[str, ...]) -> _Model:
        name = self._function_name(model, place)
        shown = "/".join((*place, name))
        function = bind(
            model.mlProgram.functions[name],
            shown,
            self._package,
            rounds=self._rounds,
            budget=self._budget,
        )
        description = model.description
        for each in model.description.functions:
            if each.name == name:
                description = each
        outputs = dict(zip(function.outputs, function.output_types, strict=True))
        taken = {key for key, value in function.inputs.items() if not value.is_state}
        if {item.name for item in description.input} != taken:
            msg = f"{shown}: the description must name the function's inputs, got others"
            raise PackageError(msg)
        if not {item.name for item in description.output} <= set(outputs):
            msg = f"{shown}: the description must name outputs of the function, got others"
            raise PackageError(msg)
        return _Model(
            prefix="".join(f"{part}/" for part in place),
            function_name=name,
            function=function,
            inputs=tuple(
                io.described(item, function.inputs[item.name].type) for item in description.input
            ),
            outputs=tuple(io.described(item, outputs[item.name]) for item in description.output),
        )

    def _function_name(self, model: Any, place: tuple[str, ...]) -> str:
        functions = model.mlProgram.functions
        name = self._function
        if name is None:
            name = model.description.defaultFunctionName or (
                "main" if "main" in functions or len(functions) != 1 else next(iter(functions))
            )
        if name not in functions:
            where = "/".join((str(self._package.path), *place))
            known = ", ".join(sorted(functions))
            msg = f"{where}: function must be one of {known}, got {name!r}"
            raise ConfigError(msg)
        return str(name)
