"""The record of what was done, kept in the package's user metadata so that `verify` can judge it.

One JSON text under one key of the model's description:
``{"version": 1, "treatments": [{"palettize": {...}, "promise": "nearest", "weights": [...]}]}``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from milpress.errors import PackageError

KEY = "com.milpress.treatments"

Promise: TypeAlias = Literal["nearest", "half_step", "pruned"]


class Record(NamedTuple):
    """What was done to one weight: the recipe's words, and what they promise of every element."""

    treatment: dict[str, Any]
    promise: Promise


def read(model: Any) -> dict[str, Record]:
    """Return the record of each treated weight, by its name; nothing where there is no record.

    Raises
    ------
    PackageError
        If the record is not of the form that `record` writes.
    """
    metadata = model.description.metadata.userDefined
    if KEY not in metadata:
        return {}
    try:
        data = json.loads(metadata[KEY])
        if data["version"] != 1:
            msg = f"version {data['version']!r}"
            raise ValueError(msg)
        found = {}
        for group in data["treatments"]:
            promise = group["promise"]
            if promise not in get_args(Promise):
                msg = f"promise {promise!r}"
                raise ValueError(msg)
            treatment = {key: group[key] for key in group if key not in ("promise", "weights")}
            found.update({str(name): Record(treatment, promise) for name in group["weights"]})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        msg = f"the user metadata {KEY} must be a record of version 1, got another text: {error}"
        raise PackageError(msg) from error
    return found


def record(model: Any, done: Iterable[tuple[str, Record]]) -> None:
    """Add weights, by name, to the model's record."""
    groups: dict[str, list[str]] = {}
    for name, entry in [*read(model).items(), *done]:
        key = json.dumps({**entry.treatment, "promise": entry.promise}, sort_keys=True)
        groups.setdefault(key, []).append(name)
    data = {
        "version": 1,
        "treatments": [{**json.loads(key), "weights": names} for key, names in groups.items()],
    }
    model.description.metadata.userDefined[KEY] = json.dumps(data, separators=(",", ":"))


def forget(model: Any) -> None:
    """Remove the record."""
    model.description.metadata.userDefined.pop(KEY, None)
