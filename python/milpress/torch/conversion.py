"""Compressed modules as Core ML models, with the very codes and tables that were chosen."""

from __future__ import annotations

import functools
import hashlib
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from torch import nn

from milpress.compression.report import Report
from milpress.compression.run import Run
from milpress.compression.verification import compare_packages
from milpress.compression.writer import rewriting
from milpress.engines.mlmodel import opened, written
from milpress.errors import ConfigError, ConfigTypeError, UnsupportedError, VerificationError
from milpress.mil.package import Package, n_package_bytes
from milpress.progress import Progress, shown
from milpress.torch._converted_weights import (
    ConvertedWeight,
    compressed_weights,
    needs_ios18,
    replacement,
)
from milpress.torch._dense_model import dense_model
from milpress.torch._frontends.converting import Frontend
from milpress.torch._lifecycle import check_finalized

__all__ = ["convert"]


def convert(
    module: nn.Module,
    example_inputs: Any,
    destination: str | os.PathLike[str] | None = None,
    *,
    frontend: Frontend | None = None,
    dynamic_shapes: Any = None,
    progress: Progress | bool | None = None,
    **settings: Any,
) -> Any:
    """Convert a compressed module to a Core ML model.

    coremltools converts the module as if it were not compressed; then the constants that hold its
    weights are replaced by the codes, tables and scales that the module's buffers tell, in the
    types of the model. Batch normalization stays an op, because folding it into a weight would
    undo the compression: fold it before you compress.

    Parameters
    ----------
    module
        A module whose weights were compressed by milpress or coremltools; it is as before
        afterwards. Buffers that its ``forward`` writes to become states, for which
        `milpress.torch.decoders` has an example.
    example_inputs
        What its ``forward`` takes, a tuple of tensors. Those of types that Core ML has no inputs
        of, such as booleans, become 32-bit inputs; tensors inside of tuples and dictionaries
        inputs of their own; what is no tensor is fixed.
    destination
        Where the package is to be; ``None`` for a temporary one that goes with the model.
    frontend
        ``"export"`` goes by ``torch.export``, ``"trace"`` by ``torch.jit.trace``. ``None`` takes
        the former, and the latter where that fails and a trace can stand for the module, which
        the notes of the report say. Recurrent layers go by the latter first.
    dynamic_shapes
        As ``torch.export.export`` takes it.
    progress
        Once coremltools is done, which shows bars of its own: ``True`` shows a bar; a function is
        called with weights done, weights in all and the name of the weight at hand.
    **settings
        Further arguments of ``coremltools.convert``. The default target is iOS18; it must be an ML
        program.

    Returns
    -------
    MLModel
        The model. Its ``compression_report`` says what became of each compressed weight.

    Raises
    ------
    ConfigError
        If an argument is wrong by itself, or the module can't be called with the inputs.
    LifecycleError
        If the module is prepared for training, and not finalized.
    UnsupportedError
        If no weight is compressed, or one was changed since, or needs a later target; if no
        frontend converts the module: the operation, its place in the module, and what to try.
    VerificationError
        If the package does not hold just what it should.
    """
    started = time.perf_counter()
    if frontend not in (None, "export", "trace"):
        msg = f"frontend must be 'export' or 'trace', got {frontend!r}"
        raise ConfigError(msg)
    if settings.get("convert_to", "mlprogram") != "mlprogram":
        msg = f"convert_to must be 'mlprogram', got {settings['convert_to']!r}"
        raise ConfigError(msg)
    load = not settings.get("skip_model_load", False)
    if not isinstance(example_inputs, tuple):
        msg = f"example_inputs must be a tuple, got {type(example_inputs).__name__}"
        raise ConfigTypeError(msg)
    check_finalized(module)
    compressed = compressed_weights(module)
    if not compressed:
        msg = "no weight of the module is compressed"
        raise UnsupportedError(msg)
    if "minimum_deployment_target" in settings:
        _check_target(settings["minimum_deployment_target"], compressed)
    dense, notes = dense_model(module, example_inputs, frontend, dynamic_shapes, settings)
    with shown(progress) as note:
        write = functools.partial(_write, opened(dense), compressed, note)
        model, report = written(dense, destination, write, load=load)
    model.compression_report = replace(report, notes=notes, seconds=time.perf_counter() - started)
    return model


def _check_target(target: Any, compressed: list[ConvertedWeight]) -> None:
    """Raise `ConfigError` if a model of a target can't hold some weight."""
    import coremltools as ct

    if target >= ct.target.iOS18:
        return
    for item in compressed:
        reason = needs_ios18(item.stored.folded())
        if reason:
            msg = (
                f"{item.weight.name}: {reason} must be stored in an iOS18 model; raise "
                "minimum_deployment_target"
            )
            raise ConfigError(msg)


def _write(
    package: Package, compressed: list[ConvertedWeight], note: Progress, destination: Path
) -> Report:
    """Write a dense package with compressed weights in the place of their constants."""
    expected: dict[str, bytes] = {}

    def check(source: Package, result: Package) -> None:
        compare_packages(source, result)
        _check(result, expected)

    n_done, total = 0, sum(len(graph.weights) for graph in package.graphs)
    with rewriting(package, destination, Run()) as writer:
        for graph in package.graphs:
            constants = {constant.node: constant for constant in graph.weights}
            for node in graph.nodes:
                constant = constants.get(node)
                if constant is not None:
                    note(n_done, total, constant.name)
                    n_done += 1
                value = None if constant is None else replacement(constant, compressed)
                if constant is None or value is None:
                    writer.copy(node)
                    continue
                expected[constant.name] = _digest(value.dense())
                writer.store(constant, value)
            graph.apply()
        note(total, total, "")
        _, size = writer.commit(check)
    return Report(
        source=str(package.path),
        destination=str(destination),
        weights=tuple(item.report for item in compressed),
        package_bytes_before=n_package_bytes(package.path),
        package_bytes_after=size,
        verified=True,
        signal=sum(item.signal for item in compressed),
        noise=sum(item.noise for item in compressed),
    )


def _digest(array: NDArray[Any]) -> bytes:
    return hashlib.sha256(array.tobytes()).digest()


def _check(package: Package, expected: dict[str, bytes]) -> None:
    """Decode every compressed weight of a package and compare it with what was meant."""
    missing = dict(expected)
    for weight in package.weights:
        digest = missing.pop(weight.name, None)
        if digest is not None and _digest(weight.dense()) != digest:
            msg = f"{weight.name}: the stored weight decodes to another value than the module's"
            raise VerificationError(msg)
    if missing:
        msg = f"missing in the package: {', '.join(sorted(missing))}"
        raise VerificationError(msg)
