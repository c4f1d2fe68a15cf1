"""What is to happen to each weight, before any is touched."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from milpress.compression.report import Status
from milpress.compression.requests import Request, Requests, settled_request
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
from milpress.mil import decode
from milpress.mil.graph import Node
from milpress.mil.package import Package
from milpress.mil.program import Weight


@dataclass(frozen=True, slots=True)
class Decision:
    """What is to happen to one weight: treatments, or none and why."""

    weight: Weight
    status: Status
    treatments: tuple[Treatment, ...] = ()
    notes: tuple[str, ...] = ()
    settled: str = ""
    conflict: str = ""

    @property
    def note(self) -> str:
        """All notes in one text, and how the request came about."""
        return "; ".join((*self.notes, *([self.settled] if self.settled else [])))

    def left(self, note: str) -> Decision:
        """Return the decision to leave the weight as it is although it was selected."""
        return replace(self, status="left", treatments=(), notes=(note,), settled="")


def decide_all(package: Package, requests: Requests, *, strict: bool) -> dict[Node, Decision]:
    """Resolve the treatments of every weight of a package, by the op that holds it, in order.

    Raises
    ------
    CompressionError
        If a program's opset can't hold a treatment; with ``strict``, also if a weight does not
        suit its own.
    """
    requested = {weight.node: (weight, requests.request(weight)) for weight in package.weights}
    _settle_shared(requested, requests)
    decisions = {
        node: decide(weight, requests, request) for node, (weight, request) in requested.items()
    }
    if strict:
        _refuse_notes(decisions.values())
    return decisions


def _refuse_notes(decisions: Iterable[Decision]) -> None:
    for decision in decisions:
        if decision.status != "not asked" and decision.conflict:
            msg = f"{decision.weight.name}: {decision.conflict}"
            raise ConfigError(msg)
        if decision.status != "not asked" and decision.notes:
            msg = f"{decision.weight.name}: {decision.note}"
            raise UnsupportedError(msg)


def _settle_shared(requested: dict[Node, tuple[Weight, Request]], requests: Requests) -> None:
    """Let weights that are stored once, as functions share them, be treated alike."""
    stored: dict[tuple[tuple[str, int], ...], list[Node]] = {}
    for node, (weight, _) in requested.items():
        places = weight.places
        if places:
            stored.setdefault(places, []).append(node)
    for nodes in stored.values():
        twins = [requested[node] for node in nodes]
        kept = [
            () if request.reason else request.for_size(weight.size) for weight, request in twins
        ]
        if len(set(kept)) == 1:
            continue
        settled = settle(
            twins[0][0],
            [Asked(weight.name, each) for (weight, _), each in zip(twins, kept, strict=True)],
        )
        note = f"stored once for {' and '.join(weight.name for weight, _ in twins)}: {settled.note}"
        conflict = f"{note}; {requests.advice([weight for weight, _ in twins])}"
        winner = twins[kept.index(settled.treatments)][1] if settled.treatments else None
        for node, (weight, request), each in zip(nodes, twins, kept, strict=True):
            if each != settled.treatments:
                requested[node] = weight, settled_request(request, winner, note, conflict)


def decide(weight: Weight, requests: Requests, request: Request | None = None) -> Decision:
    """Resolve the treatments of one weight; ``request`` if it is known.

    Raises
    ------
    CompressionError
        If the opset can't hold a treatment.
    """
    opset = weight.graph.opset
    request = request or requests.request(weight)
    reason = ""
    if not request.treatments:
        reason = "not selected"
    elif weight.size < request.min_size:
        reason = f"at most {request.min_size - 1:,} elements"
    elif len(weight.shape) < 2:
        reason = "a vector"
    elif "int" in weight.dtype.name:
        reason = f"{weight.dtype.name}, not a float"
    if reason:
        return Decision(weight, "not asked", notes=(reason,), settled=request.settled)
    decision = Decision(
        weight,
        "compressed",
        request.treatments,
        settled=request.settled,
        conflict=request.conflict,
    )
    reason = request.reason or _unsuitable(weight, requests)
    if reason:
        return decision.left(reason)
    if weight.channel_axes is None and any(_needs_axes(each) for each in request.treatments):
        return decision.left("the ops that use it disagree on its channels")
    for treatment in request.treatments:
        needs = request.needs or _needs(treatment)
        if needs and not opset.has_blocks:
            raise requests.too_early(weight.name, treatment, needs, opset)
    if weight.is_compressed and not opset.has_blocks:
        return decision.left("compressed already, and going on with it takes an iOS18 model")
    if len(request.treatments) > 1 and not opset.has_blocks:
        raise requests.too_early(weight.name, request.treatments[-1], "joint compression", opset)
    return _fitted(decision, request.on_indivisible)


def _unsuitable(weight: Weight, requests: Requests) -> str:
    if weight.is_compressed and not requests.joint:
        return "compressed already"
    if decode.is_constexpr(weight.node) and not requests.joint:
        return "stored as float16 and cast, which coremltools leaves"
    if not weight.dtype.is_float:
        return f"{weight.dtype.name} is neither float16 nor float32"
    if weight.node.is_block_output:
        return "a block returns it"
    if any(decode.is_constexpr(use.node) for use in weight.node.uses):
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


def _fitted(decision: Decision, on_indivisible: OnIndivisible) -> Decision:
    """Make each treatment fit the weight's shape, or drop it; leave the weight if none does."""
    fits = [_fit(decision.weight, each, on_indivisible) for each in decision.treatments]
    treatments = tuple(treatment for treatment, _ in fits if treatment is not None)
    notes = tuple(note for _, note in fits if note)
    if not treatments:
        return decision.left("; ".join(notes))
    return replace(decision, treatments=treatments, notes=notes)


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
    convs = [use.node for use in weight.node.uses if use.node.op.type in ("conv", "conv_transpose")]
    n_groups = [weight.graph.scalar(conv, "groups") or 1 for conv in convs]
    return all(weight.shape[axis] // n % vector_size == 0 for n in n_groups)


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
