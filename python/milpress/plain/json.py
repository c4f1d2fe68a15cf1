"""JSON as its standard has it: without NaN and infinities, which other readers refuse."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any


def number(value: float | None) -> float | str | None:
    """Return a number as JSON can hold it: in words, such as ``"inf"``, if it is not finite."""
    return value if value is None or math.isfinite(value) else str(float(value))


def plain(data: Any) -> Any:
    """Return dictionaries, lists and values with every number as `number` gives it.

    A value is what its own ``to_dict`` says, or a dataclass.
    """
    if hasattr(data, "to_dict"):
        return data.to_dict()
    if dataclasses.is_dataclass(data):
        return record(data)
    if isinstance(data, Mapping):
        return {key: plain(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [plain(value) for value in data]
    return number(data) if isinstance(data, float) else data


def record(value: Any, *names: str) -> dict[str, Any]:
    """Return what a value has by these names, or all fields of a dataclass, as `plain` does."""
    names = names or tuple(item.name for item in dataclasses.fields(value))
    return {name: plain(getattr(value, name)) for name in names}


def text(data: Any, **settings: Any) -> str:
    """Return data as JSON; ``settings`` are of `json.dumps`."""
    return json.dumps(plain(data), allow_nan=False, **settings)


def read(data: str | bytes) -> Any:
    """Return what JSON holds.

    Raises
    ------
    ValueError
        If it is no JSON, nests too deep, or has a number that is not finite.
    """
    try:
        return json.loads(data, parse_constant=_no_constant)
    except RecursionError as error:
        msg = "it must not nest deeper than Python can follow"
        raise ValueError(msg) from error


def _no_constant(name: str) -> Any:
    msg = f"a number must be finite, got {name}"
    raise ValueError(msg)
