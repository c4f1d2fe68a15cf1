"""What plans with samples are made of: the errors of outputs, seen from outside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import milpress
from milpress.interpreter import load
from milpress.planner import calibrated


class Errors(dict[str, dict[str, float]]):
    """Errors by item and format, and the plan that they were made for."""

    plan: milpress.Plan


def errors_of(path: Path, data: Any, **settings: Any) -> Errors:
    """Plan a package with samples, and return the errors that the plan is made of."""
    found = Errors()

    def spy(package: Any, items: Any, *arguments: Any, **more: Any) -> Any:
        made = original(package, items, *arguments, **more)
        names = [item.name for item in items]
        found.update(zip(names, made.errors, strict=True))
        return made

    original = calibrated.calibrate
    settings = {"target_bits": 6, "use_cache": False, "sample_data": data} | settings
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrated, "calibrate", spy)
        found.plan = milpress.plan(path, **settings)
    return found


def plain_error(
    path: Path, other: Path, data: list[dict[str, Any]], function: str | None = None
) -> float:
    """Return the squared error of the first output over its square, from plain runs."""
    programs = [load(one, function) for one in (path, other)]
    noise = signal = 0.0
    for one in data:
        mine, theirs = (np.float64(next(iter(program(**one).values()))) for program in programs)
        noise += float(np.square(theirs - mine).sum())
        signal += float(np.square(mine).sum())
    return noise / signal
