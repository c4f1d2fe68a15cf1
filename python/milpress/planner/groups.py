"""The weights that a plan decides on: those that share what is stored are one group."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from milpress.compression.decisions import decide
from milpress.compression.requests import RecipeRequests
from milpress.errors import ConfigError, UnsupportedError
from milpress.formats import PalettizeConfig, PruneConfig, QuantizeConfig, Treatment
from milpress.mil import values
from milpress.mil.graph import Node
from milpress.mil.package import Package
from milpress.mil.program import Weight
from milpress.plain import patterns
from milpress.planner.facts import AVOIDED, Facts, Platform
from milpress.planner.menu import fine_menu, menu
from milpress.planner.scores import Score
from milpress.planner.search import Choice
from milpress.planner.sizes import treated_bytes
from milpress.planner.traits import is_stateful, traits_after, traits_of
from milpress.recipe import Recipe

_OP_TYPE = "op:"
# Models of so few groups of weights have a larger menu.
_FEW = 24
# How much more the relative error of a last layer's weight counts: what the outputs are made of is
# not evened out by layers behind it.
_LAST_SHARE = 4.0
# Bits a weight beyond the codes. Smaller groups gain about 1 dB, as 0.2 bits do in any case; scales
# of channels may gain much more.
_MOST_FOR_GROUPS = 0.25
_MOST_FOR_SCALES = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """A weight that may be treated, and the program it is in."""

    weight: Weight
    stateful: bool

    @property
    def axes(self) -> tuple[int, int]:
        """Axes of output and input channels."""
        return self.weight.channel_axes or (0, 1)

    def digest(self, package: Package) -> str:
        """Return a hash of the bytes that are stored for it, and of how they are read."""
        digest = hashlib.sha256(f"{self.weight.dtype.name}{self.weight.shape}{self.axes}".encode())
        for value in self.weight.stored:
            if values.is_blob(value):
                digest.update(values.read_payload(value, package).data)
            else:
                digest.update(value.SerializeToString(deterministic=True))
        return digest.hexdigest()


class GroupScore(NamedTuple):
    """The relative error of a group in some format; ``sampled`` if not all of it was tried."""

    relative: float
    sampled: bool

    @classmethod
    def of(cls, scores: Sequence[Score]) -> GroupScore:
        """Return the mean of the scores of members."""
        relative = sum(score.relative for score in scores) / len(scores)
        return cls(relative, any(score.sampled for score in scores))


@dataclass(slots=True, eq=False)
class WeightGroup:
    """Weights that are decided on together.

    Parameters
    ----------
    members
        The weights.
    n_bytes
        Bytes that are stored for them now.
    choices
        What may be done, by the name of the format.
    scores
        Of each format that changes them, how much.
    reason
        Why nothing may be done; empty if something may.
    is_last
        Whether what it is used for reaches the outputs past no other op that has a weight.
    """

    members: tuple[Member, ...]
    n_bytes: int
    choices: dict[str, Choice] = field(default_factory=dict)
    scores: dict[str, GroupScore] = field(default_factory=dict)
    reason: str = ""
    is_last: bool = False

    @property
    def share(self) -> float:
        """How much its relative error counts beside those of other groups."""
        return _LAST_SHARE if self.is_last else 1.0

    @property
    def name(self) -> str:
        """The name of the first weight."""
        return self.members[0].weight.name

    @property
    def distinct(self) -> list[int]:
        """The members whose results can't be shared, one of each, by their places."""
        return sorted({self.twin(i) for i in range(len(self.members))})

    def treatments(self, choice: Choice | None) -> tuple[Treatment | None, ...]:
        """Return the treatment of each member; ``None`` where one stays."""
        fitted = () if choice is None else choice.treatments
        return fitted or (None,) * len(self.members)

    def twin(self, i: int) -> int:
        """Return the first member that a member shares its result with, or its own place."""
        key = _result_key(self.members[i])
        if key is None:
            return i
        return next(j for j, other in enumerate(self.members) if _result_key(other) == key)

    @property
    def size(self) -> int:
        """Elements that are stored."""
        seen: dict[Any, int] = {}
        for i, member in enumerate(self.members):
            seen.setdefault(member.weight.places or i, member.weight.size)
        return sum(seen.values())


def groups_of(
    package: Package,
    formats: Mapping[str, Treatment | None] | None,
    *,
    keep: Sequence[str],
    min_size: int,
    platform: Platform,
    facts: Facts,
) -> list[WeightGroup]:
    """Return what there is to decide on, in the order of the graph.

    Without ``formats``, the choices are those of the default menu, and more if there are few
    groups.

    Raises
    ------
    ConfigError
        If a pattern of ``keep`` means no weight or is wrong.
    """
    for pattern in keep:
        patterns.check(pattern)
    reasons = dict(_members(package, min_size))
    unused = [pattern for pattern in keep if not any(_means(pattern, each) for each in reasons)]
    if unused:
        msg = f"keep must mean weights that the model has, got {', '.join(unused)}"
        raise ConfigError(msg)
    users = {use.node for member in reasons for use in member.weight.node.uses}
    together = _sharing(reasons)
    if formats is None:
        formats = fine_menu() if len(together) <= _FEW else menu()
    groups: list[WeightGroup] = []
    for members in together:
        stored = {_stored_key(value): value for member in members for value in member.weight.stored}
        group = WeightGroup(tuple(members), sum(map(values.n_stored_bytes, stored.values())))
        group.is_last = any(_is_last(member, users) for member in members)
        if any(_means(pattern, member) for member in members for pattern in keep):
            group.reason = "kept, as asked"
        else:
            group.reason = next((reasons[member] for member in members if reasons[member]), "")
        if not group.reason:
            group.choices = _choices(group, formats, min_size, platform, facts)
            group.reason = "" if group.choices else "no format suits it"
        groups.append(group)
    return groups


def _members(package: Package, min_size: int) -> Iterator[tuple[Member, str]]:
    """Yield the weights that are large enough, and why one can't be treated."""
    any_treatment = _requested(PalettizeConfig(bits=8), min_size)
    for graph in package.graphs:
        stateful = is_stateful(graph)
        for weight in graph.weights:
            plan = decide(weight, any_treatment)
            if plan.status != "not asked":
                reason = "compressed already" if weight.is_compressed else plan.note
                yield (
                    Member(weight, stateful),
                    reason if weight.is_compressed or plan.status == "left" else "",
                )


def _is_last(member: Member, users: Container[Node]) -> bool:
    """Whether an op that uses a weight has none behind it, on any way, that has one too."""
    for use in member.weight.node.uses:
        seen: set[Node] = set()
        ahead = [behind.node for behind in use.node.uses]
        while ahead:
            node = ahead.pop()
            if node in users:
                break
            if node not in seen:
                seen.add(node)
                ahead.extend(behind.node for behind in node.uses)
        else:
            return True
    return False


def _requested(treatment: Treatment, min_size: int) -> RecipeRequests:
    return RecipeRequests(Recipe.of(treatment, min_size=min_size))


def _means(pattern: str, member: Member) -> bool:
    if pattern.startswith(_OP_TYPE):
        return pattern.removeprefix(_OP_TYPE) in member.weight.op_types
    return patterns.matches(pattern, member.weight.name)


def _stored_key(value: Any) -> Any:
    return next(iter(values.blob_places([value])), id(value))


def _result_key(member: Member) -> Any:
    """Return what weights have in common that share what treatments make of them."""
    weight = member.weight
    places = member.weight.places
    return (places, weight.node.op.type, weight.shape, member.axes) if places else None


def _sharing(members: Iterable[Member]) -> list[list[Member]]:
    """Return the weights in groups that share what is stored, in order."""
    groups: list[list[Member]] = []
    by_place: dict[Any, list[Member]] = {}
    for member in members:
        places = member.weight.places
        group = next((by_place[place] for place in places if place in by_place), None)
        if group is None:
            group = []
            groups.append(group)
        group.append(member)
        by_place.update(dict.fromkeys(places, group))
    return groups


def _choices(
    group: WeightGroup,
    formats: Mapping[str, Treatment | None],
    min_size: int,
    platform: Platform,
    facts: Facts,
) -> dict[str, Choice]:
    choices: dict[str, Choice] = {}
    fitting: set[tuple[Treatment, ...]] = set()
    for name, treatment in formats.items():
        if treatment is None:
            choices[name] = Choice(name, group.n_bytes)
            continue
        each = [_fitted(member, treatment, min_size) for member in group.members]
        fitted = tuple(one for one in each if one is not None)
        if len(fitted) < len(each) or fitted in fitting:
            continue
        if _has_signed_twin(treatment, fitted, fitting):
            continue
        if platform.unit is not None and any(
            _is_at_risk(member, one, platform, facts)
            for member, one in zip(group.members, fitted, strict=True)
        ):
            continue
        fitting.add(fitted)
        n_bytes = sum(
            treated_bytes(member.weight, fitted[i], early=not member.weight.graph.opset.has_blocks)
            for i, member in enumerate(group.members)
            if i in group.distinct
        )
        if n_bytes < group.n_bytes and _is_mostly_codes(treatment, n_bytes, group.size):
            choices[name] = Choice(name, n_bytes, treatments=fitted)
    return choices


def _has_signed_twin(
    treatment: Treatment,
    fitted: tuple[Treatment, ...],
    fitting: set[tuple[Treatment, ...]],
) -> bool:
    """Whether a format is unsigned, and the signed one, which stores no offsets, is there too."""
    if not isinstance(treatment, QuantizeConfig) or treatment.signed or treatment.offset:
        return False
    signed: Any = treatment.dtype.removeprefix("u")
    return (
        tuple(
            replace(one, dtype=signed) if isinstance(one, QuantizeConfig) else one for one in fitted
        )
        in fitting
    )


def _is_mostly_codes(treatment: Treatment, n_bytes: int, size: int) -> bool:
    """Whether tables and scales take little beside the codes."""
    most = _MOST_FOR_SCALES
    if isinstance(treatment, PalettizeConfig) and not treatment.channel_scale:
        most = _MOST_FOR_GROUPS if treatment.group_size else _MOST_FOR_SCALES
    bits = 0 if isinstance(treatment, PruneConfig) else treatment.bits or 0
    return 8 * n_bytes / size - bits <= most


def _fitted(member: Member, treatment: Treatment, min_size: int) -> Treatment | None:
    """Return the treatment as it suits a weight's shape; ``None`` if it does not."""
    try:
        plan = decide(member.weight, _requested(treatment, min_size))
    except UnsupportedError:  # the opset can't hold it
        return None
    if plan.status != "compressed" or not plan.treatments:
        return None
    (fitted,) = plan.treatments
    whole = member.weight.shape[member.axes[0]]
    if isinstance(fitted, PalettizeConfig) and fitted.group_size == whole:
        return replace(fitted, group_size=None)
    return fitted


def _is_at_risk(member: Member, treatment: Treatment, platform: Platform, facts: Facts) -> bool:
    """Whether a treatment brings a weight a risk that it does not have as it is."""
    stateful, early = member.stateful, not member.weight.graph.opset.has_blocks
    before = traits_of(member.weight, stateful=stateful)
    after = traits_after(member.weight, (treatment,), early=early, stateful=stateful)
    anyway = facts.firing(before, platform)
    return any(
        fact.effect in AVOIDED and fact not in anyway for fact in facts.firing(after, platform)
    )
