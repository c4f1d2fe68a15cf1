"""Quantization of activations: ranges by running the model on samples, then pairs of ops."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Mapping, Sequence, Sized
from typing import Any, TypeAlias

import numpy as np

from milpress.calibration.activation_report import Activation, ActivationReport
from milpress.calibration.joining import Joining
from milpress.engines.engine import Engine
from milpress.engines.interpreter import InterpreterEngine
from milpress.errors import ConfigError, InputError
from milpress.formats import QuantizeConfig, quantize
from milpress.formats.ranges import CalibrationConfig, Observer, Range
from milpress.mil import opset, raising
from milpress.mil.activation_pairs import Parameters, insert
from milpress.mil.activation_sites import quantization_points
from milpress.mil.graph import Value
from milpress.mil.package import Package
from milpress.mil.program import ProgramGraph
from milpress.mil.records import ActivationRecord
from milpress.progress import Progress, shown
from milpress.samples.data import Data, RandomSamples, Samples, opened

# Gives the codes of the activations of an op, by its name and type; None to leave it.
CodesOf: TypeAlias = Callable[[str, str], QuantizeConfig | None]
# Name of the function that is run of each program, by the program's place.
_Chosen: TypeAlias = Mapping[tuple[str, ...], str]

FIRST_OPSET = opset.by_target("iOS17")
_GREATEST = {"float16": 65504.0, "float32": float(np.finfo(np.float32).max)}
# Where zero is the code in the middle, the other type of 8 bits has it at 0.
_SHIFTED = {("int8", -128): "uint8", ("uint8", 128): "int8"}


def quantize_activations(
    package: Package,
    codes_of: CodesOf,
    samples: Data,
    *,
    calibration: CalibrationConfig | None = None,
    function: str | None = None,
    values_at_once: int = -1,
    progress: Progress | bool | None = None,
) -> ActivationReport:
    """Quantize the activations of an open package, in its model in memory.

    Parameters
    ----------
    package
        The package. A function below iOS17 is raised to it, the first that has the ops.
    codes_of
        Gives the codes that the inputs and outputs of an op become, by its name and type.
    samples
        What the model is run on: whatever `Samples` takes; of dictionaries, one after the other,
        the name may be ``None`` if there is just one input.
    calibration
        How ranges are found; by default they hold all that was seen.
    function
        The function of a package with several; by default the one that Core ML would take. In a
        pipeline, it is every model's only one.
    values_at_once
        How many intermediate values are observed in a run; -1 for all. With fewer, there are more
        runs, and the same results.
    progress
        ``True`` shows a bar; a function is called with samples done, samples in all (0 if that is
        not known) and what is at hand.

    Returns
    -------
    ActivationReport
        What was quantized.

    Raises
    ------
    InputError
        If there is no sample, or the model can't take one.
    UnsupportedOpError
        If the interpreter does not cover an op of the model.
    UnsupportedError
        If a function can't be raised, or Core ML can't give out a value.
    DriverError
        If Core ML is to run the model, and this is no Mac, or it fails.
    """
    if isinstance(values_at_once, bool) or (values_at_once != -1 and values_at_once < 1):
        msg = (
            f"the values observed in a run must be at least 1, or -1 for all, got {values_at_once}"
        )
        raise ConfigError(msg)
    calibration = calibration or CalibrationConfig()
    chosen = _chosen(package, function)
    notes = _raised(package, chosen)
    jobs = [
        _Job(graph, codes_of, calibration)
        for graph in package.graphs
        if graph.function_name == chosen[graph.place] and graph.is_run
    ]
    observers = {name: observer for job in jobs for name, observer in job.observers.items()}
    with _engine(package, chosen, calibration.engine) as engine:
        n_samples = _observe(engine, samples, observers, values_at_once, progress, notes)
    record = ActivationRecord.of(package.model)
    before = len(record.pairs)
    for job in jobs:
        pairs = job.insert()
        prefix = job.graph.prefix
        record.pairs.update({f"{prefix}{k}": f"{prefix}{v}" for k, v in pairs.items()})
    n_pairs = len(record.pairs) - before
    if n_pairs:
        settings: dict[str, Any] = {"calibration": calibration.calibration, "samples": n_samples}
        if calibration.engine != "interpreter":
            settings["engine"] = calibration.engine
        if calibration.calibration == "percentile":
            settings["percentile"] = calibration.percentile
        record.settings.append(settings)
        record.write(package.model)
    return ActivationReport(
        activations=tuple(each for job in jobs for each in job.activations),
        n_samples=n_samples,
        n_pairs=n_pairs,
        notes=(*notes, *(note for job in jobs for note in job.notes)),
        shared=tuple(names for job in jobs for names in job.shared),
    )


def _chosen(package: Package, function: str | None) -> _Chosen:
    chosen = {}
    for program in package.programs:
        names = program.functions
        name = None if program.place else function
        if name is None:
            name = program.model.description.defaultFunctionName or (
                "main" if "main" in names or len(names) != 1 else next(iter(names))
            )
        if name not in names:
            msg = f"{package.path}: function must be one of {', '.join(names)}, got {name!r}"
            raise ConfigError(msg)
        chosen[program.place] = name
    return chosen


def _raised(package: Package, chosen: _Chosen) -> list[str]:
    notes: dict[str, None] = {}
    for program in package.programs:
        raised = program.functions[chosen[program.place]]
        current = opset.by_name(raised.opset)
        if current < FIRST_OPSET:
            raising.raise_to(program.model, raised, FIRST_OPSET, package)
            notes[f"raised from {current.target} to {FIRST_OPSET.target}"] = None
        package.model.specificationVersion = max(
            package.model.specificationVersion, program.model.specificationVersion
        )
    return list(notes)


class _Job:
    """A graph whose activations are to be quantized, and what looks at them."""

    def __init__(
        self, graph: ProgramGraph, codes_of: CodesOf, calibration: CalibrationConfig
    ) -> None:
        self.graph = graph
        self.activations: list[Activation] = []
        self._calibration = calibration
        self._points = quantization_points(graph, lambda node: codes_of(node.op_name, node.op.type))
        self._wanted = self._points.wanted
        self._joining = Joining(graph, self._wanted)
        self._observers = {value: calibration.observer() for value in self._joining.observed}
        self._unions: dict[tuple[Value, ...], Observer] = {}
        self._known: dict[tuple[Value, QuantizeConfig], Parameters | None] = {}
        self._late: list[Value] = []

    @property
    def observers(self) -> dict[str, Observer]:
        """What looks at the values of each name, as a run names them."""
        # In nested blocks a name may stand for several values, which then have one range.
        by_name: dict[str, Observer] = {}
        for value in self._observers:
            name = "/".join((*self.graph.place, value.name))
            self._observers[value] = by_name.setdefault(name, self._observers[value])
        return by_name

    @property
    def notes(self) -> list[str]:
        """What is to be said of ranges beyond those of single values."""
        return [
            *(
                f"{self._named(join.joined)}: the range of {self._named(small.name)}, which it "
                f"concatenates, is {small.ratio:.0f} times smaller than that of the others; each "
                "part has a range of its own"
                for join, small in self._joining.parted
            ),
            *(
                f"{self._named(value)}: no sample gave it a finite value; it has the range that "
                "it shares"
                for value in self._late
            ),
        ]

    @property
    def shared(self) -> list[tuple[str, ...]]:
        """The names of the values that have one range, for each such range."""
        return [tuple(map(self._named, group)) for group in self._joining.groups]

    def insert(self) -> dict[str, str]:
        """Put the pairs into the graph."""
        codes = next((setting for settings in self._wanted.values() for setting in settings), None)
        if codes is not None:
            self._joining.settle(lambda group: self._range(group, codes), codes)
        return insert(self.graph, self._points, self._parameters)

    def _named(self, value: Value | str) -> str:
        return f"{self.graph.prefix}{value if isinstance(value, str) else value.name}"

    def _range(self, group: Sequence[Value], codes: QuantizeConfig) -> Range | None:
        """Return the range of what several values were together."""
        key = tuple(group)
        if key not in self._unions:
            observers = dict.fromkeys(self._observers[value] for value in group)
            self._unions[key] = Observer.union(list(observers))
        return self._unions[key].range(self._calibration, codes)

    def _parameters(self, value: Value, codes: QuantizeConfig) -> Parameters | None:
        key = value, codes
        if key not in self._known:
            self._known[key] = self._decided(value, codes)
        return self._known[key]

    def _decided(self, value: Value, codes: QuantizeConfig) -> Parameters | None:
        kind = self._points.types[value]
        limit = _GREATEST[kind.dtype.name]
        seen = self._range(self._joining.group(value), codes)
        if seen is not None:
            seen = Range(max(seen.low, -limit), min(seen.high, limit))
        note = self._reason_to_leave(value, seen, codes)
        parameters = None
        if seen is not None and not note:
            parameters = parameters_of(seen, codes, kind.dtype.storage)
            if self._observers[value].seen is None:
                self._late.append(value)
        low, high = (math.nan, math.nan) if seen is None else seen
        self.activations.append(
            Activation(
                name=self._named(value),
                shape=kind.shape,
                dtype=codes.dtype if parameters is None else parameters.dtype,
                scale=math.nan if parameters is None else float(parameters.scale),
                zero_point=0 if parameters is None else parameters.zero_point or 0,
                low=low,
                high=high,
                note=note,
            )
        )
        return parameters

    def _reason_to_leave(self, value: Value, seen: Range | None, codes: QuantizeConfig) -> str:
        """Return why a value can't be quantized; empty if it can."""
        observer = self._observers[value]
        if observer.has_infinities or observer.has_nans:
            what = "an infinity" if observer.has_infinities else "NaN"
            return f"a sample gave it {what}, which no code stands for"
        if seen is None:
            return "no sample gave it a finite value"
        lost = self._joining.lost(value, seen, codes)
        if lost is None:
            return ""
        return (
            f"codes would lose {self._named(lost.name)}, which it is made of and whose range is "
            f"{lost.ratio:.0f} times smaller"
        )


def parameters_of(seen: Range, codes: QuantizeConfig, dtype: np.dtype[Any]) -> Parameters:
    """Return scale and zero point that let codes of a kind stand for a range.

    A range in which all is zero has the scale 1. Where the zero point is that of the middle code,
    the other type of 8 bits is taken, which has none.
    """
    ends = quantize(np.array([seen.low, seen.high], dtype), codes)
    scale = ends.scale.reshape(-1)[0]
    zero_point = 0 if ends.offset is None else int(ends.offset.reshape(-1)[0])
    if not scale > 0:
        scale, zero_point = dtype.type(1), 0
    kind = _SHIFTED.get((codes.dtype, zero_point))
    if kind is not None:
        return Parameters(scale, None, kind)
    return Parameters(scale, zero_point or None, codes.dtype)


def _engine(
    package: Package, chosen: _Chosen, name: str
) -> contextlib.AbstractContextManager[Engine]:
    if name == "coreml":
        from milpress.engines.coreml import CoreMLEngine

        return CoreMLEngine(package, chosen)
    return contextlib.nullcontext(InterpreterEngine(package, chosen.get(())))


def _observe(
    engine: Engine,
    samples: Data,
    observers: Mapping[str, Observer],
    values_at_once: int,
    progress: Progress | bool | None,
    notes: list[str],
) -> int:
    """Show intermediate values to observers; return the number of samples, and add remarks."""

    def observe(name: str, value: Any) -> None:
        observers[name].add(value)

    if isinstance(samples, (str, os.PathLike, RandomSamples, Mapping)):
        samples = Samples(samples, engine.inputs)
        notes.extend(samples.notes)
    notes.extend(engine.notes)
    total = len(samples) if isinstance(samples, Sized) else 0
    names = list(observers)
    size = len(names) if values_at_once == -1 else values_at_once
    n_samples = 0
    with shown(progress) as note:
        for sample in samples:
            note(n_samples, total, f"sample {n_samples + 1}")
            inputs, _ = opened(
                named(sample, [feature.name for feature in engine.inputs]), engine.inputs
            )
            for start in range(0, len(names), max(size, 1)):
                engine.intermediate(inputs, names[start : start + size], observe)
            n_samples += 1
        if not n_samples:
            msg = "there are no samples: give at least one"
            raise InputError(msg)
        note(n_samples, total, "")
    return n_samples


def named(sample: Mapping[Any, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return a sample by names, if its one input was given under ``None``.

    Raises
    ------
    InputError
        If the model has several inputs.
    """
    if None not in sample:
        return dict(sample)
    if len(sample) > 1 or len(names) > 1:
        msg = (
            "When the model has multiple inputs, please provide the name for each data in "
            f"`sample_data`: {', '.join(names)}"
        )
        raise InputError(msg)
    return {names[0]: sample[None]}
