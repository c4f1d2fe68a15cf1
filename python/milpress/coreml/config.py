"""Configs under coremltools' names: what to do to weights, and to which of them.

Fields, defaults and error messages are those of ``coremltools.optimize.coreml``; coremltools
itself is not needed. A setting that could only fail later, such as a negative group size, fails
here, and every error is a `ConfigError`.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from typing import IO, TYPE_CHECKING, Any, Literal, TypeAlias

import attrs
import numpy as np
from attrs import define, field
from attrs.validators import optional

from milpress.errors import ConfigError, ConfigTypeError
from milpress.plain import fields, patterns, yaml

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

    mode: str = field(
        default="kmeans",
        converter=fields.upper,
        validator=[
            fields.is_text,
            fields.one_of(
                ("KMEANS", "UNIFORM", "UNIQUE", "CUSTOM"),
                "Only modes {allowed} are supported for weight palettization. "
                'Got "mode": "{value}".',
            ),
        ],
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

    mode: str = field(
        default="linear_symmetric",
        converter=fields.upper,
        validator=[
            fields.is_text,
            fields.one_of(
                ("LINEAR_SYMMETRIC", "LINEAR"),
                "Only mode {allowed} supported for weight affine quantization. "
                'Got mode: "{value}".',
            ),
        ],
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

    threshold: float = field(
        default=1e-12,
        converter=fields.real,
        validator=[
            fields.is_number,
            fields.check(
                lambda value: 0 <= value < math.inf,
                'Invalid value of "{name}": {value}. Needs to be in [0, inf)',
            ),
        ],
    )
    minimum_sparsity_percentile: float = field(
        default=0.5, converter=fields.real, validator=[fields.is_number, fields.is_fraction]
    )
    weight_threshold: int = _weight_threshold()


_KINDS: dict[str, type[OpCompressorConfig]] = {
    kind.__name__: kind
    for kind in (
        OpPalettizerConfig,
        OpLinearQuantizerConfig,
        OpMagnitudePrunerConfig,
        OpThresholdPrunerConfig,
    )
}

_Configs: TypeAlias = dict[str, OpCompressorConfig | None]


def _check_op_config(config: Any) -> None:
    if config is not None and not isinstance(config, OpCompressorConfig):
        msg = f"config must be type of OpCompressorConfig. Got {type(config)}."
        raise ConfigTypeError(msg)


def _check_for_type(op_type: str, config: Any) -> None:
    _check_op_config(config)
    if config is not None and not config.supports(op_type):
        msg = f"block sparsity or n:m pruning does not support op type {op_type}."
        raise ConfigError(msg)


def _check_for_name(name: str, config: Any) -> None:
    _check_op_config(config)
    patterns.check(name)


def _copied(configs: Mapping[str, OpCompressorConfig | None] | None) -> _Configs:
    return {} if configs is None else dict(configs) if isinstance(configs, Mapping) else configs


def _each(check: Callable[[str, Any], None]) -> fields.Validator:
    def validate(_config: Any, attribute: attrs.Attribute[Any], configs: Any) -> None:
        fields.check_mapping(configs, attribute.name)
        for key, op_config in configs.items():
            check(key, op_config)

    return validate


@define
class OptimizationConfig:
    """Which weight gets which treatment.

    A weight's own name decides, if it has a config; otherwise each op that uses the weight, first
    by its name, then by its type, then by what holds for all. If these ops differ, that is an
    error.

    Parameters
    ----------
    global_config
        For all weights that nothing else is said of; ``None`` leaves them.
    op_type_configs
        Types of ops, such as ``"conv"``, to the config of the weights that they use; ``None``
        leaves these weights. The dictionary is copied.
    op_name_configs
        Names of weights or ops to their config; ``None`` leaves them. A key that begins with
        ``re:`` is a regular expression for the whole name, one with ``glob:`` a shell pattern; a
        name itself comes first, then the first pattern that fits. The dictionary is copied.

    Raises
    ------
    ConfigError
        If a config is none, a pattern can't be read, or a config can't apply to the type of op.

    Examples
    --------
    >>> config = OptimizationConfig(
    ...     global_config=OpPalettizerConfig(nbits=8),
    ...     op_type_configs={"linear": None},
    ...     op_name_configs={"glob:layer1.*": OpPalettizerConfig(nbits=2)},
    ... )
    >>> config.config_for("layer1.weight", [("fc1", "linear")]).nbits
    2
    >>> config.config_for("layer2.weight", [("fc2", "linear")]) is None
    True
    """

    global_config: OpCompressorConfig | None = field(
        default=None, validator=lambda _config, _attribute, value: _check_op_config(value)
    )
    op_type_configs: _Configs = field(
        default=None, converter=_copied, validator=_each(_check_for_type)
    )
    op_name_configs: _Configs = field(
        default=None, converter=_copied, validator=_each(_check_for_name)
    )

    def set_global(self, op_config: OpCompressorConfig | None) -> None:
        """Set the config of all weights that nothing else is said of."""
        self.global_config = op_config

    def set_op_type(self, op_type: str, op_config: OpCompressorConfig | None) -> None:
        """Set the config of the weights that ops of a type use."""
        fields.check_mapping({op_type: op_config}, "op_type_configs")
        _check_for_type(op_type, op_config)
        self.op_type_configs[op_type] = op_config

    def set_op_name(self, op_name: str, op_config: OpCompressorConfig | None) -> None:
        """Set the config of a weight or op by its name, or of all that a pattern fits."""
        fields.check_mapping({op_name: op_config}, "op_name_configs")
        _check_for_name(op_name, op_config)
        self.op_name_configs[op_name] = op_config

    def config_for(
        self, name: str, children: Sequence[tuple[str, str]]
    ) -> OpCompressorConfig | None:
        """Return what to do to a weight; ``None`` is to leave it.

        Parameters
        ----------
        name
            Name of the weight.
        children
            Name and type of each op that uses the weight.

        Raises
        ------
        ConfigError
            If the ops that use the weight have different configs, or there is one for the op type
            ``"const"``.
        """
        configs = self.configs_for(name, children)
        if not configs:
            return None
        for i, config in enumerate(configs):
            if config != configs[0]:
                raise ConfigError(self.conflict(name, children, 0, i))
        return configs[0]

    def configs_for(
        self, name: str, children: Sequence[tuple[str, str]]
    ) -> list[OpCompressorConfig | None]:
        """Return what each of the ops that use a weight has; the weight's own config alone if any.

        Parameters
        ----------
        name, children
            As of `config_for`.

        Raises
        ------
        ConfigError
            If there is a config for the op type ``"const"``.
        """
        key = self._key_for(name)
        if key is not None:
            return [self.op_name_configs[key]]
        if "const" in self.op_type_configs:
            msg = (
                "const ops cannot be set by the `set_op_type` function. Please use `set_global` "
                f"or, for {name!r} alone, `set_op_name`"
            )
            raise ConfigError(msg)
        return [self.config_of_op(*child) for child in children]

    def conflict(self, name: str, children: Sequence[tuple[str, str]], one: int, other: int) -> str:
        """Return the error that says that two of the ops that use a weight don't agree.

        Parameters
        ----------
        name, children
            As of `config_for`.
        one, other
            Places of the two.
        """
        names = [children[i][0] for i in (one, other)]
        configs = [self.config_of_op(*children[i]) for i in (one, other)]
        return (
            f"compression config conflict detected between ops {' and '.join(names)}, which share "
            f"the weight {name}. {names[0]} has config {configs[0]} while {names[1]} has "
            f"{configs[1]}. {advice([name])}"
        )

    def is_explicit(self, name: str) -> bool:
        """Whether a weight has a config by its own name, or a pattern that fits it."""
        return self._key_for(name) is not None

    def unmatched(self, names: Iterable[str], op_types: Iterable[str]) -> list[str]:
        """Return the keys that nothing in a model answers to, such as misspelt ones.

        Parameters
        ----------
        names
            Names of all weights and ops of the model.
        op_types
            Types of all its ops.
        """
        names, op_types = set(names), set(op_types)
        return [key for key in self.op_type_configs if key not in op_types] + [
            key
            for key in self.op_name_configs
            if key not in names and not any(patterns.matches(key, name) for name in names)
        ]

    def check_types(self, *allowed: type[OpCompressorConfig], function: str) -> None:
        """Raise `ConfigError` if a config is of none of the classes that a function can use."""
        for config in self.op_configs():
            if not isinstance(config, allowed):
                types = ", ".join(kind.__name__ for kind in allowed)
                msg = f"{function} only accept {types} type config. Got {type(config).__name__}."
                raise ConfigError(msg)

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any]) -> Self:
        """Build a config from plain dictionaries, which are left as they are.

        Parameters
        ----------
        config_dict
            ``config_type``, the name of the class of the configs, must be given; beside it may be
            ``global_config``, ``op_type_configs`` and ``op_name_configs``, with the fields of the
            configs as dictionaries, or ``None``. A ``config_type`` among the fields of one config
            is for that one alone.

        Raises
        ------
        ConfigError
            If a key is unknown or a value is not what it must be; the place is named.

        Examples
        --------
        >>> config = OptimizationConfig.from_dict(
        ...     {
        ...         "config_type": "OpThresholdPrunerConfig",
        ...         "global_config": {"threshold": 0.01},
        ...         "op_type_configs": {
        ...             "conv": {"config_type": "OpMagnitudePrunerConfig", "n_m_ratio": [3, 4]},
        ...             "linear": None,
        ...         },
        ...     }
        ... )
        >>> config.op_type_configs["conv"].n_m_ratio
        (3, 4)
        """
        fields.check_mapping(config_dict, "an OptimizationConfig object")
        valid_keys = ("config_type", *(attribute.name for attribute in attrs.fields(cls)))
        for key in config_dict:
            if key not in valid_keys:
                msg = (
                    f"Invalid key {key} to construct an OptimizationConfig object. "
                    f"Supported keys are {valid_keys}."
                )
                raise ConfigError(msg)
        kind = config_dict.get("config_type")
        if not isinstance(kind, str):
            msg = f"config_type must be provided with type of string. Got {kind!r}."
            raise ConfigTypeError(msg)
        _kind_named(kind, "config_type")
        levels: dict[str, Any] = {
            "global_config": _structured(config_dict.get("global_config"), kind, "global_config")
        }
        for level in ("op_type_configs", "op_name_configs"):
            settings = config_dict.get(level)
            if settings is not None:
                fields.check_mapping(settings, level)
                levels[level] = {
                    key: _structured(value, kind, f"{level}[{key!r}]")
                    for key, value in settings.items()
                }
        return cls(**levels)

    @classmethod
    def from_yaml(cls, yml: str | os.PathLike[str] | IO[Any]) -> Self:
        """Build a config from a YAML file of the form that `from_dict` takes.

        Parameters
        ----------
        yml
            Path of the file, or the file, opened.

        Raises
        ------
        ConfigError
            If it can't be read, is no YAML, or not of that form.
        """
        return cls.from_dict(yaml.load(yml, "an optimization config"))

    def _key_for(self, name: str) -> str | None:
        if name in self.op_name_configs:
            return name
        return next(
            (
                key
                for key in self.op_name_configs
                if patterns.is_pattern(key) and patterns.matches(key, name)
            ),
            None,
        )

    def config_of_op(self, name: str, op_type: str) -> OpCompressorConfig | None:
        """Return what holds for an op, by its name, its type, or as for all; ``None`` for nothing.

        Parameters
        ----------
        name, op_type
            Name and type of the op.
        """
        key = self._key_for(name)
        if key is not None:
            return self.op_name_configs[key]
        return self.op_type_configs.get(op_type, self.global_config)

    def op_configs(self) -> list[OpCompressorConfig]:
        """Return all configs that are set."""
        found = (
            self.global_config,
            *self.op_type_configs.values(),
            *self.op_name_configs.values(),
        )
        return [config for config in found if config is not None]


def advice(names: Sequence[str]) -> str:
    """Return how a config says what holds for weights, whatever the ops that use them have."""
    lines = ", ".join(f"{name!r}: None" for name in names)
    return (
        "The weight must have a config by its own name where these differ: "
        f"op_name_configs={{{lines}}} leaves it, a config in place of None compresses it."
    )


def _kind_named(name: Any, place: str) -> type[OpCompressorConfig]:
    if not isinstance(name, str) or name not in _KINDS:
        msg = f"{place} must be one of {', '.join(_KINDS)}, got {name!r}"
        raise ConfigError(msg) if isinstance(name, str) else ConfigTypeError(msg)
    return _KINDS[name]


def _structured(settings: Any, kind: str, place: str) -> OpCompressorConfig | None:
    if settings is None:
        return None
    fields.check_mapping(settings, place)
    rest = dict(settings)
    kind = rest.pop("config_type", kind)
    return _kind_named(kind, f"{place}: config_type")._from_dict(rest, place)


def adopted(config: Any) -> OptimizationConfig:
    """Return a config as ours, whether it is ours already or one of coremltools.

    Parameters
    ----------
    config
        An `OptimizationConfig`, or the config of an op, which then holds for all weights; of this
        package or of ``coremltools.optimize.coreml``.

    Raises
    ------
    ConfigError
        If it is something else, or has a setting that coremltools lets pass and can't use.
    """
    if isinstance(config, OptimizationConfig):
        return config
    name = _name_in_coremltools(config)
    if name == OptimizationConfig.__name__:
        return OptimizationConfig(
            global_config=_adopted_op(config.global_config),
            op_type_configs=_adopted_ops(config.op_type_configs),
            op_name_configs=_adopted_ops(config.op_name_configs),
        )
    if isinstance(config, OpCompressorConfig) or name is not None:
        return OptimizationConfig(global_config=_adopted_op(config))
    msg = f"config must be of type OptimizationConfig, got {type(config)}"
    raise ConfigTypeError(msg)


def _adopted_op(config: Any) -> OpCompressorConfig | None:
    kind = _KINDS.get(_name_in_coremltools(config) or "")
    if kind is None:
        # Ours, or refused where it is put.
        given: OpCompressorConfig | None = config
        return given
    fields: Any = attrs.fields(kind)  # type: ignore[arg-type]
    names = [attribute.name for attribute in fields]
    return kind(**{name: getattr(config, name) for name in names if hasattr(config, name)})


def _adopted_ops(configs: Mapping[str, Any]) -> _Configs:
    return {key: _adopted_op(config) for key, config in configs.items()}


def _name_in_coremltools(config: Any) -> str | None:
    """Return the name of the coremltools class that an object is of, if it is one of these."""
    home = "coremltools.optimize.coreml"
    return next(
        (
            kind.__name__
            for kind in type(config).__mro__
            if f"{kind.__module__}.".startswith(f"{home}.")
            and kind.__name__ in (*_KINDS, OptimizationConfig.__name__)
        ),
        None,
    )
