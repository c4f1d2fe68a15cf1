"""Which weights are at risk where: facts with sources, matched against how weights are stored."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from milpress.errors import ConfigError, printable
from milpress.mil.package import Package
from milpress.plain import yaml
from milpress.planner import traits as _traits
from milpress.planner.traits import Traits, is_stateful, traits_of

Unit: TypeAlias = Literal["ane", "gpu", "cpu"]
Effect: TypeAlias = Literal["crash", "wrong", "leaves", "unavailable", "slow", "no_gain"]
Status: TypeAlias = Literal[
    "documented", "reported", "measured", "unverified", "confirmed", "refuted"
]
# The effects that a recipe made for a unit keeps out of.
AVOIDED: frozenset[Effect] = frozenset({"crash", "wrong", "leaves", "unavailable", "slow"})
_UNITS = {"ane": "Neural Engine", "gpu": "GPU", "cpu": "CPU", "any": "everywhere"}
_SHOWN = {
    "crash": "crashes",
    "wrong": "wrong results",
    "leaves": "runs elsewhere",
    "unavailable": "can't be loaded",
    "slow": "slow",
    "no_gain": "no gain",
}
_N_NAMED = 5
_BUILT_IN = Path(__file__).with_name("facts.yaml")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fact:
    """Something that is known of weights with some traits.

    Parameters
    ----------
    id
        Its name.
    when
        What must hold of the traits of a weight, by trait: a value, several of which one must do,
        or a mapping with ``below`` or ``above``.
    unit
        Where it matters: ``ane``, ``gpu``, ``cpu`` or ``any``.
    effect
        What happens: ``crash``, ``wrong`` results, the op ``leaves`` the unit, ``unavailable``,
        ``slow``, or ``no_gain``.
    says, instead
        What happens, and what to write instead, for people.
    status
        How it is known; one that is ``refuted`` does not fire.
    sources
        Where it can be read.
    from_os, before_os
        The first system that it holds for, and the first that it no longer does.
    before_chip
        The first chip of each family that it no longer holds for.
    """

    id: str
    when: Mapping[str, Any]
    unit: str
    effect: Effect
    says: str
    instead: str
    status: Status
    sources: tuple[str, ...]
    from_os: str | None = None
    before_os: str | None = None
    before_chip: tuple[str, ...] = ()

    def fires(self, traits: Traits, platform: Platform) -> bool:
        """Whether a weight with these traits is at risk on a platform."""
        return (
            self.status != "refuted"
            and self._concerns(platform)
            and all(_holds(asked, getattr(traits, name)) for name, asked in self.when.items())
        )

    def _concerns(self, platform: Platform) -> bool:
        """Whether the platform is, or may be, one that the fact speaks of."""
        if platform.unit is not None and self.unit not in ("any", platform.unit):
            return False
        known = platform.generation
        if self.before_os is not None and (known is None or known >= _generation(self.before_os)):
            return False
        if self.from_os is not None and known is not None and known < _generation(self.from_os):
            return False
        if not self.before_chip:
            return True
        if platform.chip is None:
            return False
        family, number = _chip(platform.chip)
        return any(family == f and number < n for f, n in map(_chip, self.before_chip))

    def to_dict(self) -> dict[str, Any]:
        """Return the fact as JSON can hold it."""
        return {
            "id": self.id,
            "unit": self.unit,
            "effect": self.effect,
            "says": self.says,
            "instead": self.instead,
            "status": self.status,
            "sources": list(self.sources),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Platform:
    """What a model is meant to run on; ``None`` where that is open.

    Parameters
    ----------
    unit
        The compute unit: ``"ane"``, ``"gpu"`` or ``"cpu"``.
    chip
        Such as ``"A17"`` or ``"M4"``.
    os
        Such as ``"iOS18"`` or ``"macOS26"``.
    """

    unit: Unit | None = None
    chip: str | None = None
    os: str | None = None

    def __post_init__(self) -> None:
        if self.unit is not None and self.unit not in get_args(Unit):
            msg = f"a compute unit must be one of {', '.join(get_args(Unit))}, got {self.unit!r}"
            raise ConfigError(msg)
        if self.chip is not None:
            _chip(self.chip)
        if self.os is not None:
            _generation(self.os)

    @property
    def generation(self) -> float | None:
        """The iOS version that was released with the system."""
        return None if self.os is None else _generation(self.os)


@dataclass(frozen=True, slots=True)
class Facts:
    """Facts by their names, and the chips of devices.

    Examples
    --------
    >>> Facts.load().chip_of("iPhone15,2")
    'A16'
    """

    by_id: Mapping[str, Fact]
    chips: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def load(cls, *paths: str | os.PathLike[str]) -> Facts:
        """Read the facts that come with milpress, then files that add to them or change them.

        An entry with the name of a known fact changes what it mentions, such as the status.

        Raises
        ------
        ConfigError
            If a file is not of the form of ``facts.yaml``; the place is named.
        """
        found = cls({}, {})
        for path in (_BUILT_IN, *paths):
            found = found._with(yaml.load(path, "a file of facts"), str(path))
        return found

    def _with(self, data: Any, place: str) -> Facts:
        if not isinstance(data, dict) or data.get("version") != 1:
            msg = f"{place}: facts must be a mapping with version: 1, got {_brief(data)}"
            raise ConfigError(msg)
        unknown = sorted(map(str, data.keys() - {"version", "facts", "chips"}))
        entries, chips = data.get("facts", []), data.get("chips", {})
        if unknown or not isinstance(entries, list) or not isinstance(chips, dict):
            msg = f"{place}: there must be a list of facts and a mapping of chips, got " + (
                ", ".join(unknown) or "others"
            )
            raise ConfigError(msg)
        by_id = dict(self.by_id)
        for i, entry in enumerate(entries):
            fact = _fact(entry, by_id, f"{place}: facts[{i}]")
            by_id[fact.id] = fact
        known = dict(self.chips)
        for chip, devices in chips.items():
            known[str(chip)] = (*known.get(str(chip), ()), *map(str, devices))
        return Facts(by_id, known)

    def chip_of(self, device: str) -> str:
        """Return the chip of a device, by the identifier of its hardware.

        Raises
        ------
        ConfigError
            If it is not known.
        """
        for chip, devices in self.chips.items():
            if device.lower() in (known.lower() for known in devices):
                return chip
        msg = (
            "a device must be the identifier of hardware that the facts know, such as iPhone15,2, "
            f"got {device!r}; name its chip instead"
        )
        raise ConfigError(msg)

    def firing(self, traits: Traits, platform: Platform) -> tuple[Fact, ...]:
        """Return the facts that put a weight with these traits at risk."""
        return tuple(fact for fact in self.by_id.values() if fact.fires(traits, platform))


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A weight at risk.

    Parameters
    ----------
    weight
        Its name.
    traits
        How it is stored and used.
    fact
        What is known of such weights.
    """

    weight: str
    traits: Traits
    fact: Fact

    def to_dict(self) -> dict[str, Any]:
        """Return the finding as JSON can hold it."""
        return {"weight": self.weight, "form": self.traits.form, **self.fact.to_dict()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Lint:
    """What `lint` found.

    Parameters
    ----------
    path
        The package.
    platform
        What it is meant to run on.
    n_weights
        How many weights were looked at.
    findings
        The weights at risk, in the order of the graph.
    """

    path: str
    platform: Platform
    n_weights: int
    findings: tuple[Finding, ...]

    @property
    def by_fact(self) -> dict[Fact, tuple[str, ...]]:
        """The names of the weights that each fact puts at risk."""
        found: dict[str, list[Finding]] = {}
        for finding in self.findings:
            found.setdefault(finding.fact.id, []).append(finding)
        return {some[0].fact: tuple(one.weight for one in some) for some in found.values()}

    @property
    def summary(self) -> str:
        """One line: how many weights are at risk of what."""
        n = len({finding.weight for finding in self.findings})
        if not n:
            return f"{_counted(self.n_weights)}: no risk is known"
        kinds = {
            f"{_UNITS[finding.fact.unit]}: {_SHOWN[finding.fact.effect]}"
            for finding in self.findings
        }
        return f"{_counted(self.n_weights)}: {n} at risk ({'; '.join(sorted(kinds))})"

    def to_dict(self) -> dict[str, Any]:
        """Return the findings as JSON can hold them."""
        return {
            "version": 1,
            "path": self.path,
            "unit": self.platform.unit,
            "chip": self.platform.chip,
            "os": self.platform.os,
            "n_weights": self.n_weights,
            "findings": [finding.to_dict() for finding in self.findings],
        }

    @property
    def details(self) -> str:
        """What is known, a paragraph for each fact that fires, with the weights it puts at risk."""
        paragraphs = []
        for fact, names in self.by_fact.items():
            more = f" and {len(names) - _N_NAMED} more" if len(names) > _N_NAMED else ""
            paragraphs.append(
                f"{_UNITS[fact.unit]}, {_SHOWN[fact.effect]}: {fact.says}\n"
                f"  instead: {fact.instead}\n"
                f"  {fact.status}: {' '.join(fact.sources)}\n"
                f"  weights: {', '.join(map(printable, names[:_N_NAMED]))}{more}"
            )
        return "\n\n".join(paragraphs)


def lint(
    source: str | os.PathLike[str],
    *,
    unit: Unit | None = None,
    device: str | None = None,
    chip: str | None = None,
    os: str | None = None,
    facts: Sequence[str | os.PathLike[str]] = (),
) -> Lint:
    """Say of each weight of a package what is known to go wrong with how it is stored.

    No weight is read. That nothing is found says that nothing is known.

    Parameters
    ----------
    source
        Path of an ``.mlpackage``.
    unit
        The compute unit it is meant for: ``"ane"``, ``"gpu"`` or ``"cpu"``; ``None`` for any.
    device, chip
        The hardware: an identifier such as ``"iPhone15,2"``, or a chip such as ``"A17"``.
    os
        The system, such as ``"iOS18"`` or ``"macOS26"``.
    facts
        Files that add facts to those that come with milpress, or change them.

    Raises
    ------
    ConfigError
        If an argument or a file of facts is not what it must be.
    PackageError
        If it is no package of ML programs.
    """
    known = Facts.load(*facts)
    if device is not None:
        if chip is not None:
            msg = f"only one of device and chip must be given, got {device!r} and {chip!r}"
            raise ConfigError(msg)
        chip = known.chip_of(device)
    return lint_package(Package(source), known, Platform(unit=unit, chip=chip, os=os))


def lint_package(package: Package, facts: Facts, platform: Platform) -> Lint:
    """Do what `lint` does, with an open package."""
    findings: list[Finding] = []
    n_weights = 0
    for graph in package.graphs:
        stateful = is_stateful(graph)
        for weight in graph.weights:
            if len(weight.shape) < 2 or not weight.dtype.is_float:
                continue
            n_weights += 1
            traits = traits_of(weight, stateful=stateful)
            findings.extend(
                Finding(weight=weight.name, traits=traits, fact=fact)
                for fact in facts.firing(traits, platform)
            )
    return Lint(
        path=str(package.path), platform=platform, n_weights=n_weights, findings=tuple(findings)
    )


def warning(source: str | os.PathLike[str]) -> str:
    """Return one line on the compressed weights of a package that are at risk; empty if none is."""
    found = lint(source)
    risky = [
        one
        for one in found.findings
        if one.traits.form != "dense" and one.fact.effect in ("crash", "wrong", "leaves")
    ]
    if not risky:
        return ""
    n = len({one.weight for one in risky})
    kinds = sorted({f"{_UNITS[one.fact.unit]}: {_SHOWN[one.fact.effect]}" for one in risky})
    return f"{_counted(n)} at risk ({'; '.join(kinds)}): see milpress lint"


def _counted(n: int) -> str:
    return f"{n} weight{'s' * (n != 1)}"


def _fact(entry: Any, known: Mapping[str, Fact], place: str) -> Fact:
    """Read a fact, or what an entry changes of a known one."""
    if not isinstance(entry, dict) or not isinstance(entry.get("id"), str):
        msg = f"{place} must be a mapping with an id, got {_brief(entry)}"
        raise ConfigError(msg)
    names = {item.name for item in fields(Fact)}
    unknown = sorted(map(str, entry.keys() - names))
    if unknown:
        msg = f"{place} must have no keys but {', '.join(sorted(names))}, got {', '.join(unknown)}"
        raise ConfigError(msg)
    given = dict(entry)
    for name in ("sources", "before_chip"):
        if name in given:
            given[name] = tuple(map(str, _listed(given[name], f"{place}.{name}")))
    before = known.get(entry["id"])
    if before is None:
        optional = {"from_os", "before_os", "before_chip"}
        missing = sorted(names - optional - given.keys())
        if missing:
            msg = f"{place}: a new fact must have {', '.join(missing)}, got none"
            raise ConfigError(msg)
        fact = Fact(**given)
    else:
        fact = replace(before, **given)
    _check(fact, place)
    return fact


def _check(fact: Fact, place: str) -> None:
    choices = {
        "unit": (*get_args(Unit), "any"),
        "effect": get_args(Effect),
        "status": get_args(Status),
    }
    for name, allowed in choices.items():
        if getattr(fact, name) not in allowed:
            msg = f"{place}.{name} must be one of {', '.join(allowed)}, got {getattr(fact, name)!r}"
            raise ConfigError(msg)
    if not all(isinstance(text, str) for text in (fact.says, fact.instead)):
        msg = f"{place}: says and instead must be text, got other values"
        raise ConfigError(msg)
    if not fact.sources:
        msg = f"{place}.sources must name where the fact can be read, got none"
        raise ConfigError(msg)
    if not isinstance(fact.when, dict) or not fact.when or fact.when.keys() - set(_traits.NAMES):
        msg = f"{place}.when must be conditions on {', '.join(_traits.NAMES)}, got {fact.when!r}"
        raise ConfigError(msg)
    for asked in fact.when.values():
        if isinstance(asked, dict) and (not asked or asked.keys() - {"below", "above"}):
            msg = f"{place}.when: a range must have below or above, got {asked!r}"
            raise ConfigError(msg)
    for system in (fact.from_os, fact.before_os):
        if system is not None:
            _generation(system)
    for chip in fact.before_chip:
        _chip(chip)


def _holds(asked: Any, value: Any) -> bool:
    if isinstance(asked, dict):
        if not isinstance(value, (int, float)):
            return False
        return bool(value < asked.get("below", value + 1) and value > asked.get("above", value - 1))
    choices = asked if isinstance(asked, list) else [asked]
    if isinstance(value, tuple):
        return any(choice in value for choice in choices)
    # True is 1 for Python, but not for who writes a condition.
    return any(value == choice and type(value) is type(choice) for choice in choices)


def _listed(value: Any, place: str) -> Iterable[Any]:
    if not isinstance(value, list):
        msg = f"{place} must be a list, got {_brief(value)}"
        raise ConfigError(msg)
    return value


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _chip(chip: str) -> tuple[str, int]:
    """Return family and number of a chip, whatever is said behind them (``A17 Pro``)."""
    found = re.match(r"([AM])(\d+)\b", str(chip))
    if found is None:
        msg = f"a chip must be such as A17 or M4, got {chip!r}"
        raise ConfigError(msg)
    return found[1], int(found[2])


def _generation(system: str) -> float:
    """Return the number of the iOS version that belongs to a system, such as 18 for macOS15."""
    found = re.fullmatch(
        r"(iOS|iPadOS|tvOS|macOS|watchOS|visionOS) ?(\d+(?:\.\d+)?)(?:\.\d+)*", str(system)
    )
    if found is None:
        msg = f"a system must be such as iOS18 or macOS26, got {system!r}"
        raise ConfigError(msg)
    number = float(found[2])
    if number >= 26:  # since then they share their numbers
        return number
    return number + {"macOS": 3, "watchOS": 7, "visionOS": 16}.get(found[1], 0)
