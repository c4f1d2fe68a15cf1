"""Comparison of two detectors at the boxes that the first of them keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from milpress.interpreter import Program
    from milpress.interpreter.program import Result


class Boxes:
    """Runs of an original and its compressed version on the same samples.

    Where the original keeps some boxes, the other gives out the same, so that outputs have the same
    shape and each row is of the same place; what it would have kept is counted.
    """

    def __init__(self, original: Program, compressed: Program) -> None:
        self._original = original
        self._compressed = compressed
        self._names = [name for name in original.kept_boxes if name in compressed.kept_boxes]
        self._kept: dict[str, Any] = {}
        self._counts = [0, 0, 0]

    @property
    def notes(self) -> tuple[str, ...]:
        """How many boxes both keep, in a sentence; none where no boxes are chosen."""
        if not self._names:
            return ()
        n_original, n_common, n_compressed = self._counts
        return (
            f"of the {n_original} boxes that the original keeps, the other keeps {n_common}, and "
            f"{n_compressed - n_common} more; outputs are compared where the original keeps a box",
        )

    def original(
        self,
        sample: Mapping[str, Any],
        names: Iterable[str] = (),
        observe: Callable[[str, Any], None] | None = None,
    ) -> Result:
        """Run the original, and observe the values of some names."""
        from milpress.interpreter.program import run_once

        def look(name: str, value: Any) -> None:
            if name in self._names:
                self._kept[name] = value
            elif observe is not None:
                observe(name, value)

        return run_once(self._original, sample, taps=(*names, *self._names), observe=look)

    def compressed(
        self,
        sample: Mapping[str, Any],
        names: Iterable[str] = (),
        observe: Callable[[str, Any], None] | None = None,
        replace: Callable[[str, Any], Any] | None = None,
    ) -> Result:
        """Run the other on the sample that the original was run on last."""
        from milpress.interpreter.program import run_once

        def look(name: str, value: Any) -> None:
            if name not in self._names:
                if observe is not None:
                    observe(name, value)
            elif replace is None:
                one, other = (set(boxes.tolist()) for boxes in (self._kept[name], value))
                for i, boxes in enumerate((one, one & other, other)):
                    self._counts[i] += len(boxes)

        def swap(name: str, value: Any) -> Any:
            if name in self._names:
                return self._kept[name]
            return value if replace is None else replace(name, value)

        names = (*names, *self._names)
        return run_once(self._compressed, sample, taps=names, observe=look, replace=swap)
