"""Settings that all quantizers share, and those of quantization-aware training."""

from __future__ import annotations

from enum import Enum, unique
from typing import Any, Literal

import torch
from attrs import define, field

from milpress.errors import ConfigError, ConfigTypeError
from milpress.torch import _fields
from milpress.torch.optimization_config import ModuleOptimizationConfig, OptimizationConfig

__all__ = [
    "LinearQuantizerConfig",
    "ModuleLinearQuantizerConfig",
    "ObserverType",
    "QuantizationScheme",
]


@unique
class QuantizationScheme(Enum):
    """Whether a range is symmetric about zero or has an offset."""

    symmetric = "symmetric"
    affine = "affine"


@unique
class ObserverType(Enum):
    """How a range follows the least and greatest values of one pass after the other."""

    moving_average_min_max = "moving_average_min_max"
    min_max = "min_max"
    ema_min_max = "ema_min_max"


_WEIGHT_DTYPES: dict[str, tuple[torch.dtype, int]] = {
    "qint8": (torch.qint8, 8),
    "quint8": (torch.quint8, 8),
    "qint4": (torch.qint8, 4),
    "quint4": (torch.quint8, 4),
    "float32": (torch.float32, 32),
}
_ACTIVATION_DTYPES = {"quint8": torch.quint8, "float32": torch.float32}
_N_MILESTONES = 4


@define
class ModuleLinearQuantizerConfig(ModuleOptimizationConfig):
    """How `LinearQuantizer` quantizes the weights and the output of a module.

    Parameters
    ----------
    algorithm
        ``"vanilla"`` takes scales from ranges, ``"learnable"`` trains them (Esser et al. 2019,
        arXiv 1902.08153; with offsets, Bhalgat et al. 2020, arXiv 2004.09576). All modules must
        have the same.
    weight_dtype
        ``"qint8"``, ``"quint8"``, ``"qint4"``, ``"quint4"`` or torch's types of 8 bits;
        ``"float32"`` leaves the weights. Stored as torch's type, with the width in
        ``weight_n_bits``.
    weight_observer, activation_observer
        How ranges follow the data: ``"moving_average_min_max"``, a hundredth of the way at a time;
        ``"ema_min_max"``, a tenth; ``"min_max"``, the widest so far.
    weight_per_channel
        Whether each output channel has a scale, or the weight has one.
    activation_dtype
        ``torch.quint8``, or ``torch.float32`` to leave inputs and output of the module.
    quantization_scheme
        ``"symmetric"`` takes ranges that are symmetric about zero, but where no value can be
        negative; ``"affine"`` those of the values, with offsets. All modules must have the same.
    milestones
        Numbers of steps at which ranges begin to follow, rounding begins, ranges stay and batch
        normalization stays; -1 for never. ``None``: the first two at once, the others never, though
        scales that are learnt stop to follow after the first pass. The global config's hold.
    weight_n_bits
        Width of a weight's code, 4 or 8; ``None`` takes it from ``weight_dtype``.
    block_size
        Neighbouring input channels that share a scale. Needs ``weight_per_channel``. Not in
        coremltools.

    Raises
    ------
    ConfigError
        If a setting is not what it must be, or does not go with another.

    Examples
    --------
    >>> config = ModuleLinearQuantizerConfig(weight_dtype="qint4")
    >>> config.weight_dtype, config.weight_n_bits
    (torch.qint8, 4)
    """

    algorithm: Literal["vanilla", "learnable"] = _fields.word("vanilla", "learnable")
    weight_dtype: Any = _fields.weight_dtype("qint8", _WEIGHT_DTYPES)
    weight_observer: ObserverType = _fields.enumerated(ObserverType.moving_average_min_max)
    weight_per_channel: bool = _fields.flag(True)
    activation_dtype: Any = _fields.torch_type(torch.quint8, _ACTIVATION_DTYPES)
    activation_observer: ObserverType = _fields.enumerated(ObserverType.moving_average_min_max)
    quantization_scheme: QuantizationScheme = _fields.enumerated(QuantizationScheme.symmetric)
    milestones: list[int] | None = field(default=None)
    weight_n_bits: int | None = _fields.weight_n_bits()
    block_size: int | None = _fields.size()

    def __attrs_post_init__(self) -> None:
        _fields.resolve_width(self, 4)
        if self.block_size is not None and not self.weight_per_channel:
            msg = f"block_size must go with weight_per_channel, got {self.block_size}"
            raise ConfigError(msg)

    @milestones.validator
    def _check_milestones(self, _attribute: Any, milestones: Any) -> None:
        if milestones is None:
            return
        if not isinstance(milestones, list) or not all(type(step) is int for step in milestones):
            msg = f"milestones must be a list of integers, got {milestones!r}"
            raise ConfigTypeError(msg)
        if len(milestones) != _N_MILESTONES:
            msg = f"milestones must be {_N_MILESTONES} integers, got {milestones}"
            raise ConfigError(msg)

    @property
    def quantizes_weights(self) -> bool:
        """Whether weights are rounded."""
        return bool(self.weight_dtype != torch.float32)

    @property
    def quantizes_activations(self) -> bool:
        """Whether inputs and outputs are rounded."""
        return bool(self.activation_dtype != torch.float32)


def _names(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value


def _are_names(_config: Any, attribute: Any, value: Any) -> None:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        msg = f"{attribute.name} must be a list of names, got {value!r}"
        raise ConfigTypeError(msg)


@define
class LinearQuantizerConfig(OptimizationConfig):
    """Which module `LinearQuantizer` quantizes how; see `OptimizationConfig`.

    Parameters
    ----------
    non_traceable_module_names
        Modules that ``torch.fx`` is not to look into.
    preserved_attributes
        Attributes and methods of the model that the prepared model is to have, too.

    Examples
    --------
    >>> config = LinearQuantizerConfig.from_dict({"global_config": {"weight_dtype": "qint4"}})
    >>> config.global_config.weight_n_bits
    4
    """

    module_config_class = ModuleLinearQuantizerConfig

    non_traceable_module_names: list[str] = field(
        factory=list, converter=_names, validator=_are_names
    )
    preserved_attributes: list[str] = field(factory=list, converter=_names, validator=_are_names)

    def _check_together(self) -> None:
        self._check_same("quantization_scheme")
        self._check_same("algorithm")

    @property
    def milestones(self) -> list[int] | None:
        """Those of the global config, or of the first that there is."""
        first = next((config for config in self._places().values() if config is not None), None)
        return None if first is None else first.milestones
