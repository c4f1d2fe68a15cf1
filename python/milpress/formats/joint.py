"""Joint compression: a treatment applied to what another one made."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

import milpress._core as _core
from milpress.errors import UnsupportedError
from milpress.formats.palette import Palette, PalettizeConfig, palettize, reassigned
from milpress.formats.quantized import PerTensor, QuantizeConfig, Quantized, quantize
from milpress.formats.rows import Floats, checked_importance, frozen, packed_mask, unpacked_mask
from milpress.formats.sparse import PruneConfig, Sparse, bitmask_of, n_pruned, sparsify
from milpress.kernels.device import Placement, kernels_for, using

# Core ML stores smaller tensors in the model itself.
_MIN_ELEMENTS = 10


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Masked:
    """A palette or quantized weight that is zero, and stores no code, outside a mask.

    Parameters
    ----------
    bitmask
        uint8, one bit a code of the flattened ``value``, least significant first, set where a code
        is stored.
    value
        The weight; its codes are 0 outside the mask.
    """

    bitmask: NDArray[np.uint8]
    value: Palette | Quantized

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense weight."""
        return self.value.shape

    def code_mask(self) -> NDArray[np.bool_]:
        """Return the mask, one element a code."""
        return unpacked_mask(self.bitmask, self.value.codes.shape)

    def mask(self) -> NDArray[np.bool_]:
        """Return the mask, one element a weight."""
        mask = self.code_mask()
        if isinstance(self.value, Palette) and self.value.vector_axis is not None:
            return np.repeat(mask, self.value.vector_size, self.value.vector_axis)
        return mask

    def nonzero_codes(self) -> NDArray[np.int8] | NDArray[np.uint8]:
        """Return the codes that are stored, in order."""
        return self.value.codes[self.code_mask()]

    def dense(self) -> Floats:
        """Return the weight, zero where no code is stored."""
        dense = self.value.dense()
        return np.where(self.mask(), dense, dense.dtype.type(0))


Compressed: TypeAlias = Palette | Quantized | Sparse | Masked
Treatment: TypeAlias = PalettizeConfig | QuantizeConfig | PruneConfig


def compress(
    weight: Floats | Compressed,
    treatment: Treatment,
    *,
    channel_axis: int = 0,
    input_axis: int = 1,
    importance: Any = None,
    device: Placement = None,
) -> Compressed:
    """Apply a treatment to a weight, or to what earlier treatments made of it.

    Pruned weights are palettized (the zeros have no influence on the tables) or quantized;
    palettes have their tables quantized; quantized weights have their codes palettized; both can be
    pruned.

    Parameters
    ----------
    weight
        A float16, bfloat16 or float32 array, or a compressed value.
    treatment
        What to do.
    channel_axis, input_axis
        Axes of the output and input channels.
    importance
        Weight of each element in the squared error, of the same shape, where k-means or a clipped
        range makes that least for a weight that is dense or pruned; ``None`` for equal weight.
    device
        Where the kernels run: ``"cpu"``, ``"metal"`` or ``"auto"``; ``None`` for that of the
        workflow around, else the CPU. The result is the same.

    Raises
    ------
    ConfigError
        If the treatment does not fit the weight's shape.
    UnsupportedError
        If the weight does not suit it, or has been treated so already.
    """
    with using(device):
        if isinstance(weight, Sparse):
            return _on_sparse(weight, treatment, channel_axis, input_axis, importance)
        if isinstance(weight, (Palette, Quantized, Masked)):
            return _on_codes(weight, treatment, channel_axis)
        if isinstance(treatment, PalettizeConfig):
            return palettize(weight, treatment, channel_axis=channel_axis, importance=importance)
        if isinstance(treatment, QuantizeConfig):
            return quantize(
                weight,
                treatment,
                channel_axis=channel_axis,
                input_axis=input_axis,
                importance=importance,
            )
        return sparsify(weight, treatment)


def _refused(treatment: Treatment, what: str) -> UnsupportedError:
    word = {PalettizeConfig: "palettized", QuantizeConfig: "quantized", PruneConfig: "pruned"}
    return UnsupportedError(f"{what} can't be {word[type(treatment)]} again")


def _on_sparse(
    value: Sparse, treatment: Treatment, channel_axis: int, input_axis: int, importance: Any
) -> Masked:
    if value.nonzeros.size < _MIN_ELEMENTS:
        msg = f"only {value.nonzeros.size} values are not zero, too few to be worth codes"
        raise UnsupportedError(msg)
    dense, mask = value.dense(), value.mask()
    share = mask.astype(np.float32)
    if importance is not None:
        share *= checked_importance(importance, dense.shape)
    if isinstance(treatment, PalettizeConfig):
        palette = palettize(dense, treatment, channel_axis=channel_axis, importance=share)
        return masked(palette, mask)
    if isinstance(treatment, QuantizeConfig):
        quantized = quantize(
            dense,
            treatment,
            channel_axis=channel_axis,
            input_axis=input_axis,
            importance=None if importance is None else share,
        )
        return masked(quantized, mask)
    raise _refused(treatment, "a pruned weight")


def _on_codes(
    value: Palette | Quantized | Masked, treatment: Treatment, channel_axis: int
) -> Compressed:
    if isinstance(treatment, QuantizeConfig):
        if isinstance(value, Palette):
            return _with_quantized_lut(value, treatment)
        if isinstance(value, Masked) and isinstance(value.value, Palette):
            return replace(value, value=_with_quantized_lut(value.value, treatment))
    if isinstance(value, Masked):
        raise _refused(treatment, "a pruned weight with codes")
    if isinstance(treatment, PruneConfig):
        return _pruned(value, treatment)
    if isinstance(value, Quantized) and isinstance(treatment, PalettizeConfig):
        return _palettized_codes(value, treatment, channel_axis)
    raise _refused(treatment, "a palette" if isinstance(value, Palette) else "a quantized weight")


def masked(value: Palette | Quantized, mask: NDArray[np.bool_]) -> Masked:
    """Drop the codes outside a mask that has one element a weight.

    The code of a vector is kept if any of its weights is.
    """
    if isinstance(value, Palette) and value.vector_axis is not None:
        axis, shape = value.vector_axis, value.codes.shape
        parts = (*shape[: axis + 1], value.vector_size, *shape[axis + 1 :])
        mask = np.asarray(mask.reshape(parts).any(axis=axis + 1))
    codes = np.where(mask, value.codes, value.codes.dtype.type(0))
    return Masked(bitmask=frozen(packed_mask(mask)), value=replace(value, codes=frozen(codes)))


def _pruned(value: Palette | Quantized, treatment: PruneConfig) -> Masked:
    dense = value.dense()
    if isinstance(value, Palette) and value.vector_axis is not None:
        if treatment.sparsity is None or treatment.block_size is not None:
            msg = "a palette of vectors can only be pruned by sparsity, whole vectors at a time"
            raise UnsupportedError(msg)
        axis, shape = value.vector_axis, dense.shape
        around = math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])
        n_zeros = n_pruned(dense.size, treatment.sparsity)
        bitmask = kernels_for(None).dispatch(_core.keep_blocks)(
            dense.reshape(-1), *around, value.vector_size, n_zeros
        )
    else:
        bitmask = bitmask_of(dense, treatment)
    return masked(value, unpacked_mask(bitmask, dense.shape))


def _with_quantized_lut(value: Palette, treatment: QuantizeConfig) -> Palette:
    """Store the tables of a palette as codes of 8 bits with one scale."""
    if isinstance(value.lut, Quantized):
        raise _refused(treatment, "a table")
    if not isinstance(treatment.granularity, PerTensor) or treatment.bits != 8:
        msg = "the tables of a palette must be quantized to 8 bits per tensor"
        raise UnsupportedError(msg)
    if value.lut.size < _MIN_ELEMENTS:
        msg = f"a table of {value.lut.size} entries is too small to be worth quantizing"
        raise UnsupportedError(msg)
    return replace(value, lut=quantize(value.lut, treatment))


def _palettized_codes(value: Quantized, treatment: PalettizeConfig, channel_axis: int) -> Palette:
    """Palettize the codes of a quantized weight; its tables hold codes, with the weight's scales.

    Scales belong to channels or blocks, and so do the tables that they are applied to.
    """
    if treatment.channel_scale or treatment.vector_size > 1 or value.bits != 8:
        msg = "codes of 8 bits must be palettized singly and without further scales"
        raise UnsupportedError(msg)
    codes = palettize(value.codes.astype(np.float32), treatment, channel_axis=channel_axis)
    info = np.iinfo(value.codes.dtype)
    lut = np.rint(codes.entries).clip(info.min, info.max).astype(np.float32)
    codes = reassigned(replace(codes, lut=lut), value.codes.astype(np.float32))
    table = lut
    for axis, (n, m) in enumerate(zip(lut.shape, value.scale.shape, strict=False)):
        table = np.repeat(table, math.lcm(n, m) // n, axis)
    quantized = Quantized(
        codes=frozen(table.astype(value.codes.dtype)),
        scale=value.scale[..., None, None],
        offset=None if value.offset is None else value.offset[..., None, None],
        bits=8,
    )
    return replace(codes, lut=quantized)
