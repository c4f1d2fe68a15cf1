"""Configs under coremltools' names: how a weight is compressed.

Fields, defaults and error messages are those of ``coremltools.optimize.coreml``; coremltools
itself is not needed. A setting that could only fail later, such as a negative group size, fails
here, and every error is a `ConfigError`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from attrs import define, field
from attrs.validators import optional

from milpress.errors import ConfigError, ConfigTypeError
from milpress.plain import fields

if TYPE_CHECKING:
    from typing_extensions import Self

# As in coremltools, a weight of just this many elements is left.
DEFAULT_WEIGHT_THRESHOLD = 2048
_DEFAULT_BLOCK_SIZE = 32


class CompressionGranularity(Enum):
    """Which part of a weight shares a scale or a lookup table."""

    PER_TENSOR = 1
    PER_GROUPED_CHANNEL = 2
    PER_CHANNEL = 3
    PER_BLOCK = 4


def _to_weight_threshold(value: int | None) -> int:
    return DEFAULT_WEIGHT_THRESHOLD if value is None else fields.whole(value)


def _weight_threshold() -> Any:
    return field(
        default=DEFAULT_WEIGHT_THRESHOLD,
        converter=_to_weight_threshold,
        validator=[
            fields.is_integer,
            fields.check(
                lambda value: value >= 0,
                '"{name}" must be a non-negative integer. Got {value}.',
            ),
        ],
    )


_GRANULARITIES = {granularity.name.lower(): granularity for granularity in CompressionGranularity}


def _to_granularity(value: str | Enum) -> CompressionGranularity:
    # By name, so that coremltools' own enum will do.
    name = value.name.lower() if isinstance(value, Enum) else value
    if not isinstance(name, str) or name not in _GRANULARITIES:
        msg = f"Invalid granularity={value}"
        raise ConfigError(msg)
    return _GRANULARITIES[name]


def _is_granularity(*names: str) -> fields.Validator:
    return fields.one_of(
        tuple(_GRANULARITIES[name] for name in names),
        '"{name}" must be one of {allowed}, but got {value}',
    )


def _number(default: float, check: fields.Validator) -> Any:
    return field(default=default, converter=fields.real, validator=[fields.is_number, check])


def _mode(default: str, modes: Sequence[str], message: str) -> Any:
    valid = [fields.is_text, fields.one_of(modes, message)]
    return field(default=default, converter=fields.upper, validator=valid)


def _to_dtype(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, np.dtype) or (isinstance(value, type) and issubclass(value, np.generic)):
        return str(np.dtype(value))
    if hasattr(value, "get_bitwidth") and hasattr(value, "is_unsigned"):
        # An integer type of coremltools' mil.
        return f"{'u' if value.is_unsigned() else ''}int{value.get_bitwidth()}"
    msg = f"dtype={value!r} is unsupported for OpLinearQuantizerConfig."
    raise ConfigTypeError(msg)


class OpCompressorConfig(ABC):
    """What to do to a weight: the base of the configs of each kind."""

    __slots__ = ()

    @property
    @abstractmethod
    def weight_threshold(self) -> int:
        """Number of elements that a weight must exceed to be compressed."""

    def supports(self, op_type: str, input_name: str = "weight") -> bool:  # noqa: ARG002
        """Whether a weight that feeds this input of an op of this type may be compressed so."""
        return True

    @classmethod
    def _from_dict(cls, config_dict: Mapping[str, Any], place: str | None = None) -> Self:
        return fields.structure(config_dict, cls, place or cls.__name__)


@define
class OpPalettizerConfig(OpCompressorConfig):
    """Replace a weight by indices into a lookup table.

    Parameters
    ----------
    mode
        How the table is made; any case will do, upper case is stored.

        - ``"kmeans"``: the ``2**nbits`` values that are nearest to the weights.
        - ``"uniform"``: ``2**nbits`` values at even steps from the least weight to the greatest.
        - ``"unique"``: the weights' own values, of which there must be 256 at most.
        - ``"custom"``: what ``lut_function`` returns.
    nbits
        Width of an index in bits: 1, 2, 3, 4, 6 or 8. Must be given for ``"kmeans"`` and
        ``"uniform"``, and for no other mode.
    lut_function
        For mode ``"custom"`` alone: takes a weight as an array and returns the table, of
        ``2**n`` values, and an index for each element of the flattened weight.
    granularity
        ``"per_tensor"`` gives a weight one table, ``"per_grouped_channel"`` one to every
        ``group_size`` channels. Stored as a `CompressionGranularity`.
    group_size
        Channels that share a table; 0 for all of them. Unused unless the granularity is
        ``"per_grouped_channel"``.
    channel_axis
        Axis along which channels are grouped; ``None`` takes the output channels as the op that
        uses the weight has them. Unused unless the granularity is ``"per_grouped_channel"``.
    cluster_dim
        Neighbouring channels that one index stands for; the table's entries are vectors of
        that length. At least 1, which makes them numbers.
    enable_per_channel_scale
        Divide each output channel by its greatest magnitude first, and keep that as a scale.
    num_kmeans_workers
        Threads that k-means may use, at least 1.
    weight_threshold
        Weights of more elements than this are compressed; ``None`` stands for 2048.
    on_indivisible
        What to do with a weight whose channels ``group_size`` does not divide: ``"leave"`` it
        uncompressed, or take the greatest ``"divisor"`` of the channels up to ``group_size``, or
        one table where there is none. Not in coremltools, which leaves it.

    Raises
    ------
    ConfigError
        If a setting is not what it must be, or does not go with another.

    Examples
    --------
    >>> OpPalettizerConfig(nbits=4, granularity="per_grouped_channel", group_size=16).mode
    'KMEANS'
    """

    mode: str = _mode(
        "kmeans",
        ("KMEANS", "UNIFORM", "UNIQUE", "CUSTOM"),
        'Only modes {allowed} are supported for weight palettization. Got "mode": "{value}".',
    )
    nbits: int | None = field(default=None, converter=fields.whole)
    lut_function: Callable[..., Any] | None = field(default=None)
    granularity: CompressionGranularity = field(
        default=CompressionGranularity.PER_TENSOR,
        converter=_to_granularity,
        validator=_is_granularity("per_tensor", "per_grouped_channel"),
    )
    group_size: int = fields.integer(32, fields.at_least(0))
    channel_axis: int | None = fields.integer(None)
    cluster_dim: int = fields.integer(1, fields.at_least(1))
    enable_per_channel_scale: bool = field(default=False, validator=fields.is_flag)
    num_kmeans_workers: int = fields.integer(1, fields.at_least(1))
    weight_threshold: int = _weight_threshold()
    on_indivisible: Literal["leave", "divisor"] = fields.choice("leave", "divisor")

    @nbits.validator
    def _check_nbits(self, _attribute: Any, nbits: Any) -> None:
        counted = self.mode in ("KMEANS", "UNIFORM")
        if counted and nbits is None:
            msg = f'"nbits" must be provided for {self.mode} mode'
            raise ConfigError(msg)
        if not counted and nbits is not None:
            msg = f'"nbits" must NOT be provided for {self.mode} mode'
            raise ConfigError(msg)
        valid = (1, 2, 3, 4, 6, 8)
        if counted and (type(nbits) is not int or nbits not in valid):
            msg = (
                f'Invalid value of "nbits" ({nbits}) for palettization. '
                f'Supported "nbits" are {valid}'
            )
            raise ConfigError(msg)

    @lut_function.validator
    def _check_lut_function(self, _attribute: Any, lut_function: Any) -> None:
        custom = self.mode == "CUSTOM"
        if custom and lut_function is None:
            msg = '"lut_function" can not be None, if "mode" is "custom".'
            raise ConfigError(msg)
        if not custom and lut_function is not None:
            msg = '"lut_function" must be None, if "mode" is not "custom".'
            raise ConfigError(msg)
        if custom and not callable(lut_function):
            msg = (
                'A function object must be provided as "lut_function". '
                f'Got a "lut_function" as type {type(lut_function)}'
            )
            raise ConfigTypeError(msg)

    @classmethod
    def _from_dict(cls, config_dict: Mapping[str, Any], place: str | None = None) -> Self:
        fields.check_mapping(config_dict, place or cls.__name__)
        if "lut_function" in config_dict:
            msg = (
                f"{place or cls.__name__}: _from_dict method does not support lut_function. "
                "Please make the OpPalettizerConfig by its constructor."
            )
            raise ConfigError(msg)
        return super()._from_dict(config_dict, place)


def _to_block_size(value: int | Sequence[int] | None) -> int | tuple[int, ...]:
    size: int | tuple[int, ...] = _DEFAULT_BLOCK_SIZE if value is None else fields.wholes(value)
    return size


@define
class OpLinearQuantizerConfig(OpCompressorConfig):
    """Replace a weight by integers, a scale, and maybe an offset.

    Parameters
    ----------
    mode
        ``"linear_symmetric"`` takes the range that is symmetric about zero, ``"linear"`` that from
        the least weight to the greatest, with an offset. Any case will do, upper case is stored.
    dtype
        Type of the integers: ``"int8"``, ``"uint8"``, ``"int4"`` or ``"uint4"``; NumPy's types and
        those of coremltools' mil are taken too. Stored as the name.
    granularity
        What shares a scale: ``"per_tensor"``, ``"per_channel"``, which is an output channel, or
        ``"per_block"``. Stored as a `CompressionGranularity`.
    block_size
        Elements of a block along an axis; unused unless the granularity is ``"per_block"``. One
        integer is the size along the input channels, with 1 along the output channels and the
        whole of any other axis; a list or tuple has one for each axis. 0 stands for the whole
        axis, ``None`` for 32.
    weight_threshold
        Weights of more elements than this are compressed; ``None`` stands for 2048.
    on_indivisible
        What to do with a weight an axis of which the block size does not divide: ``"leave"`` it
        uncompressed, or take the greatest ``"divisor"`` of the axis up to the block size, or all
        of it where there is none. Not in coremltools, which leaves it.
    range
        How the range of the integers is found: ``"minmax"`` takes that of the weights, ``"mse"``
        the one with the least mean squared error, which may clip some. Not in coremltools, which
        takes the former.

    Raises
    ------
    ConfigError
        If a setting is not what it must be.

    Examples
    --------
    >>> config = OpLinearQuantizerConfig(dtype="uint4", granularity="per_block", block_size=16)
    >>> config.nbits, config.signed
    (4, False)
    """

    mode: str = _mode(
        "linear_symmetric",
        ("LINEAR_SYMMETRIC", "LINEAR"),
        'Only mode {allowed} supported for weight affine quantization. Got mode: "{value}".',
    )
    dtype: str = field(
        default="int8",
        converter=_to_dtype,
        validator=fields.one_of(
            ("int8", "uint8", "int4", "uint4"),
            "Invalid dtype {value}. Only support int8/uint8/int4/uint4. "
            "Should be int4/8 or uint4/8, but got {value}",
        ),
    )
    granularity: CompressionGranularity = field(
        default=CompressionGranularity.PER_CHANNEL,
        converter=_to_granularity,
        validator=_is_granularity("per_tensor", "per_channel", "per_block"),
    )
    block_size: int | tuple[int, ...] = field(default=_DEFAULT_BLOCK_SIZE, converter=_to_block_size)
    weight_threshold: int = _weight_threshold()
    on_indivisible: Literal["leave", "divisor"] = fields.choice("leave", "divisor")
    range: Literal["minmax", "mse"] = fields.choice("minmax", "mse")

    @block_size.validator
    def _check_block_size(self, _attribute: Any, block_size: Any) -> None:
        if isinstance(block_size, tuple):
            if not all(type(size) is int and size >= 0 for size in block_size):
                msg = f"All values in block_size must be non-negative values. Got {block_size}."
                raise ConfigError(msg)
        elif type(block_size) is not int:
            msg = f"The block_size should be int or list/tuple of int, but got {type(block_size)}."
            raise ConfigTypeError(msg)
        elif block_size < 0:
            msg = f"The block_size must be non-negative values, but got {block_size}"
            raise ConfigError(msg)

    @property
    def nbits(self) -> int:
        """Width of an integer in bits."""
        return int(self.dtype.removeprefix("u").removeprefix("int"))

    @property
    def signed(self) -> bool:
        """Whether the integers have a sign."""
        return not self.dtype.startswith("u")


@define
class OpMagnitudePrunerConfig(OpCompressorConfig):
    """Make the weights of least magnitude zero, a fixed part of them, and store the others.

    Parameters
    ----------
    target_sparsity
        Fraction of the weights to make zero, from 0 to 1. Either this or ``n_m_ratio`` must be
        given. An integer will do, which coremltools refuses.
    block_size
        Weights along ``dim`` that become zero together, at least 2; ``None`` to look at each by
        itself. Goes with ``target_sparsity`` alone.
    n_m_ratio
        ``(n, m)``: of every ``m`` weights along ``dim``, ``n`` become zero. ``m`` is at least 1 and
        ``n`` from 0 to ``m``.
    dim
        Axis of blocks or of ``n_m_ratio``: 0 for output channels, the default of blocks, 1 for
        input channels, the default of ``n_m_ratio``. ``None`` for the default, and if there is
        neither.
    weight_threshold
        Weights of more elements than this are compressed; ``None`` stands for 2048.

    Raises
    ------
    ConfigError
        If a setting is not what it must be, or does not go with another.

    Notes
    -----
    Blocks and ``n_m_ratio`` are meant for the weights of ``conv`` and ``linear``.

    Examples
    --------
    >>> OpMagnitudePrunerConfig(n_m_ratio=(2, 4)).dim
    1
    """

    target_sparsity: float | None = field(
        default=None,
        converter=fields.real,
        validator=optional([fields.is_number, fields.is_fraction]),
    )
    block_size: int | None = fields.integer(
        None,
        fields.check(lambda value: value > 1, '"{name}" must be an integer > 1. Got {value}.'),
    )
    n_m_ratio: tuple[int, int] | None = field(
        default=None,
        converter=fields.wholes,
        validator=optional(fields.is_a(tuple, "a tuple of two integers")),
    )
    dim: int | None = fields.integer(
        None, fields.check(lambda value: value in (0, 1), '"{name}" must be 1 or 0. Got {value}.')
    )
    weight_threshold: int = _weight_threshold()

    @target_sparsity.validator
    def _check_one_goal(self, _attribute: Any, target_sparsity: Any) -> None:
        if (target_sparsity is None) == (self.n_m_ratio is None):
            msg = (
                'Either "target_sparsity" or "n_m_ratio" need to be set. '
                "They cannot be set at the same time."
            )
            raise ConfigError(msg)

    @block_size.validator
    def _check_block_alone(self, _attribute: Any, block_size: Any) -> None:
        if block_size is not None and self.n_m_ratio is not None:
            msg = '"block_size" and "n_m_ratio" cannot be set at the same time.'
            raise ConfigError(msg)

    @n_m_ratio.validator
    def _check_ratio(self, _attribute: Any, ratio: Any) -> None:
        if ratio is None:
            return
        msg = f'"n_m_ratio" must be a tuple of two integers (n, m). n <= m. Got {ratio}'
        if not all(type(count) is int for count in ratio):
            raise ConfigTypeError(msg)
        if len(ratio) != 2 or not 0 <= ratio[0] <= ratio[1] or ratio[1] < 1:
            raise ConfigError(msg)

    @dim.validator
    def _check_dim_of_something(self, _attribute: Any, dim: Any) -> None:
        if dim is not None and not self.is_structural:
            msg = '"dim" can only be set along with "block_size" or "n_m_ratio".'
            raise ConfigError(msg)

    def __attrs_post_init__(self) -> None:
        if self.dim is None and self.is_structural:
            self.dim = 0 if self.n_m_ratio is None else 1

    @property
    def is_structural(self) -> bool:
        """Whether zeros come in blocks or in a fixed ratio."""
        return self.block_size is not None or self.n_m_ratio is not None

    def supports(self, op_type: str, input_name: str = "weight") -> bool:
        """Whether a weight that feeds this input of an op of this type may be compressed so."""
        return not self.is_structural or (op_type in ("conv", "linear") and input_name == "weight")


@define
class OpThresholdPrunerConfig(OpCompressorConfig):
    """Make weights of small magnitude zero, and store the others.

    Parameters
    ----------
    threshold
        Weights become zero whose magnitude is not above this; finite and not negative. An integer
        will do, which coremltools refuses.
    minimum_sparsity_percentile
        Fraction of zeros, from 0 to 1, below which the weight stays as it is. An integer will do,
        which coremltools refuses.
    weight_threshold
        Weights of more elements than this are compressed; ``None`` stands for 2048.

    Raises
    ------
    ConfigError
        If a setting is not what it must be.

    Examples
    --------
    >>> OpThresholdPrunerConfig(threshold=0.03).minimum_sparsity_percentile
    0.5
    """

    threshold: float = _number(
        1e-12,
        fields.check(
            lambda value: 0 <= value < math.inf,
            'Invalid value of "{name}": {value}. Needs to be in [0, inf)',
        ),
    )
    minimum_sparsity_percentile: float = _number(0.5, fields.is_fraction)
    weight_threshold: int = _weight_threshold()


KINDS: dict[str, type[OpCompressorConfig]] = {
    kind.__name__: kind
    for kind in (
        OpPalettizerConfig,
        OpLinearQuantizerConfig,
        OpMagnitudePrunerConfig,
        OpThresholdPrunerConfig,
    )
}
