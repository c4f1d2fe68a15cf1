"""The names of ``coremltools.optimize.torch``, with milpress behind them.

A user changes one import: ``import milpress as cto``, then
``cto.torch.palettization.PostTrainingPalettizer(...)``.
"""

from milpress.torch import (
    base_model_optimizer,
    decoders,
    layerwise_compression,
    optimization_config,
    palettization,
    pruning,
    quantization,
)
from milpress.torch.checkpoints import load_compressed
from milpress.torch.conversion import convert
from milpress.torch.registration import register_module

__all__ = [
    "base_model_optimizer",
    "convert",
    "decoders",
    "layerwise_compression",
    "load_compressed",
    "optimization_config",
    "palettization",
    "pruning",
    "quantization",
    "register_module",
]
