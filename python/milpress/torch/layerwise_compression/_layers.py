"""Layers that are compressed with samples of their inputs."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from milpress.compression.report import WeightReport
from milpress.formats.fidelity import fidelity
from milpress.formats.rows import Floats, as_float
from milpress.show import decibels
from milpress.torch import _metadata
from milpress.torch._compression import Task, WeightOutcome, asking, compress_together, left
from milpress.torch._module_weights import ModuleWeight, whole
from milpress.torch.layerwise_compression.algorithms import (
    LayerwiseCompressionAlgorithm,
    OBSCompressionAlgorithm,
)

_logger = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class CalibratedLayer:
    """A weight that is to be compressed with what it multiplies: a parameter, or a part of one.

    Parameters
    ----------
    name
        Name of the parameter, and which part it is.
    key
        What tells it from others in names of files.
    place
        Its number among all layers.
    tasks
        What is asked for it, for each module that holds it.
    module
        A linear layer or a convolution that has the weight.
    algorithm
        What its inputs go to, if it has begun.
    note
        What its report is to say.
    row, report
        What became of it.
    """

    name: str
    key: str
    place: int
    tasks: list[Task]
    module: nn.Module
    algorithm: Any = None
    note: str = ""
    row: dict[str, Any] | None = None
    report: WeightReport | None = None

    @property
    def config(self) -> Any:
        """How it is to be compressed."""
        return asking(self.tasks).config

    @property
    def weight(self) -> ModuleWeight:
        """The weight, of a module that asks for something."""
        return asking(self.tasks).weight

    @property
    def is_done(self) -> bool:
        """Whether it is compressed, or left for good."""
        return self.report is not None

    def begin(self) -> Any:
        """Return the algorithm that the layer's inputs go to."""
        if self.algorithm is None:
            kind = LayerwiseCompressionAlgorithm.get_class(self.config.algorithm)
            self.algorithm = kind(self.module, self.config)
        return self.algorithm

    def compress(self) -> None:
        """Compress it with the samples that came to it."""
        algorithm = self.algorithm
        if isinstance(algorithm, OBSCompressionAlgorithm):
            self._settle(compress_together(self.tasks, self._treat))
            return
        # An algorithm of the user's own says nothing of what it did but by the weight.
        tensor: Any = self.weight.tensor
        _, report = left(self.weight, "")
        before = whole(tensor).clone()
        algorithm.compress()
        algorithm.cleanup()
        signal, noise, _ = fidelity(as_float(before), as_float(whole(tensor)))
        row = {"error": math.sqrt(noise / report.size), "#params": report.size}
        snr = decibels(signal, noise)
        treatment = self.config.algorithm
        self._settle((row, replace(report, status="compressed", treatment=treatment, snr_db=snr)))

    def _treat(self, weight: ModuleWeight, array: Floats, config: Any) -> WeightOutcome:
        outcome: WeightOutcome = self.algorithm.treat(weight, array, config)
        return replace(outcome, notes=(*outcome.notes, self.note)) if self.note else outcome

    def _settle(self, reports: tuple[dict[str, Any], WeightReport]) -> None:
        self.row, self.report = reports
        if self.report.status == "left":
            _logger.warning("%s: %s. Left as it is.", self.name, self.report.note)

    def leave(self, reason: str) -> None:
        """Leave it as it is."""
        self._settle(left(self.weight, reason))

    def state(self) -> dict[str, Any]:
        """Return what it is once it is compressed."""
        tensor: Any = self.weight.tensor
        return {
            "weight": whole(tensor),
            "buffers": [dict(_own_buffers(task.weight)) for task in self.tasks],
            "row": self.row,
            "report": None if self.report is None else asdict(self.report),
        }

    @torch.no_grad()
    def restore(self, state: Mapping[str, Any]) -> None:
        """Make it what it was when `state` was called."""
        tensor: Any = self.weight.tensor
        tensor.copy_(state["weight"])
        for task, buffers in zip(self.tasks, state["buffers"], strict=True):
            for name, buffer in buffers.items():
                task.weight.module.register_buffer(name, buffer)
        self._settle((state["row"], WeightReport(**state["report"])))


def _own_buffers(weight: ModuleWeight) -> Iterator[tuple[str, torch.Tensor]]:
    for name, buffer in weight.module.named_buffers(recurse=False):
        if name.startswith(f"{_metadata.prefix_of(weight.module)}/{weight.parameter_name}/"):
            yield name, buffer
