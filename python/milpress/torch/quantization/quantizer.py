"""Quantization while a model is trained."""

from __future__ import annotations

import logging
import math
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.fx.graph_module import _USER_PRESERVED_ATTRIBUTES_KEY

from milpress.compression.report import WeightReport
from milpress.errors import ConfigError, UnsupportedError
from milpress.formats import Blocks, PerChannel, PerTensor, QuantizeConfig, Quantized
from milpress.formats.joint import masked
from milpress.formats.rows import Floats
from milpress.progress import Progress
from milpress.recipe import describe
from milpress.torch import _lifecycle
from milpress.torch._compression import WeightOutcome, compress_faked
from milpress.torch._left import left_weights, prepared, trained
from milpress.torch._metadata import Stored
from milpress.torch._module_weights import ModuleWeight, attention_around, weights_of
from milpress.torch._report import Report
from milpress.torch._substitution import places
from milpress.torch.base_model_optimizer import BaseTrainingTimeModelOptimizer
from milpress.torch.optimization_config import OptimizationConfig
from milpress.torch.pruning.magnitude_pruner import kept_of, masks_lifted
from milpress.torch.quantization import _graph, _hooked
from milpress.torch.quantization._fake_quantize import FakeQuantize
from milpress.torch.quantization._folding import (
    RoundedLayer,
    RoundedWeight,
    channel_scale,
    fold,
    freeze,
    thaw,
)
from milpress.torch.quantization._hooked import HookedPlacing
from milpress.torch.quantization._recording import Recording
from milpress.torch.quantization.quantization_config import (
    LinearQuantizerConfig,
    ModuleLinearQuantizerConfig,
    QuantizationScheme,
)
from milpress.torch.registration import KINDS

__all__ = ["LinearQuantizer"]

_logger = logging.getLogger(__name__)


class LinearQuantizer(BaseTrainingTimeModelOptimizer):
    """Quantizes weights and activations while a model is trained.

    In training, weights and activations are rounded to integers and back, and their gradients pass
    through the rounding, so that the model learns to do with what integers can say.

    Parameters
    ----------
    model
        The model. Where ``torch.fx`` can't trace it, its modules stay as they are, and what their
        layers take and give is rounded by hooks.
    config
        What to do to which module; by default int8 weights with a scale for each output channel,
        and uint8 activations.

    Examples
    --------
    >>> quantizer = LinearQuantizer(torch.nn.Sequential(torch.nn.Linear(4, 4)))
    >>> model = quantizer.prepare(example_inputs=(torch.zeros(1, 4),))
    >>> _ = model(torch.randn(8, 4))  # and train it
    >>> quantizer.step()
    >>> model = quantizer.finalize()
    >>> [name for name, _ in model.named_children()]
    ['0', 'activation_post_process_0', 'activation_post_process_1']
    """

    _supported_modules = KINDS
    _config_class = LinearQuantizerConfig
    _purpose = _lifecycle.QUANTIZATION

    def __init__(self, model: nn.Module, config: OptimizationConfig | None = None) -> None:
        super().__init__(model, config)
        self._is_prepared = False
        self._milestones: list[int] | None = self._config.milestones
        self._left: dict[str, str] = {}
        self._notes: list[str] = []

    def prepare(  # type: ignore[override]
        self, example_inputs: tuple[Any, ...], inplace: bool = False
    ) -> nn.Module:
        """Insert layers that round; a second call changes nothing.

        Parameters
        ----------
        example_inputs
            What the model's ``forward`` takes. It tells which values are no floats, and what layers
            that are not in a graph have between them; batches and sizes may differ in training.
        inplace
            Whether to use the modules of the model itself.

        Returns
        -------
        torch.nn.Module
            The model in training mode: a ``torch.fx.GraphModule``, or a model of its own class
            where ``torch.fx`` can't trace it. Layers keep their classes and the names of their
            parameters; those that are quantized have a layer ``weight_fake_quant``.

        Raises
        ------
        LifecycleError
            If the model is prepared for pruning: quantization is to be prepared first. If it is
            prepared for palettization, and ``inplace`` is not set or a weight is asked for that is
            palettized.
        UnsupportedError
            If ``torch.fx`` can't trace the model, and it can't run on the example inputs.
        """
        if self._is_prepared:
            _logger.warning("the model has been prepared already: nothing is changed")
            return self._model
        source = self._begin(inplace)
        self._warn_of_typos()
        layers: dict[str, RoundedLayer] = {}
        model: nn.Module
        try:
            graph = _graph.traced(source, self._config.non_traceable_module_names)
        except Exception as error:  # whatever symbols meet in a user's own model
            _logger.debug("torch.fx can't trace the model", exc_info=True)
            model, parts = source, [""]
            self._notes = [f"torch.fx can't trace the model ({error}): layers round by hooks"]
        else:
            placing = _graph.Placing(graph, self._config_of, _graph.ranks(graph, example_inputs))
            placing.insert()
            model, parts = graph, placing.parts()
            for layer in placing.layers:
                layers.setdefault(layer.name, layer)
        hooked = self._hooked(model, example_inputs, parts)
        if hooked is not None:
            layers |= {layer.name: layer for layer in hooked.layers}
        hosted = {weights[0].module_name: weights for weights, _, _ in places(model, KINDS)}
        for name in layers:
            _lifecycle.check_unclaimed(hosted[name], self._purpose)
        if hooked is not None:
            hooked.insert()
        shared: dict[int, FakeQuantize] = {}
        for weights, host, path in places(model, KINDS):
            if weights[0].module_name in layers:
                self._attach(model, layers[weights[0].module_name], weights, host, path, shared)
        for fake in _fakes(model):
            fake.follows_once = fake.is_learnable and self._milestones is None
            if self._milestones is not None:
                fake.enable_observer(False)
                fake.enable_fake_quant(False)
        self._preserve(source, model)
        self._is_prepared = True
        _lifecycle.succeed(source, model)
        return self._take(model.train())

    def _hooked(
        self, model: nn.Module, inputs: tuple[Any, ...], parts: list[str]
    ) -> HookedPlacing | None:
        """Return what is rounded inside parts of a model that are no graph."""
        if not parts:
            return None

        def within(name: str) -> bool:
            return any(not part or f"{name}.".startswith(f"{part}.") for part in parts)

        try:
            run = Recording(model, inputs)
        except Exception as error:  # whatever a user's own model raises
            msg = f"the model can't run on example_inputs: {error}"
            if parts == [""]:
                raise UnsupportedError(msg) from error
            for weight in weights_of(model, KINDS):
                if within(weight.module_name):
                    self._left[weight.name] = f"torch.fx does not look into its module, and {msg}"
            return None
        hooked = HookedPlacing(model, run, self._layer_config, within)
        floats = hooked.floats()
        if floats:
            where = "" if parts == [""] else f" of {', '.join(parts)}"
            self._notes.append(f"float between the layers{where}: {', '.join(floats)}")
        return hooked

    def _layer_config(self, name: str, module: nn.Module) -> Any:
        attention = None if self._config.is_named(name) else attention_around(self._source, name)
        return self._config.get_module_config(*(attention or (name, module)))

    def _config_of(self, name: str, module: Any) -> Any:
        if isinstance(module, nn.Module):
            return self._config.get_module_config(name, module)
        return self._config.module_type_configs.get(module, self._config.global_config)

    def _attach(
        self,
        model: nn.Module,
        layer: RoundedLayer,
        weights: list[ModuleWeight],
        host: nn.Module,
        path: str,
        shared: dict[int, FakeQuantize],
    ) -> None:
        """Let a module compute with rounded weights; those that share a weight share how."""
        names = []
        for weight in weights:
            if weight.tensor is None:
                continue
            try:
                fake = shared.get(id(weight.tensor)) or _weight_layer(weight, layer.config)
            except UnsupportedError as error:
                self._left[weight.name] = str(error)
                _logger.warning("%s: %s. Left as it is.", weight.name, error)
                continue
            shared[id(weight.tensor)] = fake.to(weight.tensor.device)
            weight.module.add_module(f"{weight.parameter_name}_fake_quant", fake)
            names.append(weight.parameter_name)
        if names:
            norm = None if layer.norm is None else model.get_submodule(layer.norm)
            RoundedWeight(path, tuple(names), norm, weights[0].axes[0]).attach(host)

    def _preserve(self, source: nn.Module, model: nn.Module) -> None:
        """Give a graph what the model had beside parameters."""
        preserved: dict[str, Any] = {}
        for name in self._config.preserved_attributes:
            if not hasattr(source, name):
                msg = f"preserved_attributes must name what the model has, got {name!r}"
                raise ConfigError(msg)
            value = getattr(source, name)
            if isinstance(value, types.MethodType) and value.__self__ is source:
                value = types.MethodType(value.__func__, model)
            preserved[name] = value
        if model is source:
            return
        for name, value in preserved.items():
            object.__setattr__(model, name, value)
        meta: dict[str, Any] = model.meta  # type: ignore[assignment]
        meta[_USER_PRESERVED_ATTRIBUTES_KEY] = preserved

    def step(self) -> None:
        """Go one step further, and do what the milestones say."""
        if not self._is_prepared:
            _logger.warning("prepare must be called before step: nothing is changed")
            return
        if self._milestones is None:
            return
        follow, round_, stay, freeze_at = self._milestones
        for fake in _fakes(self._model):
            if self._step_count == follow:
                fake.enable_observer(True)
            if self._step_count == round_:
                fake.enable_fake_quant(True)
            if self._step_count == stay:
                fake.enable_observer(False)
        if self._step_count == freeze_at:
            freeze(self._model)
        self._step_count += 1

    def load_state_dict(self, state_dict: Any) -> None:
        """Go on from a checkpoint; load the state of the prepared model, too.

        Raises
        ------
        ConfigError
            If it is nothing that `state_dict` returned.
        """
        super().load_state_dict(state_dict)
        freeze_at = -1 if self._milestones is None else self._milestones[3]
        if self._is_prepared and 0 <= freeze_at < self._step_count:
            freeze(self._model)

    def finalize(
        self,
        model: nn.Module | None = None,
        inplace: bool = False,
        *,
        progress: Progress | bool | None = None,
    ) -> nn.Module:
        """Round the weights for good, and put ops that round where layers did.

        Parameters
        ----------
        model, inplace, progress
            As of `BaseTrainingTimeModelOptimizer.finalize`.

        Returns
        -------
        torch.fx.GraphModule
            The model, or a copy of it, in evaluation mode. Batch normalization that follows a
            quantized layer is folded into it. What never ran is left as it is, with a warning.
        """
        if not self._is_prepared:
            _logger.warning("prepare must be called before finalize: nothing is changed")
            return self._model
        with self._finalizing(model, inplace) as finalized:
            finalized.eval()
            weights = []
            norms: dict[str, nn.Module] = {}
            named = {id(module): name for name, module in finalized.named_modules()}
            for module in finalized.modules():
                thaw(module)
                for rounded in RoundedWeight.of(module):
                    rounded.detach(module)
                    owner = module.get_submodule(rounded.path)
                    owned = [ModuleWeight(named[id(owner)], owner, n) for n in rounded.names]
                    weights.extend(owned)
                    if rounded.norm is not None:
                        norms[named[id(rounded.norm)]] = module
            with masks_lifted(finalized):
                for name, layer in norms.items():
                    fold(layer, finalized.get_submodule(name))
                report = compress_faked(finalized, weights, _quantized, progress)
            self._unfinished = report.left
            unused = []
            if isinstance(finalized, fx.GraphModule):
                unused = _graph.settle(finalized, set(norms))
            present = [name for name in norms if _has(finalized, name)]
            for name in unused + _hooked.settle(finalized, present):
                _logger.warning("%s: nothing passed it. Left out.", name)
        return finalized

    def enable_observer_sync(self) -> None:
        """Let the ranges of all processes of a group be one; they are, unless this is disabled."""
        self._synchronize(True)

    def disable_observer_sync(self) -> None:
        """Let each process have its own ranges, such as for training on one of them alone."""
        self._synchronize(False)

    def _synchronize(self, enabled: bool) -> None:
        for fake in _fakes(self._model):
            fake.activation_post_process.synchronize = enabled

    def report(self) -> Report:
        """Return a row for each weight and each place where activations are rounded.

        The columns are ``type``, ``device``, ``algorithm``, ``qscheme``, ``per_channel``,
        ``dtype``, ``qmin``, ``qmax``, and for weights ``error`` (root mean square) and ``#params``,
        which are NaN and -1 for activations. ``left`` has the weights that are not quantized though
        they are asked for, and why; ``notes`` say what computes with floats where the model is no
        graph.
        """
        rounded = list(_rounded_weights(self._model))
        of_weights = {id(fake) for _, _, fake in rounded}
        rows: dict[str, dict[str, Any]] = {}
        for name, module in self._model.named_modules():
            for weight, hook, fake in rounded:
                if weight.module is module:
                    key = weight.name if name in rows else name
                    error = _error(weight, hook, fake)
                    is_one = isinstance(_granularity(weight, fake), PerTensor)
                    rows[key] = {"type": "weight", **_columns(fake, not is_one), **error}
            if isinstance(module, FakeQuantize) and id(module) not in of_weights:
                rows[name] = {
                    "type": "activation",
                    **_columns(module, False),
                    "error": math.nan,
                    "#params": -1,
                }
        reports: dict[int, WeightReport] = {}
        for weight, _, fake in rounded:
            report = prepared(weight, describe(_treatment(weight, fake)), _n_bytes(weight, fake))
            if weight.name not in self._unfinished:
                reports.setdefault(id(trained(weight)), report)
        reasons = self._left | self._unfinished
        left = left_weights(self._model, set(reports), self._is_asked, reasons)
        return Report(rows, [*reports.values(), *left], self._notes)

    def _is_asked(self, weight: ModuleWeight) -> bool:
        config = self._layer_config(weight.module_name, weight.module)
        return config is not None and config.quantizes_weights


def _rounded_weights(
    model: nn.Module,
) -> Iterator[tuple[ModuleWeight, RoundedWeight, FakeQuantize]]:
    """Yield the weights that are rounded, what does it, and the layers that say how."""
    names = {id(module): name for name, module in model.named_modules()}
    for host in model.modules():
        for hook in RoundedWeight.of(host):
            owner = host.get_submodule(hook.path)
            for name in hook.names:
                fake: Any = owner.get_submodule(f"{name}_fake_quant")
                yield ModuleWeight(names[id(owner)], owner, name), hook, fake


def _columns(fake: FakeQuantize, per_channel: bool) -> dict[str, Any]:
    return {
        "device": str(fake.scale.device),
        "algorithm": "learnable" if fake.is_learnable else "vanilla",
        "qscheme": fake.scheme.value,
        "per_channel": per_channel,
        "dtype": str(fake.dtype),
        "qmin": fake.quant_min,
        "qmax": fake.quant_max,
    }


@torch.no_grad()
def _error(weight: ModuleWeight, hook: RoundedWeight, fake: FakeQuantize) -> dict[str, Any]:
    values: torch.Tensor = getattr(weight.module, weight.parameter_name).detach()
    scale = torch.ones(())
    if hook.norm is not None:
        scale = channel_scale(hook.norm, values.ndim, hook.output, weight.module)
    error = 0.0
    if fake.is_begun:
        folded = values * scale
        error = float((fake._rounded(folded) - folded).square().mean().sqrt())
    return {"error": error, "#params": values.numel()}


def _weight_layer(weight: ModuleWeight, config: ModuleLinearQuantizerConfig) -> FakeQuantize:
    sizes = list(weight.shape)
    output, inputs = weight.axes
    n_stack_axes = min(weight.axes)
    shape: tuple[int, ...] = ()
    block_shape = None
    if config.weight_per_channel or n_stack_axes:
        scales = [*sizes[:n_stack_axes], *[1] * (len(sizes) - n_stack_axes)]
        shape = tuple(scales)
    if config.weight_per_channel:
        scales[output] = sizes[output]
        if config.block_size is not None:
            if sizes[inputs] % config.block_size:
                msg = f"block_size must divide the {sizes[inputs]} input channels, got "
                raise UnsupportedError(msg + str(config.block_size))
            scales[inputs] = sizes[inputs] // config.block_size
            block_shape = tuple(size // n for size, n in zip(sizes, scales, strict=True))
        shape = tuple(scales)
    return FakeQuantize(
        config.weight_observer,
        bits=config.weight_n_bits or 8,
        signed=config.weight_dtype == torch.qint8,
        scheme=config.quantization_scheme,
        shape=shape,
        block_shape=block_shape,
        is_learnable=config.algorithm == "learnable",
    )


def _fakes(model: nn.Module) -> list[FakeQuantize]:
    return [module for module in model.modules() if isinstance(module, FakeQuantize)]


def _has(model: nn.Module, name: str) -> bool:
    """Whether a module is still there."""
    return name in dict(model.named_modules())


def _quantized(weight: ModuleWeight, array: Floats, fake: FakeQuantize) -> WeightOutcome:
    """Return the integers of a weight."""
    tensor = weight.tensor
    assert tensor is not None  # noqa: S101 - compress_weights has looked
    if not torch.isfinite(tensor).all():
        msg = "a weight that is not finite (NaN or infinity) can't be quantized"
        raise UnsupportedError(msg)
    if not fake.is_begun:
        fake.activation_post_process(fake.blocked(tensor.detach()))
        fake.take_range()
    scale, offset = fake.integers()
    shape = (1,) * array.ndim if scale.ndim == 1 else tuple(scale.shape)
    scales = scale.reshape(shape).cpu().numpy().astype(array.dtype)
    offsets = offset.reshape(shape).cpu().numpy()
    steps = _steps(array, scales, offsets)
    kind: Any = np.int8 if fake.signed else np.uint8
    value = Quantized(
        codes=steps.clip(fake.quant_min, fake.quant_max).astype(kind),
        scale=scales,
        offset=None if fake.signed and not offsets.any() else offsets.astype(kind),
        bits=fake.bits,
    )
    kept = kept_of(weight)
    stored = Stored(value if kept is None else masked(value, kept.cpu().numpy() != 0))
    return WeightOutcome(stored, _treatment(weight, fake))


def _treatment(weight: ModuleWeight, fake: FakeQuantize) -> QuantizeConfig:
    return QuantizeConfig(
        dtype=f"{'' if fake.signed else 'u'}int{fake.bits}",  # type: ignore[arg-type]
        granularity=_granularity(weight, fake),
        offset=fake.scheme is QuantizationScheme.affine,
    )


def _n_bytes(weight: ModuleWeight, fake: FakeQuantize) -> int:
    """Return the size of codes, scales and offsets."""
    values: torch.Tensor = getattr(weight.module, weight.parameter_name)
    n_bytes = math.ceil(values.numel() * fake.bits / 8)
    n_bytes += fake.scale.numel() * values.dtype.itemsize
    has_offsets = fake.scheme is QuantizationScheme.affine or not fake.signed
    return n_bytes + (fake.scale.numel() if has_offsets else 0)


def _granularity(weight: ModuleWeight, fake: FakeQuantize) -> Any:
    """Return which weights of a matrix share a scale."""
    n_stack_axes = min(weight.axes)
    if fake.block_shape is not None:
        return Blocks(fake.block_shape[n_stack_axes:])
    n_matrices = math.prod(weight.shape[:n_stack_axes])
    is_one_each = n_stack_axes > 0 and fake.scale.numel() == n_matrices
    return PerTensor() if fake.scale.ndim == 1 or is_one_each else PerChannel()


def _steps(array: Floats, scales: Floats, offsets: Any) -> Any:
    for axis, (size, n) in enumerate(zip(array.shape, scales.shape, strict=True)):
        if 1 < n < size:
            scales = np.repeat(scales, size // n, axis=axis)
            offsets = np.repeat(offsets, size // n, axis=axis)
    return np.rint(array.astype(np.float32) * (1 / scales.astype(np.float32))) + offsets
