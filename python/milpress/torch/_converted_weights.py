"""Compressed weights of a module, and what becomes of them in a Core ML model."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from milpress.compression.report import WeightReport
from milpress.errors import UnsupportedError
from milpress.formats import Compressed, Masked, Palette, Quantized
from milpress.formats.fidelity import fidelity
from milpress.mil.encode import payload_bytes
from milpress.mil.opset import Opset
from milpress.mil.program import Weight
from milpress.show import decibels
from milpress.torch import _metadata, _relayout
from milpress.torch._compression import left
from milpress.torch._metadata import Stored
from milpress.torch._module_weights import ModuleWeight, whole
from milpress.torch.registration import RECURRENT

# Rounding tables and scales to float16 leaves an error of some 2^-22 of the power, and more where
# scales are below its normal numbers.
_MAX_NOISE = 2.0**-14

_UNFOUND = "no constant of the converted model holds it"


@dataclass(slots=True)
class ConvertedWeight:
    """A compressed weight of a module, and what became of it in the model."""

    weight: ModuleWeight
    stored: Stored
    report: WeightReport
    signal: float = 0.0
    noise: float = 0.0

    @classmethod
    def read(cls, weight: ModuleWeight) -> ConvertedWeight:
        """Read a weight from its module."""
        try:
            stored = _metadata.read(weight)
        except UnsupportedError as error:
            msg = f"{weight.name}: {error}"
            raise UnsupportedError(msg) from error
        _, report = left(weight, _UNFOUND)
        n_bytes = 4 * weight.size  # coremltools is given float32
        return cls(weight, stored, replace(report, bytes_before=n_bytes, bytes_after=n_bytes))

    def add(
        self,
        n_before: int,
        n_after: int,
        *,
        words: str = "",
        powers: tuple[float, float] = (0, 0),
        note: str = "",
    ) -> None:
        """Note what became of a constant that holds the weight, or a part of it."""
        self.signal += powers[0]
        self.noise += powers[1]
        before = self.report
        is_first = before.note == _UNFOUND
        notes = [text for text in (before.note, note) if text and text != _UNFOUND]
        self.report = replace(
            before,
            status="compressed" if words or before.status == "compressed" else "left",
            treatment=words or before.treatment,
            note="; ".join(dict.fromkeys(notes)),
            bytes_before=n_before + (0 if is_first else before.bytes_before),
            bytes_after=n_after + (0 if is_first else before.bytes_after),
            snr_db=decibels(self.signal, self.noise) if self.signal else None,
        )

    def arranged_as(self, array: NDArray[Any]) -> Compressed | None:
        """Return the value as a constant of a model has it; ``None`` if it holds another weight."""
        tensor = self.weight.tensor
        assert tensor is not None  # noqa: S101 - it was read
        with np.errstate(over="ignore"):
            own = whole(tensor).float().numpy().astype(array.dtype)
        layout = _relayout.layout_of(own, array, in_rows=self.is_in_parts)
        if layout is not None:
            return layout(self.stored.folded())
        for matrix in self.weight.matrices():
            layout = _relayout.layout_of(own[matrix.index], array, in_rows=False)
            if layout is not None:
                return layout(_relayout.matrix_of(self.stored.folded(), matrix.index))
        return None

    def may_be(self, shape: tuple[int, ...]) -> bool:
        """Whether a constant of a shape may hold the weight, or a part of it."""
        own = self.report.shape
        own_matrix = self.weight.matrices()[0].shape
        return sorted(shape) in (sorted(own), sorted(own_matrix)) or (
            self.is_in_parts and own[1:] == shape[1:]
        )

    @property
    def is_in_parts(self) -> bool:
        """Whether Core ML may have it as several constants: gates, or projections of attention."""
        return isinstance(self.weight.module, (*RECURRENT, nn.MultiheadAttention))


def compressed_weights(module: nn.Module) -> list[ConvertedWeight]:
    """Return the weights of a module that are compressed, tied ones once."""
    weights: list[ConvertedWeight] = []
    seen: set[int] = set()
    for name, part in module.named_modules():
        for parameter in _metadata.compressed_parameters(part):
            weight = ModuleWeight(name, part, parameter)
            if id(weight.tensor) not in seen:
                seen.add(id(weight.tensor))
                weights.append(ConvertedWeight.read(weight))
    return weights


def replacement(constant: Weight, compressed: list[ConvertedWeight]) -> Compressed | None:
    """Return what a constant is to be replaced by, and note what becomes of its weight."""
    if constant.is_compressed or not constant.dtype.is_float:
        return None
    candidates = [item for item in compressed if item.may_be(constant.shape)]
    if not candidates:
        return None
    array, n_before = constant.dense(), constant.n_bytes
    for item in candidates:
        try:
            arranged = item.arranged_as(array)
            if arranged is None:
                continue
            value, n_after, powers = _storable(arranged, array, constant.graph.opset)
        except UnsupportedError as error:
            item.add(n_before, n_before, note=str(error))
            return None
        item.add(n_before, n_after, words=words(value), powers=powers)
        return value
    return None


def _storable(
    value: Compressed, array: NDArray[Any], opset: Opset
) -> tuple[Compressed, int, tuple[float, float]]:
    """Return the value in the constant's type, its size, and squares of weight and error, summed.

    Raises
    ------
    UnsupportedError
        If it is beyond that type, above or below, or would be larger than the constant.
    """
    stored = _relayout.cast(value, array.dtype)
    n_bytes = payload_bytes(stored, opset)
    if n_bytes >= array.nbytes:
        msg = (
            f"left as it is: compressed it would be larger ({n_bytes:,} bytes instead of "
            f"{array.nbytes:,})"
        )
        raise UnsupportedError(msg)
    signal, noise, _ = fidelity(array, stored.dense())
    if noise > signal * _MAX_NOISE:
        msg = f"its scales are too small for {array.dtype}, and would be rounded off"
        raise UnsupportedError(msg)
    return stored, n_bytes, (signal, noise)


def needs_ios18(value: Compressed) -> str:
    """Return what of a value an earlier model can't hold; empty for nothing."""
    if isinstance(value, Masked):
        return "joint compression"
    if isinstance(value, Palette):
        if value.entries.size > 2**value.bits:
            return "groups of channels or vectors"
        return "a table of integers" if isinstance(value.lut, Quantized) else ""
    if isinstance(value, Quantized):
        if value.bits == 4:
            return "4 bits"
        n_scales = value.scale.shape
        is_cut = any(1 < n < size for n, size in zip(n_scales, value.shape, strict=True))
        return "blocks" if is_cut or sum(n > 1 for n in n_scales) > 1 else ""
    return ""


def words(value: Compressed) -> str:
    """Return how a value is compressed, for the report."""
    if isinstance(value, Masked):
        return f"pruned, {words(value.value)}"
    if isinstance(value, Palette):
        n_tables = math.prod(value.lut.shape[:-2])
        vectors = f", vectors of {value.vector_size}" if value.vector_size > 1 else ""
        integers = f", {value.lut.dtype} entries" if isinstance(value.lut, Quantized) else ""
        plural = "s" * (n_tables > 1)
        return f"{value.bits} bits, {n_tables} table{plural}{vectors}{integers}"
    if isinstance(value, Quantized):
        return f"{value.dtype}, {value.scale.size} scale{'s' * (value.scale.size > 1)}"
    return "pruned"
