"""What the examples of fine-tuning share: digits of 8 x 8 pixels, a small network, and a table."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn

import milpress as cto
from milpress.interpreter import load

EPOCHS, FINE_TUNING_EPOCHS, BATCH = 40, 25, 64

warnings.simplefilter("ignore")  # of coremltools, about newer versions of torch


def data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return images and labels to train on, and to test with."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None][order] / 16
    labels = torch.tensor(digits.target)[order]
    return images[:1200], labels[:1200], images[1200:], labels[1200:]


def network() -> nn.Module:
    """Return a network that has not been trained."""
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 24, 3, padding=1),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(384, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


def train(
    model: nn.Module, epochs: int, rate: float, steppers: Iterable[Any] = (), seed: int = 0
) -> nn.Module:
    """Train a model, and let each of ``steppers`` take its step after each batch."""
    images, labels, _, _ = data()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    n_steps = epochs * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for batch in order[: len(images) // BATCH * BATCH].split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
            for stepper in steppers:
                stepper.step()
    return model.eval()


def trained(seed: int = 0) -> nn.Module:
    """Return a network that has been trained, in float."""
    torch.manual_seed(seed)
    return train(network(), EPOCHS, 3e-3, seed=seed)


@torch.no_grad()
def accuracy(model: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """Return the fraction of test images that a model tells right."""
    _, _, images, labels = data()
    return float((model(images).argmax(dim=1) == labels).float().mean())


def exported(model: nn.Module) -> tuple[float, int]:
    """Convert a model; return accuracy and size of the package, which is run on this machine.

    Packages of compressed models have been verified once they are there.
    """
    import coremltools as ct

    _, _, images, _ = data()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.mlpackage"
        if any("_COREML_" in name for name in model.state_dict()):
            cto.torch.convert(model, (images,), path, skip_model_load=True)
        else:
            program = torch.export.export(copy.deepcopy(model), (images,)).run_decompositions({})
            target = ct.target.iOS18
            dense = ct.convert(program, minimum_deployment_target=target, skip_model_load=True)
            dense.save(str(path))
        program = load(path)
        (name,) = (feature.name for feature in program.inputs)

        def run(batch: torch.Tensor) -> torch.Tensor:
            (output,) = program.run({name: batch.numpy()}).outputs.values()
            return torch.as_tensor(output)

        size = sum(file.stat().st_size for file in path.rglob("weight.bin"))
        return accuracy(run), size


def table(title: str, models: dict[str, nn.Module]) -> None:
    """Export models and print what became of them."""
    print(f"\n{title}\n{'':24}{'accuracy':>10}{'weights':>12}")
    for name, model in models.items():
        found, size = exported(model)
        print(f"{name:24}{found:>10.1%}{size / 1024:>8.1f} KiB")
