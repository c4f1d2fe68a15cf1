"""Palettization without data."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from attrs import define, field

from milpress.plain import fields
from milpress.progress import Progress
from milpress.torch._compression import compress_weights, each_matrix
from milpress.torch._palettes import ModulePaletteConfig, palettized
from milpress.torch._report import Report
from milpress.torch.base_model_optimizer import BasePostTrainingModelOptimizer
from milpress.torch.checkpoints import compress_checkpoint
from milpress.torch.optimization_config import OptimizationConfig
from milpress.torch.registration import KINDS

__all__ = [
    "ModulePostTrainingPalettizerConfig",
    "PostTrainingPalettizer",
    "PostTrainingPalettizerConfig",
]


@define
class ModulePostTrainingPalettizerConfig(ModulePaletteConfig):
    """How `PostTrainingPalettizer` palettizes the weights of a module.

    Parameters
    ----------
    n_bits
        Width of an index: 1, 2, 3, 4, 6 or 8.
    lut_dtype
        ``torch.int8`` or ``torch.uint8``, or their names, to store the entries of each table as
        integers with a scale; ``None`` to store them as they are.
    granularity
        ``"per_tensor"`` gives a weight one table, ``"per_grouped_channel"`` one to every
        ``group_size`` channels.
    group_size
        Channels that share a table. Goes with ``"per_grouped_channel"`` alone, which needs it.
    channel_axis
        0 to group output channels, 1 to group input channels.
    cluster_dim
        Neighbouring channels that one index stands for; ``None`` is 1.
    enable_per_channel_scale
        Divide each output channel by its greatest magnitude first, and keep that as a scale. Does
        not go with ``cluster_dim``.
    on_indivisible
        What to do with a weight whose channels ``group_size`` does not divide: ``"leave"`` it, or
        take the greatest ``"divisor"`` of the channels up to ``group_size``, or one table where
        there is none. Not in coremltools, which leaves it.
    enable_fast_kmeans_mode, rounding_precision
        Accepted and without effect: weights are never rounded, k-means is exact and fast.

    Raises
    ------
    ConfigError
        If a setting is not what it must be, or does not go with another.

    Examples
    --------
    >>> config = ModulePostTrainingPalettizerConfig(
    ...     n_bits=4, granularity="per_grouped_channel", group_size=16
    ... )
    >>> config.group_size
    16
    """

    enable_fast_kmeans_mode: bool = field(default=True, validator=fields.is_flag)
    rounding_precision: int = fields.integer(4)


@define
class PostTrainingPalettizerConfig(OptimizationConfig):
    """Which module `PostTrainingPalettizer` palettizes how; see `OptimizationConfig`.

    Examples
    --------
    >>> config = PostTrainingPalettizerConfig.from_dict(
    ...     {"global_config": {"n_bits": 4}, "module_type_configs": {"Embedding": {"n_bits": 8}}}
    ... )
    >>> config.get_module_config("words", torch.nn.Embedding(8, 2)).n_bits
    8
    """

    module_config_class = ModulePostTrainingPalettizerConfig


class PostTrainingPalettizer(BasePostTrainingModelOptimizer):
    """Palettizes the weights of a model: k-means, exact for single values.

    Parameters
    ----------
    model, config
        The model, and what to do to which module; by default 4 bits and one table for each weight.

    Examples
    --------
    >>> palettizer = PostTrainingPalettizer(torch.nn.Linear(16, 8))
    >>> palettizer.compress().weight.unique().numel()
    16
    """

    _supported_modules = KINDS
    _config_class = PostTrainingPalettizerConfig

    def compress(  # type: ignore[override]
        self,
        num_kmeans_workers: int = 1,  # noqa: ARG002
        inplace: bool = False,
        *,
        progress: Progress | bool | None = None,
    ) -> torch.nn.Module:
        """Palettize the weights.

        Parameters
        ----------
        num_kmeans_workers
            Accepted and without effect: k-means runs in the threads that MILPRESS_NUM_THREADS says.
        inplace
            Whether to change the model itself, which copies nothing of it.
        progress
            ``True`` shows a bar; a function is called with elements done, elements in all and the
            name of the weight at hand.

        Returns
        -------
        torch.nn.Module
            The model, or a copy of it, with its weights replaced by entries of tables; the tables
            are in buffers of the modules.
        """
        model = self._begin(inplace)
        self._report = compress_weights(
            model, self._tasks(model), each_matrix(palettized), progress
        )
        return model

    def compress_checkpoint(
        self,
        source: str | os.PathLike[str],
        destination: str | os.PathLike[str],
        *,
        force: bool = False,
        progress: Progress | bool | None = None,
    ) -> Report:
        """Palettize the weights of a checkpoint into another one, a weight at a time.

        The model may be on ``meta``; its values are neither used nor changed. What is written is,
        bit for bit, the state of what `compress` would have made of the model with the checkpoint
        loaded, weights in the types of the model's parameters. `milpress.torch.load_compressed`
        loads it. Beside the model, memory holds one weight, and some copies of it while it is
        compressed.

        Parameters
        ----------
        source
            A file of safetensors, or a folder of one, or of several with an index
            (``*.safetensors.index.json``), with the names of the model's state dict. Tied
            parameters may have one name alone; tensors that the model does not have are copied.
        destination
            Where to write: a file, or a folder with files of the same names, and the index. Tables
            and scales are with their weights, under the names of the modules' buffers.
        force
            Whether a file, or a folder of safetensors, that is there is replaced.
        progress
            As of `compress`.

        Returns
        -------
        Report
            What happened to each weight, as of `report`.

        Raises
        ------
        ConfigError
            If the checkpoint lacks a tensor of the model, or has it in another shape.
        PackageNotFoundError
            If the checkpoint, or a shard of it, is missing.
        PackageError
            If it is damaged, such as cut off.
        DestinationError
            If the destination is taken, or the source itself.
        StorageError
            If the system refuses to read or write.
        """
        self._warn_of_typos()
        self._report = compress_checkpoint(
            self._source,
            self._tasks(self._source),
            each_matrix(palettized),
            Path(source),
            Path(destination),
            force=force,
            progress=progress,
        )
        return self._report
