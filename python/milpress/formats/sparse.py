"""Pruning: a bitmask and the weights that are left."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from milpress import _core
from milpress.errors import ConfigError
from milpress.formats._layout import Floats, as_weight, frozen


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneConfig:
    """Which weights become zero; exactly one field is given.

    Parameters
    ----------
    sparsity
        Fraction of weights, from 0 to 1: the ``floor(n * sparsity)`` of least magnitude, the
        earlier of equals first.
    threshold
        Weights whose magnitude is not above this, rounded to the weight's precision.
    """

    sparsity: float | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        if (self.sparsity is None) == (self.threshold is None):
            msg = (
                "exactly one of sparsity and threshold must be given, "
                f"got {self.sparsity} and {self.threshold}"
            )
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
        flat = _core.unpack(self.bitmask, 1, math.prod(self.shape))
        return flat.view(np.bool_).reshape(self.shape)

    def dense(self) -> Floats:
        """Return the weight, zero where nothing is stored."""
        n_weights = math.prod(self.shape)
        return _core.expand(self.bitmask, self.nonzeros, n_weights).reshape(self.shape)


def sparsify(weight: Any, config: PruneConfig) -> Sparse:
    """Set weights of small magnitude to zero and store the others.

    Parameters
    ----------
    weight
        float16, bfloat16 or float32 array or torch CPU tensor.
    config
        Which weights become zero.

    Raises
    ------
    UnsupportedError
        If the weight is of another type, or not finite.

    Examples
    --------
    >>> sparsify(np.float32([3, -1, 2, 1]), PruneConfig(sparsity=0.5)).dense()
    array([3., 0., 2., 0.], dtype=float32)
    """
    array = as_weight(weight)
    flat = array.reshape(-1)
    if config.sparsity is not None:
        bitmask = _core.keep_largest(flat, n_pruned(flat.size, config.sparsity))
    else:
        bitmask = _core.keep_above(flat, config.threshold or 0.0)
    nonzeros = _core.compact(flat, bitmask)
    return Sparse(shape=array.shape, bitmask=frozen(bitmask), nonzeros=frozen(nonzeros))


def n_pruned(n_weights: int, sparsity: float) -> int:
    """Return ``floor(n_weights * sparsity)``, the number of weights that become zero."""
    return math.floor(n_weights * sparsity)
