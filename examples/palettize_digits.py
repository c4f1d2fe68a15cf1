"""Palettize a network with 2 bits while it is trained on, and export it."""

from __future__ import annotations

from digits import FINE_TUNING_EPOCHS, table, train, trained
from torch import nn

from milpress.torch.palettization import (
    DKMPalettizer,
    DKMPalettizerConfig,
    PostTrainingPalettizer,
    PostTrainingPalettizerConfig,
)


def data_free(model: nn.Module) -> nn.Module:
    """Return a model with tables of four entries, made from its weights alone."""
    config = PostTrainingPalettizerConfig.from_dict({"global_config": {"n_bits": 2}})
    return PostTrainingPalettizer(model, config).compress().eval()


def fine_tuned(model: nn.Module, seed: int = 0) -> nn.Module:
    """Return a model whose tables of four entries, and weights, were trained."""
    settings = {"n_bits": 2, "weight_threshold": 0, "palett_tau": 1e-3}
    config = DKMPalettizerConfig.from_dict({"global_config": settings})
    palettizer = DKMPalettizer(model, config)
    train(palettizer.prepare(), FINE_TUNING_EPOCHS, 1e-3, [palettizer], seed)
    return palettizer.finalize()


def main() -> None:
    """Print accuracy and size of the float, the palettized and the fine-tuned model."""
    model = trained()
    models = {"float": model, "data-free": data_free(model), "fine-tuned": fine_tuned(model)}
    table("2 bits for each weight", models)


if __name__ == "__main__":
    main()
