"""Lists of tensors of one type and shape."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from milpress.interpreter.operator import operator
from milpress.interpreter.ops.torch_types import HELD_IN


@dataclass(frozen=True, slots=True)
class TensorList:
    """A list; an item is ``None`` until it is written.

    Until then it reads as zeros of the shape that all items share: ``blank``, or ``None`` as long
    as that shape is not known. Writing makes another list, which shares the items.
    """

    items: tuple[Tensor | None, ...]
    grows: bool
    blank: Tensor | None

    def at(self, index: int) -> Tensor:
        """Return an item."""
        item = self.items[_within(index, len(self.items))]
        if item is None:
            item = self.blank
        if item is None:
            msg = f"an item must be written before its shape is known, got item {index}"
            raise ValueError(msg)
        return item

    def replaced(self, values: dict[int, Tensor]) -> TensorList:
        """Return the list with other values in some places; past the end, it grows if it may."""
        items = list(self.items)
        if self.grows:
            items.extend([None] * (max(values, default=0) + 1 - len(items)))
        blank = self.blank
        for index, value in values.items():
            items[_within(index, len(items))] = value
            blank = torch.zeros_like(value) if blank is None else blank
        return TensorList(tuple(items), self.grows, blank)


def _within(index: int, length: int) -> int:
    if not 0 <= index < length:
        msg = f"an index must be from 0 to below the length of the list, {length}, got {index}"
        raise IndexError(msg)
    return index


@operator("make_list")
def make_list(
    elem_shape: list[int],
    init_length: int = 1,
    dynamic_length: bool = True,
    dtype: str = "fp32",
) -> TensorList:
    known = all(isinstance(size, int) and size >= 0 for size in elem_shape)
    blank = torch.zeros(elem_shape, dtype=HELD_IN[dtype]) if known else None
    return TensorList((None,) * init_length, dynamic_length, blank)


@operator("list_read")
def list_read(ls: TensorList, index: int) -> Tensor:
    return ls.at(index)


@operator("list_write")
def list_write(ls: TensorList, index: int, value: Tensor) -> TensorList:
    return ls.replaced({index: value})


@operator("list_gather")
def list_gather(ls: TensorList, indices: list[int]) -> Tensor:
    return torch.stack([ls.at(index) for index in indices])


@operator("list_scatter")
def list_scatter(ls: TensorList, indices: list[int], value: Tensor) -> TensorList:
    return ls.replaced(dict(zip(indices, value.unbind(0), strict=True)))


@operator("list_length")
def list_length(ls: TensorList) -> Tensor:
    return torch.tensor(len(ls.items), dtype=torch.int32)
