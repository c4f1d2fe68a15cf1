"""What one run of a model tells: which values its layers take, where they come from and go to.

Values are followed through functions and modules as Python runs them, so nothing has to be traced.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from milpress.torch._lifecycle import asleep
from milpress.torch._modes import evaluating
from milpress.torch.quantization import _ops as ops
from milpress.torch.quantization._fake_quantize import FakeQuantize


@dataclass(eq=False, slots=True)
class Value:
    """A tensor of floats, under whatever shape it passes on.

    ``holder`` is the module that gives it to all that use it, if there is one.
    """

    rank: int
    maker: Call | None = None
    uses: list[Call] = field(default_factory=list)
    holder: str | None = None
    is_rounded: bool = False


@dataclass(eq=False, slots=True)
class Call:
    """A call of a module without parts, or of a function, whose ``name`` is ``None``.

    ``inputs`` has the values it takes, by position; ``takes_as_made`` says whether the first is as
    it was made, and ``is_plain`` that nothing is beside them, such as a number.
    """

    kind: Any
    name: str | None
    inputs: dict[int, Value]
    takes_as_made: bool
    is_plain: bool
    output: Value | None = None


class Recording(TorchFunctionMode):
    """A run of a model.

    Parameters
    ----------
    model
        The model.
    inputs
        What it runs on, in evaluation mode.
    """

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.n_calls: Counter[str] = Counter()
        self._values = WeakTensorKeyDictionary()  # to a value, and whether it is as it was made
        self._names = {module: name for name, module in model.named_modules()}
        self._depth = 0  # in modules without parts
        self._entered: list[Any] = []
        handles = []
        for module in self._names:
            if _is_leaf(module) or not any(True for _ in module.children()):
                enter = module.register_forward_pre_hook(
                    self._enter, prepend=True, with_kwargs=True
                )
                leave = module.register_forward_hook(self._leave, always_call=True)
                handles += [enter, leave]
        try:
            with evaluating(model), asleep(model), torch.no_grad(), self:
                model(*inputs)
        finally:
            for handle in handles:
                handle.remove()

    def __torch_function__(
        self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run a function, and note what it made of what."""
        output = func(*args, **(kwargs or {}))
        if self._depth == 0:
            name = getattr(func, "__name__", "")
            kind = name if getattr(torch.Tensor, name, None) is func else func
            call = self._call(kind, None, (*args, *(kwargs or {}).values()))
            if name == "__setitem__":
                output = args[0]
            pads = func is functional.pad and not (len(args) > 3 or (kwargs or {}).get("value"))
            self._note(call, args, output, moves=name in ops.MOVING or pads)
        return output

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._depth == 0:
            self.n_calls[self._names[module]] += 1
            arguments = list(args)
            for key, item in kwargs.items():
                if ops.POSITIONS.get(key) == len(arguments):
                    arguments.append(item)
            call = self._call(type(module), self._names[module], arguments)
            self._entered.append((call, args, len(self.calls)))
        self._depth += _is_leaf(module)

    def _leave(self, module: nn.Module, _args: Any, output: Any) -> None:
        self._depth -= _is_leaf(module)
        if self._depth > 0:
            return
        call, args, n_before = self._entered.pop()
        first = next(_tensors(output), None)
        if isinstance(module, FakeQuantize):
            for value in call.inputs.values():
                value.is_rounded = True
        elif _is_leaf(module):
            self._note(call, args, output, moves=call.kind in ops.MOVING_MODULES)
            if call.output is not None and call.output.maker is call:
                call.output.holder = call.name
        elif first is not None and first in self._values:
            value, is_as_made = self._values[first]
            made_here = value.maker in self.calls[n_before:]
            if is_as_made and made_here and value.holder is None and not value.uses:
                value.holder = call.name

    def _call(self, kind: Any, name: str | None, arguments: Any) -> Call:
        inputs: dict[int, Value] = {}
        tensors = list(_tensors(arguments)) if name is None else arguments
        is_as_made = False
        for i, item in enumerate(tensors):
            found = self._found(item)
            if found is not None:
                inputs[i], as_made = found
                is_as_made |= as_made and i == 0
        return Call(kind, name, inputs, is_as_made, len(inputs) == len(arguments))

    def _found(self, item: Any) -> tuple[Value, bool] | None:
        if not isinstance(item, torch.Tensor) or isinstance(item, nn.Parameter):
            return None
        if not item.is_floating_point():
            return None
        if item not in self._values:
            self._values[item] = (Value(item.ndim), True)
        found: tuple[Value, bool] = self._values[item]
        return found

    def _note(self, call: Call, args: Any, output: Any, *, moves: bool) -> None:
        tensors = [tensor for tensor in _tensors(output) if tensor.is_floating_point()]
        if not tensors:
            return
        moved = self._found(next(_tensors(args), None)) if moves else None
        if moved is not None:
            call.output = moved[0]
            for tensor in tensors:
                self._values[tensor] = (moved[0], False)
            return
        self.calls.append(call)
        for value in call.inputs.values():
            value.uses.append(call)
        for tensor in tensors:
            self._values[tensor] = (Value(tensor.ndim, call), True)
        call.output = self._values[tensors[0]][0]


def _is_leaf(module: nn.Module) -> bool:
    """Whether a module is one call, whatever it calls."""
    if isinstance(module, FakeQuantize) or ops.is_layer(module):
        return True
    is_of_torch = type(module).__module__.startswith("torch.nn.")
    return is_of_torch and not any(True for _ in module.children())


def _tensors(item: Any) -> Iterator[torch.Tensor]:
    if isinstance(item, torch.Tensor):
        yield item
    elif isinstance(item, (list, tuple)):
        for part in item:
            yield from _tensors(part)
