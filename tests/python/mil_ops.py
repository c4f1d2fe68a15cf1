"""One op of MIL, computed by the interpreter's and by coremltools' value inference."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import coremltools as ct
import numpy as np
import torch
from coremltools.converters.mil.mil import Builder as mb  # noqa: N813
from coremltools.converters.mil.mil import types
from coremltools.converters.mil.mil.ops.registry import SSAOpRegistry

from milpress.interpreter.operator import Operator
from milpress.interpreter.ops import find

IOS15, IOS16, IOS17, IOS18 = 5, 6, 7, 8
TARGETS = {
    IOS15: ct.target.iOS15,
    IOS16: ct.target.iOS16,
    IOS17: ct.target.iOS17,
    IOS18: ct.target.iOS18,
}
DEFINITIONS = SSAOpRegistry.core_ops


def definition(name: str, opset: int) -> type | None:
    """Return coremltools' class of an op in an opset."""
    return DEFINITIONS[name].get(TARGETS[opset])


@dataclass(frozen=True)
class Call:
    """What an op learns of the program that calls it."""

    dtype: torch.dtype | None = torch.float32
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def show(self, parameter: str, operand: Callable[[], Any]) -> None:
        operand()


def operator(name: str, opset: int = IOS18) -> Operator:
    found = find(name, opset)
    assert found is not None, f"{name} must be covered in opset {opset}"
    return found


def held(value: Any) -> Any:
    """Return an argument as a program hands it to an op."""
    if isinstance(value, np.ndarray):
        if value.dtype in (np.float16, np.float64):
            value = value.astype(np.float32)
        elif value.dtype == np.uint16:
            value = value.astype(np.int32)
        return torch.from_numpy(np.ascontiguousarray(value).reshape(value.shape))
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (list, tuple)):
        return [held(item) for item in value]
    return value


def computed(
    name: str,
    *,
    opset: int = IOS18,
    held_in: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
    **arguments: Any,
) -> Any:
    """Return what the interpreter's op makes of NumPy arrays and constants."""
    op = operator(name, opset)
    bound = op.bound({key: held(value) for key, value in arguments.items()})
    if "call" in inspect.signature(op.function).parameters:
        call = Call(held_in)
        bound["call"] = replace(call, generator=generator) if generator else call
    result = op.function(**bound)
    if isinstance(result, tuple):
        return tuple(item.numpy() for item in result)
    return result.numpy()


def _values(outputs: Any) -> Any:
    if isinstance(outputs, (list, tuple)):
        return tuple(_values(output) for output in outputs)
    assert outputs.val is not None, f"{outputs.op.op_type} must have value inference for this"
    return np.asarray(outputs.val)


def built(name: str, opset: int, arguments: dict[str, Any]) -> Any:
    """Return the outputs of an op of coremltools on constants."""
    outputs = []

    @mb.program(input_specs=[], opset_version=TARGETS[opset])
    def program():
        outputs.append(getattr(mb, name)(**arguments))
        last = outputs[0]
        return last[-1] if isinstance(last, (list, tuple)) else last

    return outputs[0]


def inferred(name: str, *, opset: int = IOS18, **arguments: Any) -> Any:
    """Return what coremltools' value inference makes of the same."""
    return _values(built(name, opset, arguments))


def inferred_types(name: str, *, opset: int = IOS18, **arguments: Any) -> list[tuple]:
    """Return shape and type of each output, as coremltools infers them."""
    outputs = built(name, opset, arguments)
    outputs = outputs if isinstance(outputs, (list, tuple)) else [outputs]
    return [(tuple(output.shape), types.builtin_to_string(output.dtype)) for output in outputs]


def check(ours: Any, theirs: Any, *, ulps: float = 0, absolute: float = 0, label: str = "") -> None:
    """Compare results; ``ulps`` are units of float32 at the largest value of the result."""
    if isinstance(theirs, tuple):
        assert isinstance(ours, tuple), label
        assert len(ours) == len(theirs), label
        for one, other in zip(ours, theirs, strict=True):
            check(one, other, ulps=ulps, absolute=absolute, label=label)
        return
    theirs = np.asarray(theirs)
    assert ours.shape == theirs.shape, (label, ours.shape, theirs.shape)
    if ulps or absolute:
        finite = np.abs(theirs[np.isfinite(theirs)])
        unit = np.finfo(np.float32).eps * (finite.max() if finite.size else 0)
        np.testing.assert_allclose(
            ours.astype(np.float64),
            theirs.astype(np.float64),
            rtol=0,
            atol=ulps * unit + absolute,
            err_msg=label,
        )
    else:
        np.testing.assert_array_equal(ours, theirs, err_msg=label)


def shapes(rng: np.random.Generator, rank: int, most: int = 4) -> Sequence[int]:
    return tuple(int(size) for size in rng.integers(1, most + 1, rank))
