"""Configs under coremltools' names: which weight is compressed how."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any, TypeAlias

import attrs
from attrs import define, field

from milpress.coreml.op_config import KINDS, OpCompressorConfig
from milpress.errors import ConfigError, ConfigTypeError
from milpress.plain import fields, patterns, yaml

if TYPE_CHECKING:
    from typing_extensions import Self

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
    >>> from milpress.coreml import OpPalettizerConfig, OptimizationConfig
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
        for i, config in enumerate(configs):
            if config != configs[0]:
                raise ConfigError(self.conflict(name, children, 0, i))
        return configs[0] if configs else None

    def configs_for(
        self, name: str, children: Sequence[tuple[str, str]]
    ) -> list[OpCompressorConfig | None]:
        """Return what each of the ops that use a weight has; the weight's own config alone if any.

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
        """Return the error that says that two of the ops that use a weight don't agree."""
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
        """Return the keys that no name of a weight or op, or type of op, answers to."""
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
        """Return what holds for an op, by its name, its type, or for all; ``None`` for nothing."""
        key = self._key_for(name)
        if key is not None:
            return self.op_name_configs[key]
        return self.op_type_configs.get(op_type, self.global_config)

    def op_configs(self) -> list[OpCompressorConfig]:
        """Return all configs that are set."""
        by_type, by_name = self.op_type_configs.values(), self.op_name_configs.values()
        configs = (self.global_config, *by_type, *by_name)
        return [config for config in configs if config is not None]


def advice(names: Sequence[str]) -> str:
    """Return how a config says what holds for weights, whatever the ops that use them have."""
    lines = ", ".join(f"{name!r}: None" for name in names)
    return (
        "The weight must have a config by its own name where these differ: "
        f"op_name_configs={{{lines}}} leaves it, a config in place of None compresses it."
    )


def _kind_named(name: Any, place: str) -> type[OpCompressorConfig]:
    if not isinstance(name, str) or name not in KINDS:
        msg = f"{place} must be one of {', '.join(KINDS)}, got {name!r}"
        raise ConfigError(msg) if isinstance(name, str) else ConfigTypeError(msg)
    return KINDS[name]


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


def _adopted_op(config: Any) -> Any:
    """Return the config of an op as ours; what is none is refused where it is put."""
    kind = KINDS.get(_name_in_coremltools(config) or "")
    if kind is None:
        return config
    names = [attribute.name for attribute in attrs.fields(kind)]  # type: ignore[arg-type]
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
            and kind.__name__ in (*KINDS, OptimizationConfig.__name__)
        ),
        None,
    )
