"""Which weights stay: masks by magnitude."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import milpress._core as _core
from milpress.formats.rows import Floats, as_float
from milpress.formats.sparse import n_pruned
from milpress.torch._module_weights import ModuleWeight, whole

# Kernels never keep a zero. A weight that is zero now may be another one after the next step of
# training, so it counts as the least number there is.
_LEAST = np.nextafter(np.float32(0), np.float32(1))


def mask_of(
    weight: ModuleWeight, tensor: torch.Tensor, config: Any, sparsity: float
) -> torch.Tensor:
    """Return 1 where a weight stays and 0 where it becomes zero, in a shape that broadcasts to it.

    ``sparsity`` is the fraction of elements, kernels, channels or blocks of them that become zero,
    rounded down; ``config`` is a `ModuleMagnitudePrunerConfig`.
    """
    array = as_float(whole(tensor))
    scores = np.maximum(np.abs(array.astype(np.float32)), _LEAST)
    if config.n_m_ratio is not None and array.ndim > 1:
        n_zeros = math.floor(sparsity * config.n_m_ratio[1] + 1e-6)
        if n_zeros:
            around = _around(scores, weight.axes[config.dim])
            bitmask = _core.keep_n_m(scores.reshape(-1), *around, n_zeros, config.n_m_ratio[1])
            return torch.from_numpy(_unpacked(bitmask, scores)).to(tensor)
    elif config.granularity != "per_scalar" and array.ndim - min(weight.axes) > 2:
        scores = _norms(scores, weight, config.granularity)
    n_zeros = n_pruned(scores.size, sparsity)
    if config.n_m_ratio is not None or array.ndim == 1 or config.block_size == 1:
        bitmask = _core.keep_largest(scores.reshape(-1), n_zeros)
    else:
        around = _around(scores, weight.axes[0])
        bitmask = _core.keep_blocks(scores.reshape(-1), *around, config.block_size, n_zeros)
    mask = _unpacked(bitmask, scores)
    if mask.shape[0] not in (1, array.shape[0]):
        mask = np.repeat(mask, array.shape[0] // mask.shape[0], axis=0)
    return torch.from_numpy(mask).to(tensor)


def _around(scores: Floats, axis: int) -> tuple[int, int, int]:
    shape = scores.shape
    return math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])


def _unpacked(bitmask: NDArray[np.uint8], scores: Floats) -> NDArray[np.bool_]:
    return _core.unpack(bitmask, 1, scores.size).view(np.bool_).reshape(scores.shape)


def _norms(scores: Floats, weight: ModuleWeight, granularity: str) -> Floats:
    """Return the Euclidean norms of kernels or output channels, with axes of length 1 beside."""
    squares = np.square(scores.astype(np.float64))
    output, inputs = weight.axes
    inner = tuple(range(max(weight.axes) + 1, scores.ndim))
    if granularity == "per_kernel":
        sums = squares.sum(axis=inner, keepdims=True)
    elif output == 0 or weight.n_conv_groups == 1:
        sums = squares.sum(axis=(inputs, *inner), keepdims=True)
    else:
        # A grouped transposed convolution has its output channels in each group of input channels.
        groups = weight.n_conv_groups
        parted = squares.sum(axis=inner).reshape(groups, -1, squares.shape[1]).sum(axis=1)
        sums = parted.reshape(groups, -1, *[1] * len(inner))
    norms: Floats = np.maximum(np.sqrt(sums).astype(np.float32), _LEAST)
    return norms
