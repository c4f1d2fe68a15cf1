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

from milpress.interpreter.products import Products, windows
from milpress.torch.registration import CONVOLUTIONS, Kinds

LAYERS: Kinds = (nn.Linear, *CONVOLUTIONS)


class LayerMoments:
    """Sums of products of the values that a linear layer or a convolution multiplies by."""

    def __init__(self, layer: nn.Module) -> None:
        weight: Any = layer.weight
        n_groups = int(getattr(layer, "groups", 1))
        self._layer = layer
        self._products = Products(n_groups, math.prod(weight.shape[1:]), weight.device)

    @property
    def n_positions(self) -> int:
        """How many positions were seen."""
        return self._products.n_rows

    @torch.no_grad()
    def add(self, inputs: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Add what goes into the layer; what is zero in a mask does not count.

        The mask is of the first dimensions of the input of a linear layer, which may be one. It has
        no effect on inputs of other shapes.
        """
        for rows in self._rows(inputs.detach(), mask):
            self._products.add(rows)

    def _rows(self, inputs: torch.Tensor, mask: torch.Tensor | None) -> Iterator[torch.Tensor]:
        if not isinstance(self._layer, CONVOLUTIONS):
            if mask is not None and inputs.ndim == 2 and len(inputs) == mask.numel():
                mask = mask.reshape(-1)
            if mask is not None and inputs.shape[: mask.ndim] == mask.shape:
                inputs = inputs[mask.to(inputs.device, torch.bool)]
            yield inputs.reshape(1, -1, inputs.shape[-1])
            return
        layer: Any = self._layer
        inputs = inputs if inputs.ndim == len(layer.kernel_size) + 2 else inputs[None]
        padding = layer._reversed_padding_repeated_twice
        if any(padding):
            mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
            inputs = F.pad(inputs, padding, mode=mode)
        yield from windows(inputs, layer.kernel_size, layer.stride, layer.dilation, layer.groups)

    def sums(self) -> NDArray[np.float32]:
        """Return the sums, of the shape ``(n_groups, n_columns, n_columns)``."""
        return self._products.sums()
