"""Compression layer by layer, each making up for what rounding does to its output."""

from milpress.torch.layerwise_compression import algorithms, input_cacher, layerwise_compressor
from milpress.torch.layerwise_compression.algorithms import (
    GPTQ,
    GPTQPalette,
    LayerwiseCompressionAlgorithm,
    LayerwiseCompressionAlgorithmConfig,
    ModuleGPTQConfig,
    ModuleGPTQPaletteConfig,
    ModuleSparseGPTConfig,
    SparseGPT,
)
from milpress.torch.layerwise_compression.input_cacher import (
    DefaultInputCacher,
    FirstLayerInputCacher,
    GPTFirstLayerInputCacher,
)
from milpress.torch.layerwise_compression.layerwise_compressor import (
    LayerwiseCompressor,
    LayerwiseCompressorConfig,
)

__all__ = [
    "GPTQ",
    "DefaultInputCacher",
    "FirstLayerInputCacher",
    "GPTFirstLayerInputCacher",
    "GPTQPalette",
    "LayerwiseCompressionAlgorithm",
    "LayerwiseCompressionAlgorithmConfig",
    "LayerwiseCompressor",
    "LayerwiseCompressorConfig",
    "ModuleGPTQConfig",
    "ModuleGPTQPaletteConfig",
    "ModuleSparseGPTConfig",
    "SparseGPT",
    "algorithms",
    "input_cacher",
    "layerwise_compressor",
]
