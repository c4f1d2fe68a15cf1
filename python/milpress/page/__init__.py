"""One page about what was done to a model: sizes, errors, latencies, and where they come from."""

from __future__ import annotations

from milpress.page.build import LITERATURE, write
from milpress.page.collect import Page, collect

__all__ = ["LITERATURE", "Page", "collect", "write"]
