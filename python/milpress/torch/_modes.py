"""Modes that a model, or torch, is in for the time of a block."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Have a model in evaluation mode, then each module as it was."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def keeping_buffers(model: nn.Module) -> Iterator[list[str]]:
    """Have a model write to its buffers, then give them the values that they had.

    Yields
    ------
    A list that holds the names of those written to, after the block.
    """
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    written: list[str] = []
    try:
        yield written
    finally:
        for name, buffer in model.named_buffers():
            if not torch.equal(buffer, before[name]):
                buffer.copy_(before[name])
                written.append(name)


def copied(model: nn.Module) -> nn.Module:
    """Return a copy of a model, without the history of weights that its hooks have computed."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


def device_of(model: nn.Module) -> torch.device:
    """Return where the first parameter of a model is."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


@contextlib.contextmanager
def on_device(model: nn.Module, device: str | torch.device | None) -> Iterator[None]:
    """Have a model on a device, then where it was.

    It stays where it is if there is no device, or if accelerate has spread it over several, whose
    hooks bring inputs there.
    """
    home = device_of(model)
    is_spread = hasattr(model, "hf_device_map")
    if device is None or is_spread or next(model.parameters(), None) is None:
        yield
        return
    if home == torch.device(device):
        yield
        return
    model.to(device)
    try:
        yield
    finally:
        model.to(home)


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """Have GPUs multiply float32 in full precision."""
    flags: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [flag.allow_tf32 for flag in flags]
    try:
        for flag in flags:
            flag.allow_tf32 = False
        yield
    finally:
        for flag, allowed in zip(flags, before, strict=True):
            flag.allow_tf32 = allowed
