"""The weights that a plan decides on: those that share what is stored are one group."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from milpress.compression.decisions import decide
from milpress.compression.requests import RecipeRequests
from milpress.errors import ConfigError, UnsupportedError
from milpress.formats import PalettizeConfig, PruneConfig, QuantizeConfig, Treatment
from milpress.mil import proto
from milpress.mil.graph import Node
from milpress.mil.package import Package
from milpress.mil.program import Weight
from milpress.mil.values import blob_places, n_stored_bytes
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


@dataclass(slots=True, eq=False)
class WeightGroup:
    """Weights that are decided on together, as they share what is stored.

    ``n_bytes`` are stored for them now. ``choices`` are what may be done, by the name of the
    format, ``scores`` how much each of them changes the weights; ``reason`` says why nothing may be
    done. With ``is_last``, what they are used for reaches the outputs past no other op that has a
    weight.
    """

    weights: tuple[Weight, ...]
    n_bytes: int
    choices: dict[str, Choice] = field(default_factory=dict)
    scores: dict[str, Score] = field(default_factory=dict)
    reason: str = ""
    is_last: bool = False

    @property
    def share(self) -> float:
        """How much its relative error counts beside those of other groups."""
        return _LAST_SHARE if self.is_last else 1.0

    @property
    def name(self) -> str:
        """The name of the first weight."""
        return self.weights[0].name

    @property
    def distinct(self) -> list[int]:
        """The weights whose results can't be shared, one of each, by their places."""
        return sorted({self.twin(i) for i in range(len(self.weights))})

    def treatments(self, choice: Choice | None) -> tuple[Treatment | None, ...]:
        """Return the treatment of each weight; ``None`` where one stays."""
        fitted = () if choice is None else choice.treatments
        return fitted or (None,) * len(self.weights)

    def twin(self, i: int) -> int:
        """Return the first weight that a weight shares its result with, or its own place."""
        key = _result_key(self.weights[i])
        if key is None:
            return i
        return next(j for j, other in enumerate(self.weights) if _result_key(other) == key)

    @property
    def size(self) -> int:
        """Elements that are stored."""
        seen: dict[Any, int] = {}
        for i, weight in enumerate(self.weights):
            seen.setdefault(weight.places or i, weight.size)
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
    reasons = dict(_planned_weights(package, min_size))
    unused = [pattern for pattern in keep if not any(_means(pattern, each) for each in reasons)]
    if unused:
        msg = f"keep must mean weights that the model has, got {', '.join(unused)}"
        raise ConfigError(msg)
    users = {use.node for weight in reasons for use in weight.node.uses}
    together = _sharing(reasons)
    if formats is None:
        formats = fine_menu() if len(together) <= _FEW else menu()
    groups: list[WeightGroup] = []
    for members in together:
        stored = {_stored_key(value): value for weight in members for value in weight.stored}
        group = WeightGroup(tuple(members), sum(map(n_stored_bytes, stored.values())))
        group.is_last = any(_is_last(weight, users) for weight in members)
        if any(_means(pattern, weight) for weight in members for pattern in keep):
            group.reason = "kept by keep"
        else:
            group.reason = next((reasons[weight] for weight in members if reasons[weight]), "")
        if not group.reason:
            group.choices = _choices(group, formats, min_size, platform, facts)
            group.reason = "" if group.choices else "no format suits it"
        groups.append(group)
    return groups


def axes_of(weight: Weight) -> tuple[int, int]:
    """Return the axes of output and input channels."""
    return weight.channel_axes or (0, 1)


def is_looked_up(weight: Weight) -> bool:
    """Whether rows of a weight are looked up, along its output channels."""
    return any(
        use.node.op.type == "gather"
        and use.parameter == "x"
        and (weight.graph.scalar(use.node, "axis") or 0) == axes_of(weight)[0]
        for use in weight.node.uses
    )


def is_multiplied(weight: Weight) -> bool:
    """Whether a weight is used for anything but lookups."""
    return any(use.node.op.type != "gather" for use in weight.node.uses)


def _planned_weights(package: Package, min_size: int) -> Iterator[tuple[Weight, str]]:
    """Yield the weights that are large enough, and why one can't be treated."""
    any_treatment = _request(PalettizeConfig(bits=8), min_size)
    for graph in package.graphs:
        for weight in graph.weights:
            decision = decide(weight, any_treatment)
            if decision.status == "not asked":
                continue
            if weight.is_compressed:
                yield weight, "compressed already"
            else:
                yield weight, decision.note if decision.status == "left" else ""


def _is_last(weight: Weight, users: Container[Node]) -> bool:
    """Whether an op that uses a weight has none behind it, on any way, that has one too."""
    for use in weight.node.uses:
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


def _request(treatment: Treatment, min_size: int) -> RecipeRequests:
    return RecipeRequests(Recipe.of(treatment, min_size=min_size))


def _means(pattern: str, weight: Weight) -> bool:
    if pattern.startswith(_OP_TYPE):
        return pattern.removeprefix(_OP_TYPE) in weight.op_types
    return patterns.matches(pattern, weight.name)


def _stored_key(value: proto.Value) -> object:
    return next(iter(blob_places([value])), id(value))


def _result_key(weight: Weight) -> Any:
    """Return what weights have in common that share what treatments make of them."""
    places = weight.places
    return (places, weight.node.op.type, weight.shape, axes_of(weight)) if places else None


def _sharing(weights: Iterable[Weight]) -> list[list[Weight]]:
    """Return the weights in groups that share what is stored, in order."""
    groups: list[list[Weight]] = []
    by_place: dict[Any, list[Weight]] = {}
    for weight in weights:
        places = weight.places
        group = next((by_place[place] for place in places if place in by_place), None)
        if group is None:
            group = []
            groups.append(group)
        group.append(weight)
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
    stateful = [is_stateful(weight.graph) for weight in group.weights]
    for name, treatment in formats.items():
        if treatment is None:
            choices[name] = Choice(name, group.n_bytes)
            continue
        suiting = [_fitted(weight, treatment, min_size) for weight in group.weights]
        fitted = tuple(each for each in suiting if each is not None)
        if len(fitted) < len(suiting) or fitted in fitting:
            continue
        if _has_signed_twin(treatment, fitted, fitting):
            continue
        if platform.unit is not None and any(
            _is_at_risk(*each, platform, facts)
            for each in zip(group.weights, fitted, stateful, strict=True)
        ):
            continue
        fitting.add(fitted)
        n_bytes = sum(treated_bytes(group.weights[i], fitted[i]) for i in group.distinct)
        if n_bytes < group.n_bytes and _is_mostly_codes(treatment, n_bytes, group.size):
            choices[name] = Choice(name, n_bytes, treatments=fitted)
    return choices


def _has_signed_twin(
    treatment: Treatment, fitted: tuple[Treatment, ...], fitting: set[tuple[Treatment, ...]]
) -> bool:
    """Whether a format is unsigned, and the signed one, which stores no offsets, is there too."""
    if not isinstance(treatment, QuantizeConfig) or treatment.signed or treatment.offset:
        return False
    dtype: Any = treatment.dtype.removeprefix("u")
    signed = (replace(one, dtype=dtype) for one in fitted if isinstance(one, QuantizeConfig))
    return tuple(signed) in fitting


def _is_mostly_codes(treatment: Treatment, n_bytes: int, size: int) -> bool:
    """Whether tables and scales take little beside the codes."""
    bits = 0.0 if isinstance(treatment, PruneConfig) else treatment.bits or 0
    most = _MOST_FOR_SCALES
    if isinstance(treatment, PalettizeConfig):
        bits /= treatment.vector_size
        if treatment.vector_size > 1 or (treatment.group_size and not treatment.channel_scale):
            most = _MOST_FOR_GROUPS
    return 8 * n_bytes / size - bits <= most


def _fitted(weight: Weight, treatment: Treatment, min_size: int) -> Treatment | None:
    """Return the treatment as it suits a weight's shape; ``None`` if it does not."""
    try:
        decision = decide(weight, _request(treatment, min_size))
    except UnsupportedError:  # the opset can't hold it
        return None
    if decision.status != "compressed" or not decision.treatments:
        return None
    (fitted,) = decision.treatments
    whole = weight.shape[axes_of(weight)[0]]
    if isinstance(fitted, PalettizeConfig) and fitted.group_size == whole:
        return replace(fitted, group_size=None)
    return fitted


def _is_at_risk(
    weight: Weight, treatment: Treatment, stateful: bool, platform: Platform, facts: Facts
) -> bool:
    """Whether a treatment brings a weight a risk that it does not have as it is."""
    anyway = facts.firing(traits_of(weight, stateful=stateful), platform)
    after = traits_after(weight, treatment, stateful=stateful)
    return any(
        fact.effect in AVOIDED and fact not in anyway for fact in facts.firing(after, platform)
    )
