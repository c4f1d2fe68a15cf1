"""Palettization without data."""

from __future__ import annotations

import torch
from attrs import define, field

from milpress.plain import fields
from milpress.progress import Progress
from milpress.torch._compression import compress_weights, each_matrix
from milpress.torch._palettes import ModulePaletteConfig, palettized
from milpress.torch.base_model_optimizer import BasePostTrainingModelOptimizer
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
