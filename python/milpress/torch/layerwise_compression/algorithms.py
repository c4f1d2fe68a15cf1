"""How a layer is compressed with samples of its inputs: GPTQ, SparseGPT, and GPTQ onto tables."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast, overload

import numpy as np
import torch
from attrs import define, field
from attrs.validators import optional
from numpy.typing import NDArray

from milpress.errors import ConfigError, UnsupportedError
from milpress.formats import (
    Masked,
    Palette,
    PalettizeConfig,
    PerBlock,
    PerChannel,
    PerTensor,
    PruneConfig,
    QuantizeConfig,
    Quantized,
    error_feedback,
)
from milpress.formats.error_feedback import Factor, FeedbackConfig
from milpress.formats.joint import masked
from milpress.formats.palette import Bits
from milpress.formats.quantized import IntDType
from milpress.formats.rows import Floats, divisor_of
from milpress.plain import fields
from milpress.torch import _metadata
from milpress.torch._compression import Task, Treated, compress_together
from milpress.torch._metadata import Stored
from milpress.torch._weights import Weight
from milpress.torch.layerwise_compression._moments import LAYERS, Moments
from milpress.torch.layerwise_compression._registry import Registered
from milpress.torch.optimization_config import (
    ModuleOptimizationConfig,
    QuantizationGranularity,
)
from milpress.torch.palettization._palettes import ModulePaletteConfig, palettized
from milpress.torch.quantization.quantization_config import QuantizationScheme

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "GPTQ",
    "GPTQPalette",
    "LayerwiseCompressionAlgorithm",
    "LayerwiseCompressionAlgorithmConfig",
    "ModuleGPTQConfig",
    "ModuleGPTQPaletteConfig",
    "ModuleSparseGPTConfig",
    "SparseGPT",
]

# Dettmers et al. 2023, "QLoRA", arXiv 2305.14314; that of 3 bits is bitsandbytes'.
_NORMAL_FLOATS = {
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

# torch has no integers of fewer than 8 bits, so the width stands beside the type.
_DTYPES: dict[str, tuple[torch.dtype, int]] = {
    "uint8": (torch.uint8, 8),
    "uint4": (torch.uint8, 4),
    "uint3": (torch.uint8, 3),
    "int8": (torch.int8, 8),
    "int4": (torch.int8, 4),
    "int3": (torch.int8, 3),
    "float16": (torch.float16, 16),
    "float32": (torch.float32, 32),
}


def _adopt_dtype(config: Any, _attribute: Any, value: Any) -> torch.dtype:
    """Store a type, and its width beside it."""
    for name in config._dtypes:
        dtype, n_bits = _DTYPES[name]
        # By identity: a tensor compares to anything.
        if value is dtype or (isinstance(value, str) and value.lower() == name):
            config.weight_n_bits = n_bits
            return dtype
    msg = f"weight_dtype must be one of {tuple(config._dtypes)} not {value}"
    raise ConfigError(msg)


def _to_granularity(value: Any) -> QuantizationGranularity:
    return fields.enumerated(QuantizationGranularity, value)


def _to_scheme(value: Any) -> QuantizationScheme:
    return fields.enumerated(QuantizationScheme, value)


def _dampening() -> Any:
    return field(
        default=0.01,
        converter=fields.real,
        validator=[
            fields.is_number,
            fields.check(
                lambda value: 0 <= value < float("inf"),
                "{name} must be finite and not negative, got {value}",
            ),
        ],
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
        made: Self = cls.get_class(config_dict["algorithm"])._from_dict(config_dict, place)
        return made


@define
class _IntegerConfig(LayerwiseCompressionAlgorithmConfig):
    """What configs share that round to integers."""

    _dtypes: ClassVar[tuple[str, ...]] = ()

    def _resolve(self, granularity: QuantizationGranularity) -> None:
        """Raise `ConfigError` if settings don't go together."""
        config: Any = self
        given = config.weight_n_bits
        config.weight_dtype = config.weight_dtype  # which sets the width, too
        if given is not None and config.weight_n_bits == 8 and given in (3, 4):
            config.weight_n_bits = given
        if given not in (None, config.weight_n_bits):
            msg = (
                f"weight_n_bits must be that of weight_dtype, {config.weight_n_bits}, got {given!r}"
            )
            raise ConfigError(msg)
        if config.enable_normal_float and config.weight_n_bits not in _NORMAL_FLOATS:
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
class ModuleGPTQConfig(_IntegerConfig):
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

    _dtypes: ClassVar[tuple[str, ...]] = (
        "uint8", "uint4", "uint3", "int8", "int4", "int3", "float32",
    )  # fmt: skip

    weight_dtype: Any = field(default="uint8", on_setattr=_adopt_dtype)
    granularity: QuantizationGranularity = field(
        default=QuantizationGranularity.per_channel, converter=_to_granularity
    )
    quantization_scheme: QuantizationScheme = field(
        default=QuantizationScheme.symmetric, converter=_to_scheme
    )
    block_size: int | None = fields.integer(None, fields.at_least(1))
    enable_normal_float: bool = field(default=False, validator=fields.is_flag)
    hessian_dampening: float = _dampening()
    use_activation_order_heuristic: bool = field(default=False, validator=fields.is_flag)
    processing_group_size: int = fields.integer(128, fields.at_least(1))
    algorithm: str = _named("gptq")
    weight_n_bits: int | None = field(default=None, kw_only=True, converter=fields.whole)
    range: Literal["minmax", "mse"] = fields.choice("minmax", "mse")
    on_indivisible: Literal["leave", "divisor"] = fields.choice("leave", "divisor")

    def __attrs_post_init__(self) -> None:
        self._resolve(self.granularity)


def _to_ratio(value: Any) -> Any:
    return fields.wholes(value) if isinstance(value, (list, tuple)) else value


@LayerwiseCompressionAlgorithmConfig.register("sparse_gpt")
@define
class ModuleSparseGPTConfig(_IntegerConfig):
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

    _dtypes: ClassVar[tuple[str, ...]] = tuple(_DTYPES)

    target_sparsity: float = field(
        default=0.5, converter=fields.real, validator=[fields.is_number, fields.is_fraction]
    )
    n_m_ratio: tuple[int, int] | None = field(
        default=None,
        converter=_to_ratio,
        validator=optional(
            fields.check(
                lambda value: (
                    isinstance(value, tuple)
                    and len(value) == 2
                    and all(type(number) is int for number in value)
                    and 0 <= value[0] <= value[1]
                    and value[1] > 0
                ),
                "{name} must be two integers, the first not above the second, got {value!r}",
            )
        ),
    )
    weight_dtype: Any = field(default="uint8", on_setattr=_adopt_dtype)
    quantization_granularity: QuantizationGranularity = field(
        default=QuantizationGranularity.per_channel, converter=_to_granularity
    )
    quantization_scheme: QuantizationScheme = field(
        default=QuantizationScheme.symmetric, converter=_to_scheme
    )
    enable_normal_float: bool = field(default=False, validator=fields.is_flag)
    hessian_dampening: float = _dampening()
    processing_group_size: int = fields.integer(128, fields.at_least(1))
    algorithm: str = _named("sparse_gpt")
    block_size: int | None = field(
        default=None,
        kw_only=True,
        converter=fields.whole,
        validator=optional([fields.is_integer, fields.at_least(1)]),
    )
    weight_n_bits: int | None = field(default=None, kw_only=True, converter=fields.whole)
    range: Literal["minmax", "mse"] = fields.choice("minmax", "mse")
    on_indivisible: Literal["leave", "divisor"] = fields.choice("leave", "divisor")

    def __attrs_post_init__(self) -> None:
        self._resolve(self.quantization_granularity)


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
    use_activation_order_heuristic: bool = field(default=False, validator=fields.is_flag)
    processing_group_size: int = fields.integer(128, fields.at_least(1))
    algorithm: str = _named("gptq_palette")

    def __attrs_post_init__(self) -> None:
        if self.cluster_dim not in (None, 1):
            msg = f"cluster_dim must be 1 with feedback of errors, got {self.cluster_dim}"
            raise ConfigError(msg)


class LayerwiseCompressionAlgorithm(Registered):
    """Compresses a layer with what goes into it: the base of all algorithms.

    One that is registered under the name that its config has as ``algorithm`` is made by
    `LayerwiseCompressor` with the layer and the config.
    """

    @abstractmethod
    def add_batch(self, inp: torch.Tensor, out: torch.Tensor) -> None:
        """Look at what a batch gives the layer, and what the layer makes of it."""

    @abstractmethod
    def compress(self) -> None:
        """Compress the weight of the layer in place."""

    @abstractmethod
    def cleanup(self) -> None:
        """Forget the batches."""


class OBSCompressionAlgorithm(LayerwiseCompressionAlgorithm):
    """An algorithm that feeds errors back by the second moments of the layer's inputs.

    Parameters
    ----------
    layer
        A linear layer or a convolution.
    config
        How to compress it.

    Raises
    ------
    UnsupportedError
        If the layer can't be compressed so.
    """

    def __init__(self, layer: torch.nn.Module, config: Any) -> None:
        if not isinstance(layer, LAYERS):
            msg = f"a layer must be linear or a convolution, got {type(layer).__name__}"
            raise UnsupportedError(msg)
        self.weight = Weight("", layer, "weight")
        self.config = config
        if self.weight.tensor is None or torch.nn.parameter.is_lazy(self.weight.tensor):
            msg = "the layer's weight is computed or has no shape yet"
            raise UnsupportedError(msg)
        self.check(self.weight.shape, config)
        self.moments: Moments | None = None
        self._factor: tuple[FeedbackConfig, Factor] | None = None

    def add_batch(
        self, inp: torch.Tensor, out: torch.Tensor | None = None, mask: torch.Tensor | None = None
    ) -> None:
        """Add what goes into the layer to its moments; ``out`` is not looked at."""
        del out
        if self.moments is None:
            self.moments = Moments(self.weight.module)
        self._factor = None
        self.moments.add(inp, mask)

    def compress(self) -> None:
        """Compress the weight, and say so in buffers of the layer.

        Raises
        ------
        UnsupportedError
            If it can't be compressed so.
        """
        _, report = compress_together([Task(self.weight, self.config)], self.treat)
        if report.status == "left":
            raise UnsupportedError(report.note)

    def cleanup(self) -> None:
        """Forget the moments."""
        self.moments = None
        self._factor = None

    def share(self, other: OBSCompressionAlgorithm) -> None:
        """Take the moments of another layer, which has the same inputs."""
        self.moments, self._factor = other.moments, other._factor

    def factor(self) -> Factor:
        """Return what is known of the inputs, as `milpress.formats.error_feedback` takes it."""
        settings = self.settings()
        if self._factor is None or self._factor[0] != settings:
            if self.moments is None or self.moments.n_positions == 0:
                msg = "no sample came to the layer"
                raise UnsupportedError(msg)
            self._factor = settings, error_feedback.factorize(self.moments.sums(), settings)
        return self._factor[1]

    def settings(self) -> FeedbackConfig:
        """Return how errors are fed back."""
        config = self.config
        return FeedbackConfig(
            dampening=config.hessian_dampening,
            activation_order=getattr(config, "use_activation_order_heuristic", False),
            panel_size=config.processing_group_size,
        )

    @classmethod
    def check(cls, shape: tuple[int, ...], config: Any) -> None:
        """Raise `UnsupportedError` if a weight of a shape can't be compressed so."""

    @abstractmethod
    def treat(self, weight: Weight, array: Floats, config: Any) -> Treated:
        """Return what is to be stored of a weight."""


class _IntegerAlgorithm(OBSCompressionAlgorithm):
    """Rounds to integers, or to normal floats."""

    @classmethod
    def check(cls, shape: tuple[int, ...], config: Any) -> None:
        _block(shape, config)

    def _coded(
        self,
        weight: Weight,
        array: Floats,
        granularity: QuantizationGranularity,
        pruning: PruneConfig | None,
    ) -> Treated:
        config, factor, settings = self.config, self.factor(), self.settings()
        kept = array != 0 if _metadata.is_pruned(weight) else None
        if config.enable_normal_float:
            tables, scale = _normal_floats(weight, array, config.weight_n_bits, granularity)
            palette = error_feedback.palettize(
                array, tables, factor, settings, scale=scale, pruning=pruning, kept=kept
            )
            treatment = PalettizeConfig(bits=cast("Bits", config.weight_n_bits), channel_scale=True)
            return Treated(Stored(palette, scale), treatment, words=", normal floats, feedback")
        block, note = _block(array.shape, config)
        shared: Any = PerChannel() if block is None else PerBlock(block)
        if granularity is QuantizationGranularity.per_tensor:
            shared = PerTensor()
        sign = "u" if config.weight_dtype == torch.uint8 else ""
        width = 8 if config.weight_n_bits == 8 else 4
        quantization = QuantizeConfig(
            dtype=cast("IntDType", f"{sign}int{width}"),
            granularity=shared,
            offset=config.quantization_scheme is QuantizationScheme.affine,
            range=config.range,
        )
        value = error_feedback.quantize(
            array,
            quantization,
            factor,
            settings,
            pruning=pruning,
            kept=kept,
            bits=config.weight_n_bits,
            representable=_representable(weight),
        )
        notes = (note,) if note else ()
        if config.weight_n_bits == 3:
            table = PalettizeConfig(bits=3, group_size=None if shared == PerTensor() else 1)
            return Treated(Stored(_as_palette(value)), table, notes, ", evenly spaced, feedback")
        return Treated(Stored(value), quantization, notes, ", feedback")


@LayerwiseCompressionAlgorithm.register("gptq")
class GPTQ(_IntegerAlgorithm):
    """Rounds each column so that later ones make up for it.

    Frantar et al. 2022, "GPTQ", arXiv 2210.17323.

    Parameters
    ----------
    layer
        A linear layer or a convolution.
    config
        A `ModuleGPTQConfig`.

    Examples
    --------
    >>> layer = torch.nn.Linear(16, 8)
    >>> gptq = GPTQ(layer, ModuleGPTQConfig(weight_dtype="uint4"))
    >>> gptq.add_batch(torch.randn(64, 16))
    >>> gptq.compress()
    >>> layer.get_buffer("_COREML_/weight/quantization_n_bits")
    tensor(4)
    """

    def treat(self, weight: Weight, array: Floats, config: Any) -> Treated:
        """Return what is to be stored of a weight."""
        return self._coded(weight, array, config.granularity, None)


@LayerwiseCompressionAlgorithm.register("sparse_gpt")
class SparseGPT(_IntegerAlgorithm):
    """Makes those weights zero that the others can best make up for.

    Frantar and Alistarh 2023, "SparseGPT", arXiv 2301.00774.

    Parameters
    ----------
    layer
        A linear layer or a convolution.
    config
        A `ModuleSparseGPTConfig`.
    """

    def treat(self, weight: Weight, array: Floats, config: Any) -> Treated:
        """Return what is to be stored of a weight."""
        pruning = PruneConfig(sparsity=config.target_sparsity)
        if config.n_m_ratio is not None:
            pruning = PruneConfig(n_m=config.n_m_ratio)
        if config.weight_n_bits >= 16:
            value = error_feedback.prune(
                array,
                pruning,
                self.factor(),
                self.settings(),
                kept=array != 0 if _metadata.is_pruned(weight) else None,
                representable=_representable(weight),
            )
            return Treated(Stored(value), pruning, words=", feedback")
        coded = self._coded(weight, array, config.quantization_granularity, pruning)
        n_m = pruning.n_m
        part = f"{pruning.sparsity:.0%}" if n_m is None else f"{n_m[0]} of {n_m[1]}"
        return replace(coded, words=f"{coded.words}, pruned {part}")


@LayerwiseCompressionAlgorithm.register("gptq_palette")
class GPTQPalette(OBSCompressionAlgorithm):
    """Assigns each column to entries of lookup tables so that later columns make up for the error.

    The tables are those of k-means, where an error counts as much as the inputs that it is
    multiplied by. Not in coremltools.

    Parameters
    ----------
    layer
        A linear layer or a convolution.
    config
        A `ModuleGPTQPaletteConfig`.
    """

    def treat(self, weight: Weight, array: Floats, config: Any) -> Treated:
        """Return what is to be stored of a weight."""
        factor = self.factor()
        nearest = palettized(
            weight, array, config, error_feedback.power_of_inputs(factor, array.shape)
        )
        stored = nearest.stored
        kept = stored.value.mask() if isinstance(stored.value, Masked) else None
        tables = stored.value.value if isinstance(stored.value, Masked) else stored.value
        value = error_feedback.palettize(
            array,
            cast("Palette", tables),
            factor,
            self.settings(),
            scale=stored.scale,
            kept=kept,
        )
        return replace(nearest, stored=Stored(value, stored.scale), words=", feedback")


def _block(shape: tuple[int, ...], config: Any) -> tuple[int | None, str]:
    """Return how many input channels share a scale, and how that differs from the config."""
    if config.block_size is None:
        return None, ""
    size, note = divisor_of("block", config.block_size, shape, 1, 0, config.on_indivisible)
    if size is None:
        raise UnsupportedError(note)
    return size, note


def _representable(weight: Weight) -> Any:
    """Return what rounds values to a parameter's type where NumPy has none like it."""
    tensor = weight.tensor
    if tensor is None or tensor.dtype != torch.bfloat16:
        return None

    def rounded(values: NDArray[np.float32]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = torch.from_numpy(values).bfloat16().float().numpy()
        return found

    return rounded


def _normal_floats(
    weight: Weight, array: Floats, bits: int, granularity: QuantizationGranularity
) -> tuple[Palette, Floats]:
    rank = array.ndim
    entries = np.array(_NORMAL_FLOATS[bits], array.dtype).reshape(*[1] * rank, -1, 1)
    tables = Palette(codes=np.zeros(array.shape, np.uint8), lut=entries, bits=bits)
    axes = tuple(range(1, rank))
    scale = np.abs(array).max(axis=axes, keepdims=True).astype(np.float32)
    if granularity is QuantizationGranularity.per_tensor:
        scale = np.full_like(scale, scale.max())
    scale = np.where(scale == 0, np.float32(1), scale)
    rounded = _representable(weight)
    scale = scale if rounded is None else rounded(scale)
    return tables, scale.astype(array.dtype)


@overload
def _as_palette(value: Quantized) -> Palette: ...
@overload
def _as_palette(value: Quantized | Masked) -> Palette | Masked: ...
def _as_palette(value: Quantized | Masked) -> Palette | Masked:
    """Return codes of 3 bits as indices into a table for each output channel."""
    if isinstance(value, Masked):
        return masked(_as_palette(cast("Quantized", value.value)), value.mask())
    least = -4 if value.codes.dtype == np.int8 else 0
    steps = np.arange(8, dtype=np.float32) + least
    offset: Any = 0 if value.offset is None else value.offset[..., None, None].astype(np.float32)
    scale = value.scale[..., None, None].astype(np.float32)
    lut = (scale * (steps[:, None] - offset)).astype(value.scale.dtype)
    codes = (value.codes.astype(np.int16) - least).astype(np.uint8)
    # A negative scale turns a table upside down.
    falling = value.scale < 0
    lut = np.where(falling[..., None, None], lut[..., ::-1, :], lut)
    codes = np.where(falling, 7 - codes, codes).astype(np.uint8)
    return Palette(codes=codes, lut=np.ascontiguousarray(lut), bits=3)
