"""Configs of the algorithms that compress a layer with samples of its inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from attrs import define, field

from milpress.errors import ConfigError
from milpress.plain import fields
from milpress.torch import _fields
from milpress.torch._palettes import ModulePaletteConfig
from milpress.torch.layerwise_compression._registry import Registered
from milpress.torch.optimization_config import ModuleOptimizationConfig, QuantizationGranularity
from milpress.torch.quantization.quantization_config import QuantizationScheme

if TYPE_CHECKING:
    from typing_extensions import Self

# Dettmers et al. 2023, "QLoRA", arXiv 2305.14314; that of 3 bits is bitsandbytes'.
NORMAL_FLOATS = {
    4: (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
    3: (-1.0, -0.4786292, -0.21714179, 0.0, 0.1609302, 0.33791524, 0.562617, 1.0),
}

_INTEGERS = {
    "uint8": (torch.uint8, 8),
    "uint4": (torch.uint8, 4),
    "uint3": (torch.uint8, 3),
    "int8": (torch.int8, 8),
    "int4": (torch.int8, 4),
    "int3": (torch.int8, 3),
}


def _dampening() -> Any:
    return _fields.number(
        0.01,
        fields.check(
            lambda value: 0 <= value < float("inf"),
            "{name} must be finite and not negative, got {value}",
        ),
    )


def _named(name: str) -> Any:
    return field(default=name, validator=fields.one_of((name,), "{name} must be {allowed}"))


class LayerwiseCompressionAlgorithmConfig(Registered, ModuleOptimizationConfig):
    """How a layer is compressed: the base of the configs of each algorithm."""

    __slots__ = ()

    @classmethod
    def _from_dict(cls, config_dict: Mapping[str, Any], place: str) -> Self:
        if cls is not LayerwiseCompressionAlgorithmConfig:
            return super()._from_dict(config_dict, place)
        fields.check_mapping(config_dict, place)
        if "algorithm" not in config_dict:
            msg = f"{place} must name an algorithm, got {dict(config_dict)}"
            raise ConfigError(msg)
        config: Self = cls.get_class(config_dict["algorithm"])._from_dict(config_dict, place)
        return config


def _resolve(config: Any, granularity: QuantizationGranularity) -> None:
    """Set type and width of the codes of a new config, and check what must go with them."""
    _fields.resolve_width(config, 3, 4)
    if config.enable_normal_float and config.weight_n_bits not in NORMAL_FLOATS:
        msg = (
            "enable_normal_float must go with a weight_dtype of 3 or 4 bits, "
            f"got {config.weight_n_bits}"
        )
        raise ConfigError(msg)
    if config.block_size is None:
        return
    if granularity is QuantizationGranularity.per_tensor:
        msg = f"block_size can't be specified along with per_tensor, got {config.block_size}"
        raise ConfigError(msg)
    if config.enable_normal_float or config.weight_n_bits == 3:
        msg = (
            "block_size must be None with normal floats and codes of 3 bits, which are stored "
            f"as tables with scales of output channels, got {config.block_size}"
        )
        raise ConfigError(msg)


@LayerwiseCompressionAlgorithmConfig.register("gptq")
@define
class ModuleGPTQConfig(LayerwiseCompressionAlgorithmConfig):
    """How `GPTQ` quantizes a layer.

    Parameters
    ----------
    weight_dtype
        Type of the codes: ``"uint8"``, ``"uint4"``, ``"uint3"``, ``"int8"``, ``"int4"`` or
        ``"int3"``; ``"float32"`` leaves the layer. Stored as torch's type, with the width in
        ``weight_n_bits``. Codes of 3 bits are stored as palettes.
    granularity
        What shares a scale: ``"per_tensor"``, ``"per_channel"``, which is an output channel, or
        ``"per_block"``, which says ``block_size``.
    quantization_scheme
        ``"symmetric"`` takes a range about zero, ``"affine"`` that from the least weight to the
        greatest, with an offset.
    block_size
        Input channels of an output channel that share a scale; ``None`` for all.
    enable_normal_float
        Whether to round to the quantiles of a normal distribution, times the greatest magnitude of
        each output channel; with 3 or 4 bits. They are stored as palettes.
    hessian_dampening
        What is added to the diagonal of the inputs' second moments, relative to its mean.
    use_activation_order_heuristic
        Whether columns are rounded in the order of their inputs' power, the greatest first.
    processing_group_size
        Columns that are rounded before those beyond them are updated; of no great influence.
    algorithm
        ``"gptq"``.
    weight_n_bits
        Width of a code; ``None`` takes it from ``weight_dtype``.
    range
        As of `ModulePostTrainingQuantizerConfig`. Not in coremltools, which takes ``"minmax"``.
    on_indivisible
        As of `ModulePostTrainingQuantizerConfig`. Not in coremltools, which leaves such a layer.

    Raises
    ------
    ConfigError
        If a setting is not what it must be, or does not go with another.

    Examples
    --------
    >>> config = ModuleGPTQConfig(weight_dtype="int4", granularity="per_block", block_size=32)
    >>> config.weight_dtype, config.weight_n_bits
    (torch.int8, 4)
    """

    weight_dtype: Any = _fields.weight_dtype("uint8", {**_INTEGERS, "float32": (torch.float32, 32)})
    granularity: QuantizationGranularity = _fields.enumerated(QuantizationGranularity.per_channel)
    quantization_scheme: QuantizationScheme = _fields.enumerated(QuantizationScheme.symmetric)
    block_size: int | None = fields.integer(None, fields.at_least(1))
    enable_normal_float: bool = _fields.flag()
    hessian_dampening: float = _dampening()
    use_activation_order_heuristic: bool = _fields.flag()
    processing_group_size: int = fields.integer(128, fields.at_least(1))
    algorithm: str = _named("gptq")
    weight_n_bits: int | None = _fields.weight_n_bits()
    range: Literal["minmax", "mse"] = fields.choice("minmax", "mse")
    on_indivisible: Literal["leave", "divisor"] = fields.choice("leave", "divisor")

    def __attrs_post_init__(self) -> None:
        _resolve(self, self.granularity)


@LayerwiseCompressionAlgorithmConfig.register("sparse_gpt")
@define
class ModuleSparseGPTConfig(LayerwiseCompressionAlgorithmConfig):
    """How `SparseGPT` prunes a layer, and quantizes what is left.

    Parameters
    ----------
    target_sparsity
        Part of the weights that becomes zero.
    n_m_ratio
        ``(n, m)``: of each ``m`` consecutive inputs of an output channel, ``n`` become zero, in
        place of ``target_sparsity``.
    weight_dtype
        As of `ModuleGPTQConfig`; ``"float16"`` and ``"float32"`` quantize nothing.
    quantization_granularity, quantization_scheme, block_size, enable_normal_float
        As of `ModuleGPTQConfig`. coremltools has no ``block_size`` here.
    hessian_dampening, processing_group_size
        As of `ModuleGPTQConfig`.
    algorithm
        ``"sparse_gpt"``.
    weight_n_bits, range, on_indivisible
        As of `ModuleGPTQConfig`.

    Raises
    ------
    ConfigError
        If a setting is not what it must be, or does not go with another.
    """

    target_sparsity: float = _fields.number(0.5, fields.is_fraction)
    n_m_ratio: tuple[int, int] | None = _fields.ratio()
    weight_dtype: Any = _fields.weight_dtype(
        "uint8", {**_INTEGERS, "float16": (torch.float16, 16), "float32": (torch.float32, 32)}
    )
    quantization_granularity: QuantizationGranularity = _fields.enumerated(
        QuantizationGranularity.per_channel
    )
    quantization_scheme: QuantizationScheme = _fields.enumerated(QuantizationScheme.symmetric)
    enable_normal_float: bool = _fields.flag()
    hessian_dampening: float = _dampening()
    processing_group_size: int = fields.integer(128, fields.at_least(1))
    algorithm: str = _named("sparse_gpt")
    block_size: int | None = _fields.size()
    weight_n_bits: int | None = _fields.weight_n_bits()
    range: Literal["minmax", "mse"] = fields.choice("minmax", "mse")
    on_indivisible: Literal["leave", "divisor"] = fields.choice("leave", "divisor")

    def __attrs_post_init__(self) -> None:
        _resolve(self, self.quantization_granularity)


@LayerwiseCompressionAlgorithmConfig.register("gptq_palette")
@define
class ModuleGPTQPaletteConfig(ModulePaletteConfig, LayerwiseCompressionAlgorithmConfig):
    """How `GPTQPalette` palettizes a layer. Not in coremltools.

    Parameters
    ----------
    n_bits, lut_dtype, granularity, group_size, channel_axis, enable_per_channel_scale
        As of `ModulePostTrainingPalettizerConfig`.
    cluster_dim
        1 or ``None``: errors are not fed back onto vectors.
    on_indivisible
        As of `ModulePostTrainingPalettizerConfig`.
    hessian_dampening, use_activation_order_heuristic, processing_group_size
        As of `ModuleGPTQConfig`.
    algorithm
        ``"gptq_palette"``.

    Raises
    ------
    ConfigError
        If a setting is not what it must be, or does not go with another.

    Examples
    --------
    >>> ModuleGPTQPaletteConfig(n_bits=4, granularity="per_grouped_channel", group_size=16).n_bits
    4
    """

    hessian_dampening: float = _dampening()
    use_activation_order_heuristic: bool = _fields.flag()
    processing_group_size: int = fields.integer(128, fields.at_least(1))
    algorithm: str = _named("gptq_palette")

    def __attrs_post_init__(self) -> None:
        if self.cluster_dim not in (None, 1):
            msg = f"cluster_dim must be 1 with feedback of errors, got {self.cluster_dim}"
            raise ConfigError(msg)
