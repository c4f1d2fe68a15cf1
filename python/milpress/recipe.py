"""Which weight gets which treatment: a value, to and from YAML."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

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
from milpress.formats.ranges import CalibrationConfig
from milpress.plain import patterns, yaml

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
            msg = f"a step must have one of {', '.join(_KINDS)}, or rules, got neither"
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
        found: list[tuple[str, Treatment | Keep, int]] = []
        for kind in op_types:
            is_meant = self.treatment is not None and self.select.matches(name, (kind,))
            if is_meant or any(rule.select.matches(name, (kind,)) for rule in self.rules):
                found.append((kind, *self.treatment_for(name, (kind,))))
        return found


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
            msg = "a recipe must have steps, got none"
            raise ConfigError(msg)

    @classmethod
    def of(cls, treatment: Treatment, *, target: str | None = None, **select: Any) -> Recipe:
        """Return the recipe of one treatment for all weights, or those that ``select`` names."""
        return cls(steps=(Step(treatment=treatment, select=Select(**select)),), target=target)

    def treatments_for(self, name: str, op_types: Sequence[str]) -> list[tuple[Treatment, int]]:
        """Return the treatments of a weight, in order, and the least size each applies to."""
        found = (step.treatment_for(name, op_types) for step in self.steps)
        return [(chosen, least) for chosen, least in found if not isinstance(chosen, Keep)]

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> Recipe:
        """Read a recipe from a YAML file.

        Raises
        ------
        ConfigError
            If it is no YAML, or not of the recipe's form; the place is named.
        """
        data = yaml.load(path, "a recipe")
        try:
            return cls.from_dict(data)
        except ConfigError as error:
            msg = f"{path}: {error}"
            raise ConfigError(msg) from error

    @classmethod
    def from_dict(cls, data: Any) -> Recipe:
        """Build a recipe from plain dictionaries and lists, as YAML gives them.

        Raises
        ------
        ConfigError
            If a key is unknown or a value is not what it must be; the place is named.
        """
        form = _Form(data, "the recipe")
        if form.take("version", 1) != 1:
            msg = f"version must be 1, got {data['version']!r}"
            raise ConfigError(msg)
        target = form.take("target", None)
        if target is not None and not isinstance(target, str):
            msg = f"target must be text, got {target!r}"
            raise ConfigError(msg)
        items = form.take_list("steps")
        form.finish()
        steps = [
            _activation_step(item, f"steps[{i}]")
            if isinstance(item, dict) and _ACTIVATIONS in item
            else _step(item, f"steps[{i}]")
            for i, item in enumerate(items)
        ]
        activations = [step for step in steps if isinstance(step, ActivationStep)]
        if len(activations) > 1:
            msg = f"one step at most must be {_ACTIVATIONS}, got {len(activations)}"
            raise ConfigError(msg)
        return cls(
            steps=tuple(step for step in steps if isinstance(step, Step)),
            target=target,
            activations=activations[0] if activations else None,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain dictionaries and lists from which `from_dict` builds the recipe again."""
        data: dict[str, Any] = {"version": 1}
        if self.target is not None:
            data["target"] = self.target
        first = [] if self.activations is None else [_activation_dict(self.activations)]
        data["steps"] = first + [_step_dict(step) for step in self.steps]
        return data

    def to_yaml(self) -> str:
        """Return the recipe as YAML."""
        return yaml.text(self.to_dict())


class _Form:
    """A mapping that must be used up: what is left over is an error that names it."""

    def __init__(self, data: Any, place: str) -> None:
        if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
            msg = f"{place} must be a mapping with text keys, got {data!r}"
            raise ConfigError(msg)
        self._data = dict(data)
        self._place = place
        self._known: list[str] = []

    def take(self, key: str, default: Any) -> Any:
        self._known.append(key)
        return self._data.pop(key, default)

    def take_list(self, key: str) -> list[Any]:
        items = self.take(key, [])
        if not isinstance(items, list):
            msg = f"{self._place}: {key} must be a list, got {items!r}"
            raise ConfigError(msg)
        return items

    def finish(self) -> None:
        if self._data:
            msg = (
                f"{self._place} must have no keys but {', '.join(self._known)}, "
                f"got {', '.join(sorted(self._data))}"
            )
            raise ConfigError(msg)


def _step(data: Any, place: str) -> Step:
    form = _Form(data, place)
    treatment = _treatment(form, place)
    select = _select(_Form(form.take("select", {}), f"{place}.select"), f"{place}.select")
    rules = form.take_list("rules")
    form.finish()
    return Step(
        treatment=treatment,
        select=select,
        rules=tuple(_rule(rule, f"{place}.rules[{i}]") for i, rule in enumerate(rules)),
    )


def _activation_step(data: Any, place: str) -> ActivationStep:
    form = _Form(data, place)
    where = f"{place}.{_ACTIVATIONS}"
    settings = _Form(form.take(_ACTIVATIONS, {}), where)
    codes: dict[str, Any] = {
        key: settings.take(key, default) for key, default in (("dtype", "int8"), ("offset", False))
    }
    calibration: dict[str, Any] = {
        field.name: settings.take(field.name, field.default) for field in fields(CalibrationConfig)
    }
    settings.finish()
    select = _op_select(_Form(form.take("select", {}), f"{place}.select"), f"{place}.select")
    keep = []
    for i, rule in enumerate(form.take_list("rules")):
        inner = _Form(rule, f"{place}.rules[{i}]")
        if inner.take("keep", False) is not True:
            msg = f"{place}.rules[{i}] must have keep: true, got {rule!r}"
            raise ConfigError(msg)
        keep.append(_op_select(inner, f"{place}.rules[{i}]"))
    form.finish()
    return ActivationStep(
        codes=QuantizeConfig(granularity=PerTensor(), **codes),
        calibration=CalibrationConfig(**calibration),
        select=select,
        keep=tuple(keep),
    )


def _op_select(form: _Form, place: str) -> Select:
    select = _select(form, place)
    if select.min_size != DEFAULT_MIN_SIZE:
        msg = f"{place} must select ops by name and op_types, got min_size"
        raise ConfigError(msg)
    return select


def _activation_dict(step: ActivationStep) -> dict[str, Any]:
    settings: dict[str, Any] = {"dtype": step.codes.dtype}
    if step.codes.offset:
        settings["offset"] = True
    for field in fields(CalibrationConfig):
        value = getattr(step.calibration, field.name)
        if value != field.default:
            settings[field.name] = value
    data: dict[str, Any] = {_ACTIVATIONS: settings}
    select = _select_dict(step.select)
    if select:
        data["select"] = select
    if step.keep:
        data["rules"] = [_select_dict(each) | {"keep": True} for each in step.keep]
    return data


def _rule(data: Any, place: str) -> Rule:
    form = _Form(data, place)
    keep = form.take("keep", False)
    treatment = _treatment(form, place)
    if not isinstance(keep, bool) or keep == (treatment is not None):
        msg = f"{place} must have either keep: true or one of {', '.join(_KINDS)}, got {data!r}"
        raise ConfigError(msg)
    select = _select(form, place)
    return Rule(select=select, treatment=Keep() if treatment is None else treatment)


def _select(form: _Form, place: str) -> Select:
    name = form.take("name", None)
    if name is not None and not isinstance(name, str):
        msg = f"{place}: name must be text, got {name!r}"
        raise ConfigError(msg)
    op_types = form.take_list("op_types")
    if not all(isinstance(kind, str) for kind in op_types):
        msg = f"{place}: op_types must be a list of text, got {op_types!r}"
        raise ConfigError(msg)
    min_size = form.take("min_size", DEFAULT_MIN_SIZE)
    form.finish()
    return Select(
        name=name, op_types=tuple(op_types), min_size=_number(min_size, int, f"{place}.min_size")
    )


def _treatment(form: _Form, place: str) -> Treatment | None:
    given = {kind: form.take(kind, None) for kind in _KINDS}
    given = {kind: settings for kind, settings in given.items() if settings is not None}
    if len(given) > 1:
        msg = f"{place} must have one of {', '.join(_KINDS)}, got {' and '.join(given)}"
        raise ConfigError(msg)
    for kind, settings in given.items():
        return treatment_from_dict(kind, settings, place)
    return None


def treatment_from_dict(kind: str, settings: Any, place: str = "the recipe") -> Treatment:
    """Build the treatment of that kind from its settings.

    Raises
    ------
    ConfigError
        If a setting is unknown or not what it must be.
    """
    place = f"{place}.{kind}"
    form = _Form(settings, place)
    try:
        if kind == "quantize":
            return _quantize_config(form, place)
        return _palettize_config(form, place) if kind == "palettize" else _prune_config(form, place)
    except ConfigError as error:
        if str(error).startswith(place):
            raise
        msg = f"{place}: {error}"
        raise ConfigError(msg) from error


def _palettize_config(form: _Form, place: str) -> PalettizeConfig:
    named = form.take("table", "kmeans")
    seed = form.take("seed", 0)
    tables: dict[str, Table] = {"kmeans": KMeans(_number(seed, int, f"{place}.seed"))}
    tables |= {"uniform": Uniform(), "unique": Unique()}
    if not isinstance(named, str) or named not in tables:
        msg = f"{place}: table must be one of {', '.join(tables)}, got {named!r}"
        raise ConfigError(msg)
    channel_scale = form.take("channel_scale", False)
    if not isinstance(channel_scale, bool):
        msg = f"{place}: channel_scale must be true or false, got {channel_scale!r}"
        raise ConfigError(msg)
    given = _numbers(form, place, int, "bits", "group_size", "channel_axis", "vector_size")
    form.finish()
    if named == "unique":
        given.setdefault("bits", None)
    return PalettizeConfig(table=tables[named], channel_scale=channel_scale, **given)


def _prune_config(form: _Form, place: str) -> PruneConfig:
    n_m: Any = tuple(_number(number, int, f"{place}.n_m") for number in form.take_list("n_m"))
    given = _numbers(form, place, float, "sparsity", "threshold", "min_sparsity")
    given |= _numbers(form, place, int, "block_size", "axis")
    form.finish()
    return PruneConfig(n_m=n_m or None, **given)


def _numbers(form: _Form, place: str, kind: type[int] | type[float], *keys: str) -> dict[str, Any]:
    """Return those of the settings that are given."""
    taken = {key: form.take(key, None) for key in keys}
    return {
        key: _number(value, kind, f"{place}.{key}")
        for key, value in taken.items()
        if value is not None
    }


def _quantize_config(form: _Form, place: str) -> QuantizeConfig:
    dtype = form.take("dtype", "int8")
    block_size = form.take("block_size", None)
    named = form.take("granularity", None)
    offset = form.take("offset", False)
    kind = form.take("range", "minmax")
    form.finish()
    granularities: dict[str, Granularity] = {
        "per_tensor": PerTensor(),
        "per_channel": PerChannel(),
    }
    if block_size is not None:
        if named not in (None, "per_block"):
            msg = f"{place} must have granularity per_block with block_size, got {named!r}"
            raise ConfigError(msg)
        where = f"{place}.block_size"
        if isinstance(block_size, list):
            sizes = tuple(_number(size, int, where) for size in block_size)
            granularity: Granularity = Blocks(sizes)
        else:
            granularity = PerBlock(_number(block_size, int, where))
    elif named in (None, *granularities):
        granularity = granularities[named or "per_channel"]
    else:
        msg = (
            f"{place}: granularity must be per_tensor or per_channel, or block_size given, "
            f"got {named!r}"
        )
        raise ConfigError(msg)
    return QuantizeConfig(dtype=dtype, granularity=granularity, offset=offset, range=kind)


def _number(value: Any, kind: type[int] | type[float], place: str) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, kind)):
        msg = f"{place} must be {'a whole' if kind is int else 'a'} number, got {value!r}"
        raise ConfigError(msg)
    return value


def treatment_dict(treatment: Treatment) -> dict[str, dict[str, Any]]:
    """Return a treatment as the recipe's own words, ``{kind: settings}``."""
    if isinstance(treatment, QuantizeConfig):
        return {"quantize": _quantize_dict(treatment)}
    settings = {
        field.name: getattr(treatment, field.name)
        for field in fields(treatment)
        if getattr(treatment, field.name) != field.default
    }
    if isinstance(treatment, PalettizeConfig):
        return {"palettize": {"bits": treatment.bits} | settings | _table_dict(treatment)}
    if treatment.n_m is not None:
        settings["n_m"] = list(treatment.n_m)
    return {"prune": settings}


def _quantize_dict(treatment: QuantizeConfig) -> dict[str, Any]:
    settings: dict[str, Any] = {"dtype": treatment.dtype}
    if isinstance(treatment.granularity, PerBlock):
        settings["block_size"] = treatment.granularity.size
    elif isinstance(treatment.granularity, Blocks):
        settings["block_size"] = list(treatment.granularity.shape)
    else:
        is_tensor = isinstance(treatment.granularity, PerTensor)
        settings["granularity"] = "per_tensor" if is_tensor else "per_channel"
    if treatment.offset:
        settings["offset"] = True
    if treatment.range != "minmax":
        settings["range"] = treatment.range
    return settings


def _table_dict(treatment: PalettizeConfig) -> dict[str, Any]:
    table = treatment.table
    if isinstance(table, KMeans):
        return {"seed": table.seed} if table.seed else {}
    return {"table": type(table).__name__.lower()}


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


def _select_dict(select: Select) -> dict[str, Any]:
    data: dict[str, Any] = {}
    if select.name is not None:
        data["name"] = select.name
    if select.op_types:
        data["op_types"] = list(select.op_types)
    if select.min_size != DEFAULT_MIN_SIZE:
        data["min_size"] = select.min_size
    return data


def _step_dict(step: Step) -> dict[str, Any]:
    data: dict[str, Any] = {} if step.treatment is None else treatment_dict(step.treatment)
    select = _select_dict(step.select)
    if select:
        data["select"] = select
    if step.rules:
        data["rules"] = [
            _select_dict(rule.select)
            | (
                {"keep": True}
                if isinstance(rule.treatment, Keep)
                else treatment_dict(rule.treatment)
            )
            for rule in step.rules
        ]
    return data
