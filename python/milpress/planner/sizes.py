"""What treatments make of a weight's size, and of a package's, without treating anything."""

from __future__ import annotations

from typing import Any

import numpy as np

from milpress.compression.packages import compress_package
from milpress.compression.requests import RecipeWishes
from milpress.compression.treating import Order, Treated
from milpress.compression.writer import Rewriter
from milpress.errors import UnsupportedError
from milpress.formats import (
    Compressed,
    Palette,
    PalettizeConfig,
    PerBlock,
    PerTensor,
    QuantizeConfig,
    Quantized,
    Treatment,
)
from milpress.mil import constexpr
from milpress.mil.package import Package
from milpress.mil.weights import Weight
from milpress.recipe import Recipe


def treated_bytes(weight: Weight, treatment: Treatment, *, early: bool) -> int:
    """Return how many bytes a weight takes that a treatment, which suits its shape, has made.

    ``early`` says that its program's opset is below CoreML8.
    """
    return constexpr.payload_bytes(_blank(weight, treatment), early=early)


def package_bytes(package: Package, recipe: Recipe) -> int:
    """Return the size of the package that a recipe makes, to the byte."""
    return compress_package(
        package,
        package.path,
        RecipeWishes(recipe),
        target=recipe.target,
        dry_run=True,
        may_be_idle=True,
        rewriter=_Blanks,
    ).package_bytes_after


class _Blanks(Rewriter):
    """Writes zeros in place of what treatments make: as many, and of the same form."""

    def _treated(self, order: Order) -> Treated:
        if len(order.treatments) != 1:
            msg = f"{order.weight.name}: a plan must have one treatment a weight, got several"
            raise UnsupportedError(msg)
        (treatment,) = order.treatments
        suffix = constexpr.suffixed("", None, treatment)
        return Treated(_blank(order.weight, treatment), suffix, order.treatments, (), {}, (False,))


def _blank(weight: Weight, treatment: Treatment) -> Compressed:
    """Return a value of the form that a treatment gives a weight, all zero.

    Zeros that nobody looks at take no memory.
    """
    floats = weight.dtype.storage
    output, inputs = weight.channel_axes or (0, 1)
    shape = weight.shape
    grid = [1] * len(shape)
    if isinstance(treatment, PalettizeConfig):
        axis = output if treatment.channel_axis is None else treatment.channel_axis
        if treatment.group_size is not None:
            grid[axis] = shape[axis] // treatment.group_size
        if treatment.channel_scale:
            grid[output] = shape[output]
        bits: Any = treatment.bits
        lut = np.zeros((*grid, 2**bits, 1), floats)
        return Palette(codes=np.zeros(shape, np.uint8), lut=lut, bits=bits)
    if not isinstance(treatment, QuantizeConfig):
        msg = f"{weight.name}: a plan must palettize or quantize, got {treatment}"
        raise UnsupportedError(msg)
    if not isinstance(treatment.granularity, PerTensor):
        grid[output] = shape[output]
    if isinstance(treatment.granularity, PerBlock):
        grid[inputs] = shape[inputs] // treatment.granularity.size
    codes = np.dtype(np.int8 if treatment.signed else np.uint8)
    offset = treatment.offset or not treatment.signed
    return Quantized(
        codes=np.zeros(shape, codes),
        scale=np.zeros(grid, floats),
        offset=np.zeros(grid, codes) if offset else None,
        bits=treatment.bits,
    )
