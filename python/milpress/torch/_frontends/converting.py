"""Modules converted by the frontend that can."""

from __future__ import annotations

import inspect
from typing import Any, Literal, TypeAlias

from torch import nn

from milpress.errors import ConfigError, UnsupportedError
from milpress.torch._frontends.exported import by_export
from milpress.torch._frontends.failure import FrontendError, gist
from milpress.torch._frontends.signature import flat
from milpress.torch._frontends.traced import by_trace
from milpress.torch._modes import keeping_buffers
from milpress.torch.registration import RECURRENT

Frontend: TypeAlias = Literal["export", "trace"]

_CALLED: dict[Frontend, str] = {"export": "torch.export", "trace": "torch.jit.trace"}


def converted(
    module: nn.Module,
    example_inputs: tuple[Any, ...],
    frontend: Frontend | None,
    dynamic_shapes: Any,
    settings: dict[str, Any],
) -> tuple[Any, tuple[str, ...]]:
    """Return the model that coremltools makes of a module, and what the report is to say of it.

    Parameters
    ----------
    module
        In evaluation mode.
    frontend
        The one to take; ``None`` for ``torch.export``, with ``torch.jit.trace`` where that fails
        and a trace can stand for the module. With recurrent layers the trace comes first.

    Raises
    ------
    ConfigError
        If the module does not take the inputs, or coremltools does not take a setting.
    UnsupportedError
        If no frontend converts the module.
    """
    _check(frontend, dynamic_shapes, settings)
    failures: dict[Frontend, FrontendError] = {}
    with flat(module, example_inputs) as tensors:
        for name in (frontend,) if frontend else _order(module, dynamic_shapes):
            try:
                if name == "export":
                    model = by_export(module, tensors, dynamic_shapes, settings)
                else:
                    model = by_trace(module, tensors, settings)
            except FrontendError as error:
                failures[name] = error
                if error.no_trace:
                    break
            else:
                return model, tuple(
                    f"converted by {_CALLED[name]}, as by {_CALLED[other]} it can't be: {failure}"
                    for other, failure in failures.items()
                )
    _check_call(module, example_inputs)
    raise UnsupportedError(_sentence(module, frontend, failures)) from next(iter(failures.values()))


def _check(frontend: Frontend | None, dynamic_shapes: Any, settings: dict[str, Any]) -> None:
    import coremltools as ct

    if frontend == "trace" and dynamic_shapes is not None:
        msg = (
            "dynamic_shapes are for frontend='export'; give a trace ranges of sizes by "
            "inputs=[ct.TensorType(shape=(1, ct.RangeDim(1, 512)))]"
        )
        raise ConfigError(msg)
    known = inspect.signature(ct.convert).parameters
    unknown = [name for name in settings if name not in known]
    if unknown:
        msg = f"{unknown[0]} is no argument of coremltools.convert, which are {', '.join(known)}"
        raise ConfigError(msg)


def _order(module: nn.Module, dynamic_shapes: Any) -> tuple[Frontend, ...]:
    if dynamic_shapes is not None:
        return ("export",)
    is_recurrent = any(isinstance(part, RECURRENT) for part in module.modules())
    return ("trace", "export") if is_recurrent else ("export", "trace")


def _check_call(module: nn.Module, example_inputs: tuple[Any, ...]) -> None:
    """Raise `ConfigError` if a module that can't be converted can't be called either."""
    try:
        with keeping_buffers(module):
            module(*example_inputs)
    except Exception as error:
        msg = f"the module can't be called with example_inputs: {gist(error)}"
        raise ConfigError(msg) from error


def _sentence(
    module: nn.Module, frontend: Frontend | None, failures: dict[Frontend, FrontendError]
) -> str:
    """Return why a module can't be converted, and what to try."""
    tried = "; ".join(f"by {_CALLED[name]}, {failure}" for name, failure in failures.items())
    advice = []
    why_no_trace = next((failure.no_trace for failure in failures.values()), "")
    if why_no_trace and any(_loops_over_experts(part) for part in module.modules()):
        advice.append("call set_experts_implementation('grouped_mm') on the model before")
    if frontend == "trace":
        advice.append("try frontend='export'")
    elif why_no_trace:
        advice.append(f"give frontend='trace' if you know better: {why_no_trace}")
    elif frontend == "export":
        advice.append("try frontend='trace'")
    advice.append(
        "write that part of the module with other operations, or register a lowering by "
        "coremltools.converters.mil.register_torch_op"
    )
    return f"the module can't be converted: {tried}. What to try: {'; '.join(advice)}"


def _loops_over_experts(part: nn.Module) -> bool:
    """Whether a model of transformers runs one by one those experts that an input asks for."""
    can_choose = getattr(part, "_can_set_experts_implementation", None)
    if can_choose is None or not can_choose():
        return False
    return getattr(part.config, "_experts_implementation", None) == "eager"
