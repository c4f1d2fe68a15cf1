"""What treatments make of a weight's size, and of a package's, without treating anything."""

from __future__ import annotations

from typing import Any

import numpy as np

from milpress.compression.packages import compress_package
from milpress.compression.requests import RecipeRequests
from milpress.compression.run import Run
from milpress.compression.treating import Job, Outcome
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
from milpress.kernels.device import Kernels
from milpress.mil import encode
from milpress.mil.package import Package
from milpress.mil.program import Weight
from milpress.recipe import Recipe


def treated_bytes(weight: Weight, treatment: Treatment) -> int:
    """Return how many bytes a weight takes once a treatment, which suits its shape, is applied."""
    return encode.payload_bytes(_blank(weight, treatment), weight.graph.opset)


def package_bytes(package: Package, recipe: Recipe) -> int:
    """Return the size of the package that a recipe makes, to the byte."""
    return compress_package(
        package,
        package.path,
        RecipeRequests(recipe),
        Run(dry_run=True),
        target=recipe.target,
        may_be_idle=True,
        make=_blank_outcome,
    ).package_bytes_after


def _blank_outcome(job: Job, kernels: Kernels) -> Outcome:  # noqa: ARG001
    """Return zeros in place of what a treatment makes: as many, and of the same form."""
    if len(job.treatments) != 1:
        msg = f"{job.weight.name}: a plan gives a weight one treatment, and this has several"
        raise UnsupportedError(msg)
    (treatment,) = job.treatments
    suffix = encode.suffixed("", None, treatment)
    return Outcome(_blank(job.weight, treatment), suffix, job.treatments, (), {}, (False,))


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
        size = treatment.vector_size
        lut = np.zeros((*grid, 2**bits, size), floats)
        indices = [n // size if i == axis else n for i, n in enumerate(shape)]
        return Palette(
            codes=np.zeros(indices, np.uint8),
            lut=lut,
            bits=bits,
            vector_axis=axis if size > 1 else None,
        )
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
