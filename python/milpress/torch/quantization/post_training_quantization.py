"""Quantization without data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, cast

import torch
from attrs import define, field

from milpress.errors import ConfigError, ConfigTypeError, UnsupportedError
from milpress.formats import Blocks, PerChannel, PerTensor, QuantizeConfig, quantize
from milpress.formats.joint import masked
from milpress.formats.quantized import Granularity, IntDType
from milpress.formats.rows import Floats, divisor_of
from milpress.plain import fields
from milpress.progress import Progress
from milpress.torch import _fields, _metadata
from milpress.torch._compression import WeightOutcome, compress_weights, each_matrix
from milpress.torch._metadata import Stored
from milpress.torch._module_weights import ModuleWeight, attention_around
from milpress.torch._report import Report
from milpress.torch.base_model_optimizer import BasePostTrainingModelOptimizer
from milpress.torch.checkpoints import compress_checkpoint
from milpress.torch.optimization_config import (
    ModuleOptimizationConfig,
    OptimizationConfig,
    QuantizationGranularity,
)
from milpress.torch.quantization.quantization_config import QuantizationScheme
from milpress.torch.registration import KINDS

__all__ = [
    "ModulePostTrainingQuantizerConfig",
    "PostTrainingQuantizer",
    "PostTrainingQuantizerConfig",
]

_DTYPES: dict[str, tuple[torch.dtype, int]] = {
    "int8": (torch.int8, 8),
    "uint8": (torch.uint8, 8),
    "int4": (torch.int8, 4),
    "uint4": (torch.uint8, 4),
    "float32": (torch.float32, 32),
}


def _to_block_size(value: Any) -> Any:
    sizes = fields.wholes(value)
    return (sizes,) if type(sizes) is int else sizes


@define
class ModulePostTrainingQuantizerConfig(ModuleOptimizationConfig):
    """How `PostTrainingQuantizer` quantizes the weights of a module.

    Parameters
    ----------
    weight_dtype
        Type of the codes: ``"int8"``, ``"uint8"``, ``"int4"``, ``"uint4"`` or torch's types of 8
        bits; ``"float32"`` leaves the weights. Stored as torch's type, with the width in
        ``weight_n_bits``.
    granularity
        What shares a scale: ``"per_tensor"``, ``"per_channel"``, which is an output channel, or
        ``"per_block"``.
    quantization_scheme
        ``"symmetric"`` takes the range that is symmetric about zero, ``"affine"`` that from the
        least weight to the greatest, with an offset. All modules must have the same.
    block_size
        Goes with ``"per_block"`` alone, which needs it. One integer: that many input channels of an
        output channel share a scale. A tuple: the sizes along output and input channels; 0 takes
        the whole axis, but one output channel where the inputs are cut. Further numbers must be 0
        or whole axes.
    weight_n_bits
        Width of a code, 4 or 8; ``None`` takes it from ``weight_dtype``.
    range
        How the range is found: ``"minmax"`` takes that of the weights, ``"mse"`` the one with the
        least squared error, which may clip some, and whose symmetric scale may be negative. Not in
        coremltools, which takes the former.
    on_indivisible
        What to do with a weight whose channels ``block_size`` does not divide: ``"leave"`` it, or
        take the greatest ``"divisor"`` of the channels up to the size, or all of them where there
        is none. Not in coremltools, which leaves it.

    Raises
    ------
    ConfigError
        If a setting is not what it must be, or does not go with another.

    Examples
    --------
    >>> config = ModulePostTrainingQuantizerConfig(
    ...     weight_dtype="int4", granularity="per_block", block_size=32
    ... )
    >>> config.weight_dtype, config.weight_n_bits, config.block_size
    (torch.int8, 4, (32,))
    """

    weight_dtype: Any = _fields.weight_dtype("int8", _DTYPES)
    granularity: QuantizationGranularity = _fields.enumerated(QuantizationGranularity.per_channel)
    quantization_scheme: QuantizationScheme = _fields.enumerated(QuantizationScheme.symmetric)
    block_size: tuple[int, ...] | None = field(default=None, converter=_to_block_size)
    weight_n_bits: int | None = _fields.weight_n_bits()
    range: Literal["minmax", "mse"] = fields.choice("minmax", "mse")
    on_indivisible: Literal["leave", "divisor"] = fields.choice("leave", "divisor")

    def __attrs_post_init__(self) -> None:
        _fields.resolve_width(self, 4)

    @block_size.validator
    def _check_block_size(self, _attribute: Any, block_size: Any) -> None:
        blocked = self.granularity is QuantizationGranularity.per_block
        if blocked and block_size is None:
            msg = "block_size has to be specified along with per_block granularity."
            raise ConfigError(msg)
        if block_size is None:
            return
        if not blocked:
            msg = (
                "block_size can't be specified along with per_tensor or per_channel granularity, "
                f"got {block_size!r}"
            )
            raise ConfigError(msg)
        if not (isinstance(block_size, tuple) and all(type(size) is int for size in block_size)):
            msg = f"block_size must be an integer or a tuple of integers, got {block_size!r}"
            raise ConfigTypeError(msg)
        if not block_size or min(block_size) < 0:
            msg = f"block_size must hold no negative numbers, and at least one, got {block_size}"
            raise ConfigError(msg)

    @property
    def dtype(self) -> IntDType | None:
        """Name of the codes' type; ``None`` where the weights are left."""
        codes = (self.weight_dtype, self.weight_n_bits)
        name = next(name for name, known in _DTYPES.items() if known == codes)
        return None if name == "float32" else cast("IntDType", name)


@define
class PostTrainingQuantizerConfig(OptimizationConfig):
    """Which module `PostTrainingQuantizer` quantizes how; see `OptimizationConfig`.

    Examples
    --------
    >>> config = PostTrainingQuantizerConfig.from_dict(
    ...     {"global_config": {"weight_dtype": "int4"}, "module_name_configs": {"head": None}}
    ... )
    >>> config.get_module_config("head", torch.nn.Linear(4, 4)) is None
    True
    """

    module_config_class = ModulePostTrainingQuantizerConfig

    def _check_together(self) -> None:
        self._check_same("quantization_scheme")


class PostTrainingQuantizer(BasePostTrainingModelOptimizer):
    """Quantizes the weights of a model.

    Parameters
    ----------
    model, config
        The model, and what to do to which module; by default int8 with a scale for each output
        channel.

    Examples
    --------
    >>> quantizer = PostTrainingQuantizer(torch.nn.Linear(16, 8))
    >>> _ = quantizer.compress()
    >>> list(quantizer.report())
    ['weight']
    """

    _supported_modules = KINDS
    _config_class = PostTrainingQuantizerConfig

    def compress(  # type: ignore[override]
        self, inplace: bool = False, *, progress: Progress | bool | None = None
    ) -> torch.nn.Module:
        """Quantize the weights.

        Parameters
        ----------
        inplace, progress
            As of `PostTrainingPalettizer.compress`.

        Returns
        -------
        torch.nn.Module
            The model, or a copy of it, with its weights replaced by what their codes stand for; the
            scales are in buffers of the modules.
        """
        model = self._begin(inplace)
        self._report = compress_weights(
            model, self._tasks(model), each_matrix(_quantized), progress
        )
        return model

    def compress_checkpoint(
        self,
        source: str | os.PathLike[str],
        destination: str | os.PathLike[str],
        *,
        force: bool = False,
        progress: Progress | bool | None = None,
    ) -> Report:
        """Quantize the weights of a checkpoint into another one, a weight at a time.

        Parameters
        ----------
        source, destination, force, progress
            As of `PostTrainingPalettizer.compress_checkpoint`.

        Returns
        -------
        Report
            What happened to each weight, as of `report`.

        Raises
        ------
        CompressionError
            As `PostTrainingPalettizer.compress_checkpoint` does.
        """
        self._warn_of_typos()
        self._report = compress_checkpoint(
            self._source,
            self._tasks(self._source),
            each_matrix(_quantized),
            Path(source),
            Path(destination),
            force=force,
            progress=progress,
        )
        return self._report

    def _config_for(self, weight: ModuleWeight, model: torch.nn.Module) -> Any:
        name, module = weight.module_name, weight.module
        attention = attention_around(model, name)
        if attention is not None and not self._config.is_named(name):
            # Like coremltools: attention as a whole has one config.
            name, module = attention
        config = self._config.get_module_config(name, module)
        return None if config is None or config.dtype is None else config


def _quantized(
    weight: ModuleWeight, array: Floats, config: ModulePostTrainingQuantizerConfig
) -> WeightOutcome:
    output, inputs = weight.axes
    granularity, notes = _granularity(array.shape, output, inputs, config)
    treatment = QuantizeConfig(
        dtype=config.dtype or "int8",
        granularity=granularity,
        offset=config.quantization_scheme is QuantizationScheme.affine,
        range=config.range,
    )
    value = quantize(array, treatment, channel_axis=output, input_axis=inputs)
    stored = Stored(masked(value, array != 0) if _metadata.is_pruned(weight) else value)
    return WeightOutcome(stored, treatment, tuple(notes))


def _granularity(
    shape: tuple[int, ...], output: int, inputs: int, config: ModulePostTrainingQuantizerConfig
) -> tuple[Granularity, list[str]]:
    """Return what shares a scale, and how that differs from the config."""
    if config.granularity is QuantizationGranularity.per_tensor:
        return PerTensor(), []
    if config.granularity is QuantizationGranularity.per_channel or config.block_size is None:
        return PerChannel(), []
    sizes = config.block_size
    if len(sizes) > len(shape):
        msg = f"block_size must have at most {len(shape)} numbers, got {sizes}"
        raise UnsupportedError(msg)
    if any(size not in (0, n) for size, n in zip(sizes[2:], shape[2:], strict=False)):
        msg = f"blocks must cut output or input channels alone, got {sizes}"
        raise UnsupportedError(msg)
    along_output, along_inputs = (1, sizes[0]) if len(sizes) == 1 else sizes[:2]
    if 0 < along_inputs < shape[inputs] and not 0 < along_output < shape[output]:
        along_output = 1
    notes = []
    blocks = [0] * len(shape)
    for axis, asked in ((output, along_output), (inputs, along_inputs)):
        if asked:
            size, note = divisor_of("block", asked, shape, axis, output, config.on_indivisible)
            if size is None:
                raise UnsupportedError(note)
            blocks[axis] = size
            notes.extend([note] if note else [])
    if all(size in (0, n) for size, n in zip(blocks, shape, strict=True)):
        if notes:
            return PerTensor(), notes
        msg = (
            f"blocks must cut some axis, got {sizes} for {list(shape)}; "
            "per_tensor and per_channel cut none"
        )
        raise UnsupportedError(msg)
    return Blocks(tuple(blocks)), notes
