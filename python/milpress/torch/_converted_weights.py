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
from milpress.formats.palette import fold
from milpress.show import decibels
from milpress.torch import _metadata, _relayout
from milpress.torch._metadata import Stored
from milpress.torch._module_weights import RECURRENT, ModuleWeight, whole

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
        tensor = weight.tensor
        shape = () if tensor is None else tuple(tensor.shape)
        report = WeightReport(
            name=weight.name,
            op_types=(type(weight.module).__name__,),
            shape=shape,
            status="left",
            treatment="",
            note=_UNFOUND,
            bytes_before=4 * math.prod(shape),
            bytes_after=4 * math.prod(shape),
        )
        return cls(weight, stored, report)

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
        known = self.report
        is_first = known.note == _UNFOUND
        notes = [text for text in (known.note, note) if text and text != _UNFOUND]
        self.report = replace(
            known,
            status="compressed" if words or known.status == "compressed" else "left",
            treatment=words or known.treatment,
            note="; ".join(dict.fromkeys(notes)),
            bytes_before=n_before + (0 if is_first else known.bytes_before),
            bytes_after=n_after + (0 if is_first else known.bytes_after),
            snr_db=decibels(self.signal, self.noise) if self.signal else None,
        )

    def value(self) -> Compressed:
        """Return the value with its channel scales in its tables, as milpress stores them."""
        value, scale = self.stored.value, self.stored.scale
        if scale is None:
            return value
        output = next((i for i, n in enumerate(scale.shape) if n > 1), 0)
        if isinstance(value, Masked):
            return replace(value, value=_folded(value.value, scale, output))
        return _folded(value, scale, output)

    def arranged_as(self, array: NDArray[Any]) -> Compressed | None:
        """Return the value as a constant of a model has it; ``None`` if it holds another weight."""
        tensor = self.weight.tensor
        assert tensor is not None  # noqa: S101 - it was read
        with np.errstate(over="ignore"):
            own = whole(tensor).float().numpy().astype(array.dtype)
        if np.array_equal(own, array):
            return self.value()
        if own.ndim == 2 and np.array_equal(own.T, array):
            return _relayout.transposed(self.value())
        rows = _rows_of(array, own) if self.is_recurrent else None
        return None if rows is None else _relayout.taken(self.value(), rows)

    def may_be(self, shape: tuple[int, ...]) -> bool:
        """Whether a constant of a shape may hold the weight, or a part of it."""
        own = self.report.shape
        return sorted(own) == sorted(shape) or (self.is_recurrent and own[1:] == shape[1:])

    @property
    def is_recurrent(self) -> bool:
        """Whether its module is a recurrent layer, of which Core ML has several constants."""
        return isinstance(self.weight.module, RECURRENT)


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


def _rows_of(array: NDArray[Any], own: NDArray[Any]) -> NDArray[np.intp] | None:
    """Return which of its own rows each row is, ``None`` if one of them is another.

    Core ML has the gates of a recurrent layer in another order than torch, or in parts.
    """
    places: dict[bytes, list[int]] = {}
    for i, row in enumerate(own):
        places.setdefault(row.tobytes(), []).append(i)
    rows = []
    for row in array:
        same = places.get(row.tobytes())
        if not same:
            return None
        rows.append(same.pop(0))
    return np.array(rows, np.intp)


def _folded(value: Any, scale: NDArray[Any], output: int) -> Palette:
    if not isinstance(value, Palette):
        msg = f"channel scales belong to a palette, got {type(value).__name__}"
        raise UnsupportedError(msg)
    return fold(value, scale, output)


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
        return (
            "blocks"
            if sum(n > 1 for n in value.scale.shape) > 1
            or any(1 < n < size for n, size in zip(value.scale.shape, value.shape, strict=True))
            else ""
        )
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
