"""Fields that the configs of several optimizers have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from functools import partial
from typing import Any

import torch
from attrs import field
from attrs.validators import optional

from milpress.errors import ConfigError
from milpress.plain import fields

_CHOICE = "{name} must be one of {allowed}, got {value!r}"


def enumerated(default: Enum) -> Any:
    """Return a field for a member of an enum, which may be given by its value."""
    return field(default=default, converter=partial(fields.enumerated, type(default)))


def word(default: str, *others: str) -> Any:
    """Return a field for one of some words."""
    allowed = tuple(dict.fromkeys((default, *others)))
    return field(default=default, validator=fields.one_of(allowed, _CHOICE))


def option(default: int | None, allowed: Sequence[int]) -> Any:
    """Return a field for one of some integers."""
    return fields.integer(default, fields.one_of(allowed, _CHOICE))


def flag(default: bool = False) -> Any:
    """Return a field for a truth value."""
    return field(default=default, validator=fields.is_flag)


def number(default: float, *checks: fields.Validator) -> Any:
    """Return a field for a number."""
    return field(default=default, converter=fields.real, validator=[fields.is_number, *checks])


def size() -> Any:
    """Return a keyword-only field for a number of elements, by default ``None``."""
    return field(
        default=None,
        kw_only=True,
        converter=fields.whole,
        validator=optional([fields.is_integer, fields.at_least(1)]),
    )


def torch_type(default: torch.dtype | None, known: Mapping[str, torch.dtype]) -> Any:
    """Return a field for a type of torch, which may be given by its name."""
    allowed = tuple(dict.fromkeys((default, *known.values())))
    return field(
        default=default,
        converter=lambda value: known.get(_name(value), value),
        validator=fields.one_of(allowed, _CHOICE),
    )


def _name(value: Any) -> str:
    return value.lower().removeprefix("torch.") if isinstance(value, str) else ""


def weight_dtype(default: str, known: Mapping[str, tuple[torch.dtype, int]]) -> Any:
    """Return a field for the type of codes, as torch's or by name; `resolve_width` completes it.

    torch has no integers of fewer than 8 bits, so the width stands beside the type, in
    ``weight_n_bits``.
    """

    def adopt(config: Any, _attribute: Any, value: Any) -> torch.dtype:
        for name, (dtype, n_bits) in known.items():
            # By identity: a tensor compares to anything.
            if value is dtype or _name(value) == name:
                config.weight_n_bits = n_bits
                return dtype
        msg = (
            f"weight_dtype must be one of {tuple(known)}, which is what Core ML decodes, "
            f"got {value!r}"
        )
        raise ConfigError(msg)

    return field(default=default, on_setattr=adopt)


def weight_n_bits() -> Any:
    """Return a field for the width of a code; ``None`` for that of the type."""
    return field(default=None, kw_only=True, converter=fields.whole)


def resolve_width(config: Any, *narrower: int) -> None:
    """Set type and width of a new config, which may be narrower than a type of 8 bits.

    Raises
    ------
    ConfigError
        If the width is not that of the type.
    """
    width = config.weight_n_bits
    config.weight_dtype = config.weight_dtype  # which sets the width, too
    if width in narrower and config.weight_n_bits == 8:
        config.weight_n_bits = width
    if width not in (None, config.weight_n_bits):
        msg = f"weight_n_bits must be that of weight_dtype, {config.weight_n_bits}, got {width!r}"
        raise ConfigError(msg)


def is_ratio(value: Any) -> bool:
    """Whether a value is ``(n, m)``: two integers, ``n`` from 0 to ``m``."""
    return (
        isinstance(value, tuple)
        and len(value) == 2
        and all(type(number) is int for number in value)
        and 0 <= value[0] <= value[1]
        and value[1] > 0
    )


def ratio() -> Any:
    """Return a field for `is_ratio`, by default ``None``."""
    message = "{name} must be two whole numbers, n zeros among m, n not above m, got {value!r}"
    return field(
        default=None, converter=fields.wholes, validator=optional(fields.check(is_ratio, message))
    )
