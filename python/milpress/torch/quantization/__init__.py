"""Weights as integers with a scale."""

from milpress.torch.quantization.post_training_quantization import (
    ModulePostTrainingQuantizerConfig,
    PostTrainingQuantizer,
    PostTrainingQuantizerConfig,
)
from milpress.torch.quantization.quantization_config import (
    LinearQuantizerConfig,
    ModuleLinearQuantizerConfig,
    ObserverType,
    QuantizationScheme,
)
from milpress.torch.quantization.quantizer import LinearQuantizer

__all__ = [
    "LinearQuantizer",
    "LinearQuantizerConfig",
    "ModuleLinearQuantizerConfig",
    "ModulePostTrainingQuantizerConfig",
    "ObserverType",
    "PostTrainingQuantizer",
    "PostTrainingQuantizerConfig",
    "QuantizationScheme",
]
