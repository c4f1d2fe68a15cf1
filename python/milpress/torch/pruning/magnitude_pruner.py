"""Pruning by magnitude while a model is trained."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from attrs import define, field
from torch import nn

from milpress.compression.report import WeightReport
from milpress.errors import ConfigError
from milpress.formats import PruneConfig
from milpress.plain import fields
from milpress.progress import Progress, shown
from milpress.recipe import describe
from milpress.torch import _fields, _lifecycle, _metadata
from milpress.torch._left import left_weights, prepared, trained
from milpress.torch._module_weights import ModuleWeight
from milpress.torch._report import Report
from milpress.torch._substitution import Substitution, places, refer
from milpress.torch.base_model_optimizer import BaseTrainingTimeModelOptimizer
from milpress.torch.optimization_config import ModuleOptimizationConfig, OptimizationConfig
from milpress.torch.pruning import _masks
from milpress.torch.pruning.pruning_scheduler import (
    ConstantSparsityScheduler,
    is_scheduler,
    to_scheduler,
)
from milpress.torch.registration import KINDS

__all__ = ["MagnitudePruner", "MagnitudePrunerConfig", "ModuleMagnitudePrunerConfig"]

_logger = logging.getLogger(__name__)


@define
class ModuleMagnitudePrunerConfig(ModuleOptimizationConfig):
    """How `MagnitudePruner` prunes the weights of a module.

    Parameters
    ----------
    scheduler
        How the sparsity grows; by default it is the target from the first step on. A dictionary of
        the fields of a schedule makes one.
    initial_sparsity, target_sparsity
        Fraction of elements that are zero at the beginning and at the end. The number is rounded
        down.
    granularity
        What is zero as a whole: ``"per_scalar"``, an element; ``"per_kernel"``, what one output
        channel of a convolution has for one input channel; ``"per_channel"``, an output channel of
        a convolution. Those of the least Euclidean norm go first. Weights of two dimensions are
        pruned by element.
    block_size
        Neighbouring output channels that become zero together.
    n_m_ratio
        ``(n, m)``: of each ``m`` neighbours the ``n`` of least magnitude are zero, in the end;
        ``target_sparsity`` is not looked at then.
    dim
        Axis of those neighbours: 1 for input channels, 0 for output channels.
    param_name
        The parameter. Those of attention go by the name of ``"weight"``.

    Raises
    ------
    ConfigError
        If a setting is not what it must be, or does not go with another.

    Examples
    --------
    >>> config = ModuleMagnitudePrunerConfig(
    ...     scheduler={"update_steps": "range(0, 100, 10)"}, target_sparsity=0.75
    ... )
    >>> config.scheduler.power
    3
    """

    scheduler: Any = field(
        factory=lambda: ConstantSparsityScheduler(begin_step=0),
        converter=to_scheduler,
        validator=is_scheduler,
    )
    initial_sparsity: float = _fields.number(0.0, fields.is_fraction)
    target_sparsity: float = _fields.number(0.5, fields.is_fraction)
    granularity: Literal["per_scalar", "per_kernel", "per_channel"] = _fields.word(
        "per_scalar", "per_kernel", "per_channel"
    )
    block_size: int = fields.integer(1, fields.at_least(1))
    n_m_ratio: tuple[int, int] | None = _fields.ratio()
    dim: int = _fields.option(1, (0, 1))
    param_name: str = field(default="weight", validator=fields.is_text)

    @n_m_ratio.validator
    def _check_ratio_alone(self, _attribute: Any, n_m: Any) -> None:
        if n_m is None:
            return
        if self.block_size > 1:
            msg = f"block_size must be 1 where n_m_ratio is given, got {self.block_size}"
            raise ConfigError(msg)
        if self.granularity != "per_scalar":
            msg = f"granularity must be per_scalar where n_m_ratio is given, got {self.granularity}"
            raise ConfigError(msg)

    @property
    def resolved(self) -> ModuleMagnitudePrunerConfig:
        """The same with the target sparsity that ``n_m_ratio`` stands for."""
        config = copy.copy(self)
        if self.n_m_ratio is not None:
            config.target_sparsity = self.n_m_ratio[0] / self.n_m_ratio[1]
        return config


@define
class MagnitudePrunerConfig(OptimizationConfig):
    """Which module `MagnitudePruner` prunes how; see `OptimizationConfig`.

    Examples
    --------
    >>> config = MagnitudePrunerConfig.from_dict({"global_config": {"target_sparsity": 0.75}})
    >>> config.global_config.target_sparsity
    0.75
    """

    module_config_class = ModuleMagnitudePrunerConfig


class PruningMethod(Substitution):
    """Multiplies weights of a module by masks.

    The state has the names of ``torch.nn.utils.prune``: a parameter ``weight_orig``, and buffers
    ``weight_mask`` and ``weight_amount``, the sparsity that the mask was made for.
    """

    purpose = _lifecycle.PRUNING

    def __init__(self, path: str, names: tuple[str, ...], config: Any) -> None:
        super().__init__(path, names)
        self.config = config

    def substitute(self, owner: nn.Module, name: str) -> torch.Tensor:
        """Return a weight times its mask."""
        orig, mask = owner.get_parameter(f"{name}_orig"), owner.get_buffer(f"{name}_mask")
        return orig * mask.to(orig.dtype)

    def after(self, host: nn.Module, _args: Any, _output: Any) -> None:
        """Leave the product for others to see, without its history, which can't be copied."""
        self.refresh(host.get_submodule(self.path))

    def install(self, weight: ModuleWeight, host: nn.Module) -> None:
        """Give a module masks, and let it compute with them."""
        owner = weight.module
        for name in self.names:
            orig = owner._parameters.pop(name)
            owner.register_parameter(f"{name}_orig", orig)
            owner.register_buffer(f"{name}_mask", torch.ones(()))
            owner.register_buffer(f"{name}_amount", torch.tensor(0.0))
        object.__setattr__(owner, "pruning_method", self)
        owner.register_load_state_dict_pre_hook(_loading)  # type: ignore[no-untyped-call]
        owner.register_load_state_dict_post_hook(_loaded)  # type: ignore[no-untyped-call]
        self.attach(host, first=True)
        self.update(weight, self.config.initial_sparsity, anew=True)

    @torch.no_grad()
    def update(self, weight: ModuleWeight, sparsity: float, *, anew: bool = False) -> None:
        """Make masks for a sparsity, unless they are for that already."""
        for name in self.names:
            amount = weight.module.get_buffer(f"{name}_amount")
            if not anew and np.float32(sparsity) == amount.item():
                continue
            orig = weight.module.get_parameter(f"{name}_orig")
            mask = _masks.mask_of(weight, orig, self.config, sparsity)
            before = weight.module.get_buffer(f"{name}_mask")
            if before.shape == mask.shape:
                before.copy_(mask)  # in place: DistributedDataParallel keeps references
            else:
                weight.module.register_buffer(f"{name}_mask", mask)
            amount.fill_(sparsity)
        self.refresh(weight.module)

    @torch.no_grad()
    def refresh(self, owner: nn.Module) -> None:
        """Show the products of weights and masks."""
        for name in self.names:
            object.__setattr__(owner, name, self.substitute(owner, name).detach())
        refer(owner)

    @torch.no_grad()
    def adopt(self, owner: nn.Module, state: dict[str, Any], prefix: str) -> None:
        """Make of the state of a module that is not pruned one that is, with masks for it."""
        for name in self.names:
            own = [prefix + name + ending for ending in ("_orig", "_mask", "_amount")]
            if prefix + name not in state or any(key in state for key in own):
                continue
            orig = state.pop(prefix + name)
            mask, amount = owner.get_buffer(f"{name}_mask"), owner.get_buffer(f"{name}_amount")
            if orig.shape == owner.get_parameter(f"{name}_orig").shape:
                weight = ModuleWeight("", owner, name)
                mask = _masks.mask_of(weight, orig, self.config, amount.item())
            state.update(zip(own, (orig, mask, amount), strict=True))

    @torch.no_grad()
    def _give_back(self, owner: nn.Module, name: str) -> None:
        object.__delattr__(owner, name)
        orig = owner.get_parameter(f"{name}_orig")
        orig.copy_(self.substitute(owner, name))
        owner.register_parameter(name, orig)
        refer(owner)

    @contextlib.contextmanager
    def lifted(self, owner: nn.Module) -> Iterator[None]:
        """Give the weights back to their module, zeros and all, for the time of a block."""
        for name in self.names:
            self._give_back(owner, name)
        yield
        for name in self.names:
            del owner._parameters[name]
        self.refresh(owner)

    @torch.no_grad()
    def remove(self, weight: ModuleWeight, host: nn.Module) -> None:
        """Give the weights back to their module, multiplied by their masks."""
        owner = weight.module
        self.detach(host)
        for name in self.names:
            self._give_back(owner, name)
            del owner._parameters[f"{name}_orig"]
            del owner._buffers[f"{name}_mask"], owner._buffers[f"{name}_amount"]
            _metadata.register_pruning(ModuleWeight(weight.module_name, owner, name))
        hooks: Any
        for hooks in (owner._load_state_dict_pre_hooks, owner._load_state_dict_post_hooks):
            for key, hook in list(hooks.items()):
                if getattr(hook, "hook", hook) in (_loading, _loaded):
                    del hooks[key]
        del owner.pruning_method


def _loading(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    method = getattr(module, "pruning_method", None)
    if isinstance(method, PruningMethod):
        method.adopt(module, state, prefix)


def _loaded(module: nn.Module, _keys: Any) -> None:
    method = getattr(module, "pruning_method", None)
    if isinstance(method, PruningMethod):
        method.refresh(module)


@dataclass(slots=True)
class _Pruned:
    """A module that is pruned, and the fraction of its weights that is zero."""

    weight: ModuleWeight
    method: PruningMethod
    sparsity_level: float


class MagnitudePruner(BaseTrainingTimeModelOptimizer):
    """Sets the weights of least magnitude to zero while a model is trained.

    Parameters
    ----------
    model, config
        The model, and what to do to which module; by default half of the elements of each weight
        become zero at the first step.

    Examples
    --------
    >>> pruner = MagnitudePruner(torch.nn.Linear(4, 4))
    >>> model = pruner.prepare()
    >>> pruner.step()
    >>> int((pruner.finalize().weight == 0).sum())
    8
    """

    _supported_modules = KINDS
    _config_class = MagnitudePrunerConfig
    _purpose = _lifecycle.PRUNING

    def __init__(self, model: nn.Module, config: OptimizationConfig | None = None) -> None:
        super().__init__(model, config)
        self._pruner_info: dict[str, _Pruned] = {}

    def prepare(self, inplace: bool = False) -> nn.Module:  # type: ignore[override]
        """Give the weights masks; a second call changes nothing.

        Parameters
        ----------
        inplace
            Whether to change the model itself.

        Returns
        -------
        torch.nn.Module
            The model, or a copy of it, to be trained. Its modules keep their classes; the parameter
            to train is ``weight_orig``.

        Raises
        ------
        LifecycleError
            If the model is prepared for palettization or quantization and ``inplace`` is not set:
            both must work on the same model. If it is prepared for pruning, or a weight is
            compressed already.
        """
        if self._pruner_info:
            _logger.warning("the model has been prepared for pruning already: nothing is changed")
            return self._model
        self._model = self._begin(inplace)
        self._warn_of_typos()
        asked = [
            (weights, host, path, config)
            for weights, host, path in places(self._model, self._supported_modules)
            if (config := self._config_of(weights[0])) is not None
        ]
        for weights, *_ in asked:
            _lifecycle.check_unclaimed(weights, self._purpose)
        for weights, host, path, config in asked:
            weight = weights[0]
            names = tuple(weight.parameter_name for weight in weights)
            if config.param_name != "weight":
                names = (config.param_name,)
            if any(weight.module._parameters.get(name) is None for name in names):
                _logger.warning("%s: has no parameter %s", weight.module_name, names[0])
                continue
            method = PruningMethod(path, names, config.resolved)
            method.install(weight, host)
            pruned = _Pruned(weight, method, config.initial_sparsity)
            self._pruner_info[weight.module_name] = pruned
        return self._take(self._model)

    def _config_of(self, weight: ModuleWeight) -> Any:
        return self._config.get_module_config(weight.module_name, weight.module)

    def step(self) -> None:
        """Go one step further in the schedules, and make new masks where the sparsity changes."""
        if not self._pruner_info:
            _logger.warning("prepare must be called before step: nothing is changed")
            return
        self._step_count += 1
        for pruned in self._pruner_info.values():
            config = pruned.method.config
            sparsity = config.scheduler.compute_sparsity(
                self._step_count, prev_sparsity=pruned.sparsity_level, config=config
            )
            if not 0 <= sparsity <= 1:
                msg = f"{pruned.weight.module_name}: a sparsity must be from 0 to 1, got {sparsity}"
                raise ConfigError(msg)
            if hasattr(pruned.weight.module, "pruning_method"):
                pruned.method.update(pruned.weight, sparsity)
            pruned.sparsity_level = sparsity

    def finalize(
        self,
        model: nn.Module | None = None,
        inplace: bool = False,
        *,
        progress: Progress | bool | None = None,
    ) -> nn.Module:
        """Multiply the weights by their masks for good, and say so in the buffers of the modules.

        Parameters
        ----------
        model, inplace, progress
            As of `BaseTrainingTimeModelOptimizer.finalize`.

        Returns
        -------
        torch.nn.Module
            The model, or a copy of it.

        Raises
        ------
        LifecycleError
            If the model is still prepared for palettization or quantization: that is to be
            finalized first. If it is not prepared for pruning.
        """
        _lifecycle.check_last(self._model if model is None else model, self._purpose)
        with self._finalizing(model, inplace) as finalized, shown(progress) as note:
            held = places(finalized, self._supported_modules)
            for i, (weights, host, _) in enumerate(held):
                note(i, len(held), weights[0].name)
                method = getattr(weights[0].module, "pruning_method", None)
                if isinstance(method, PruningMethod):
                    method.remove(weights[0], host)
            note(len(held), len(held), "")
        return finalized

    def load_state_dict(self, state_dict: Any) -> None:
        """Go on from a checkpoint, after the state of the prepared model was loaded.

        Raises
        ------
        ConfigError
            If it is nothing that `state_dict` returned.
        """
        super().load_state_dict(state_dict)
        for pruned in self._pruner_info.values():
            name = pruned.method.names[0]
            pruned.sparsity_level = float(pruned.weight.module.get_buffer(f"{name}_amount").item())

    def report(self) -> Report:
        """Return the sparsity of each module that is prepared, and of all together as ``global``.

        The columns are ``#params`` and the fractions of elements, of output channels, and of pairs
        of elements of two neighbouring output channels that are zero:
        ``unstructured_weight_sparsity``, ``structured_weight_sparsity``,
        ``block2_weight_sparsity``; -1 where a channel has no neighbour. ``left`` has the weights
        that are not pruned though they are asked for, and why.
        """
        rows: dict[str, dict[str, Any]] = {}
        reports: dict[int, WeightReport] = {}
        for name, pruned in self._pruner_info.items():
            module, method = pruned.weight.module, pruned.method
            if hasattr(module, "pruning_method"):
                weights = [method.substitute(module, n).detach() for n in method.names]
                rows[name] = _sparsities(weights, pruned.weight.axes[0])
                for own_name, values in zip(method.names, weights, strict=True):
                    weight = ModuleWeight(name, module, own_name)
                    report = _prepared(weight, values, method.config)
                    reports.setdefault(id(trained(weight)), report)
        rows["global"] = _overall(list(rows.values()))
        left = left_weights(self._model, set(reports), self._is_asked, {})
        return Report(rows, [*reports.values(), *left])

    def _is_asked(self, weight: ModuleWeight) -> bool:
        config = self._config_of(weight)
        return config is not None and config.param_name in ("weight", weight.parameter_name)


def _prepared(weight: ModuleWeight, values: torch.Tensor, config: Any) -> WeightReport:
    """Return the report of a weight of which the values that are not zero are stored."""
    n_zeros = int((values == 0).sum())
    treatment = PruneConfig(sparsity=n_zeros / max(values.numel(), 1))
    if config.n_m_ratio is not None:
        treatment = PruneConfig(n_m=config.n_m_ratio)
    n_bytes = (values.numel() - n_zeros) * values.dtype.itemsize + math.ceil(values.numel() / 8)
    return prepared(weight, describe(treatment), n_bytes)


def kept_of(weight: ModuleWeight) -> torch.Tensor | None:
    """Return 0 where a weight is pruned, while it is trained or for good, else 1, in its shape."""
    values = getattr(weight.module, weight.parameter_name).detach()
    mask = weight.module._buffers.get(f"{weight.parameter_name}_mask")
    if mask is not None:
        return mask.expand(values.shape)
    return values.ne(0).to(values.dtype) if _metadata.is_pruned(weight) else None


@contextlib.contextmanager
def masks_lifted(model: nn.Module) -> Iterator[None]:
    """Give the weights that are pruned back to their modules for the time of a block."""
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            method = getattr(module, "pruning_method", None)
            if isinstance(method, PruningMethod):
                stack.enter_context(method.lifted(module))
        yield


_SPARSITIES = (
    "structured_weight_sparsity",
    "unstructured_weight_sparsity",
    "block2_weight_sparsity",
)


def _sparsities(weights: list[torch.Tensor], output: int) -> dict[str, Any]:
    whole, pairs = [], []
    for weight in weights:
        channels = weight.movedim(output, 0) if weight.ndim > 1 else weight
        zero = channels.reshape(len(channels), -1).eq(0)
        whole.append(zero.all(dim=1))
        if len(zero) % 2 == 0:
            pairs.append(zero.reshape(len(zero) // 2, 2, -1).all(dim=1).reshape(-1))
    elements = torch.cat([weight.eq(0).reshape(-1) for weight in weights])
    zeros = (torch.cat(whole), elements, torch.cat(pairs) if pairs else None)
    return {
        "#params": elements.numel(),
        **{
            key: -1 if zero is None else float(zero.float().mean())
            for key, zero in zip(_SPARSITIES, zeros, strict=True)
        },
    }


def _overall(rows: list[dict[str, Any]]) -> dict[str, Any]:
    row_of_all: dict[str, Any] = {"#params": sum(row["#params"] for row in rows)}
    for key in _SPARSITIES:
        counted = [row for row in rows if row[key] >= 0]
        size = sum(row["#params"] for row in counted)
        row_of_all[key] = sum(row["#params"] * row[key] for row in counted) / size if size else -1
    return row_of_all
