"""Second moments of what goes into a layer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F  # noqa: N812

from milpress.torch._weights import Kinds

CONVOLUTIONS: Kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LAYERS: Kinds = (nn.Linear, *CONVOLUTIONS)

_N_STRIPES = 8  # of a product that is symmetric: only its upper half is computed
_STRIPE = 128  # columns, at least
_PATCHES = 1 << 24  # elements of inputs of a convolution that are laid out at a time


class Moments:
    """Sums of products of the values that elements of a weight are multiplied by.

    Parameters
    ----------
    layer
        A linear layer or a convolution.
    """

    def __init__(self, layer: nn.Module) -> None:
        weight: Any = layer.weight
        self._layer = layer
        self._n_groups = int(getattr(layer, "groups", 1))
        self._n_columns = math.prod(weight.shape[1:])
        shape = (self._n_groups, self._n_columns, self._n_columns)
        self._sums = torch.zeros(shape, device=weight.device)
        self.n_positions = 0

    @torch.no_grad()
    def add(self, given: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Add what the layer is given.

        Parameters
        ----------
        given
            Its input.
        mask
            Of the first dimensions of the input of a linear layer: what is zero there does not
            count. It has no effect on inputs of other shapes.
        """
        for rows in self._rows(given.detach(), mask):
            self.n_positions += rows.shape[1]
            self._add(rows.to(self._sums.device, torch.float32))

    def _add(self, rows: torch.Tensor) -> None:
        """Add products of ``rows``, of the shape ``(n_groups, n_positions, n_columns)``."""
        for begin, end in self._stripes():
            part = self._sums[:, :end, begin:end]
            part.baddbmm_(rows[:, :, :end].transpose(1, 2), rows[:, :, begin:end])

    def _rows(self, given: torch.Tensor, mask: torch.Tensor | None) -> Iterator[torch.Tensor]:
        if not isinstance(self._layer, CONVOLUTIONS):
            if mask is not None and given.shape[: mask.ndim] == mask.shape:
                given = given[mask.to(given.device, torch.bool)]
            yield given.reshape(1, -1, given.shape[-1])
            return
        layer: Any = self._layer
        rank = len(layer.kernel_size)
        given = given if given.ndim == rank + 2 else given[None]
        padding = layer._reversed_padding_repeated_twice
        if any(padding):
            mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
            given = F.pad(given, padding, mode=mode)
        patches = given
        for i, (size, stride, dilation) in enumerate(
            zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)
        ):
            patches = patches.unfold(2 + i, dilation * (size - 1) + 1, stride)[..., ::dilation]
        # (n, groups * channels, *positions, *kernel) to (groups, n * positions, columns)
        n, channels = patches.shape[:2]
        by_group = (n, self._n_groups, channels // self._n_groups, *patches.shape[2:])
        grouped = patches.reshape(by_group)
        positions = range(3, 3 + rank)
        ordered = grouped.permute(1, 0, *positions, 2, *range(3 + rank, 3 + 2 * rank))
        per_image = max(1, ordered[:, :1].numel())
        step = max(1, _PATCHES // per_image)
        for begin in range(0, n, step):
            yield ordered[:, begin : begin + step].reshape(self._n_groups, -1, self._n_columns)

    def sums(self) -> NDArray[np.float32]:
        """Return the sums, of the shape ``(n_groups, n_columns, n_columns)``."""
        for begin, end in self._stripes():
            across = self._sums[:, begin:end, end:]
            self._sums[:, end:, begin:end] = across.transpose(1, 2)
        found: NDArray[np.float32] = self._sums.cpu().numpy()
        return found

    def _stripes(self) -> Iterator[tuple[int, int]]:
        """Yield where stripes of columns begin and end; products below the last row are those across."""
        n = self._n_columns
        stripe = max(_STRIPE, -(-n // _N_STRIPES))
        for begin in range(0, n, stripe):
            yield begin, min(begin + stripe, n)
