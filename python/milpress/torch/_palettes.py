"""Palettes for the weights of modules, as the configs of this package ask for them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal, cast

import numpy as np
import torch
from attrs import define
from numpy.typing import NDArray

from milpress.errors import ConfigError, UnsupportedError
from milpress.formats import Blocks, Palette, PalettizeConfig, QuantizeConfig, Quantized, quantize
from milpress.formats.joint import masked
from milpress.formats.palette import Bits, folded_bytes, palettize, palettize_scaled, reassigned
from milpress.formats.quantized import IntDType
from milpress.formats.rows import Floats, divisor_of
from milpress.plain import fields
from milpress.torch import _fields, _metadata
from milpress.torch._compression import WeightOutcome
from milpress.torch._metadata import Stored
from milpress.torch._module_weights import ModuleWeight, representable
from milpress.torch.optimization_config import (
    ModuleOptimizationConfig,
    PalettizationGranularity,
)

BITS = (1, 2, 3, 4, 6, 8)


@define
class ModulePaletteConfig(ModuleOptimizationConfig):
    """The fields that the configs of all palettizers share."""

    n_bits: int = _fields.option(4, BITS)
    lut_dtype: torch.dtype | None = _fields.torch_type(
        None, {"int8": torch.int8, "uint8": torch.uint8}
    )
    granularity: PalettizationGranularity = _fields.enumerated(PalettizationGranularity.per_tensor)
    group_size: int | None = fields.integer(None)
    channel_axis: int = _fields.option(0, (0, 1))
    cluster_dim: int | None = fields.integer(None, fields.at_least(1))
    enable_per_channel_scale: bool = _fields.flag()
    on_indivisible: Literal["leave", "divisor"] = fields.choice("leave", "divisor")

    @group_size.validator
    def _check_group_size(self, _attribute: Any, group_size: Any) -> None:
        grouped = self.granularity is PalettizationGranularity.per_grouped_channel
        if not grouped and group_size is not None:
            msg = (
                "group_size can't be specified along with per_tensor granularity, "
                f"got {group_size!r}"
            )
            raise ConfigError(msg)
        if grouped and group_size is None:
            msg = "group_size has to be specified along with per_grouped_channel granularity."
            raise ConfigError(msg)
        if group_size is not None and group_size < 1:
            msg = f"group_size should be greater than zero, got {group_size}"
            raise ConfigError(msg)

    @enable_per_channel_scale.validator
    def _check_scale(self, _attribute: Any, enabled: Any) -> None:
        if enabled and self.cluster_dim is not None and self.cluster_dim > 1:
            msg = (
                f"Enabling per_channel_scale is not supported for cluster_dim={self.cluster_dim} "
                "larger than 1"
            )
            raise ConfigError(msg)


def palettized(
    weight: ModuleWeight,
    array: Floats,
    config: ModulePaletteConfig,
    importance: NDArray[np.float32] | None = None,
) -> WeightOutcome:
    """Palettize a weight, with ``importance`` as that of each element in the squared error.

    Raises
    ------
    UnsupportedError
        If the weight can't be palettized so.
    """
    treatment, notes = fitted(weight, array.shape, config, bits=cast("Bits", config.n_bits))
    mask = array != 0 if _metadata.is_pruned(weight) else None
    if mask is not None:
        if treatment.vector_size > 1:
            msg = "a pruned weight can't be palettized by vectors"
            raise UnsupportedError(msg)
        kept = mask.astype(np.float32)
        importance = kept if importance is None else importance * kept
    output = weight.axes[0]
    scale = None
    if treatment.channel_scale:
        palette, scale = palettize_scaled(
            array, treatment, channel_axis=output, importance=importance
        )
    else:
        palette = palettize(array, treatment, channel_axis=output, importance=importance)
    if config.lut_dtype is not None:
        palette = with_integer_lut(palette, config.lut_dtype)
        if scale is not None:
            palette, scale = folded(palette, scale, output), None
        if palette.vector_size == 1:
            palette = reassigned(palette, array)
    elif scale is None:
        palette = replace(palette, lut=representable(palette.entries, weight.dtype))
    value = palette if mask is None else masked(palette, mask)
    return WeightOutcome(Stored(value, scale), treatment, tuple(notes))


def fitted(
    weight: ModuleWeight,
    shape: tuple[int, ...],
    config: ModulePaletteConfig,
    *,
    bits: Bits,
    axis: int | None = None,
) -> tuple[PalettizeConfig, list[str]]:
    """Return the treatment that fits a weight's shape, and how it differs from the config.

    ``axis`` is that of groups and vectors, if it is not the one that the config names.
    """
    output = weight.axes[0] if len(shape) > 1 else 0
    axis = (weight.axes[config.channel_axis] if len(shape) > 1 else 0) if axis is None else axis
    notes = []
    group_size = config.group_size
    vector_size = config.cluster_dim or 1
    if group_size is not None:
        size, note = divisor_of(
            "group",
            group_size,
            shape,
            axis,
            output,
            config.on_indivisible,
            multiple_of=vector_size,
        )
        if size is None:
            raise UnsupportedError(note)
        group_size = size if size <= group_size else None
        notes.extend([note] if note else [])
    n = group_size or shape[axis]
    if n % vector_size:
        msg = f"vectors of {vector_size} (cluster_dim) don't divide {n} channels"
        raise UnsupportedError(msg)
    if axis == 0 and shape[0] // weight.n_conv_groups % vector_size:
        msg = f"vectors of {vector_size} (cluster_dim) don't divide the channels of a conv group"
        raise UnsupportedError(msg)
    treatment = PalettizeConfig(
        bits=bits,
        group_size=group_size,
        channel_axis=axis,
        vector_size=vector_size,
        channel_scale=config.enable_per_channel_scale,
    )
    if treatment.channel_scale and config.lut_dtype is not None:
        itemsize = 4 if weight.tensor is None else max(2, weight.tensor.itemsize)
        if isinstance(config.lut_dtype, str) and config.lut_dtype[0] not in "iu":
            return treatment, notes
        if folded_bytes(shape, 1, treatment, output, axis) >= itemsize * math.prod(shape):
            treatment = replace(treatment, channel_scale=False)
            notes.append("without scales, as tables with them would be larger than the weight")
    return treatment, notes


def with_integer_lut(palette: Palette, dtype: torch.dtype) -> Palette:
    """Store each table as integers with a scale of its own."""
    lut = cast("Floats", palette.lut)
    whole_table = Blocks((1,) * (lut.ndim - 2) + (0, 0))
    name: IntDType = "uint8" if dtype == torch.uint8 else "int8"
    return replace(palette, lut=quantize(lut, QuantizeConfig(dtype=name, granularity=whole_table)))


def folded(palette: Palette, scale: Floats, output: int) -> Palette:
    """Give each output channel its own copy of its table, with a scale that has both."""
    lut = cast("Quantized", palette.lut)
    n_copies = scale.shape[output] // lut.codes.shape[output]
    offset = None if lut.offset is None else np.repeat(lut.offset, n_copies, output)
    folded = Quantized(
        codes=np.repeat(lut.codes, n_copies, output),
        scale=np.repeat(lut.scale, n_copies, output) * scale[..., None, None],
        offset=offset,
        bits=8,
    )
    return replace(palette, lut=folded)
