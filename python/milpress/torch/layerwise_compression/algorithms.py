"""How a layer is compressed with samples of its inputs: GPTQ, SparseGPT, and GPTQ onto tables."""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch

from milpress.errors import UnsupportedError
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
from milpress.torch import _metadata
from milpress.torch._compression import Task, WeightOutcome, compress_together
from milpress.torch._metadata import Stored
from milpress.torch._module_weights import ModuleWeight, representable
from milpress.torch._palettes import palettized
from milpress.torch.layerwise_compression._configs import (
    NORMAL_FLOATS,
    LayerwiseCompressionAlgorithmConfig,
    ModuleGPTQConfig,
    ModuleGPTQPaletteConfig,
    ModuleSparseGPTConfig,
)
from milpress.torch.layerwise_compression._layer_moments import LAYERS, LayerMoments
from milpress.torch.layerwise_compression._registry import Registered
from milpress.torch.optimization_config import QuantizationGranularity
from milpress.torch.quantization.quantization_config import QuantizationScheme

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
    layer, config
        A linear layer or a convolution, and how to compress it.

    Raises
    ------
    UnsupportedError
        If the layer can't be compressed so.
    """

    def __init__(self, layer: torch.nn.Module, config: Any) -> None:
        if not isinstance(layer, LAYERS):
            msg = f"a layer must be linear or a convolution, got {type(layer).__name__}"
            raise UnsupportedError(msg)
        self.weight = ModuleWeight("", layer, "weight")
        self.config = config
        if not self.weight.has_shape:
            msg = "the layer's weight is computed or has no shape yet"
            raise UnsupportedError(msg)
        self.moments: LayerMoments | None = None
        self._factor: tuple[FeedbackConfig, Factor] | None = None
        self.words = ", feedback"

    def do_without_samples(self) -> None:
        """Take all inputs to be alike and independent, so that no error is fed back."""
        n_groups = int(getattr(self.weight.module, "groups", 1))
        moments = np.eye(math.prod(self.weight.shape[1:]), dtype=np.float32)
        sums = np.repeat(moments[None], n_groups, axis=0)
        self._factor = self.settings(), error_feedback.factorize(sums, self.settings())
        self.words = ""

    def add_batch(
        self, inp: torch.Tensor, out: torch.Tensor | None = None, mask: torch.Tensor | None = None
    ) -> None:
        """Add what goes into the layer to its moments; ``out`` is not looked at."""
        del out
        if self.moments is None:
            self.moments = LayerMoments(self.weight.module)
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

    @abstractmethod
    def treat(self, weight: ModuleWeight, array: Floats, config: Any) -> WeightOutcome:
        """Return what is to be stored of a weight."""


class _IntegerAlgorithm(OBSCompressionAlgorithm):
    """Rounds to integers, or to normal floats."""

    def __init__(self, layer: torch.nn.Module, config: Any) -> None:
        super().__init__(layer, config)
        _block(self.weight.shape, config)  # which raises if blocks don't fit

    def _coded(
        self,
        weight: ModuleWeight,
        array: Floats,
        granularity: QuantizationGranularity,
        pruning: PruneConfig | None,
    ) -> WeightOutcome:
        config, factor, settings = self.config, self.factor(), self.settings()
        kept = array != 0 if _metadata.is_pruned(weight) else None
        if config.enable_normal_float:
            tables, scale = _normal_floats(weight, array, config.weight_n_bits, granularity)
            palette = error_feedback.palettize(
                array, tables, factor, settings, scale=scale, pruning=pruning, kept=kept
            )
            treatment = PalettizeConfig(bits=cast("Bits", config.weight_n_bits), channel_scale=True)
            stored = Stored(palette, scale)
            return WeightOutcome(stored, treatment, words=f", normal floats{self.words}")
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
            stored = Stored(_as_palette(value))
            return WeightOutcome(stored, table, notes, f", evenly spaced{self.words}")
        return WeightOutcome(Stored(value), quantization, notes, self.words)


@LayerwiseCompressionAlgorithm.register("gptq")
class GPTQ(_IntegerAlgorithm):
    """Rounds each column so that later ones make up for it.

    Frantar et al. 2022, "GPTQ", arXiv 2210.17323.

    Parameters
    ----------
    layer, config
        A linear layer or a convolution, and a `ModuleGPTQConfig`.

    Examples
    --------
    >>> layer = torch.nn.Linear(16, 8)
    >>> gptq = GPTQ(layer, ModuleGPTQConfig(weight_dtype="uint4"))
    >>> gptq.add_batch(torch.randn(64, 16))
    >>> gptq.compress()
    >>> layer.get_buffer("_COREML_/weight/quantization_n_bits")
    tensor(4)
    """

    def treat(self, weight: ModuleWeight, array: Floats, config: Any) -> WeightOutcome:
        """Return what is to be stored of a weight."""
        return self._coded(weight, array, config.granularity, None)


@LayerwiseCompressionAlgorithm.register("sparse_gpt")
class SparseGPT(_IntegerAlgorithm):
    """Makes those weights zero that the others can best make up for.

    Frantar and Alistarh 2023, "SparseGPT", arXiv 2301.00774.

    Parameters
    ----------
    layer, config
        A linear layer or a convolution, and a `ModuleSparseGPTConfig`.
    """

    def treat(self, weight: ModuleWeight, array: Floats, config: Any) -> WeightOutcome:
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
            return WeightOutcome(Stored(value), pruning, words=self.words)
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
    layer, config
        A linear layer or a convolution, and a `ModuleGPTQPaletteConfig`.
    """

    def treat(self, weight: ModuleWeight, array: Floats, config: Any) -> WeightOutcome:
        """Return what is to be stored of a weight."""
        factor = self.factor()
        power = error_feedback.power_of_inputs(factor, array.shape)
        nearest = palettized(weight, array, config, power)
        tables: Any = nearest.stored.value
        scale, kept = nearest.stored.scale, None
        if isinstance(tables, Masked):
            tables, kept = tables.value, tables.mask()
        value = error_feedback.palettize(
            array, tables, factor, self.settings(), scale=scale, kept=kept
        )
        return replace(nearest, stored=Stored(value, scale), words=self.words)


def _block(shape: tuple[int, ...], config: Any) -> tuple[int | None, str]:
    """Return how many input channels share a scale, and how that differs from the config."""
    if config.block_size is None:
        return None, ""
    size, note = divisor_of("block", config.block_size, shape, 1, 0, config.on_indivisible)
    if size is None:
        raise UnsupportedError(note)
    return size, note


def _representable(weight: ModuleWeight) -> Any:
    """Return what rounds values to a parameter's type where NumPy has none like it."""
    is_rounded = weight.dtype == torch.bfloat16
    return functools.partial(representable, dtype=weight.dtype) if is_rounded else None


def _normal_floats(
    weight: ModuleWeight, array: Floats, bits: int, granularity: QuantizationGranularity
) -> tuple[Palette, Floats]:
    rank = array.ndim
    entries = np.array(NORMAL_FLOATS[bits], array.dtype).reshape(*[1] * rank, -1, 1)
    tables = Palette(codes=np.zeros(array.shape, np.uint8), lut=entries, bits=bits)
    axes = tuple(range(1, rank))
    scale = np.abs(array).max(axis=axes, keepdims=True).astype(np.float32)
    if granularity is QuantizationGranularity.per_tensor:
        scale = np.full_like(scale, scale.max())
    scale = np.where(scale == 0, np.float32(1), scale)
    return tables, representable(scale, weight.dtype).astype(array.dtype)


def _as_palette(value: Quantized | Masked) -> Palette | Masked:
    """Return codes of 3 bits as indices into a table for each output channel."""
    if isinstance(value, Masked):
        palette: Any = _as_palette(cast("Quantized", value.value))
        return masked(palette, value.mask())
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
