"""A model and what processes do with it; imported by each of them, so it imports little."""

from __future__ import annotations

import torch
from torch import distributed, nn
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from milpress.torch import palettization as P  # noqa: N812
from milpress.torch.palettization._workers import shard


class Model(nn.Module):
    """With all that makes gradients awkward: dropout, running statistics, frozen, tied, unused."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.norm = nn.BatchNorm1d(8)
        self.dropout = nn.Dropout(0.5)
        self.unused = nn.Linear(8, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids):
        x = self.frozen(self.words(ids).mean(1))
        return self.head(self.dropout(torch.tanh(self.norm(x))))


def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def batches(n=3, size=4):
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randint(0, 20, (size, 5), generator=generator),
            torch.randint(0, 20, (size,), generator=generator),
        )
        for _ in range(n)
    ]


def build(seed=0) -> Model:
    torch.manual_seed(seed)
    return Model().train()


def work_in_a_group(rank: int, folder: str) -> None:
    """Compress in a group of two, and save what comes of it."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    palettizer = P.SKMPalettizer(build(), P.SKMPalettizerConfig(calibration_nsamples=11))
    together = palettizer.compress(batches(), loss_fn)
    torch.save(together.state_dict(), f"{folder}/together{rank}")
    sharded = build()
    shard(sharded, ModuleWrapPolicy({nn.Linear}))
    found = P.SKMPalettizer(
        sharded, P.SKMPalettizerConfig(calibration_nsamples=11)
    ).compute_sensitivity(batches(), loss_fn)
    torch.save(found, f"{folder}/sharded{rank}")
    palettizer = P.SKMPalettizer(sharded, P.SKMPalettizerConfig(calibration_nsamples=11))
    palettizer.compress(batches(), loss_fn, inplace=True)
    whole = {name: p.full_tensor().detach() for name, p in sharded.named_parameters()}
    torch.save(whole, f"{folder}/compressed{rank}")
    distributed.destroy_process_group()
