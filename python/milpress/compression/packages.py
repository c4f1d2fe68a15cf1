"""The main job: a package in, a verified smaller package out; and the way back."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from milpress.calibration.moments import Calibration, calibrate, package_digest
from milpress.calibration.second_moments import SecondMoments, checked_memory
from milpress.calibration.uses import Statistics
from milpress.compression.checkpoint import Checkpoint, check_folder
from milpress.compression.decisions import plan_package
from milpress.compression.job import _Job, weight_bytes
from milpress.compression.report import Report, WeightReport
from milpress.compression.requests import RecipeWishes, Wishes
from milpress.compression.verification import Verification, compare_packages
from milpress.compression.writer import Rewriter
from milpress.errors import ConfigError, UnsupportedError, weight_errors
from milpress.kernels.device import DeviceName, using
from milpress.kernels.threads import thread_limit
from milpress.mil import treatments
from milpress.mil.constexpr import Decoder, is_constexpr, is_part
from milpress.mil.opset import raise_opsets
from milpress.mil.package import Package, n_package_bytes
from milpress.mil.staging import Counter, Sink, Staged, check_destination
from milpress.mil.weights import sites, weight_files, weights
from milpress.progress import Progress
from milpress.recipe import Recipe
from milpress.samples.data import Data

if TYPE_CHECKING:
    from milpress.calibration.activation_report import ActivationReport

OnUnsupported: TypeAlias = Literal["leave", "error"]


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
    from milpress.calibration.activations import quantize_activations

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
