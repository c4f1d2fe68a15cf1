"""Compressed modules as Core ML models, with the very codes and tables that were chosen."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import milpress._core as _core
from milpress.compression.report import Report, WeightReport
from milpress.compression.run import Run
from milpress.compression.verification import compare_packages
from milpress.compression.writer import rewriting
from milpress.engines.mlmodel import opened, returned, temporary_package
from milpress.errors import ConfigError, ConfigTypeError, UnsupportedError, VerificationError
from milpress.formats import Compressed, Masked, Palette, Quantized
from milpress.formats.palette import fold
from milpress.mil.encode import payload_bytes
from milpress.mil.package import Package, n_package_bytes
from milpress.mil.program import Weight as Constant
from milpress.show import decibels
from milpress.torch import _metadata, _relayout
from milpress.torch._metadata import Stored
from milpress.torch._module_weights import RECURRENT, ModuleWeight, whole

__all__ = ["convert"]

Frontend = Literal["export", "trace"]

# Rounding tables and scales to float16 leaves an error of some 2^-22 of the power, and more where
# scales are below its normal numbers.
_MAX_NOISE = 2.0**-14

_UNFOUND = "no constant of the converted model holds it"

# These would fold another op into a weight, which then is not what was compressed.
_FOLDING_PASSES = {"common::fuse_conv_batchnorm", "common::fuse_conv_scale"}


def convert(
    module: nn.Module,
    example_inputs: Any,
    destination: str | os.PathLike[str] | None = None,
    *,
    frontend: Frontend | None = None,
    dynamic_shapes: Any = None,
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
        afterwards.
    example_inputs
        What its ``forward`` takes.
    destination
        Where the package is to be; ``None`` for a temporary one that goes with the model.
    frontend
        ``"export"`` goes by ``torch.export``, ``"trace"`` by ``torch.jit.trace``; ``None`` takes
        the former, or the latter for recurrent layers, which coremltools can't convert otherwise.
    dynamic_shapes
        As ``torch.export.export`` takes it.
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
        If an argument is wrong by itself.
    UnsupportedError
        If no weight is compressed, or one was changed since, or needs a later target.
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
    compressed = [_Compressed.read(weight) for weight in _compressed_weights(module)]
    if not compressed:
        msg = "no weight of the module is compressed"
        raise UnsupportedError(msg)
    dense = _dense_model(module, compressed, example_inputs, frontend, dynamic_shapes, settings)
    package = opened(dense)
    if destination is not None:
        report = _write(package, Path(destination), compressed, started)
        model = returned(Path(destination), dense, temporary=False, load=load)
    else:
        with temporary_package() as path:
            report = _write(package, path, compressed, started)
            model = returned(path, dense, temporary=True, load=load)
    model.compression_report = report
    return model


@dataclass(slots=True)
class _Compressed:
    """A compressed weight of a module, and what became of it in the model."""

    weight: ModuleWeight
    stored: Stored
    report: WeightReport
    signal: float = 0.0
    noise: float = 0.0

    @classmethod
    def read(cls, weight: ModuleWeight) -> _Compressed:
        try:
            stored = _metadata.read(weight)
        except UnsupportedError as error:
            msg = f"{weight.name}: {error}"
            raise UnsupportedError(msg) from error
        tensor = weight.tensor
        shape = () if tensor is None else tuple(tensor.shape)
        report = WeightReport(
            name=weight.name,
            op_types=(type(weight.module).__name__,),
            shape=shape,
            status="left",
            treatment="",
            note=_UNFOUND,
            bytes_before=4 * math.prod(shape),
            bytes_after=4 * math.prod(shape),
        )
        return cls(weight, stored, report)

    def add(
        self,
        n_before: int,
        n_after: int,
        *,
        words: str = "",
        powers: tuple[float, float] = (0, 0),
        note: str = "",
    ) -> None:
        """Note what became of a constant that holds the weight, or a part of it."""
        self.signal += powers[0]
        self.noise += powers[1]
        known = self.report
        is_first = known.note == _UNFOUND
        notes = [text for text in (known.note, note) if text and text != _UNFOUND]
        self.report = replace(
            known,
            status="compressed" if words or known.status == "compressed" else "left",
            treatment=words or known.treatment,
            note="; ".join(dict.fromkeys(notes)),
            bytes_before=n_before + (0 if is_first else known.bytes_before),
            bytes_after=n_after + (0 if is_first else known.bytes_after),
            snr_db=decibels(self.signal, self.noise) if self.signal else None,
        )

    def array(self) -> NDArray[Any]:
        """Return the weight."""
        tensor = self.weight.tensor
        assert tensor is not None  # noqa: S101 - it was read
        return whole(tensor).float().numpy()


def _compressed_weights(module: nn.Module) -> Iterator[ModuleWeight]:
    seen: set[int] = set()
    for name, part in module.named_modules():
        for parameter in _metadata.compressed_parameters(part):
            weight = ModuleWeight(name, part, parameter)
            if id(weight.tensor) not in seen:
                seen.add(id(weight.tensor))
                yield weight


def _dense_model(
    module: nn.Module,
    compressed: list[_Compressed],
    example_inputs: tuple[Any, ...],
    frontend: Frontend | None,
    dynamic_shapes: Any,
    settings: dict[str, Any],
) -> Any:
    """Convert a module without what its buffers say of compression."""
    import coremltools as ct

    settings = {
        "minimum_deployment_target": ct.target.iOS18,
        **settings,
        "convert_to": "mlprogram",
        "skip_model_load": True,  # it is the compressed model that is wanted
    }
    if settings["minimum_deployment_target"] < ct.target.iOS18:
        _check_early(compressed)
    if "pass_pipeline" not in settings:
        pipeline = ct.PassPipeline.DEFAULT
        pipeline.remove_passes(_FOLDING_PASSES)
        settings["pass_pipeline"] = pipeline
    if any(p.is_floating_point() and p.dtype != torch.float32 for p in module.parameters()):
        # Every smaller type is exact in float32, which is what coremltools converts best.
        module = copy.deepcopy(module).float()
        example_inputs = tuple(_widened(item) for item in example_inputs)
    if frontend is None:
        recurrent = any(isinstance(part, RECURRENT) for part in module.modules())
        frontend = "trace" if recurrent else "export"
    with _plain(module):
        if frontend == "export":
            exported = torch.export.export(module, example_inputs, dynamic_shapes=dynamic_shapes)
            return ct.convert(exported.run_decompositions({}), **settings)
        traced = torch.jit.trace(module, example_inputs)  # type: ignore[no-untyped-call]
        if "inputs" not in settings:
            settings["inputs"] = [_tensor_type(ct, item) for item in example_inputs]
        return ct.convert(traced, **settings)


def _widened(item: Any) -> Any:
    is_float = isinstance(item, torch.Tensor) and item.is_floating_point()
    return item.float() if is_float else item


def _tensor_type(ct: Any, item: Any) -> Any:
    if not isinstance(item, torch.Tensor):
        msg = f"example_inputs must be tensors to be traced, got {type(item).__name__}"
        raise ConfigTypeError(msg)
    kind = np.float32 if item.is_floating_point() else np.int32
    return ct.TensorType(shape=tuple(item.shape), dtype=kind)


@contextlib.contextmanager
def _plain(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode, and take away what its buffers say of compression."""
    before = [(part, part.training, dict(part._buffers)) for part in module.modules()]
    fast_attention = torch.backends.mha.get_fastpath_enabled()
    # An op of its own for inference, which coremltools does not know.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        module.eval()
        for part, _, buffers in before:
            for name in buffers:
                if name.startswith((f"{_metadata.PREFIX}/", f"{_metadata.OWN_PREFIX}/")):
                    del part._buffers[name]
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_attention)
        for part, mode, buffers in before:
            part.training = mode
            part._buffers.clear()
            part._buffers.update(buffers)


def _write(
    package: Package, destination: Path, compressed: list[_Compressed], started: float
) -> Report:
    """Write a dense package with compressed weights in the place of their constants."""
    expected: dict[str, bytes] = {}
    with rewriting(package, destination, Run()) as writer:
        for graph in package.graphs:
            early = not graph.opset.has_blocks
            constants = {w.node: w for w in graph.weights}
            for node in graph.nodes:
                constant = constants.get(node)
                found = None if constant is None else _match(constant, compressed)
                if constant is None or found is None:
                    writer.copy(node)
                    continue
                match, rearranged, array = found
                n_before = constant.n_bytes
                try:
                    value, powers = _storable(rearranged(_folded(match)), array, early=early)
                except UnsupportedError as error:
                    match.add(n_before, n_before, note=str(error))
                    writer.copy(node)
                    continue
                expected[constant.name] = _digest(value.dense())
                n_after = payload_bytes(value, early=early)
                match.add(n_before, n_after, words=_words(value), powers=powers)
                writer.store(constant, value)
            graph.apply()

        def check(source: Package, written: Package) -> None:
            compare_packages(source, written)
            _check(written, expected)

        _, size = writer.commit(check)
    return Report(
        source=str(package.path),
        destination=str(destination),
        weights=tuple(item.report for item in compressed),
        package_bytes_before=n_package_bytes(package.path),
        package_bytes_after=size,
        verified=True,
        seconds=time.perf_counter() - started,
        signal=sum(item.signal for item in compressed),
        noise=sum(item.noise for item in compressed),
    )


def _match(
    constant: Constant, compressed: list[_Compressed]
) -> tuple[_Compressed, Callable[[Compressed], Compressed], NDArray[Any]] | None:
    """Return the weight that a constant holds, how it must be rearranged, and the constant."""
    if constant.is_compressed or not constant.dtype.is_float:
        return None
    array: NDArray[Any] | None = None
    for item in compressed:
        recurrent = isinstance(item.weight.module, RECURRENT)
        if sorted(item.report.shape) != sorted(constant.shape) and not (
            recurrent and item.report.shape[1:] == constant.shape[1:]
        ):
            continue
        if array is None:
            array = constant.dense()
        with np.errstate(over="ignore"):
            own = item.array().astype(array.dtype)
        if np.array_equal(own, array):
            return item, _as_it_is, array
        if own.ndim == 2 and np.array_equal(own.T, array):
            return item, _relayout.transposed, array
        rows = _rows_of(array, own) if recurrent else None
        if rows is not None:
            return item, functools.partial(_relayout.taken, rows=rows), array
    return None


def _as_it_is(value: Compressed) -> Compressed:
    return value


def _rows_of(array: NDArray[Any], own: NDArray[Any]) -> NDArray[np.intp] | None:
    """Return which of its own rows each row is, ``None`` if one of them is another.

    Core ML has the gates of a recurrent layer in another order than torch, or in parts.
    """
    places: dict[bytes, list[int]] = {}
    for i, row in enumerate(own):
        places.setdefault(row.tobytes(), []).append(i)
    rows = []
    for row in array:
        known = places.get(row.tobytes())
        if not known:
            return None
        rows.append(known.pop(0))
    return np.array(rows, np.intp)


def _folded(item: _Compressed) -> Compressed:
    """Return the value with its channel scales in its tables, as milpress stores them."""
    stored = item.stored
    if stored.scale is None:
        return stored.value
    output = next((i for i, n in enumerate(stored.scale.shape) if n > 1), 0)
    if isinstance(stored.value, Masked):
        return replace(
            stored.value, value=_folded_palette(stored.value.value, stored.scale, output)
        )
    return _folded_palette(stored.value, stored.scale, output)


def _folded_palette(value: Any, scale: NDArray[Any], output: int) -> Palette:
    if not isinstance(value, Palette):
        msg = f"channel scales belong to a palette, got {type(value).__name__}"
        raise UnsupportedError(msg)
    return fold(value, scale, output)


def _storable(
    value: Compressed, array: NDArray[Any], *, early: bool
) -> tuple[Compressed, tuple[float, float]]:
    """Return the value in the constant's type, and the sums of squares of weight and error.

    Raises
    ------
    UnsupportedError
        If it is beyond that type, above or below, or would be larger than the constant.
    """
    made = _relayout.cast(value, array.dtype)
    n_bytes = payload_bytes(made, early=early)
    if n_bytes >= array.nbytes:
        msg = (
            f"left as it is: compressed it would be larger ({n_bytes:,} bytes instead of "
            f"{array.nbytes:,})"
        )
        raise UnsupportedError(msg)
    signal, noise, _ = _core.compare(_flat(array), _flat(made.dense()))
    if noise > signal * _MAX_NOISE:
        msg = f"its scales are too small for {array.dtype}, and would be rounded off"
        raise UnsupportedError(msg)
    return made, (signal, noise)


def _check_early(compressed: list[_Compressed]) -> None:
    for item in compressed:
        reason = _needs_ios18(_folded(item))
        if reason:
            msg = (
                f"{item.weight.name}: {reason} must be stored in an iOS18 model; raise "
                "minimum_deployment_target"
            )
            raise ConfigError(msg)


def _needs_ios18(value: Compressed) -> str:
    if isinstance(value, Masked):
        return "joint compression"
    if isinstance(value, Palette):
        if value.entries.size > 2**value.bits:
            return "groups of channels or vectors"
        return "a table of integers" if isinstance(value.lut, Quantized) else ""
    if isinstance(value, Quantized):
        if value.bits == 4:
            return "4 bits"
        return (
            "blocks"
            if sum(n > 1 for n in value.scale.shape) > 1
            or any(1 < n < size for n, size in zip(value.scale.shape, value.shape, strict=True))
            else ""
        )
    return ""


def _words(value: Compressed) -> str:
    if isinstance(value, Masked):
        return f"pruned, {_words(value.value)}"
    if isinstance(value, Palette):
        n_tables = math.prod(value.lut.shape[:-2])
        vectors = f", vectors of {value.vector_size}" if value.vector_size > 1 else ""
        integers = f", {value.lut.dtype} entries" if isinstance(value.lut, Quantized) else ""
        plural = "s" * (n_tables > 1)
        return f"{value.bits} bits, {n_tables} table{plural}{vectors}{integers}"
    if isinstance(value, Quantized):
        return f"{value.dtype}, {value.scale.size} scale{'s' * (value.scale.size > 1)}"
    return "pruned"


def _flat(array: NDArray[Any]) -> NDArray[Any]:
    return np.ascontiguousarray(array).reshape(-1)


def _digest(array: NDArray[Any]) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(array).data).digest()


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
