"""The functions of ``coremltools.optimize.coreml`` that compress the weights of a model."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from milpress.calibration.input_statistics import Calibration
from milpress.compression.advice import SampleSettings
from milpress.compression.packages import (
    OnUnsupported,
    compress_package,
    decompress_package,
)
from milpress.compression.report import Report, WeightReport
from milpress.compression.run import Run
from milpress.coreml._requests import ConfigRequests, joint_needs_ios18
from milpress.coreml.op_config import (
    OpLinearQuantizerConfig,
    OpMagnitudePrunerConfig,
    OpPalettizerConfig,
    OpThresholdPrunerConfig,
)
from milpress.coreml.optimization_config import adopted
from milpress.engines.mlmodel import opened, written
from milpress.errors import ConfigError
from milpress.kernels.device import DeviceName
from milpress.mil.package import Package
from milpress.progress import Progress
from milpress.samples.data import Data

_logger = logging.getLogger(__name__)
Destination = str | os.PathLike[str] | None


def palettize_weights(
    mlmodel: Any,
    config: Any,
    joint_compression: bool = False,
    *,
    destination: Destination = None,
    on_unsupported: OnUnsupported = "leave",
    progress: Progress | bool | None = None,
    seed: int = 0,
    threads: int | None = None,
    device: DeviceName = "cpu",
    sample_data: Data | Calibration | None = None,
    calibration_cache: str | os.PathLike[str] | None = None,
    calibration_mask: str | None = None,
    bias_correction: bool = False,
) -> Any:
    """Replace weights by indices into lookup tables.

    Parameters
    ----------
    mlmodel
        A coremltools ``MLModel``, or the path of an ``.mlpackage``. It is not changed.
    config
        An `OptimizationConfig` of `OpPalettizerConfig` entries, milpress' or coremltools' own.
    joint_compression
        Whether weights that are pruned or quantized already are palettized too.
    destination
        Where to write the package; ``None`` for a temporary one that lives with the result.
    on_unsupported
        What to do with a weight that does not suit its config: ``"leave"`` it, with a warning that
        names it, or raise an ``"error"``.
    progress
        ``True`` shows a bar; a function is called with bytes done, bytes in all and the name of the
        weight at hand.
    seed
        Of the k-means++ that starts the tables of vectors.
    threads
        Threads to use; ``None`` for MILPRESS_NUM_THREADS or the number of cores.
    device
        Where the kernels run: ``"cpu"``; ``"metal"`` for the GPU of a Mac, with the CPU's results;
        ``"auto"`` takes the CPU until a GPU has been measured to be faster. What the GPU could not
        do is in the report's notes.
    sample_data, calibration_cache, calibration_mask, bias_correction
        Beyond coremltools: as of `milpress.compress`. Samples are run by the interpreter.

    Returns
    -------
    MLModel
        The compressed model. Its ``compression_report`` says what happened to each weight.

    Raises
    ------
    ConfigError
        If the config is of another class, or in conflict with itself.
    UnsupportedError
        If the config takes an iOS18 model, or, with ``on_unsupported="error"``, a weight does not
        suit it.
    PackageError
        If the model is damaged, or not made of ML programs.
    """
    ours = adopted(config)
    ours.check_types(OpPalettizerConfig, function="palettize_weights")
    requests = ConfigRequests(ours, joint=joint_compression, seed=seed)
    samples = SampleSettings.of(
        sample_data, cache=calibration_cache, mask=calibration_mask, bias_correction=bias_correction
    )
    run = Run(progress=progress, threads=threads, device=device)
    return _compressed(mlmodel, requests, destination, on_unsupported, samples, run)


def linear_quantize_weights(
    mlmodel: Any,
    config: Any,
    joint_compression: bool = False,
    *,
    destination: Destination = None,
    on_unsupported: OnUnsupported = "leave",
    progress: Progress | bool | None = None,
    threads: int | None = None,
    device: DeviceName = "cpu",
    sample_data: Data | Calibration | None = None,
    calibration_cache: str | os.PathLike[str] | None = None,
    calibration_mask: str | None = None,
    bias_correction: bool = False,
) -> Any:
    """Replace weights by integer codes with scales.

    Parameters
    ----------
    mlmodel
        A coremltools ``MLModel``, or the path of an ``.mlpackage``. It is not changed.
    config
        An `OptimizationConfig` of `OpLinearQuantizerConfig` entries, milpress' or coremltools' own.
    joint_compression
        Whether weights that are pruned, and the tables of palettized ones, are quantized too.
    destination, on_unsupported, progress, threads, device
        As of `palettize_weights`.
    sample_data, calibration_cache, calibration_mask, bias_correction
        As of `palettize_weights`. Errors count by the samples where a config has ``range="mse"``.

    Returns
    -------
    MLModel
        The compressed model. Its ``compression_report`` says what happened to each weight.

    Raises
    ------
    CompressionError
        As `palettize_weights` does.
    """
    ours = adopted(config)
    ours.check_types(OpLinearQuantizerConfig, function="linear_quantize_weights")
    requests = ConfigRequests(ours, joint=joint_compression)
    samples = SampleSettings.of(
        sample_data, cache=calibration_cache, mask=calibration_mask, bias_correction=bias_correction
    )
    run = Run(progress=progress, threads=threads, device=device)
    return _compressed(mlmodel, requests, destination, on_unsupported, samples, run)


def prune_weights(
    mlmodel: Any,
    config: Any,
    joint_compression: bool = False,
    *,
    destination: Destination = None,
    on_unsupported: OnUnsupported = "leave",
    progress: Progress | bool | None = None,
    threads: int | None = None,
    device: DeviceName = "cpu",
) -> Any:
    """Set weights of small magnitude to zero and store the others.

    Parameters
    ----------
    mlmodel
        A coremltools ``MLModel``, or the path of an ``.mlpackage``. It is not changed.
    config
        An `OptimizationConfig` of `OpMagnitudePrunerConfig` and `OpThresholdPrunerConfig` entries,
        milpress' or coremltools' own.
    joint_compression
        Whether weights that are palettized or quantized already are pruned too.
    destination, on_unsupported, progress, threads, device
        As of `palettize_weights`.

    Returns
    -------
    MLModel
        The compressed model. Its ``compression_report`` says what happened to each weight.

    Raises
    ------
    CompressionError
        As `palettize_weights` does.
    """
    ours = adopted(config)
    ours.check_types(OpMagnitudePrunerConfig, OpThresholdPrunerConfig, function="prune_weights")
    requests = ConfigRequests(ours, joint=joint_compression)
    run = Run(progress=progress, threads=threads, device=device)
    return _compressed(mlmodel, requests, destination, on_unsupported, None, run)


def decompress_weights(
    mlmodel: Any,
    *,
    destination: Destination = None,
    progress: Progress | bool | None = None,
    threads: int | None = None,
) -> Any:
    """Store every compressed weight densely, as it is decoded.

    Parameters
    ----------
    mlmodel
        A coremltools ``MLModel``, or the path of an ``.mlpackage``. It is not changed.
    destination, progress, threads
        As of `palettize_weights`.

    Returns
    -------
    MLModel
        The decompressed model.

    Raises
    ------
    PackageError
        If the model is damaged, or not made of ML programs.
    """
    package = opened(mlmodel)
    run = Run(progress=progress, threads=threads)
    return _written(
        mlmodel, destination, lambda path: decompress_package(package, path, run, may_be_idle=True)
    )


def _compressed(
    mlmodel: Any,
    requests: ConfigRequests,
    destination: Destination,
    on_unsupported: OnUnsupported,
    samples: SampleSettings | None,
    run: Run,
) -> Any:
    if on_unsupported not in ("leave", "error"):
        msg = f"on_unsupported must be 'leave' or 'error', got {on_unsupported!r}"
        raise ConfigError(msg)
    package = opened(mlmodel)
    if requests.joint and any(not graph.opset.has_blocks for graph in package.graphs):
        raise joint_needs_ios18()
    _warn_of_typos(package, requests)
    strict = on_unsupported == "error"
    return _written(
        mlmodel,
        destination,
        lambda path: compress_package(
            package, path, requests, run, strict=strict, may_be_idle=True, samples=samples
        ),
    )


def _written(mlmodel: Any, destination: Destination, work: Callable[[Path], Report]) -> Any:
    """Let some work write a package, and return it as a model."""
    model, report = written(mlmodel, destination, work)
    for weight in report.with_status("left"):
        _logger.warning("%s", _sentence(weight))
    model.compression_report = report
    return model


def _sentence(weight: WeightReport) -> str:
    """Return why a weight was left, in coremltools' words where users may look for them."""
    if "vectors of" in weight.note:
        return f"The `cluster_dim` is invalid for {weight.name}: {weight.note}. Skipped this op."
    if "distinct values" in weight.note:
        known = "Unique values in weight cannot be represented by 8 bits palettization."
        return f"{weight.name}: {known} Skipped this op: {weight.note}."
    return f"{weight.name}: {weight.note}. Skipped this op."


def _warn_of_typos(package: Package, requests: ConfigRequests) -> None:
    names: set[str] = set()
    op_types: set[str] = set()
    for graph in package.graphs:
        names.update(node.op_name for node in graph.nodes)
        op_types.update(node.op.type for node in graph.nodes)
        names.update(weight.name for weight in graph.weights)
    for key in requests.config.unmatched(names, op_types):
        _logger.warning("the config names %r, which nothing in the model matches", key)
