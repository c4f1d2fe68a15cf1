"""How work that takes long tells how far it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

# Called with what is done, what there is in all, and the name of what is at hand.
Progress: TypeAlias = Callable[[int, int, str], None]
