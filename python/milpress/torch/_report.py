"""What happened to each weight of a torch model."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterable
from typing import Any

from milpress.compression.report import WeightReport
from milpress.show import human_bytes

_MISSING = -1


class Report(UserDict[str, dict[str, Any]]):
    """A row for each weight that was asked for, by its name; its text is a table.

    Rows have the columns of ``coremltools.optimize.torch``: ``error`` (root mean square),
    ``#params``, and what the compression adds, -1 where it does not apply. Where a weight was left
    or treated otherwise than asked, all rows have a ``note``.

    Parameters
    ----------
    rows
        The columns of each weight.
    weights
        The same weights with their sizes and signal-to-noise ratios, tied ones once.
    notes
        What concerns all of them.
    """

    def __init__(
        self,
        rows: dict[str, dict[str, Any]] | None = None,
        weights: Iterable[WeightReport] = (),
        notes: Iterable[str] = (),
    ) -> None:
        rows = rows or {}
        columns = dict.fromkeys(column for row in rows.values() for column in row)
        super().__init__(
            {
                name: {
                    column: row.get(column, "" if column == "note" else _MISSING)
                    for column in columns
                }
                for name, row in rows.items()
            }
        )
        self.weights = tuple(weights)
        self.notes = tuple(notes)

    @property
    def left(self) -> dict[str, str]:
        """The weights that were left, and why."""
        return {weight.name: weight.note for weight in self.weights if weight.status == "left"}

    @property
    def bits_per_weight(self) -> float:
        """Effective bits over the selected weights, those left as they were included."""
        size = sum(weight.size for weight in self.weights)
        return 8 * sum(weight.bytes_after for weight in self.weights) / size if size else 0.0

    @property
    def summary(self) -> str:
        """One line: how many of the selected weights were compressed; sizes."""
        before = sum(weight.bytes_before for weight in self.weights)
        after = sum(weight.bytes_after for weight in self.weights)
        n = len(self.weights)
        return (
            f"Compressed {n - len(self.left)} of {n} selected weights: {human_bytes(before)} -> "
            f"{human_bytes(after)} ({self.bits_per_weight:.2f} bits per weight)"
        )

    def __repr__(self) -> str:
        """Return a table of the rows, and the notes."""
        if not self.data:
            return ""
        headings = ["name", *next(iter(self.data.values()))]
        cells = [headings] + [
            [name, *(_text(value) for value in row.values())] for name, row in self.data.items()
        ]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        cells.insert(1, ["-" * width for width in widths])
        lines = [
            " | ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
            for line in cells
        ]
        return "\n".join([*lines, *self.notes])


def _text(value: Any) -> str:
    return f"{value:.5f}" if isinstance(value, float) else str(value)
