"""Which weights are at risk where: facts, matched against how weights are stored."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from milpress.errors import ConfigError, printable
from milpress.mil.package import Package
from milpress.plain import json
from milpress.planner.facts import Fact, Facts, Platform, Unit
from milpress.planner.traits import Traits, is_stateful, traits_of

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
        names: dict[Fact, list[str]] = {}
        for finding in self.findings:
            names.setdefault(finding.fact, []).append(finding.weight)
        return {fact: tuple(some) for fact, some in names.items()}

    @property
    def summary(self) -> str:
        """One line: how many weights are at risk of what."""
        n, kinds = _risks(self.findings)
        return f"{_counted(self.n_weights)}: " + (
            f"{n} at risk ({kinds})" if n else "no risk is known"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the findings as JSON can hold them."""
        findings = json.record(self, "n_weights", "findings")
        return {"version": 1, "path": self.path, **json.record(self.platform), **findings}

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
    package, platform = Package(source), Platform(unit=unit, chip=chip, os=os)
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
                for fact in known.firing(traits, platform)
            )
    return Lint(
        path=str(package.path), platform=platform, n_weights=n_weights, findings=tuple(findings)
    )


def warning(source: str | os.PathLike[str]) -> str:
    """Return one line on the compressed weights of a package that are at risk; empty if none is."""
    risky = [
        one
        for one in lint(source).findings
        if one.traits.form != "dense" and one.fact.effect in ("crash", "wrong", "leaves")
    ]
    n, kinds = _risks(risky)
    return f"{_counted(n)} at risk ({kinds}): see milpress lint" if n else ""


def _risks(findings: Sequence[Finding]) -> tuple[int, str]:
    """Return how many weights are at risk, and of what."""
    kinds = {f"{_UNITS[one.fact.unit]}: {_SHOWN[one.fact.effect]}" for one in findings}
    return len({one.weight for one in findings}), "; ".join(sorted(kinds))


def _counted(n: int) -> str:
    return f"{n} weight{'s' * (n != 1)}"
