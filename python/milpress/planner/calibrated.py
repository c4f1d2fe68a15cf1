"""What each format of each item does to a model's outputs on samples."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from milpress._parallel import in_order
from milpress.compression import Progress
from milpress.formats import Treatment, compress
from milpress.mil.package import Package
from milpress.mil.weights import weight_files
from milpress.planner.cache import ScoreCache, joined
from milpress.planner.items import Item
from milpress.planner.menu import KEEP
from milpress.recipe import treatment_dict
from milpress.samples import Data, Samples

if TYPE_CHECKING:
    from milpress.interpreter.sensitivity import Gradients, OutputError, OutputMetric

# Change it whenever the same model, samples and treatment may get another error.
_VERSION = 1
# What correcting first-order errors may cost beside running all pairs of items and formats: a tenth
# of them, less the pass for the gradients, which takes about as long as three.
_CHECKED = 1 / 10
_GRADIENTS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrated:
    """The errors of a model's outputs.

    Parameters
    ----------
    errors
        By item and format.
    n_run
        How many pairs of an item and a format were run.
    off_by
        The mean factor, up or down, by which uncorrected first-order errors were off where they
        were run; ``None`` if all errors are exact.
    """

    errors: list[dict[str, float]]
    n_run: int
    off_by: float | None


def calibrate(
    package: Package,
    items: Sequence[Item],
    data: Data,
    *,
    metric: OutputMetric,
    exact: bool,
    kept: ScoreCache,
    progress: Progress | None = None,
) -> Calibrated:
    """Return the error of the outputs that each format of each item makes by itself.

    To first order, from squared gradients of the outputs, for all items and formats; the model is
    run with one format of each item, which tells by how much its first-order errors are to be
    multiplied. With ``exact``, it is run with every format of every item instead.

    Raises
    ------
    InputError
        If a sample is not what the model takes.
    UnsupportedError
        If the model is a pipeline, or an item is not part of the function that is run.
    """
    from milpress.interpreter import load
    from milpress.interpreter.sensitivity import OutputError

    source = package.reopened()
    program = load(source)
    samples = Samples(data, program.inputs)
    model = _Model(
        OutputError(program, samples, metric),
        package,
        joined(_VERSION, _digest(source), samples.digest(), metric),
        kept,
        progress or (lambda *_: None),
    )
    model.check(items)
    if exact:
        pairs = [(item, name) for item in items for name in item.choices if name != KEEP]
        found = {(id(item), name): error for item, name, error in model.run(pairs)}
        errors = [
            {name: found[id(item), name] for name in item.choices if name != KEEP} for item in items
        ]
        return Calibrated(errors=errors, n_run=len(pairs), off_by=None)
    return _corrected(model, items)


def _corrected(model: _Model, items: Sequence[Item]) -> Calibrated:
    """Multiply the first-order errors of each item by what running one of its formats tells."""
    first = model.first_order(items)
    pairs = _to_run(items, first)
    factors: dict[int, float] = {}
    places = {id(item): i for i, item in enumerate(items)}
    for item, name, error in model.run(pairs):
        expected = first[places[id(item)]][name]
        if expected > 0 and 0 < error < math.inf:
            factors[id(item)] = error / expected
    logs = [math.log(factor) for factor in factors.values()]
    usual = math.exp(sum(logs) / len(logs)) if logs else 1.0
    return Calibrated(
        errors=[
            {name: error * factors.get(id(item), usual) for name, error in some.items()}
            for item, some in zip(items, first, strict=True)
        ],
        n_run=len(pairs),
        off_by=math.exp(sum(map(abs, logs)) / len(logs)) if logs else 1.0,
    )


def _to_run(items: Sequence[Item], first: Sequence[Mapping[str, float]]) -> list[tuple[Item, str]]:
    """Return one pair for as many items as may be run, those that make the greatest errors first.

    Of an item's formats that is taken whose error is the median one: small errors are hard to tell
    from rounding, for large ones the outputs no longer move in proportion.
    """
    n_pairs = sum(map(len, first))
    most = max(1, int(n_pairs * _CHECKED) - _GRADIENTS)
    found = []
    for item, some in zip(items, first, strict=True):
        names = sorted(some, key=lambda name: (some[name], name))
        if names:
            middle = names[len(names) // 2]
            found.append((some[middle], item, middle))
    found.sort(key=lambda one: -one[0])
    return [(item, name) for _, item, name in found[:most]]


def _digest(package: Package) -> str:
    """Return a hash of a package's model and weights."""
    found = hashlib.sha256(package.model_bytes)
    for name in weight_files(package):
        with package.weight_path(name).open("rb") as file:
            while block := file.read(1 << 20):
                found.update(block)
    return found.hexdigest()


class _Model:
    """The outputs' error as a function of formats, remembered by the cache."""

    def __init__(
        self, error: OutputError, package: Package, key: str, kept: ScoreCache, note: Progress
    ) -> None:
        self._error = error
        self._package = package
        self._key = key
        self._kept = kept
        self._note = note

    def check(self, items: Sequence[Item]) -> None:
        """Raise `UnsupportedError` if an item is not part of what is run."""
        from milpress.errors import UnsupportedError

        for item in items:
            for candidate in item.candidates:
                if not self._error.has(candidate.weight.node.name):
                    msg = (
                        f"{candidate.weight.name}: with samples, every weight must be used by the "
                        "function that is run, got one that is not; name it with keep"
                    )
                    raise UnsupportedError(msg)

    def run(self, pairs: Sequence[tuple[Item, str]]) -> Iterator[tuple[Item, str, float]]:
        """Yield the exact error of each pair of an item and a format."""
        for i, (item, name) in enumerate(pairs):
            self._note(i, len(pairs), item.name)
            key = self._key_of("exact", item, name)
            known = self._kept.get(key, 1)
            if known is None:
                known = [self._error.error(_replaced(item, name))]
                self._kept.put({key: known})
            yield item, name, known[0]
        self._note(len(pairs), len(pairs), "")

    def first_order(self, items: Sequence[Item]) -> list[dict[str, float]]:
        """Return the first-order error of each format of each item."""
        names = [[name for name in item.choices if name != KEEP] for item in items]
        keys = [
            {name: self._key_of("first", item, name) for name in some}
            for item, some in zip(items, names, strict=True)
        ]
        known = [{name: self._kept.get(key, 1) for name, key in some.items()} for some in keys]
        if any(numbers is None for some in known for numbers in some.values()):
            groups = [group for item in items for group in _groups(item)]
            gradients = iter(self._error.gradients(groups, self._note))
            work = [
                (item, some, [next(gradients) for _ in item.distinct])
                for item, some in zip(items, names, strict=True)
            ]
            made = in_order(lambda one: _first_order(*one), work)
            for i, errors in enumerate(made):
                self._note(i, len(items), items[i].name)
                self._kept.put({keys[i][name]: [error] for name, error in errors.items()})
                known[i] = {name: [error] for name, error in errors.items()}
            self._note(len(items), len(items), "")
        return [
            {name: numbers[0] for name, numbers in some.items() if numbers is not None}
            for some in known
        ]

    def _key_of(self, kind: str, item: Item, name: str) -> str:
        treatments = [
            None if treatment is None else treatment_dict(treatment)
            for treatment in item.choices[name].treatments
        ]
        return joined(kind, self._key, item.name, treatments)


def _groups(item: Item) -> list[tuple[list[str], int]]:
    """Return names of an item's weights, those together that always have the same values.

    With each the axis of the output channels.
    """
    names: dict[int, list[str]] = {i: [] for i in item.distinct}
    for i, candidate in enumerate(item.candidates):
        names[item.twin(i)].append(candidate.weight.node.name)
    return [(some, item.candidates[i].axes[0]) for i, some in names.items()]


def _first_order(
    item: Item, names: Sequence[str], gradients: Sequence[Gradients]
) -> dict[str, float]:
    found = dict.fromkeys(names, 0.0)
    for i, gradient in zip(item.distinct, gradients, strict=True):
        array = item.candidates[i].array()
        weight = array.astype(np.float32)
        for name in names:
            change = _treated(item, i, name, array).astype(np.float32) - weight
            found[name] += gradient.error(weight, change, item.candidates[i].axes[0])
    return found


def _replaced(item: Item, name: str) -> dict[str, NDArray[Any]]:
    """Return the values that a format gives each weight of an item, by its name in the program."""
    made = {i: _treated(item, i, name, item.candidates[i].array()) for i in item.distinct}
    return {
        candidate.weight.node.name: made[item.twin(i)]
        for i, candidate in enumerate(item.candidates)
    }


def _treated(item: Item, i: int, name: str, array: NDArray[Any]) -> NDArray[Any]:
    treatment: Treatment | None = item.choices[name].treatments[i]
    if treatment is None:
        return array
    output, inputs = item.candidates[i].axes
    return compress(array, treatment, channel_axis=output, input_axis=inputs).dense()
