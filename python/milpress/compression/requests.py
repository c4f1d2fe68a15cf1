"""Which treatments are asked for a weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from milpress.compression.settling import Asked, Settled, settle
from milpress.errors import CompressionError, UnsupportedError
from milpress.formats import (
    Treatment,
)
from milpress.formats.rows import OnIndivisible
from milpress.mil.opset import Opset
from milpress.mil.program import Weight
from milpress.recipe import Keep, Recipe, Step, describe


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is asked for a weight.

    Parameters
    ----------
    treatments
        One after the other; none to keep it.
    min_size
        Least number of elements.
    on_indivisible
        Whether a group or block that does not divide the channels is made smaller.
    reason
        Why it can't be had, if that is known.
    needs
        What of it takes an iOS18 model, beyond what the treatments tell.
    settled
        How it came about, if ops that use the weight ask for different things.
    conflict
        The error for who wants no such thing settled; empty if there is nothing to settle.
    """

    needs: str = ""
    treatments: tuple[Treatment, ...] = ()
    min_size: int = 0
    on_indivisible: OnIndivisible = "divisor"
    reason: str = ""
    settled: str = ""
    conflict: str = ""

    def for_size(self, size: int) -> tuple[Treatment, ...]:
        """Return what is asked for a weight of so many elements."""
        return self.treatments if size >= self.min_size else ()


class Requests(Protocol):
    """Says what is asked for each weight: a recipe, or what a face makes of its own settings."""

    @property
    def may_grow(self) -> bool:
        """Whether a weight is compressed even if that makes it larger."""

    @property
    def joint(self) -> bool:
        """Whether weights that are compressed already are treated too."""

    def request(self, weight: Weight) -> Request:
        """Return what is asked for a weight."""

    def too_early(
        self, name: str, treatment: Treatment, needs: str, current: Opset
    ) -> CompressionError:
        """Return the error that says that a program's opset can't hold a treatment."""

    def advice(self, weights: Sequence[Weight]) -> str:
        """Return how to say what holds for weights themselves, whatever uses them."""


@dataclass(frozen=True, slots=True)
class RecipeRequests:
    """What a recipe asks for."""

    recipe: Recipe
    may_grow: bool = False
    joint: bool = True

    def request(self, weight: Weight) -> Request:
        """Return the treatments of all steps that mean the weight."""
        chosen = self.recipe.treatments_for(weight.name, weight.op_types)
        request = Request(
            treatments=tuple(treatment for treatment, _ in chosen),
            min_size=max((min_size for _, min_size in chosen), default=0),
        )
        if len(weight.op_types) < 2 or weight.size < request.min_size:
            return request
        settled = [_settled_step(step, weight) for step in self.recipe.steps]
        notes = "; ".join(each.note for each in settled if each.note)
        if not notes:
            return request
        treatments = tuple(treatment for each in settled for treatment in each.treatments)
        if treatments == request.for_size(weight.size):
            return replace(request, settled=notes)
        winner = Request(treatments=treatments) if treatments else None
        return settled_request(request, winner, notes, f"{notes}; {self.advice([weight])}")

    def advice(self, weights: Sequence[Weight]) -> str:
        """Return the rule that says what holds for weights by their names."""
        rules = ", ".join(f"{{name: {weight.name}, keep: true}}" for weight in weights)
        return (
            f"a step's first rule must say what holds, such as {rules}, or with a treatment in "
            "place of keep"
        )

    def too_early(
        self, name: str, treatment: Treatment, needs: str, current: Opset
    ) -> CompressionError:
        """Return the error that says how to raise the model."""
        msg = (
            f"{name}: {describe(treatment)}: {needs} must be stored in an iOS18 model, got "
            f"{current.target}; raise it with --upgrade-to iOS18 of milpress compress, or "
            "target: iOS18 in a recipe or suite"
        )
        return UnsupportedError(msg)


def _settled_step(step: Step, weight: Weight) -> Settled:
    """Return what a step of a recipe asks for a weight, if it says so by the ops that use it."""
    choices = step.choices(weight.name, weight.op_types)
    if not choices:
        chosen, least = step.treatment_for(weight.name, weight.op_types)
        choices = [("", chosen, least)]
    by = {use.node.op.type: f"{use.node.op.type} {use.node.op_name}" for use in weight.node.uses}
    asked = [
        Asked(
            by.get(kind, kind),
            () if isinstance(chosen, Keep) or weight.size < least else (chosen,),
        )
        for kind, chosen, least in choices
    ]
    return settle(weight, asked)


def settled_request(asked: Request, winner: Request | None, settled: str, conflict: str) -> Request:
    """Return what comes of a request if another wins; ``None`` is to leave the weight."""
    if winner is None:
        return replace(asked, reason=settled, conflict=conflict)
    return replace(winner, settled=settled, conflict=conflict)
