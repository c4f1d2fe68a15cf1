"""The bases of all optimizers: a model, a config, a report."""

from __future__ import annotations

import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch

from milpress.errors import ConfigError, ConfigTypeError
from milpress.progress import Progress
from milpress.torch import _lifecycle, _metadata
from milpress.torch._compression import Task
from milpress.torch._modes import copied
from milpress.torch._module_weights import ModuleWeight, others_of, weights_of
from milpress.torch._report import Report
from milpress.torch._substitution import Substitution, ZerosKept, places, plain
from milpress.torch.optimization_config import OptimizationConfig
from milpress.torch.registration import Kinds, registered

__all__ = [
    "BaseDataCalibratedModelOptimizer",
    "BaseModelOptimizer",
    "BasePostTrainingModelOptimizer",
    "BaseTrainingTimeModelOptimizer",
]

_logger = logging.getLogger(__name__)


class BaseModelOptimizer(ABC):
    """Compresses a model as a config says.

    Parameters
    ----------
    model
        The model.
    config
        What to do to which module; ``None`` for the default. coremltools' own config objects are
        taken, too.
    """

    _supported_modules: ClassVar[Kinds] = ()
    _config_class: ClassVar[type[OptimizationConfig]] = OptimizationConfig

    def __init__(self, model: torch.nn.Module, config: OptimizationConfig | None = None) -> None:
        if _is_of_coremltools(config, self._config_class.__name__):
            config = self._config_class.from_dict(config.as_dict())  # type: ignore[union-attr]
        if config is not None and not isinstance(config, self._config_class):
            msg = f"config must be a {self._config_class.__name__}, got {type(config).__name__}"
            raise ConfigTypeError(msg)
        self._source = model
        self._model = model
        self._config: Any = self._config_class() if config is None else config

    @abstractmethod
    def report(self) -> Report:
        """Return what happened to each weight that was asked for."""

    @property
    def supported_modules(self) -> Kinds:
        """The classes of modules whose weights can be compressed."""
        return (*self._supported_modules, *registered())

    def _get_model_for_compression(self, inplace: bool) -> torch.nn.Module:
        return self._source if inplace else copied(self._source)

    def _warn_of_typos(self) -> None:
        for key in self._config.unmatched(self._model.named_modules()):
            _logger.warning("the config names %r, which nothing in the model matches", key)


def _is_of_coremltools(config: Any, name: str) -> bool:
    """Whether an object is of the class of coremltools that has a name."""
    home = "coremltools.optimize.torch."
    return any(
        kind.__name__ == name and kind.__module__.startswith(home) for kind in type(config).__mro__
    )


class _OneShotOptimizer(BaseModelOptimizer):
    """An optimizer that compresses all at once."""

    def __init__(self, model: torch.nn.Module, config: OptimizationConfig | None = None) -> None:
        super().__init__(model, config)
        self._report = Report()

    def report(self) -> Report:
        """Return what `compress` did to each weight that was asked for; nothing before it."""
        return self._report

    def _begin(self, inplace: bool) -> torch.nn.Module:
        self._model = self._get_model_for_compression(inplace)
        self._warn_of_typos()
        return self._model

    def _tasks(self, model: torch.nn.Module) -> list[Task]:
        weights = [w for w in weights_of(model, self._supported_modules) if w.tensor is not None]
        tasks = [Task(weight, self._config_for(weight, model)) for weight in weights]
        return tasks + [
            Task(weight, self._config_for(weight, model), reason)
            for weight, reason in others_of(model, weights)
        ]

    def _config_for(self, weight: ModuleWeight, _model: torch.nn.Module) -> Any:
        return self._config.get_module_config(weight.module_name, weight.module)


class BasePostTrainingModelOptimizer(_OneShotOptimizer):
    """An optimizer that needs no data."""

    def compress(self, *args: Any, inplace: bool = False, **kwargs: Any) -> torch.nn.Module:  # noqa: ARG002
        """Return the model to compress: with ``inplace`` the model itself, else a copy."""
        return self._begin(inplace)


class BaseDataCalibratedModelOptimizer(_OneShotOptimizer):
    """An optimizer that looks at samples."""

    def compress(
        self,
        dataloader: Iterable[Any] | None,  # noqa: ARG002
        *args: Any,  # noqa: ARG002
        inplace: bool = False,
        **kwargs: Any,  # noqa: ARG002
    ) -> torch.nn.Module:
        """Return the model to compress: with ``inplace`` the model itself, else a copy."""
        return self._begin(inplace)


class BaseTrainingTimeModelOptimizer(BaseModelOptimizer):
    """An optimizer that changes how a model computes while it is trained.

    ``prepare`` returns the model to train, ``step`` is called after each step of the training's own
    optimizer, ``finalize`` makes of the trained model one that can be converted.
    """

    _purpose: ClassVar[str]

    def __init__(self, model: torch.nn.Module, config: OptimizationConfig | None = None) -> None:
        super().__init__(model, config)
        self._step_count = 0
        self._has_changed_model = False
        # The weights that the last call of `finalize` has left, and why.
        self._unfinished: dict[str, str] = {}

    @abstractmethod
    def prepare(self, *args: Any, inplace: bool = False, **kwargs: Any) -> torch.nn.Module:
        """Return the model to train: with ``inplace`` the model itself, else a copy."""

    @abstractmethod
    def step(self) -> None:
        """Go one step further in the schedules."""

    @abstractmethod
    def finalize(
        self,
        model: torch.nn.Module | None = None,
        inplace: bool = False,
        *,
        progress: Progress | bool | None = None,
    ) -> torch.nn.Module:
        """Return the trained model in the form that can be converted.

        Parameters
        ----------
        model
            The trained model; ``None`` for the one that ``prepare`` returned. What
            ``torch.compile`` or ``DistributedDataParallel`` made of it is taken, too.
        inplace
            Whether to change that model itself.
        progress
            ``True`` shows a bar; a function is called with elements done (of the pruner: weights),
            how many there are in all and the name of the weight at hand.

        Raises
        ------
        LifecycleError
            If a model is given that is not prepared, or was finalized already. The own model may be
            finalized in place twice: the second time changes nothing.
        """

    def _begin(self, inplace: bool) -> torch.nn.Module:
        """Return the model to prepare, if it may be."""
        _lifecycle.check_joining(self._source, self._purpose, inplace=inplace)
        return self._get_model_for_compression(inplace)

    def _take(self, model: torch.nn.Module) -> torch.nn.Module:
        """Have a model that is prepared as the one to be trained."""
        for weights, host, path in places(model, self._supported_modules):
            hooks = [hook for hook in Substitution.of(host) if hook.path == path]
            substituted = {name for hook in hooks for name in hook.names}
            pruned = [w.parameter_name for w in weights if _metadata.is_pruned(w)]
            names = tuple(name for name in pruned if name not in substituted)
            if names:
                ZerosKept(path, names, self._purpose).attach(host)
        self._model = model
        self._has_changed_model = self._purpose in _lifecycle.purposes(model)
        return model

    @contextlib.contextmanager
    def _finalizing(
        self, model: torch.nn.Module | None, inplace: bool
    ) -> Iterator[torch.nn.Module]:
        """Have the trained model, or a copy, out of its wrappers, to be made what is converted."""
        if model is not None and self._has_changed_model:
            _lifecycle.check_prepared(model, self._purpose)
        model = plain(_lifecycle.latest(self._model) if model is None else model)
        finalized = model if inplace else copied(model)
        for module in finalized.modules():
            for hook in ZerosKept.of(module):
                if hook.purpose == self._purpose:
                    hook.detach(module)
        yield finalized
        _metadata.register_version(finalized)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs beside the state of the model."""
        return {"step_count": self._step_count}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; load the state of the prepared model, too.

        Raises
        ------
        ConfigError
            If it is nothing that `state_dict` returned.
        """
        count = state_dict.get("step_count") if isinstance(state_dict, Mapping) else None
        if type(count) is not int or count < 0:
            msg = f"the state of an optimizer must hold its step_count, got {state_dict!r}"
            raise ConfigError(msg)
        self._step_count = count
