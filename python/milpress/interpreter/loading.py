"""Packages made ready to run: each function is bound, the stages of pipelines are put together."""

from __future__ import annotations

from dataclasses import dataclass, replace

from milpress.errors import ConfigError, ModelKindError, PackageError, UnsupportedError
from milpress.interpreter.binding import Binder
from milpress.interpreter.constants import Budget
from milpress.interpreter.parts import Model, Part, Passed, Pipeline
from milpress.interpreter.suppression import suppression_of
from milpress.mil import proto
from milpress.mil.features import Feature, described
from milpress.mil.model_kinds import kind_of
from milpress.mil.package import Package, description_of, pipeline_models


@dataclass(frozen=True, slots=True)
class Loader:
    """Makes the models of a package ready to run."""

    package: Package
    function: str | None
    rounds: bool
    budget: Budget

    def part(self, model: proto.Model, place: tuple[str, ...] = ()) -> Model | Pipeline:
        """Return a model of the package, which is an ML program or a pipeline.

        What is raised is as of `milpress.interpreter.load`.
        """
        if model.WhichOneof("choice") == "mlProgram":
            return self._model(model, place)
        if self.function is not None:
            msg = f"function must not be given for a pipeline, got {self.function!r}"
            raise ConfigError(msg)
        stages = [
            self._stage(i, inner, (*place, name))
            for i, (name, inner) in enumerate(pipeline_models(model))
        ]
        return _Joined(self.package, model, stages).pipeline()

    def _stage(self, i: int, model: proto.Model, place: tuple[str, ...]) -> Part | Passed:
        if model.WhichOneof("choice") is not None:
            return self.part(model, place)
        if model.HasField("nonMaximumSuppression"):
            return suppression_of(model, "/".join(place))
        kind = kind_of(model)
        if not kind:
            msg = (
                f"{self.package.path}: stage {'/'.join(place)!r} of the pipeline is of a kind "
                "that Core ML does not have"
            )
            raise ModelKindError(msg)
        return Passed(
            text=f"stage {i + 1}, {'/'.join(place)!r} ({kind}),",
            inputs=tuple(item.name for item in model.description.input),
            outputs=tuple(item.name for item in model.description.output),
        )

    def _model(self, model: proto.Model, place: tuple[str, ...]) -> Model:
        name = self._function_name(model, place)
        shown = "/".join((*place, name))
        function = Binder(
            model.mlProgram.functions[name],
            shown,
            self.package,
            rounds=self.rounds,
            budget=self.budget,
        ).function()
        description = description_of(model, name)
        outputs = dict(zip(function.outputs, function.output_types, strict=True))
        taken = {key for key, value in function.inputs.items() if not value.is_state}
        if {item.name for item in description.input} != taken:
            msg = f"{shown}: the description names other inputs than the function"
            raise PackageError(msg)
        if not {item.name for item in description.output} <= set(outputs):
            msg = f"{shown}: the description names outputs that the function does not have"
            raise PackageError(msg)
        return Model(
            prefix="".join(f"{part}/" for part in place),
            function_name=name,
            function=function,
            inputs=tuple(
                replace(
                    described(item, function.inputs[item.name].type),
                    n_rows=function.lookups.get(item.name),
                )
                for item in description.input
            ),
            outputs=tuple(described(item, outputs[item.name]) for item in description.output),
        )

    def _function_name(self, model: proto.Model, place: tuple[str, ...]) -> str:
        functions = model.mlProgram.functions
        name = self.function
        if name is None:
            name = model.description.defaultFunctionName or (
                "main" if "main" in functions or len(functions) != 1 else next(iter(functions))
            )
        if name not in functions:
            where = "/".join((str(self.package.path), *place))
            known = ", ".join(sorted(functions))
            msg = f"{where}: function must be one of {known}, got {name!r}"
            raise ConfigError(msg)
        return name


class _Joined:
    """Puts the stages of a pipeline together: each takes what is given or made before it."""

    def __init__(self, package: Package, model: proto.Model, stages: list[Part | Passed]) -> None:
        self._package = package
        self._inputs = [item.name for item in model.description.input]
        self._outputs = [item.name for item in model.description.output]
        self._stages = stages
        self._passed: list[Passed] = []
        # What makes each value that is known so far; nothing where it is given.
        self._makers: dict[str, Part | Passed | None] = dict.fromkeys(self._inputs)
        self._taken: dict[str, Feature] = {}
        self._computed: dict[str, Feature] = {}
        self._ends: dict[str, Feature] = {}

    def pipeline(self) -> Pipeline:
        for stage in self._stages:
            if isinstance(stage, Passed):
                self._pass(stage)
            else:
                self._add(stage)
        parts = tuple(stage for stage in self._stages if not isinstance(stage, Passed))
        if not parts:
            msg = f"{self._package.path}: no stage of the pipeline can be run"
            raise ModelKindError(msg)
        nested = [passed for part in parts if isinstance(part, Pipeline) for passed in part.passed]
        unused = [
            Feature(name=name, kind="array", is_unused=True)
            for name in self._inputs
            if name not in self._taken
        ]
        order = [name for name in self._inputs if name in self._taken]
        order += [name for name in self._taken if name not in order]
        return Pipeline(
            parts=parts,
            inputs=(*(self._taken[name] for name in order), *unused),
            outputs=self._given_out(bool(nested)),
            passed=(*self._passed, *nested),
        )

    def _pass(self, stage: Passed) -> None:
        makers = [self._makers.get(name) for name in stage.inputs]
        is_behind = any(
            maker.is_behind if isinstance(maker, Passed) else maker is not None for maker in makers
        )
        stage = replace(stage, is_behind=is_behind)
        self._passed.append(stage)
        self._ends |= {
            name: self._computed[name]
            for name, maker in zip(stage.inputs, makers, strict=True)
            if maker is not None and not isinstance(maker, Passed)
        }
        self._makers |= dict.fromkeys(stage.outputs, stage)

    def _add(self, part: Part) -> None:
        for feature in part.inputs:
            maker = self._makers.get(feature.name)
            if isinstance(maker, Passed):
                if maker.is_behind:
                    msg = (
                        f"{self._package.path}: a stage between others must be an ML program or a "
                        f"non-maximum suppression, got {maker.text} whose {feature.name!r} a later "
                        "one takes; split the pipeline there, or make an ML program of that stage"
                    )
                    raise UnsupportedError(msg)
                feature = replace(feature, origin=f"which {maker.text} would give")
            elif feature.name not in self._makers and not feature.origin:
                if not feature.is_required:
                    continue
                msg = (
                    f"{self._package.path}: a model of a pipeline must take what the pipeline or "
                    f"a model before it gives, got {feature.name}"
                )
                raise PackageError(msg)
            if maker is None or isinstance(maker, Passed):
                self._taken.setdefault(feature.name, feature)
        self._makers |= dict.fromkeys((feature.name for feature in part.outputs), part)
        self._computed |= {feature.name: feature for feature in part.outputs}

    def _given_out(self, is_open: bool) -> tuple[Feature, ...]:
        """Return the outputs; those that can't be made are replaced by what their makers take."""
        outputs = []
        for name in self._outputs:
            maker = self._makers.get(name)
            if isinstance(maker, Passed) or (is_open and maker is None):
                continue
            if maker is None:
                msg = f"{self._package.path}: no stage of the pipeline has its output {name}"
                raise PackageError(msg)
            outputs.append(self._computed[name])
        outputs += [each for each in self._ends.values() if each not in outputs]
        return tuple(outputs) or tuple(self._computed.values())
