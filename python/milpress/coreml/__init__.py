"""The names of ``coremltools.optimize.coreml``, with milpress behind them.

A user changes one import: ``import milpress as cto``, then ``cto.coreml.palettize_weights(...)``.
"""

from __future__ import annotations

from milpress.coreml import experimental
from milpress.coreml.activations import linear_quantize_activations
from milpress.coreml.metadata import CoreMLOpMetaData, CoreMLWeightMetaData, get_weights_metadata
from milpress.coreml.op_config import (
    CompressionGranularity,
    OpCompressorConfig,
    OpLinearQuantizerConfig,
    OpMagnitudePrunerConfig,
    OpPalettizerConfig,
    OpThresholdPrunerConfig,
)
from milpress.coreml.optimization_config import OptimizationConfig
from milpress.coreml.weights import (
    decompress_weights,
    linear_quantize_weights,
    palettize_weights,
    prune_weights,
)

__all__ = [
    "CompressionGranularity",
    "CoreMLOpMetaData",
    "CoreMLWeightMetaData",
    "OpCompressorConfig",
    "OpLinearQuantizerConfig",
    "OpMagnitudePrunerConfig",
    "OpPalettizerConfig",
    "OpThresholdPrunerConfig",
    "OptimizationConfig",
    "decompress_weights",
    "experimental",
    "get_weights_metadata",
    "linear_quantize_activations",
    "linear_quantize_weights",
    "palettize_weights",
    "prune_weights",
]
