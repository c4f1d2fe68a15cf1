"""Tables, sizes and ratios as people read them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, overload

from milpress.errors import printable

if TYPE_CHECKING:
    from rich.table import Table


def named_table(*headings: str, right: Iterable[str] = ()) -> Table:
    """Return an empty table of columns with these headings, numbers at the right."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for heading in right:
        table.add_column(heading, justify="right")
    return table


@overload
def decibels(signal: float, noise: float) -> float: ...
@overload
def decibels(signal: float | None, noise: float | None) -> float | None: ...
def decibels(signal: float | None, noise: float | None) -> float | None:
    """Return the ratio of two sums of squares in dB, infinite without noise."""
    if signal is None or noise is None:
        return None
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def human_bytes(n_bytes: int) -> str:
    """Return a size as people read it.

    Examples
    --------
    >>> human_bytes(44_492_176)
    '44.5 MB'
    """
    size = float(n_bytes)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{n_bytes} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


def human_snr(snr_db: float) -> str:
    """Return a ratio in dB as people read it."""
    return "exact" if math.isinf(snr_db) and snr_db > 0 else f"{snr_db:.1f}"


def escaped(text: str) -> str:
    """Return text from a package such that neither a terminal nor rich's markup acts on it."""
    from rich.markup import escape

    return escape(printable(text))
