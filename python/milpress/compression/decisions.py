"""What is to happen to each weight, before any is touched."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from milpress.compression.report import Status
from milpress.compression.requests import Wish, Wishes, settled_wish
from milpress.compression.settling import Asked, settle
from milpress.errors import ConfigError, UnsupportedError
from milpress.formats import (
    Blocks,
    PalettizeConfig,
    PerBlock,
    PerChannel,
    PerTensor,
    PruneConfig,
    QuantizeConfig,
    Treatment,
)
from milpress.formats.palette import folded_bytes
from milpress.formats.rows import OnIndivisible, divisor_of, largest_divisor
from milpress.mil import constexpr, opset
from milpress.mil.constexpr import Decoder
from milpress.mil.graph import Node
from milpress.mil.opset import Opset
from milpress.mil.package import Package
from milpress.mil.weights import Site, Weight, blob_places, sites, weights


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to happen to one weight: treatments, or none and why."""

    weight: Weight
    status: Status
    treatments: tuple[Treatment, ...] = ()
    notes: tuple[str, ...] = field(default=())
    settled: str = ""
    conflict: str = ""

    @property
    def note(self) -> str:
        """All notes in one text, and how the wish came about."""
        return "; ".join((*self.notes, *([self.settled] if self.settled else [])))

    def carried_out(self, treatments: tuple[Treatment, ...], notes: tuple[str, ...]) -> Plan:
        """Return the plan as it was carried out, and why some treatments were not."""
        return replace(self, treatments=treatments, notes=(*self.notes, *notes))

    def left(self, note: str) -> Plan:
        """Return the plan to leave the weight as it is although it was asked for."""
        return replace(self, status="left", treatments=(), notes=(note,), settled="")


def plan_package(
    package: Package, wishes: Wishes, *, strict: bool
) -> list[tuple[Site, dict[Node, Plan]]]:
    """Resolve the treatments of every weight of a package.

    Raises
    ------
    CompressionError
        If a program's opset can't hold a treatment; with ``strict``, also if a weight does not
        suit its own.
    """
    found = list(sites(package))
    asked = {
        weight.node: (weight, wishes.wish(weight))
        for site in found
        for weight in weights(site.prefix, site.graph)
    }
    _settle_shared(asked, wishes, package)
    planned = []
    for site in found:
        current = opset.by_name(site.function.opset)
        plans = {
            node: plan_weight(asked[node][0], wishes, current, asked[node][1])
            for node in site.graph.nodes
            if node in asked
        }
        planned.append((site, plans))
    if strict:
        _refuse_notes(plan for _, plans in planned for plan in plans.values())
    return planned


def _refuse_notes(plans: Iterable[Plan]) -> None:
    for plan in plans:
        if plan.status != "not asked" and plan.conflict:
            msg = f"{plan.weight.name}: {plan.conflict}"
            raise ConfigError(msg)
        if plan.status != "not asked" and plan.notes:
            msg = f"{plan.weight.name}: {plan.note}"
            raise UnsupportedError(msg)


def _settle_shared(
    asked: dict[Node, tuple[Weight, Wish]], wishes: Wishes, package: Package
) -> None:
    """Let weights that are stored once, as functions share them, be treated alike."""
    stored: dict[tuple[tuple[str, int], ...], list[Node]] = {}
    for node, (weight, _) in asked.items():
        places = blob_places(Decoder(weight.graph, package).stored_values(node))
        if places:
            stored.setdefault(places, []).append(node)
    for nodes in stored.values():
        found = [asked[node] for node in nodes]
        kept = [() if wish.reason else wish.for_size(weight.size) for weight, wish in found]
        if len(set(kept)) == 1:
            continue
        settled = settle(
            found[0][0],
            [Asked(weight.name, each) for (weight, _), each in zip(found, kept, strict=True)],
        )
        note = f"stored once for {' and '.join(weight.name for weight, _ in found)}: {settled.note}"
        conflict = f"{note}; {wishes.advice([weight for weight, _ in found])}"
        winner = found[kept.index(settled.treatments)][1] if settled.treatments else None
        for node, (weight, wish), each in zip(nodes, found, kept, strict=True):
            if each != settled.treatments:
                asked[node] = weight, settled_wish(wish, winner, note, conflict)


def plan_weight(weight: Weight, wishes: Wishes, current: Opset, wish: Wish | None = None) -> Plan:
    """Resolve the treatments of one weight in a program of an opset; ``wish`` if it is known.

    Raises
    ------
    CompressionError
        If the opset can't hold a treatment.
    """
    wish = wish or wishes.wish(weight)
    reason = ""
    if not wish.treatments:
        reason = "not selected"
    elif weight.size < wish.min_size:
        reason = f"fewer than {wish.min_size} elements"
    elif len(weight.shape) < 2:
        reason = "a vector"
    elif "int" in weight.dtype.name:
        reason = f"{weight.dtype.name}, not a float"
    if reason:
        return Plan(weight, "not asked", notes=(reason,), settled=wish.settled)
    plan = Plan(weight, "compressed", wish.treatments, settled=wish.settled, conflict=wish.conflict)
    reason = wish.reason or _unsuitable(weight, wishes)
    if reason:
        return plan.left(reason)
    if weight.channel_axes is None and any(_needs_axes(item) for item in wish.treatments):
        return plan.left("the ops that use it disagree on its channels")
    for treatment in wish.treatments:
        needs = wish.needs or _needs(treatment)
        if needs and not current.has_blocks:
            raise wishes.too_early(weight.name, treatment, needs, current)
    if weight.is_compressed and not current.has_blocks:
        return plan.left("compressed already, and going on with it takes an iOS18 model")
    if len(wish.treatments) > 1 and not current.has_blocks:
        raise wishes.too_early(weight.name, wish.treatments[-1], "joint compression", current)
    return _fitted(plan, wish.on_indivisible)


def _unsuitable(weight: Weight, wishes: Wishes) -> str:
    if weight.is_compressed and not wishes.joint:
        return "compressed already"
    if constexpr.is_constexpr(weight.node) and not wishes.joint:
        return "stored as float16 and cast, which coremltools leaves"
    if not weight.dtype.is_float:
        return f"{weight.dtype.name} is neither float16 nor float32"
    if weight.node.is_block_output:
        return "a block returns it"
    if any(constexpr.is_constexpr(use.node) for use in weight.node.uses):
        return "part of a compressed weight"
    return ""


def _needs_axes(treatment: Treatment) -> bool:
    if isinstance(treatment, PalettizeConfig):
        in_groups = treatment.group_size is not None or treatment.vector_size > 1
        return treatment.channel_scale or (in_groups and treatment.channel_axis is None)
    return isinstance(treatment, QuantizeConfig) and not isinstance(
        treatment.granularity, (PerTensor, Blocks)
    )


def _needs(treatment: Treatment) -> str:
    """Return what of a treatment takes an iOS18 model; empty if nothing does."""
    if isinstance(treatment, PalettizeConfig):
        if treatment.group_size is not None:
            return "groups of channels"
        if treatment.vector_size > 1:
            return "vectors"
        if treatment.channel_scale:
            return "scales of channels"
        return "3 bits" if treatment.bits == 3 else ""
    if isinstance(treatment, QuantizeConfig):
        if isinstance(treatment.granularity, (PerBlock, Blocks)):
            return "blocks"
        return "4 bits" if treatment.bits == 4 else ""
    return ""


def _fitted(plan: Plan, on_indivisible: OnIndivisible) -> Plan:
    """Make each treatment fit the weight's shape, or drop it; leave the weight if none does."""
    fitted: list[Treatment] = []
    notes: list[str] = []
    for treatment in plan.treatments:
        made, note = _fit(plan.weight, treatment, on_indivisible)
        fitted.extend([made] if made is not None else [])
        notes.extend([note] if note else [])
    if not fitted:
        return plan.left("; ".join(notes))
    return replace(plan, treatments=tuple(fitted), notes=tuple(notes))


def _fit(
    weight: Weight, treatment: Treatment, on_indivisible: OnIndivisible
) -> tuple[Treatment | None, str]:
    """Return the treatment that fits the shape, ``None`` if there is none; and in words why."""
    output, inputs = weight.channel_axes or (0, 1)
    if isinstance(treatment, PalettizeConfig):
        return _fit_palette(weight, treatment, output, on_indivisible)
    if isinstance(treatment, PruneConfig):
        return treatment, ""
    if isinstance(treatment.granularity, PerBlock):
        size, note = divisor_of(
            "block", treatment.granularity.size, weight.shape, inputs, output, on_indivisible
        )
        if size is None:
            return None, note
        is_whole = size > treatment.granularity.size
        return replace(treatment, granularity=PerChannel() if is_whole else PerBlock(size)), note
    if isinstance(treatment.granularity, Blocks):
        return _fit_blocks(weight, treatment, treatment.granularity, on_indivisible)
    return treatment, ""


def _fit_palette(
    weight: Weight, treatment: PalettizeConfig, output: int, on_indivisible: OnIndivisible
) -> tuple[Treatment | None, str]:
    axis = output if treatment.channel_axis is None else treatment.channel_axis
    if not -len(weight.shape) <= axis < len(weight.shape):
        return None, f"its {len(weight.shape)} dimensions have no axis {axis}"
    axis %= len(weight.shape)
    notes = []
    is_smaller = False
    if treatment.group_size is not None:
        size, note = divisor_of(
            "group",
            treatment.group_size,
            weight.shape,
            axis,
            output,
            on_indivisible,
            multiple_of=treatment.vector_size,
        )
        if size is None:
            return None, note
        is_smaller = size < treatment.group_size
        treatment = replace(treatment, group_size=size if size <= treatment.group_size else None)
        notes.extend([note] if note else [])
    n = treatment.group_size or weight.shape[axis]
    if n % treatment.vector_size:
        return None, f"vectors of {treatment.vector_size} don't divide {n} channels"
    if treatment.vector_size > 1 and not _vectors_suit(weight, treatment.vector_size, axis):
        return None, f"vectors of {treatment.vector_size} don't divide the channels of a conv group"
    if treatment.channel_scale:
        itemsize = weight.dtype.bits // 8
        table = folded_bytes(weight.shape, itemsize, treatment, output, axis)
        if table >= weight.size * itemsize:
            treatment = replace(treatment, channel_scale=False)
            notes.append("without scales, as tables with them would be larger than the weight")
    if is_smaller and _is_larger(weight, treatment, axis):
        treatment = replace(treatment, group_size=None)
        notes = [f"one table, as those of {note} would be larger than the weight"]
    return treatment, "; ".join(notes)


def _is_larger(weight: Weight, treatment: PalettizeConfig, axis: int) -> bool:
    """Whether indices and tables of groups take as much as the weight does densely."""
    if treatment.channel_scale or treatment.group_size is None:
        return False
    bits = treatment.bits or 8
    n_tables = weight.shape[axis] // treatment.group_size
    if n_tables == 1:
        return False
    table_bits = 2**bits * treatment.vector_size * weight.dtype.bits
    code_bits = weight.size // treatment.vector_size * bits
    return n_tables * table_bits + code_bits >= weight.size * weight.dtype.bits


def _vectors_suit(weight: Weight, vector_size: int, axis: int) -> bool:
    """Whether no vector reaches from one group of a grouped convolution into the next."""
    for use in weight.node.uses:
        if use.node.op.type in ("conv", "conv_transpose"):
            n_groups = weight.graph.scalar(use.node, "groups") or 1
            if weight.shape[axis] // n_groups % vector_size:
                return False
    return True


def _fit_blocks(
    weight: Weight, treatment: QuantizeConfig, blocks: Blocks, on_indivisible: OnIndivisible
) -> tuple[Treatment | None, str]:
    if len(blocks.shape) != len(weight.shape):
        msg = (
            f"{weight.name}: the block_size must have one number for each of the "
            f"{len(weight.shape)} axes of the weight, got {list(blocks.shape)}"
        )
        raise UnsupportedError(msg)
    sizes = []
    for axis, (asked, n) in enumerate(zip(blocks.shape, weight.shape, strict=True)):
        size = asked or n
        if n % size:
            if on_indivisible == "leave":
                return None, f"a block size of {asked} does not divide axis {axis} of {n}"
            size = largest_divisor(size, n)
        sizes.append(size)
    for axis, n in reversed(list(enumerate(weight.shape))):
        if sizes[axis] == 1 < blocks.shape[axis] and _has_too_many(weight, treatment, sizes):
            sizes[axis] = n
    note = (
        ""
        if all(a in (0, b) for a, b in zip(blocks.shape, sizes, strict=True))
        else (f"blocks of {sizes}, as {list(blocks.shape)} do not divide the weight")
    )
    return replace(treatment, granularity=Blocks(tuple(sizes))), note


def _has_too_many(weight: Weight, treatment: QuantizeConfig, sizes: Sequence[int]) -> bool:
    """Whether codes and scales of such blocks take as much as the weight does densely."""
    offset_bits = treatment.bits if treatment.offset or not treatment.signed else 0
    block_bits = math.prod(sizes) * treatment.bits + weight.dtype.bits + offset_bits
    return block_bits >= math.prod(sizes) * weight.dtype.bits
