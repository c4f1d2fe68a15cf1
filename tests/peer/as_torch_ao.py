"""Shows what milpress' `LinearQuantizer` makes in the words of coremltools' tests and `torch.ao`.

coremltools replaces a layer, the batch normalization and the activation behind it by one module,
and gives each place where values are rounded a number. milpress leaves modules as they are. What
stands here for a fused module is a layer behind which nothing is rounded up to its activation.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
import torch.ao.nn.intrinsic as intrinsic
import torch.ao.nn.intrinsic.qat as intrinsic_qat
import torch.ao.nn.qat as plain_qat
import torch.ao.nn.quantized.reference as reference
import torch.ao.quantization as aoquant
from coremltools.optimize.torch.quantization._backend_config import _mod_activations
from coremltools.optimize.torch.quantization.modules import fused_modules as fused
from coremltools.optimize.torch.quantization.modules import qat_modules as qat
from coremltools.optimize.torch.quantization.modules import quantized_modules as quantized
from coremltools.optimize.torch.quantization.modules.learnable_fake_quantize import (
    LearnableFakeQuantize,
)
from torch import fx, nn

from milpress.torch.quantization import LinearQuantizer, ObserverType, QuantizationScheme
from milpress.torch.quantization._fake_quantize import (
    FakeQuantize,
    FixedQuantize,
    QuantizeDequantize,
)

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.Embedding)
LAYERS += (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
ACTIVATIONS = (*_mod_activations, nn.ReLU)
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
PREFIX = "activation_post_process_"


class Shown:
    """A module that is taken for one of another class."""

    def __init__(self, own: nn.Module, kind: type, **attributes: Any) -> None:
        self.own, self.kind = own, kind
        self.__dict__.update(attributes)

    @property
    def __class__(self) -> type:
        return self.kind

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)

    def __getitem__(self, i: int) -> Any:
        return self.parts[i]


class PreparedQuantizer:
    """milpress' `LinearQuantizer`, whose models are shown."""

    def __init__(self, model: nn.Module, config: Any = None) -> None:
        self.own = LinearQuantizer(model, config)

    def prepare(self, example_inputs: Any, inplace: bool = False) -> ShownModel:
        given = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
        return ShownModel(self.own.prepare(given, inplace))

    def step(self) -> None:
        self.own.step()

    def finalize(self, model: ShownModel | None = None, inplace: bool = False) -> ShownModel:
        made = self.own.finalize(None if model is None else model.own, inplace)
        return ShownModel(made, is_final=True)


class ShownModel:
    """A graph of milpress, with coremltools' fused modules and its names for places of rounding."""

    def __init__(self, own: fx.GraphModule, is_final: bool = False) -> None:
        self.own, self.is_final = own, is_final
        self.graph = fx.Graph()
        self.graph.output(self.graph.graph_copy(own.graph, {}))
        self.shown: dict[str, Any] = {}
        self.fakes: dict[int, Shown] = {}
        self._fuse()
        self._number()

    def __call__(self, *args: Any) -> Any:
        return self.own(*args)

    def __getattr__(self, name: str) -> Any:
        if name in self.shown:
            return self.shown[name]
        if name.startswith(PREFIX):
            raise AttributeError(name)
        return getattr(self.own, name)

    def get_submodule(self, name: str) -> Any:
        return self.shown[name] if name in self.shown else self.own.get_submodule(name)

    def children(self) -> Iterator[Any]:
        """Yield the modules that the graph still calls, each once."""
        names = dict.fromkeys(str(n.target) for n in self.graph.nodes if n.op == "call_module")
        return iter({id(found): found for found in map(self.get_submodule, names)}.values())

    def _module(self, node: fx.Node | None) -> nn.Module | None:
        if node is None or node.op != "call_module":
            return None
        return self.own.get_submodule(str(node.target))

    def _fuse(self) -> None:
        for node in list(self.graph.nodes):
            layer = self._module(node)
            if type(layer) not in LAYERS:
                continue
            norm = self._swallow(node, NORMS)
            activation = self._swallow(node, ACTIVATIONS)
            follower = self._module(next(iter(node.users)))
            is_rounded = hasattr(layer, "weight_fake_quant") or isinstance(follower, FakeQuantize)
            self.shown[str(node.target)] = self._layer(layer, norm, activation, is_rounded)

    def _swallow(self, node: fx.Node, kinds: tuple[type, ...]) -> nn.Module | None:
        """Take the node behind out of the graph if it is one of a kind and has no other source."""
        following = next(iter(node.users)) if len(node.users) == 1 else None
        module = self._module(following)
        if type(module) not in kinds:
            return None
        following.replace_all_uses_with(node)
        self.graph.erase_node(following)
        return module

    def _layer(
        self, layer: Any, norm: nn.Module | None, activation: nn.Module | None, is_rounded: bool
    ) -> Shown:
        name = type(layer).__name__
        part = Shown(layer, self._kind_of_layer(layer, name))
        if hasattr(layer, "weight_fake_quant"):
            part.weight_fake_quant = self._fake(layer.weight_fake_quant)
        base, rank = (name[:-2], name[-2:]) if name[-1] == "d" else (name, "")
        if activation is None:
            assert norm is None
            return part
        is_builtin = type(activation) is nn.ReLU and "Transpose" not in name
        bn = "Bn" if norm is not None else ""
        if self.is_final:
            kind = getattr(intrinsic, f"{base}ReLU{rank}") if is_builtin else None
            kind = kind or getattr(quantized, f"Quantized{base}Act{rank}")
        elif not is_rounded:
            kind = getattr(fused, f"{base}{bn}Act{rank}")
        elif is_builtin:
            kind = getattr(intrinsic_qat, f"{base}{bn}ReLU{rank}")
        else:
            kind = getattr(qat, f"{base}{bn}Act{rank}")
        inner = "linear" if base == "Linear" else "conv"
        return Shown(part, kind, act=activation, parts=[part, activation], **{inner: part})

    def _kind_of_layer(self, layer: nn.Module, name: str) -> type:
        if not self.is_final:
            is_rounded = hasattr(layer, "weight_fake_quant") and hasattr(plain_qat, name)
            return getattr(plain_qat, name) if is_rounded else type(layer)
        scale = layer._buffers.get("_COREML_/weight/quantization_scale")
        if scale is None:
            return type(layer)
        offset = layer._buffers.get("_COREML_/weight/zero_point", torch.zeros(()))
        codes = layer.weight.detach() / scale + offset
        bits = int(layer._buffers["_COREML_/weight/quantization_n_bits"])
        torch.testing.assert_close(codes, codes.round(), atol=1e-3, rtol=0)
        assert codes.max() - codes.min() < 2**bits
        return getattr(reference, name)

    def _fake(self, fake: FakeQuantize) -> Shown:
        if id(fake) not in self.fakes:
            axes = "channel" if fake.scale.ndim > 1 else "tensor"
            scheme = "symmetric" if fake.scheme is QuantizationScheme.symmetric else "affine"
            kind = LearnableFakeQuantize if fake.is_learnable else aoquant.FakeQuantize
            if isinstance(fake, FixedQuantize):
                kind = aoquant.FixedQParamsFakeQuantize
            qscheme = getattr(torch, f"per_{axes}_{scheme}")
            self.fakes[id(fake)] = Shown(fake, kind, qscheme=qscheme)
        return self.fakes[id(fake)]

    def _number(self) -> None:
        """Give each place a number.

        coremltools has a place behind dropout, which it takes out, and one behind ``Identity``,
        which shares the range before it.
        """
        i = 0
        modules = {node: self._module(node) for node in self.graph.nodes}
        for node, module in modules.items():
            if isinstance(module, FakeQuantize | QuantizeDequantize):
                name = f"{PREFIX}{i}"
                if isinstance(module, FakeQuantize):
                    self.shown[name] = self._fake(module)
                node.target, node.name = name, name
                i += 1
            elif isinstance(module, DROPOUTS):
                i += isinstance(modules[node.args[0]], FakeQuantize)
            elif isinstance(module, nn.Identity):
                source = modules[node.args[0]]
                if isinstance(source, FakeQuantize):
                    self.shown[f"{PREFIX}{i}"] = self._fake(source)
                    i += 1


class State(OrderedDict[str, torch.Tensor]):
    """A state that is equal to one of the same tensors."""

    def __eq__(self, other: Any) -> bool:
        return self.keys() == other.keys() and all(torch.equal(self[k], other[k]) for k in self)

    __hash__ = None


class RangeObserver(nn.Module):
    """milpress' observer, made as coremltools makes its `EMAMinMaxObserver`."""

    def __init__(
        self, dtype: torch.dtype, qscheme: torch.qscheme, ch_axis: int = -1, bits: int = 8
    ) -> None:
        super().__init__()
        self.dtype, self.qscheme, self.ch_axis, self.bits = dtype, qscheme, ch_axis, bits
        self.own = self.fake()

    def fake(self, channels: int | None = None, is_learnable: bool = False) -> FakeQuantize:
        is_symmetric = self.qscheme in (torch.per_tensor_symmetric, torch.per_channel_symmetric)
        scheme = QuantizationScheme.symmetric if is_symmetric else QuantizationScheme.affine
        return FakeQuantize(
            ObserverType.ema_min_max,
            bits=self.bits,
            signed=self.dtype == torch.qint8,
            scheme=scheme,
            shape=() if channels is None else (channels, 1, 1, 1),
            is_learnable=is_learnable,
        )

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        if self.ch_axis == 0 and not self.own.is_begun:
            self.own = self.fake(values.shape[0])
        self.own.enable_fake_quant(False)
        return self.own(values)

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.own.integers()

    def state_dict(self, **of_owner: Any) -> Any:
        return super().state_dict(**of_owner) if of_owner else State(self.own.state_dict())

    def load_state_dict(self, state: State) -> None:  # type: ignore[override]
        if self.ch_axis == 0:
            self.own = self.fake(len(state["scale"]))
        self.own.load_state_dict(state)


class LearnableLayer(aoquant.FakeQuantizeBase):
    """milpress' learnable layer, made as coremltools makes its `LearnableFakeQuantize`."""

    def __init__(
        self,
        observer: type[RangeObserver],
        dtype: torch.dtype,
        qscheme: torch.qscheme,
        reduce_range: bool,
    ) -> None:
        super().__init__()
        self.dtype, self.qscheme, self.reduce_range = dtype, qscheme, reduce_range
        self.activation_post_process = observer(dtype, qscheme, bits=7 if reduce_range else 8)
        self.own = self.activation_post_process.fake(is_learnable=True)
        self.ch_axis, self.channel_count = -1, 1
        self.device = self.shape = self.mask_shape = None

    scale = property(lambda self: self.own.scale)
    zero_point = property(lambda self: self.own.zero_point)

    def set_ch_axis(self, axis: int) -> None:
        self.ch_axis = axis

    def set_param_shape(self, shape: tuple[int, ...]) -> None:
        self.channel_count = shape[self.ch_axis]
        self.own = self.activation_post_process.fake(self.channel_count, is_learnable=True)
        self.shape, self.mask_shape = shape, list(self.own.scale.shape)

    def set_device(self, device: torch.device) -> None:
        self.device = device
        self.own.to(device)

    def enable_fake_quant(self, enabled: bool = True) -> None:
        super().enable_fake_quant(enabled)
        self.own.enable_fake_quant(enabled)

    def enable_observer(self, enabled: bool = True) -> None:
        super().enable_observer(enabled)
        self.own.enable_observer(enabled)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.own(values)

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.own.integers()


def quant_range(n_bits: int, dtype: torch.dtype) -> tuple[int, int]:
    """Return the least and the greatest integer of a layer that rounds."""
    signed = dtype in (torch.qint8, torch.int8)
    fake = FakeQuantize(
        ObserverType.min_max, bits=n_bits, signed=signed, scheme=QuantizationScheme.symmetric
    )
    return fake.quant_min, fake.quant_max


def exported_model(
    model: nn.Module, data: torch.Tensor, config: Any = None, is_qat: bool = True
) -> fx.GraphModule:
    """Return a quantized model as ``torch.export`` writes it, with integers as weights."""
    quantizer = LinearQuantizer(model, config)
    prepared = quantizer.prepare((data,))
    prepared.train(is_qat)
    quantizer.step()
    prepared(data)
    exported = torch.export.export(quantizer.finalize(), (data,)).module()
    parameters = {name for name, _ in exported.named_parameters()}
    for node in list(exported.graph.nodes):
        if node.op != "get_attr" or node.target not in parameters:
            continue
        owner, _, parameter = str(node.target).rpartition(".")
        module = exported.get_submodule(owner)
        scale = module._buffers.get(f"_COREML_/{parameter}/quantization_scale")
        if scale is not None and scale.shape[0] > 1:
            with exported.graph.inserting_after(node):
                target = torch.ops.quantized_decomposed.dequantize_per_channel.default
                integers = exported.graph.call_function(target, (node,))
            node.replace_all_uses_with(integers, lambda user, own=integers: user is not own)
    return exported
