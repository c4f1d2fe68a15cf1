"""What each format of each item does to a model's outputs on samples."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from milpress.engines.jobs import Job, jobs_of
from milpress.errors import UnsupportedError
from milpress.formats import Treatment, compress
from milpress.kernels.threads import in_order
from milpress.mil.package import Package
from milpress.mil.weights import weight_files
from milpress.planner.cache import ScoreCache, joined
from milpress.planner.items import Item
from milpress.planner.menu import KEEP
from milpress.progress import Progress
from milpress.recipe import treatment_dict
from milpress.samples.data import Data

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
    unseen
        Names of the items that no sample reaches, whose errors follow from the weights alone.
    notes
        What else there is to know of how the samples were run.
    """

    errors: list[dict[str, float]]
    n_run: int
    off_by: float | None
    unseen: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def calibrate(
    package: Package,
    items: Sequence[Item],
    data: Data,
    *,
    metric: OutputMetric,
    exact: bool,
    choose: Choose,
    kept: ScoreCache,
    relative: Sequence[Mapping[str, float]],
    progress: Progress | None = None,
) -> Calibrated:
    """Return the error of the outputs that each format of each item makes by itself.

    Of several functions, those that the samples suit are run, and the error is the mean of theirs.
    An item that no sample reaches has the errors that its weights have by themselves, on the scale
    of the others.

    To first order, from squared gradients of the outputs, for all items and formats. The model is
    then run with the formats that ``choose`` picks by these errors, one at a time, which tells by
    how much those of an item are to be multiplied; and again with what it picks then. With
    ``exact``, it is run with every format of every item instead.

    Parameters
    ----------
    package, items, data, metric, exact
        As of `milpress.plan`.
    choose
        What picks formats by errors.
    kept
        Where errors are remembered.
    relative
        Of each item, what each format's error is by the weights alone.
    progress
        Called with what is done, how much there is in all and what is at hand.

    Raises
    ------
    InputError
        If the samples suit no function.
    UnsupportedError
        If no output suits the metric, or no sample reaches a weight.
    """
    from milpress.interpreter.sensitivity import OutputError

    source = package.reopened()
    jobs = list(jobs_of(source, data))
    digests = [job.samples.digest() for job in jobs]
    model = _Model(
        [
            _Run(
                OutputError(job.program, job.samples, metric),
                {v: k for k, v in job.prefixes.items()},
            )
            for job in jobs
        ],
        joined(_VERSION, _digest(source), *digests, metric),
        kept,
        progress or (lambda *_: None),
    )
    used = [i for i, item in enumerate(items) if model.uses(item)]
    chosen = [items[i] for i in used]
    scale = _Scale(items, relative)
    if exact:
        pairs = [(item, name) for item in chosen for name in item.choices if name != KEEP]
        found = {(id(item), name): error for item, name, error in model.run(pairs)}
        errors = [
            {name: found[id(item), name] for name in item.choices if name != KEEP}
            for item in chosen
        ]
        made = Calibrated(errors=errors, n_run=len(pairs), off_by=None)
    else:
        made = _corrected(
            model,
            chosen,
            lambda some: [choose(scale.filled(used, some))[i] for i in used],
        )
    seen = {i for i, some in zip(used, made.errors, strict=True) if scale.is_seen(i, some)}
    if not seen:
        msg = (
            f"{package.path}: the samples must reach a weight that is planned, got none that moves "
            "the outputs; plan without samples"
        )
        raise UnsupportedError(msg)
    return replace(
        made,
        errors=scale.filled(used, made.errors),
        unseen=tuple(item.name for i, item in enumerate(items) if i not in seen),
        notes=_notes(package, jobs),
    )


def _notes(package: Package, jobs: Sequence[Job]) -> tuple[str, ...]:
    notes = dict.fromkeys(note for job in jobs for note in job.notes)
    if any(job.program.kept_boxes for job in jobs):
        notes["weights count with what a non-maximum suppression takes, not with what it gives"] = (
            None
        )
    if not package.programs[0].place:
        run = {name for job in jobs for name in job.program.functions.values()}
        rest = [name for name in package.programs[0].functions if name not in run]
        if rest:
            notes[f"the samples do not suit {', '.join(rest)}, which were not run"] = None
    return tuple(notes)


class _Scale:
    """Puts errors of weights by themselves on the scale of errors of outputs."""

    def __init__(self, items: Sequence[Item], relative: Sequence[Mapping[str, float]]) -> None:
        self._relative = relative
        self._names = [[name for name in item.choices if name != KEEP] for item in items]

    def is_seen(self, i: int, errors: Mapping[str, float]) -> bool:
        """Whether what changes an item's weights moves the outputs."""
        return any(error > 0 or not self._relative[i][name] for name, error in errors.items())

    def filled(
        self, used: Sequence[int], errors: Sequence[Mapping[str, float]]
    ) -> list[dict[str, float]]:
        """Return the errors of all items, of which those of some are known."""
        pairs = zip(used, errors, strict=True)
        known = {i: some for i, some in pairs if self.is_seen(i, some)}
        factors = [
            math.log(error / self._relative[i][name])
            for i, some in known.items()
            for name, error in some.items()
            if 0 < error < math.inf and self._relative[i][name] > 0
        ]
        usual = math.exp(_mean(factors))
        return [
            dict(known[i])
            if i in known
            else {name: usual * self._relative[i][name] for name in names}
            for i, names in enumerate(self._names)
        ]


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


class _Run(NamedTuple):
    """A function that is run: the error of its outputs, and models by what weights begin with."""

    error: OutputError
    models: dict[str, str]

    def names(self, item: Item) -> dict[int, list[str]]:
        """Return the names of an item's weights in what is run, by the place of their twin."""
        names: dict[int, list[str]] = {}
        for i, candidate in enumerate(item.candidates):
            model = self.models.get(candidate.weight.prefix)
            if model is not None and self.error.has(model + candidate.weight.node.name):
                names.setdefault(item.twin(i), []).append(model + candidate.weight.node.name)
        return names


class _Model:
    """The outputs' error as a function of formats, remembered by the cache."""

    def __init__(self, runs: Sequence[_Run], key: str, kept: ScoreCache, note: Progress) -> None:
        self._runs = runs
        self._key = key
        self._kept = kept
        self._note = note

    def uses(self, item: Item) -> bool:
        """Whether a weight of an item is part of what is run."""
        return any(run.names(item) for run in self._runs)

    def run(self, pairs: Sequence[tuple[Item, str]]) -> Iterator[tuple[Item, str, float]]:
        """Yield the exact error of each pair of an item and a format."""
        for i, (item, name) in enumerate(pairs):
            self._note(i, len(pairs), item.name)
            key = self._key_of("exact", item, name)
            known = self._kept.get(key, 1)
            if known is None:
                known = [self._error(item, name)]
                self._kept.put({key: known})
            yield item, name, known[0]
        self._note(len(pairs), len(pairs), "")

    def _error(self, item: Item, name: str) -> float:
        """Return the mean error of all functions; one that does not use the item has none."""
        total = 0.0
        for run in self._runs:
            weights = {
                one: made
                for i, some in run.names(item).items()
                for made in [_treated(item, i, name, item.candidates[i].array())]
                for one in some
            }
            if weights:
                total += run.error.error(weights)
        return total / len(self._runs)

    def first_order(self, items: Sequence[Item]) -> list[dict[str, float]]:
        """Return the first-order error of each format of each item."""
        names = [[name for name in item.choices if name != KEEP] for item in items]
        keys = [
            {name: self._key_of("first", item, name) for name in some}
            for item, some in zip(items, names, strict=True)
        ]
        known = [{name: self._kept.get(key, 1) for name, key in some.items()} for some in keys]
        if any(numbers is None for some in known for numbers in some.values()):
            gradients = self._gradients(items)
            work = list(zip(items, names, gradients, strict=True))
            made = in_order(lambda one: _first_order(*one, len(self._runs)), work)
            for i, errors in enumerate(made):
                self._note(i, len(items), items[i].name)
                self._kept.put({keys[i][name]: [error] for name, error in errors.items()})
                known[i] = {name: [error] for name, error in errors.items()}
            self._note(len(items), len(items), "")
        return [
            {name: numbers[0] for name, numbers in some.items() if numbers is not None}
            for some in known
        ]

    def _gradients(self, items: Sequence[Item]) -> list[dict[int, Gradients]]:
        """Return, of each item, the gradients of each weight, its twins and all functions."""
        found: list[dict[int, Gradients]] = [{} for _ in items]
        for run in self._runs:
            by_item = [run.names(item) for item in items]
            places = [(k, i) for k, some in enumerate(by_item) for i in some]
            groups = [(by_item[k][i], items[k].candidates[i].axes[0]) for k, i in places]
            for (k, i), new in zip(places, run.error.gradients(groups, self._note), strict=True):
                found[k][i] = found[k][i].plus(new) if i in found[k] else new
        return found

    def _key_of(self, kind: str, item: Item, name: str) -> str:
        treatments = [
            None if treatment is None else treatment_dict(treatment)
            for treatment in item.choices[name].treatments
        ]
        return joined(kind, self._key, item.name, treatments)


def _first_order(
    item: Item, names: Sequence[str], gradients: Mapping[int, Gradients], n_runs: int
) -> dict[str, float]:
    found = dict.fromkeys(names, 0.0)
    for i, gradient in gradients.items():
        array = item.candidates[i].array()
        weight = array.astype(np.float32)
        for name in names:
            change = _treated(item, i, name, array).astype(np.float32) - weight
            found[name] += gradient.error(weight, change, item.candidates[i].axes[0]) / n_runs
    return found


def _treated(item: Item, i: int, name: str, array: NDArray[Any]) -> NDArray[Any]:
    treatment: Treatment | None = item.choices[name].treatments[i]
    if treatment is None:
        return array
    output, inputs = item.candidates[i].axes
    return compress(array, treatment, channel_axis=output, input_axis=inputs).dense()
