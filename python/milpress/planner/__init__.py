"""Planning: which treatment each weight gets under a budget, and what is known to go wrong where.

`plan` writes recipes; `lint` says which weights are at risk on which hardware.
"""

from milpress.planner.facts import Fact, Facts, Platform
from milpress.planner.linting import Finding, Lint, lint
from milpress.planner.plan import Plan, PlannedWeight
from milpress.planner.planning import plan

__all__ = [
    "Fact",
    "Facts",
    "Finding",
    "Lint",
    "Plan",
    "PlannedWeight",
    "Platform",
    "lint",
    "plan",
]
