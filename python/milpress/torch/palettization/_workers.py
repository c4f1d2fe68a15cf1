"""Sensitivities by several processes on one machine."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed, nn
from torch.multiprocessing.spawn import spawn

Compute = Callable[[nn.Module], None]


def run(n_workers: int, compute: Compute, model: nn.Module, policy: Any) -> None:
    """Let processes, joined in a process group, compute together.

    Parameters
    ----------
    compute
        Takes the model; it must be picklable.
    model
        The model. Workers read its weights from shared memory.
    policy
        Says which modules are sharded: torch's ``auto_wrap_policy``, or an object whose
        ``get_policy()`` gives one. ``None`` gives each process the whole model.
    """
    if hasattr(policy, "get_policy"):
        policy = policy.get_policy()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (n_workers, f"{folder}/meeting", compute, model, policy)
        spawn(_work, arguments, n_workers)  # type: ignore[no-untyped-call]


def _work(
    rank: int, n_workers: int, meeting: str, compute: Compute, model: nn.Module, policy: Any
) -> None:
    on_gpu = torch.cuda.is_available() and torch.cuda.device_count() >= n_workers
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // n_workers))
    if on_gpu:
        torch.cuda.set_device(rank)
        model.to(f"cuda:{rank}")
    distributed.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=n_workers,
    )
    try:
        if policy is not None:
            shard(model, policy)
        compute(model)
    finally:
        distributed.destroy_process_group()


def shard(model: nn.Module, policy: Any) -> None:
    """Spread the parameters of a model over the process group, module by module.

    Tied parameters belong to no module alone, but to the model.
    """
    from torch.distributed.fsdp import fully_shard

    n_holders = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for module in reversed(list(model.modules())[1:]):
        parameters = list(module.parameters())
        n_elements = sum(parameter.numel() for parameter in parameters)
        is_tied = any(n_holders[id(parameter)] > 1 for parameter in parameters)
        if not is_tied and policy(module=module, recurse=False, nonwrapped_numel=n_elements):
            fully_shard(module)
    fully_shard(model)
