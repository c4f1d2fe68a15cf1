"""Ops that compute each element by itself, with broadcasting."""

from __future__ import annotations

import torch
from torch import Tensor

from milpress.interpreter.operator import operator


@operator("add")
def add(x: Tensor, y: Tensor) -> Tensor:
    return torch.add(x, y)
