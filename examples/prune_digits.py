"""Prune three quarters of a network while it is trained on, and export it."""

from __future__ import annotations

from typing import Any

from digits import FINE_TUNING_EPOCHS, table, train, trained
from torch import nn

from milpress.torch.pruning import MagnitudePruner, MagnitudePrunerConfig


def pruned(model: nn.Module, scheduler: dict[str, Any], epochs: int, seed: int = 0) -> nn.Module:
    """Return a model three quarters of whose weights are zero."""
    settings = {"scheduler": scheduler, "target_sparsity": 0.75}
    config = MagnitudePrunerConfig.from_dict({"global_config": settings})
    pruner = MagnitudePruner(model, config)
    prepared = pruner.prepare()
    if epochs:
        train(prepared, epochs, 1e-3, [pruner], seed)
    else:
        pruner.step()
    return pruner.finalize().eval()


def main() -> None:
    """Print accuracy and size of the float, the pruned and the fine-tuned model."""
    model = trained()
    gradually = {"update_steps": "range(0, 270, 18)"}
    models = {
        "float": model,
        "data-free": pruned(model, {"begin_step": 0}, 0),
        "fine-tuned": pruned(model, gradually, FINE_TUNING_EPOCHS),
    }
    table("75 % of the weights are zero", models)


if __name__ == "__main__":
    main()
