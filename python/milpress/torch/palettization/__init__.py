"""Weights as indices into lookup tables."""

from milpress.torch.palettization.fake_palettize import FakePalettize
from milpress.torch.palettization.palettization_config import (
    DKMPalettizerConfig,
    ModuleDKMPalettizerConfig,
)
from milpress.torch.palettization.palettizer import DKMPalettizer
from milpress.torch.palettization.post_training_palettization import (
    ModulePostTrainingPalettizerConfig,
    PostTrainingPalettizer,
    PostTrainingPalettizerConfig,
)
from milpress.torch.palettization.sensitive_k_means import (
    ModuleSKMPalettizerConfig,
    SKMPalettizer,
    SKMPalettizerConfig,
)

__all__ = [
    "DKMPalettizer",
    "DKMPalettizerConfig",
    "FakePalettize",
    "ModuleDKMPalettizerConfig",
    "ModulePostTrainingPalettizerConfig",
    "ModuleSKMPalettizerConfig",
    "PostTrainingPalettizer",
    "PostTrainingPalettizerConfig",
    "SKMPalettizer",
    "SKMPalettizerConfig",
]
