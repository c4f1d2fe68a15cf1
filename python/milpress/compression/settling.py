"""Requests that meet on one weight: the one that keeps most of it wins."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from milpress.formats import (
    Blocks,
    PalettizeConfig,
    PerBlock,
    PerTensor,
    PruneConfig,
    QuantizeConfig,
    Treatment,
    Uniform,
    Unique,
)
from milpress.mil.program import Weight
from milpress.recipe import describe


class Asked(NamedTuple):
    """What somebody asks for a weight: treatments, one after the other, or to leave it."""

    by: str
    treatments: tuple[Treatment, ...]

    @property
    def words(self) -> str:
        """The request as a clause."""
        what = f"for {_words(self.treatments)}" if self.treatments else "to leave it"
        return f"{self.by} asks {what}"


class Settled(NamedTuple):
    """What is to be done to a weight, and why; ``note`` is empty if all ask for the same."""

    treatments: tuple[Treatment, ...]
    note: str = ""


def settle(weight: Weight, asked: Sequence[Asked]) -> Settled:
    """Return the request that keeps most of a weight.

    To leave it beats any treatment, more bits beat fewer, less sparsity beats more; of equals, the
    one with more tables or scales. Where that can't be told, such as of a threshold and a sparsity,
    the weight is left.
    """
    distinct = {each.treatments: each for each in reversed(asked)}
    if len(distinct) == 1:
        return Settled(asked[0].treatments)
    differing = [each for each in asked if distinct[each.treatments] is each]
    # Steps that all begin with are no matter of dispute.
    columns = zip(*(each.treatments for each in differing), strict=False)
    n_same = len(list(itertools.takewhile(lambda alike: len(set(alike)) == 1, columns)))
    rests = [Asked(each.by, each.treatments[n_same:]) for each in differing]
    kept = [_kept(each, weight, rests) for each in rests]
    if any(each is None for each in kept):
        words = "; ".join(each.words for each in differing)
        return Settled((), f"left, as it can't be told which of these keeps more of it: {words}")
    best = max(range(len(differing)), key=lambda i: (kept[i], -i))
    chosen = differing.pop(best)
    others = "; ".join(each.words for each in differing)
    what = _words(chosen.treatments) if chosen.treatments else "left"
    return Settled(chosen.treatments, f"{what}, as {chosen.by} asks; {others}")


def _words(treatments: Sequence[Treatment]) -> str:
    return ", then ".join(map(describe, treatments))


def _kept(asked: Asked, weight: Weight, others: Sequence[Asked]) -> tuple[float, ...] | None:
    """Return numbers that are greater, the first that differs, for what keeps more of a weight.

    ``None`` where that can't be told beside the others.
    """
    if not asked.treatments:
        return (math.inf,)
    if any(not each.treatments for each in others):
        return (-math.inf,)
    if len(asked.treatments) > 1:
        return None
    (treatment,) = asked.treatments
    if isinstance(treatment, PalettizeConfig):
        return _kept_by_palette(treatment, weight)
    if isinstance(treatment, QuantizeConfig):
        return (
            float(treatment.bits),
            _n_scales(treatment, weight),
            float(treatment.offset),
            float(treatment.range == "mse"),
        )
    if treatment.threshold is not None:
        alike = all(
            isinstance(one, PruneConfig) and one.threshold is not None
            for each in others
            for one in each.treatments
        )
        return (-treatment.threshold, treatment.min_sparsity) if alike else None
    return _kept_by_sparsity(treatment, weight)


def _kept_by_palette(treatment: PalettizeConfig, weight: Weight) -> tuple[float, ...] | None:
    if isinstance(treatment.table, Unique):
        return (math.inf, 0.0)
    if treatment.bits is None:
        return None
    axis = treatment.channel_axis
    if axis is None:
        axis = (weight.channel_axes or (0, 1))[0]
    n_tables = 1.0
    if treatment.group_size is not None and -len(weight.shape) <= axis < len(weight.shape):
        n_tables = weight.shape[axis] / treatment.group_size
    return (
        treatment.bits / treatment.vector_size,
        n_tables,
        float(treatment.channel_scale),
        float(not isinstance(treatment.table, Uniform)),
    )


def _n_scales(treatment: QuantizeConfig, weight: Weight) -> float:
    output, inputs = weight.channel_axes or (0, 1)
    granularity = treatment.granularity
    if isinstance(granularity, PerTensor):
        return 1.0
    if isinstance(granularity, Blocks):
        sizes = zip(granularity.shape, weight.shape, strict=False)
        return math.prod(n / (size or n) for size, n in sizes)
    n_scales = float(weight.shape[output])
    if isinstance(granularity, PerBlock):
        n_scales *= weight.shape[inputs] / granularity.size
    return n_scales


def _kept_by_sparsity(treatment: PruneConfig, weight: Weight) -> tuple[float, ...]:
    if treatment.n_m is not None:
        n, m = treatment.n_m
        return (weight.dtype.bits * (1 - n / max(m, 1)), -float(m))
    # Weights that stay or go one by one are the least that can go.
    return (
        weight.dtype.bits * (1 - (treatment.sparsity or 0.0)),
        -float(treatment.block_size or 0),
    )
