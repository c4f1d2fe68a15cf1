"""Values out of plain data, as JSON and YAML give it: every place that is wrong is named.

cattrs is imported once something is read: who reads nothing does not wait for it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from collections.abc import Callable, Mapping
from types import GenericAlias
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args, get_origin

from milpress.errors import CompressionError, ResultError

if TYPE_CHECKING:
    from cattrs import Converter

# A ratio in dB, which may be infinite; JSON has it as "inf" or "-inf" then.
Decibels = typing.NewType("Decibels", float)
# A number that may also be "nan". Who computes one need not say that it is one.
if TYPE_CHECKING:
    Metric: TypeAlias = float
else:
    Metric = typing.NewType("Metric", float)

_MOST_LINES = 20
_MOST_SHOWN = 200


class _WrongTypeError(ValueError):
    """What a value must be, and is not; the name of the value goes in front."""


def structured(
    data: Any,
    kind: Any,
    place: str,
    *,
    error: type[CompressionError] = ResultError,
    strict: bool = True,
    converter: Converter | None = None,
) -> Any:
    """Return a value of a type from plain data.

    Parameters
    ----------
    data
        What was read.
    kind
        A dataclass, whose fields are dataclasses, lists as tuples, numbers, text and so on.
    place
        What it is, for messages, such as the name of a file; may be empty.
    error
        What is raised if it is not just that: a line for each place that is wrong.
    strict
        Whether keys that the type does not have are refused.
    converter
        A `reader` with hooks of its own.
    """
    from cattrs.errors import BaseValidationError

    try:
        return (converter or _shared(strict=strict)).structure(data, kind)
    except (ValueError, BaseValidationError) as wrong:
        problems = problems_of(wrong, place)
    if len(problems) > _MOST_LINES:
        n_more = len(problems) - _MOST_LINES
        problems[_MOST_LINES:] = [_at(place, (), f"and {n_more} more places")]
    raise error(*problems)


def brief(value: Any) -> str:
    """Return how Python writes a value, cut to what fits into a message."""
    shown = repr(value)
    return shown if len(shown) <= _MOST_SHOWN else f"{shown[: _MOST_SHOWN - 3]}..."


def _wrong(value: Any, wanted: str) -> _WrongTypeError:
    return _WrongTypeError(f"must be {wanted}, got {brief(value)}")


def problems_of(error: BaseException, place: str, path: tuple[str, ...] = ()) -> list[str]:
    """Return a line for all that cattrs found wrong, each with its place."""
    from cattrs.errors import BaseValidationError, ForbiddenExtraKeysError

    if isinstance(error, BaseValidationError):
        lines, missing = [], []
        for each in error.exceptions:
            step = _step(each)
            if isinstance(each, KeyError):
                missing.append(step.removeprefix("."))
            else:
                lines += problems_of(each, place, (*path, step) if step else path)
        if missing:
            lines.append(_at(place, path, f"{', '.join(missing)} must be given"))
        return lines
    if isinstance(error, ForbiddenExtraKeysError):
        keys = ", ".join(sorted(error.extra_fields))
        items = getattr(error.cl, "__attrs_attrs__", None) or dataclasses.fields(error.cl)
        known = ", ".join(item.name for item in items)
        many = "s" if len(error.extra_fields) > 1 else ""
        return [_at(place, path, f"unknown key{many} {keys}; the keys are {known}")]
    if isinstance(error, _WrongTypeError):
        # The name of what is wrong begins the sentence; what is around it is the place.
        start = max((i for i, step in enumerate(path) if step.startswith(".")), default=0)
        name = "".join(path[start:]).removeprefix(".")
        return [
            _at(place, path[:start], f"{name} {error}") if name else f"{place or 'data'} {error}"
        ]
    return [_at(place, path, str(error))]


def _at(place: str, path: tuple[str, ...], sentence: str) -> str:
    return ": ".join(filter(None, (place, "".join(path).removeprefix("."), sentence)))


def _step(error: BaseException) -> str:
    """Return how it goes on from a value to that in it which cattrs names in its note."""
    for note in getattr(error, "__notes__", ()):
        if hasattr(note, "name"):
            return f".{note.name}"
        if hasattr(note, "index"):
            return f"[{note.index!r}]"
    return ""


def reader(*, strict: bool = True) -> Converter:
    """Return what reads dataclasses; with ``strict``, keys that they don't have are refused."""
    from cattrs import Converter

    converter = Converter(forbid_extra_keys=strict)
    for kind, read in _SCALARS.items():
        converter.register_structure_hook(kind, read)

    # cattrs takes the letters of a text for a list, and its own words for what is no mapping.
    def record(kind: Any) -> Callable[[Any, Any], Any]:
        fill = converter.gen_structure_attrs_fromdict(kind)
        return lambda data, _: fill(_mapping(data), kind)

    def sequence(data: Any, kind: Any) -> tuple[Any, ...]:
        first, *others = get_args(kind)
        if not isinstance(data, list):
            raise _wrong(data, "a list")
        if others != [...] and len(data) != len(others) + 1:
            raise _wrong(data, f"a list of {len(others) + 1}")
        items: Any = GenericAlias(list, (first,))
        return tuple(converter.structure(data, items))

    def mapping(data: Any, kind: Any) -> dict[str, Any]:
        items: Any = GenericAlias(Mapping, get_args(kind))
        return dict(converter.structure(_mapping(data), items))

    converter.register_structure_hook_factory(dataclasses.is_dataclass, record)
    converter.register_structure_hook_func(lambda kind: _is_of(kind, Literal), _choice)
    converter.register_structure_hook_func(lambda kind: _is_of(kind, tuple), sequence)
    converter.register_structure_hook_func(lambda kind: _is_of(kind, dict), mapping)
    return converter


def _is_of(kind: Any, origin: Any) -> bool:
    return get_origin(kind) is origin


def number(data: Any, _: Any = None) -> int | float:
    """Return a finite number as it is; anything else is refused."""
    if isinstance(data, bool) or not isinstance(data, (int, float)) or not _is_finite(data):
        raise _wrong(data, "a finite number")
    return data


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _mapping(data: Any) -> Mapping[str, Any]:
    if not isinstance(data, Mapping):
        raise _wrong(data, "a mapping")
    if not all(isinstance(key, str) for key in data):
        raise _wrong(data, "a mapping with text as keys")
    return data


def _choice(data: Any, kind: Any) -> Any:
    choices = get_args(kind)
    # True is 1 for Python, but not for who writes a file.
    if not any(data == choice and type(data) is type(choice) for choice in choices):
        several = "one of " if len(choices) > 1 else ""
        raise _wrong(data, f"{several}{', '.join(map(str, choices))}")
    return data


def _ratio(data: Any, kind: Any) -> float:
    words = ("inf", "-inf", "nan") if kind is Metric else ("inf", "-inf")
    return float(data if data in words else number(data))


def _scalar(data: Any, kind: Any) -> Any:
    if type(data) is not kind:  # not isinstance: a bool is no whole number here
        raise _wrong(data, _WORDS[kind])
    if kind is int and abs(data) >= 1 << 63:
        raise _wrong(data, "a whole number of 64 bits")
    return data


_WORDS: dict[type, str] = {bool: "true or false", int: "a whole number", str: "text"}
_SCALARS: dict[Any, Callable[[Any, Any], Any]] = {
    **dict.fromkeys(_WORDS, _scalar),
    float: lambda data, _: float(number(data)),
    Decibels: _ratio,
    Metric: _ratio,
}
_shared = functools.cache(reader)
