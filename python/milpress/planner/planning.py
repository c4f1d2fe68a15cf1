"""`plan`: the recipe of least error within a budget."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from milpress.errors import (
    ConfigError,
    ExecutionError,
    InputError,
    UnsupportedError,
    UnsupportedOpError,
)
from milpress.kernels.threads import thread_limit
from milpress.mil.package import Package
from milpress.mil.raising import raise_opsets
from milpress.planner import cache
from milpress.planner.cache import ScoreCache
from milpress.planner.facts import ON_NEWER_CHIPS, Facts, Platform, Unit
from milpress.planner.groups import WeightGroup, groups_of
from milpress.planner.measuring import measure
from milpress.planner.menu import menu
from milpress.planner.plan import Plan
from milpress.planner.problem import Goal, Problem
from milpress.progress import Progress, shown
from milpress.recipe import DEFAULT_MIN_SIZE

if TYPE_CHECKING:
    from milpress.interpreter.sensitivity import OutputMetric
    from milpress.planner.calibrated import Calibrated
    from milpress.samples.data import Data


def plan(
    source: str | os.PathLike[str],
    *,
    target_bits: float | None = None,
    target_size: int | None = None,
    min_snr: float | None = None,
    formats: Sequence[str] | None = None,
    keep: Sequence[str] = (),
    prefer: Unit | None = None,
    vectors: bool = False,
    max_formats: int | None = None,
    target: str | None = None,
    min_size: int = DEFAULT_MIN_SIZE,
    sample_data: Data | None = None,
    random_samples: int = 16,
    metric: OutputMetric = "auto",
    exact: bool = False,
    facts: Sequence[str | os.PathLike[str]] = (),
    use_cache: bool = True,
    threads: int | None = None,
    progress: Progress | bool | None = None,
) -> Plan:
    """Choose a treatment for each weight such that the error is least within a budget.

    Without samples, each weight counts with its relative error, whatever its size, four times if
    no other weight comes behind it: small weights that are hard to compress get more bits, large
    ones pay for it. With samples, it counts with the
    error that it makes in the model's outputs: to first order, from the gradients of one pass, and
    corrected by running the model with a few of the treatments.

    Scores are kept in a file beside the package, by the hash of what they are of, so that the next
    plan is quick and an interrupted one goes on.

    Parameters
    ----------
    source
        Path of the ``.mlpackage``.
    target_bits
        The budget as effective bits: all that is stored for the weights, over their elements;
        weights that stay as they are count too.
    target_size
        The budget as the size of the package in bytes.
    min_snr
        Instead of a budget: the score in dB that the smallest plan must have.
    formats
        Names of the treatments to choose from, see `milpress.planner.menu.menu`; by default all of
        the menu, and for models of few weights some between them.
    keep
        Weights that must stay: names, patterns (``glob:``, ``re:``), or kinds of ops
        (``op:gather``).
    prefer
        The compute unit that the model is for: formats that are known to crash, compute wrongly,
        run elsewhere or be slow there are left out.
    vectors
        With ``prefer="ane"``: whether tables of vectors are in, as far as newer Neural Engines were
        seen to run them.
    max_formats
        At most so many different formats; ``None`` for any number.
    target
        Deployment target to raise the model to, as in a recipe.
    min_size
        Least number of elements of a weight that is planned.
    sample_data
        Samples of the model's inputs, see `Samples`; needs torch. A few dozen
        suffice. Of several functions, those that the samples suit are run; a weight that none of
        them reaches counts as without samples.
    random_samples
        Without samples, how many random inputs the model is run on, to see which weights move its
        outputs; needs torch: without it, or with 0, weights count by themselves.
    metric
        With samples, what is kept small: ``"snr"``, the squared error of the outputs over their
        squares; ``"cosine"``, 1 minus their cosine; ``"kl"``, the divergence of probabilities;
        ``"auto"``, the divergence where outputs are probabilities or logits over a vocabulary, else
        the squared error.
    exact
        Whether every treatment is tried on the whole of each weight, not on a part of large ones;
        with samples, whether the model is run with every treatment of every weight.
    facts
        Files that add to what is known of compute units, see `milpress.lint`.
    use_cache
        Whether scores are read from and kept in the file beside the package.
    threads
        Threads to use; ``None`` for MILPRESS_NUM_THREADS or the number of cores.
    progress
        ``True`` shows a bar; a function is called with what is done, how much there is in all and
        the name of the weight at hand.

    Returns
    -------
    Plan
        The recipe, and what is expected of it.

    Raises
    ------
    ConfigError
        If an argument is wrong by itself.
    UnsupportedError
        If the budget is below the smallest size, or the score above what can be had; with samples,
        if none reaches a weight, or no output suits the metric.
    InputError
        If a sample is not what the model takes.
    UnsupportedOpError
        With samples, if the interpreter does not cover an op.
    DependencyError
        With samples, if torch is not installed.
    PackageError
        If the source is damaged or of an unsupported kind.
    """
    started = time.perf_counter()
    goal = Goal.of(target_bits, target_size, min_snr)
    if random_samples < 0:
        msg = f"random_samples must be at least 0, got {random_samples}"
        raise ConfigError(msg)
    if max_formats is not None and max_formats < 1:
        msg = f"max_formats must be at least 1, got {max_formats}"
        raise ConfigError(msg)
    package = Package(source)
    notes = raise_opsets(package, target)
    known = Facts.load(*facts)
    groups = groups_of(
        package,
        None if formats is None else menu(formats),
        keep=keep,
        min_size=min_size,
        platform=Platform(unit=prefer),
        facts=known.without(ON_NEWER_CHIPS) if vectors else known,
    )
    path = cache.path_for(package.path)
    kept_scores = ScoreCache(path if use_cache else None)
    with thread_limit(threads):
        measure(
            _with_choices(groups, package), package, kept_scores, exact=exact, progress=progress
        )
        planned = _with_choices(groups, package)
        problem = Problem(package, groups, goal, target=target, min_size=min_size)
        if sample_data is not None:
            from milpress.planner.calibrated import calibrate

            calibrated = calibrate(
                package,
                planned,
                sample_data,
                metric=metric,
                exact=exact,
                choose=problem.formats,
                cache=kept_scores,
                progress=progress,
            )
            result = problem.plan(
                calibrated.errors,
                max_formats,
                [*notes, *calibrated.notes],
                scored_by="outputs",
                others=calibrated.others,
                run=calibrated.run,
            )
        else:
            seen, remarks = _by_random(package, planned, random_samples, kept_scores, progress)
            result = problem.plan(
                None,
                max_formats,
                [*notes, *remarks],
                others=() if seen is None else seen.others,
                run=None if seen is None else seen.run,
            )
    if use_cache and not kept_scores.is_writable:
        note = f"scores could not be kept in {path}"
        result = replace(result, notes=(*result.notes, note))
    return replace(result, seconds=time.perf_counter() - started)


def _by_random(
    package: Package,
    groups: Sequence[WeightGroup],
    n: int,
    kept_scores: ScoreCache,
    progress: Progress | bool | None,
) -> tuple[Calibrated | None, Sequence[str]]:
    """Return what random inputs show, if the model can be run, and what there is to note."""
    if n == 0:
        return None, ()
    if importlib.util.find_spec("torch") is None:
        return None, ["weights count by themselves; with torch, random inputs show which matter"]
    from milpress.planner.calibrated import by_random

    try:
        with shown(progress) as note:
            seen = by_random(package, groups, n, kept_scores, note)
    except (ExecutionError, InputError, UnsupportedError, UnsupportedOpError) as error:
        return None, [f"weights count by themselves, as random inputs show nothing: {error}"]
    return seen, seen.notes


def _with_choices(groups: Sequence[WeightGroup], package: Package) -> list[WeightGroup]:
    """Return the groups that there is a choice for, of which there must be one."""
    planned = [group for group in groups if group.choices]
    if not planned:
        reasons = [f"{group.name}: {group.reason}" for group in groups[:3]] or ["it has none"]
        msg = f"{package.path}: no weight to plan ({'; '.join(reasons)})"
        raise UnsupportedError(msg)
    return planned
