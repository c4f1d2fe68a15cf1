"""Weights as indices into lookup tables."""

from milpress.torch.palettization.post_training_palettization import (
    ModulePostTrainingPalettizerConfig,
    PostTrainingPalettizer,
    PostTrainingPalettizerConfig,
)

__all__ = [
    "ModulePostTrainingPalettizerConfig",
    "PostTrainingPalettizer",
    "PostTrainingPalettizerConfig",
]
