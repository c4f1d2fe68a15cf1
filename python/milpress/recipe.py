"""Which weight gets which treatment: a value, to and from YAML."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from milpress.errors import ConfigError
from milpress.formats import (
    Blocks,
    Granularity,
    KMeans,
    PalettizeConfig,
    PerBlock,
    PerChannel,
    PerTensor,
    PruneConfig,
    QuantizeConfig,
    Table,
    Treatment,
    Uniform,
    Unique,
)
from milpress.formats.quantized import IntDType
from milpress.formats.ranges import CalibrationConfig
from milpress.plain import json, patterns, structure, yaml
from milpress.plain.structure import structured

if TYPE_CHECKING:
    from cattrs import Converter

# coremltools compresses weights of more than 2,048 elements.
DEFAULT_MIN_SIZE = 2049


@dataclass(frozen=True, slots=True)
class Keep:
    """Leave a weight as it is."""


_KINDS: dict[str, type[Any]] = {
    "palettize": PalettizeConfig,
    "quantize": QuantizeConfig,
    "prune": PruneConfig,
}

_ACTIVATIONS = "quantize_activations"
_CODES = QuantizeConfig(granularity=PerTensor())
_CALIBRATION = CalibrationConfig()


@dataclass(frozen=True, slots=True, kw_only=True)
class Select:
    """Which weights are meant.

    Parameters
    ----------
    name
        Name of the weight; a pattern if it begins with ``glob:`` or ``re:``. ``None`` for any.
    op_types
        Kinds of the ops that use the weight, one of which must do; empty for any.
    min_size
        Least number of elements.
    """

    name: str | None = None
    op_types: tuple[str, ...] = ()
    min_size: int = DEFAULT_MIN_SIZE

    def __post_init__(self) -> None:
        if isinstance(self.min_size, bool) or self.min_size < 0:
            msg = f"min_size must not be negative, got {self.min_size}"
            raise ConfigError(msg)
        if self.name is not None:
            patterns.check(self.name)

    def matches(self, name: str, op_types: Iterable[str]) -> bool:
        """Whether a weight is meant, its size aside."""
        return (self.name is None or patterns.matches(self.name, name)) and (
            not self.op_types or any(kind in self.op_types for kind in op_types)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """An exception within a step: other weights, another treatment."""

    select: Select
    treatment: Treatment | Keep


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A treatment, the weights it is for, and exceptions, of which the first that matches wins."""

    treatment: Treatment | None = None
    select: Select = Select()
    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        if self.treatment is None and not self.rules:
            msg = f"a step needs one of {', '.join(_KINDS)}, or rules"
            raise ConfigError(msg)

    def treatment_for(self, name: str, op_types: Sequence[str]) -> tuple[Treatment | Keep, int]:
        """Return the treatment of a weight and the least size it applies to."""
        for rule in self.rules:
            if rule.select.matches(name, op_types):
                return rule.treatment, rule.select.min_size
        if self.treatment is not None and self.select.matches(name, op_types):
            return self.treatment, self.select.min_size
        return Keep(), 0

    def choices(
        self, name: str, op_types: Sequence[str]
    ) -> list[tuple[str, Treatment | Keep, int]]:
        """Return what is said for each kind of op that uses a weight, as `treatment_for` does.

        Kinds that nothing is said for are left out.
        """
        selects = [rule.select for rule in self.rules]
        selects.extend([] if self.treatment is None else [self.select])
        return [
            (kind, *self.treatment_for(name, (kind,)))
            for kind in op_types
            if any(select.matches(name, (kind,)) for select in selects)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationStep:
    """Codes of 8 bits for what ops take and make, and the ops this is for.

    Parameters
    ----------
    codes
        The codes: int8 or uint8 with one scale.
    calibration
        How ranges are found from samples.
    select
        The ops, by name and type; sizes don't count.
    keep
        Ops that are left in spite of it.
    """

    codes: QuantizeConfig = _CODES
    calibration: CalibrationConfig = _CALIBRATION
    select: Select = Select()
    keep: tuple[Select, ...] = ()

    def __post_init__(self) -> None:
        check_codes(self.codes)

    def codes_of(self, name: str, op_type: str) -> QuantizeConfig | None:
        """Return the codes of the activations of an op; ``None`` to leave it."""
        if any(select.matches(name, (op_type,)) for select in self.keep):
            return None
        return self.codes if self.select.matches(name, (op_type,)) else None


def check_codes(codes: QuantizeConfig) -> None:
    """Refuse codes that activations can't have.

    Raises
    ------
    ConfigError
        If they are not of 8 bits, or have more than one scale.
    """
    if codes.bits != 8:
        msg = f"activations must become int8 or uint8, got {codes.dtype}"
        raise ConfigError(msg)
    if codes.range != "minmax" or not isinstance(codes.granularity, PerTensor):
        msg = "activations must have one scale, and the range that calibration finds"
        raise ConfigError(msg)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What to do to a model.

    Parameters
    ----------
    steps
        Treatments with the weights they are for. Later steps go on with the result of earlier ones
        (joint compression).
    target
        Deployment target to raise the model to, such as ``"iOS18"``; ``None`` leaves it, except
        that an iOS15 model becomes iOS16, the first that can hold compressed weights.
    activations
        Activations to quantize first, while weights are as they were; an earlier model than iOS17
        becomes iOS17.

    Examples
    --------
    >>> recipe = Recipe.from_dict({"steps": [{"palettize": {"bits": 4}}]})
    >>> recipe.steps[0].treatment.bits
    4
    """

    steps: tuple[Step, ...]
    target: str | None = None
    activations: ActivationStep | None = None

    def __post_init__(self) -> None:
        if not self.steps and self.activations is None:
            msg = "a recipe needs steps"
            raise ConfigError(msg)

    @classmethod
    def of(cls, treatment: Treatment, *, target: str | None = None, **select: Any) -> Recipe:
        """Return the recipe of one treatment for all weights, or those that ``select`` names."""
        return cls(steps=(Step(treatment=treatment, select=Select(**select)),), target=target)

    def treatments_for(self, name: str, op_types: Sequence[str]) -> list[tuple[Treatment, int]]:
        """Return the treatments of a weight, in order, and the least size each applies to."""
        choices = (step.treatment_for(name, op_types) for step in self.steps)
        return [(chosen, least) for chosen, least in choices if not isinstance(chosen, Keep)]

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> Recipe:
        """Read a recipe from a YAML file.

        Raises
        ------
        ConfigError
            If it is no YAML, or not of the recipe's form; a line for each place that is wrong.
        """
        return _structured(yaml.load(path, "a recipe"), str(path))

    @classmethod
    def from_dict(cls, data: Any) -> Recipe:
        """Build a recipe from plain dictionaries and lists, as YAML gives them.

        Raises
        ------
        ConfigError
            If a key is unknown or a value is not what it must be; a line for each place that is
            wrong.
        """
        return _structured(data, "")

    def to_dict(self) -> dict[str, Any]:
        """Return plain dictionaries and lists from which `from_dict` builds the recipe again."""
        steps: list[Step | ActivationStep] = [*self.steps]
        if self.activations is not None:
            steps.insert(0, self.activations)
        target = {} if self.target is None else {"target": self.target}
        return {"version": 1, **target, "steps": [_step_dict(step) for step in steps]}

    def to_yaml(self) -> str:
        """Return the recipe as YAML."""
        return yaml.text(self.to_dict())


# What a file holds, key by key, where that is not as the values have it. Each becomes its value
# while it is read, so that the place of whatever is wrong with it is known.
_form = dataclass(frozen=True, kw_only=True)


@_form
class _Palettize:
    bits: int | None = None
    group_size: int | None = None
    channel_axis: int | None = None
    vector_size: int | None = None
    channel_scale: bool = False
    table: Literal["kmeans", "uniform", "unique"] = "kmeans"
    seed: int = 0

    def value(self) -> PalettizeConfig:
        settings = _changed(self, "table", "seed")
        table: Table = Uniform() if self.table == "uniform" else KMeans(self.seed)
        if self.table == "unique":
            table = Unique()
            settings.setdefault("bits", None)
        return PalettizeConfig(table=table, **settings)


@_form
class _Quantize:
    dtype: IntDType = "int8"
    block_size: int | tuple[int, ...] | None = None
    granularity: Literal["per_tensor", "per_channel", "per_block"] | None = None
    offset: bool = False
    range: Literal["minmax", "mse"] = "minmax"

    def value(self) -> QuantizeConfig:
        named = self.granularity or ("per_channel" if self.block_size is None else "per_block")
        if (named == "per_block") != (self.block_size is not None):
            msg = f"block_size goes with granularity per_block, got {self.block_size} with {named}"
            raise ConfigError(msg)
        granularity: Granularity = PerTensor() if named == "per_tensor" else PerChannel()
        if isinstance(self.block_size, tuple):
            granularity = Blocks(self.block_size)
        elif self.block_size is not None:
            granularity = PerBlock(self.block_size)
        return QuantizeConfig(
            dtype=self.dtype, granularity=granularity, offset=self.offset, range=self.range
        )


@_form
class _Treated:
    palettize: PalettizeConfig | None = None
    quantize: QuantizeConfig | None = None
    prune: PruneConfig | None = None

    @property
    def treatment(self) -> Treatment | None:
        treatments = {kind: getattr(self, kind) for kind in _KINDS if getattr(self, kind)}
        if len(treatments) > 1:
            msg = f"{' and '.join(treatments)} stand together; give each a step of its own"
            raise ConfigError(msg)
        return next(iter(treatments.values()), None)


@_form
class _Rule(_Treated):
    name: str | None = None
    op_types: tuple[str, ...] = ()
    min_size: int = DEFAULT_MIN_SIZE
    keep: bool = False

    def value(self) -> Rule:
        if self.keep == (self.treatment is not None):
            msg = f"a rule has either keep: true or one of {', '.join(_KINDS)}"
            raise ConfigError(msg)
        select = Select(name=self.name, op_types=self.op_types, min_size=self.min_size)
        return Rule(select=select, treatment=self.treatment or Keep())


@_form
class _Step(_Treated):
    select: Select = Select()
    rules: tuple[Rule, ...] = ()

    def value(self) -> Step:
        return Step(treatment=self.treatment, select=self.select, rules=self.rules)


@_form
class _Ops:
    name: str | None = None
    op_types: tuple[str, ...] = ()

    def value(self) -> Select:
        return Select(name=self.name, op_types=self.op_types)


@_form
class _KeptOps(_Ops):
    keep: Literal[True]


@_form
class _Activations(CalibrationConfig):
    dtype: IntDType = "int8"
    offset: bool = False


@_form
class _ActivationStep:
    quantize_activations: _Activations
    select: _Ops = _Ops()
    rules: tuple[_KeptOps, ...] = ()

    def value(self) -> ActivationStep:
        settings = _changed(self.quantize_activations)
        codes = {key: settings.pop(key) for key in ("dtype", "offset") if key in settings}
        return ActivationStep(
            codes=replace(_CODES, **codes),
            calibration=CalibrationConfig(**settings),
            select=self.select.value(),
            keep=tuple(rule.value() for rule in self.rules),
        )


@_form
class _Recipe:
    version: Literal[1] = 1
    target: str | None = None
    steps: tuple[Step | ActivationStep, ...] = ()

    def value(self) -> Recipe:
        activations = [step for step in self.steps if isinstance(step, ActivationStep)]
        if len(activations) > 1:
            msg = f"only one step can be {_ACTIVATIONS}, got {len(activations)}"
            raise ConfigError(msg)
        return Recipe(
            steps=tuple(step for step in self.steps if isinstance(step, Step)),
            target=self.target,
            activations=activations[0] if activations else None,
        )


@functools.cache
def _reader() -> Converter:
    reader = structure.reader()

    def read_as(kind: Any, form_of: Callable[[Any], Any]) -> None:
        reader.register_structure_hook(
            kind, lambda data, _: reader.structure(data, form_of(data)).value()
        )

    read_as(PalettizeConfig, lambda _: _Palettize)
    read_as(QuantizeConfig, lambda _: _Quantize)
    read_as(Rule, lambda _: _Rule)
    read_as(Recipe, lambda _: _Recipe)
    read_as(
        Step | ActivationStep,
        lambda data: _ActivationStep if isinstance(data, dict) and _ACTIVATIONS in data else _Step,
    )

    def block_size(data: Any, _: Any) -> Any:
        kind: Any = tuple[int, ...] if isinstance(data, list) else int
        return None if data is None else reader.structure(data, kind)

    reader.register_structure_hook(int | tuple[int, ...] | None, block_size)
    reader.register_structure_hook(float, structure.number)  # as it was given
    return reader


def _structured(data: Any, place: str) -> Recipe:
    recipe: Recipe = structured(data, Recipe, place, error=ConfigError, converter=_reader())
    return recipe


def treatment_dict(treatment: Treatment | Keep | None) -> dict[str, Any]:
    """Return a treatment as the recipe's own words, ``{kind: settings}``."""
    if isinstance(treatment, QuantizeConfig):
        granularity = treatment.granularity
        where: dict[str, Any] = {"granularity": "per_channel"}
        if isinstance(granularity, PerTensor):
            where = {"granularity": "per_tensor"}
        elif isinstance(granularity, PerBlock):
            where = {"block_size": granularity.size}
        elif isinstance(granularity, Blocks):
            where = {"block_size": list(granularity.shape)}
        return {"quantize": {"dtype": treatment.dtype} | where | _changed(treatment, "granularity")}
    if isinstance(treatment, PalettizeConfig):
        settings = {"bits": treatment.bits} | _changed(treatment, "table")
        if not isinstance(treatment.table, KMeans):
            settings["table"] = type(treatment.table).__name__.lower()
        elif treatment.table.seed:
            settings["seed"] = treatment.table.seed
        return {"palettize": settings}
    if isinstance(treatment, PruneConfig):
        return {"prune": _changed(treatment)}
    return {} if treatment is None else {"keep": True}


def _step_dict(step: Step | ActivationStep) -> dict[str, Any]:
    if isinstance(step, Step):
        data, rules = treatment_dict(step.treatment), step.rules
    else:
        codes = {"dtype": step.codes.dtype} | _changed(step.codes, "granularity")
        data = {_ACTIVATIONS: codes | _changed(step.calibration)}
        rules = tuple(Rule(select=select, treatment=Keep()) for select in step.keep)
    if select := _changed(step.select):
        data["select"] = select
    if rules:
        data["rules"] = [_changed(each.select) | treatment_dict(each.treatment) for each in rules]
    return data


def _changed(value: Any, *but: str) -> dict[str, Any]:
    """Return the fields that are not as by default, as a file has them."""
    return {
        item.name: json.plain(getattr(value, item.name))
        for item in fields(value)
        if item.name not in but and getattr(value, item.name) != item.default
    }


def describe(treatment: Treatment) -> str:
    """Return a treatment in a few words, such as ``palettize 4 bits, group size 16``."""
    if isinstance(treatment, PalettizeConfig):
        return _describe_palette(treatment)
    if isinstance(treatment, QuantizeConfig):
        where = {PerTensor: "per tensor", PerChannel: "per channel"}.get(
            type(treatment.granularity), ""
        )
        if isinstance(treatment.granularity, PerBlock):
            where = f"block size {treatment.granularity.size}"
        elif isinstance(treatment.granularity, Blocks):
            where = f"blocks of {'x'.join(map(str, treatment.granularity.shape))}"
        clipped = ", clipped" if treatment.range == "mse" else ""
        offset = ", offset" if treatment.offset else ""
        return f"quantize {treatment.dtype}, {where}{offset}{clipped}"
    if treatment.n_m is not None:
        return f"prune {treatment.n_m[0]} of {treatment.n_m[1]}"
    if treatment.sparsity is not None:
        blocks = "" if treatment.block_size is None else f", blocks of {treatment.block_size}"
        return f"prune {treatment.sparsity:.0%}{blocks}"
    return f"prune threshold {treatment.threshold:g}"


def _describe_palette(treatment: PalettizeConfig) -> str:
    words = ["palettize" if treatment.bits is None else f"palettize {treatment.bits} bits"]
    if not isinstance(treatment.table, KMeans):
        words.append(f"{type(treatment.table).__name__.lower()} table")
    if treatment.group_size is not None:
        words.append(f"group size {treatment.group_size}")
    if treatment.vector_size > 1:
        words.append(f"vectors of {treatment.vector_size}")
    if treatment.channel_scale:
        words.append("channel scales")
    return ", ".join(words)
