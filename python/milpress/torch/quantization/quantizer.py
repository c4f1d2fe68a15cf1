"""Quantization while a model is trained."""

from __future__ import annotations

import logging
import math
import types
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.fx.graph_module import _USER_PRESERVED_ATTRIBUTES_KEY

from milpress.errors import ConfigError, UnsupportedError
from milpress.formats import Blocks, PerChannel, PerTensor, QuantizeConfig, Quantized
from milpress.formats.joint import masked
from milpress.formats.rows import Floats
from milpress.progress import Progress
from milpress.torch import _lifecycle
from milpress.torch._compression import WeightOutcome, compress_faked
from milpress.torch._metadata import Stored
from milpress.torch._modes import device_of
from milpress.torch._module_weights import ModuleWeight
from milpress.torch._report import Report
from milpress.torch.base_model_optimizer import BaseTrainingTimeModelOptimizer
from milpress.torch.optimization_config import OptimizationConfig
from milpress.torch.pruning.magnitude_pruner import kept_of, masks_lifted
from milpress.torch.quantization import _graph
from milpress.torch.quantization._fake_quantize import FakeQuantize, QuantizeDequantize
from milpress.torch.quantization._folding import (
    RoundedWeight,
    channel_scale,
    fold,
    freeze,
    thaw,
)
from milpress.torch.quantization.quantization_config import (
    LinearQuantizerConfig,
    ModuleLinearQuantizerConfig,
    QuantizationScheme,
)

__all__ = ["LinearQuantizer"]

_logger = logging.getLogger(__name__)


class LinearQuantizer(BaseTrainingTimeModelOptimizer):
    """Quantizes weights and activations while a model is trained.

    In training, weights and activations are rounded to integers and back, and their gradients pass
    through the rounding, so that the model learns to do with what integers can say.

    Parameters
    ----------
    model
        The model; ``torch.fx`` must be able to trace it.
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

    _supported_modules = _graph.WEIGHTED
    _config_class = LinearQuantizerConfig
    _purpose = _lifecycle.QUANTIZATION

    def __init__(self, model: nn.Module, config: OptimizationConfig | None = None) -> None:
        super().__init__(model, config)
        self._is_prepared = False
        self._milestones: list[int] | None = self._config.milestones

    def prepare(  # type: ignore[override]
        self, example_inputs: tuple[Any, ...], inplace: bool = False
    ) -> nn.Module:
        """Insert layers that round; a second call changes nothing.

        Parameters
        ----------
        example_inputs
            What the model's ``forward`` takes. It tells which values are no floats; batches and
            sizes may differ in training.
        inplace
            Whether to use the modules of the model itself.

        Returns
        -------
        torch.fx.GraphModule
            The model as a graph, in training mode. Layers keep their classes and the names of their
            parameters; those that are quantized have a layer ``weight_fake_quant``.

        Raises
        ------
        LifecycleError
            If the model is prepared for pruning: quantization is to be prepared first. If it is
            prepared for palettization, and ``inplace`` is not set or a weight is asked for that is
            palettized.
        UnsupportedError
            If ``torch.fx`` can't trace the model.
        """
        if self._is_prepared:
            _logger.warning("the model has been prepared already: nothing is changed")
            return self._model
        source = self._begin(inplace)
        self._warn_of_typos()
        try:
            model = _graph.traced(source, self._config.non_traceable_module_names)
        except (fx.proxy.TraceError, TypeError, ValueError) as error:
            msg = (
                f"torch.fx can't trace the model: {error}; name the modules that it should not "
                "look into in non_traceable_module_names"
            )
            raise UnsupportedError(msg) from error
        placing = _graph.Placing(model, self._config_of, _graph.ranks(model, example_inputs))
        layers: dict[str, _graph.RoundedLayer] = {}
        for layer in placing.layers:
            layers.setdefault(layer.name, layer)
        _lifecycle.check_unclaimed(
            [ModuleWeight(name, model.get_submodule(name), "weight") for name in layers],
            self._purpose,
        )
        placing.insert()
        shared: dict[int, FakeQuantize] = {}
        for layer in layers.values():
            self._attach(model, layer, shared)
        for fake in _fakes(model):
            fake.follows_once = fake.is_learnable and self._milestones is None
            if self._milestones is not None:
                fake.enable_observer(False)
                fake.enable_fake_quant(False)
        self._preserve(source, model)
        self._is_prepared = True
        _lifecycle.succeed(source, model)
        return self._take(model.train().to(device_of(source)))

    def _config_of(self, name: str, module: Any) -> Any:
        if isinstance(module, nn.Module):
            return self._config.get_module_config(name, module)
        return self._config.module_type_configs.get(module, self._config.global_config)

    def _attach(
        self, model: nn.Module, layer: _graph.RoundedLayer, shared: dict[int, FakeQuantize]
    ) -> None:
        """Let a layer compute with a rounded weight; layers that share a weight share how."""
        module = model.get_submodule(layer.name)
        weight = ModuleWeight(layer.name, module, "weight")
        try:
            fake = shared.get(id(weight.tensor)) or _weight_layer(weight, layer.config)
        except UnsupportedError as error:
            _logger.warning("%s: %s. Left as it is.", weight.name, error)
            return
        module.add_module("weight_fake_quant", fake)
        shared[id(weight.tensor)] = fake
        norm = None if layer.norm is None else model.get_submodule(layer.norm)
        RoundedWeight(norm, weight.axes[0]).attach(module)

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
            for name, module in finalized.named_modules():
                thaw(module)
                for rounded in RoundedWeight.of(module):
                    rounded.detach(module)
                    weights.append(ModuleWeight(name, module, "weight"))
                    if rounded.norm is not None:
                        norms[named[id(rounded.norm)]] = module
            with masks_lifted(finalized):
                for name, layer in norms.items():
                    fold(layer, finalized.get_submodule(name))
                compress_faked(finalized, weights, _quantized, progress)
            _replace(finalized, set(norms))
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
        which are NaN and -1 for activations.
        """
        rows: dict[str, dict[str, Any]] = {}
        for name, module in self._model.named_modules():
            fake = getattr(module, "weight_fake_quant", None)
            if isinstance(fake, FakeQuantize):
                rows[name] = {"type": "weight", **_columns(fake), **_error(module, fake)}
            elif isinstance(module, FakeQuantize) and not name.endswith("weight_fake_quant"):
                rows[name] = {
                    "type": "activation",
                    **_columns(module),
                    "error": math.nan,
                    "#params": -1,
                }
        return Report(rows)


def _columns(fake: FakeQuantize) -> dict[str, Any]:
    return {
        "device": str(fake.scale.device),
        "algorithm": "learnable" if fake.is_learnable else "vanilla",
        "qscheme": fake.scheme.value,
        "per_channel": fake.scale.ndim > 1,
        "dtype": str(fake.dtype),
        "qmin": fake.quant_min,
        "qmax": fake.quant_max,
    }


@torch.no_grad()
def _error(module: Any, fake: FakeQuantize) -> dict[str, Any]:
    weight: torch.Tensor = module.weight.detach()
    scale = torch.ones(())
    for rounded in RoundedWeight.of(module):
        if rounded.norm is not None:
            scale = channel_scale(rounded.norm, weight.ndim, rounded.output, module)
    error = 0.0
    if fake.is_begun:
        folded = weight * scale
        error = float((fake._rounded(folded) - folded).square().mean().sqrt())
    return {"error": error, "#params": weight.numel()}


def _weight_layer(weight: ModuleWeight, config: ModuleLinearQuantizerConfig) -> FakeQuantize:
    sizes = list(weight.shape)
    output, inputs = weight.axes
    shape: tuple[int, ...] = ()
    block_shape = None
    if config.weight_per_channel:
        scales = [1] * len(sizes)
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


def _replace(model: Any, norms: set[str]) -> None:
    """Put ops that round in the place of layers that did, and take folded modules out."""
    for node in list(model.graph.nodes):
        if node.op != "call_module":
            continue
        name = str(node.target)
        module = model.get_submodule(name) if name not in norms else None
        is_unused = isinstance(module, FakeQuantize) and not module.is_begun
        if module is None or is_unused:
            if is_unused:
                _logger.warning("%s: nothing passed it. Left out.", name)
            node.replace_all_uses_with(node.args[0])
            model.graph.erase_node(node)
        elif isinstance(module, FakeQuantize):
            holder, _, own_name = name.rpartition(".")
            setattr(model.get_submodule(holder), own_name, QuantizeDequantize(module))
    model.delete_all_unused_submodules()
    model.graph.lint()
    model.recompile()


def _quantized(weight: ModuleWeight, array: Floats, fake: FakeQuantize) -> WeightOutcome:
    """Return the integers of a weight."""
    tensor = weight.tensor
    assert tensor is not None  # noqa: S101 - compress_weights has looked
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
    treatment = QuantizeConfig(
        dtype=f"{'' if fake.signed else 'u'}int{fake.bits}",  # type: ignore[arg-type]
        granularity=_granularity(fake),
        offset=fake.scheme is QuantizationScheme.affine,
    )
    stored = Stored(value if kept is None else masked(value, kept.cpu().numpy() != 0))
    return WeightOutcome(stored, treatment)


def _granularity(fake: FakeQuantize) -> Any:
    if fake.block_shape is not None:
        return Blocks(fake.block_shape)
    return PerChannel() if fake.scale.ndim > 1 else PerTensor()


def _steps(array: Floats, scales: Floats, offsets: Any) -> Any:
    for axis, (size, n) in enumerate(zip(array.shape, scales.shape, strict=True)):
        if 1 < n < size:
            scales = np.repeat(scales, size // n, axis=axis)
            offsets = np.repeat(offsets, size // n, axis=axis)
    return np.rint(array.astype(np.float32) * (1 / scales.astype(np.float32))) + offsets
