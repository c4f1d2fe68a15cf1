"""What is known of weights on hardware: facts with sources, and the platforms they concern."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from milpress.errors import ConfigError
from milpress.plain import json, yaml
from milpress.plain.structure import structured
from milpress.planner import traits as _traits
from milpress.planner.traits import Traits

Unit: TypeAlias = Literal["ane", "gpu", "cpu"]
Effect: TypeAlias = Literal["crash", "wrong", "leaves", "unavailable", "slow", "no_gain"]
Status: TypeAlias = Literal[
    "documented", "reported", "measured", "unverified", "confirmed", "refuted"
]
# The effects that a recipe made for a unit keeps out of.
AVOIDED: frozenset[Effect] = frozenset({"crash", "wrong", "leaves", "unavailable", "slow"})
# The fact that keeps tables of vectors off the Neural Engine of chips where it is not known to
# run them.
ON_NEWER_CHIPS = "vectors-on-older-ane"
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
        The first chip of each family that it no longer holds for. Where the chip is unknown, or of
        another family, it does not hold.
    except_chip
        Likewise, but where the chip is not known, or of another family, it holds.
    """

    id: str
    when: dict[str, Any]
    unit: Literal["ane", "gpu", "cpu", "any"]
    effect: Effect
    says: str
    instead: str
    status: Status
    sources: tuple[str, ...]
    from_os: str | None = None
    before_os: str | None = None
    before_chip: tuple[str, ...] = ()
    except_chip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.sources:
            msg = "sources must name where the fact can be read"
            raise ConfigError(msg)
        if not self.when or self.when.keys() - set(_traits.NAMES):
            msg = f"when must be conditions on {', '.join(_traits.NAMES)}, got {self.when!r}"
            raise ConfigError(msg)
        for asked in self.when.values():
            if isinstance(asked, dict) and (not asked or asked.keys() - {"below", "above"}):
                msg = f"when: a range must have below or above, got {asked!r}"
                raise ConfigError(msg)
        for system in filter(None, (self.from_os, self.before_os)):
            _generation(system)
        for chip in (*self.before_chip, *self.except_chip):
            _chip(chip)

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
        if platform.chip is None:
            return not self.before_chip
        family, number = _chip(platform.chip)
        if any(family == f and number >= n for f, n in map(_chip, self.except_chip)):
            return False
        before = [family == f and number < n for f, n in map(_chip, self.before_chip)]
        return any(before) or not before

    def to_dict(self) -> dict[str, Any]:
        """Return the fact as JSON can hold it."""
        return json.record(self, "id", "unit", "effect", "says", "instead", "status", "sources")


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
            If a file is not of the form of ``facts.yaml``; a line for each place that is wrong.
        """
        facts = cls({}, {})
        for path in (_BUILT_IN, *paths):
            facts = facts._with(yaml.load(path, "a file of facts"), str(path))
        return facts

    def _with(self, data: Any, place: str) -> Facts:
        known = {name: json.record(fact) for name, fact in self.by_id.items()}
        if isinstance(data, dict) and isinstance(data.get("facts"), list):
            data = data | {"facts": [_completed(entry, known) for entry in data["facts"]]}
        file: _File = structured(data, _File, place, error=ConfigError)
        chips = dict(self.chips)
        for chip, devices in file.chips.items():
            chips[chip] = (*chips.get(chip, ()), *devices)
        return Facts({**self.by_id, **{fact.id: fact for fact in file.facts}}, chips)

    def without(self, name: str) -> Facts:
        """Return all facts but one."""
        rest = {each: fact for each, fact in self.by_id.items() if each != name}
        return Facts(rest, self.chips)

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
class _File:
    version: Literal[1]
    facts: tuple[Fact, ...] = ()
    chips: dict[str, tuple[str, ...]] = field(default_factory=dict)


def _completed(entry: Any, known: dict[str, Any]) -> Any:
    """Return an entry with what is known of its fact and not mentioned, and note it."""
    if isinstance(entry, dict) and isinstance(entry.get("id"), str):
        entry = known[entry["id"]] = known.get(entry["id"], {}) | entry
    return entry


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


def _chip(chip: str) -> tuple[str, int]:
    """Return family and number of a chip, whatever is said behind them (``A17 Pro``)."""
    match = re.match(r"([AM])(\d+)\b", str(chip))
    if match is None:
        msg = f"a chip must be such as A17 or M4, got {chip!r}"
        raise ConfigError(msg)
    return match[1], int(match[2])


def _generation(system: str) -> float:
    """Return the number of the iOS version that belongs to a system, such as 18 for macOS15."""
    match = re.fullmatch(
        r"(iOS|iPadOS|tvOS|macOS|watchOS|visionOS) ?(\d+(?:\.\d+)?)(?:\.\d+)*", str(system)
    )
    if match is None:
        msg = f"a system must be such as iOS18 or macOS26, got {system!r}"
        raise ConfigError(msg)
    number = float(match[2])
    if number >= 26:  # since then they share their numbers
        return number
    return number + {"macOS": 3, "watchOS": 7, "visionOS": 16}.get(match[1], 0)
