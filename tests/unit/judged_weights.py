"""Weights, treatments and what is made of them, for tests of what verification says of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

import milpress._core as _core
from milpress import formats as f
from milpress.recipe import treatment_dict

NORMAL = np.random.default_rng(3).standard_normal((16, 16)).astype(np.float16)
INT8, PALETTE = f.QuantizeConfig(), f.PalettizeConfig(bits=3)
LUT8 = f.QuantizeConfig(granularity=f.PerTensor())
PRUNINGS = {
    "n_m": f.PruneConfig(n_m=(2, 4)),
    "n_m axis 0": f.PruneConfig(n_m=(1, 3), axis=0),
    "blocks": f.PruneConfig(sparsity=0.5, block_size=2),
    "sparsity": f.PruneConfig(sparsity=0.5),
    "threshold": f.PruneConfig(threshold=0.7),
}


def steps_of(*configs: f.Treatment) -> tuple[Any, ...]:
    return tuple(treatment_dict(config) for config in configs)


def sparse(source: np.ndarray, kept: np.ndarray, nonzeros: np.ndarray | None = None) -> f.Sparse:
    bitmask = _core.pack(np.ascontiguousarray(kept).view(np.uint8).reshape(-1), 1)
    nonzeros = source[kept] if nonzeros is None else nonzeros
    return f.Sparse(shape=source.shape, bitmask=bitmask, nonzeros=nonzeros)


def chained(source: np.ndarray, *configs: f.Treatment) -> Any:
    value: Any = source
    for config in configs:
        value = f.compress(value, config)
    return value


def with_mask(value: f.Masked, mask: np.ndarray) -> f.Masked:
    """Return a value with another mask; codes that it had dropped are 0."""
    return replace(value, bitmask=_core.pack(mask.view(np.uint8).reshape(-1), 1))


def with_tables(value: f.Palette, order: slice) -> f.Palette:
    return replace(value, lut=np.ascontiguousarray(value.lut[..., order, :]))
