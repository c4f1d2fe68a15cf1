"""Compression of a model layer by layer, each with what its compressed predecessors give it."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import nn

from milpress.errors import ConfigError, ConfigTypeError
from milpress.plain import fields
from milpress.progress import Progress, shown
from milpress.torch import _metadata
from milpress.torch._compression import Task, tied
from milpress.torch._modes import evaluating, exact, on_device
from milpress.torch._module_weights import ModuleWeight
from milpress.torch._report import Report
from milpress.torch.base_model_optimizer import BaseDataCalibratedModelOptimizer
from milpress.torch.checkpoints import compress_running
from milpress.torch.layerwise_compression._calibrated_weights import (
    CalibratedWeight,
    CalibratedWeights,
)
from milpress.torch.layerwise_compression._configs import (
    LayerwiseCompressionAlgorithmConfig,
    ModuleGPTQConfig,
)
from milpress.torch.layerwise_compression._layer_files import LayerFiles
from milpress.torch.layerwise_compression._order import Order
from milpress.torch.layerwise_compression.input_cacher import (
    DefaultInputCacher,
    FirstLayerInputCacher,
    GPTFirstLayerInputCacher,
    call,
    moved,
)
from milpress.torch.optimization_config import OptimizationConfig
from milpress.torch.registration import KINDS

__all__ = ["LayerwiseCompressor", "LayerwiseCompressorConfig"]

_ENOUGH = 8  # positions of samples for each input of a layer


def _to_cacher(value: Any) -> Any:
    if not isinstance(value, type) or not callable(getattr(value, "cache", None)):
        return FirstLayerInputCacher.get_class(value)
    own = (DefaultInputCacher, GPTFirstLayerInputCacher)
    # coremltools' classes of these names do the same.
    theirs = value.__module__.startswith("coremltools.")
    return next((kind for kind in own if theirs and kind.__name__ == value.__name__), value)


def _check_layers(_config: Any, _attribute: Any, layers: Any) -> None:
    if layers is None:
        return
    if not isinstance(layers, (list, nn.ModuleList)) or not all(
        isinstance(layer, (str, nn.Module)) for layer in layers
    ):
        msg = f"layers must be a list of names or modules, or a ModuleList, got {layers!r}"
        raise ConfigTypeError(msg)


@attrs.define
class LayerwiseCompressorConfig(OptimizationConfig):
    """Which layer `LayerwiseCompressor` compresses how; see `OptimizationConfig`.

    Parameters
    ----------
    layers
        Names of modules, as regular expressions, or modules: layers outside of them are left.
        ``None`` for the whole model.
    input_cacher
        Has no effect, unless it is a class of one's own: then ``layers`` are run one after the
        other with what it returns.
    calibration_nsamples
        Batches to take of the dataloader.
    mask
        Name of the item of a batch that is a mapping which is zero where a sample is padding:
        such positions don't count in linear layers that see them apart. ``None`` for none. Not in
        coremltools.
    """

    module_config_class = LayerwiseCompressionAlgorithmConfig

    layers: Any = attrs.field(default=None, validator=_check_layers)
    input_cacher: Any = attrs.field(default="default", converter=_to_cacher)
    calibration_nsamples: int = fields.integer(128, fields.at_least(1))
    mask: str | None = attrs.field(default="attention_mask", kw_only=True)

    def _set_default(self) -> None:
        self.global_config = ModuleGPTQConfig()

    def get_layers(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """Yield the modules that ``layers`` names; by default the children of the model."""
        if self.layers is None:
            yield from model.named_children()
            return
        for name, module in model.named_modules():
            if any(
                bool(re.fullmatch(layer, name)) if isinstance(layer, str) else layer is module
                for layer in self.layers
            ):
                yield name, module


class LayerwiseCompressor(BaseDataCalibratedModelOptimizer):
    """Compresses the layers of a model in the order in which samples come to them.

    Each layer makes up for what rounding does to its output, by what samples put into it after
    all layers before it were compressed. The model may be any program, which multiplies by weights
    in modules or by itself, whole or in parts; each sample runs through it once, and once more if
    samples take different ways. What the forward keeps in modules is of the sample that runs.

    Parameters
    ----------
    model, config
        The model, and what to do to which layer; by default `ModuleGPTQConfig` to all.

    Examples
    --------
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    >>> config = LayerwiseCompressorConfig.from_dict(
    ...     {"global_config": {"algorithm": "gptq", "weight_dtype": "int4"}}
    ... )
    >>> compressor = LayerwiseCompressor(model, config)
    >>> _ = compressor.compress([torch.randn(64, 16) for _ in range(4)])
    >>> list(compressor.report())
    ['0.weight', '2.weight']
    """

    _supported_modules = KINDS
    _config_class = LayerwiseCompressorConfig

    def compress(  # type: ignore[override]
        self,
        dataloader: Iterable[Any],
        device: str | torch.device = "cpu",
        inplace: bool = False,
        *,
        progress: Progress | bool | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        activation_memory: int | None = 2**30,
    ) -> nn.Module:
        """Compress the layers.

        Beside the model and the samples, memory holds the second moments of a layer, what is
        between two layers for one sample, and as much of it as ``activation_memory`` allows for the
        others, which wait.

        Parameters
        ----------
        dataloader
            Batches that the model is called with: tensors, or arguments in a tuple, list or
            mapping.
        device
            Where to run the model. One that accelerate has placed stays where it is.
        inplace, progress
            As of `PostTrainingPalettizer.compress`.
        checkpoint
            A folder to keep compressed layers in until all are done. If a run was interrupted, it
            goes on from there, provided that the dataloader gives the same batches again.
        activation_memory
            Bytes that samples which wait at a layer may take in memory. What is beyond is in
            temporary files, in the folder that ``TMPDIR`` names: 0 puts all of it there, ``None``
            nothing. It makes no difference to the result.

        Returns
        -------
        torch.nn.Module
            The model, or a copy of it, with its weights replaced by what their codes stand for;
            scales and tables are in buffers of the modules.

        Raises
        ------
        ConfigError
            If there is no sample, what was kept is of another model or other settings, or
            ``activation_memory`` is negative.
        StorageError
            If the system refuses to write files.
        """
        if activation_memory is not None and activation_memory < 0:
            msg = f"activation_memory must be at least 0, got {activation_memory}"
            raise ConfigError(msg)
        # Of the model that was given: modules in the config are of it, not of a copy.
        parents = [name for name, _ in self._config.get_layers(self._source)]
        model = self._begin(inplace)
        weights = self._weights(model, parents)
        files = LayerFiles(checkpoint)
        total = sum(weight.weight.size for weight in weights)
        few: list[str] = []
        placed = nullcontext() if _is_placed(model) else on_device(model, device)
        with placed, evaluating(model), exact(), shown(progress) as note:
            calls, masks = self._calls(model, parents, dataloader, device)
            calibrated = CalibratedWeights(weights)
            order = Order(model, calibrated, calls, masks, files, activation_memory)
            for layer in order:
                note(sum(weight.n_done for weight in weights), total, layer.name)
                identity = files.identity(layer)
                layer.compress()
                files.save(layer, identity)
                moments = getattr(layer.algorithm, "moments", None)
                n_inputs = math.prod(layer.weight.shape[1:])
                if moments is not None and moments.n_positions < _ENOUGH * n_inputs:
                    few.append(layer.name)
            for weight in weights:
                weight.finish()
            note(total, total, "")
        notes = [*_notes_of(few), *order.notes(), *calibrated.notes()]
        rows = {name: row for weight in weights for name, row in weight.rows.items()}
        self._report = Report(rows, [weight.report for weight in weights if weight.report], notes)
        if len(self._report.left) < len(self._report.weights):
            _metadata.register_version(model)
        files.clear()
        return model

    def compress_checkpoint(
        self,
        source: str | os.PathLike[str],
        destination: str | os.PathLike[str],
        dataloader: Iterable[Any],
        *,
        force: bool = False,
        progress: Progress | bool | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        activation_memory: int | None = 2**30,
    ) -> Report:
        """Compress the layers of a checkpoint into another one, of a model larger than memory.

        The model runs on the CPU with its weights in a temporary file beside the destination, of
        which memory has what is computed with. Its own values are neither used nor changed, and its
        parameters may be on ``meta``; buffers that are no part of checkpoints, such as the
        frequencies of positions, must have values: ``accelerate.init_empty_weights`` builds such
        models. What is written is, bit for bit, the state of what `compress` would have made of the
        model with the checkpoint loaded. `milpress.torch.load_compressed` loads it.

        Parameters
        ----------
        source, destination, force
            As of `PostTrainingPalettizer.compress_checkpoint`.
        dataloader, progress, checkpoint, activation_memory
            As of `compress`.

        Returns
        -------
        Report
            What became of each weight, as `report` returns it.

        Raises
        ------
        ConfigError
            If model and checkpoint don't have the same names and shapes, a buffer that the
            checkpoint lacks is on ``meta``, or as of `compress`.
        DestinationError
            As of `PostTrainingPalettizer.compress_checkpoint`.
        PackageNotFoundError
            If the checkpoint, or a shard of it, is missing.
        PackageError
            If it is damaged.
        """

        def compress() -> Report:
            self.compress(
                dataloader,
                inplace=True,
                progress=progress,
                checkpoint=checkpoint,
                activation_memory=activation_memory,
            )
            return self._report

        return compress_running(
            self._source, compress, Path(source), Path(destination), force=force
        )

    def _weights(self, model: nn.Module, parents: Sequence[str]) -> list[CalibratedWeight]:
        """Return the weights that something is asked for, in the order of the model."""
        tasks = self._tasks(model)
        if self._config.layers is not None:
            tasks = [
                task
                if _is_within(task.weight.module_name, parents)
                else Task(task.weight, config=None)
                for task in tasks
            ]
        return [CalibratedWeight(number, group) for number, group in enumerate(tied(tasks))]

    def _config_for(self, weight: ModuleWeight, model: nn.Module) -> Any:
        config = super()._config_for(weight, model)
        is_dense = isinstance(config, ModuleGPTQConfig) and config.weight_dtype == torch.float32
        return None if is_dense else config

    def _calls(
        self,
        model: nn.Module,
        parents: Sequence[str],
        dataloader: Iterable[Any],
        device: str | torch.device,
    ) -> tuple[list[Callable[[], Any]], list[torch.Tensor | None]]:
        """Return what runs each sample, and which part of it is no padding."""
        n_samples = self._config.calibration_nsamples
        calls: list[Callable[[], Any]]
        cacher = self._config.input_cacher
        if cacher in (DefaultInputCacher, GPTFirstLayerInputCacher):
            batches = list(islice(dataloader, n_samples))
            calls = [partial(_run, model, batch, device) for batch in batches]
        else:
            batches, kwargs = cacher(model, self._config.layers).cache(
                dataloader=dataloader, nsamples=n_samples, device=str(device)
            )
            chain = [model.get_submodule(name) for name in parents]
            calls = [partial(_run_chain, chain, batch, kwargs) for batch in batches]
        if not calls:
            msg = "dataloader gives no batch"
            raise ConfigError(msg)
        name = self._config.mask
        masks = [batch.get(name) if isinstance(batch, Mapping) else None for batch in batches]
        return calls, masks


def _is_placed(model: nn.Module) -> bool:
    """Whether a model is where it has to stay: placed by accelerate, or in part without values."""
    return (
        hasattr(model, "hf_device_map")
        or any(hasattr(module, "_hf_hook") for module in model.modules())
        or any(parameter.is_meta for parameter in model.parameters())
    )


def _run(model: nn.Module, batch: Any, device: str | torch.device) -> None:
    call(model, moved(batch, device))


def _run_chain(chain: Sequence[nn.Module], batch: Any, kwargs: Mapping[str, Any]) -> None:
    for layer in chain:
        batch = layer(*(batch if isinstance(batch, tuple) else (batch,)), **kwargs)


def _is_within(name: str, parents: Iterable[str]) -> bool:
    return any(name == parent or name.startswith(f"{parent}.") or not parent for parent in parents)


def _notes_of(few: Sequence[str]) -> list[str]:
    if not few:
        return []
    return [
        f"Layers that had fewer than {_ENOUGH} positions of samples for each input, "
        f"which is few: {', '.join(few)}."
    ]
