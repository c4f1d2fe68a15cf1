"""Compressed weights as linear maps of the one array of floats that each of them stores.

A table, the scales of codes, and the values that pruning kept are numbers that a weight is linear
in: codes and masks say where each goes. Decoding is the map, and a gradient of the weight becomes
one of the array by its adjoint.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from milpress.formats import Compressed, Masked, Palette, Quantized, Sparse
from milpress.formats.palette import split_vectors
from milpress.formats.rows import Floats, to_rows

# Codes whose gradients are added up at once: as float64 they take four times their memory.
_CHUNK = 1 << 20


def with_floats(value: Compressed, floats: Floats) -> Compressed:
    """Return a weight with other tables, scales or kept values, of the shape of its own."""
    if isinstance(value, Masked):
        inner = value.value
        if isinstance(inner, Palette):
            return replace(value, value=_with_table(inner, floats))
        return replace(value, value=_with_scale(inner, floats))
    if isinstance(value, Sparse):
        return replace(value, nonzeros=np.ascontiguousarray(floats))
    return _with_table(value, floats) if isinstance(value, Palette) else _with_scale(value, floats)


def _with_table(value: Palette, floats: Floats) -> Palette:
    if isinstance(value.lut, Quantized):
        return replace(value, lut=_with_scale(value.lut, floats))
    return replace(value, lut=np.ascontiguousarray(floats.reshape(value.lut.shape)))


def _with_scale(value: Quantized, floats: Floats) -> Quantized:
    return replace(value, scale=np.ascontiguousarray(floats.reshape(value.scale.shape)))


def floats_of(value: Compressed) -> Floats:
    """Return the tables, scales or kept values of a weight."""
    if isinstance(value, Masked):
        return floats_of(value.value)
    if isinstance(value, Quantized):
        return value.scale
    if isinstance(value, Sparse):
        return value.nonzeros
    return floats_of(value.lut) if isinstance(value.lut, Quantized) else value.lut


def gradient_of(value: Compressed, gradient: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the gradient of a weight's floats, given that of the weight.

    Sums are of float64, in the order of the codes.
    """
    if isinstance(value, Masked):
        return gradient_of(value.value, np.where(value.mask(), gradient, np.float32(0)))
    if isinstance(value, Sparse):
        return gradient[value.mask()].astype(np.float64)
    if isinstance(value, Quantized):
        return _of_scale(value, gradient)
    entries = _of_entries(value, gradient)
    return _of_scale(value.lut, entries) if isinstance(value.lut, Quantized) else entries


def _of_scale(value: Quantized, gradient: NDArray[Any]) -> NDArray[np.float64]:
    codes, _, offsets = value.rows()
    steps = codes.astype(np.float64)
    if offsets is not None:
        steps -= offsets.astype(np.float64)[:, None]
    steps *= to_rows(gradient, value.block_shape)
    sums: NDArray[np.float64] = steps.sum(axis=1).reshape(value.scale.shape)
    return sums


def _of_entries(value: Palette, gradient: NDArray[np.float32]) -> NDArray[np.float64]:
    codes, size = to_rows(value.codes, value.group_shape), value.vector_size
    if value.vector_axis is None:
        rows = to_rows(gradient, value.group_shape)[..., None]
    else:
        rows = split_vectors(gradient, size, value.vector_axis, value.group_shape)[1]
    n_entries = value.lut.shape[-2]
    sums = np.zeros((len(codes), n_entries, size))
    for i, (own, parts) in enumerate(zip(codes, rows, strict=True)):
        for start in range(0, len(own), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            for j in range(size):
                sums[i, :, j] += np.bincount(own[chunk], parts[chunk, j], n_entries)
    return sums.reshape(value.lut.shape)


@dataclass(frozen=True, slots=True)
class Layout:
    """How the stored form of an array, of fewer axes or elements, becomes that of its weight."""

    stored: tuple[int, ...]
    held: tuple[int, ...]

    @property
    def is_repeated(self) -> bool:
        """Whether one stored number stands for all."""
        return int(np.prod(self.stored)) != int(np.prod(self.held))

    def unfold(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return the array as its weight holds it."""
        if self.is_repeated:
            return np.full(self.held, array.reshape(-1)[0])
        return array.reshape(self.held)

    def fold(self, gradient: NDArray[Any]) -> NDArray[Any]:
        """Return a gradient as the array is stored."""
        if self.is_repeated:
            gradient = gradient.sum()
        return np.asarray(gradient).reshape(self.stored)
