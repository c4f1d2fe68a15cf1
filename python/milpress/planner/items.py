"""The weights that a plan decides on: those that share what is stored are one item."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from milpress.compression.decisions import plan_weight
from milpress.compression.requests import RecipeWishes
from milpress.errors import ConfigError, UnsupportedError
from milpress.formats import PalettizeConfig, PruneConfig, QuantizeConfig, Treatment
from milpress.mil import opset, values
from milpress.mil.constexpr import Decoder
from milpress.mil.graph import Node
from milpress.mil.opset import Opset
from milpress.mil.package import Package
from milpress.mil.weights import Weight, sites, weights
from milpress.plain import patterns
from milpress.planner.facts import AVOIDED, Facts, Platform
from milpress.planner.menu import fine_menu, menu
from milpress.planner.sizes import treated_bytes
from milpress.planner.traits import is_stateful, traits_after, traits_of
from milpress.recipe import Recipe

_OP_TYPE = "op:"
_FEW = 24
# Bits a weight beyond the codes. Smaller groups gain about 1 dB, as 0.2 bits do in any case; scales
# of channels may gain much more.
_MOST_FOR_GROUPS = 0.25
_MOST_FOR_SCALES = 1.0


@dataclass(frozen=True, slots=True)
class Candidate:
    """A weight that may be treated, and the program it is in."""

    weight: Weight
    opset: Opset
    stateful: bool
    decoder: Decoder

    @property
    def axes(self) -> tuple[int, int]:
        """Axes of output and input channels."""
        return self.weight.channel_axes or (0, 1)

    def stored(self) -> list[Any]:
        """Return what is stored for it."""
        return self.decoder.stored_values(self.weight.node)

    def array(self) -> Any:
        """Read it."""
        return self.decoder.dense(self.weight.node).values

    def digest(self, package: Package) -> str:
        """Return a hash of the bytes that are stored for it, and of how they are read."""
        found = hashlib.sha256(f"{self.weight.dtype.name}{self.weight.shape}{self.axes}".encode())
        for value in self.stored():
            if values.is_blob(value):
                found.update(values.read_payload(value, package).data)
            else:
                found.update(value.SerializeToString(deterministic=True))
        return found.hexdigest()


@dataclass(frozen=True, slots=True)
class Choice:
    """A format that suits an item: the treatment of each of its weights, and the bytes in all."""

    treatments: tuple[Treatment | None, ...]
    n_bytes: int


@dataclass(slots=True)
class Item:
    """Weights that are decided on together.

    Parameters
    ----------
    candidates
        The weights.
    n_bytes
        Bytes that are stored for them now.
    choices
        What may be done, by the name of the format.
    reason
        Why nothing may be done; empty if something may.
    is_last
        Whether what it is used for reaches the outputs past no other op that has a weight.
    """

    candidates: tuple[Candidate, ...]
    n_bytes: int
    choices: dict[str, Choice] = field(default_factory=dict)
    reason: str = ""
    is_last: bool = False

    @property
    def name(self) -> str:
        """The name of the first weight."""
        return self.candidates[0].weight.name

    @property
    def distinct(self) -> list[int]:
        """The candidates whose results can't be shared, one of each, by their places."""
        return sorted({self.twin(i) for i in range(len(self.candidates))})

    def twin(self, i: int) -> int:
        """Return the first candidate that a candidate shares its result with, or its own place."""
        key = _result_key(self.candidates[i])
        if key is None:
            return i
        return next(j for j, other in enumerate(self.candidates) if _result_key(other) == key)

    @property
    def size(self) -> int:
        """Elements that are stored."""
        seen: dict[Any, int] = {}
        for i, candidate in enumerate(self.candidates):
            seen.setdefault(_places(candidate) or i, candidate.weight.size)
        return sum(seen.values())


def items_of(
    package: Package,
    formats: Mapping[str, Treatment | None] | None,
    *,
    keep: Sequence[str],
    min_size: int,
    platform: Platform,
    facts: Facts,
) -> list[Item]:
    """Return what there is to decide on, in the order of the graph.

    Without ``formats``, these are those of the default menu, and more if there are few weights.

    Raises
    ------
    ConfigError
        If a pattern of ``keep`` means no weight or is wrong.
    """
    for pattern in keep:
        patterns.check(pattern)
    found = list(_candidates(package, min_size))
    unused = [pattern for pattern in keep if not any(_kept(c, pattern) for c, _ in found)]
    if unused:
        msg = f"keep must mean weights that the model has, got {', '.join(unused)}"
        raise ConfigError(msg)
    weighted = {use.node for candidate, _ in found for use in candidate.weight.node.uses}
    groups = _together([candidate for candidate, _ in found])
    if formats is None:
        formats = fine_menu() if len(groups) <= _FEW else menu()
    items: list[Item] = []
    for group in groups:
        reasons = [reason for candidate, reason in found if candidate in group and reason]
        stored = {_stored_key(value): value for c in group for value in c.stored()}
        item = Item(tuple(group), sum(values.n_stored_bytes(value) for value in stored.values()))
        item.is_last = any(_is_last(candidate, weighted) for candidate in group)
        if any(_kept(candidate, pattern) for candidate in group for pattern in keep):
            item.reason = "kept, as asked"
        elif reasons:
            item.reason = reasons[0]
        else:
            item.choices = _choices(item, formats, min_size, platform, facts)
            if not item.choices:
                item.reason = "no format suits it"
        items.append(item)
    return items


def _candidates(package: Package, min_size: int) -> Iterator[tuple[Candidate, str]]:
    """Yield the weights that are large enough, and why one can't be treated."""
    any_treatment = _wish(PalettizeConfig(bits=8), min_size)
    for site in sites(package):
        current = opset.by_name(site.function.opset)
        stateful = is_stateful(site.graph)
        decoder = Decoder(site.graph, package)
        for weight in weights(site.prefix, site.graph):
            plan = plan_weight(weight, any_treatment, current)
            if plan.status != "not asked":
                reason = "compressed already" if weight.is_compressed else plan.note
                yield (
                    Candidate(weight, current, stateful, decoder),
                    reason if weight.is_compressed or plan.status == "left" else "",
                )


def _is_last(candidate: Candidate, weighted: Container[Node]) -> bool:
    """Whether an op that uses a weight has none behind it, on any way, that has one too."""
    for use in candidate.weight.node.uses:
        seen: set[Node] = set()
        ahead = [behind.node for behind in use.node.uses]
        while ahead:
            node = ahead.pop()
            if node in weighted:
                break
            if node not in seen:
                seen.add(node)
                ahead.extend(behind.node for behind in node.uses)
        else:
            return True
    return False


def _wish(treatment: Treatment, min_size: int) -> RecipeWishes:
    return RecipeWishes(Recipe.of(treatment, min_size=min_size))


def _kept(candidate: Candidate, pattern: str) -> bool:
    if pattern.startswith(_OP_TYPE):
        return pattern.removeprefix(_OP_TYPE) in candidate.weight.op_types
    return patterns.matches(pattern, candidate.weight.name)


def _stored_key(value: Any) -> Any:
    where = value.blobFileValue
    return (where.fileName, where.offset) if values.is_blob(value) else id(value)


def _places(candidate: Candidate) -> tuple[Any, ...]:
    return tuple(_stored_key(value) for value in candidate.stored() if values.is_blob(value))


def _result_key(candidate: Candidate) -> Any:
    """Return what weights have in common that share what treatments make of them."""
    weight = candidate.weight
    places = _places(candidate)
    return (places, weight.node.op.type, weight.shape, candidate.axes) if places else None


def _together(candidates: Iterable[Candidate]) -> list[list[Candidate]]:
    """Return the weights in groups that share what is stored, in order."""
    groups: list[list[Candidate]] = []
    by_place: dict[Any, list[Candidate]] = {}
    for candidate in candidates:
        places = _places(candidate)
        group = next((by_place[place] for place in places if place in by_place), None)
        if group is None:
            group = []
            groups.append(group)
        group.append(candidate)
        by_place.update(dict.fromkeys(places, group))
    return groups


def _choices(
    item: Item,
    formats: Mapping[str, Treatment | None],
    min_size: int,
    platform: Platform,
    facts: Facts,
) -> dict[str, Choice]:
    choices: dict[str, Choice] = {}
    known: set[tuple[Treatment | None, ...]] = set()
    for name, treatment in formats.items():
        if treatment is None:
            choices[name] = Choice((None,) * len(item.candidates), item.n_bytes)
            continue
        fitted = tuple(_fitted(c, treatment, min_size) for c in item.candidates)
        if None in fitted or fitted in known or _is_twin(treatment, fitted, known):
            continue
        if platform.unit is not None and any(
            _is_at_risk(candidate, one, platform, facts)
            for candidate, one in zip(item.candidates, fitted, strict=True)
            if one is not None
        ):
            continue
        known.add(fitted)
        n_bytes = sum(_bytes_of(item.candidates[i], fitted[i]) for i in item.distinct)
        if n_bytes < item.n_bytes and _is_sparing(treatment, n_bytes, item.size):
            choices[name] = Choice(fitted, n_bytes)
    return choices


def _is_twin(
    treatment: Treatment,
    fitted: tuple[Treatment | None, ...],
    known: set[tuple[Treatment | None, ...]],
) -> bool:
    """Whether a format is unsigned, and the signed one, which stores no offsets, is there too."""
    if not isinstance(treatment, QuantizeConfig) or treatment.signed or treatment.offset:
        return False
    signed: Any = treatment.dtype.removeprefix("u")
    return (
        tuple(
            replace(one, dtype=signed) if isinstance(one, QuantizeConfig) else one for one in fitted
        )
        in known
    )


def _is_sparing(treatment: Treatment, n_bytes: int, size: int) -> bool:
    """Whether tables and scales take little beside the codes."""
    most = _MOST_FOR_SCALES
    if isinstance(treatment, PalettizeConfig) and not treatment.channel_scale:
        most = _MOST_FOR_GROUPS if treatment.group_size else _MOST_FOR_SCALES
    bits = 0 if isinstance(treatment, PruneConfig) else treatment.bits or 0
    return 8 * n_bytes / size - bits <= most


def _bytes_of(candidate: Candidate, treatment: Treatment | None) -> int:
    if treatment is None:
        return 0
    return treated_bytes(candidate.weight, treatment, early=not candidate.opset.has_blocks)


def _fitted(candidate: Candidate, treatment: Treatment, min_size: int) -> Treatment | None:
    """Return the treatment as it suits a weight's shape; ``None`` if it does not."""
    try:
        plan = plan_weight(candidate.weight, _wish(treatment, min_size), candidate.opset)
    except UnsupportedError:  # the opset can't hold it
        return None
    if plan.status != "compressed" or not plan.treatments:
        return None
    (fitted,) = plan.treatments
    whole = candidate.weight.shape[candidate.axes[0]]
    if isinstance(fitted, PalettizeConfig) and fitted.group_size == whole:
        return replace(fitted, group_size=None)
    return fitted


def _is_at_risk(
    candidate: Candidate, treatment: Treatment, platform: Platform, facts: Facts
) -> bool:
    """Whether a treatment brings a weight a risk that it does not have as it is."""
    stateful, early = candidate.stateful, not candidate.opset.has_blocks
    before = traits_of(candidate.weight, stateful=stateful)
    after = traits_after(candidate.weight, (treatment,), early=early, stateful=stateful)
    anyway = facts.firing(before, platform)
    return any(
        fact.effect in AVOIDED and fact not in anyway for fact in facts.firing(after, platform)
    )
