"""Dataclasses out of JSON, with errors that name the place."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, Union, get_args, get_origin

from milpress.errors import ResultError

# A ratio in dB, which may be infinite; JSON has it as "inf" or "-inf" then.
Decibels = typing.NewType("Decibels", float)
# A number that may also be "nan". Who computes one need not say that it is one.
if TYPE_CHECKING:
    Metric: TypeAlias = float
else:
    Metric = typing.NewType("Metric", float)


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def structured(data: Any, kind: Any, place: str, *, strict: bool = True) -> Any:
    """Return a value of a type from JSON.

    Parameters
    ----------
    data
        What was read.
    kind
        A dataclass, whose fields are dataclasses, lists as tuples, numbers, text and so on.
    place
        What it is, for messages.
    strict
        Whether keys that the type does not have are refused.

    Raises
    ------
    ResultError
        If it is not just that; the place in it is named.
    """
    if dataclasses.is_dataclass(kind):
        return _record(data, typing.cast("type[Any]", kind), place, strict)
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        if data is None:
            return None
        (kind,) = (each for each in get_args(kind) if each is not type(None))
        return structured(data, kind, place, strict=strict)
    if origin is Literal:
        if data not in get_args(kind):
            raise _wrong(place, f"one of {', '.join(get_args(kind))}", data)
        return data
    if origin is tuple:
        return _sequence(data, get_args(kind), place, strict)
    if origin is dict:
        if not isinstance(data, dict):
            raise _wrong(place, "an object", data)
        return {
            key: structured(item, get_args(kind)[1], f"{place}: {key}", strict=strict)
            for key, item in data.items()
        }
    return _scalar(data, kind, place)


def _record(data: Any, kind: type[Any], place: str, strict: bool) -> Any:
    if not isinstance(data, dict):
        raise _wrong(place, "an object", data)
    known = {item.name: item for item in fields(kind)}
    unknown = sorted(data.keys() - known.keys())
    if unknown and strict:
        raise _wrong(place, f"an object with {', '.join(known)}", f"also {', '.join(unknown)}")
    missing = [
        name
        for name, item in known.items()
        if name not in data and item.default is dataclasses.MISSING
    ]
    if missing:
        raise _wrong(place, f"an object with {', '.join(missing)}", "none")
    hints = _hints(typing.cast("Any", kind))
    return kind(
        **{
            key: structured(data[key], hints[key], f"{place}: {key}", strict=strict)
            for key in known
            if key in data
        }
    )


def _sequence(data: Any, kinds: tuple[Any, ...], place: str, strict: bool) -> tuple[Any, ...]:
    if not isinstance(data, list):
        raise _wrong(place, "a list", data)
    if kinds[-1] is ...:
        return tuple(
            structured(item, kinds[0], f"{place}[{i}]", strict=strict)
            for i, item in enumerate(data)
        )
    if len(data) != len(kinds):
        raise _wrong(place, f"a list of {len(kinds)}", len(data))
    return tuple(
        structured(item, kind, f"{place}[{i}]", strict=strict)
        for i, (item, kind) in enumerate(zip(data, kinds, strict=True))
    )


def _scalar(data: Any, kind: Any, place: str) -> Any:
    if kind is Decibels and data in ("inf", "-inf"):
        return float(data)
    if kind is Metric and data in ("inf", "-inf", "nan"):
        return float(data)
    if kind in (float, Decibels, Metric):
        if isinstance(data, bool) or not isinstance(data, (int, float)) or not _is_finite(data):
            raise _wrong(place, "a finite number", data)
        return float(data)
    # Not isinstance: a bool is no integer here.
    if type(data) is not kind:
        names = {int: "an integer", str: "text", bool: "true or false"}
        raise _wrong(place, names[kind], data)
    if kind is int and abs(data) >= 1 << 63:
        raise _wrong(place, "an integer of 64 bits", data)
    return data


def _is_finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:
        return False


def _wrong(place: str, wanted: str, got: Any) -> ResultError:
    shown = got if isinstance(got, str) and got.startswith(("also", "none")) else repr(got)
    return ResultError(f"{place} must be {wanted}, got {shown[:200]}")
