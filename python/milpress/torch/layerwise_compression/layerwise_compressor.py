"""Compression of a model layer by layer, each with what its compressed predecessors give it."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any, ClassVar

import attrs
import torch
from torch import nn

import milpress._core as _core
from milpress.compression.report import WeightReport
from milpress.errors import ConfigError, ConfigTypeError
from milpress.formats.rows import as_weight
from milpress.plain import fields
from milpress.show import decibels
from milpress.torch import _metadata
from milpress.torch._compression import Progress, Task, compress_together, left
from milpress.torch._report import Report
from milpress.torch._weights import KINDS, Kinds, Weight, weights_of, whole
from milpress.torch.base_model_optimizer import BaseDataCalibratedModelOptimizer
from milpress.torch.layerwise_compression._checkpoint import Checkpoint
from milpress.torch.layerwise_compression._lockstep import Runs
from milpress.torch.layerwise_compression._moments import LAYERS
from milpress.torch.layerwise_compression.algorithms import (
    LayerwiseCompressionAlgorithm,
    LayerwiseCompressionAlgorithmConfig,
    ModuleGPTQConfig,
    OBSCompressionAlgorithm,
)
from milpress.torch.layerwise_compression.input_cacher import (
    DefaultInputCacher,
    FirstLayerInputCacher,
    GPTFirstLayerInputCacher,
    call,
    moved,
)
from milpress.torch.optimization_config import ModuleOptimizationConfig, OptimizationConfig

__all__ = ["LayerwiseCompressor", "LayerwiseCompressorConfig"]

_logger = logging.getLogger(__name__)

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

    module_config_class: ClassVar[type[ModuleOptimizationConfig]] = (
        LayerwiseCompressionAlgorithmConfig
    )

    layers: Any = attrs.field(default=None, validator=_check_layers)
    input_cacher: Any = attrs.field(default="default", converter=_to_cacher)
    calibration_nsamples: int = fields.integer(128, fields.at_least(1))
    mask: str | None = attrs.field(default="attention_mask", kw_only=True)

    def __attrs_post_init__(self) -> None:
        if not (self.global_config or self.module_type_configs or self.module_name_configs):
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


@dataclass(slots=True)
class _Layer:
    """A weight that is to be compressed, and the modules that hold it."""

    number: int
    tasks: list[Task]
    n_calls: int = 1
    seen: dict[int, int] = field(default_factory=dict)  # calls so far, by run
    algorithm: Any = None
    row: dict[str, Any] | None = None
    report: WeightReport | None = None

    @property
    def asked(self) -> Task:
        return next(task for task in self.tasks if task.config is not None)

    @property
    def weight(self) -> Weight:
        return self.asked.weight

    @property
    def is_done(self) -> bool:
        return self.report is not None

    def settle(self, reports: tuple[dict[str, Any], WeightReport]) -> None:
        self.row, self.report = reports
        if self.report.status == "left":
            _logger.warning("%s: %s. Left as it is.", self.weight.name, self.report.note)

    def begin(self) -> Any:
        """Return the algorithm that the layer's inputs go to."""
        if self.algorithm is None:
            kind = LayerwiseCompressionAlgorithm.get_class(self.asked.config.algorithm)
            self.algorithm = kind(self.weight.module, self.asked.config)
        return self.algorithm


@dataclass(frozen=True, slots=True)
class _Given:
    """What a run brings to a layer."""

    module: nn.Module
    value: torch.Tensor
    mask: torch.Tensor | None

    def add_to(self, algorithm: Any) -> None:
        """Give it to the algorithm of the layer."""
        if isinstance(algorithm, OBSCompressionAlgorithm):
            algorithm.add_batch(self.value, mask=self.mask)
        else:
            algorithm.add_batch(self.value, self.module.forward(self.value))

    def trace(self) -> _Trace:
        """Return what tells it from others without keeping it alive."""
        return _Trace(weakref.ref(self.value), self.value._version)


@dataclass(frozen=True, slots=True)
class _Trace:
    value: weakref.ref[torch.Tensor]
    version: int

    def is_of(self, given: _Given) -> bool:
        return self.value() is given.value and self.version == given.value._version


class LayerwiseCompressor(BaseDataCalibratedModelOptimizer):
    """Compresses the layers of a model in the order in which samples come to them.

    Each layer makes up for what rounding does to its output, by what samples put into it after
    all layers before it were compressed. The model may be any program, whose layers are modules
    of the supported classes; each sample runs through it once.

    Parameters
    ----------
    model
        The model.
    config
        What to do to which layer; by default `ModuleGPTQConfig` to all.

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

    _supported_modules: ClassVar[Kinds] = LAYERS
    _config_class: ClassVar[type[OptimizationConfig]] = LayerwiseCompressorConfig

    def compress(  # type: ignore[override]
        self,
        dataloader: Iterable[Any],
        device: str | torch.device = "cpu",
        inplace: bool = False,
        *,
        progress: Progress | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
    ) -> nn.Module:
        """Compress the layers.

        Beside the model, memory holds what is between two layers, for all samples, and the second
        moments of one layer.

        Parameters
        ----------
        dataloader
            Batches that the model is called with: tensors, or arguments in a tuple, list or
            mapping.
        device
            Where to run the model.
        inplace
            Whether to change the model itself, which copies nothing of it.
        progress
            Called with elements done, elements in all and the name of the weight at hand.
        checkpoint
            A folder to keep compressed layers in until all are done. If a run was interrupted, it
            goes on from there, provided that the dataloader gives the same batches again.

        Returns
        -------
        torch.nn.Module
            The model, or a copy of it, with its weights replaced by what their codes stand for;
            scales and tables are in buffers of the modules.

        Raises
        ------
        ConfigError
            If there is no sample, or what was kept is of another model or other settings.
        """
        # Of the model that was given: modules in the config are of it, not of a copy.
        parents = [name for name, _ in self._config.get_layers(self._source)]
        model = self._begin(inplace)
        layers = self._layers(model, parents)
        files = Checkpoint(checkpoint)
        for layer in layers:
            kept = (
                None
                if layer.is_done
                else files.load(layer.number, layer.weight, layer.asked.config)
            )
            if kept is not None:
                layer.settle(_restored(layer, kept))
        total = sum(layer.weight.size for layer in layers)
        few = []
        with _on(model, device), _evaluating(model), _exact():
            calls, masks = self._calls(model, parents, dataloader, device)
            for layer in _in_order(layers, calls, masks):
                if progress is not None:
                    done = sum(each.weight.size for each in layers if each.is_done)
                    progress(done, total, layer.weight.name)
                identity = files.identity(layer.weight, layer.asked.config)
                layer.settle(_compressed(layer))
                files.save(layer.number, identity, _state(layer))
                n_positions = getattr(
                    getattr(layer.algorithm, "moments", None), "n_positions", None
                )
                if n_positions is not None:
                    few += [layer.weight.name] * (n_positions < _ENOUGH * _n_inputs(layer))
        for layer in layers:
            if not layer.is_done:
                reason = "no sample came to the layer by a call of its module"
                layer.settle(left(layer.weight, reason))
        if progress is not None:
            progress(total, total, "")
        self._report = _report(layers, few)
        if len(self._report.left) < len(self._report.weights):
            _metadata.register_version(model)
        files.clear()
        return model

    def _layers(self, model: nn.Module, parents: Sequence[str]) -> list[_Layer]:
        """Return the weights that something is asked for, in the order of the model."""
        groups: dict[int, list[Task]] = {}
        for weight in weights_of(model, self._supported_modules):
            config = None
            if self._config.layers is None or _is_within(weight.module_name, parents):
                config = self._config.get_module_config(weight.module_name, weight.module)
            if isinstance(config, ModuleGPTQConfig) and config.weight_dtype == torch.float32:
                config = None
            tensor = weight.tensor
            task = Task(weight, config)
            groups.setdefault(id(task if tensor is None else tensor), []).append(task)
        asked = [group for group in groups.values() if any(t.config is not None for t in group)]
        layers = [_Layer(number, group) for number, group in enumerate(asked)]
        others = {
            id(weight.tensor): weight.name
            for weight in weights_of(model, KINDS)
            if not isinstance(weight.module, self._supported_modules) and weight.tensor is not None
        }
        for layer in layers:
            try:
                layer.begin()
            except ValueError as error:
                layer.settle(left(layer.weight, str(error)))
                continue
            tied = others.get(id(layer.weight.tensor))
            if tied is not None:
                reason = f"tied to {tied}, to which errors are not fed back"
                layer.settle(left(layer.weight, reason))
            layer.algorithm = None
        return layers

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
            made = cacher(model, self._config.layers)
            batches, kwargs = made.cache(
                dataloader=dataloader, nsamples=n_samples, device=str(device)
            )
            chain = [model.get_submodule(name) for name in parents]
            calls = [partial(_run_chain, chain, batch, kwargs) for batch in batches]
        if not calls:
            msg = "dataloader must give at least one batch, got none"
            raise ConfigError(msg)
        name = self._config.mask
        masks = [batch.get(name) if isinstance(batch, Mapping) else None for batch in batches]
        return calls, masks


def _run(model: nn.Module, batch: Any, device: str | torch.device) -> None:
    call(model, moved(batch, device))


def _run_chain(chain: Sequence[nn.Module], batch: Any, kwargs: Mapping[str, Any]) -> None:
    for layer in chain:
        batch = layer(*(batch if isinstance(batch, tuple) else (batch,)), **kwargs)


def _is_within(name: str, parents: Iterable[str]) -> bool:
    return any(name == parent or name.startswith(f"{parent}.") or not parent for parent in parents)


def _n_inputs(layer: _Layer) -> int:
    return math.prod(layer.weight.shape[1:])


def _in_order(
    layers: Sequence[_Layer],
    calls: Sequence[Callable[[], Any]],
    masks: Sequence[torch.Tensor | None],
) -> Iterator[_Layer]:
    """Yield layers as samples come to them, with an algorithm that has seen what they bring.

    A layer that a sample comes to several times is yielded at the last time.
    """
    _count_calls(layers, calls[0])
    runs = Runs(calls)

    def arrive(layer: _Layer, module: nn.Module, value: torch.Tensor) -> None:
        number = runs.current()
        if layer.is_done or number is None:
            return
        given = _Given(module, value, masks[number])
        seen = layer.seen[number] = layer.seen.get(number, 0) + 1
        if seen < layer.n_calls:
            given.add_to(layer.begin())
        else:
            runs.wait(layer.number, given)

    last: Any = None
    traces: dict[int, _Trace] = {}
    with _arriving(layers, arrive):
        for place, brought in runs.stops():
            layer = layers[place]
            if layer.is_done:
                continue
            found = {number: given.trace() for number, given in brought.items()}
            algorithm = layer.begin()
            is_same = traces.keys() == found.keys() and all(
                traces[number].is_of(given) for number, given in brought.items()
            )
            if is_same and layer.n_calls == 1 and _can_share(algorithm, last):
                algorithm.share(last)
            else:
                last = None
                for given in brought.values():
                    given.add_to(algorithm)
            brought.clear()
            yield layer
            last, traces, layer.algorithm = algorithm, found, None


def _can_share(algorithm: Any, last: Any) -> bool:
    return (
        isinstance(algorithm, OBSCompressionAlgorithm)
        and isinstance(last, OBSCompressionAlgorithm)
        and isinstance(algorithm.weight.module, nn.Linear)
        and isinstance(last.weight.module, nn.Linear)
    )


def _count_calls(layers: Sequence[_Layer], first: Callable[[], Any]) -> None:
    """Find how often a sample comes to each layer."""
    counts = [0] * len(layers)

    def arrive(layer: _Layer, _module: nn.Module, _value: torch.Tensor) -> None:
        counts[layer.number] += 1

    with _arriving(layers, arrive), torch.no_grad():
        first()
    for layer, count in zip(layers, counts, strict=True):
        layer.n_calls = max(1, count)


@contextlib.contextmanager
def _arriving(
    layers: Sequence[_Layer], arrive: Callable[[_Layer, nn.Module, torch.Tensor], None]
) -> Iterator[None]:
    """Call a function whenever a layer is about to be run."""

    def hook_for(layer: _Layer) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            arrive(layer, module, args[0] if args else kwargs["input"])

        return hook

    handles = [
        task.weight.module.register_forward_pre_hook(hook_for(layer), with_kwargs=True)
        for layer in layers
        for task in layer.tasks
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _compressed(layer: _Layer) -> tuple[dict[str, Any], WeightReport]:
    algorithm = layer.algorithm
    if isinstance(algorithm, OBSCompressionAlgorithm):
        return compress_together(layer.tasks, algorithm.treat)
    # An algorithm of the user's own says nothing of what it did but by the weight.
    tensor: Any = layer.weight.tensor
    row, report = left(layer.weight, "")
    before = whole(tensor).clone()
    algorithm.compress()
    algorithm.cleanup()
    signal, noise, _ = _core.compare(
        as_weight(before).reshape(-1), as_weight(whole(tensor)).reshape(-1)
    )
    row = {"error": math.sqrt(noise / report.size), "#params": report.size}
    treatment = layer.asked.config.algorithm
    return row, replace(
        report, status="compressed", treatment=treatment, snr_db=decibels(signal, noise)
    )


def _report(layers: Sequence[_Layer], few: Sequence[str]) -> Report:
    rows = {task.weight.name: dict(layer.row or {}) for layer in layers for task in layer.tasks}
    notes = []
    if few:
        notes.append(
            f"Layers that had fewer than {_ENOUGH} positions of samples for each input, "
            f"which is few: {', '.join(few)}."
        )
    return Report(rows, [layer.report for layer in layers if layer.report is not None], notes)


def _state(layer: _Layer) -> dict[str, Any]:
    """Return what a layer is once it is compressed."""
    tensor: Any = layer.weight.tensor
    return {
        "weight": whole(tensor),
        "buffers": [dict(_own_buffers(task.weight)) for task in layer.tasks],
        "row": layer.row,
        "report": None if layer.report is None else asdict(layer.report),
    }


def _own_buffers(weight: Weight) -> Iterator[tuple[str, torch.Tensor]]:
    for name, buffer in weight.module.named_buffers(recurse=False):
        if name.startswith(f"{_metadata.prefix_of(weight.module)}/{weight.parameter_name}/"):
            yield name, buffer


@torch.no_grad()
def _restored(layer: _Layer, state: Mapping[str, Any]) -> tuple[dict[str, Any], WeightReport]:
    """Make a layer what it was when it was kept."""
    tensor: Any = layer.weight.tensor
    tensor.copy_(state["weight"])
    for task, buffers in zip(layer.tasks, state["buffers"], strict=True):
        for name, buffer in buffers.items():
            task.weight.module.register_buffer(name, buffer)
    return state["row"], WeightReport(**state["report"])


@contextlib.contextmanager
def _on(model: nn.Module, device: str | torch.device) -> Iterator[None]:
    """Have a model on a device, then where it was."""
    first = next(model.parameters(), None)
    if first is None or first.device == torch.device(device):
        yield
        return
    model.to(device)
    try:
        yield
    finally:
        model.to(first.device)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Have a model in evaluation mode, then each module as it was."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def _exact() -> Iterator[None]:
    """Have GPUs multiply float32 in full precision."""
    flags: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [flag.allow_tf32 for flag in flags]
    try:
        for flag in flags:
            flag.allow_tf32 = False
        yield
    finally:
        for flag, allowed in zip(flags, before, strict=True):
            flag.allow_tf32 = allowed
