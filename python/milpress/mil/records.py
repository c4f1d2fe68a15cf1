"""Records of what was done to a model, kept in its user metadata so that `verify` can judge it.

Each is one JSON text under a key of its own. That of weights lists, for each list of treatments in
the recipe's words, the weights it was done to, each by its name in the source and the name of the
result, and a digest of each corrected bias by the name of its layer; that of activations lists the
pairs of ops that were inserted; that of tuning, the digest of each array that was tuned, by the op
that stores it and the parameter::

    {"version": 1, "treatments": [
        {"steps": [{"palettize": {...}}], "weights": {"w": "w_palettized"}}]}
    {"version": 1, "settings": [{...}], "pairs": {"dequantize_0": "quantize_0"}}
    {"version": 1, "arrays": {"w_palettized": {"lut": "0123..."}}}
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from milpress.errors import PackageError
from milpress.formats import PruneConfig
from milpress.mil import proto
from milpress.plain import json

TREATMENTS = "com.milpress.treatments"
ACTIVATIONS = "com.milpress.activations"
TUNED = "com.milpress.tuned"

# What `tune` adds to the steps of a weight: from then on nothing is promised of its elements.
TUNE = "tune"

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


class WeightRecord(NamedTuple):
    """What was done to one weight, in order, and the name of what came of it."""

    steps: tuple[Step, ...]
    result: str


def promise_of(steps: Sequence[Step]) -> Promise:
    """Return what steps, done to a dense weight, promise of every element.

    Palettized values, or vectors without scales, have the nearest entry, unclipped quantized ones
    are within half a step, pruned ones are zero and the others equal; pruning may come first,
    though not of vectors. Elsewhere, and where errors were fed back or values were tuned, nothing
    is promised but the number of zeros, and the signal-to-noise ratio says what was lost.
    """
    if any("feedback" in settings for step in steps for settings in step.values()):
        return "none"
    if is_tuned(steps):
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


def is_tuned(steps: Sequence[Step]) -> bool:
    """Whether tables, scales or values of a weight were tuned."""
    return any(TUNE in step for step in steps)


@dataclass(slots=True)
class WeightRecords:
    """The record of each treated weight, by its name in the source.

    ``biases`` holds digests of biases that were corrected, by the names of their layers.
    """

    by_source: dict[str, WeightRecord] = field(default_factory=dict)
    biases: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, model: proto.Model) -> WeightRecords:
        """Return the records of a model; none where there is no record.

        Raises
        ------
        PackageError
            If the record is not of the form that `write` gives it.
        """
        records = cls()
        with _stored(model, TREATMENTS, {"version": 1, "treatments": []}) as data:
            for group in data["treatments"]:
                steps = tuple(_step(step) for step in group["steps"])
                promise_of(steps)
                for source, result in group["weights"].items():
                    records.by_source[str(source)] = WeightRecord(steps, str(result))
            for layer, digest in data.get("biases", {}).items():
                records.biases[str(layer)] = str(digest)
        return records

    def write(self, model: proto.Model) -> None:
        """Write the records into a model."""
        groups: dict[str, dict[str, str]] = {}
        for source, record in self.by_source.items():
            groups.setdefault(json.text(record.steps, sort_keys=True), {})[source] = record.result
        treatments = [
            {"steps": json.read(steps), "weights": names} for steps, names in groups.items()
        ]
        biases = {"biases": self.biases} if self.biases else {}
        _store(model, TREATMENTS, treatments=treatments, **biases)

    def find(self, name: str) -> tuple[str, WeightRecord] | None:
        """Return the source's name and the record of a weight, by either of its names."""
        if name in self.by_source:
            return name, self.by_source[name]
        for source, record in self.by_source.items():
            if record.result == name:
                return source, record
        return None

    def add(self, name: str, result: str, steps: Sequence[Step]) -> None:
        """Note the steps that a weight took, after those that it took before."""
        earlier = self.find(name)
        source, before = (name, ()) if earlier is None else (earlier[0], earlier[1].steps)
        self.by_source[source] = WeightRecord((*before, *steps), result)


@dataclass(slots=True)
class ActivationRecord:
    """What was inserted: each ``dequantize`` and the ``quantize`` before it, by their names.

    Names begin with the functions or models that they are in, like those of weights.
    """

    pairs: dict[str, str] = field(default_factory=dict)
    settings: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, model: proto.Model) -> ActivationRecord:
        """Return the record of a model; an empty one where there is none.

        Raises
        ------
        PackageError
            If the record is not of the form that `write` gives it.
        """
        record = cls()
        with _stored(model, ACTIVATIONS, {"version": 1, "settings": [], "pairs": {}}) as data:
            record.pairs = {str(name): str(codes) for name, codes in data["pairs"].items()}
            record.settings = [dict(setting) for setting in data["settings"]]
        return record

    def write(self, model: proto.Model) -> None:
        """Write the record into a model."""
        _store(model, ACTIVATIONS, settings=self.settings, pairs=self.pairs)


@dataclass(slots=True)
class TunedRecord:
    """The digest of each tuned array, by the name of the op that stores it and its parameter.

    Names begin with the functions or models that they are in, like those of weights.
    """

    arrays: dict[str, dict[str, str]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: proto.Model) -> TunedRecord:
        """Return the record of a model; an empty one where there is none.

        Raises
        ------
        PackageError
            If the record is not of the form that `write` gives it.
        """
        record = cls()
        with _stored(model, TUNED, {"version": 1, "arrays": {}}) as data:
            record.arrays = {
                str(op): {str(name): str(digest) for name, digest in parameters.items()}
                for op, parameters in data["arrays"].items()
            }
        return record

    def write(self, model: proto.Model) -> None:
        """Write the record into a model, or take it out if it is empty."""
        if self.arrays:
            _store(model, TUNED, arrays=self.arrays)
        else:
            forget(model, TUNED)

    def digest(self, op: str, parameter: str) -> str | None:
        """Return the digest of an array, if it was tuned."""
        return self.arrays.get(op, {}).get(parameter)

    def beyond(self, before: TunedRecord) -> dict[tuple[str, str], str]:
        """Return what an earlier record of the same package lacks or has otherwise."""
        return {
            (op, name): digest
            for op, parameters in self.arrays.items()
            for name, digest in parameters.items()
            if before.digest(op, name) != digest
        }


def forget(model: proto.Model, key: str) -> None:
    """Remove a record."""
    model.description.metadata.userDefined.pop(key, None)


def array_digest(array: NDArray[Any]) -> str:
    """Return what the record of a corrected bias or of a tuned array keeps of it."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:32]


def _step(data: Any) -> Step:
    """Return a step of which `verify` can read what it goes by."""
    ((kind, settings),) = data.items()
    settings = dict(settings.items())
    if kind not in ("palettize", "quantize", "prune", TUNE):
        msg = f"the treatment {kind!r}"
        raise ValueError(msg)
    if kind == "prune":
        _check_pruning(settings)
    return {kind: settings}


def _check_pruning(settings: dict[str, Any]) -> None:
    numbers = {key: settings[key] for key in _PRUNING if key in settings}
    for key, value in numbers.items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, bool) or not isinstance(number, _PRUNING[key]):
                msg = f"{number!r} as {key}"
                raise TypeError(msg)
    if numbers:
        PruneConfig(**numbers)


@contextlib.contextmanager
def _stored(model: proto.Model, key: str, absent: dict[str, Any]) -> Iterator[Any]:
    """Give out what a record holds to be read; what can't be read is refused with the key."""
    metadata = model.description.metadata.userDefined
    try:
        data = json.read(metadata[key]) if key in metadata else absent
        if data["version"] != 1:
            msg = f"version {data['version']!r}"
            raise ValueError(msg)
        yield data
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        msg = f"the user metadata {key} is not a record of version 1: {error}"
        raise PackageError(msg) from error


def _store(model: proto.Model, key: str, **data: Any) -> None:
    text = json.text({"version": 1, **data}, separators=(",", ":"))
    model.description.metadata.userDefined[key] = text
