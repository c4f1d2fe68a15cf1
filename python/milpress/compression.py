"""The main job: a package in, a verified smaller package out; and the way back."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeAlias

from milpress import _core
from milpress._plan import Plan, plan_package
from milpress._rewrite import Counter, Rewriter, Sink
from milpress.errors import ConfigError, UnsupportedError
from milpress.formats import PalettizeConfig, QuantizeConfig
from milpress.mil import opset, treatments, values
from milpress.mil.constexpr import Decoder
from milpress.mil.package import Package, Staged, check_destination, n_package_bytes
from milpress.mil.program import Node
from milpress.mil.treatments import Promise, Record
from milpress.mil.weights import Site, Weight, sites, weight_files, weights
from milpress.recipe import Recipe, Treatment, describe, treatment_dict
from milpress.report import Report, WeightReport
from milpress.verification import Verification, compare_packages

Progress: TypeAlias = Callable[[int, int, str], None]
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
    force: bool = False,
    dry_run: bool = False,
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
    force
        Whether an existing package at the destination is replaced.
    dry_run
        Whether to compute the report only and write nothing.

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
    started = time.perf_counter()
    if on_unsupported not in ("leave", "error"):
        msg = f"on_unsupported must be 'leave' or 'error', got {on_unsupported!r}"
        raise ConfigError(msg)
    strict = on_unsupported == "error"
    if not isinstance(recipe, Recipe):
        recipe = Recipe.from_yaml(recipe)
    with thread_limit(threads):
        package = Package(source)
        if not dry_run:
            check_destination(package.path, Path(destination), force=force)
        names = weight_files(package)
        notes = _raise_opsets(package, recipe)
        planned = plan_package(package, recipe, strict=strict)
        if dry_run:
            counter = Counter()
            reports = _compress_weights(package, planned, counter, strict, progress)
            rest = sum(package.weight_path(name).stat().st_size for name in names)
            size = n_package_bytes(package.path) - rest - len(package.model_bytes)
            size += counter.n_bytes + package.model.ByteSize()
            verification = None
        else:
            with Staged(package, Path(destination), force=force) as staged:
                staged.copy_rest(set(names))
                reports = _compress_weights(package, planned, staged, strict, progress)
                verification, size = _complete(package, staged, verify=verify)
    return _report(package, destination, reports, notes, size, verification, started)


def decompress(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    verify: bool = True,
    threads: int | None = None,
    force: bool = False,
) -> Report:
    """Store every compressed weight of a package densely, as it is decoded.

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
    started = time.perf_counter()
    with thread_limit(threads):
        package = Package(source)
        check_destination(package.path, Path(destination), force=force)
        with Staged(package, Path(destination), force=force) as staged:
            staged.copy_rest(set(weight_files(package)))
            reports = _decompress_weights(package, staged)
            if not any(report.status == "compressed" for report in reports):
                msg = f"{source}: some weight must be compressed, got none"
                raise UnsupportedError(msg)
            treatments.forget(package.model)
            verification, size = _complete(package, staged, verify=verify)
    return _report(package, destination, reports, [], size, verification, started)


@contextlib.contextmanager
def thread_limit(threads: int | None) -> Iterator[None]:
    """Limit the threads of kernels called in this block.

    Raises
    ------
    ConfigError
        If the number is below 1.
    """
    if threads is not None and threads < 1:
        msg = f"threads must be at least 1, got {threads}"
        raise ConfigError(msg)
    before = _core.set_thread_limit(threads or 0)
    try:
        yield
    finally:
        _core.set_thread_limit(before)


def _raise_opsets(package: Package, recipe: Recipe) -> list[str]:
    """Raise programs to the recipe's target, and iOS15 to the first that can be compressed."""
    asked = None if recipe.target is None else opset.by_target(recipe.target)
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


def _compress_weights(
    package: Package,
    planned: list[tuple[Site, dict[Node, Plan]]],
    sink: Sink,
    strict: bool,
    progress: Progress | None,
) -> list[WeightReport]:
    """Write all weights, compressed or as they are, and record what was promised of them."""
    rewriter = Rewriter(package, sink)
    reports: list[WeightReport] = []
    records: list[tuple[str, Record]] = []
    total = sum(
        weight_bytes(plan.weight, package) for _, plans in planned for plan in plans.values()
    )
    done = 0
    for site, plans in planned:
        early = not opset.by_name(site.function.opset).has_blocks
        for node in site.graph.nodes:
            plan = plans.get(node)
            if plan is None:
                rewriter.copy(node)
                continue
            before = after = weight_bytes(plan.weight, package)
            if progress is not None:
                progress(done, total, plan.weight.name)
            if plan.treatment is not None:
                try:
                    after = rewriter.compress(plan.weight, plan.treatment, early=early)
                    record = Record(treatment_dict(plan.treatment), _promise_of(plan.treatment))
                    records.append((plan.weight.name, record))
                except UnsupportedError as error:
                    if strict:
                        msg = f"{plan.weight.name}: {error}"
                        raise UnsupportedError(msg) from error
                    plan = plan.left(str(error))
            if plan.treatment is None:
                rewriter.copy(node)
            reports.append(_weight_report(plan, before, after))
            done += before
    if not records:
        left = [report for report in reports if report.status == "left"]
        reasons = [f"{report.name}: {report.note}" for report in left[:3]] or ["none was selected"]
        msg = f"{package.path}: some weight must be compressed, got none ({'; '.join(reasons)})"
        raise UnsupportedError(msg)
    treatments.record(package.model, records)
    if progress is not None:
        progress(total, total, "")
    return reports


def _decompress_weights(package: Package, sink: Sink) -> list[WeightReport]:
    rewriter = Rewriter(package, sink)
    reports: list[WeightReport] = []
    for site in sites(package):
        decoder = Decoder(site.graph, package)
        compressed = {
            weight.node: weight
            for weight in weights(site.prefix, site.graph)
            if weight.is_compressed
        }
        parts = {node for node in site.graph.nodes if _is_part(node)}
        for node in site.graph.nodes:
            weight = compressed.get(node)
            if weight is None:
                if node not in parts:
                    rewriter.copy(node)
                continue
            before = weight_bytes(weight, package)
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
        site.graph.remove(parts)
        site.graph.apply()
    return reports


def _is_part(node: Node) -> bool:
    """Whether an op only serves to decode another one's weight."""
    return (
        node.is_stored
        and bool(node.uses)
        and not node.is_block_output
        and all(use.node.op.type.startswith("constexpr_") for use in node.uses)
    )


def _complete(package: Package, staged: Staged, *, verify: bool) -> tuple[Verification | None, int]:
    """Finish the staged package, verify it and move it to its destination."""
    staged.finish(package.model)
    verification = None
    if verify:
        verification = compare_packages(Package(package.path), Package(staged.path))
    size = n_package_bytes(staged.path)
    staged.commit()
    return verification, size


def _promise_of(treatment: Treatment) -> Promise:
    if isinstance(treatment, PalettizeConfig):
        return "nearest"
    return "half_step" if isinstance(treatment, QuantizeConfig) else "pruned"


def weight_bytes(weight: Weight, package: Package) -> int:
    """Return the size of what is stored for a weight."""
    stored = Decoder(weight.graph, package).stored_values(weight.node)
    return sum(values.n_stored_bytes(value) for value in stored)


def _weight_report(plan: Plan, before: int, after: int) -> WeightReport:
    return WeightReport(
        name=plan.weight.name,
        op_types=plan.weight.op_types,
        shape=plan.weight.shape,
        status=plan.status,
        treatment="" if plan.treatment is None else describe(plan.treatment),
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
