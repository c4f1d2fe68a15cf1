"""The scores of all groups of weights: computed on several threads, and remembered."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence

from milpress.errors import UnsupportedError, weight_errors
from milpress.formats import Treatment
from milpress.kernels.threads import in_order
from milpress.mil import values
from milpress.mil.package import Package
from milpress.mil.program import Weight
from milpress.planner import scores
from milpress.planner.cache import ScoreCache, cache_key
from milpress.planner.groups import WeightGroup, axes_of, is_looked_up, is_multiplied
from milpress.planner.menu import KEEP
from milpress.planner.scores import Score
from milpress.progress import Progress, shown
from milpress.recipe import treatment_dict


def measure(
    groups: Sequence[WeightGroup],
    package: Package,
    cache: ScoreCache,
    *,
    exact: bool,
    progress: Progress | bool | None,
) -> None:
    """Score each format of each group; a group that is not finite loses its choices."""
    sample_size = None if exact else scores.SAMPLE_SIZE

    def scored(
        group: WeightGroup,
    ) -> tuple[dict[str, Score], dict[str, list[float]]] | UnsupportedError:
        try:
            with weight_errors(group.name):
                return _scores_of(group, package, cache, sample_size)
        except UnsupportedError as error:
            return error

    n_elements = sum(group.size for group in groups)
    n_scored = 0
    with shown(progress) as note, contextlib.closing(in_order(scored, groups)) as results:
        for group, result in zip(groups, results, strict=True):
            if isinstance(result, UnsupportedError):
                group.choices, group.reason = {}, str(result)
            else:
                group.scores, computed = result
                cache.put(computed)
            note(n_scored, n_elements, group.name)
            n_scored += group.size
        note(n_elements, n_elements, "")


def _scores_of(
    group: WeightGroup, package: Package, cache: ScoreCache, sample_size: int | None
) -> tuple[dict[str, Score], dict[str, list[float]]]:
    """Return the score of each format of a group, and what of it is new to the cache."""
    by_format: dict[str, list[Score]] = {name: [] for name in group.choices if name != KEEP}
    computed: dict[str, list[float]] = {}
    for i in group.distinct:
        weight = group.weights[i]
        digest = _digest(weight, package)
        treatments = {name: group.choices[name].treatments[i] for name in by_format}
        uses = is_looked_up(weight), is_multiplied(weight)
        keys = {
            treatment: cache_key(
                scores.VERSION, digest, *uses, treatment_dict(treatment), sample_size
            )
            for treatment in treatments.values()
        }
        known: dict[Treatment, Score] = {}
        for treatment, key in keys.items():
            numbers = cache.get(key, len(Score._fields))
            if numbers is not None:
                known[treatment] = Score(numbers[0], numbers[1], bool(numbers[2]))
        missing = [treatment for treatment in keys if treatment not in known]
        if missing:
            known |= _tried(weight, missing, sample_size)
            computed |= {keys[each]: [*map(float, known[each])] for each in missing}
        for name, treatment in treatments.items():
            by_format[name].append(known[treatment])
    return {name: Score.mean(each) for name, each in by_format.items()}, computed


def _tried(
    weight: Weight, treatments: Sequence[Treatment], sample_size: int | None
) -> dict[Treatment, Score]:
    """Return the error that each treatment makes in a weight, by all that it is used for."""
    output, inputs = axes_of(weight)
    array = weight.dense()
    if not is_looked_up(weight):
        return scores.scores_of(
            array, treatments, channel_axis=output, input_axis=inputs, sample_size=sample_size
        )
    looked_up = scores.lookup_scores_of(array, treatments, channel_axis=output, input_axis=inputs)
    if not is_multiplied(weight):
        return looked_up
    multiplied = scores.scores_of(
        array, treatments, channel_axis=output, input_axis=inputs, sample_size=sample_size
    )
    return {
        each: Score(
            1.0,
            score.relative + looked_up[each].relative,
            score.sampled or looked_up[each].sampled,
        )
        for each, score in multiplied.items()
    }


def _digest(weight: Weight, package: Package) -> str:
    """Return a hash of the bytes that are stored for a weight, and of how they are read."""
    digest = hashlib.sha256(f"{weight.dtype.name}{weight.shape}{axes_of(weight)}".encode())
    for value in weight.stored:
        if values.is_blob(value):
            digest.update(values.read_payload(value, package).data)
        else:
            digest.update(value.SerializeToString(deterministic=True))
    return digest.hexdigest()
