"""Rounding with error feedback: GPTQ and SparseGPT, onto integers, lookup tables and zeros.

What rounding a column of a weight does to the output of its layer is made up for, as well as the
inputs allow, by the columns that are rounded later (Frantar et al. 2022, arXiv 2210.17323; Frantar
and Alistarh 2023, arXiv 2301.00774).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from milpress.formats._rounding import (
    F32,
    Factors,
    Grid,
    Integers,
    Rounding,
    Tables,
    begins_of,
    blocks_of,
)
from milpress.formats.factor import Factor, FeedbackConfig, factor_bytes, factorize
from milpress.formats.joint import Compressed, Masked, Treatment, masked
from milpress.formats.palette import KMeans, Palette, PalettizeConfig, Uniform
from milpress.formats.palette import palettize as palettize_nearest
from milpress.formats.quantized import Blocks, QuantizeConfig, Quantized
from milpress.formats.rows import Floats, frozen
from milpress.formats.sparse import PruneConfig, Sparse, sparsify

__all__ = [
    "Factor",
    "Factors",
    "FeedbackConfig",
    "compress",
    "factor_bytes",
    "factorize",
    "fits",
    "palettize",
    "power_of_inputs",
    "prune",
    "quantize",
    "suits",
]


def power_of_inputs(factor: Factors, shape: tuple[int, ...]) -> F32:
    """Return what an error of each element of a weight counts, if it is not fed back."""
    power = np.concatenate([block.power for block in blocks_of(factor)], axis=1)
    rows = np.repeat(power, shape[0] // len(power), axis=0)
    greatest = float(rows.max())
    rows = rows / greatest if greatest > 0 else np.ones_like(rows)
    return np.ascontiguousarray(rows.reshape(shape), np.float32)


def fits(factor: Factors, treatment: Treatment) -> bool:
    """Whether no n:m run of a treatment crosses the blocks of columns of factors."""
    runs = treatment.n_m if isinstance(treatment, PruneConfig) else None
    return runs is None or all(begin % runs[1] == 0 for begin in begins_of(blocks_of(factor)))


def suits(weight: Any, treatment: Treatment) -> bool:
    """Whether errors of a treatment can be fed back: of a dense or pruned weight, to single values.

    Output channels are the weight's first axis, input channels its second one.
    """
    if isinstance(weight, Sparse):
        return not isinstance(treatment, PruneConfig)
    if not isinstance(weight, np.ndarray):
        return False
    if isinstance(treatment, PalettizeConfig):
        return treatment.vector_size == 1 and isinstance(treatment.table, (KMeans, Uniform))
    if isinstance(treatment, QuantizeConfig):
        return not isinstance(treatment.granularity, Blocks)
    if treatment.n_m is not None:
        return treatment.axis in (None, 1)
    return treatment.sparsity is not None and treatment.block_size is None


def compress(
    weight: Floats | Sparse,
    treatment: Treatment,
    factor: Factors,
    config: FeedbackConfig | None = None,
    *,
    importance: Any = None,
) -> Compressed:
    """Do what `milpress.formats.compress` does, with error feedback, where it `suits`.

    Parameters
    ----------
    weight
        A dense weight, or a pruned one, whose zeros stay.
    treatment
        What to do.
    factor, config
        What is known of the inputs, all together or in blocks of columns, and how errors are fed
        back.
    importance
        Weight of each element in the squared error that tables make least; ``None`` takes the power
        of the inputs.
    """
    kept = weight.mask() if isinstance(weight, Sparse) else None
    dense = weight.dense() if isinstance(weight, Sparse) else weight
    if isinstance(treatment, PruneConfig):
        return prune(dense, treatment, factor, config)
    if isinstance(treatment, QuantizeConfig):
        return quantize(dense, treatment, factor, config, kept=kept)
    share = power_of_inputs(factor, dense.shape) if importance is None else importance
    share = share if kept is None else share * kept
    tables = palettize_nearest(dense, treatment, importance=share)
    return palettize(dense, tables, factor, config, kept=kept)


def quantize(
    weight: Floats,
    treatment: QuantizeConfig,
    factor: Factors,
    config: FeedbackConfig | None = None,
    *,
    pruning: PruneConfig | None = None,
    kept: NDArray[np.bool_] | None = None,
    bits: int | None = None,
    representable: Callable[[F32], F32] | None = None,
) -> Quantized | Masked:
    """Replace a weight by integer codes with a scale for each block, with error feedback.

    A range is that of coremltools' ``LayerwiseCompressor``: ``2**bits`` codes from the least to the
    greatest weight, or from minus to plus the greatest magnitude; with ``range="mse"`` the one that
    `milpress.formats.quantize` finds. Blocks get theirs when it is their turn, so that it suits
    what was fed back; in activation order all have it from the weight as it was.

    Parameters
    ----------
    weight
        float16 or float32; output channels are its first axis, input channels its second one.
    treatment
        What to round to: per tensor, per channel, or per block of input channels.
    factor, config
        What is known of the inputs, and how errors are fed back.
    pruning
        Which weights become zero besides: ``sparsity`` or ``n_m``.
    kept
        Of the weight's shape: elements that are not zero already; ``None`` for all.
    bits
        Width of the codes that are used, if less than that of the type.
    representable
        Rounds scales to what the weight's type can hold; by default to that of the array.

    Raises
    ------
    ConfigError
        If the granularity is another one, or a block does not divide the input channels.
    """
    bits = treatment.bits if bits is None else bits
    rounding = Rounding(weight, factor, config, pruning, kept)
    grid = Integers(weight, treatment, bits, rounding.n_groups, representable)
    codes, mask, _ = rounding.onto(grid)
    middle = 2 ** (bits - 1)
    scale, offset = grid.scale_and_offset()
    if treatment.signed:
        codes = (codes.astype(np.int16) - middle).astype(np.int8)
        offset = offset - middle
    has_offset = treatment.offset or not treatment.signed
    value = Quantized(
        codes=frozen(codes),
        scale=frozen(scale.astype(weight.dtype)),
        offset=frozen(offset.astype(codes.dtype)) if has_offset else None,
        bits=treatment.bits,
    )
    return value if mask is None else masked(value, mask)


def palettize(
    weight: Floats,
    tables: Palette,
    factor: Factors,
    config: FeedbackConfig | None = None,
    *,
    scale: Floats | None = None,
    pruning: PruneConfig | None = None,
    kept: NDArray[np.bool_] | None = None,
) -> Palette | Masked:
    """Replace a weight by indices into tables that are given, with error feedback.

    Parameters
    ----------
    weight, factor, config, pruning, kept
        As of `quantize`.
    tables
        A palette of the weight, of single values; its indices are not used.
    scale
        One for each output channel, of the weight's rank: the tables are of the weight divided by
        it.
    """
    scaled = weight if scale is None else np.divide(weight, scale, dtype=np.float32)
    rounding = Rounding(scaled, factor, config, pruning, kept)
    codes, mask, _ = rounding.onto(Tables(weight.shape, tables, rounding.n_groups))
    value = replace(tables, codes=frozen(codes))
    return value if mask is None else masked(value, mask)


def prune(
    weight: Floats,
    pruning: PruneConfig,
    factor: Factors,
    config: FeedbackConfig | None = None,
    *,
    kept: NDArray[np.bool_] | None = None,
    representable: Callable[[F32], F32] | None = None,
) -> Sparse:
    """Make weights zero and change the others so that the layer's output suffers least.

    Parameters
    ----------
    weight, factor, config, kept
        As of `quantize`.
    pruning
        How many: ``sparsity`` or ``n_m``.
    representable
        Rounds weights to what their type can hold; by default to that of the array.
    """
    _, _, dense = Rounding(weight, factor, config, pruning, kept).onto(Grid())
    dense = dense if representable is None else representable(dense)
    return sparsify(dense.astype(weight.dtype), PruneConfig(threshold=0.0))
