"""Ops on lists: tensors in places that are numbered, of one type and shape."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from milpress.interpreter.operator import operator
from milpress.interpreter.ops.held import HELD_IN


@dataclass(frozen=True, slots=True)
class TensorList:
    """A list; an item is ``None`` as long as its shape is not known.

    Writing makes another list, which shares the items.
    """

    items: tuple[Tensor | None, ...]
    grows: bool

    def at(self, index: int) -> Tensor:
        """Return an item."""
        item = self.items[self._place(index)]
        if item is None:
            msg = f"an item must be written before it is read, got item {index}"
            raise ValueError(msg)
        return item

    def replaced(self, values: dict[int, Tensor]) -> TensorList:
        """Return the list with other values in some places."""
        items = list(self.items)
        for index, value in values.items():
            if self.grows and index >= len(items):
                items.extend([None] * (index + 1 - len(items)))
            items[index if self.grows else self._place(index)] = value
        return TensorList(tuple(items), self.grows)

    def _place(self, index: int) -> int:
        if not 0 <= index < len(self.items):
            msg = f"an index must be below the length of the list, {len(self.items)}, got {index}"
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
    item = torch.zeros(elem_shape, dtype=HELD_IN[dtype]) if known else None
    return TensorList((item,) * init_length, dynamic_length)


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
