"""The record of what was done, kept in the package's user metadata so that `verify` can judge it.

One JSON text under one key of the model's description: for each list of treatments, in the recipe's
words, the weights it was done to, each by its name in the source and the name of the result::

    {"version": 1, "treatments": [
        {"steps": [{"palettize": {...}}], "weights": {"w": "w_palettized"}}]}

Where biases were corrected, ``"biases"`` holds a digest of each by the name of its layer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from milpress.errors import PackageError
from milpress.formats import PruneConfig
from milpress.mil import proto
from milpress.plain import json

KEY = "com.milpress.treatments"

# What pruning is judged by, and the types of its numbers.
_PRUNING = {
    "sparsity": int | float,
    "threshold": int | float,
    "n_m": int,
    "block_size": int,
    "axis": int,
}

Promise: TypeAlias = Literal["nearest", "half_step", "pruned", "none"]
Step: TypeAlias = dict[str, dict[str, Any]]


class Record(NamedTuple):
    """What was done to one weight, in order, and the name of what came of it."""

    steps: tuple[Step, ...]
    result: str

    @property
    def promise(self) -> Promise:
        """What the steps promise of every element."""
        return promise_of(self.steps)


def promise_of(steps: Sequence[Step]) -> Promise:
    """Return what steps, done to a dense weight, promise of every element.

    Palettized values, or vectors without scales, have the nearest entry, unclipped quantized ones
    are within half a step, pruned ones are zero and the others equal; pruning may come first,
    though not of vectors. Elsewhere, and where errors were fed back, nothing is promised but the
    number of zeros, and the signal-to-noise ratio says what was lost.
    """
    if any("feedback" in settings for step in steps for settings in step.values()):
        return "none"
    coding = [step for step in steps if "prune" not in step]
    if not coding:
        return "pruned" if len(steps) == 1 else "none"
    if len(coding) > 1 or len(steps) > 2 or steps[-1] is not coding[0]:
        return "none"
    palettize = coding[0].get("palettize")
    if palettize is not None:
        is_free = palettize.get("table") == "custom"
        if palettize.get("vector_size", 1) > 1:
            is_free |= len(steps) > 1 or palettize.get("channel_scale", False)
        return "none" if is_free else "nearest"
    return "none" if "range" in coding[0]["quantize"] else "half_step"


@dataclass(slots=True)
class Records:
    """The record of each treated weight, by its name in the source.

    ``biases`` holds digests of biases that were corrected, by the names of their layers.
    """

    by_source: dict[str, Record] = field(default_factory=dict)
    biases: dict[str, str] = field(default_factory=dict)

    def find(self, name: str) -> tuple[str, Record] | None:
        """Return the source's name and the record of a weight, by either of its names."""
        if name in self.by_source:
            return name, self.by_source[name]
        for source, record in self.by_source.items():
            if record.result == name:
                return source, record
        return None

    def add(self, name: str, result: str, done: Sequence[Step]) -> None:
        """Note what was done to a weight, after what had been done to it before."""
        found = self.find(name)
        source, before = (name, ()) if found is None else (found[0], found[1].steps)
        self.by_source[source] = Record((*before, *done), result)


def bias_digest(bias: NDArray[Any]) -> str:
    """Return what the record of a corrected bias keeps of it."""
    return hashlib.sha256(np.ascontiguousarray(bias).tobytes()).hexdigest()[:32]


def read(model: proto.Model) -> Records:
    """Return the records of a model; none where there is no record.

    Raises
    ------
    PackageError
        If the record is not of the form that `record` writes.
    """
    metadata = model.description.metadata.userDefined
    if KEY not in metadata:
        return Records()
    try:
        data = json.read(metadata[KEY])
        if data["version"] != 1:
            msg = f"version {data['version']!r}"
            raise ValueError(msg)
        found = Records()
        for group in data["treatments"]:
            steps = tuple(_checked(step) for step in group["steps"])
            promise_of(steps)
            for source, result in group["weights"].items():
                found.by_source[str(source)] = Record(steps, str(result))
        for layer, digest in data.get("biases", {}).items():
            found.biases[str(layer)] = str(digest)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        msg = f"the user metadata {KEY} is not a record of version 1: {error}"
        raise PackageError(msg) from error
    return found


def _checked(step: Any) -> Step:
    """Return a step of which `verify` can read what it goes by."""
    ((kind, settings),) = step.items()
    settings = dict(settings.items())
    if kind not in ("palettize", "quantize", "prune"):
        msg = f"the treatment {kind!r}"
        raise ValueError(msg)
    if kind == "prune":
        _check_pruning(settings)
    return {kind: settings}


def _check_pruning(settings: dict[str, Any]) -> None:
    known = {key: settings[key] for key in _PRUNING if key in settings}
    for key, value in known.items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, bool) or not isinstance(number, _PRUNING[key]):
                msg = f"{number!r} as {key}"
                raise TypeError(msg)
    if known:
        PruneConfig(**known)


def record(model: proto.Model, records: Records) -> None:
    """Write the records into the model."""
    groups: dict[str, dict[str, str]] = {}
    for source, entry in records.by_source.items():
        groups.setdefault(json.text(entry.steps, sort_keys=True), {})[source] = entry.result
    data: dict[str, Any] = {
        "version": 1,
        "treatments": [
            {"steps": json.read(steps), "weights": names} for steps, names in groups.items()
        ],
    }
    if records.biases:
        data["biases"] = records.biases
    model.description.metadata.userDefined[KEY] = json.text(data, separators=(",", ":"))


def forget(model: proto.Model) -> None:
    """Remove the record."""
    model.description.metadata.userDefined.pop(KEY, None)
