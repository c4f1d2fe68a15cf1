"""Fields of configs that carry coremltools' names: checks, converters, reading from dictionaries.

A check raises `ConfigError` when a config is made or changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from numbers import Integral, Real
from typing import Any, TypeAlias, TypeVar

import attrs
import cattrs
from attrs import field
from attrs.validators import optional
from cattrs.errors import ClassValidationError

from milpress.errors import ConfigError, ConfigTypeError
from milpress.plain.structure import problems_of

Validator: TypeAlias = Callable[[Any, "attrs.Attribute[Any]", Any], None]
_T = TypeVar("_T")
_E = TypeVar("_E", bound=Enum)


class ConfigDictError(ClassValidationError, ConfigError):
    """Settings in a dictionary that make no config; also the error that cattrs raises for it."""

    def __str__(self) -> str:
        return str(self.message)


def check(
    test: Callable[[Any], bool], message: str, error: type[ConfigError] = ConfigError
) -> Validator:
    """Return a validator that raises if a test fails; the message may show name and value."""

    def validate(_config: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
        if not test(value):
            msg = message.format(name=attribute.name, value=value)
            raise error(msg)

    return validate


def is_a(kind: type, what: str) -> Validator:
    """Return a validator of the type, described by ``what``."""
    # Not isinstance: a bool is no integer here.
    return check(
        lambda value: type(value) is kind,
        f"{{name}} must be {what}, got {{value!r}}",
        ConfigTypeError,
    )


def one_of(allowed: Sequence[Any], message: str) -> Validator:
    """Return a validator of a choice; the message may show what is allowed."""
    return check(lambda value: value in allowed, message.replace("{allowed}", str(tuple(allowed))))


def at_least(least: int) -> Validator:
    """Return a validator of a lower limit."""
    return check(lambda value: value >= least, f"{{name}} must be at least {least}, got {{value}}")


is_text = is_a(str, "text")
is_integer = is_a(int, "an integer")
is_number = is_a(float, "a number")
is_flag = is_a(bool, "True or False")
is_fraction = check(
    lambda value: 0 <= value <= 1, 'Invalid value of "{name}": {value}. Needs to be in [0, 1].'
)


def upper(value: str) -> str:
    """Turn text into upper case; the rest is left to the validator."""
    return value.upper() if isinstance(value, str) else value


def whole(value: Any) -> Any:
    """Turn NumPy's integers into Python's; what is no integer is left to the validator."""
    return value if isinstance(value, bool) or not isinstance(value, Integral) else int(value)


def real(value: Any) -> Any:
    """Turn NumPy's numbers and integers into floats; the rest is left to the validator."""
    try:
        return value if isinstance(value, bool) or not isinstance(value, Real) else float(value)
    except OverflowError:
        # Out of any range that a setting has.
        return math.inf


def wholes(value: Any) -> Any:
    """Do what `whole` does, to each element of a list or tuple."""
    return tuple(map(whole, value)) if isinstance(value, (list, tuple)) else whole(value)


def integer(default: int | None, *checks: Validator) -> Any:
    """Return a field for an integer, which may be ``None`` if that is the default."""
    valid: Any = [is_integer, *checks]
    return field(
        default=default,
        converter=whole,
        validator=optional(valid) if default is None else valid,
    )


def choice(default: str, *others: str) -> Any:
    """Return a keyword-only field for one of some words."""
    return field(
        default=default,
        kw_only=True,
        validator=one_of((default, *others), "{name} must be one of {allowed}, got {value!r}"),
    )


def enumerated(kind: type[_E], value: Any) -> _E:
    """Turn a value, or a member of an enum with the same values, into a member."""
    try:
        return kind(getattr(value, "value", value))
    except ValueError as error:
        msg = f"{kind.__name__} must be one of {[item.value for item in kind]}, got {value!r}"
        raise ConfigError(msg) from error


def _as_given(value: Any, _kind: Any) -> Any:
    return value


# cattrs would make the text "no" True and 2.7 two; the configs' checks are to see what is given.
_converter = cattrs.Converter(forbid_extra_keys=True)
_converter.register_structure_hook_func(lambda kind: not attrs.has(kind), _as_given)
for _plain in (bool, float, int, str, Enum):
    _converter.register_structure_hook(_plain, _as_given)


def structure(settings: Any, kind: type[_T], place: str) -> _T:
    """Make a config from a dictionary of its fields.

    Raises
    ------
    ConfigDictError
        If a key is unknown or a value is not what it must be; it names ``place``.
    """
    check_mapping(settings, place)
    try:
        return _converter.structure(settings, kind)
    except ClassValidationError as error:
        msg = "\n".join(problems_of(error, place))
        raise ConfigDictError(msg, error.exceptions, kind) from None


def check_mapping(value: Any, place: str) -> None:
    """Raise `ConfigTypeError` if something is no dictionary with text as keys."""
    if not isinstance(value, Mapping):
        msg = f"{place} must be type of dict. Got {type(value)}."
        raise ConfigTypeError(msg)
    for key in value:
        if not isinstance(key, str):
            msg = f"{place} must have text keys, got {key!r}"
            raise ConfigTypeError(msg)
