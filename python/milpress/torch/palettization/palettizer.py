"""Palettization while a model is trained."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from milpress.compression.report import WeightReport
from milpress.errors import UnsupportedError
from milpress.progress import Progress
from milpress.recipe import describe
from milpress.torch import _lifecycle
from milpress.torch._compression import WeightOutcome, compress_faked
from milpress.torch._left import left_weights, prepared, trained
from milpress.torch._module_weights import ModuleWeight, attention_around, weights_of
from milpress.torch._report import Report
from milpress.torch._substitution import Substitution, places
from milpress.torch.base_model_optimizer import BaseTrainingTimeModelOptimizer
from milpress.torch.optimization_config import OptimizationConfig
from milpress.torch.palettization.fake_palettize import FakePalettize
from milpress.torch.palettization.palettization_config import DKMPalettizerConfig
from milpress.torch.pruning.magnitude_pruner import kept_of, masks_lifted
from milpress.torch.registration import KINDS

__all__ = ["DKMPalettizer"]

_logger = logging.getLogger(__name__)


class _Palettized(Substitution):
    """Lets a module compute with what its `FakePalettize` layers make of its weights."""

    purpose = _lifecycle.PALETTIZATION

    def substitute(self, owner: nn.Module, name: str) -> torch.Tensor:
        """Return what a module is to compute with instead of one of its weights."""
        fake = getattr(owner, f"{name}_fake_quant")
        mixture: torch.Tensor = fake(*self.original(owner, name))
        return mixture


class DKMPalettizer(BaseTrainingTimeModelOptimizer):
    """Palettizes a model while it is trained, by differentiable k-means.

    In each pass of training a weight is a mixture of the entries of its table, weighted by how near
    they are, and both weight and entries learn (Cho et al. 2021, arXiv 2108.12659).

    Parameters
    ----------
    model, config
        The model, and what to do to which module; by default 4 bits for linear layers and 2 for
        convolutions, embeddings and attention, where they have more than 2048 elements.

    Examples
    --------
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    >>> palettizer = DKMPalettizer(model, DKMPalettizerConfig.from_dict(
    ...     {"global_config": {"n_bits": 2}}))
    >>> model = palettizer.prepare()
    >>> _ = model(torch.zeros(1, 64))  # and train it
    >>> palettizer.step()
    >>> palettizer.finalize()[0].weight.unique().numel()
    4
    """

    _supported_modules = (*KINDS, nn.LayerNorm)
    _config_class = DKMPalettizerConfig
    _purpose = _lifecycle.PALETTIZATION

    def __init__(self, model: nn.Module, config: OptimizationConfig | None = None) -> None:
        super().__init__(model, config)
        self._milestones: list[tuple[FakePalettize, int]] = []
        self.left: dict[str, str] = {}

    def prepare(self, inplace: bool = False) -> nn.Module:  # type: ignore[override]
        """Insert `FakePalettize` layers; a second call changes nothing.

        Parameters
        ----------
        inplace
            Whether to change the model itself.

        Returns
        -------
        torch.nn.Module
            The model, or a copy of it, in training mode. Its modules keep their classes and
            parameters; those that are palettized have a layer ``weight_fake_quant``.

        Raises
        ------
        LifecycleError
            If the model is prepared for pruning: palettization is to be prepared first. If it is
            prepared for quantization, and ``inplace`` is not set or a weight is asked for that is
            quantized.
        """
        if self._milestones:
            _logger.warning("the model has been prepared already: nothing is changed")
            return self._model
        self._model = self._begin(inplace)
        if not self._config.is_default:
            self._warn_of_typos()
        asked = [
            (chosen, host, path)
            for weights, host, path in places(self._model, self._supported_modules)
            if (chosen := self._chosen(weights))
        ]
        for chosen, *_ in asked:
            _lifecycle.check_unclaimed([weight for weight, _ in chosen], self._purpose)
        fakes: dict[int, FakePalettize] = {}
        for chosen, host, path in asked:
            names = []
            for weight, config in chosen:
                if weight.tensor is None:
                    continue
                try:
                    fake = fakes.get(id(weight.tensor)) or FakePalettize(weight, config)
                except UnsupportedError as error:
                    self.left[weight.name] = str(error)
                    _logger.warning("%s: %s. Left as it is.", weight.name, error)
                    continue
                fakes[id(weight.tensor)] = fake
                fake.enable_fake_palett(config.milestone == 0)
                fake.to(weight.tensor.device)
                weight.module.register_module(f"{weight.parameter_name}_fake_quant", fake)
                self._milestones.append((fake, config.milestone))
                names.append(weight.parameter_name)
            if names:
                _Palettized(path, tuple(names)).attach(host)
        return self._take(self._model.train())

    def _configs(self, weight: ModuleWeight) -> list[Any]:
        """Return the configs for a module, of which its size chooses one."""
        name, module = weight.module_name, weight.module
        config = self._config.get_module_config(name, module)
        attention = attention_around(self._model, name)
        if attention and config is None and not self._config.is_named(name):
            # Attention as a whole has one config, unless its projection is named by itself.
            config = self._config.get_module_config(*attention)
        return config if isinstance(config, list) else [] if config is None else [config]

    def _chosen(self, weights: list[ModuleWeight]) -> list[tuple[ModuleWeight, Any]]:
        """Return the weights of a module to palettize, and their configs.

        Of a list of configs it is that of the greatest threshold exceeded. The weights of attention
        go together.
        """
        configs = self._configs(weights[0])
        sizes = [weight.size for weight in weights]
        if isinstance(weights[0].module, nn.MultiheadAttention):
            sizes = [min(sizes)] * len(weights)
        chosen = []
        for weight, size in zip(weights, sizes, strict=True):
            fitting = [config for config in configs if size > config.weight_threshold]
            if fitting:
                chosen.append((weight, fitting[-1]))
            elif configs and weight.tensor is not None:
                least = configs[0].weight_threshold
                self.left[weight.name] = (
                    f"it has {size} elements, not more than the weight_threshold of {least}"
                )
        return chosen

    def step(self) -> None:
        """Go one step further, and enable the layers whose milestone is reached."""
        for fake, milestone in self._milestones:
            if milestone == self._step_count:
                fake.enable_fake_palett()
        self._step_count += 1

    def enable_fake_palett(self, flag: bool) -> None:
        """Enable all layers, or disable them."""
        for module in self._model.modules():
            if isinstance(module, FakePalettize):
                module.enable_fake_palett(flag)

    def finalize(
        self,
        model: nn.Module | None = None,
        inplace: bool = False,
        *,
        progress: Progress | bool | None = None,
    ) -> nn.Module:
        """Replace the weights by entries of their tables, and say so in the buffers of the modules.

        Parameters
        ----------
        model, inplace, progress
            As of `BaseTrainingTimeModelOptimizer.finalize`.

        Returns
        -------
        torch.nn.Module
            The model, or a copy of it, in evaluation mode, without `FakePalettize` layers. A weight
            whose layer never ran while it was enabled is left as it is, with a warning.
        """
        with self._finalizing(model, inplace) as finalized:
            finalized.eval()
            for _, host, _ in places(finalized, self._supported_modules):
                for hook in _Palettized.of(host):
                    hook.detach(host)
            weights = [weight for weight, _ in self._faked(finalized)]
            with masks_lifted(finalized):
                report = compress_faked(finalized, weights, _palettized, progress)
            self._unfinished = report.left
        return finalized

    def report(self) -> Report:
        """Return a row for each weight that is prepared.

        The columns are ``device``, ``error`` (root mean square of what palettization changes now),
        ``#params`` and ``#dtype``. ``left`` has the weights that are not palettized though they are
        asked for, and why.
        """
        rows: dict[str, dict[str, Any]] = {}
        weights: dict[int, WeightReport] = {}
        for weight, fake in self._faked(self._model):
            name = weight.name if weight.module_name in rows else weight.module_name
            rows[name] = _row(weight, fake)
            report = prepared(weight, describe(fake.treatment), fake.n_bytes)
            if weight.name not in self._unfinished:
                weights.setdefault(id(trained(weight)), report)
        reasons = self.left | self._unfinished
        if self._config.is_default:
            for weight in weights_of(self._model, KINDS):
                if not self._configs(weight):
                    reasons[weight.name] = (
                        f"the default says nothing of {type(weight.module).__name__}"
                    )
        left = left_weights(self._model, set(weights), self._is_asked, reasons)
        return Report(rows, [*weights.values(), *left])

    def _is_asked(self, weight: ModuleWeight) -> bool:
        return self._config.is_default or bool(self._configs(weight))

    def _faked(self, model: nn.Module) -> Iterator[tuple[ModuleWeight, FakePalettize]]:
        """Yield the weights that have a `FakePalettize` layer, and these."""
        for weight in weights_of(model, self._supported_modules):
            fake = getattr(weight.module, f"{weight.parameter_name}_fake_quant", None)
            if isinstance(fake, FakePalettize):
                yield weight, fake


@torch.no_grad()
def _row(weight: ModuleWeight, fake: FakePalettize) -> dict[str, Any]:
    values: torch.Tensor = getattr(weight.module, weight.parameter_name).detach()
    error = 0.0
    if fake.is_begun:
        dense = torch.from_numpy(fake.stored(values, kept_of(weight)).dense()).to(values)
        error = float((dense.float() - values.float()).square().mean().sqrt())
    return {
        "device": str(values.device),
        "error": error,
        "#params": values.numel(),
        "#dtype": f"num_clusters={fake.n_clusters}, cluster_dim={fake.cluster_dim}, "
        f"lut_dtype={fake.lut_dtype}",
    }


def _palettized(weight: ModuleWeight, _array: Any, fake: FakePalettize) -> WeightOutcome:
    if not fake.is_begun:
        msg = "its palettization was not enabled, or the model did not run since"
        raise UnsupportedError(msg)
    tensor = weight.tensor
    assert tensor is not None  # noqa: S101 - compress_weights has looked
    if not torch.isfinite(tensor).all():
        msg = "a weight that is not finite (NaN or infinity) can't be palettized"
        raise UnsupportedError(msg)
    stored = fake.stored(tensor.detach(), kept_of(weight))
    return WeightOutcome(stored, fake.treatment, tuple(fake.notes))
