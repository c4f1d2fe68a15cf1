"""A small model that is trained with each optimizer; processes import it, so it imports little."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import milpress as cto

SHAPE = (3, 12, 12)


class Net(nn.Module):
    """Convolutions, normalization, a sum, a concatenation, pooling and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(16)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.second_norm = nn.BatchNorm2d(16)
        self.pool = nn.MaxPool2d(4)
        self.head = nn.Sequential(nn.Linear(288, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, x):
        x = torch.relu(self.first_norm(self.first(x)))
        y = torch.relu(self.second_norm(self.second(x)) + x)
        y = self.pool(torch.cat([x, y], dim=1))
        return self.head(torch.flatten(y, 1))


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def pruner(model, home=cto.torch, **settings):
    """Return a pruner whose sparsity grows at each of eight steps."""
    settings = {"scheduler": {"update_steps": "range(1, 9)"}, "target_sparsity": 0.75, **settings}
    config = home.pruning.MagnitudePrunerConfig.from_dict({"global_config": settings})
    return home.pruning.MagnitudePruner(model, config)


def palettizer(model, home=cto.torch, **settings):
    """Return a palettizer that begins at the second step."""
    settings = {"n_bits": 4, "weight_threshold": 100, "milestone": 1, **settings}
    config = home.palettization.DKMPalettizerConfig.from_dict({"global_config": settings})
    return home.palettization.DKMPalettizer(model, config)


def quantizer(model, home=cto.torch, **settings):
    """Return a quantizer that goes through all of its milestones."""
    settings = {"milestones": [0, 2, 6, 7], **settings}
    config = home.quantization.LinearQuantizerConfig.from_dict({"global_config": settings})
    return home.quantization.LinearQuantizer(model, config)


def learner(model, home=cto.torch):
    """Return a quantizer that learns its scales and offsets."""
    return quantizer(model, home, algorithm="learnable", quantization_scheme="affine")


def prepare(optimizer: Any, inplace: bool = False) -> nn.Module:
    """Return the model to train."""
    if hasattr(optimizer, "enable_observer_sync"):
        return optimizer.prepare((torch.randn(2, *SHAPE),), inplace=inplace)
    return optimizer.prepare(inplace=inplace)


@dataclass
class Training:
    """A model, its optimizers, and the data of each step."""

    model: nn.Module
    optimizers: list[Any]

    def __post_init__(self) -> None:
        self.adam = torch.optim.Adam(self.model.parameters(), lr=1e-3)

    def go(self, steps: range, call: Any = None) -> None:
        """Train for some steps, of which each has its own data and size of batch."""
        self.model.train()
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(4 + step % 3, *SHAPE, generator=generator)
            y = torch.randint(10, (len(x),), generator=generator)
            self.adam.zero_grad()
            nn.functional.cross_entropy((self.model if call is None else call)(x), y).backward()
            self.adam.step()
            for optimizer in self.optimizers:
                optimizer.step()


MAKERS = {
    "pruner": (pruner,),
    "palettizer": (palettizer,),
    "quantizer": (quantizer,),
    "learner": (learner,),
    "palettizer and pruner": (palettizer, pruner),
    "quantizer and pruner": (quantizer, pruner),
}


def begun(makers, model: nn.Module | None = None) -> Training:
    """Return a training whose model is prepared by all optimizers, in their order."""
    model = net() if model is None else model
    optimizers = []
    for maker in makers:
        optimizers.append(maker(model))
        model = prepare(optimizers[-1], inplace=len(optimizers) > 1)
    return Training(model, optimizers)


def finalized(training: Training, model: Any = None) -> nn.Module:
    """Return what all optimizers make of the trained model, in their order."""
    for optimizer in training.optimizers:
        model = optimizer.finalize(model)
    return model.eval()


def train_in_two(rank: int, name: str, folder: str) -> None:
    """Train in a group of two, and save what comes of it."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    training = begun(MAKERS[name])
    wrapped = DistributedDataParallel(training.model)
    adam = torch.optim.Adam(wrapped.parameters(), lr=1e-3)
    wrapped.train()
    for step in range(8):
        generator = torch.Generator().manual_seed(10 * step + rank)
        x = torch.randn(4, *SHAPE, generator=generator)
        adam.zero_grad()
        wrapped(x).square().mean().backward()
        adam.step()
        for optimizer in training.optimizers:
            optimizer.step()
    states = {"prepared": training.model.state_dict()}
    states["finalized"] = finalized(training, wrapped).state_dict()
    torch.save(states, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()
