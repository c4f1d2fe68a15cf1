"""Compression of checkpoints, from files to files: of models larger than memory."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from milpress.compression.report import WeightReport
from milpress.errors import ConfigError, DestinationError
from milpress.mil.features import times
from milpress.plain import json
from milpress.plain.files import check_free, draft_in_place_of, folder_in_place_of, system_errors
from milpress.progress import Progress, shown
from milpress.torch import _metadata
from milpress.torch._compression import Task, Treat, asking, compress_together, left, tied
from milpress.torch._mapped import mapped
from milpress.torch._report import Report
from milpress.torch._safetensors import Checkpoint, ShardWriter

__all__ = ["load_compressed"]

_logger = logging.getLogger(__name__)

_N_NAMED = 3
_VERSION = f"{_metadata.PREFIX}/metadata_version"


def compress_checkpoint(
    model: nn.Module,
    tasks: Sequence[Task],
    treat: Treat,
    source: Path,
    destination: Path,
    *,
    force: bool,
    progress: Progress | bool | None,
) -> Report:
    """Do what `PostTrainingPalettizer.compress_checkpoint` does, with any treatment."""
    checkpoint = Checkpoint(source)
    _check_destination(checkpoint, destination, force=force)
    streaming = _Streaming(model, tied(tasks), treat, checkpoint)
    with shown(progress) as note:
        streaming.note = note
        _write(checkpoint, destination, streaming)
        streaming.finish()
    return streaming.report


def compress_running(
    model: nn.Module,
    compress: Callable[[], Report],
    source: Path,
    destination: Path,
    *,
    force: bool,
) -> Report:
    """Compress a model that runs for it, in place, with its values in files.

    Parameters
    ----------
    model
        The model.
    compress
        Compresses it, and returns the report.
    source, destination, force
        As of `PostTrainingPalettizer.compress_checkpoint`.
    """
    checkpoint = Checkpoint(source)
    _check_destination(checkpoint, destination, force=force)
    state = _state(model)
    _check_names(state, checkpoint)
    _check_buffers(model, state)
    values = {
        id(tensor): partial(checkpoint.__getitem__, name)
        for name, tensor in state.items()
        if name in checkpoint
    }
    with mapped(model, values, destination.parent):
        modules = dict(model.named_modules(remove_duplicate=False))
        for name in checkpoint:
            if name not in state and _is_buffer(name) and _owner(name) in modules:
                _register(modules[_owner(name)], name, checkpoint[name])
        report = compress()
        _write(checkpoint, destination, _Compressed(model, checkpoint))
    return report


class _Contents(Protocol):
    """What is written in the place of a checkpoint."""

    def write(self, name: str, writer: ShardWriter) -> None:
        """Write what a tensor of the checkpoint has become, and what belongs to it."""

    @property
    def is_compressed(self) -> bool:
        """Whether something of it is compressed."""


def _write(checkpoint: Checkpoint, destination: Path, contents: _Contents) -> None:
    """Write a file, or a folder of shards and their index, as a checkpoint is."""
    if not checkpoint.path.is_dir():
        with draft_in_place_of(destination) as draft:
            _write_shards(checkpoint, {checkpoint.path.name: draft}, contents)
        return
    with folder_in_place_of(destination) as folder:
        paths = {name: folder / name for name in checkpoint.shards}
        index = _write_shards(checkpoint, paths, contents)
        if checkpoint.index is not None:
            with system_errors(folder):
                text = json.text(index, indent=2)
                (folder / checkpoint.index.path.name).write_text(f"{text}\n")


def _write_shards(
    checkpoint: Checkpoint, paths: Mapping[str, Path], contents: _Contents
) -> dict[str, Any]:
    """Write each shard to a path; return the index."""
    places: dict[str, str] = {}
    n_bytes = 0
    last = list(paths)[-1]
    for name, path in paths.items():
        shard = checkpoint.shards[name]
        with ShardWriter(path, shard.metadata) as writer:
            for tensor_name in shard:
                # An index may say that another shard holds it.
                if checkpoint.shard_of.get(tensor_name) is shard and tensor_name != _VERSION:
                    contents.write(tensor_name, writer)
            if name == last and contents.is_compressed:
                writer.add(_VERSION, torch.tensor(1))
        places |= dict.fromkeys(writer.names, name)
        n_bytes += writer.n_bytes
    index = checkpoint.index
    metadata = {**({} if index is None else index.metadata), "total_size": n_bytes}
    return {"metadata": metadata, "weight_map": dict(sorted(places.items()))}


class _Compressed:
    """A checkpoint whose values, compressed or not, are in a model."""

    def __init__(self, model: nn.Module, checkpoint: Checkpoint) -> None:
        self._state = _state(model)
        self._checkpoint = checkpoint
        self._new = _by_parameter(name for name in self._state if name not in checkpoint)
        self._names: dict[int, list[str]] = {}
        for name, tensor in self._state.items():
            self._names.setdefault(id(tensor), []).append(name)

    @property
    def is_compressed(self) -> bool:
        """Whether something of it is compressed."""
        return _VERSION in self._state

    def write(self, name: str, writer: ShardWriter) -> None:
        """Write a tensor, and what newly says how it is compressed."""
        values = self._checkpoint[name]
        tensor = self._state.get(name)
        if tensor is None or torch.equal(values.to(tensor.dtype), tensor):
            writer.add(name, values)
        else:
            writer.add(name, tensor.detach())
        for own in self._names.get(id(tensor), []):
            for buffer in self._new.pop(own, ()):
                writer.add(buffer, self._state[buffer])


def _check_destination(checkpoint: Checkpoint, destination: Path, *, force: bool) -> None:
    source = checkpoint.path
    real, real_source = destination.resolve(), source.resolve()
    if real == real_source or (source.is_dir() and real_source in real.parents):
        msg = f"{destination}: the destination must be apart from the source {source}"
        raise DestinationError(msg)
    check_free(destination, force=force, is_package=source.is_dir())
    if source.is_dir() and os.path.lexists(destination) and not _is_checkpoint(destination):
        msg = f"{destination} exists and is no folder of safetensors, so it is not replaced"
        raise DestinationError(msg)


def _is_checkpoint(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and any(path.glob("*.safetensors"))


class _Streaming:
    """A checkpoint on its way through a model, of which memory holds one weight at a time."""

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Sequence[Task]],
        treat: Treat,
        checkpoint: Checkpoint,
    ) -> None:
        self._model = model
        self._groups = groups
        self._treat = treat
        self._checkpoint = checkpoint
        state = _state(model)
        _check_names(state, checkpoint)
        # What a parameter that modules hold together is called in the checkpoint; the last counts,
        # as the last that is loaded.
        self._names: dict[int, list[str]] = {}
        for name, tensor in state.items():
            if name in checkpoint:
                self._names.setdefault(id(tensor), []).append(name)
        self._group_of = {
            name: number
            for number, group in enumerate(groups)
            for name in self._names.get(id(group[0].weight.tensor), [])
        }
        self._asked = {task.weight.name for group in groups for task in group}
        self._described = _by_parameter(checkpoint)
        self._known = state
        self._outcomes: dict[int, tuple[dict[str, Any], WeightReport]] = {}
        # Dense weights of which another name is still to come.
        self._waiting: dict[str, torch.Tensor] = {}
        self._n_done = 0
        self.note: Progress = lambda *_: None

    def write(self, name: str, writer: ShardWriter) -> None:
        """Write a tensor of the checkpoint as it is to be."""
        number = self._group_of.get(name)
        if number is not None and number not in self._outcomes:
            total = sum(group[0].weight.size for group in self._groups)
            self.note(self._n_done, total, name)
            self._compress(number, writer)
        if name in self._waiting:
            writer.add(name, self._waiting.pop(name))
        elif _parameter_of(name) not in self._asked:
            writer.add(name, self._checkpoint[name])

    def finish(self) -> None:
        """Note what no tensor of the checkpoint was."""
        for number, group in enumerate(self._groups):
            if number not in self._outcomes:
                reason = "no tensor of the checkpoint is this parameter"
                self._settle(number, *left(asking(group).weight, reason))
        self.note(self._n_done, self._n_done, "")

    def _compress(self, number: int, writer: ShardWriter) -> None:
        """Compress a parameter; write what its buffers are to be, and let its values wait."""
        group = self._groups[number]
        if asking(group).reason:
            self._settle(number, *compress_together(group, self._treat))
            return
        names = self._names[id(group[0].weight.tensor)]
        with self._loaded(group, names[-1]) as parameter:
            row, report = compress_together(group, self._treat)
            if report.status == "compressed":
                self._waiting |= dict.fromkeys(names, parameter.detach())
            for task in group:
                for name, buffer in _buffers(task):
                    writer.add(name, buffer)
        self._settle(number, row, report)

    def _settle(self, number: int, row: dict[str, Any], report: WeightReport) -> None:
        self._outcomes[number] = row, report
        self._n_done += report.size
        if report.status == "left":
            _logger.warning("%s: %s. Left as it is.", report.name, report.note)

    @property
    def is_compressed(self) -> bool:
        """Whether something of it is compressed."""
        reports = [report for _, report in self._outcomes.values()]
        return _VERSION in self._checkpoint or any(each.status == "compressed" for each in reports)

    @contextlib.contextmanager
    def _loaded(self, group: Sequence[Task], name: str) -> Iterator[nn.Parameter]:
        """Have the values of a parameter, and its buffers, in its modules for the time of a block.

        Afterwards they are as they were.
        """
        weight = asking(group).weight
        before = weight.module._parameters[weight.parameter_name]
        assert before is not None  # noqa: S101 - it has a name in the state dict
        values = self._checkpoint[name].to(before.dtype)
        parameter = nn.Parameter(values, requires_grad=False)
        holders = [task.weight for task in group]
        buffers = [(holder.module, dict(holder.module._buffers)) for holder in holders]
        try:
            for task in group:
                task.weight.module._parameters[task.weight.parameter_name] = parameter
                for own in self._described.get(task.weight.name, ()):
                    _register(task.weight.module, own, self._checkpoint[own])
            yield parameter
        finally:
            for holder in holders:
                holder.module._parameters[holder.parameter_name] = before
            for module, own_buffers in buffers:
                module._buffers.clear()
                module._buffers.update(own_buffers)

    @property
    def report(self) -> Report:
        """What became of each weight, in the order of the model."""
        outcomes = [self._outcomes[number] for number in range(len(self._groups))]
        rows = {
            task.weight.name: dict(row)
            for group, (row, _) in zip(self._groups, outcomes, strict=True)
            for task in group
        }
        unknown = [
            name for name in self._checkpoint if name not in self._known and not _is_buffer(name)
        ]
        notes = [f"Not in the model and copied as they are: {_named(unknown)}."] if unknown else []
        return Report(rows, [report for _, report in outcomes], notes)


def load_compressed(
    model: nn.Module,
    source: str | os.PathLike[str],
    *,
    progress: Progress | bool | None = None,
) -> nn.Module:
    """Load a compressed checkpoint into a model, one tensor at a time.

    What says how weights are compressed, which the model has no names for, becomes buffers of its
    modules, so that it can be converted by `milpress.torch.convert` or ``ct.convert``.

    Parameters
    ----------
    model
        The float model, changed in place. Parameters on ``meta`` are replaced by those of the
        checkpoint, in their own type.
    source
        A file of safetensors, or a folder of one or with an index, such as
        `PostTrainingPalettizer.compress_checkpoint` writes.
    progress
        ``True`` shows a bar; a function is called with tensors done, how many there are in all and
        the name of the one at hand.

    Returns
    -------
    torch.nn.Module
        The model.

    Raises
    ------
    ConfigError
        If model and checkpoint don't have the same names and shapes, or a buffer that the
        checkpoint lacks is on ``meta``.
    PackageNotFoundError
        If the checkpoint, or a shard of it, is missing.
    PackageError
        If it is damaged.
    """
    checkpoint = Checkpoint(Path(source))
    state = _state(model)
    _check_names(state, checkpoint)
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in checkpoint:
        owner = _owner(name)
        if name not in state and (not _is_buffer(name) or owner not in modules):
            msg = f"{checkpoint.shard_of[name].path}: holds {name}, which the model lacks"
            raise ConfigError(msg)
    _check_buffers(model, state)
    holders = _holders(model)
    own = [name for name in state if name in checkpoint]
    others = [name for name in checkpoint if name not in state]
    total = len(own) + len(others)
    with shown(progress) as note:
        for i, name in enumerate(own):
            note(i, total, name)
            _fill(state[name], checkpoint[name], holders[id(state[name])])
        for i, name in enumerate(others, len(own)):
            note(i, total, name)
            _register(modules[_owner(name)], name, checkpoint[name])
        note(total, total, "")
    return model


def _check_buffers(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Raise `ConfigError` if a buffer that no checkpoint has is on ``meta``."""
    for name, buffer in model.named_buffers():
        if buffer.is_meta and name not in state:
            msg = (
                f"{name} is no part of a checkpoint but made with the model, which is on meta, "
                "where it has no values; build the model on the CPU"
            )
            raise ConfigError(msg)


@torch.no_grad()
def _fill(target: torch.Tensor, values: torch.Tensor, holders: list[tuple[nn.Module, str]]) -> None:
    """Give a parameter or buffer its values; one on ``meta`` is replaced, in all its modules."""
    holder, own_name = holders[0]
    current = getattr(holder, own_name)
    if not current.is_meta:
        current.copy_(values)
        return
    values = values.to(target.dtype)
    if isinstance(target, nn.Parameter):
        values = nn.Parameter(values, requires_grad=target.requires_grad)
    for module, name in holders:
        setattr(module, name, values)


def _holders(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Return the modules that hold each parameter and buffer, and its name there."""
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    holders.setdefault(id(tensor), []).append((module, name))
    return holders


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    state = model.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def _check_names(state: Mapping[str, torch.Tensor], checkpoint: Checkpoint) -> None:
    """Raise `ConfigError` if a checkpoint lacks something of a model, or has it in another shape.

    Tied parameters may have one name there.
    """
    present = {id(tensor) for name, tensor in state.items() if name in checkpoint}
    missing: dict[int, str] = {}
    for name, tensor in state.items():
        if id(tensor) not in present:
            missing.setdefault(id(tensor), name)
    if missing:
        msg = (
            f"{checkpoint.path}: lacks {_named(list(missing.values()))}, which the model has; if "
            "they are tied to others, tie them in the model (of transformers: model.tie_weights())"
        )
        raise ConfigError(msg)
    for name, tensor in state.items():
        if name not in checkpoint or nn.parameter.is_lazy(tensor):
            continue
        shard = checkpoint.shard_of[name]
        shape = shard.entries[name].shape
        if shape != tuple(tensor.shape):
            msg = (
                f"{shard.path}: {name} must have the shape {times(tensor.shape)}, as in the model, "
                f"got {times(shape)}"
            )
            raise ConfigError(msg)


def _named(names: Sequence[str]) -> str:
    more = len(names) - _N_NAMED
    return ", ".join(names[:_N_NAMED]) + (f" and {more} more" if more > 0 else "")


def _buffers(task: Task) -> list[tuple[str, torch.Tensor]]:
    """Return what says how a weight is compressed, by the names of a state dict."""
    named = (
        (f"{task.weight.module_name}.{name}".removeprefix("."), buffer)
        for name, buffer in task.weight.module.named_buffers(recurse=False)
    )
    return [(name, buffer) for name, buffer in named if _parameter_of(name) == task.weight.name]


def _by_parameter(names: Iterable[str]) -> dict[str, list[str]]:
    """Return, of some names, those of buffers that say how a parameter is compressed, by it."""
    found: dict[str, list[str]] = {}
    for name in names:
        parameter = _parameter_of(name)
        if parameter:
            found.setdefault(parameter, []).append(name)
    return found


def _parameter_of(name: str) -> str:
    """Return the parameter that a buffer is about, by their names; empty if it is about none."""
    own = name.removeprefix(_owner(name)).removeprefix(".")
    prefix, _, rest = own.partition("/")
    parameter, is_about, _ = rest.partition("/")
    if prefix not in (_metadata.PREFIX, _metadata.OWN_PREFIX) or not is_about:
        return ""
    return f"{_owner(name)}.{parameter}".removeprefix(".")


def _is_buffer(name: str) -> bool:
    """Whether a name is that of a buffer that says how a weight is compressed."""
    own = name.removeprefix(_owner(name)).removeprefix(".")
    return own.startswith((f"{_metadata.PREFIX}/", f"{_metadata.OWN_PREFIX}/"))


def _owner(name: str) -> str:
    """Return the name of the module that a buffer is of."""
    return name.partition("/")[0].rpartition(".")[0]


def _register(module: nn.Module, name: str, buffer: torch.Tensor) -> None:
    module.register_buffer(name.removeprefix(_owner(name)).removeprefix("."), buffer)
