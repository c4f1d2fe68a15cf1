"""Interpreter of ML programs with torch, for any machine."""

from __future__ import annotations

from milpress.errors import DependencyError

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as error:
    msg = "running models needs PyTorch; install it with: pip install 'milpress[torch]'"
    raise DependencyError(msg) from error

from milpress.interpreter.coverage import Coverage, coverage
from milpress.interpreter.program import Program, Result, load
from milpress.interpreter.states import State
from milpress.mil.features import Feature

__all__ = ["Coverage", "Feature", "Program", "Result", "State", "coverage", "load"]
