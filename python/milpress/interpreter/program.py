"""Programs that run, made of packages by `load`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from milpress.errors import ConfigError, InputError, UnsupportedError
from milpress.interpreter import features as io
from milpress.interpreter.binding import Observe, Replace
from milpress.interpreter.constants import Budget, Weight, held_as
from milpress.interpreter.layers import Layer, layers
from milpress.interpreter.loading import Loader
from milpress.interpreter.module import PipelineModule, ProgramModule
from milpress.interpreter.parts import Model, Pipeline, Run, leaves
from milpress.interpreter.states import State
from milpress.interpreter.suppression import Suppression
from milpress.mil.features import Feature
from milpress.mil.package import Package
from milpress.mil.values import TensorType

Precision = Literal["float32", "float16"]

_DEFAULT_WEIGHT_MEMORY = 2 << 30


class Result(NamedTuple):
    """Outputs and intermediate values of a run.

    Parameters
    ----------
    outputs
        The model's outputs by name.
    taps
        The intermediate values that were chosen, by name, as the ops computed them. One that was
        computed several times, in a loop, is there as it was last; one in a branch not taken is
        missing.
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
        A function on arrays, which also gives intermediate values.

    Raises
    ------
    UnsupportedOpError
        If the interpreter does not cover an op.
    PackageError
        If the package breaks its format, or has no ML program.
    UnsupportedError
        If a stage of a pipeline stands between ML programs and is of a kind that can't be run. Such
        stages before all others, or behind, are passed by: see `Program.notes`.
    ConfigError
        If there is no such function or precision.
    """
    if precision not in get_args(Precision):
        msg = f"precision must be one of {get_args(Precision)}, got {precision!r}"
        raise ConfigError(msg)
    if not isinstance(package, Package):
        package = Package(package)
    loader = Loader(package, function, precision == "float16", Budget(weight_memory))
    return Program(loader.part(package.model), precision=precision, seed=seed)


def run_once(program: Program, inputs: Mapping[str, Any], **watch: Any) -> Result:
    """Run a program by itself, as `Program.run` does: states begin as zeros."""
    state = program.make_state() if program.is_stateful else None
    return program.run(inputs, state=state, **watch)


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

    def __init__(self, part: Model | Pipeline, *, precision: Precision, seed: int) -> None:
        self._part = part
        self._models = [leaf for leaf in leaves(part) if isinstance(leaf, Model)]
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
    def notes(self) -> tuple[str, ...]:
        """Sentences on the stages of a pipeline that were passed by, as they can't be run.

        What one that comes first would give is an input of the program; what one that comes last
        would take is an output.
        """
        passed = self._part.passed if isinstance(self._part, Pipeline) else ()
        return tuple(each.note for each in passed)

    @property
    def kept_boxes(self) -> tuple[str, ...]:
        """Names of values that say which boxes each suppression of a pipeline keeps."""
        stages = leaves(self._part)
        return tuple(each.kept_name for each in stages if isinstance(each, Suppression))

    def before_suppression(self) -> Program:
        """Return the program up to where a non-maximum suppression chooses boxes.

        What that takes is an output instead of what it gives. A program without is returned as it
        is.

        Raises
        ------
        UnsupportedError
            If nothing comes before.
        """
        part = self._part.without_suppression()
        if part is None:
            msg = "there is no ML program before the non-maximum suppression"
            raise UnsupportedError(msg)
        if part is self._part:
            return self
        return Program(part, precision=self._precision, seed=self._seed)

    @property
    def precision(self) -> Precision:
        """How floats that the program declares as float16 are computed."""
        return self._precision

    @property
    def values(self) -> dict[str, TensorType | None]:
        """Type of each intermediate value, in the order in which they are computed.

        Inputs are among them, constants are not. ``None`` stands for a value that is no tensor, and
        in a shape for a size that varies. In a pipeline a name begins with its model's and a slash.
        """
        return {
            model.prefix + name: kind
            for model in self._models
            for name, (_, kind) in model.function.watchable.items()
        }

    @property
    def op_types(self) -> dict[str, str]:
        """Type of the op that computes each of `values`; inputs are not among them."""
        return {
            model.prefix + name: kind
            for model in self._models
            for name, kind in model.function.op_types.items()
        }

    @property
    def functions(self) -> dict[str, str]:
        """Name of the function that is run of each model, by what its values' names begin with."""
        return {model.prefix: model.function_name for model in self._models}

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The ops that multiply what is computed by a stored weight."""
        return tuple(
            layer for model in self._models for layer in layers(model.prefix, model.function)
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
        """Run the program, and observe intermediate values.

        Parameters
        ----------
        inputs
            By name. An optional one may be missing.
        taps
            Names of the `values` to observe.
        observe
            Called with name and tensor of each of them as soon as it is computed, each time it is.
            The values are then not kept, so that one pass shows all of them in bounded memory.
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
            The outputs, and the intermediate values in the shape and the layout of the ops.

        Raises
        ------
        InputError
            If an input, a state or a name in ``taps`` is missing, unknown or unsuitable.
        ExecutionError
            If an op can't compute what it is given.
        """
        wanted = frozenset(taps)
        self._check(inputs, wanted, state)
        kept: dict[str, Any] = {}
        generator = torch.Generator().manual_seed(self._seed if seed is None else seed)
        run = Run(
            generator,
            state or State({}),
            wanted,
            kept.__setitem__ if observe is None else observe,
            replace,
        )
        with torch.no_grad():
            outputs = self._part.run(inputs, run)
        as_torch = any(isinstance(value, Tensor) for value in inputs.values())
        declared = {feature.name: feature.dtype for feature in self.outputs}
        return Result(
            {
                name: self._exported(value, declared[name], as_torch)
                for name, value in outputs.items()
            },
            {name: self._exported(value, "", as_torch) for name, value in kept.items()},
        )

    def release(self) -> None:
        """Let go of decoded weights that are kept between runs."""
        for model in self._models:
            for stored in model.function.stored:
                if isinstance(stored, Weight):
                    stored.release()

    def to_torch(self) -> ProgramModule | PipelineModule:
        """Return the program as a torch module, whose weights are its parameters and buffers.

        The module takes the inputs as tensors, by position in the order of `inputs`, and returns
        the outputs likewise: a tensor, or a tuple if there are several. Images are tensors as the
        program declares them. Its states are buffers. ``torch.export`` can trace it, unless the
        program's course or its shapes depend on computed values.

        Raises
        ------
        UnsupportedError
            If the model chooses boxes: `before_suppression` becomes a module.
        """
        if self.kept_boxes:
            msg = (
                "a non-maximum suppression becomes no module; take that of before_suppression(), "
                f"got {self.kept_boxes[0].removesuffix(': kept')!r}"
            )
            raise UnsupportedError(msg)
        return self._part.module(self._seed)

    def _states(self) -> dict[str, TensorType]:
        return {
            model.prefix + name: parameter.type
            for model in self._models
            for name, parameter in model.function.inputs.items()
            if parameter.is_state
        }

    def _check(self, inputs: Mapping[str, Any], taps: frozenset[str], state: State | None) -> None:
        io.check_names(self.inputs, inputs)
        operands = (m.prefix + name for m in self._models for name in m.function.operands)
        unknown = sorted(taps - {*self.values, *operands, *self.kept_boxes})
        if unknown:
            msg = f"taps must name values that the program computes, got {', '.join(unknown)}"
            raise InputError(msg)
        if state is None and self.is_stateful:
            msg = "the model is stateful: give it a state, from make_state()"
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
