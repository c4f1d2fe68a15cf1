"""The main job: a package in, a verified smaller package out; and the way back."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from milpress.calibration.calibrating import calibrate
from milpress.calibration.input_statistics import Calibration
from milpress.compression.advice import Advice, SampleSettings
from milpress.compression.checkpoint import Checkpoint, check_folder
from milpress.compression.decisions import decide_all
from milpress.compression.loop import Loop
from milpress.compression.report import Report, WeightReport
from milpress.compression.requests import RecipeRequests, Requests
from milpress.compression.run import Run
from milpress.compression.treating import Job, Outcome, treat
from milpress.compression.verification import Verification, compare_packages
from milpress.compression.writer import WeightWriter, rewriting
from milpress.errors import ConfigError, UnsupportedError, weight_errors
from milpress.kernels.device import DeviceName, Kernels
from milpress.mil.decode import is_constexpr, is_part
from milpress.mil.digest import content_digest
from milpress.mil.package import Package, n_package_bytes
from milpress.mil.raising import raise_opsets
from milpress.mil.records import TREATMENTS, TUNED, forget
from milpress.mil.staging import check_destination
from milpress.progress import Progress, shown
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
    progress: Progress | bool | None = None,
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
        ``True`` shows a bar; a function is called with bytes done, bytes in all and the name of the
        weight at hand.
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
            "quantizing activations needs samples: give sample_data (on the command line, "
            "--calibration-data)"
        )
        raise ConfigError(msg)
    run = Run(
        verify=verify,
        progress=progress,
        threads=threads,
        device=device,
        force=force,
        dry_run=dry_run,
    )
    return compress_package(
        Package(source),
        destination,
        RecipeRequests(recipe),
        run,
        target=recipe.target,
        strict=on_unsupported == "error",
        before=None if samples is None else _activations(recipe, samples.data, run.progress),
        samples=samples if recipe.steps else None,
        checkpoint=checkpoint,
    )


def _activations(
    recipe: Recipe, data: Data | Calibration, progress: Progress | bool | None
) -> Callable[[Package], ActivationReport] | None:
    step = recipe.activations
    if step is None:
        return None
    if isinstance(data, Calibration):
        msg = "quantizing activations needs the samples themselves, not statistics of them"
        raise ConfigError(msg)
    from milpress.calibration.activation_quantization import quantize_activations

    return functools.partial(
        quantize_activations,
        codes_of=step.codes_of,
        samples=data,
        calibration=step.calibration,
        progress=progress,
    )


def compress_package(
    package: Package,
    destination: str | os.PathLike[str],
    requests: Requests,
    run: Run | None = None,
    *,
    target: str | None = None,
    strict: bool = False,
    may_be_idle: bool = False,
    before: Callable[[Package], ActivationReport] | None = None,
    samples: SampleSettings | None = None,
    make: Callable[[Job, Kernels], Outcome] = treat,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Report:
    """Do what `compress` does, with an open package and any way to say what is requested.

    With ``may_be_idle``, compressing nothing is no error: the result is a copy. ``before`` is done
    to the package's activations first. ``make`` compresses a weight.
    """
    started = time.perf_counter()
    run = run or Run()
    with run.limits() as kernels:
        if not run.dry_run:
            check_destination(package.path, Path(destination), force=run.force)
        if checkpoint is not None:
            check_folder(checkpoint, [package.path, Path(destination)])
        calibration = None
        if samples is not None:
            calibration = calibrate(
                package.reopened(),
                samples.data,
                mask=samples.mask,
                cache=samples.cache,
                progress=run.progress,
            )
        notes = raise_opsets(package, target)
        activations = None if before is None else before(package)
        notes.extend(() if activations is None else activations.notes)
        decisions = decide_all(package, requests, strict=strict)
        advice = None
        if samples is not None and calibration is not None:
            treated = [each.weight for each in decisions.values() if each.treatments]
            advice = Advice.of(samples, calibration, package, treated)
            notes.append(f"calibrated with {calibration.n_samples} samples")
            notes.extend(note for note in calibration.notes if note not in notes)
            notes.extend([] if advice.moments is None else ["errors fed back"])
        files = None
        if checkpoint is not None and not run.dry_run:
            digests = [content_digest(package), "" if calibration is None else calibration.data]
            files = Checkpoint(
                checkpoint, [*digests, *(() if samples is None else samples.identity)]
            )

        def compressed(job: Job) -> Outcome:
            return make(job, kernels)

        loop = Loop(
            package=package,
            decisions=decisions,
            make=compressed if files is None else functools.partial(files.outcome, make=compressed),
            progress=run.progress,
            advice=advice,
            strict=strict,
            may_grow=requests.may_grow,
        )
        with rewriting(package, destination, run) as writer:
            weights = loop.run(writer)
            if not may_be_idle and (activations is None or not activations.n_pairs):
                _refuse_idle(package, weights, activations)
            verification, size = writer.commit(compare_packages if run.verify else None)
        if files is not None:
            files.clear()
    notes.extend(kernels.notes)
    report = _report(package, destination, weights, notes, size, verification, started)
    return replace(report, activations=activations)


def _refuse_idle(
    package: Package, weights: Sequence[WeightReport], activations: ActivationReport | None
) -> None:
    """Refuse to write a package in which nothing is compressed."""
    if any(weight.status == "compressed" for weight in weights):
        return
    left = [f"{each.name}: {each.note}" for each in weights if each.status == "left"]
    unquantized = (
        [] if activations is None else [each for each in activations.activations if each.note]
    )
    left.extend(f"{each.name}: {each.note}" for each in unquantized)
    what = "weight or activation" if unquantized else "weight"
    reasons = "; ".join(left[:3] or ["none was selected"])
    msg = f"{package.path}: no {what} can be compressed ({reasons})"
    raise UnsupportedError(msg)


def decompress(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    verify: bool = True,
    progress: Progress | bool | None = None,
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
    progress
        ``True`` shows a bar; a function is called with bytes done, bytes in all and the name of the
        weight at hand.
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
    run = Run(verify=verify, progress=progress, threads=threads, force=force)
    return decompress_package(Package(source), destination, run)


def decompress_package(
    package: Package,
    destination: str | os.PathLike[str],
    run: Run | None = None,
    *,
    may_be_idle: bool = False,
) -> Report:
    """Do what `decompress` does, with an open package."""
    started = time.perf_counter()
    run = run or Run()
    with run.limits(), rewriting(package, destination, run) as writer:
        with shown(run.progress) as note:
            weights = _decompress_weights(package, writer, note)
        if not may_be_idle and not weights:
            msg = f"{package.path}: no weight is compressed, so there is nothing to decompress"
            raise UnsupportedError(msg)
        forget(package.model, TREATMENTS)
        forget(package.model, TUNED)
        verification, size = writer.commit(compare_packages if run.verify else None)
    return _report(package, destination, weights, [], size, verification, started)


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
    with rewriting(package, destination, Run(force=force)) as writer:
        for graph in package.graphs:
            for node in graph.nodes:
                writer.copy(node)
        return writer.commit(compare_packages if verify else None)[0]


def _decompress_weights(
    package: Package, writer: WeightWriter, note: Progress
) -> list[WeightReport]:
    reports: list[WeightReport] = []
    by_graph = [
        {weight.node: weight for weight in graph.find_weights(0) if is_constexpr(weight.node)}
        for graph in package.graphs
    ]
    total = sum(weight.n_bytes for compressed in by_graph for weight in compressed.values())
    n_done = 0
    for graph, compressed in zip(package.graphs, by_graph, strict=True):
        parts = [node for node in graph.nodes if is_part(node)]
        for node in graph.nodes:
            weight = compressed.get(node)
            if weight is None:
                if node not in parts:
                    writer.copy(node)
                continue
            with weight_errors(weight.name):
                n_bytes = weight.n_bytes
                note(n_done, total, weight.name)
                n_bytes_after = writer.decompress(weight)
                n_done += n_bytes
            reports.append(
                WeightReport(
                    name=weight.name,
                    op_types=weight.op_types,
                    shape=weight.shape,
                    status="compressed",
                    treatment="decompress",
                    note="",
                    bytes_before=n_bytes,
                    bytes_after=n_bytes_after,
                )
            )
        needed = graph.needed(parts)
        for part in parts:
            if part in needed:
                writer.copy(part)
        graph.remove(parts)
        graph.apply()
    note(total, total, "")
    return reports


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
