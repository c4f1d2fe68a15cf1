"""Benchmarks on Apple devices, and references and estimates without one."""

from __future__ import annotations

from milpress.device.benchmark import replay, run
from milpress.device.comparison import Comparison, compare
from milpress.device.entries import Candidate
from milpress.device.files import load, parse, save
from milpress.device.rules import problems
from milpress.device.runner import Plan
from milpress.device.schema import Result
from milpress.device.suite import Suite

__all__ = [
    "Candidate",
    "Comparison",
    "Plan",
    "Result",
    "Suite",
    "compare",
    "load",
    "parse",
    "problems",
    "replay",
    "run",
    "save",
]
