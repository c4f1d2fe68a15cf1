"""Types of MIL as torch tensors hold them."""

from __future__ import annotations

import functools
import types
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

# uint16 has hardly any kernel in torch, so its values lie in int32.
HELD_IN = types.MappingProxyType(
    {
        "fp16": torch.float32,
        "fp32": torch.float32,
        "int8": torch.int8,
        "uint8": torch.uint8,
        "int16": torch.int16,
        "uint16": torch.int32,
        "int32": torch.int32,
        "bool": torch.bool,
    }
)

_UINT16_MAX = 2**16 - 1


def limits(dtype: str) -> tuple[int, int]:
    """Return the least and the greatest value of an integer type of MIL."""
    if dtype == "uint16":
        return 0, _UINT16_MAX
    info = torch.iinfo(HELD_IN[dtype])
    return info.min, info.max


def check_choice(name: str, value: str, *choices: str) -> None:
    """Raise `ValueError` if a parameter is none of what it may be."""
    if value not in choices:
        msg = f"{name} must be {', '.join(choices[:-1])} or {choices[-1]}, got {value}"
        raise ValueError(msg)


def converted(x: Tensor, dtype: str) -> Tensor:
    """Return values as a type of MIL: towards zero, floats saturate, integers wrap around.

    Raises
    ------
    ValueError
        If MIL has no such type.
    """
    if dtype not in HELD_IN:
        msg = f"dtype must be one of {', '.join(HELD_IN)}, got {dtype}"
        raise ValueError(msg)
    held = HELD_IN[dtype]
    if held.is_floating_point or held == torch.bool:
        return x.to(held)
    if x.is_floating_point():
        least, greatest = limits(dtype)
        return x.to(torch.float64).clamp(least, greatest).to(held)
    if dtype == "uint16":
        return x.to(torch.int32) & _UINT16_MAX
    return x.to(held)


def real(x: Tensor) -> Tensor:
    """Return values in a type in which fractions exist."""
    return x if x.is_floating_point() else x.to(torch.float64)


def alike(*values: Tensor) -> list[Tensor]:
    """Return values in one type: from iOS17 on, integers meet floats in some ops."""
    common = functools.reduce(torch.promote_types, (value.dtype for value in values))
    return [value.to(common) for value in values]


def padded(x: Tensor, pairs: Sequence[Sequence[int]], value: float = 0.0) -> Tensor:
    """Return ``x`` with values around its last axes; a negative amount cuts off."""
    last_first = [amount for pair in reversed(pairs) for amount in pair]
    return functional.pad(x, last_first, value=value) if any(last_first) else x


def positive(axis: int, rank: int) -> int:
    """Return an axis counted from the front."""
    return axis + rank if axis < 0 else axis
