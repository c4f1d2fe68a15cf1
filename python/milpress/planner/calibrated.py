"""What each format of each item does to a model's outputs on samples."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from milpress._parallel import in_order
from milpress.compression import Progress
from milpress.errors import UnsupportedError
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

# Picks the name of a format for each item, given the errors of all of them.
Choose: TypeAlias = Callable[[Sequence[Mapping[str, float]]], Sequence[str]]

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
    choose: Choose,
    kept: ScoreCache,
    progress: Progress | None = None,
) -> Calibrated:
    """Return the error of the outputs that each format of each item makes by itself.

    To first order, from squared gradients of the outputs, for all items and formats. The model is
    then run with the formats that ``choose`` picks by these errors, one at a time, which tells by
    how much those of an item are to be multiplied; and again with what it picks then. With
    ``exact``, it is run with every format of every item instead.

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
        {"", *(f"{function}/" for function in program.functions.values())},
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
    return _corrected(model, items, choose)


def _corrected(model: _Model, items: Sequence[Item], choose: Choose) -> Calibrated:
    """Correct first-order errors where a plan made of them would be, as long as runs are left."""
    first = model.first_order(items)
    left = max(1, int(sum(map(len, first)) * _CHECKED) - _GRADIENTS)
    runs: list[dict[str, float]] = [{} for _ in items]
    places = {id(item): i for i, item in enumerate(items)}
    errors = first
    while left > 0:
        pairs = [
            (errors[i][name], i, name)
            for i, name in enumerate(choose(errors))
            if name != KEEP and name not in runs[i]
        ]
        pairs.sort(key=lambda one: (-one[0], one[1]))
        chosen = [(items[i], name) for _, i, name in pairs[:left]]
        if not chosen:
            break
        for item, name, error in model.run(chosen):
            runs[places[id(item)]][name] = error
        left -= len(chosen)
        usual = _mean(_factors(first, runs))
        errors = [
            {
                name: error * math.exp(_factor(error, some, ran, usual))
                for name, error in some.items()
            }
            for some, ran in zip(first, runs, strict=True)
        ]
    factors = _factors(first, runs)
    return Calibrated(
        errors=errors,
        n_run=sum(map(len, runs)),
        off_by=math.exp(_mean([abs(one) for one in factors])),
    )


def _factors(
    first: Sequence[Mapping[str, float]], runs: Sequence[Mapping[str, float]]
) -> list[float]:
    """Return the logarithms of the factors by which first-order errors were too small."""
    return [log for some, ran in zip(first, runs, strict=True) for _, log in _known(some, ran)]


def _known(first: Mapping[str, float], ran: Mapping[str, float]) -> list[tuple[float, float]]:
    """Return logarithms of first-order errors and of what they are to be multiplied by."""
    return sorted(
        (math.log(first[name]), math.log(error / first[name]))
        for name, error in ran.items()
        if first[name] > 0 and 0 < error < math.inf
    )


def _factor(
    error: float, first: Mapping[str, float], ran: Mapping[str, float], usual: float
) -> float:
    """Return the logarithm of what a first-order error is to be multiplied by.

    That is what was found for the item's errors next to it, in proportion to how near they are.
    """
    known = _known(first, ran)
    if not known or error <= 0:
        return usual
    return float(np.interp(math.log(error), [x for x, _ in known], [y for _, y in known]))


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers) if numbers else 0.0


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
        self, error: OutputError, prefixes: set[str], key: str, kept: ScoreCache, note: Progress
    ) -> None:
        self._error = error
        self._prefixes = prefixes
        self._key = key
        self._kept = kept
        self._note = note

    def check(self, items: Sequence[Item]) -> None:
        """Raise `UnsupportedError` if an item is not part of what is run."""
        for item in items:
            if not any(self._names(item).values()):
                msg = (
                    f"{item.name}: with samples, every weight must be used by the function that "
                    "is run, got one that is not; name it with keep"
                )
                raise UnsupportedError(msg)

    def _names(self, item: Item) -> dict[int, list[str]]:
        """Return the names of an item's weights in what is run, by the place of their twin."""
        names: dict[int, list[str]] = {i: [] for i in item.distinct}
        for i, candidate in enumerate(item.candidates):
            name = candidate.weight.node.name
            if candidate.weight.prefix in self._prefixes and self._error.has(name):
                names[item.twin(i)].append(name)
        return names

    def run(self, pairs: Sequence[tuple[Item, str]]) -> Iterator[tuple[Item, str, float]]:
        """Yield the exact error of each pair of an item and a format."""
        for i, (item, name) in enumerate(pairs):
            self._note(i, len(pairs), item.name)
            key = self._key_of("exact", item, name)
            known = self._kept.get(key, 1)
            if known is None:
                known = [self._error.error(self._replaced(item, name))]
                self._kept.put({key: known})
            yield item, name, known[0]
        self._note(len(pairs), len(pairs), "")

    def _replaced(self, item: Item, name: str) -> dict[str, NDArray[Any]]:
        """Return the values that a format gives each weight of an item, by name."""
        return {
            one: made
            for i, some in self._names(item).items()
            for made in [_treated(item, i, name, item.candidates[i].array())]
            for one in some
        }

    def first_order(self, items: Sequence[Item]) -> list[dict[str, float]]:
        """Return the first-order error of each format of each item."""
        names = [[name for name in item.choices if name != KEEP] for item in items]
        keys = [
            {name: self._key_of("first", item, name) for name in some}
            for item, some in zip(items, names, strict=True)
        ]
        known = [{name: self._kept.get(key, 1) for name, key in some.items()} for some in keys]
        if any(numbers is None for some in known for numbers in some.values()):
            by_item = [{i: some for i, some in self._names(item).items() if some} for item in items]
            groups = [
                (some, item.candidates[i].axes[0])
                for item, groups in zip(items, by_item, strict=True)
                for i, some in groups.items()
            ]
            gradients = iter(self._error.gradients(groups, self._note))
            work = [
                (item, some, {i: next(gradients) for i in groups})
                for item, some, groups in zip(items, names, by_item, strict=True)
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


def _first_order(
    item: Item, names: Sequence[str], gradients: Mapping[int, Gradients]
) -> dict[str, float]:
    found = dict.fromkeys(names, 0.0)
    for i, gradient in gradients.items():
        array = item.candidates[i].array()
        weight = array.astype(np.float32)
        for name in names:
            change = _treated(item, i, name, array).astype(np.float32) - weight
            found[name] += gradient.error(weight, change, item.candidates[i].axes[0])
    return found


def _treated(item: Item, i: int, name: str, array: NDArray[Any]) -> NDArray[Any]:
    treatment: Treatment | None = item.choices[name].treatments[i]
    if treatment is None:
        return array
    output, inputs = item.candidates[i].axes
    return compress(array, treatment, channel_axis=output, input_axis=inputs).dense()
