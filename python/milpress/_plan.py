"""What is to happen to each weight, before any is touched."""

from __future__ import annotations

from dataclasses import dataclass, replace

from milpress.errors import UnsupportedError
from milpress.formats import PalettizeConfig, PerBlock, PerTensor, QuantizeConfig
from milpress.mil import constexpr, opset
from milpress.mil.opset import Opset
from milpress.mil.package import Package
from milpress.mil.program import Node
from milpress.mil.weights import Site, Weight, sites, weights
from milpress.recipe import Keep, Recipe, Treatment, describe
from milpress.report import Status


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to happen to one weight: a treatment, or none and why."""

    weight: Weight
    status: Status
    treatment: Treatment | None
    note: str = ""

    def left(self, note: str) -> Plan:
        """Return the plan to leave the weight as it is although it was asked for."""
        return replace(self, status="left", treatment=None, note=note)


def plan_package(
    package: Package, recipe: Recipe, *, strict: bool
) -> list[tuple[Site, dict[Node, Plan]]]:
    """Resolve the treatment of every weight of a package.

    Raises
    ------
    UnsupportedError
        If a program's opset can't hold a treatment; with ``strict``, also if a weight does not
        suit its own.
    """
    planned = []
    for site in sites(package):
        current = opset.by_name(site.function.opset)
        plans = (
            _plan_weight(weight, recipe, current) for weight in weights(site.prefix, site.graph)
        )
        planned.append((site, {plan.weight.node: plan for plan in plans}))
    if strict:
        for _, by_node in planned:
            for plan in by_node.values():
                if plan.status != "not asked" and plan.note:
                    msg = f"{plan.weight.name}: {plan.note}"
                    raise UnsupportedError(msg)
    return planned


def _plan_weight(weight: Weight, recipe: Recipe, current: Opset) -> Plan:
    treatment, min_size = _chosen(weight, recipe)
    reason = ""
    if treatment is None:
        reason = "not selected"
    elif weight.size < min_size:
        reason = f"fewer than {min_size} elements"
    elif len(weight.shape) < 2:
        reason = "a vector"
    elif "int" in weight.dtype.name:
        reason = f"{weight.dtype.name}, not a float"
    if treatment is None or reason:
        return Plan(weight, "not asked", None, reason)
    plan = Plan(weight, "compressed", treatment)
    if weight.is_compressed:
        return plan.left("compressed already")
    if not weight.dtype.is_float:
        return plan.left(f"{weight.dtype.name} is neither float16 nor float32")
    if weight.node.is_block_output:
        return plan.left("a block returns it")
    if any(constexpr.is_constexpr(use.node) for use in weight.node.uses):
        return plan.left("part of a compressed weight")
    if weight.channel_axes is None and _needs_axes(treatment):
        return plan.left("the ops that use it disagree on its channels")
    _check_opset(weight.name, treatment, current)
    return _with_divisor(plan, treatment)


def _chosen(weight: Weight, recipe: Recipe) -> tuple[Treatment | None, int]:
    chosen: Treatment | None = None
    least = 0
    for step in recipe.steps:
        treatment, min_size = step.treatment_for(weight.name, weight.op_types)
        if isinstance(treatment, Keep):
            continue
        if chosen is not None:
            msg = (
                f"{weight.name}: a weight must take part in one step, "
                f"got {describe(chosen)} and {describe(treatment)}"
            )
            raise UnsupportedError(msg)
        chosen, least = treatment, min_size
    return chosen, least


def _needs_axes(treatment: Treatment) -> bool:
    if isinstance(treatment, PalettizeConfig):
        return treatment.group_size is not None
    return isinstance(treatment, QuantizeConfig) and not isinstance(
        treatment.granularity, PerTensor
    )


def _check_opset(name: str, treatment: Treatment, current: Opset) -> None:
    needs = ""
    if isinstance(treatment, PalettizeConfig):
        if treatment.group_size is not None:
            needs = "groups of channels"
        elif treatment.bits == 3:
            needs = "3 bits"
    elif isinstance(treatment, QuantizeConfig):
        if isinstance(treatment.granularity, PerBlock):
            needs = "blocks"
        elif treatment.bits == 4:
            needs = "4 bits"
    if needs and not current.has_blocks:
        msg = (
            f"{name}: {describe(treatment)}: {needs} must be stored in an iOS18 model, got "
            f"{current.target}; raise it with --upgrade-to iOS18 (target: iOS18 in a recipe)"
        )
        raise UnsupportedError(msg)


def _with_divisor(plan: Plan, treatment: Treatment) -> Plan:
    """Take the largest group or block that divides the channels, or leave the weight."""
    shape, axes = plan.weight.shape, plan.weight.channel_axes or (0, 1)
    if isinstance(treatment, PalettizeConfig) and treatment.group_size is not None:
        word, asked, n = "group", treatment.group_size, shape[axes[0]]
        channels = f"{n} output channel{'s' * (n > 1)}"
    elif isinstance(treatment, QuantizeConfig) and isinstance(treatment.granularity, PerBlock):
        word, asked, n = "block", treatment.granularity.size, shape[axes[1]]
        channels = f"{n} input channel{'s' * (n > 1)}"
    else:
        return plan
    size = next(size for size in range(min(asked, n), 0, -1) if n % size == 0)
    if size == asked:
        return plan
    if size == 1 and n > 1:
        return plan.left(f"no {word} size from 2 to {asked} divides {channels}")
    note = f"{word} size {size}, as {asked} does not divide {channels}"
    if isinstance(treatment, PalettizeConfig):
        return replace(plan, treatment=replace(treatment, group_size=size), note=note)
    return replace(plan, treatment=replace(treatment, granularity=PerBlock(size)), note=note)
