"""Modes of torch, and variables of Python, that belong to a thread."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils import _python_dispatch

_T = TypeVar("_T")

_overrides: Any = torch.overrides
_cuda: Any = torch.cuda


class CallerModes:
    """The modes that are in force where this is made, for calls in other threads."""

    def __init__(self) -> None:
        self._variables = contextvars.copy_context()
        self._types = {
            kind: torch.get_autocast_dtype(kind)
            for kind in ("cpu", *_accelerators())
            if torch.is_autocast_enabled(kind)
        }
        self._caches = torch.is_autocast_cache_enabled()
        self._infers = torch.is_inference_mode_enabled()
        self._function_modes = _overrides._get_current_function_mode_stack()
        self._dispatch_modes = _python_dispatch._get_current_dispatch_mode_stack()
        self._stream = _cuda.current_stream() if _cuda.is_initialized() else None

    def call(self, function: Callable[[], _T]) -> _T:
        """Call a function with the modes in force."""
        return self._variables.copy().run(self._call, function)

    def _call(self, function: Callable[[], _T]) -> _T:
        with contextlib.ExitStack() as stack:
            for kind, dtype in self._types.items():
                stack.enter_context(torch.autocast(kind, dtype, cache_enabled=self._caches))
            if self._infers:
                stack.enter_context(torch.inference_mode())
            if self._stream is not None:
                stack.enter_context(torch.cuda.stream(self._stream))
            # Not entered once more: some keep what was before them, and they take turns here.
            for mode in self._function_modes:
                _overrides._push_mode(mode)
                stack.callback(_overrides._pop_mode)
            for mode in self._dispatch_modes:
                _python_dispatch._push_mode(mode)
                stack.callback(_python_dispatch._pop_mode)
            return function()


def _accelerators() -> tuple[str, ...]:
    kind = torch.accelerator.current_accelerator()
    return () if kind is None else (kind.type,)
