"""Which module gets which treatment: the bases of all configs.

Fields, defaults and precedence are those of ``coremltools.optimize.torch``. A setting that could
only fail later fails here, and every error is a `ConfigError`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import IO, TYPE_CHECKING, Any, ClassVar

import attrs
import torch
from attrs import define, field

from milpress.errors import ConfigError, ConfigTypeError
from milpress.plain import fields, patterns, yaml

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "ModuleOptimizationConfig",
    "OptimizationConfig",
    "PalettizationGranularity",
    "QuantizationGranularity",
]


class QuantizationGranularity(Enum):
    """Which part of a weight shares a scale."""

    per_tensor = "per_tensor"
    per_channel = "per_channel"
    per_block = "per_block"


class PalettizationGranularity(Enum):
    """Which part of a weight shares a lookup table."""

    per_tensor = "per_tensor"
    per_grouped_channel = "per_grouped_channel"


class _Dictable:
    """To and from dictionaries and YAML."""

    __slots__ = ()

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any]) -> Self:
        """Make a config from a dictionary of its fields.

        Raises
        ------
        ConfigError
            If a key is unknown or a value is not what it must be.
        """
        return cls._from_dict(config_dict, cls.__name__)

    @classmethod
    def from_yaml(cls, yml: str | os.PathLike[str] | IO[Any]) -> Self:
        """Make a config from a YAML file, given by path or opened; an empty one gives the default.

        Raises
        ------
        ConfigError
            If it can't be read, is no YAML, or not of the form that `from_dict` takes.
        """
        settings = yaml.load(yml, "an optimization config")
        return cls.from_dict({} if settings is None else settings)

    def as_dict(self) -> dict[str, Any]:
        """Return the config as a dictionary that `from_dict` takes."""
        settings: dict[str, Any] = attrs.asdict(self)  # type: ignore[arg-type]
        return settings

    @classmethod
    def _from_dict(cls, config_dict: Mapping[str, Any], place: str) -> Self:
        fields.check_mapping(config_dict, place)
        known = [attribute.name for attribute in attrs.fields(cls)]  # type: ignore[arg-type]
        for key in config_dict:
            if key not in known:
                msg = (
                    f"{place}: Found unrecognized key {key} in config_dict: {dict(config_dict)}. "
                    f"A key must be one of {known}."
                )
                raise ConfigError(msg)
        return fields.structure(config_dict, cls, place)


class ModuleOptimizationConfig(_Dictable):
    """What to do to the weights of a module: the base of the configs of each kind."""

    __slots__ = ()


def _check_module_config(config: OptimizationConfig, place: str, value: Any) -> None:
    kind = config.module_config_class
    several = config.takes_lists and isinstance(value, list)
    for item in value if several else [value]:
        if item is not None and not isinstance(item, kind):
            msg = f"{place} must be a {kind.__name__} or None, got {value!r}"
            raise ConfigTypeError(msg)


def _check_type_key(key: Any) -> None:
    if not (isinstance(key, str) or callable(key)):
        msg = f"a key of module_type_configs must be a class or its name, got {key!r}"
        raise ConfigTypeError(msg)


def _check_name_key(key: Any) -> None:
    if not isinstance(key, str):
        msg = f"a key of module_name_configs must be text, got {key!r}"
        raise ConfigTypeError(msg)
    patterns.check(f"re:{key}")


def _each_config(check_key: Any) -> fields.Validator:
    def validate(config: Any, attribute: attrs.Attribute[Any], configs: Any) -> None:
        if not isinstance(configs, Mapping):
            msg = f"{attribute.name} must be a dictionary, got {configs!r}"
            raise ConfigTypeError(msg)
        for key, value in configs.items():
            check_key(key)
            _check_module_config(config, f"{attribute.name}[{key!r}]", value)

    return validate


def _by_class(key: Any) -> Any:
    """Return the class of ``torch.nn`` that a name stands for; other keys are their own."""
    kind = getattr(torch.nn, key, None) if isinstance(key, str) else None
    return kind if isinstance(kind, type) else key


def _copied(configs: Any) -> Any:
    return dict(configs) if isinstance(configs, Mapping) else {} if configs is None else configs


def _copied_by_class(configs: Any) -> Any:
    copy = _copied(configs)
    return {_by_class(key): value for key, value in copy.items()} if configs else copy


@define
class OptimizationConfig(_Dictable):
    """Which module gets which treatment.

    The first of these decides that says something of a module: its name, its type, the global
    config. ``None`` leaves its weights. If nothing at all is said, the default holds for all.

    Parameters
    ----------
    global_config
        For all modules that nothing else is said of.
    module_type_configs
        Classes, such as ``torch.nn.Linear``, or their names, to the config of their instances; the
        class must be just that, not a base.
    module_name_configs
        Names of modules, as `torch.nn.Module.get_submodule` takes them, to their config. A key is a
        regular expression for the whole name; the first that fits decides.

    Raises
    ------
    ConfigError
        If a value is no config of the right class, or a name can't be read.
    """

    module_config_class: ClassVar[type[ModuleOptimizationConfig]] = ModuleOptimizationConfig
    # Whether a list of configs may stand for one.
    takes_lists: ClassVar[bool] = False

    global_config: Any = field(
        default=None,
        validator=lambda config, attribute, value: _check_module_config(
            config, attribute.name, value
        ),
    )
    module_type_configs: dict[Any, Any] = field(
        factory=dict, converter=_copied_by_class, validator=_each_config(_check_type_key)
    )
    module_name_configs: dict[Any, Any] = field(
        factory=dict, converter=_copied, validator=_each_config(_check_name_key)
    )

    def __attrs_post_init__(self) -> None:
        if not (self.global_config or self.module_type_configs or self.module_name_configs):
            self._set_default()
        self._check_together()

    def _set_default(self) -> None:
        """Say what holds if nothing is said."""
        if self.module_config_class is not ModuleOptimizationConfig:
            self.global_config = self.module_config_class()

    def set_global(self, global_config: Any) -> Self:
        """Set the config of all modules that nothing else is said of; return the whole config."""
        self.global_config = global_config
        self._check_together()
        return self

    def set_module_type(self, object_type: Any, opt_config: Any) -> Self:
        """Set the config of the modules of a class; return the whole config."""
        _check_type_key(object_type)
        _check_module_config(self, f"module_type_configs[{object_type!r}]", opt_config)
        self.module_type_configs[_by_class(object_type)] = opt_config
        self._check_together()
        return self

    def set_module_name(self, module_name: str, opt_config: Any) -> Self:
        """Set the config of the modules that a name fits; return the whole config."""
        _check_name_key(module_name)
        _check_module_config(self, f"module_name_configs[{module_name!r}]", opt_config)
        self.module_name_configs[module_name] = opt_config
        self._check_together()
        return self

    def get_module_config(self, name: str, module: torch.nn.Module) -> Any:
        """Return what to do to the weights of a module; ``None`` is to leave them."""
        for key, config in self.module_name_configs.items():
            if patterns.matches(f"re:{key}", name):
                return config
        for key in (type(module), type(module).__name__):
            if key in self.module_type_configs:
                return self.module_type_configs[key]
        return self.global_config

    def is_named(self, name: str) -> bool:
        """Whether a module has a config by its name."""
        return any(patterns.matches(f"re:{key}", name) for key in self.module_name_configs)

    def unmatched(self, modules: Iterable[tuple[str, torch.nn.Module]]) -> list[str]:
        """Return the keys that no module of a model answers to, such as misspelt ones."""
        names, kinds = [], set()
        for name, module in modules:
            names.append(name)
            kinds |= {type(module), type(module).__name__}
        return [
            getattr(key, "__name__", str(key))
            for key in self.module_type_configs
            if key not in kinds
        ] + [
            key
            for key in self.module_name_configs
            if not any(patterns.matches(f"re:{key}", name) for name in names)
        ]

    @classmethod
    def _from_dict(cls, config_dict: Mapping[str, Any], place: str) -> Self:
        fields.check_mapping(config_dict, place)
        settings = dict(config_dict)
        if "global_config" in settings:
            settings["global_config"] = cls._module_config(
                settings["global_config"], f"{place}: global_config"
            )
        for level in ("module_type_configs", "module_name_configs"):
            if isinstance(settings.get(level), Mapping):
                settings[level] = {
                    key: cls._module_config(value, f"{place}: {level}[{key!r}]")
                    for key, value in settings[level].items()
                }
        return super()._from_dict(settings, place)

    @classmethod
    def _module_config(cls, settings: Any, place: str) -> Any:
        if settings is None or isinstance(settings, ModuleOptimizationConfig):
            return settings
        if cls.takes_lists and isinstance(settings, list):
            return [cls._module_config(item, f"{place}[{i}]") for i, item in enumerate(settings)]
        return cls.module_config_class._from_dict(settings, place)

    def _places(self) -> dict[str, Any]:
        """Return the configs of modules by their places."""
        return {
            "global_config": self.global_config,
            **{f"module_type_configs[{k!r}]": v for k, v in self.module_type_configs.items()},
            **{f"module_name_configs[{k!r}]": v for k, v in self.module_name_configs.items()},
        }

    def _check_together(self) -> None:
        """Raise `ConfigError` if the configs of modules don't go together."""

    def _check_same(self, field_name: str) -> None:
        """Raise `ConfigError` if a field differs between the configs of modules."""
        values = {
            place: getattr(config, field_name)
            for place, config in self._places().items()
            if config is not None
        }
        for place, value in values.items():
            first = next(iter(values.values()))
            if value != first:
                msg = (
                    f"Value of parameter {field_name} cannot be different between different module "
                    f"level configs. Expected value: {first}, received: {value} for config {place}."
                )
                raise ConfigError(msg)
