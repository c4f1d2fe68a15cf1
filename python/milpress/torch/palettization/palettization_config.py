"""Settings of differentiable k-means."""

from __future__ import annotations

from typing import Any, Literal

import torch
from attrs import define, field
from attrs.validators import optional
from torch import nn

from milpress.errors import ConfigError, ConfigTypeError
from milpress.plain import fields
from milpress.torch import _fields
from milpress.torch._palettes import BITS, ModulePaletteConfig
from milpress.torch.optimization_config import OptimizationConfig
from milpress.torch.palettization._dkm import AttentionSettings

__all__ = ["DKMPalettizerConfig", "ModuleDKMPalettizerConfig"]

_LUT_DTYPES: dict[str, torch.dtype | None] = {
    "i8": torch.int8,
    "int8": torch.int8,
    "u8": torch.uint8,
    "uint8": torch.uint8,
    "f16": torch.float16,
    "float16": torch.float16,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "f32": None,
    "float32": None,
}
_STARTS = ("auto", "opt1d", "cpu.kmeans++", "kmeans++", "nf", "nf_fit", "cpu.minibatch")
_DTYPES = {
    "qint8": torch.qint8,
    "quint8": torch.quint8,
    "float32": torch.float32,
}


def _gone(use: str) -> Any:
    return field(
        default=None,
        validator=optional(
            fields.check(lambda _: False, f"{{name}} must be left out, got {{value!r}}: use {use}")
        ),
    )


def _to_permutation(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


_positive = fields.check(lambda value: value > 0, "{name} must be greater than 0, got {value}")


@define
class ModuleDKMPalettizerConfig(ModulePaletteConfig):
    """How `DKMPalettizer` palettizes the weights of a module.

    Parameters
    ----------
    n_bits
        Width of an index: 1, 2, 3, 4, 6 or 8; ``None`` takes 4 for linear and transposed layers, 2
        for others.
    weight_threshold
        A module is palettized if each of its weights has more elements.
    granularity, group_size
        ``"per_tensor"`` gives a weight one table, ``"per_grouped_channel"`` one to every
        ``group_size`` output channels.
    channel_axis
        Must be 0: channels are output channels.
    cluster_dim
        Neighbouring output channels that one index stands for; ``None`` is 1.
    enable_per_channel_scale
        Divide each output channel by a scale first. Does not go with ``cluster_dim`` above 1.
    per_channel_scaling_factor_scheme
        That scale: ``"min_max"``, half of the channel's range, or ``"abs"``, its largest magnitude.
    milestone
        Number of steps before palettization sets in.
    lut_dtype
        How the entries of tables are stored: ``"f32"`` as the weight is, ``"f16"`` and ``"bf16"``
        rounded to these types, ``"i8"`` and ``"u8"`` as integers with a scale.
    palett_tau
        Temperature of the attention: the squared distance that counts.
    kmeans_max_iter, palett_epsilon
        Iterations at each step of training; fewer once the sum of squared distances changes by no
        more than ``palett_epsilon``.
    palett_mode
        What a weight attends to: ``"dkm"``, all entries; ``"topk"``, the nearest two; ``"hard"``,
        the nearest; ``"gsm"``, all with Gumbel noise.
    zero_threshold
        Lower limit of attention in mode ``"dkm"``.
    enforce_zero, prune_threshold
        Whether an entry of each table stays zero, and by how much a squared distance to it counts
        less. With 0, weights that are not zero are kept away from it.
    palett_cluster_tol
        Fraction of equal entries from which on they are moved apart.
    percentage_palett_enable
        Fraction of groups that attend as ``palett_mode`` says; the others do as with ``"hard"``.
    cluster_permute
        Order of the axes in which groups and vectors lie along the first.
    quantize_activations, quant_min, quant_max, dtype
        Without effect: nothing of it would be exported. `LinearQuantizer` quantizes activations.
    palett_max_mem, palett_min_tsize, palett_unique, palett_shard, palett_batch_mode, palett_dist, \
kmeans_init, kmeans_opt1d_threshold, kmeans_batch_threshold, kmeans_n_init, kmeans_error_bnd, \
palett_lambda, add_extra_centroid
        Without effect: memory is bounded, and tables start as the exact k-means tables.
    on_indivisible
        As of `ModulePostTrainingPalettizerConfig`.

    Raises
    ------
    ConfigError
        If a setting is not what it must be, or does not go with another.

    Examples
    --------
    >>> ModuleDKMPalettizerConfig(n_bits=2, palett_tau=1e-5).kmeans_max_iter
    3
    """

    n_bits: Any = _fields.option(None, BITS)
    lut_dtype: str = _fields.word("f32", *_LUT_DTYPES)  # type: ignore[assignment]
    channel_axis: int = fields.integer(
        0, fields.one_of((0,), "{name} must be 0, got {value}: see cluster_permute")
    )
    weight_threshold: int = fields.integer(2048, fields.at_least(0))
    milestone: int = fields.integer(0, fields.at_least(0))
    quant_min: int = fields.integer(-128)
    quant_max: int = fields.integer(127)
    dtype: Any = _fields.torch_type(torch.qint8, _DTYPES)
    quantize_activations: bool = _fields.flag()
    cluster_permute: tuple[int, ...] | None = field(default=None, converter=_to_permutation)
    palett_max_mem: float = _fields.number(1.0)
    kmeans_max_iter: int = fields.integer(3, fields.at_least(1))
    prune_threshold: float = _fields.number(1e-7, fields.at_least(0))
    kmeans_init: str = _fields.word(*_STARTS)
    kmeans_opt1d_threshold: int = fields.integer(1024)
    enforce_zero: bool = _fields.flag()
    palett_mode: Literal["dkm", "gsm", "hard", "topk"] = _fields.word("dkm", "gsm", "hard", "topk")
    palett_tau: float = _fields.number(1e-4, _positive)
    palett_epsilon: float = _fields.number(1e-4, fields.at_least(0))
    palett_lambda: float = _fields.number(0.0)
    add_extra_centroid: bool = _fields.flag()
    palett_cluster_tol: float = _fields.number(0.0, fields.is_fraction)
    palett_min_tsize: int = fields.integer(64 * 1024)
    palett_unique: bool = _fields.flag()
    palett_shard: bool = _fields.flag()
    palett_batch_mode: bool = _fields.flag()
    palett_dist: bool = _fields.flag()
    per_channel_scaling_factor_scheme: str = _fields.word("min_max", "abs")
    percentage_palett_enable: float = _fields.number(1.0, fields.is_fraction)
    kmeans_batch_threshold: int = fields.integer(4)
    kmeans_n_init: int = fields.integer(10)
    zero_threshold: float = _fields.number(1e-7, fields.at_least(0))
    kmeans_error_bnd: float = _fields.number(0.0)
    partition_size: int | None = _gone("group_size")
    cluster_dtype: str | None = _gone("lut_dtype")

    @cluster_permute.validator
    def _check_permutation(self, _attribute: Any, axes: Any) -> None:
        if axes is None:
            return
        if not isinstance(axes, tuple) or not all(type(axis) is int for axis in axes):
            msg = f"cluster_permute must be a tuple of integers, got {axes!r}"
            raise ConfigTypeError(msg)
        if sorted(axes) != list(range(len(axes))):
            msg = f"cluster_permute must hold each axis once, got {axes}"
            raise ConfigError(msg)

    @property
    def lut_type(self) -> torch.dtype | None:
        """Type that the entries are rounded to; ``None`` for none."""
        return _LUT_DTYPES[self.lut_dtype]

    @property
    def settings(self) -> AttentionSettings:
        """What the attention needs."""
        return AttentionSettings(
            tau=self.palett_tau,
            n_iterations=self.kmeans_max_iter,
            epsilon=self.palett_epsilon,
            mode=self.palett_mode,
            least=self.zero_threshold,
            keep_zero=self.enforce_zero,
            zero_bonus=self.prune_threshold,
        )


# Width of an index, by the class of the module, where its config does not say; 4 in others.
DEFAULT_BITS: dict[type[nn.Module], int] = {
    nn.Linear: 4,
    nn.Conv1d: 2,
    nn.Conv2d: 2,
    nn.Conv3d: 2,
    nn.LayerNorm: 2,
    nn.MultiheadAttention: 2,
    nn.Embedding: 2,
}


@define
class DKMPalettizerConfig(OptimizationConfig):
    """Which module `DKMPalettizer` palettizes how; see `OptimizationConfig`.

    A list may stand for a config: the one with the greatest ``weight_threshold`` that a module
    exceeds holds for it. If nothing at all is said, linear layers get 4 bits, convolutions,
    embeddings, attention and layer normalization 2.

    Examples
    --------
    >>> config = DKMPalettizerConfig.from_dict({"global_config": {"n_bits": 4}})
    >>> config.global_config.n_bits
    4
    """

    module_config_class = ModuleDKMPalettizerConfig
    takes_lists = True

    def _set_default(self) -> None:
        self.module_type_configs = {
            kind: ModuleDKMPalettizerConfig(n_bits=bits) for kind, bits in DEFAULT_BITS.items()
        }

    @property
    def is_default(self) -> bool:
        """Whether nothing was said."""
        return self == DKMPalettizerConfig()

    def _check_together(self) -> None:
        self.global_config = _sorted(self.global_config)
        for configs in (self.module_type_configs, self.module_name_configs):
            for key, config in configs.items():
                configs[key] = _sorted(config)


def _sorted(config: Any) -> Any:
    if not isinstance(config, list):
        return config
    return sorted(
        (item for item in config if item is not None), key=lambda item: item.weight_threshold
    )
