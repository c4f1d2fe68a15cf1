"""Weights that become zero while a model is trained."""

from milpress.torch.pruning.magnitude_pruner import (
    MagnitudePruner,
    MagnitudePrunerConfig,
    ModuleMagnitudePrunerConfig,
)
from milpress.torch.pruning.pruning_scheduler import (
    ConstantSparsityScheduler,
    PolynomialDecayScheduler,
    PruningScheduler,
)

__all__ = [
    "ConstantSparsityScheduler",
    "MagnitudePruner",
    "MagnitudePrunerConfig",
    "ModuleMagnitudePrunerConfig",
    "PolynomialDecayScheduler",
    "PruningScheduler",
]
