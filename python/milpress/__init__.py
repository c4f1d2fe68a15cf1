"""milpress makes Core ML models smaller and proves that they still work."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from milpress import coreml, device, errors, formats, interpreter, page, planner, torch
    from milpress.compression import compress, decompress
    from milpress.errors import CompressionError
    from milpress.evaluation import Evaluation, evaluate
    from milpress.inspection import inspect
    from milpress.moments import Calibration, calibrate
    from milpress.placement import Device, devices
    from milpress.planner.linting import Lint, lint
    from milpress.planner.planning import Plan, plan
    from milpress.recipe import Recipe
    from milpress.report import Inspection, Report
    from milpress.rescaling import rescale
    from milpress.running import run
    from milpress.samples import RandomSamples
    from milpress.verification import Verification, verify

__version__ = "0.1.0"

__all__ = [
    "Calibration",
    "CompressionError",
    "Device",
    "Evaluation",
    "Inspection",
    "Lint",
    "Plan",
    "RandomSamples",
    "Recipe",
    "Report",
    "Verification",
    "calibrate",
    "compress",
    "coreml",
    "decompress",
    "device",
    "devices",
    "errors",
    "evaluate",
    "formats",
    "inspect",
    "interpreter",
    "lint",
    "page",
    "plan",
    "planner",
    "rescale",
    "run",
    "torch",
    "verify",
]

# Loaded on first use, so that `import milpress` is quick.
_MODULES = ("coreml", "device", "errors", "formats", "interpreter", "page", "planner", "torch")
_HOMES = {
    "Calibration": "milpress.moments",
    "CompressionError": "milpress.errors",
    "Device": "milpress.placement",
    "Evaluation": "milpress.evaluation",
    "Inspection": "milpress.report",
    "Lint": "milpress.planner",
    "Plan": "milpress.planner",
    "RandomSamples": "milpress.samples",
    "Recipe": "milpress.recipe",
    "Report": "milpress.report",
    "Verification": "milpress.verification",
    "calibrate": "milpress.moments",
    "compress": "milpress.compression",
    "decompress": "milpress.compression",
    "devices": "milpress.placement",
    "evaluate": "milpress.evaluation",
    "inspect": "milpress.inspection",
    "lint": "milpress.planner",
    "plan": "milpress.planner",
    "rescale": "milpress.rescaling",
    "run": "milpress.running",
    "verify": "milpress.verification",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(f"milpress.{name}")
    msg = f"module 'milpress' has no attribute {name!r}"
    raise AttributeError(msg)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
