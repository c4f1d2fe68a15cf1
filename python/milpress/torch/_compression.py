"""Compressing the weights of a torch model, one at a time, in place."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from milpress.compression.report import WeightReport
from milpress.errors import UnsupportedError
from milpress.formats import Masked, Palette, Quantized, Sparse, Treatment
from milpress.formats.fidelity import fidelity
from milpress.formats.rows import Floats, as_float
from milpress.progress import Progress, shown
from milpress.recipe import describe
from milpress.show import decibels
from milpress.torch import _metadata
from milpress.torch._metadata import Stored
from milpress.torch._module_weights import ModuleWeight, is_spread, whole
from milpress.torch._relayout import stacked
from milpress.torch._report import Report

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WeightOutcome:
    """What was made of a weight.

    Parameters
    ----------
    stored
        What Core ML is to hold.
    treatment
        How, for the report.
    notes
        How that differs from what was asked for.
    words
        What the report adds to the treatment.
    """

    stored: Stored
    treatment: Treatment
    notes: tuple[str, ...] = ()
    words: str = ""


Treat: TypeAlias = Callable[[ModuleWeight, Floats, Any], WeightOutcome]


def each_matrix(treat: Treat) -> Treat:
    """Return what treats each matrix of a stack by itself, and stacks what is made of them."""

    def treat_each(weight: ModuleWeight, array: Floats, config: Any) -> WeightOutcome:
        matrices = weight.matrices()
        outcomes = [treat(matrix, array[matrix.index], config) for matrix in matrices]
        if len(outcomes) == 1:
            return outcomes[0]
        shape = weight.shape[: len(matrices[0].index)]
        return replace(
            outcomes[0],
            stored=Stored(stacked([outcome.stored.folded() for outcome in outcomes], shape)),
            notes=tuple(dict.fromkeys(note for outcome in outcomes for note in outcome.notes)),
            words=f"{outcomes[0].words}, {len(matrices)} matrices",
        )

    return treat_each


@dataclass(frozen=True, slots=True)
class Task:
    """A weight, the config of its module, ``None`` to leave it, and why that can't be followed."""

    weight: ModuleWeight
    config: Any
    reason: str = ""


def compress_weights(
    model: nn.Module,
    tasks: Sequence[Task],
    treat: Treat,
    progress: Progress | bool | None = None,
    notes: Sequence[str] = (),
) -> Report:
    """Compress the weights of a model in place, and say so in the buffers of its modules.

    Parameters
    ----------
    model
        The model; nothing of it is copied.
    tasks
        What is asked for each of its weights.
    treat
        Makes of a weight and its config what is to be stored. What it raises an `UnsupportedError`
        for is left.
    progress
        ``True`` shows a bar; a function is called with elements done, elements in all and the name
        of the weight at hand.
    notes
        What the report is to say of all weights.
    """
    groups = tied(tasks)
    total = sum(group[0].weight.size for group in groups)
    n_done = 0
    rows: dict[str, dict[str, Any]] = {}
    weights: list[WeightReport] = []
    with shown(progress) as note:
        for group in groups:
            note(n_done, total, group[0].weight.name)
            row, weight = compress_together(group, treat)
            rows.update({task.weight.name: dict(row) for task in group})
            weights.append(weight)
            if weight.status == "left":
                _logger.warning("%s: %s. Left as it is.", weight.name, weight.note)
            n_done += group[0].weight.size
        note(total, total, "")
    if any(weight.status == "compressed" for weight in weights):
        _metadata.register_version(model)
    return Report(rows, weights, notes)


def compress_faked(
    model: nn.Module,
    weights: Sequence[ModuleWeight],
    treat: Treat,
    progress: Progress | bool | None = None,
) -> Report:
    """Compress weights as the layers do that faked it in training, and take these layers out."""
    names = [f"{weight.parameter_name}_fake_quant" for weight in weights]
    tasks = [Task(w, getattr(w.module, name)) for w, name in zip(weights, names, strict=True)]
    report = compress_weights(model, tasks, treat, progress)
    for weight, name in zip(weights, names, strict=True):
        delattr(weight.module, name)
    return report


def tied(tasks: Iterable[Task]) -> list[list[Task]]:
    """Return the tasks of each parameter that something is asked for, in order."""
    groups: dict[int, list[Task]] = {}
    for task in tasks:
        tensor = task.weight.tensor
        groups.setdefault(id(task if tensor is None else tensor), []).append(task)
    return [group for group in groups.values() if any(task.config is not None for task in group)]


def asking(group: Sequence[Task]) -> Task:
    """Return the task whose config holds for a parameter."""
    return next(task for task in group if task.config is not None)


def compress_together(group: Sequence[Task], treat: Treat) -> tuple[dict[str, Any], WeightReport]:
    """Compress a parameter that some modules, mostly one, hold together; return its reports."""
    asked = asking(group)
    if asked.reason:
        return left(asked.weight, asked.reason)
    others = [task.weight.name for task in group if task is not asked]
    notes = [f"tied to {', '.join(others)}"] if others else []
    if _metadata.prefix_of(asked.weight.module) != _metadata.PREFIX:
        notes.append("ct.convert keeps it dense, milpress.torch.convert stores it compressed")
    if any(task.config != asked.config for task in group):
        notes.append(f"compressed as {asked.weight.name} asks, though the others ask otherwise")
    try:
        outcome, row, snr = _compress(asked, [task.weight for task in group], treat)
    except UnsupportedError as error:
        return left(asked.weight, str(error))
    notes = [*outcome.notes, *notes]
    report = replace(
        _as_it_is(asked.weight, "; ".join(notes)),
        status="compressed",
        treatment=describe(outcome.treatment) + outcome.words,
        bytes_after=outcome.stored.n_bytes,
        snr_db=snr,
    )
    return {**row, **({"note": report.note} if notes else {})}, report


@torch.no_grad()
def _compress(
    asked: Task, holders: list[ModuleWeight], treat: Treat
) -> tuple[WeightOutcome, dict[str, Any], float | None]:
    weight = asked.weight
    tensor: Any = weight.tensor
    if nn.parameter.is_lazy(tensor):
        msg = "the parameter has no shape yet, run the model once"
        raise UnsupportedError(msg)
    if max(weight.axes) >= tensor.ndim > 1:
        msg = f"register_module says that its axes are {weight.axes}, but it has {tensor.ndim}"
        raise UnsupportedError(msg)
    if tensor.is_meta:
        msg = (
            "it has no values, as the model is on meta; compress_checkpoint takes them from files, "
            "without the model in memory"
        )
        raise UnsupportedError(msg)
    if weight.size == 0:
        msg = "the parameter has no elements"
        raise UnsupportedError(msg)
    if any(_metadata.is_coded(holder) for holder in holders):
        msg = "compressed already"
        raise UnsupportedError(msg)
    # A view of the parameter's own memory, or a copy of what is no float32 or float16 on the CPU.
    array = as_float(whole(tensor))
    outcome = treat(weight, array, asked.config)
    dense = torch.from_numpy(outcome.stored.dense()).to(tensor.dtype)
    signal, noise, _ = fidelity(array, as_float(dense))
    row = {"error": math.sqrt(noise / array.size), "#params": array.size, **_columns(outcome)}
    tensor.copy_(_spread_like(dense, tensor) if is_spread(tensor) else dense)
    for holder in holders:
        _metadata.register(holder, outcome.stored)
    return outcome, row, decibels(signal, noise)


def _spread_like(dense: torch.Tensor, tensor: Any) -> torch.Tensor:
    from torch.distributed.tensor import distribute_tensor

    dense = dense.to(tensor.device_mesh.device_type)
    return distribute_tensor(dense, tensor.device_mesh, tensor.placements)


def _columns(outcome: WeightOutcome) -> dict[str, Any]:
    """Return what coremltools reports of a value."""
    value = outcome.stored.value
    columns: dict[str, Any] = {}
    if isinstance(value, (Masked, Sparse)):
        zero: NDArray[np.bool_] = np.logical_not(value.mask())
        rows: NDArray[np.bool_] = np.asarray(zero.reshape(len(zero), -1).all(axis=1))
        columns["structured_weight_sparsity"] = float(rows.mean())
        columns["unstructured_weight_sparsity"] = float(zero.mean())
        if len(rows) % 2 == 0:
            columns["block2_weight_sparsity"] = float(rows.reshape(-1, 2).all(axis=1).mean())
    value = value.value if isinstance(value, Masked) else value
    quantized = value.lut if isinstance(value, Palette) else value
    if isinstance(quantized, Quantized):
        columns["dtype"] = f"dtype={quantized.dtype}"
    if isinstance(value, Palette):
        n_clusters, cluster_dim = value.lut.shape[-2:]
        columns["palettization_mode"] = f"num_clusters={n_clusters}, cluster_dim={cluster_dim}"
    return columns


def left(weight: ModuleWeight, note: str) -> tuple[dict[str, Any], WeightReport]:
    """Return the reports of a weight that is left."""
    report = _as_it_is(weight, note)
    return {"error": 0.0, "#params": report.size, "note": note}, report


def _as_it_is(weight: ModuleWeight, note: str) -> WeightReport:
    tensor = weight.tensor
    n_bytes = 0 if tensor is None else weight.size * tensor.dtype.itemsize
    return WeightReport(
        name=weight.name,
        op_types=(type(weight.module).__name__,),
        shape=weight.shape,
        status="left",
        treatment="",
        note=note,
        bytes_before=n_bytes,
        bytes_after=n_bytes,
    )
