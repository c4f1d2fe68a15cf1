"""Palettization by k-means that counts an error where the loss feels it."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attrs import define, field

from milpress.errors import ConfigError, UnsupportedError
from milpress.formats.rows import Floats
from milpress.plain import fields
from milpress.plain.files import DRAFT_MARK, check_free
from milpress.progress import Progress
from milpress.torch._compression import WeightOutcome, compress_weights, each_matrix
from milpress.torch._modes import on_device
from milpress.torch._module_weights import ModuleWeight
from milpress.torch._palettes import ModulePaletteConfig, palettized
from milpress.torch.base_model_optimizer import BaseDataCalibratedModelOptimizer
from milpress.torch.optimization_config import OptimizationConfig
from milpress.torch.palettization import _sensitivity, _workers
from milpress.torch.palettization._sensitivity import LossFunction
from milpress.torch.registration import KINDS

__all__ = ["ModuleSKMPalettizerConfig", "SKMPalettizer", "SKMPalettizerConfig"]

_logger = logging.getLogger(__name__)


@define
class ModuleSKMPalettizerConfig(ModulePaletteConfig):
    """How `SKMPalettizer` palettizes the weights of a module.

    Parameters
    ----------
    n_bits, lut_dtype, granularity, group_size, channel_axis, cluster_dim
        As of `ModulePostTrainingPalettizerConfig`.
    enable_per_channel_scale, on_indivisible
        As of `ModulePostTrainingPalettizerConfig`.

    Raises
    ------
    ConfigError
        If a setting is not what it must be, or does not go with another.
    """


@define
class SKMPalettizerConfig(OptimizationConfig):
    """Which module `SKMPalettizer` palettizes how; see `OptimizationConfig`.

    Parameters
    ----------
    calibration_nsamples
        Samples that sensitivities are computed from. Samples, not batches, are counted where
        batches are split.
    per_sample
        Whether batches are split into samples: sensitivities are squares of the gradients of each
        sample, and the square of a batch's mean gradient is another thing. Not in coremltools,
        which does not split.
    """

    module_config_class = ModuleSKMPalettizerConfig

    calibration_nsamples: int = fields.integer(128, fields.at_least(1))
    per_sample: bool = field(default=True, kw_only=True, validator=fields.is_flag)


class SKMPalettizer(BaseDataCalibratedModelOptimizer):
    """Palettizes the weights of a model by k-means weighted with sensitivities.

    The sensitivity of a weight is the mean square of the loss's gradient over samples, the diagonal
    of the empirical Fisher information (Kim et al. 2023, "SqueezeLLM", arXiv 2306.07629).

    Parameters
    ----------
    model, config
        The model, and what to do to which module; by default 4 bits and one table for each weight.

    Examples
    --------
    >>> palettizer = SKMPalettizer(torch.nn.Linear(16, 8))
    >>> batches = [torch.ones(4, 16)]
    >>> _ = palettizer.compress(batches, lambda model, batch: model(batch).square().sum())
    >>> palettizer.report().left
    {}
    """

    _supported_modules = KINDS
    _config_class = SKMPalettizerConfig

    def compute_sensitivity(
        self,
        dataloader: Iterable[Any],
        loss_fn: LossFunction,
        sensitivity_path: str | os.PathLike[str] | None = None,
        num_sensitivity_workers: int = 1,
        fsdp_auto_wrap_policy: Any = None,
        *,
        device: str | torch.device | None = None,
        progress: Progress | bool | None = None,
    ) -> dict[str, torch.Tensor]:
        """Compute how much the loss depends on each weight that is to be palettized.

        The model is in evaluation mode meanwhile, and frozen weights count like others. In a
        process group, each process takes its share of the samples; a model that ``fully_shard`` has
        spread stays so. Beside the model, memory holds the gradient of one weight at a time, its
        sum of squares in float32, and what the forward pass keeps for the gradients. The sums of
        all weights, 4 bytes an element, are in a file: beside ``sensitivity_path``, else in a
        temporary folder (``TMPDIR`` says where). A file that is kept for a run that may be
        interrupted takes as much again.

        Parameters
        ----------
        dataloader
            Batches; every process of a group gives the same ones. A batch whose tensors share their
            first dimension is split into samples; another one counts as a sample, and the report
            says so.
        loss_fn
            Takes the model and a batch, returns the loss.
        sensitivity_path
            Where to save what is returned, as ``torch.save`` does. If a run was interrupted, it
            goes on from what is beside this file, provided that the dataloader gives the same
            batches again.
        num_sensitivity_workers
            Processes to start for the purpose, if the program is not one of a process group
            already. The model, the batches and ``loss_fn`` must be picklable.
        fsdp_auto_wrap_policy
            Which modules to spread over these processes, as torch's FSDP takes it; ``None`` gives
            each process the whole model.
        device
            Where to run the model, and to have batches; it is where it was afterwards. ``None``
            leaves both where they are. A model that accelerate has dispatched stays where it is;
            processes that are started for the purpose take a GPU each, if there are as many. Not in
            coremltools.
        progress
            ``True`` shows a bar; a function is called with samples done, the most that are taken
            and what is at hand. In a process group, by its first process; of
            ``num_sensitivity_workers`` processes that are started, too, to which it is sent.

        Returns
        -------
        dict
            Sensitivities from 0 to 1 of each weight, by its name: tensors of float32, of its shape,
            mapped from the file, which are read when they are used.

        Raises
        ------
        ConfigError
            If there are no samples, or ``loss_fn`` returns no loss.
        StorageError
            If the system refuses to read or write, as when a disk is full.
        UnsupportedError
            If a loss is not finite.
        """
        path = None if sensitivity_path is None else Path(sensitivity_path)
        with _folder_beside(path) as folder:
            # Of a process group, the first one saves; the others have files that go.
            is_first = _sensitivity.rank_and_size()[0] == 0
            saved = path if path is not None and is_first else folder / "sensitivity.pt"
            if num_sensitivity_workers > 1 and not torch.distributed.is_initialized():
                batches = list(islice(dataloader, self._config.calibration_nsamples))
                compute = functools.partial(
                    _compute, self._config, batches, loss_fn, saved, progress
                )
                _workers.run(num_sensitivity_workers, compute, self._source, fsdp_auto_wrap_policy)
            else:
                sums = self._sums(self._model, dataloader, loss_fn, folder, path, device, progress)
                _sensitivity.save(sums, saved)
                if sums.kept is not None:
                    sums.kept.unlink(missing_ok=True)
            # What is mapped stays, also if its file goes.
            return _sensitivity.load(saved)

    def compress(  # type: ignore[override]
        self,
        dataloader: Iterable[Any] | None = None,
        loss_fn: LossFunction | None = None,
        sensitivity_path: str | os.PathLike[str] | None = None,
        num_kmeans_workers: int = 1,  # noqa: ARG002
        num_sensitivity_workers: int = 1,
        inplace: bool = False,
        fsdp_auto_wrap_policy: Any = None,
        *,
        device: str | torch.device | None = None,
        progress: Progress | bool | None = None,
    ) -> torch.nn.Module:
        """Palettize the weights.

        Parameters
        ----------
        dataloader, loss_fn, num_sensitivity_workers, fsdp_auto_wrap_policy, device
            As of `compute_sensitivity`; unused if ``sensitivity_path`` is given.
        sensitivity_path
            Where `compute_sensitivity` saved its result.
        num_kmeans_workers, inplace
            As of `PostTrainingPalettizer.compress`.
        progress
            As of `compute_sensitivity`, and then as of `PostTrainingPalettizer.compress`.

        Returns
        -------
        torch.nn.Module
            As of `PostTrainingPalettizer.compress`.

        Raises
        ------
        ConfigError
            If neither sensitivities nor what to compute them from are given.
        UnsupportedError
            If a loss is not finite.
        """
        if sensitivity_path is not None:
            return self._compress(_sensitivity.Saved(sensitivity_path), [], inplace, progress)
        if dataloader is None or loss_fn is None:
            msg = "sensitivities are missing: give dataloader and loss_fn, or sensitivity_path"
            raise ConfigError(msg)
        if num_sensitivity_workers > 1 and not torch.distributed.is_initialized():
            sensitivities = self.compute_sensitivity(
                dataloader,
                loss_fn,
                None,
                num_sensitivity_workers,
                fsdp_auto_wrap_policy,
                progress=progress,
            )
            return self._compress(sensitivities, [], inplace, progress)
        with _folder_beside(None) as folder:
            # Of the model that was given: a sharded one can't be copied.
            sums = self._sums(self._source, dataloader, loss_fn, folder, None, device, progress)
            return self._compress(sums, sums.notes, inplace, progress)

    def _compress(
        self,
        sensitivities: Mapping[str, torch.Tensor],
        notes: Sequence[str],
        inplace: bool,
        progress: Progress | bool | None,
    ) -> torch.nn.Module:
        model = self._begin(inplace)

        def treat(
            weight: ModuleWeight, array: Floats, config: ModuleSKMPalettizerConfig
        ) -> WeightOutcome:
            whole = replace(weight, index=())
            name = next((n for n in names[id(whole.tensor)] if n in sensitivities), None)
            if name is None:
                msg = f"no sensitivities are given for {whole.name}"
                raise UnsupportedError(msg)
            squares = sensitivities[name].float()
            if tuple(squares.shape) == whole.shape:
                squares = squares[weight.index]
            values, in_use = _sensitivity.normalized(squares)
            importance = values.numpy()
            if importance.shape != array.shape:
                msg = f"sensitivities must be of the shape {array.shape}, got {importance.shape}"
                raise UnsupportedError(msg)
            if not np.isfinite(importance).all():
                msg = "sensitivities are not finite (NaN or infinity)"
                raise UnsupportedError(msg)
            treated = palettized(weight, array, config, importance)
            idle = "the loss does not depend on it, so that all its elements count alike"
            return treated if in_use else replace(treated, notes=(*treated.notes, idle))

        tasks = self._tasks(model)
        names: dict[int, list[str]] = {}
        for task in tasks:
            names.setdefault(id(task.weight.tensor), []).append(task.weight.name)
        self._report = compress_weights(model, tasks, each_matrix(treat), progress, notes)
        return model

    def _sums(
        self,
        model: torch.nn.Module,
        dataloader: Iterable[Any],
        loss_fn: LossFunction,
        folder: Path,
        path: Path | None,
        device: str | torch.device | None,
        progress: Progress | bool | None,
    ) -> _sensitivity.GradientSums:
        weights: dict[int, tuple[str, Any]] = {}
        for task in self._tasks(model):
            tensor = task.weight.tensor
            if task.config is None or tensor is None or not task.weight.size:
                continue
            if tensor.is_floating_point():
                weights.setdefault(id(tensor), (task.weight.name, tensor))
        batches = dataloader
        if device is not None:
            batches = (_sensitivity.moved(batch, device) for batch in dataloader)
        with on_device(model, device):
            return _sensitivity.sum_squared_gradients(
                model,
                dict(weights.values()),
                batches,
                loss_fn,
                folder / "sums.pt",
                n_samples=self._config.calibration_nsamples,
                per_sample=self._config.per_sample,
                path=path,
                progress=progress,
            )


@contextlib.contextmanager
def _folder_beside(path: Path | None) -> Iterator[Path]:
    """Have a folder for large files: on the disk that a path is on, if there is one."""
    if path is not None:
        check_free(path, force=True)
    with tempfile.TemporaryDirectory(
        prefix=DRAFT_MARK, dir=None if path is None else path.absolute().parent
    ) as folder:
        yield Path(folder)


def _compute(
    config: Any,
    batches: list[Any],
    loss_fn: LossFunction,
    path: Path,
    progress: Progress | bool | None,
    model: torch.nn.Module,
) -> None:
    SKMPalettizer(model, config).compute_sensitivity(batches, loss_fn, path, progress=progress)
