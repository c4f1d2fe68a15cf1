"""milpress makes Core ML models smaller and proves that they still work."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from milpress._version import __version__ as __version__

if TYPE_CHECKING:
    from milpress import coreml, device, errors, formats, interpreter, page, planner, torch
    from milpress.calibration.calibrating import calibrate
    from milpress.calibration.input_statistics import Calibration
    from milpress.compression.packages import compress, decompress
    from milpress.compression.report import Report
    from milpress.compression.rescaling import rescale
    from milpress.compression.verification import Verification, verify
    from milpress.engines.running import run
    from milpress.errors import CompressionError
    from milpress.evaluation.evaluating import evaluate
    from milpress.evaluation.results import Evaluation
    from milpress.inspection import Inspection, inspect
    from milpress.kernels.device import Device, devices
    from milpress.planner.linting import Lint, lint
    from milpress.planner.plan import Plan
    from milpress.planner.planning import plan
    from milpress.recipe import Recipe
    from milpress.samples.data import RandomSamples
    from milpress.tuning.config import TuneConfig
    from milpress.tuning.report import TuneReport
    from milpress.tuning.tuning import tune

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
    "TuneConfig",
    "TuneReport",
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
    "tune",
    "verify",
]

# Loaded on first use, so that `import milpress` is quick.
_MODULES = ("coreml", "device", "errors", "formats", "interpreter", "page", "planner", "torch")
_HOMES = {
    "Calibration": "milpress.calibration.input_statistics",
    "CompressionError": "milpress.errors",
    "Device": "milpress.kernels.device",
    "Evaluation": "milpress.evaluation.results",
    "Inspection": "milpress.inspection",
    "Lint": "milpress.planner",
    "Plan": "milpress.planner",
    "RandomSamples": "milpress.samples.data",
    "Recipe": "milpress.recipe",
    "Report": "milpress.compression.report",
    "TuneConfig": "milpress.tuning.config",
    "TuneReport": "milpress.tuning.report",
    "Verification": "milpress.compression.verification",
    "calibrate": "milpress.calibration.calibrating",
    "compress": "milpress.compression.packages",
    "decompress": "milpress.compression.packages",
    "devices": "milpress.kernels.device",
    "evaluate": "milpress.evaluation.evaluating",
    "inspect": "milpress.inspection",
    "lint": "milpress.planner",
    "plan": "milpress.planner",
    "rescale": "milpress.compression.rescaling",
    "run": "milpress.engines.running",
    "tune": "milpress.tuning.tuning",
    "verify": "milpress.compression.verification",
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
