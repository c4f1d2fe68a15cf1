"""What each format of each group of weights does to a model's outputs on samples."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from milpress.engines.programs import SuitedProgram, suited_programs
from milpress.errors import UnsupportedError
from milpress.formats import compress
from milpress.kernels.threads import in_order
from milpress.mil.digest import content_digest
from milpress.mil.package import Package
from milpress.planner.cache import ScoreCache, cache_key
from milpress.planner.first_order import first_order_errors
from milpress.planner.groups import WeightGroup, axes_of, is_looked_up
from milpress.planner.menu import KEEP
from milpress.progress import Progress, shown
from milpress.recipe import treatment_dict
from milpress.samples.data import Data, RandomSamples

if TYPE_CHECKING:
    from milpress.interpreter.sensitivity import Gradients, OutputError, OutputMetric

# Picks the name of a format for each group, given the errors of all of them.
Choose: TypeAlias = Callable[[Sequence[Mapping[str, float]]], Sequence[str]]

# Change it whenever the same model, samples and treatment may get another error.
_VERSION = 2
# What correcting first-order errors may cost beside running all pairs of groups and formats: a
# tenth of them, less the pass for the gradients, which takes about as long as three.
_CHECKED = 1 / 10
_GRADIENTS = 3
_MOST_RUNS = 8
# Above 1, large errors count more than to first order.
_STEEP = 1.5
# What random inputs show, as plans are made by it: the power of errors, the power of what is seen
# of a weight, and how much less and more than usual it may count by that. Measured on a sentence
# encoder, an image classifier and a speech decoder, with real samples as judges.
_BY_RANDOM = ((_STEEP, 0.5, 0.25, 4.0), (_STEEP, 1.0, 0.5, 8.0), (1.0, 0.5, 0.25, 4.0))
_N_NAMED = 5


class Calibrated(NamedTuple):
    """The errors of a model's outputs, by group and format, and how they were found.

    ``run`` returns the error with a format for each group, all of them at once; ``others`` are
    errors counted otherwise, which plans may be made by that ``run`` is to judge.
    """

    errors: list[dict[str, float]]
    notes: list[str]
    run: Callable[[Sequence[str]], float]
    others: list[list[dict[str, float]]]


def calibrate(
    package: Package,
    groups: Sequence[WeightGroup],
    data: Data,
    *,
    metric: OutputMetric,
    exact: bool,
    choose: Choose,
    cache: ScoreCache,
    progress: Progress | bool | None = None,
) -> Calibrated:
    """Return the error of the outputs that each format of each group makes by itself.

    Of several functions, those that the samples suit are run, and the error is the mean of theirs.
    A group that no sample reaches has the errors that its weights have by themselves, on the scale
    of the others.

    To first order, from squared gradients of the outputs, for all groups and formats. The model is
    then run with the formats that ``choose`` picks by these errors, one at a time, which tells by
    how much those of a group are to be multiplied; and again with what it picks then. With
    ``exact``, it is run with every format of every group instead.

    Parameters
    ----------
    package, groups, data, metric, exact
        As of `milpress.plan`; the groups have choices and scores.
    choose
        What picks formats by errors.
    cache
        Where errors are remembered.
    progress
        ``True`` shows a bar; a function is called with what is done, how much there is in all and
        what is at hand.

    Raises
    ------
    InputError
        If the samples suit no function.
    UnsupportedError
        If no output suits the metric, or no sample reaches a weight.
    """
    source = package.reopened()
    suited = list(suited_programs(source, data))
    digests = [each.samples.digest() for each in suited]
    functions = _functions(suited, metric)
    key = cache_key(_VERSION, content_digest(source), *digests, metric)
    scale = _Scale(groups)
    with shown(progress) as told:
        model = _Model(functions, key, cache, told)
        used = [i for i, group in enumerate(groups) if model.uses(group)]
        run = [groups[i] for i in used]
        if exact:
            errors, note = _exact(model, run)
        else:
            errors, note = _corrected(
                model, run, lambda some: [choose(scale.filled(used, some))[i] for i in used]
            )
    reached = {i for i, some in zip(used, errors, strict=True) if scale.is_reached(i, some)}
    if not reached:
        msg = (
            f"{package.path}: with these samples, no weight of the plan has an effect on the "
            "outputs; plan without samples"
        )
        raise UnsupportedError(msg)
    others = [group.name for i, group in enumerate(groups) if i not in reached]
    notes = [note, *_notes(package, suited, others)]
    filled = scale.filled(used, errors)
    by_weights = _by_weights(groups)
    halfway = [
        {name: math.sqrt(mine[name] * other[name]) for name in mine}
        for mine, other in zip(filled, by_weights, strict=True)
    ]
    run_all = functools.partial(model.error_of_all, groups)
    return Calibrated(filled, notes, run_all, [_raised(filled, _STEEP), halfway, by_weights])


def _functions(suited: Sequence[SuitedProgram], metric: OutputMetric) -> list[_Function]:
    from milpress.interpreter.sensitivity import OutputError

    return [
        _Function(
            OutputError(each.program, each.samples, metric),
            {prefix: model for model, prefix in each.prefixes.items()},
        )
        for each in suited
    ]


def by_random(
    package: Package, groups: Sequence[WeightGroup], n: int, cache: ScoreCache, note: Progress
) -> Calibrated:
    """Return errors by weights, and others by how far random inputs move the outputs with each.

    Random inputs are not what the model is for: weights that matter for real ones may not matter
    for these. So no weight is to count far less than without them.

    Parameters
    ----------
    package, groups, cache
        As of `calibrate`.
    n
        How many random inputs.
    note
        Called with what is done, how much there is in all and what is at hand.

    Raises
    ------
    UnsupportedError
        If no output is of floats, or no input moves one.
    ExecutionError, UnsupportedOpError, InputError
        If the model can't be run.
    """
    source = package.reopened()
    suited = list(suited_programs(source, RandomSamples(n)))
    functions = _functions(suited, "snr")
    key = cache_key(_VERSION, content_digest(source), "random", n)
    model = _Model(functions, key, cache, note)
    seen = _seen(model, groups)
    known = sorted(math.log(one) for one in seen if 0 < one < math.inf)
    if not known:
        msg = "no random input moves an output"
        raise UnsupportedError(msg)
    usual = known[len(known) // 2]
    by_weights = _by_weights(groups)
    others = []
    for power, part, low, high in _BY_RANDOM:
        factors = [
            min(max(math.exp((math.log(one) - usual) * part), low), high)
            if 0 < one < math.inf
            else 1.0
            for one in seen
        ]
        others.append(_raised(by_weights, power, factors))
    run = functools.partial(model.error_of_all, groups)
    return Calibrated(by_weights, [f"{n} random inputs show which weights matter"], run, others)


def _seen(model: _Model, groups: Sequence[WeightGroup]) -> list[float]:
    """Return how far outputs move with each group, for what it counts by itself."""
    keys = [cache_key("moved", model.key, group.name) for group in groups]
    known = [numbers for key in keys if (numbers := model.cache.get(key, 1))]
    if len(known) < len(keys):
        gradients = _gradients(model.functions, groups, model.note)
        model.note(len(groups), len(groups), "")
        known = [[_moved(*pair)] for pair in zip(groups, gradients, strict=True)]
        model.cache.put(dict(zip(keys, known, strict=True)))
    return [numbers[0] / group.share for numbers, group in zip(known, groups, strict=True)]


def _by_weights(groups: Sequence[WeightGroup]) -> list[dict[str, float]]:
    return [
        {name: group.share * score.relative for name, score in group.scores.items()}
        for group in groups
    ]


def _raised(
    errors: Sequence[Mapping[str, float]], power: float, factors: Sequence[float] | None = None
) -> list[dict[str, float]]:
    """Return errors to a power, those of each group multiplied by a factor.

    To a power above 1, large errors count more than their sum says: they add up worse than small
    ones.
    """
    factors = factors or [1.0] * len(errors)
    return [
        {name: factor * error**power for name, error in some.items()}
        for some, factor in zip(errors, factors, strict=True)
    ]


def _moved(group: WeightGroup, gradients: Mapping[int, Gradients]) -> float:
    """Return the error of the outputs if weights were all error, as independent as can be."""
    total = 0.0
    for i, gradient in gradients.items():
        weight = group.weights[i]
        rows = np.moveaxis(weight.dense(), axes_of(weight)[0], 0)
        power = np.square(rows.reshape(len(rows), -1), dtype=np.float32)
        # What is looked up errs relative to its own row, what is multiplied relative to all.
        each = power.mean(1) if is_looked_up(weight) else power.mean()
        total += float((gradient.channels * each).sum())
    return total


def _notes(
    package: Package, suited: Sequence[SuitedProgram], unreached: Sequence[str]
) -> list[str]:
    notes = [note for each in suited for note in each.notes]
    if any(each.program.kept_boxes for each in suited):
        notes.append(
            "weights count with what a non-maximum suppression takes, not with what it gives"
        )
    if not package.programs[0].place:
        run = {name for each in suited for name in each.program.functions.values()}
        rest = [name for name in package.programs[0].functions if name not in run]
        if rest:
            notes.append(f"the samples do not suit {', '.join(rest)}, which were not run")
    if unreached:
        named = ", ".join(unreached[:_N_NAMED]) + ", ..." * (len(unreached) > _N_NAMED)
        notes.append(f"as no sample reaches them, weights count as without samples: {named}")
    return list(dict.fromkeys(notes))


class _Scale:
    """Puts errors of weights by themselves on the scale of errors of outputs."""

    def __init__(self, groups: Sequence[WeightGroup]) -> None:
        self._by_weights = _by_weights(groups)

    def is_reached(self, i: int, errors: Mapping[str, float]) -> bool:
        """Whether what changes a group's weights moves the outputs."""
        return any(error > 0 or not self._by_weights[i][name] for name, error in errors.items())

    def filled(
        self, used: Sequence[int], errors: Sequence[Mapping[str, float]]
    ) -> list[dict[str, float]]:
        """Return the errors of all groups, of which those of some are known."""
        pairs = zip(used, errors, strict=True)
        known = {i: some for i, some in pairs if self.is_reached(i, some)}
        factors = [
            math.log(error / self._by_weights[i][name])
            for i, some in known.items()
            for name, error in some.items()
            if 0 < error < math.inf and self._by_weights[i][name] > 0
        ]
        usual = math.exp(_mean(factors))
        return [
            dict(known[i]) if i in known else {name: usual * error for name, error in some.items()}
            for i, some in enumerate(self._by_weights)
        ]


def _exact(model: _Model, groups: Sequence[WeightGroup]) -> tuple[list[dict[str, float]], str]:
    """Return the errors of all formats, and in words how they were found."""
    pairs = [(group, name) for group in groups for name in group.scores]
    errors: dict[WeightGroup, dict[str, float]] = {group: {} for group in groups}
    for group, name, error in model.run(pairs):
        errors[group][name] = error
    note = f"the model was run with each of {len(pairs)} treatments of weights"
    return list(errors.values()), note


def _corrected(
    model: _Model, groups: Sequence[WeightGroup], choose: Choose
) -> tuple[list[dict[str, float]], str]:
    """Correct first-order errors where a plan made of them would be, as long as runs are left.

    Returns the errors, and in words how they were found.
    """
    first = model.first_order(groups)
    n_left = min(_MOST_RUNS, max(1, int(sum(map(len, first)) * _CHECKED) - _GRADIENTS))
    exact: list[dict[str, float]] = [{} for _ in groups]
    places = {group: i for i, group in enumerate(groups)}
    errors = first
    while n_left > 0:
        pairs = [
            (errors[i][name], i, name)
            for i, name in enumerate(choose(errors))
            if name != KEEP and name not in exact[i]
        ]
        pairs.sort(key=lambda one: (-one[0], one[1]))
        chosen = [(groups[i], name) for _, i, name in pairs[:n_left]]
        if not chosen:
            break
        for group, name, error in model.run(chosen):
            exact[places[group]][name] = error
        n_left -= len(chosen)
        usual = _mean(_factors(first, exact))
        errors = [
            {
                name: error * math.exp(_factor(error, some, run, usual))
                for name, error in some.items()
            }
            for some, run in zip(first, exact, strict=True)
        ]
    off_by = math.exp(_mean([abs(factor) for factor in _factors(first, exact)]))
    return errors, (
        f"first-order errors were off by a factor of {off_by:.2f} before the model was run "
        f"with {sum(map(len, exact))} treatments of weights to correct them"
    )


def _factors(
    first: Sequence[Mapping[str, float]], exact: Sequence[Mapping[str, float]]
) -> list[float]:
    """Return the logarithms of the factors by which first-order errors were too small."""
    pairs = zip(first, exact, strict=True)
    return [factor for some, run in pairs for _, factor in _measured_factors(some, run)]


def _measured_factors(
    first: Mapping[str, float], exact: Mapping[str, float]
) -> list[tuple[float, float]]:
    """Return logarithms of first-order errors and of what they are to be multiplied by."""
    return sorted(
        (math.log(first[name]), math.log(error / first[name]))
        for name, error in exact.items()
        if first[name] > 0 and 0 < error < math.inf
    )


def _factor(
    error: float, first: Mapping[str, float], exact: Mapping[str, float], usual: float
) -> float:
    """Return the logarithm of what a first-order error is to be multiplied by.

    That is what was found for the group's errors next to it, in proportion to how near they are.
    """
    measured = _measured_factors(first, exact)
    if not measured or error <= 0:
        return usual
    return float(np.interp(math.log(error), [x for x, _ in measured], [y for _, y in measured]))


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers) if numbers else 0.0


class _Function(NamedTuple):
    """A function that is run: the error of its outputs, and models by what weights begin with."""

    error: OutputError
    models: dict[str, str]

    def names(self, group: WeightGroup) -> dict[int, list[str]]:
        """Return the names of a group's weights in what is run, by the place of their twin."""
        names: dict[int, list[str]] = {}
        for i, weight in enumerate(group.weights):
            model = self.models.get(weight.prefix)
            if model is not None and self.error.has(model + weight.node.name):
                names.setdefault(group.twin(i), []).append(model + weight.node.name)
        return names


@dataclass(frozen=True, slots=True)
class _Model:
    """The outputs' error as a function of formats, remembered by the cache."""

    functions: Sequence[_Function]
    key: str
    cache: ScoreCache
    note: Progress

    def uses(self, group: WeightGroup) -> bool:
        """Whether a weight of a group is part of what is run."""
        return any(function.names(group) for function in self.functions)

    def run(
        self, pairs: Sequence[tuple[WeightGroup, str]]
    ) -> Iterator[tuple[WeightGroup, str, float]]:
        """Yield the exact error of each pair of a group and a format."""
        for i, (group, name) in enumerate(pairs):
            self.note(i, len(pairs), group.name)
            key = self._key_of("exact", group, name)
            numbers = self.cache.get(key, 1)
            if numbers is None:
                numbers = [self._error([(group, name)])]
                self.cache.put({key: numbers})
            yield group, name, numbers[0]
        self.note(len(pairs), len(pairs), "")

    def error_of_all(self, groups: Sequence[WeightGroup], names: Sequence[str]) -> float:
        """Return the exact error with a format for each group."""
        pairs = [pair for pair in zip(groups, names, strict=True) if pair[1] != KEEP]
        key = cache_key("all", self.key, [self._key_of("", *pair) for pair in pairs])
        numbers = self.cache.get(key, 1)
        if numbers is None:
            numbers = [self._error(pairs)]
            self.cache.put({key: numbers})
        return numbers[0]

    def _error(self, pairs: Sequence[tuple[WeightGroup, str]]) -> float:
        """Return the mean error of all functions; one that does not use the groups has none."""
        total = 0.0
        for function in self.functions:
            weights: dict[str, NDArray[Any]] = {}
            for group, name in pairs:
                for i, twins in function.names(group).items():
                    treated = _treated(group, i, name, group.weights[i].dense())
                    weights |= dict.fromkeys(twins, treated)
            if weights:
                total += function.error.error(weights)
        return total / len(self.functions)

    def first_order(self, groups: Sequence[WeightGroup]) -> list[dict[str, float]]:
        """Return the first-order error of each format of each group."""
        keys = [
            {name: self._key_of("first", group, name) for name in group.scores} for group in groups
        ]
        known = [
            {name: numbers[0] for name, key in some.items() if (numbers := self.cache.get(key, 1))}
            for some in keys
        ]
        if sum(map(len, known)) == sum(map(len, keys)):
            return known
        pairs = list(zip(groups, _gradients(self.functions, groups, self.note), strict=True))
        computed: list[dict[str, float]] = []
        scored = in_order(lambda pair: _first_order(*pair, len(self.functions)), pairs)
        for i, errors in enumerate(scored):
            self.note(i, len(groups), groups[i].name)
            self.cache.put({keys[i][name]: [error] for name, error in errors.items()})
            computed.append(errors)
        self.note(len(groups), len(groups), "")
        return computed

    def _key_of(self, kind: str, group: WeightGroup, name: str) -> str:
        treatments = [treatment_dict(treatment) for treatment in group.choices[name].treatments]
        return cache_key(kind, self.key, group.name, treatments)


def _gradients(
    functions: Sequence[_Function], groups: Sequence[WeightGroup], note: Progress
) -> list[dict[int, Gradients]]:
    """Return, of each group, the gradients of each weight, its twins and all functions."""
    gradients: list[dict[int, Gradients]] = [{} for _ in groups]
    for function in functions:
        names = [function.names(group) for group in groups]
        places = [(k, i) for k, some in enumerate(names) for i in some]
        weights = [(names[k][i], axes_of(groups[k].weights[i])[0]) for k, i in places]
        each = function.error.gradients(weights, note)
        for (k, i), new in zip(places, each, strict=True):
            gradients[k][i] = gradients[k][i].plus(new) if i in gradients[k] else new
    return gradients


def _first_order(
    group: WeightGroup, gradients: Mapping[int, Gradients], n_functions: int
) -> dict[str, float]:
    errors = dict.fromkeys(group.scores, 0.0)
    for i, gradient in gradients.items():
        output, inputs = axes_of(group.weights[i])
        each = first_order_errors(
            group.weights[i].dense(),
            {name: group.choices[name].treatments[i] for name in errors},
            gradient,
            channel_axis=output,
            input_axis=inputs,
        )
        for name, error in each.items():
            errors[name] += error / n_functions
    return errors


def _treated(group: WeightGroup, i: int, name: str, array: NDArray[Any]) -> NDArray[Any]:
    output, inputs = axes_of(group.weights[i])
    treatment = group.choices[name].treatments[i]
    return compress(array, treatment, channel_axis=output, input_axis=inputs).dense()
