"""Pruning: a bitmask and the weights that are left."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import milpress._core as _core
from milpress.errors import ConfigError, UnsupportedError
from milpress.formats.rows import Floats, as_weight, frozen, unpacked_mask
from milpress.kernels.device import Kernels, Placement, kernels_for


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneConfig:
    """Which weights become zero; exactly one of ``sparsity``, ``threshold``, ``n_m`` is given.

    Parameters
    ----------
    sparsity
        Fraction of weights, from 0 to 1: the ``floor(n * sparsity)`` of least magnitude, the
        earlier of equals first.
    threshold
        Weights whose magnitude is not above this, rounded to the weight's precision.
    n_m
        ``(n, m)``: of each ``m`` consecutive weights along an axis, the ``n`` of least magnitude
        (Zhou et al. 2021, arXiv 2102.04010).
    block_size
        With ``sparsity``: weights, consecutive along an axis, that stay or go together, those of
        least L2 norm first, as long as no more weights go than asked for.
    axis
        Axis of blocks and of ``n_m``, 0 or 1; by default 0 (output channels of a conv or linear)
        for blocks and 1 (input channels) for ``n_m``.
    min_sparsity
        With ``threshold``: a weight of which a smaller fraction would be zero is refused.
    """

    sparsity: float | None = None
    threshold: float | None = None
    n_m: tuple[int, int] | None = None
    block_size: int | None = None
    axis: int | None = None
    min_sparsity: float = 0.0

    def __post_init__(self) -> None:
        if [self.sparsity, self.threshold, self.n_m].count(None) != 2:
            msg = (
                "exactly one of sparsity, threshold and n_m must be given, "
                f"got {self.sparsity}, {self.threshold} and {self.n_m}"
            )
            raise ConfigError(msg)
        if self.n_m is not None and not (
            len(self.n_m) == 2 and 0 <= self.n_m[0] <= self.n_m[1] and self.n_m[1] >= 1
        ):
            msg = (
                "n_m must be two numbers, the first not above the second, which is at least 1, "
                f"got {self.n_m}"
            )
            raise ConfigError(msg)
        if self.block_size is not None and (self.sparsity is None or self.block_size < 2):
            msg = f"block_size must be at least 2 and go with sparsity, got {self.block_size}"
            raise ConfigError(msg)
        if self.axis is not None and (
            self.axis not in (0, 1) or (self.block_size is None and self.n_m is None)
        ):
            msg = f"axis must be 0 or 1 and go with block_size or n_m, got {self.axis}"
            raise ConfigError(msg)
        if not 0 <= self.min_sparsity <= 1:
            msg = f"min_sparsity must be from 0 to 1, got {self.min_sparsity}"
            raise ConfigError(msg)
        if self.sparsity is not None and not 0 <= self.sparsity <= 1:
            msg = f"sparsity must be from 0 to 1, got {self.sparsity}"
            raise ConfigError(msg)
        if self.threshold is not None and not 0 <= self.threshold < math.inf:
            msg = f"threshold must be finite and not negative, got {self.threshold}"
            raise ConfigError(msg)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sparse:
    """A weight as a bitmask and its non-zero values.

    Parameters
    ----------
    shape
        Shape of the dense weight.
    bitmask
        uint8, one bit a weight of the flattened tensor, least significant first, set where a value
        is stored.
    nonzeros
        float16 or float32, the values in order.
    """

    shape: tuple[int, ...]
    bitmask: NDArray[np.uint8]
    nonzeros: Floats

    @property
    def n_payload_bits(self) -> int:
        """Bits that mask and values take when stored."""
        return math.prod(self.shape) + self.nonzeros.size * self.nonzeros.itemsize * 8

    def mask(self) -> NDArray[np.bool_]:
        """Return the mask, one element a weight."""
        return unpacked_mask(self.bitmask, self.shape)

    def dense(self) -> Floats:
        """Return the weight, zero where nothing is stored."""
        n_weights = math.prod(self.shape)
        return _core.expand(self.bitmask, self.nonzeros, n_weights).reshape(self.shape)


def sparsify(weight: Any, config: PruneConfig, *, device: Placement = None) -> Sparse:
    """Set weights of small magnitude to zero and store the others.

    Parameters
    ----------
    weight
        float16, bfloat16 or float32 array or torch CPU tensor.
    config
        Which weights become zero.
    device
        Where the kernels run: ``"cpu"``, ``"metal"`` or ``"auto"``; ``None`` for that of the
        workflow around, else the CPU. The result is the same.

    Raises
    ------
    UnsupportedError
        If the weight is of another type, not finite, or too small for the blocks.

    Examples
    --------
    >>> sparsify(np.float32([3, -1, 2, 1]), PruneConfig(sparsity=0.5)).dense()
    array([3., 0., 2., 0.], dtype=float32)
    """
    array = as_weight(weight)
    kernels = kernels_for(device)
    bitmask = bitmask_of(array, config, kernels)
    n_zeros = array.size - _core.count_kept(bitmask)
    if n_zeros < config.min_sparsity * array.size:
        msg = f"a fraction of {config.min_sparsity} must be zero, got {n_zeros / array.size:.3f}"
        raise UnsupportedError(msg)
    nonzeros = kernels.dispatch(_core.compact)(array.reshape(-1), bitmask)
    return Sparse(shape=array.shape, bitmask=frozen(bitmask), nonzeros=frozen(nonzeros))


def bitmask_of(
    array: Floats, config: PruneConfig, kernels: Kernels | None = None
) -> NDArray[np.uint8]:
    """Return the bitmask of the weights that are left.

    Raises
    ------
    UnsupportedError
        If blocks or runs of ``m`` are longer than half of their axis.
    """
    kernels = kernels or kernels_for(None)
    flat = array.reshape(-1)
    if config.threshold is not None:
        return kernels.dispatch(_core.keep_above)(flat, config.threshold)
    if config.n_m is not None:
        n, m = config.n_m
        return kernels.dispatch(_core.keep_n_m)(flat, *_around(array, config, m, "m"), n, m)
    n_zeros = n_pruned(flat.size, config.sparsity or 0.0)
    if config.block_size is not None:
        around = _around(array, config, config.block_size, "block_size")
        return kernels.dispatch(_core.keep_blocks)(flat, *around, config.block_size, n_zeros)
    return kernels.dispatch(_core.keep_largest)(flat, n_zeros)


def _around(array: Floats, config: PruneConfig, size: int, word: str) -> tuple[int, int, int]:
    """Return the number of elements before, along and behind the axis of blocks."""
    axis = (0 if config.n_m is None else 1) if config.axis is None else config.axis
    if array.ndim < 2:
        msg = f"blocks must lie in a weight of 2 or more dimensions, got {array.ndim}"
        raise UnsupportedError(msg)
    if 2 * size > array.shape[axis]:
        msg = f"{word} must be at most half of the {array.shape[axis]} channels, got {size}"
        raise UnsupportedError(msg)
    shape = array.shape
    return math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])


def n_pruned(n_weights: int, sparsity: float) -> int:
    """Return ``floor(n_weights * sparsity)``, the number of weights that become zero."""
    return math.floor(n_weights * sparsity)
