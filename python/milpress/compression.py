"""The main job: a package in, a verified smaller package out; and the way back."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from milpress import _core
from milpress._checkpoint import Checkpoint, check_folder
from milpress._parallel import in_order
from milpress._plan import Plan, RecipeWishes, Wishes, plan_package
from milpress._rewrite import Counter, Order, Rewriter, Sink, Treated, is_own
from milpress.errors import ConfigError, UnsupportedError, weight_errors
from milpress.formats import Custom, PalettizeConfig
from milpress.mil import opset, treatments, values
from milpress.mil.constexpr import Decoder, is_constexpr, is_part
from milpress.mil.package import Package, Staged, check_destination, n_package_bytes
from milpress.mil.program import Node
from milpress.mil.weights import Site, Weight, sites, weight_files, weights
from milpress.moments import Calibration, calibrate, package_digest
from milpress.placement import DeviceName, using
from milpress.recipe import Recipe, describe, treatment_dict
from milpress.report import Report, WeightReport
from milpress.samples import Data
from milpress.second_moments import Inputs, SecondMoments, checked_memory
from milpress.uses import Statistics
from milpress.verification import Verification, compare_packages

if TYPE_CHECKING:
    from milpress.activation_report import ActivationReport

Progress: TypeAlias = Callable[[int, int, str], None]
OnUnsupported: TypeAlias = Literal["leave", "error"]

_MOST_THREADS = 4096


def compress(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    recipe: Recipe | str | os.PathLike[str],
    *,
    on_unsupported: OnUnsupported = "leave",
    verify: bool = True,
    progress: Progress | None = None,
    threads: int | None = None,
    device: DeviceName = "cpu",
    force: bool = False,
    dry_run: bool = False,
    sample_data: Data | Calibration | None = None,
    calibration_cache: str | os.PathLike[str] | None = None,
    calibration_mask: str | None = None,
    bias_correction: bool = False,
    feedback: bool = False,
    feedback_memory: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Report:
    """Compress the weights of a package into another package.

    The model's graph is edited in place: what is not compressed stays as it is. Weights are read,
    compressed and written one at a time. The result is written beside the destination, verified,
    and then moved there.

    Parameters
    ----------
    source, destination
        Paths of the ``.mlpackage`` to read and of the one to write.
    recipe
        What to do to which weights, or the path of its YAML file.
    on_unsupported
        What to do with a weight that does not suit its treatment: ``"leave"`` it as it is, and say
        so in the report, or raise an ``"error"``.
    verify
        Whether to read the result back and compare it with the source.
    progress
        Called with bytes done, bytes in all and the name of the weight at hand.
    threads
        Threads to use; ``None`` for MILPRESS_NUM_THREADS or the number of cores.
    device
        Where the kernels run: ``"cpu"``; ``"metal"`` for the GPU of a Mac, with the CPU's results;
        ``"auto"`` takes the CPU until a GPU has been measured to be faster. What the GPU could not
        do is in the report's notes.
    force
        Whether an existing package at the destination is replaced.
    dry_run
        Whether to compute the report only and write nothing.
    sample_data
        Samples that say what each weight is multiplied by, as `milpress.calibrate` takes them, or
        what that returned. Errors count accordingly in k-means tables and clipped ranges. A recipe
        that quantizes activations needs samples, whose ranges it takes.
    calibration_cache, calibration_mask
        As ``cache`` and ``mask`` of `milpress.calibrate`.
    bias_correction
        Whether the mean error that ``sample_data`` show for the outputs of each compressed
        convolution and linear layer is taken off its bias.
    feedback
        Whether the error of each column of a convolution's or linear layer's weight is fed back to
        the columns after it, by what ``sample_data`` show of its inputs together (GPTQ, SparseGPT).
        Takes samples, not their moments.
    feedback_memory
        Bytes that this may take beside the model, on all threads together; by default
        4,000,000,000, on any machine. Errors of a layer that takes more (12 times the square of its
        inputs and less) are fed back within blocks of its inputs, or not at all; the report says
        so.
    checkpoint
        A folder to keep compressed weights in until all are done. If a run was interrupted, it goes
        on from there.

    Returns
    -------
    Report
        What happened to each weight.

    Raises
    ------
    ConfigError
        If the recipe or an argument is wrong by itself.
    PackageError
        If the source is damaged or of an unsupported kind.
    UnsupportedError
        If the treatment needs a later opset, nothing could be compressed, or, with
        ``on_unsupported="error"``, a weight does not suit its treatment.
    DestinationError
        If the destination is taken or overlaps the source.
    VerificationError
        If the result does not keep what was promised; nothing is left of it.
    StorageError
        If the system refuses to read or write.
    """
    if on_unsupported not in ("leave", "error"):
        msg = f"on_unsupported must be 'leave' or 'error', got {on_unsupported!r}"
        raise ConfigError(msg)
    if not isinstance(recipe, Recipe):
        recipe = Recipe.from_yaml(recipe)
    samples = SampleSettings.of(
        sample_data,
        cache=calibration_cache,
        mask=calibration_mask,
        bias_correction=bias_correction,
        feedback=feedback,
        feedback_memory=feedback_memory,
    )
    if recipe.activations is not None and samples is None:
        msg = (
            "samples must be given to quantize activations, as sample_data or by "
            "--calibration-data, got none"
        )
        raise ConfigError(msg)
    return compress_package(
        Package(source),
        destination,
        RecipeWishes(recipe),
        target=recipe.target,
        strict=on_unsupported == "error",
        verify=verify,
        progress=progress,
        threads=threads,
        device=device,
        force=force,
        dry_run=dry_run,
        before=None if samples is None else _activations(recipe, samples.data, progress),
        samples=samples if recipe.steps else None,
        checkpoint=checkpoint,
    )


def _activations(
    recipe: Recipe, data: Data | Calibration, progress: Progress | None
) -> Callable[[Package], ActivationReport] | None:
    step = recipe.activations
    if step is None:
        return None
    if isinstance(data, Calibration):
        msg = "sample_data must be samples where activations are quantized, got their moments"
        raise ConfigError(msg)
    from milpress.activations import quantize_activations

    def work(package: Package) -> ActivationReport:
        return quantize_activations(
            package, step.codes_of, data, calibration=step.calibration, progress=progress
        )

    return work


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleSettings:
    """Samples to calibrate with, and what for."""

    data: Data | Calibration
    cache: str | os.PathLike[str] | None = None
    mask: str | None = None
    bias_correction: bool = False
    feedback: bool = False
    feedback_memory: int | None = None

    @property
    def identity(self) -> tuple[Any, ...]:
        """What results depend on besides the samples."""
        return (self.bias_correction, self.feedback, checked_memory(self.feedback_memory))

    @classmethod
    def of(cls, data: Data | Calibration | None, **settings: Any) -> SampleSettings | None:
        """Return the settings; ``None`` without samples.

        Raises
        ------
        ConfigError
            If something is set that takes samples.
        """
        memory = settings.get("feedback_memory")
        checked_memory(memory)
        if memory is not None and not settings.get("feedback"):
            msg = "feedback_memory must come with feedback, got none"
            raise ConfigError(msg)
        if data is not None:
            if isinstance(data, Calibration) and settings.get("feedback"):
                msg = "feedback must come with samples, got their moments alone"
                raise ConfigError(msg)
            # Weights and activations each go through them.
            return cls(data=list(data) if isinstance(data, Iterator) else data, **settings)
        given = [name for name, value in settings.items() if value]
        if given:
            msg = f"{' and '.join(given)} must come with samples, got none"
            raise ConfigError(msg)
        return None


def compress_package(
    package: Package,
    destination: str | os.PathLike[str],
    wishes: Wishes,
    *,
    target: str | None = None,
    strict: bool = False,
    verify: bool = True,
    progress: Progress | None = None,
    threads: int | None = None,
    device: DeviceName = "cpu",
    force: bool = False,
    dry_run: bool = False,
    may_be_idle: bool = False,
    before: Callable[[Package], ActivationReport] | None = None,
    samples: SampleSettings | None = None,
    rewriter: type[Rewriter] = Rewriter,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Report:
    """Do what `compress` does, with an open package and any way to say what is wished.

    With ``may_be_idle``, compressing nothing is no error: the result is a copy. ``before`` is done
    to the package's activations first. ``rewriter`` is what makes and writes weights.
    """
    started = time.perf_counter()
    with thread_limit(threads), using(device) as kernels:
        if not dry_run:
            check_destination(package.path, Path(destination), force=force)
        names = weight_files(package)
        if checkpoint is not None:
            check_folder(checkpoint, [package.path, Path(destination)])
        calibration = None
        if samples is not None:
            calibration = calibrate(
                package.reopened(),
                samples.data,
                mask=samples.mask,
                cache=samples.cache,
                progress=progress,
            )
        notes = raise_opsets(package, target)
        activations = None if before is None else before(package)
        left: list[str] = []
        if activations is not None:
            notes.extend(activations.notes)
            may_be_idle = may_be_idle or activations.n_pairs > 0
            left = [f"{each.name}: {each.note}" for each in activations.activations if each.note]
        planned = plan_package(package, wishes, strict=strict)
        job = _Job(package, planned, strict, wishes.may_grow, may_be_idle, progress, rewriter)
        job.left = left
        if calibration is not None and samples is not None:
            statistics = Statistics(calibration, package)
            job.calibrate(statistics, bias_correction=samples.bias_correction)
            notes.append(f"calibrated with {calibration.n_samples} samples")
            notes.extend(note for note in calibration.notes if note not in notes)
            if samples.feedback and not isinstance(samples.data, Calibration):
                job.feed_back(
                    SecondMoments(
                        package.reopened(),
                        samples.data,
                        mask=samples.mask,
                        wanted=job.layers_in_order(),
                        memory=checked_memory(samples.feedback_memory),
                    )
                )
                notes.append("errors fed back")
        files = None
        if checkpoint is not None and not dry_run:
            digests = [package_digest(package), "" if calibration is None else calibration.data]
            used = () if samples is None else samples.identity
            files = Checkpoint(checkpoint, [*digests, *used])
            job.keep(files)
        if dry_run:
            counter = Counter()
            reports = job.run(counter)
            rest = sum(package.weight_path(name).stat().st_size for name in names)
            on_disk = package.model_path.stat().st_size
            size = n_package_bytes(package.path) - rest - on_disk
            size += counter.n_bytes + package.model.ByteSize()
            verification = None
        else:
            with Staged(package, Path(destination), force=force) as staged:
                staged.copy_rest(set(names))
                reports = job.run(staged)
                verification, size = _complete(package, staged, verify=verify)
        if files is not None:
            files.clear()
    notes.extend(kernels.notes)
    report = _report(package, destination, reports, notes, size, verification, started)
    return replace(report, activations=activations)


def decompress(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    verify: bool = True,
    threads: int | None = None,
    force: bool = False,
) -> Report:
    """Store every compressed weight of a package densely, as it is decoded.

    Weights that are stored as float16 and cast become dense float32 too, as with coremltools.

    Parameters
    ----------
    source, destination
        Paths of the ``.mlpackage`` to read and of the one to write.
    verify
        Whether to read the result back and compare it with the source.
    threads
        Threads to use; ``None`` for MILPRESS_NUM_THREADS or the number of cores.
    force
        Whether an existing package at the destination is replaced.

    Returns
    -------
    Report
        What happened to each weight; ``compressed`` counts those that were.

    Raises
    ------
    UnsupportedError
        If no weight is compressed.
    CompressionError
        Whatever else `compress` raises.
    """
    return decompress_package(
        Package(source), destination, verify=verify, threads=threads, force=force
    )


def decompress_package(
    package: Package,
    destination: str | os.PathLike[str],
    *,
    verify: bool = True,
    threads: int | None = None,
    force: bool = False,
    may_be_idle: bool = False,
) -> Report:
    """Do what `decompress` does, with an open package."""
    started = time.perf_counter()
    with thread_limit(threads):
        check_destination(package.path, Path(destination), force=force)
        with Staged(package, Path(destination), force=force) as staged:
            staged.copy_rest(set(weight_files(package)))
            reports = _decompress_weights(package, staged)
            if not may_be_idle and not any(report.status == "compressed" for report in reports):
                msg = f"{package.path}: some weight must be compressed, got none"
                raise UnsupportedError(msg)
            treatments.forget(package.model)
            verification, size = _complete(package, staged, verify=verify)
    return _report(package, destination, reports, [], size, verification, started)


def save_package(
    package: Package,
    destination: str | os.PathLike[str],
    *,
    verify: bool = True,
    force: bool = False,
) -> Verification | None:
    """Write an open package, with what was changed in its model; stored values stay as they are.

    Parameters
    ----------
    package, destination
        The package, and the path of the one to write.
    verify
        Whether to read the result back and compare it with the package as it was opened.
    force
        Whether an existing package at the destination is replaced.

    Raises
    ------
    CompressionError
        What `compress` raises of sources, destinations and results.
    """
    check_destination(package.path, Path(destination), force=force)
    with Staged(package, Path(destination), force=force) as staged:
        staged.copy_rest(set(weight_files(package)))
        rewriter = Rewriter(package, staged)
        for site in sites(package):
            for node in site.graph.nodes:
                rewriter.copy(node)
        return _complete(package, staged, verify=verify)[0]


@contextlib.contextmanager
def thread_limit(threads: int | None) -> Iterator[None]:
    """Limit the threads of kernels called in this block.

    Raises
    ------
    ConfigError
        If the number is below 1, or above what any machine has.
    """
    if threads is not None and threads < 1:
        msg = f"threads must be at least 1, got {threads}"
        raise ConfigError(msg)
    if threads is not None and threads > _MOST_THREADS:
        msg = f"threads must be at most {_MOST_THREADS}, got {threads}"
        raise ConfigError(msg)
    before = _core.set_thread_limit(threads or 0)
    try:
        yield
    finally:
        _core.set_thread_limit(before)


def raise_opsets(package: Package, target: str | None) -> list[str]:
    """Raise programs to the target, and iOS15 to the first that can be compressed."""
    asked = None if target is None else opset.by_target(target)
    notes: dict[str, None] = {}
    for program in package.programs:
        for function in program.functions.values():
            current = opset.by_name(function.opset)
            goal = max(asked or current, opset.FIRST_WITH_COMPRESSION)
            if goal > current:
                opset.raise_to(program.model, function, goal, package)
                notes[f"raised from {current.target} to {goal.target}"] = None
        package.model.specificationVersion = max(
            package.model.specificationVersion, program.model.specificationVersion
        )
    return list(notes)


class _Job:
    """Writes all weights of a package, compressed or as they are, one after the other."""

    def __init__(
        self,
        package: Package,
        planned: list[tuple[Site, dict[Node, Plan]]],
        strict: bool,
        may_grow: bool,
        may_be_idle: bool,
        progress: Progress | None,
        rewriter: type[Rewriter],
    ) -> None:
        self._package = package
        self._planned = planned
        self._strict = strict
        self._may_grow = may_grow
        self._may_be_idle = may_be_idle
        self._progress = progress or (lambda *_: None)
        self._rewriter = rewriter
        self._records = treatments.read(package.model)
        self._statistics: Statistics | None = None
        self._corrects = False
        self._moments: SecondMoments | None = None
        self._files: Checkpoint | None = None
        self._layers: list[tuple[Weight, Node, NDArray[np.float64]]] = []
        # What else was left, and why.
        self.left: list[str] = []

    def calibrate(self, statistics: Statistics, *, bias_correction: bool) -> None:
        """Let errors count as statistics say, and correct biases."""
        self._statistics = statistics
        self._corrects = bias_correction

    def layers_in_order(self) -> Iterator[tuple[str, ...]]:
        """Yield, for each weight that is treated, the layers by whose inputs its errors count."""
        for _, plans in self._planned:
            for plan in plans.values():
                if plan.treatments:
                    yield self._layers_of(plan.weight)

    def feed_back(self, moments: SecondMoments) -> None:
        """Let errors of each column be made up for by those after it."""
        self._moments = moments

    def keep(self, files: Checkpoint) -> None:
        """Keep each weight in files as soon as it is treated, and take from them what is kept."""
        self._files = files

    def run(self, sink: Sink) -> list[WeightReport]:
        """Write to a sink, and record in the model what was done and is promised of it."""
        rewriter = self._rewriter(self._package, sink)
        reports: list[WeightReport] = []
        sizes = {
            node: weight_bytes(plan.weight, self._package)
            for _, plans in self._planned
            for node, plan in plans.items()
        }
        total = sum(sizes.values())
        done = 0
        orders = self._orders(rewriter)
        with contextlib.closing(
            in_order(self._maker(rewriter), orders.values(), _n_threads(orders.values()))
        ) as made:
            for site, plans in self._planned:
                parts = self._parts_to_replace(plans.values())
                unwritten = set(parts)
                biases = self._biases_to_correct(plans, rewriter)
                for node in site.graph.nodes:
                    plan = plans.get(node)
                    if plan is not None:
                        self._progress(done, total, plan.weight.name)
                        order = orders.get(node)
                        written = self._write(
                            plan, sizes[node], rewriter, unwritten, biases, order, made
                        )
                        reports.append(written)
                        done += reports[-1].bytes_before
                    elif node not in parts and node not in biases:
                        rewriter.copy(node)
                needed = site.graph.needed(unwritten)
                for part in parts:
                    if part in needed:
                        rewriter.copy(part)
                self._correct_biases(biases, rewriter)
                site.graph.apply()
        if not any(report.status == "compressed" for report in reports):
            self._check_idle(reports)
        else:
            treatments.record(self._package.model, self._records)
        self._progress(total, total, "")
        return reports

    def _maker(self, rewriter: Rewriter) -> Callable[[Order], Treated | UnsupportedError | None]:
        """Return what makes a weight, or takes it from files."""
        files = self._files
        if files is None:
            return rewriter.treated

        def make(order: Order) -> Treated | UnsupportedError | None:
            made = None if order.is_repeated else files.load(order)
            if made is None:
                found = rewriter.treated(order)
                if isinstance(found, Treated):
                    files.save(order, found)
                return found
            return made

        return make

    def _orders(self, rewriter: Rewriter) -> dict[Node, Order]:
        """Return what is to be done to each weight that is treated, in the order of writing."""
        orders = {}
        for site, plans in self._planned:
            early = not opset.by_name(site.function.opset).has_blocks
            for node in site.graph.nodes:
                plan = plans.get(node)
                if plan is not None and plan.treatments:
                    orders[node] = rewriter.order(
                        plan.weight, plan.treatments, early=early, **self._advice(plan.weight)
                    )
        return orders

    def _parts_to_replace(self, plans: Iterable[Plan]) -> dict[Node, None]:
        """Return the ops from which weights that are treated are decoded."""
        return {
            part: None
            for plan in plans
            if plan.treatments and is_constexpr(plan.weight.node)
            for part in Decoder(plan.weight.graph, self._package).parts(plan.weight.node)
        }

    def _biases_to_correct(
        self, plans: Mapping[Node, Plan], rewriter: Rewriter
    ) -> dict[Node, None]:
        """Return the constants that are written once all weights of a graph are."""
        if not self._corrects:
            return {}
        found = (
            rewriter.bias_of(plan.weight, use.node)
            for plan in plans.values()
            if plan.treatments
            for use in plan.weight.node.uses
            if use.parameter == "weight"
        )
        return {
            bias: None
            for bias in found
            if bias is not None and not (bias in plans and plans[bias].treatments)
        }

    def _correct_biases(self, biases: dict[Node, None], rewriter: Rewriter) -> None:
        for weight, layer, correction in self._layers:
            bias = rewriter.bias_of(weight, layer)
            digest = rewriter.correct(weight, layer, correction)
            if digest:
                self._records.biases[f"{weight.prefix}{layer.name}"] = digest
                if bias is not None and is_own(bias):
                    biases.pop(bias, None)
        for bias in biases:
            rewriter.copy(bias)
        self._layers.clear()

    def _write(
        self,
        plan: Plan,
        before: int,
        rewriter: Rewriter,
        unwritten: set[Node],
        later: Collection[Node],
        order: Order | None,
        made: Iterator[Treated | UnsupportedError | None],
    ) -> WeightReport:
        weight = plan.weight
        name = weight.name  # that of the source; compressing changes it
        after = before
        if order is not None:
            notes, layers = self._note(weight), self._layers_of(weight)
            try:
                treated = next(made)
                with weight_errors(name):
                    done = rewriter.compress(order, treated, may_grow=self._may_grow)
                if done.notes and self._strict:
                    raise UnsupportedError("; ".join(done.notes))
                notes = (*done.notes, *notes)
                if self._moments is not None:
                    fed_back = all(done.fed_back)
                    note = self._moments.note(layers, plan.treatments, is_fed_back=fed_back)
                    notes = (*notes, *([note] if note else []))
                plan, after = plan.carried_out(done.treatments, notes), done.n_bytes
                self._layers.extend(
                    (weight, use.node, done.corrections[f"{weight.prefix}{use.node.name}"])
                    for use in weight.node.uses
                    if f"{weight.prefix}{use.node.name}" in done.corrections
                )
                steps = [treatment_dict(treatment) for treatment in plan.treatments]
                for step, is_fed_back in zip(steps, done.fed_back, strict=True):
                    if is_fed_back:
                        next(iter(step.values()))["feedback"] = True
                self._records.add(name, weight.name, steps)
            except UnsupportedError as error:
                if self._strict:
                    msg = f"{name}: {error}"
                    raise UnsupportedError(msg) from error
                plan = plan.left(str(error))
                for part in Decoder(weight.graph, self._package).parts(weight.node):
                    if part in unwritten:
                        unwritten.remove(part)
                        rewriter.copy(part)
        if not plan.treatments and weight.node not in later:
            rewriter.copy(weight.node)
        return _weight_report(plan, name, before, after)

    def _advice(self, weight: Weight) -> dict[str, Any]:
        """Return what samples say of a weight, for its order."""
        statistics = self._statistics
        if statistics is None:
            return {}
        advice: dict[str, Any] = {"importance": functools.partial(statistics.importance, weight)}
        if self._corrects:
            advice["correct"] = functools.partial(statistics.correct, weight)
        if self._moments is not None:
            evenly = functools.partial(statistics.evenly, weight)
            layers = self._layers_of(weight)
            advice["inputs"] = Inputs(self._moments, layers, weight.shape, evenly)
        return advice

    def _note(self, weight: Weight) -> tuple[str, ...]:
        if self._statistics is None:
            return ()
        note = self._statistics.note(weight, feedback=self._moments is not None)
        return (note,) if note else ()

    def _layers_of(self, weight: Weight) -> tuple[str, ...]:
        return () if self._statistics is None else tuple(self._statistics.layers_of(weight))

    def _check_idle(self, reports: list[WeightReport]) -> None:
        if self._may_be_idle:
            return
        left = [f"{each.name}: {each.note}" for each in reports if each.status == "left"]
        reasons = [*left, *self.left][:3] or ["none was selected"]
        what = "weight or activation" if self.left else "weight"
        msg = (
            f"{self._package.path}: some {what} must be compressed, got none ({'; '.join(reasons)})"
        )
        raise UnsupportedError(msg)


def _n_threads(orders: Iterable[Order]) -> int | None:
    """Return 1 if a user's function makes tables, which may not be ready for several threads."""
    is_custom = any(
        isinstance(treatment, PalettizeConfig) and isinstance(treatment.table, Custom)
        for order in orders
        for treatment in order.treatments
    )
    return 1 if is_custom else None


def _decompress_weights(package: Package, sink: Sink) -> list[WeightReport]:
    rewriter = Rewriter(package, sink)
    reports: list[WeightReport] = []
    for site in sites(package):
        decoder = Decoder(site.graph, package)
        compressed = {
            weight.node: weight
            for weight in weights(site.prefix, site.graph, least=0)
            if is_constexpr(weight.node)
        }
        parts = [node for node in site.graph.nodes if is_part(node)]
        for node in site.graph.nodes:
            weight = compressed.get(node)
            if weight is None:
                if node not in parts:
                    rewriter.copy(node)
                continue
            before = weight_bytes(weight, package)
            with weight_errors(weight.name):
                after = rewriter.decompress(weight, decoder)
            reports.append(
                WeightReport(
                    name=weight.name,
                    op_types=weight.op_types,
                    shape=weight.shape,
                    status="compressed",
                    treatment="decompress",
                    note="",
                    bytes_before=before,
                    bytes_after=after,
                )
            )
        needed = site.graph.needed(parts)
        for part in parts:
            if part in needed:
                rewriter.copy(part)
        site.graph.remove(parts)
        site.graph.apply()
    return reports


def _complete(package: Package, staged: Staged, *, verify: bool) -> tuple[Verification | None, int]:
    """Finish the staged package, verify it and move it to its destination."""
    staged.finish(package.model)
    verification = None
    if verify:
        verification = compare_packages(package.reopened(), Package(staged.path))
    size = n_package_bytes(staged.path)
    staged.commit()
    return verification, size


def weight_bytes(weight: Weight, package: Package) -> int:
    """Return the size of what is stored for a weight."""
    stored = Decoder(weight.graph, package).stored_values(weight.node)
    return sum(values.n_stored_bytes(value) for value in stored)


def _weight_report(plan: Plan, name: str, before: int, after: int) -> WeightReport:
    return WeightReport(
        name=name,
        op_types=plan.weight.op_types,
        shape=plan.weight.shape,
        status=plan.status,
        treatment=", then ".join(describe(treatment) for treatment in plan.treatments),
        note=plan.note,
        bytes_before=before,
        bytes_after=after,
    )


def _report(
    package: Package,
    destination: str | os.PathLike[str],
    reports: list[WeightReport],
    notes: list[str],
    size: int,
    verification: Verification | None,
    started: float,
) -> Report:
    snr = (
        {} if verification is None else {check.name: check.snr_db for check in verification.weights}
    )
    return Report(
        source=str(package.path),
        destination=str(destination),
        weights=tuple(replace(report, snr_db=snr.get(report.name)) for report in reports),
        package_bytes_before=n_package_bytes(package.path),
        package_bytes_after=size,
        notes=tuple(notes),
        verified=verification is not None,
        signal=None if verification is None else verification.signal,
        noise=None if verification is None else verification.noise,
        seconds=time.perf_counter() - started,
    )
