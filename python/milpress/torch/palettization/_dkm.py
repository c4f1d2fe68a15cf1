"""Differentiable k-means: each weight attends to the entries of its table.

An iteration makes of a table ``c`` and weights ``x`` an attention ``A = softmax(-|x - c|^2 / tau)``
and a new table, the means ``A^T x`` over the sums of ``A`` (Cho et al. 2021, arXiv 2108.12659). The
weight that the model computes with is the last attention times the last table.

Attention has a number for each weight and entry. It is computed in parts that fit in a cache, and
again for the gradient, which is written out below; so memory is that of the weights, whatever the
size of the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

_PART = 2**17  # numbers of attention at a time


@dataclass(frozen=True, slots=True)
class AttentionSettings:
    """How weights attend to entries.

    Parameters
    ----------
    tau
        Temperature: the squared distance that counts.
    n_iterations, epsilon
        At most so many iterations; fewer once the sum of squared distances to the nearest entries
        changes by no more than ``epsilon``.
    mode
        ``"dkm"`` attends to all entries, ``"topk"`` to the nearest two, ``"hard"`` to the nearest,
        ``"gsm"`` to all, with Gumbel noise.
    least
        Lower limit of attention in mode ``"dkm"``.
    keep_zero
        Whether entry 0 of each table stays zero.
    zero_bonus
        By how much a squared distance to that entry counts less; 0 keeps weights that are not zero
        away from it.
    """

    tau: float = 1e-4
    n_iterations: int = 3
    epsilon: float = 1e-4
    mode: Literal["dkm", "gsm", "hard", "topk"] = "dkm"
    least: float = 1e-7
    keep_zero: bool = False
    zero_bonus: float = 0.0


Rounding = Callable[[torch.Tensor], torch.Tensor]


def attend(
    weights: torch.Tensor,
    table: torch.Tensor,
    settings: AttentionSettings,
    kept: torch.Tensor | None = None,
    rounding: Rounding | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weights that a model is to compute with, and the new tables.

    Parameters
    ----------
    weights
        Of shape ``(n_groups, n, dim)``: the only one of the arguments that has a gradient.
    table
        Of shape ``(n_groups, n_entries, dim)``.
    kept
        Of shape ``(n_groups, n)``, 1 for weights that count and 0 for those that don't.
    rounding
        Rounds the last tables to what can be stored; its gradient is taken as that of the identity.
    """
    mixture, tables = _Attend.apply(weights, table, settings, kept, rounding)  # type: ignore[no-untyped-call]
    return mixture, tables


def _parts(n_groups: int, n: int, n_entries: int) -> Iterator[tuple[slice, slice]]:
    """Yield ranges of groups and of weights in them."""
    size = max(1, _PART // n_entries)
    step = max(1, size // n)
    for group in range(0, n_groups, step):
        for start in range(0, n, size):
            yield slice(group, group + step), slice(start, start + size)


def _attention(
    x: torch.Tensor, table: torch.Tensor, settings: AttentionSettings, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return attention, and what it is the softmax of: squared distances over ``-tau``."""
    # Scaling both sides first is cheaper than scaling each distance.
    root = math.sqrt(settings.tau)
    x, table = x / root, table / root
    logits = (x[:, :, None, 0] - table[:, None, :, 0]).square_()
    for axis in range(1, x.shape[2]):
        logits += (x[:, :, None, axis] - table[:, None, :, axis]).square_()
    logits.neg_()
    if settings.keep_zero and settings.zero_bonus > 0:
        logits[..., 0] += settings.zero_bonus / settings.tau
    elif settings.keep_zero:
        logits[..., 0].masked_fill_((x != 0).any(dim=2), -torch.inf)
    if settings.mode == "hard":
        nearest = logits.argmax(dim=2, keepdim=True)
        return torch.zeros_like(logits).scatter_(2, nearest, 1), logits
    if settings.mode == "topk" and logits.shape[2] > 2:
        values, places = logits.topk(2, dim=2)
        chosen = torch.full_like(logits, -torch.inf).scatter_(2, places, values)
        return chosen.softmax(dim=2), logits
    if settings.mode == "gsm":
        generator = torch.Generator(x.device).manual_seed(seed)
        noise = torch.empty_like(logits).exponential_(generator=generator)
        return (logits - noise.log_()).softmax(dim=2), logits
    return logits.softmax(dim=2), logits


def _shares(
    x: torch.Tensor, table: torch.Tensor, settings: AttentionSettings, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `_attention` does, with the lower limit of attention."""
    attention, logits = _attention(x, table, settings, seed)
    return attention.clamp_(min=settings.least) if settings.mode == "dkm" else attention, logits


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weights: torch.Tensor,
        table: torch.Tensor,
        settings: AttentionSettings,
        kept: torch.Tensor | None,
        rounding: Rounding | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        weights = weights.contiguous()
        parts = list(_parts(weights.shape[0], weights.shape[1], table.shape[1]))
        seed = int(torch.randint(2**31, ()).item()) if settings.mode == "gsm" else 0
        tables, sums = [table], []
        last = None
        for _ in range(settings.n_iterations):
            total, mass, inertia = _iterated(weights, tables[-1], settings, kept, parts, seed)
            tables.append(_means(total, mass, tables[-1], settings))
            sums.append(mass)
            if last is not None and bool(((last - inertia).abs() <= settings.epsilon).all()):
                break
            last = inertia
        final = tables[-1] if rounding is None else rounding(tables[-1])
        mixture = torch.empty_like(weights)
        for index, (groups, span) in enumerate(parts):
            shares, _ = _shares(weights[groups, span], tables[-2][groups], settings, seed + index)
            mixture[groups, span] = shares @ final[groups]
        if kept is not None:
            mixture *= kept[..., None]
        ctx.save_for_backward(weights, kept, final, *tables, *sums)
        ctx.settings, ctx.parts, ctx.seed = settings, parts, seed
        ctx.mark_non_differentiable(final)
        return mixture, final

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        weights, kept, final, *rest = ctx.saved_tensors
        n = (len(rest) - 1) // 2
        tables, sums = rest[: n + 1], rest[n + 1 :]
        settings, parts, seed = ctx.settings, ctx.parts, ctx.seed
        of_mixture = gradients[0]
        if kept is not None:
            of_mixture = of_mixture * kept[..., None]
        of_weights = torch.zeros_like(weights)
        of_table = torch.zeros_like(final)
        for index, (groups, span) in enumerate(parts):
            shares, _ = _shares(weights[groups, span], tables[-2][groups], settings, seed + index)
            of_table[groups] += shares.mT @ of_mixture[groups, span]
        for i in reversed(range(n)):
            if settings.keep_zero:
                of_table[:, 0] = 0
            # The gradient of a mean: to the sum of products, and to the sum of attention.
            of_total = torch.where(sums[i][..., None] > 0, of_table / sums[i][..., None], 0)
            of_mass = -(of_total * tables[i + 1]).sum(dim=2)
            of_table = torch.where(sums[i][..., None] > 0, 0, of_table)
            for index, (groups, span) in enumerate(parts):
                x, c = weights[groups, span], tables[i][groups]
                soft, _ = _attention(x, c, settings, seed + index)
                of_attention = x @ of_total[groups].mT + of_mass[groups][:, None, :]
                share = soft.clamp(min=settings.least) if settings.mode == "dkm" else soft
                of_x = share @ of_total[groups]
                if kept is not None:
                    of_attention *= kept[groups, span, None]
                    of_x *= kept[groups, span, None]
                if i == n - 1:
                    of_attention += of_mixture[groups, span] @ final[groups].mT
                if settings.mode != "hard":
                    if settings.mode == "dkm":
                        of_attention.masked_fill_(soft < settings.least, 0)
                    mean = (of_attention * soft).sum(dim=2, keepdim=True)
                    # Of the squared distances, halved.
                    of_distance = of_attention.sub_(mean).mul_(soft).mul_(-2 / settings.tau)
                    of_x += x * of_distance.sum(dim=2, keepdim=True) - of_distance @ c
                    mass = of_distance.sum(dim=1)[..., None]
                    of_table[groups] += c * mass - of_distance.mT @ x
                of_weights[groups, span] += of_x
        return of_weights, None, None, None, None


def _iterated(
    weights: torch.Tensor,
    table: torch.Tensor,
    settings: AttentionSettings,
    kept: torch.Tensor | None,
    parts: list[tuple[slice, slice]],
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the sums of products and of attention, and of squared distances to the nearest."""
    total = torch.zeros_like(table)
    mass = torch.zeros_like(table[..., 0])
    inertia = torch.zeros_like(table[:, 0, 0])
    for index, (groups, span) in enumerate(parts):
        x = weights[groups, span]
        attention, logits = _shares(x, table[groups], settings, seed + index)
        nearest = logits.amax(dim=2).mul_(-settings.tau)
        if kept is not None:
            attention *= kept[groups, span, None]
            nearest *= kept[groups, span]
        total[groups] += attention.mT @ x
        mass[groups] += attention.sum(dim=1)
        inertia[groups] += nearest.sum(dim=1)
    return total, mass, inertia


def _means(
    total: torch.Tensor, mass: torch.Tensor, before: torch.Tensor, settings: AttentionSettings
) -> torch.Tensor:
    """Return the new table; an entry that nothing attends to stays where it is."""
    means = torch.where(mass[..., None] > 0, total / mass[..., None], before)
    if settings.keep_zero:
        means[:, 0] = 0
    return means
