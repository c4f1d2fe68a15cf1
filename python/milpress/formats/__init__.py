"""The numeric layer: arrays in, immutable compressed values out.

`palettize`, `quantize` and `sparsify` take a weight as a NumPy array or a torch CPU tensor and
return a `Palette`, `Quantized` or `Sparse`, whose ``dense()`` restores the weight.
"""

from milpress.formats.palette import Palette, PalettizeConfig, palettize
from milpress.formats.quantized import (
    Granularity,
    PerBlock,
    PerChannel,
    PerTensor,
    QuantizeConfig,
    Quantized,
    quantize,
)
from milpress.formats.sparse import PruneConfig, Sparse, sparsify

__all__ = [
    "Granularity",
    "Palette",
    "PalettizeConfig",
    "PerBlock",
    "PerChannel",
    "PerTensor",
    "PruneConfig",
    "QuantizeConfig",
    "Quantized",
    "Sparse",
    "palettize",
    "quantize",
    "sparsify",
]
