"""Random numbers: from Core ML's distributions, but not the same draws."""

from __future__ import annotations

import torch
from torch import Tensor

from milpress.interpreter.operator import Call, operator
from milpress.interpreter.ops.torch_types import check_choice


def _source(call: Call, seed: int) -> torch.Generator:
    """Return the op's own generator if it has a seed, else that of the program."""
    return call.generator if seed == -1 else torch.Generator().manual_seed(seed)


@operator("random_bernoulli")
def bernoulli(shape: list[int], prob: float = 0.5, seed: int = -1, *, call: Call) -> Tensor:
    return (torch.rand(shape, generator=_source(call, seed)) < prob).to(torch.float32)


@operator("random_normal")
def normal(
    shape: list[int], mean: float = 0.0, stddev: float = 1.0, seed: int = -1, *, call: Call
) -> Tensor:
    return mean + stddev * torch.randn(shape, generator=_source(call, seed))


@operator("random_uniform")
def uniform(
    shape: list[int], low: float = 0.0, high: float = 1.0, seed: int = -1, *, call: Call
) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=_source(call, seed))


@operator("random_categorical")
def categorical(
    x: Tensor, mode: str = "logits", size: int = 1, seed: int = -1, *, call: Call
) -> Tensor:
    check_choice("mode", mode, "logits", "probs")
    odds = torch.softmax(x, -1) if mode == "logits" else x
    rows = odds.reshape(-1, odds.shape[-1])
    drawn = torch.multinomial(rows, size, replacement=True, generator=_source(call, seed))
    return drawn.reshape([*x.shape[:-1], size]).to(torch.float32)
