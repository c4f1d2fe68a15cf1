"""Sums of products of the inputs of a layer, which say how errors of its weight add up."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_N_STRIPES = 8  # of a product that is symmetric: only its upper half is computed
_STRIPE = 128  # columns, at least
_PATCHES = 1 << 24  # elements of inputs of a convolution that are laid out at a time


class Products:
    """Sums of products of pairs of columns.

    Parameters
    ----------
    n_groups, n_columns
        Rows are of the shape ``(n_groups, n_rows, n_columns)``: each group has products of its own.
    device
        Where they are added up.
    """

    def __init__(
        self, n_groups: int, n_columns: int, device: torch.device | str | None = None
    ) -> None:
        self._n_columns = n_columns
        self._sums = torch.zeros((n_groups, n_columns, n_columns), device=device)
        self.n_rows = 0

    def add(self, rows: Tensor) -> None:
        """Add the products of rows."""
        self.n_rows += rows.shape[1]
        rows = rows.to(self._sums.device, torch.float32)
        for begin, end in self._stripes():
            part = self._sums[:, :end, begin:end]
            part.baddbmm_(rows[:, :, :end].transpose(1, 2), rows[:, :, begin:end])

    def sums(self) -> NDArray[np.float32]:
        """Return the sums, of the shape ``(n_groups, n_columns, n_columns)``."""
        for begin, end in self._stripes():
            # Below the stripe stands what is across the diagonal, and was not computed twice.
            self._sums[:, end:, begin:end] = self._sums[:, begin:end, end:].transpose(1, 2)
        sums: NDArray[np.float32] = self._sums.cpu().numpy()
        return sums

    def _stripes(self) -> Iterator[tuple[int, int]]:
        n = self._n_columns
        stripe = max(_STRIPE, -(-n // _N_STRIPES))
        for begin in range(0, n, stripe):
            yield begin, min(begin + stripe, n)


class BlockProducts:
    """Sums of products of pairs of columns that are in the same block.

    Parameters
    ----------
    n_groups
        As of `Products`.
    edges
        Where blocks of columns begin and end: 0 first, the number of columns last.
    """

    def __init__(self, n_groups: int, edges: Sequence[int]) -> None:
        self._blocks = [
            (slice(begin, end), Products(n_groups, end - begin)) for begin, end in pairwise(edges)
        ]

    @property
    def n_rows(self) -> int:
        """How many rows were added."""
        return self._blocks[0][1].n_rows

    def add(self, rows: Tensor) -> None:
        """Add the products of rows."""
        for columns, products in self._blocks:
            products.add(rows[:, :, columns])

    def sums(self) -> tuple[NDArray[np.float32], ...]:
        """Return the sums of each block, of the shape ``(n_groups, n, n)``."""
        return tuple(products.sums() for _, products in self._blocks)


def windows(
    x: Tensor, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int], groups: int
) -> Iterator[Tensor]:
    """Yield what the kernel of a convolution sees of a padded input, a few images at a time.

    Each part is of the shape ``(groups, n_positions, n_columns)``, its columns in the order of the
    weight's elements after its first axis.
    """
    rank = len(kernel)
    for i, (size, stride, dilation) in enumerate(zip(kernel, strides, dilations, strict=True)):
        x = x.unfold(2 + i, dilation * (size - 1) + 1, stride)[..., ::dilation]
    n_images, n_channels = x.shape[:2]
    # (n_images, groups, channels, *positions, *kernel) to (groups, n_images, *positions, ...)
    parted = x.reshape(n_images, groups, n_channels // groups, *x.shape[2:])
    order = (1, 0, *range(3, 3 + rank), 2, *range(3 + rank, 3 + 2 * rank))
    ordered = parted.permute(order)
    n_columns = n_channels // groups * math.prod(kernel)
    n_at_once = max(1, _PATCHES // max(1, ordered[:, :1].numel()))
    for begin in range(0, n_images, n_at_once):
        yield ordered[:, begin : begin + n_at_once].reshape(groups, -1, n_columns)
