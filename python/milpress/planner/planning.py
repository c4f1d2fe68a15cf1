"""Plans: the recipe of least error within a budget."""

from __future__ import annotations

import contextlib
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from milpress.errors import ConfigError, UnsupportedError, weight_errors
from milpress.formats import Treatment
from milpress.kernels.threads import in_order, thread_limit
from milpress.mil.opset import raise_opsets
from milpress.mil.package import Package, n_package_bytes
from milpress.plain import json, yaml
from milpress.planner import cache, scores, search
from milpress.planner.cache import ScoreCache
from milpress.planner.facts import Facts, Platform, Unit
from milpress.planner.items import Item, items_of
from milpress.planner.menu import KEEP, menu
from milpress.planner.scores import Score
from milpress.planner.search import Option, Point
from milpress.planner.sizes import package_bytes
from milpress.progress import Progress
from milpress.recipe import (
    DEFAULT_MIN_SIZE,
    Keep,
    Recipe,
    Rule,
    Select,
    Step,
    describe,
    treatment_dict,
)
from milpress.show import escaped, human_bytes, human_snr, named_table

if TYPE_CHECKING:
    from rich.table import Table

    from milpress.interpreter.sensitivity import OutputMetric
    from milpress.planner.calibrated import Calibrated
    from milpress.samples.data import Data

Prefer: TypeAlias = Unit
_MOST_TRIES = 8
# The part of a budget that meets it.
_MET = 0.99
# How much more the relative error of a last layer's weight counts: what the outputs are made of is
# not evened out by layers behind it.
_LAST_SHARE = 4.0
_N_SHOWN = 12
_N_NAMED = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedWeight:
    """What a plan does to one weight.

    Parameters
    ----------
    name
        Its name.
    op_types
        Kinds of the ops that use it.
    shape
        Its shape.
    format
        The format's name, such as ``palette-4-group-16``; ``keep`` where it stays.
    treatment
        What is done, as it suits the shape; ``None`` where it stays.
    n_bytes
        Bytes that will be stored for it.
    snr_db
        What is expected of it: the signal-to-noise ratio of the weight; ``None`` where it stays.
    is_estimate
        Whether that was measured on a part of the weight.
    error
        What it adds to the error that the plan keeps small.
    shares_with
        The weight that its bytes are stored for, if it is another one.
    reason
        Why it stays, if nothing could be chosen.
    """

    name: str
    op_types: tuple[str, ...]
    shape: tuple[int, ...]
    format: str
    treatment: Treatment | None
    n_bytes: int
    snr_db: float | None
    is_estimate: bool
    error: float
    shares_with: str | None = None
    reason: str = ""

    @property
    def bits_per_weight(self) -> float:
        """Effective bits: all that will be stored, over the number of elements."""
        return 8 * self.n_bytes / math.prod(self.shape)

    def to_dict(self) -> dict[str, Any]:
        """Return the weight's plan as JSON can hold it."""
        treatment = None if self.treatment is None else treatment_dict(self.treatment)
        names = [item.name for item in fields(self)]
        names.insert(names.index("n_bytes") + 1, "bits_per_weight")
        return json.record(self, *names) | {"treatment": treatment}


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """A size and the score that can be had at it.

    Parameters
    ----------
    package_bytes
        Size of the package.
    bits_per_weight
        Effective bits of the weights that are planned.
    snr_db
        The score.
    """

    package_bytes: int
    bits_per_weight: float
    snr_db: float

    def to_dict(self) -> dict[str, Any]:
        """Return the point as JSON can hold it."""
        return json.record(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A recipe that was chosen, and what is expected of it.

    Parameters
    ----------
    source
        The package it is for.
    recipe
        What `milpress.compress` is to do.
    weights
        What happens to each weight, in the order of the graph.
    n_bytes
        Bytes that will be stored for these weights.
    package_bytes
        Size of the package that the recipe makes.
    bits_per_weight
        Effective bits over these weights, those that stay included.
    snr_db
        The score: that of the mean relative error of the weights without samples, last layers
        counting four times; that of the outputs with samples.
    scored_by
        ``"weights"`` or ``"outputs"``.
    curve
        Sizes and scores that can be had, smallest first.
    knee
        The place on the curve from which more bytes bring little.
    notes
        What else there is to know.
    seconds
        Wall time.
    """

    source: str
    recipe: Recipe
    weights: tuple[PlannedWeight, ...]
    n_bytes: int
    package_bytes: int
    bits_per_weight: float
    snr_db: float
    scored_by: Literal["weights", "outputs"]
    curve: tuple[CurvePoint, ...]
    knee: int
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats that occur, most elements first."""
        sizes: dict[str, int] = {}
        for weight in self.weights:
            sizes[weight.format] = sizes.get(weight.format, 0) + math.prod(weight.shape)
        sizes.pop(KEEP, None)
        return tuple(sorted(sizes, key=lambda name: (-sizes[name], name)))

    @property
    def summary(self) -> str:
        """One line: sizes and score."""
        n = sum(weight.treatment is not None for weight in self.weights)
        return (
            f"{n} of {len(self.weights)} weights to be compressed in {len(self.formats)} formats: "
            f"{human_bytes(self.package_bytes)}, {self.bits_per_weight:.3f} bits per weight, "
            f"{human_snr(self.snr_db)} dB ({self.scored_by})"
        )

    def to_yaml(self) -> str:
        """Return the recipe as YAML, one weight a line, with what is expected of it behind.

        What is behind a ``#`` says nothing to `milpress.compress`: edit the lines as you like.
        """
        lines = [f"# {self.summary}", "version: 1"]
        if self.recipe.target is not None:
            lines.append(f"target: {self.recipe.target}")
        lines.extend(["steps:", "  - rules:"])
        rules = self.recipe.steps[0].rules
        for weight, rule in zip(self.weights, rules, strict=True):
            data = Recipe(steps=(Step(rules=(rule,)),)).to_dict()["steps"][0]["rules"][0]
            flow = yaml.text(data, default_flow_style=True, width=math.inf).strip()
            lines.append(f"      - {flow}  # {_expected(weight)}")
        return "\n".join(lines) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON can hold it."""
        sizes = ("n_bytes", "package_bytes", "bits_per_weight", "snr_db", "scored_by", "formats")
        names = ("source", "recipe", *sizes, "weights", "curve", "knee", "notes", "seconds")
        return {"version": 1, **json.record(self, *names)}

    def __rich__(self) -> Table:
        """Return the weights as a table."""
        table = named_table("weight", "used by", "shape", "treatment")
        for heading in ("bytes", "bits", "SNR dB"):
            table.add_column(heading, justify="right")
        for weight in self.weights:
            what = "keep" if weight.treatment is None else describe(weight.treatment)
            why = weight.reason or (weight.shares_with and f"as {weight.shares_with}")
            table.add_row(
                escaped(weight.name),
                escaped(", ".join(weight.op_types)),
                "x".join(map(str, weight.shape)),
                escaped(f"{what} ({why})" if why else what),
                human_bytes(weight.n_bytes),
                f"{weight.bits_per_weight:.2f}",
                _shown(weight),
            )
        return table

    def curve_table(self) -> Table:
        """Return the curve of size against score as a table, with the knee and this plan marked."""
        table = named_table("size")
        for heading in ("bits", "SNR dB"):
            table.add_column(heading, justify="right")
        table.add_column("")
        here = CurvePoint(
            package_bytes=self.package_bytes,
            bits_per_weight=self.bits_per_weight,
            snr_db=self.snr_db,
        )
        marks = [(point, "") for point in _thinned(self.curve, _N_SHOWN)]
        marks = [(point, mark) for point, mark in marks if point != self.curve[self.knee]]
        marks += [(self.curve[self.knee], "knee"), (here, "this plan")]
        for point, mark in sorted(marks, key=lambda one: one[0].package_bytes):
            table.add_row(
                human_bytes(point.package_bytes),
                f"{point.bits_per_weight:.2f}",
                human_snr(point.snr_db),
                mark,
            )
        return table


def plan(
    source: str | os.PathLike[str],
    *,
    target_bits: float | None = None,
    target_size: int | None = None,
    min_snr: float | None = None,
    formats: Sequence[str] | None = None,
    keep: Sequence[str] = (),
    prefer: Prefer | None = None,
    max_formats: int | None = None,
    target: str | None = None,
    min_size: int = DEFAULT_MIN_SIZE,
    sample_data: Data | None = None,
    metric: OutputMetric = "snr",
    exact: bool = False,
    facts: Sequence[str | os.PathLike[str]] = (),
    use_cache: bool = True,
    threads: int | None = None,
    progress: Progress | None = None,
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
    metric
        With samples, what is kept small: ``"snr"``, the squared error of the outputs over their
        squares; ``"cosine"``, 1 minus their cosine; ``"kl"``, the divergence of probabilities.
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
        Called with what is done, how much there is in all and the name of the weight at hand.

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
    goal = _goal(target_bits, target_size, min_snr)
    if max_formats is not None and max_formats < 1:
        msg = f"max_formats must be at least 1, got {max_formats}"
        raise ConfigError(msg)
    package = Package(source)
    notes = raise_opsets(package, target)
    items = items_of(
        package,
        None if formats is None else menu(formats),
        keep=keep,
        min_size=min_size,
        platform=Platform(unit=prefer),
        facts=Facts.load(*facts),
    )
    _check_open(items, package)
    kept = ScoreCache(cache.path_for(package.path) if use_cache else None)
    with thread_limit(threads):
        measured = _measure(
            [item for item in items if item.choices],
            package,
            kept,
            exact=exact,
            progress=progress,
        )
    _check_open(items, package)
    errors = None
    if sample_data is not None:
        from milpress.planner.calibrated import calibrate

        with thread_limit(threads):
            found = calibrate(
                package,
                [item for item in items if item.choices],
                sample_data,
                metric=metric,
                exact=exact,
                choose=lambda errors: _Problem(
                    package, target, items, measured, min_size, errors
                ).names(goal),
                kept=kept,
                relative=[
                    {
                        name: (_LAST_SHARE if item.is_last else 1.0) * one.relative
                        for name, one in some.items()
                    }
                    for item, some in zip(
                        [item for item in items if item.choices], measured, strict=True
                    )
                ],
                progress=progress,
            )
        errors = found.errors
        notes += [_ran(found), *found.notes, *_unseen(found)]
    if use_cache and not kept.is_writable:
        notes.append(f"scores could not be kept in {cache.path_for(package.path)}")
    problem = _Problem(package, target, items, measured, min_size, errors)
    chosen = problem.solve(goal, max_formats)
    return replace(problem.plan(chosen, notes, goal), seconds=time.perf_counter() - started)


def _ran(found: Calibrated) -> str:
    if found.off_by is None:
        return f"the model was run with each of {found.n_run} treatments of weights"
    return (
        f"first-order errors were off by a factor of {found.off_by:.2f} before the model was run "
        f"with {found.n_run} treatments of weights to correct them"
    )


def _unseen(found: Calibrated) -> list[str]:
    """Say which weights no sample reaches, if there are any."""
    if not found.unseen:
        return []
    named = ", ".join(found.unseen[:_N_NAMED]) + ", ..." * (len(found.unseen) > _N_NAMED)
    return [f"as no sample reaches them, weights count as without samples: {named}"]


def _check_open(items: Sequence[Item], package: Package) -> None:
    if not any(item.choices for item in items):
        reasons = [f"{item.name}: {item.reason}" for item in items[:3]] or ["it has none"]
        msg = f"{package.path}: there must be a weight to plan, got none ({'; '.join(reasons)})"
        raise UnsupportedError(msg)


@dataclass(frozen=True, slots=True)
class Goal:
    """What is asked of a plan: ``bits`` or ``size`` at most, or ``snr`` at least."""

    kind: Literal["bits", "size", "snr"]
    number: float


def _goal(bits: float | None, size: int | None, snr: float | None) -> Goal:
    given: dict[Literal["bits", "size", "snr"], float | None] = {
        "bits": bits,
        "size": size,
        "snr": snr,
    }
    named = {kind: number for kind, number in given.items() if number is not None}
    if len(named) != 1:
        msg = (
            "one of target_bits, target_size and min_snr must be given, "
            f"got {' and '.join(named) or 'none'}"
        )
        raise ConfigError(msg)
    ((kind, number),) = named.items()
    if not math.isfinite(number) or (kind != "snr" and number <= 0):
        msg = f"the target must be a positive number, got {number}"
        raise ConfigError(msg)
    return Goal(kind, number)


class Measured(NamedTuple):
    """The relative error of an item in some format; ``sampled`` if not all of it was tried."""

    relative: float
    sampled: bool


def _measure(
    items: Sequence[Item],
    package: Package,
    kept: ScoreCache,
    *,
    exact: bool,
    progress: Progress | None,
) -> list[dict[str, Measured]]:
    """Return the score of each format of each item; one that is not finite loses its choices."""
    total = sum(item.size for item in items)
    note = progress or (lambda *_: None)
    sample_size = None if exact else scores.SAMPLE_SIZE

    def work(item: Item) -> tuple[dict[str, Measured], dict[str, list[float]], str]:
        try:
            with weight_errors(item.name):
                return (*_scores_of(item, package, kept, sample_size), "")
        except UnsupportedError as error:
            return {}, {}, str(error)

    found: list[dict[str, Measured]] = []
    done = 0
    with contextlib.closing(in_order(work, items)) as made:
        for item, (measured, new, reason) in zip(items, made, strict=True):
            kept.put(new)
            if reason:
                item.choices, item.reason = {}, reason
            else:
                found.append(measured)
            note(done, total, item.name)
            done += item.size
    note(total, total, "")
    return found


def _scores_of(
    item: Item, package: Package, kept: ScoreCache, sample_size: int | None
) -> tuple[dict[str, Measured], dict[str, list[float]]]:
    """Return the score of each format of an item, and what of it is new to the cache."""
    names = [name for name in item.choices if name != KEEP]
    parts: dict[str, list[Score]] = {name: [] for name in names}
    new: dict[str, list[float]] = {}
    for i in item.distinct:
        candidate = item.candidates[i]
        digest = candidate.digest(package)
        treatments = {name: item.choices[name].treatments[i] for name in names}
        keys = {
            name: cache.joined(scores.VERSION, digest, _words(treatment), sample_size)
            for name, treatment in treatments.items()
        }
        known = {name: kept.get(key, 3) for name, key in keys.items()}
        missing = {
            treatment: name
            for name, treatment in treatments.items()
            if treatment is not None and known[name] is None
        }
        if missing:
            output, inputs = candidate.axes
            made = scores.scores_of(
                candidate.array(),
                missing,
                channel_axis=output,
                input_axis=inputs,
                sample_size=sample_size,
            )
            for treatment, name in missing.items():
                known[name] = [*map(float, made[treatment])]
                new[keys[name]] = known[name] or []
        for name in names:
            signal, noise, sampled = known[name] or (0.0, 0.0, 0.0)
            parts[name].append(Score(signal, noise, bool(sampled)))
    return {
        name: Measured(
            sum(part.relative for part in some) / len(some), any(part.sampled for part in some)
        )
        for name, some in parts.items()
    }, new


def _words(treatment: Treatment | None) -> Any:
    return None if treatment is None else treatment_dict(treatment)


class _Problem:
    """The items, what each of their formats costs and spoils, and how plans are made of that."""

    def __init__(
        self,
        package: Package,
        target: str | None,
        items: Sequence[Item],
        measured: Sequence[Mapping[str, Measured]],
        min_size: int,
        errors: Sequence[Mapping[str, float]] | None = None,
    ) -> None:
        self._package = package
        self._target = target
        self._items = items
        self._open = [item for item in items if item.choices]
        self._scores = measured
        self._min_size = min_size
        self._scored_by: Literal["weights", "outputs"] = "weights" if errors is None else "outputs"
        shares = [_LAST_SHARE if item.is_last else 1.0 for item in self._open]
        self._shares = [share / sum(shares) for share in shares]
        self._options = [
            [
                Option(name, choice.n_bytes, self._error(i, name, errors))
                for name, choice in item.choices.items()
            ]
            for i, item in enumerate(self._open)
        ]
        self._fixed_bytes = sum(item.n_bytes for item in items if not item.choices)
        self._size = sum(item.size for item in items)
        self._sizes: dict[tuple[int, ...], int] = {}

    def _error(self, i: int, name: str, errors: Sequence[Mapping[str, float]] | None) -> float:
        if name == KEEP:
            return 0.0
        if errors is not None:
            return errors[i][name]
        return self._shares[i] * self._scores[i][name].relative

    def solve(self, goal: Goal, max_formats: int | None) -> tuple[list[list[Option]], list[int]]:
        """Return the options that were left to choose from, and those chosen of each item."""
        options = self._options
        if max_formats is not None:
            options = self._with_few_formats(goal, max_formats)
        return options, self._chosen(options, goal)

    def names(self, goal: Goal) -> list[str]:
        """Return the formats of a choice, the size of the rest of the package being guessed."""
        chosen = self._quickly(self._options, goal)
        return [some[i].format for some, i in zip(self._options, chosen, strict=True)]

    def _chosen(self, options: list[list[Option]], goal: Goal) -> list[int]:
        if goal.kind == "bits":
            self._check_bits(options, goal.number)
            whole = goal.number * self._size / 8
            budget, floor = (int(part * whole) - self._fixed_bytes for part in (1, _MET))
            return list(search.solve(options, budget, floor + 1).chosen)
        if goal.kind == "snr":
            return list(search.solve(options, self._smallest(options, goal.number)).chosen)
        return self._within_size(options, int(goal.number))

    def _check_bits(self, options: list[list[Option]], number: float) -> None:
        """Refuse fewer bits than the smallest formats take, with what is left as it is."""
        least = _bytes_of(options, _smallest_of(options)) + self._fixed_bytes
        if least > number * self._size / 8:
            # Rounded up, so that what is said can be had.
            bits = math.ceil(8 * least / self._size * 100 + 1e-6) / 100
            msg = (
                f"{self._package.path}: target_bits must be at least {bits:.2f}, which the "
                f"smallest formats and what is left as it is take, got {number:g}"
            )
            raise UnsupportedError(msg)

    def _check_size(self, options: list[list[Option]], size: int) -> None:
        """Refuse a size that no package gets down to."""
        least = self.package_bytes(options, _smallest_of(options))
        if least > size:
            msg = f"{self._package.path}: the package takes {least} bytes at least, got {size}"
            raise UnsupportedError(msg)

    def _smallest(self, options: list[list[Option]], snr_db: float) -> int:
        """Return the least budget on the curve that gives the score."""
        points = search.curve(options)
        for point in points:
            if self._snr(point.error) >= snr_db:
                return point.n_bytes
        best = self._snr(points[-1].error)
        msg = f"{self._package.path}: the score can be {best:.1f} dB at most, got {snr_db:.1f}"
        raise UnsupportedError(msg)

    def _within_size(self, options: list[list[Option]], size: int) -> list[int]:
        """Choose such that the package has at most that size, whatever else is in it."""
        self._check_size(options, size)
        best = _smallest_of(options)
        rest = self.package_bytes(options, best) - _bytes_of(options, best)
        for _ in range(_MOST_TRIES):
            try:
                found = list(search.solve(options, size - rest, int(_MET * size) - rest + 1).chosen)
            except UnsupportedError:
                break
            whole = self.package_bytes(options, found)
            if whole <= size:
                best = found
                changed = whole - _bytes_of(options, found)
                if changed >= rest:
                    break
                rest = changed
            else:
                rest += whole - size
        return best

    def _with_few_formats(self, goal: Goal, most: int) -> list[list[Option]]:
        """Take formats out, each time the one that is missed least, until few enough are left."""
        options = self._options
        while True:
            chosen = self._chosen(options, goal)
            used = {some[i].format for some, i in zip(options, chosen, strict=True)} - {KEEP}
            if len(used) <= most:
                return options
            tries: list[tuple[float, float, str, list[list[Option]]]] = []
            for name in sorted(used):
                left = [[one for one in some if one.format != name] for some in options]
                if all(left):
                    with contextlib.suppress(UnsupportedError):
                        tries.append((*_cost(left, self._quickly(left, goal), goal), name, left))
            if not tries:
                msg = f"{self._package.path}: no plan with at most {most} formats was found"
                raise UnsupportedError(msg)
            _, _, _, options = min(tries, key=lambda one: one[:3])

    def _quickly(self, options: list[list[Option]], goal: Goal) -> list[int]:
        """Return what is chosen, the size of the rest of the package being guessed."""
        if goal.kind != "size":
            return self._chosen(options, goal)
        rest = n_package_bytes(self._package.path) - sum(item.n_bytes for item in self._items)
        budget = int(goal.number) - rest - self._fixed_bytes
        least = _bytes_of(options, _smallest_of(options))
        if budget < least:
            # By the guess nothing fits; by what the package takes the smallest may.
            self._check_size(options, int(goal.number))
        return list(search.solve(options, max(budget, least)).chosen)

    def package_bytes(self, options: list[list[Option]], chosen: Sequence[int]) -> int:
        """Return the size of the package that a choice makes."""
        names = [some[i].format for some, i in zip(options, chosen, strict=True)]
        key = tuple(
            list(item.choices).index(name) for item, name in zip(self._open, names, strict=True)
        )
        if key not in self._sizes:
            source = self._package.reopened()
            self._sizes[key] = package_bytes(source, self._recipe(names))
        return self._sizes[key]

    def _recipe(self, names: Sequence[str]) -> Recipe:
        treatments: dict[str, Treatment | None] = {}
        chosen = dict(zip(map(id, self._open), names, strict=True))
        for item in self._items:
            choice = item.choices.get(chosen.get(id(item), ""))
            for i, candidate in enumerate(item.candidates):
                treatments[candidate.weight.name] = None if choice is None else choice.treatments[i]
        rules = tuple(
            Rule(
                select=Select(name=_exactly(name), min_size=min(self._min_size, DEFAULT_MIN_SIZE)),
                treatment=Keep() if treatment is None else treatment,
            )
            for name, treatment in treatments.items()
        )
        return Recipe(steps=(Step(rules=rules),), target=self._target)

    def _snr(self, error: float) -> float:
        return math.inf if error <= 0 else -10 * math.log10(error)

    def plan(
        self, solved: tuple[list[list[Option]], list[int]], notes: list[str], goal: Goal
    ) -> Plan:
        """Return the plan of a choice."""
        options, chosen = solved
        picked = [some[i] for some, i in zip(options, chosen, strict=True)]
        by_item = dict(zip(map(id, self._open), picked, strict=True))
        scored = dict(zip(map(id, self._open), self._scores, strict=True))
        planned = [
            weight
            for item in self._items
            for weight in _planned(item, by_item.get(id(item)), scored.get(id(item), {}))
        ]
        whole = self.package_bytes(options, chosen)
        n_bytes = _bytes_of(options, chosen) + self._fixed_bytes
        rest = whole - n_bytes
        points = search.curve(options)
        curve = tuple(
            CurvePoint(
                package_bytes=point.n_bytes + self._fixed_bytes + rest,
                bits_per_weight=8 * (point.n_bytes + self._fixed_bytes) / self._size,
                snr_db=self._snr(point.error),
            )
            for point in points
        )
        bits = 8 * n_bytes / self._size
        notes = [*notes, *self._remarks(goal, whole, bits, points)]
        return Plan(
            source=str(self._package.path),
            recipe=self._recipe([one.format for one in picked]),
            weights=tuple(planned),
            n_bytes=n_bytes,
            package_bytes=whole,
            bits_per_weight=bits,
            snr_db=self._snr(math.fsum(one.error for one in picked)),
            scored_by=self._scored_by,
            curve=curve,
            knee=search.knee(_compressed_part(points, options)),
            notes=tuple(notes),
        )

    def _remarks(self, goal: Goal, whole: int, bits: float, points: Sequence[Point]) -> list[str]:
        number = {"bits": bits, "size": float(whole), "snr": goal.number}[goal.kind]
        if number >= _MET * goal.number:
            return []
        most = points[-1].n_bytes + self._fixed_bytes
        if 8 * most / self._size <= bits:
            return ["the budget is more than all weights take with the least error"]
        return ["no choice within 1 % of the budget has as little error as this smaller one"]


def _cost(options: list[list[Option]], chosen: Sequence[int], goal: Goal) -> tuple[float, float]:
    """Return what makes one choice worse than another."""
    picked = [some[i] for some, i in zip(options, chosen, strict=True)]
    error = math.fsum(one.error for one in picked)
    n_bytes = float(sum(one.n_bytes for one in picked))
    return (n_bytes, error) if goal.kind == "snr" else (error, n_bytes)


def _planned(
    item: Item, option: Option | None, scored: Mapping[str, Measured]
) -> list[PlannedWeight]:
    found: list[PlannedWeight] = []
    distinct = item.distinct
    for i, candidate in enumerate(item.candidates):
        weight = candidate.weight
        name = KEEP if option is None else option.format
        score = scored.get(name)
        treatment = None if option is None else item.choices[name].treatments[i]
        n_bytes = item.n_bytes if option is None else option.n_bytes
        found.append(
            PlannedWeight(
                name=weight.name,
                op_types=weight.op_types,
                shape=weight.shape,
                format=name,
                treatment=treatment,
                n_bytes=n_bytes if i == 0 else 0,
                snr_db=None if score is None else _decibels(score.relative),
                is_estimate=score is not None and score.sampled,
                error=0.0 if option is None or i else option.error,
                shares_with=item.name if i and i not in distinct[1:] else None,
                reason=item.reason,
            )
        )
    return found


def _decibels(relative: float) -> float:
    return math.inf if relative <= 0 else -10 * math.log10(relative)


def _smallest_of(options: Sequence[Sequence[Option]]) -> list[int]:
    """Return the smallest option of each item, of equals that of the least error."""
    return [
        min(range(len(some)), key=lambda i: (some[i].n_bytes, some[i].error)) for some in options
    ]


def _bytes_of(options: Sequence[Sequence[Option]], chosen: Sequence[int]) -> int:
    return sum(some[i].n_bytes for some, i in zip(options, chosen, strict=True))


def _compressed_part(points: Sequence[Point], options: Sequence[Sequence[Option]]) -> list[Point]:
    """Return the curve up to where every weight has the least error short of being kept."""
    most = sum(
        max((one.n_bytes for one in some if one.format != KEEP), default=some[0].n_bytes)
        for some in options
    )
    return [point for point in points if point.n_bytes <= most] or [points[0]]


def _exactly(name: str) -> str:
    """Return the selection of a weight by its name, even if that looks like a pattern."""
    return f"re:{re.escape(name)}" if name.startswith(("re:", "glob:")) else name


def _thinned(points: Sequence[CurvePoint], n: int) -> list[CurvePoint]:
    """Return at most so many points, the first and the last among them, evenly by size."""
    if len(points) <= n:
        return list(points)
    low, high = points[0].package_bytes, points[-1].package_bytes
    kept = {
        min(
            range(len(points)),
            key=lambda i: abs(points[i].package_bytes - (low + (high - low) * k / (n - 1))),
        )
        for k in range(n)
    }
    return [points[i] for i in sorted(kept)]


def _expected(weight: PlannedWeight) -> str:
    """Return what is expected of a weight, for a comment."""
    if weight.treatment is None:
        return f"{weight.reason or 'kept'}: {human_bytes(weight.n_bytes)}"
    if weight.shares_with is not None:
        return f"stored with {ascii(weight.shares_with)[1:-1]}"
    return f"{human_bytes(weight.n_bytes)}, {weight.bits_per_weight:.2f} bits, {_shown(weight)} dB"


def _shown(weight: PlannedWeight) -> str:
    if weight.snr_db is None:
        return ""
    return f"{'about ' if weight.is_estimate else ''}{human_snr(weight.snr_db)}"
