"""Where values are rounded around the layers of a model that is no graph, by hooks.

What a layer takes and gives is rounded, batch normalization and an activation that follow it alone
included. A value is rounded where a module gives it to all that use it, or else where layers take
it. What functions compute between layers is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from milpress.torch._modes import device_of
from milpress.torch._module_weights import attention_around
from milpress.torch.quantization import _ops as ops
from milpress.torch.quantization._fake_quantize import (
    FakeQuantize,
    QuantizeDequantize,
    activation_layer,
)
from milpress.torch.quantization._folding import RoundedLayer
from milpress.torch.quantization._recording import Call, Recording, Value
from milpress.torch.quantization.quantization_config import ModuleLinearQuantizerConfig
from milpress.torch.registration import RECURRENT, axes_of_weights

_OUTPUT = "output_fake_quant"


class RoundedValues:
    """Rounds what a module takes and gives, by layers that the module has."""

    def __init__(self) -> None:
        self.inputs: dict[int, str] = {}

    def attach(self, host: nn.Module) -> None:
        """Do it whenever a module runs."""
        host.register_forward_pre_hook(self.before, with_kwargs=True)
        host.register_forward_hook(self.after)

    @classmethod
    def of(cls, host: nn.Module) -> RoundedValues | None:
        """Return that of a module."""
        hooks = (getattr(hook, "__self__", None) for hook in host._forward_hooks.values())
        return next((hook for hook in hooks if isinstance(hook, cls)), None)

    def before(self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Round what the module takes."""
        done: list[tuple[Any, str, Any]] = []

        def rounded(position: int | None, item: Any) -> Any:
            name = None if position is None else self.inputs.get(position)
            if name is None:
                return item
            for other, its_name, result in done:
                # Attention looks at whether its arguments are one.
                if other is item and its_name == name:
                    return result
            done.append((item, name, getattr(host, name)(item)))
            return done[-1][2]

        named = {key: rounded(ops.POSITIONS.get(key), item) for key, item in kwargs.items()}
        return tuple(rounded(i, item) for i, item in enumerate(args)), named

    def after(self, host: nn.Module, _args: Any, output: Any) -> Any:
        """Round what the module gives, or the first of it."""
        fake = getattr(host, _OUTPUT, None)
        if fake is None:
            return output
        return (fake(output[0]), *output[1:]) if isinstance(output, tuple) else fake(output)


class HookedPlacing:
    """Finds what is rounded around layers, and lets hooks do it.

    Parameters
    ----------
    model
        The model.
    run
        A run of it.
    config_of
        Returns the config of a module by its name.
    within
        Says of the name of a module whether it is concerned.
    """

    def __init__(
        self,
        model: nn.Module,
        run: Recording,
        config_of: Callable[[str, nn.Module], Any],
        within: Callable[[str], bool],
    ) -> None:
        self.model = model
        self.run = run
        self.within = within
        self.layers: list[RoundedLayer] = []
        self._wanted: dict[Value, ModuleLinearQuantizerConfig] = {}
        self._takers: dict[Value, list[tuple[str, int]]] = {}
        self._unreached: list[RoundedLayer] = []
        self._ends: dict[Value, str] = {}
        self._early: dict[str, ModuleLinearQuantizerConfig] = {}
        self._part_of_layers: set[Call] = set()
        calls: dict[str | None, list[Call]] = {}
        for call in run.calls:
            calls.setdefault(call.name, []).append(call)
        for name, module in model.named_modules():
            if axes_of_weights(module) and within(name):
                config = config_of(name, module)
                if config is not None:
                    self._find(name, module, config, calls.get(name, []))
        self._round_before_functions()

    def _find(self, name: str, module: nn.Module, config: Any, calls: list[Call]) -> None:
        norm = None
        for call in calls:
            self._part_of_layers.add(call)
            end, norm = self._end(call, module)
            if not config.quantizes_activations:
                continue
            if end.output is not None:
                self._wanted.setdefault(end.output, config)
                self._ends[end.output] = norm or name
            for position, value in call.inputs.items():
                if position < _n_inputs(module):
                    self._wanted.setdefault(value, config)
                    self._takers.setdefault(value, []).append((name, position))
        layer = RoundedLayer(name, config, norm)
        if config.quantizes_weights:
            self.layers.append(layer)
        # Attention computes with the weight of its output projection, which is never called.
        is_called = attention_around(self.model, name) is None and ops.is_layer(module)
        if not calls and is_called:
            self._unreached.append(layer)

    def _round_before_functions(self) -> None:
        """Round before an activation that is a function, where nothing can round after it."""
        for value, name in self._ends.items():
            is_held = value.holder is not None and self._gives_alone(value.holder)
            if not is_held and value not in self._takers and value.maker is not None:
                self._early[name] = self._wanted.pop(value)
                self._part_of_layers.discard(value.maker)

    def _end(self, call: Call, module: nn.Module) -> tuple[Call, str | None]:
        """Return the last call that counts as part of a layer, and a batch normalization in it."""
        end, norm = call, None
        if isinstance(module, (nn.MultiheadAttention, *RECURRENT, *ops.EMBEDDINGS)):
            return end, norm
        following = self._only_use(end)
        if following is not None and self._folds(call, following):
            end, norm = following, following.name
            following = self._only_use(end)
        if following is not None and following.kind in ops.ACTIVATIONS:
            end = following
        self._part_of_layers.add(end)
        return end, norm

    def _folds(self, call: Call, following: Call) -> bool:
        if ops.NORMS.get(call.kind) is not following.kind:
            return False
        names = (str(call.name), str(following.name))
        norm: Any = self.model.get_submodule(names[1])
        # Of more than two dimensions, a linear layer's channels are not those that are normalized.
        fits = call.kind is not nn.Linear or (call.output is not None and call.output.rank == 2)
        is_once = all(self.run.n_calls[name] == 1 for name in names)
        if is_once and fits and norm.running_var is not None:
            self._part_of_layers.add(following)
            return True
        return False

    def _only_use(self, call: Call) -> Call | None:
        uses = [] if call.output is None else call.output.uses
        if len(uses) != 1 or not uses[0].takes_as_made:
            return None
        return uses[0] if uses[0].inputs.get(0) is call.output else None

    def insert(self) -> None:
        """Give modules the layers that round, and hooks that run them."""
        for value, config in self._wanted.items():
            if value.is_rounded:
                continue
            fake = self._fake(value, config)
            if value.holder is not None and self._gives_alone(value.holder):
                self._round_output(value.holder, fake)
                continue
            for name, position in self._takers.get(value, ()):
                self._round_input(name, position, fake)
        for name, config in self._early.items():
            self._round_output(name, activation_layer(config, None, False))
        for layer in self._unreached:
            if layer.config.quantizes_activations:
                self._round_output(layer.name, activation_layer(layer.config, None, False))
                for position in range(_n_inputs(self.model.get_submodule(layer.name))):
                    fake = activation_layer(layer.config, None, False)
                    self._round_input(layer.name, position, fake)

    def _gives_alone(self, name: str) -> bool:
        """Whether a module may round all that it gives."""
        is_layer = ops.is_layer(self.model.get_submodule(name))
        return self.within(name) and (is_layer or self.run.n_calls[name] == 1)

    def _round_output(self, name: str, fake: FakeQuantize) -> None:
        host = self.model.get_submodule(name)
        self._hooks(host)
        if not hasattr(host, _OUTPUT):
            host.add_module(_OUTPUT, fake.to(device_of(host)))

    def _round_input(self, name: str, position: int, fake: FakeQuantize) -> None:
        host = self.model.get_submodule(name)
        hooks = self._hooks(host)
        if position in hooks.inputs:
            return
        known = (key for key, module in host.named_children() if module is fake)
        own_name = f"input_{position}_fake_quant" if position else "input_fake_quant"
        hooks.inputs[position] = next(known, own_name)
        host.add_module(hooks.inputs[position], fake.to(device_of(host)))

    def _hooks(self, host: nn.Module) -> RoundedValues:
        hooks = RoundedValues.of(host)
        if hooks is None:
            hooks = RoundedValues()
            hooks.attach(host)
        return hooks

    def _fake(self, value: Value, config: ModuleLinearQuantizerConfig) -> FakeQuantize:
        known = None if value.maker is None else ops.FIXED.get(value.maker.kind)
        return activation_layer(config, known, _is_nonnegative(value))

    def floats(self) -> list[str]:
        """Return what computes with floats between the layers, and how often."""
        counts: dict[str, int] = {}
        for call in self.run.calls:
            if call not in self._part_of_layers and (call.name is None or self.within(call.name)):
                kind = getattr(call.kind, "__name__", str(call.kind))
                counts[kind] = counts.get(kind, 0) + 1
        return [f"{kind} ({counts[kind]})" for kind in sorted(counts)]


def _n_inputs(module: nn.Module) -> int:
    """Return how many of the arguments of a layer are activations."""
    if isinstance(module, ops.EMBEDDINGS):
        return 0
    return 3 if isinstance(module, nn.MultiheadAttention) else 1


def _is_nonnegative(value: Value) -> bool:
    maker = value.maker
    if maker is None or maker.kind in ops.NONNEGATIVE:
        return maker is not None
    keeps = maker.kind in ops.PASSING or maker.kind in ops.CONCATENATIONS
    keeps |= maker.kind in {torch.add, torch.mul, "add", "mul"} and maker.is_plain
    return bool(keeps and maker.inputs) and all(map(_is_nonnegative, maker.inputs.values()))


def settle(model: nn.Module, norms: Iterable[str]) -> list[str]:
    """Put ops that round where layers did, and take folded modules out.

    Returns
    -------
    list
        The names of the layers that nothing has passed, which are left out.
    """
    for name in norms:
        holder, _, own_name = name.rpartition(".")
        norm = model.get_submodule(name)
        identity = nn.Identity()
        hooks = RoundedValues.of(norm)
        if hooks is not None:
            identity.add_module(_OUTPUT, norm.get_submodule(_OUTPUT))
            hooks.attach(identity)
        setattr(model.get_submodule(holder), own_name, identity)
    settled: dict[FakeQuantize, QuantizeDequantize] = {}
    unused = []
    for name, host in list(model.named_modules()):
        hooks = RoundedValues.of(host)
        if hooks is None:
            continue
        for key in {_OUTPUT, *hooks.inputs.values()} & host._modules.keys():
            fake = host.get_submodule(key)
            if not isinstance(fake, FakeQuantize):
                continue
            if fake.is_begun:
                if fake not in settled:
                    settled[fake] = QuantizeDequantize(fake)
                setattr(host, key, settled[fake])
                continue
            unused.append(f"{name}.{key}" if name else key)
            delattr(host, key)
            hooks.inputs = {i: other for i, other in hooks.inputs.items() if other != key}
    return unused
