"""The numeric layer: arrays in, immutable compressed values out.

`palettize`, `quantize` and `sparsify` take a weight as a NumPy array or a torch CPU tensor and
return a `Palette`, `Quantized` or `Sparse`, whose ``dense()`` restores the weight; `compress` goes
on with such a value, which may give a `Masked` one.
"""

from milpress.formats.joint import Compressed, Masked, Treatment, compress
from milpress.formats.palette import (
    Custom,
    KMeans,
    Palette,
    PalettizeConfig,
    Table,
    Uniform,
    Unique,
    palettize,
)
from milpress.formats.quantized import (
    Blocks,
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
    "Blocks",
    "Compressed",
    "Custom",
    "Granularity",
    "KMeans",
    "Masked",
    "Palette",
    "PalettizeConfig",
    "PerBlock",
    "PerChannel",
    "PerTensor",
    "PruneConfig",
    "QuantizeConfig",
    "Quantized",
    "Sparse",
    "Table",
    "Treatment",
    "Uniform",
    "Unique",
    "compress",
    "palettize",
    "quantize",
    "sparsify",
]
