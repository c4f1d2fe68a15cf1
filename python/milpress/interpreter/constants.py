"""Constants and weights as the interpreter computes with them: tensors, text, lists."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from milpress.errors import PackageError
from milpress.mil import proto, values
from milpress.mil.decode import Decoder
from milpress.mil.dtypes import DType
from milpress.mil.graph import Node
from milpress.mil.values import WeightSource

# Types that torch has, or has no arithmetic for, and what holds their elements instead.
_WIDER = {"uint16": torch.int32, "uint32": torch.int64, "uint64": torch.int64}
_PATTERNS = {
    "bfloat16": torch.bfloat16,
    "float8e4m3fn": torch.float8_e4m3fn,
    "float8e5m2": torch.float8_e5m2,
}

Caster = Callable[[Tensor], Tensor]


def held_as(dtype: DType) -> torch.dtype:
    """Return the type in which the interpreter holds elements of a type: floats as float32."""
    if dtype.name.startswith(("float", "bfloat")):
        return torch.float32
    if dtype.name in _WIDER:
        return _WIDER[dtype.name]
    return torch.from_numpy(np.empty(0, dtype.storage)).dtype


def caster(dtype: DType, *, rounds: bool) -> Caster:
    """Return what makes a tensor one of a type, as the interpreter holds it.

    Integers wrap around. With ``rounds``, a float16 is rounded to what it can hold.
    """
    held = held_as(dtype)
    if dtype.name == "float16" and rounds:
        return lambda tensor: tensor.to(torch.float16).to(held)
    if dtype.name == "uint16":
        return lambda tensor: tensor.to(held) & 0xFFFF
    return lambda tensor: tensor if tensor.dtype == held else tensor.to(held)


def tensor_of(dtype: DType, array: NDArray[Any]) -> Tensor:
    """Return a stored array as the interpreter holds it."""
    if not array.flags.writeable:
        array = array.copy()
    if dtype.name in _PATTERNS:
        patterns = torch.from_numpy(np.ascontiguousarray(array))
        return patterns.view(_PATTERNS[dtype.name]).to(torch.float32)
    if dtype.name in ("uint32", "uint64"):
        array = array.astype(np.int64)
    return torch.from_numpy(np.ascontiguousarray(array)).reshape(array.shape).to(held_as(dtype))


def constant(value: proto.Value, source: WeightSource) -> Any:
    """Return a stored value: a tensor, a text, or a list of texts or numbers.

    One that is a dictionary, or nothing, is returned as the model has it: no op takes any.

    Raises
    ------
    PackageError
        If it is damaged, or of another kind.
    """
    kind = value.type.WhichOneof("choice")
    if kind in ("dictionaryType", None):
        return value
    if kind == "listType":
        items = [constant(item, source) for item in value.immediateValue.list.values]
        return [item.item() if isinstance(item, Tensor) else item for item in items]
    if kind != "tensorType":
        msg = f"a constant must be a tensor or a list, got {kind}"
        raise PackageError(msg)
    if values.type_of(value.type) is None:
        texts = list(value.immediateValue.tensor.strings.values)
        return texts if value.type.tensorType.rank or len(texts) != 1 else texts[0]
    return tensor_of(*values.read(value, source))


class Budget:
    """How many more bytes of decoded weights may be kept in memory."""

    def __init__(self, n_bytes: int) -> None:
        self._left = n_bytes

    def admits(self, n_bytes: int) -> bool:
        """Whether so many bytes are left; if so, they are taken."""
        fits = n_bytes <= self._left
        self._left -= n_bytes if fits else 0
        return fits


class Weight:
    """A stored tensor that is decoded when it is first needed.

    It is kept as long as the budget admits it and decoded again at each use otherwise: a program
    uses its weights in the same order each time, so dropping the oldest would keep none.
    """

    def __init__(self, node: Node, decoder: Decoder, budget: Budget) -> None:
        self.node = node
        self._decoder = decoder
        self._budget = budget
        self._kept: Tensor | None = None

    def tensor(self) -> Tensor:
        """Return the tensor."""
        if self._kept is not None:
            return self._kept
        tensor = tensor_of(*self._decoder.dense(self.node))
        if self._budget.admits(tensor.nbytes):
            self._kept = tensor
        return tensor

    def release(self) -> None:
        """Let go of the tensor; it is decoded again when it is needed."""
        self._kept = None
