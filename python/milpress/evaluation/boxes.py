"""Two detectors compared where the first keeps a box, whatever the second would keep."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from milpress.interpreter import Program
    from milpress.interpreter.program import Result


class Boxes:
    """Runs an original and what was made of it on samples, one after the other.

    Where the original keeps some boxes, the other gives out the same, so that outputs have the same
    shape and each row is of the same place; what it would have kept is counted.

    Parameters
    ----------
    original, compressed
        The programs.
    """

    def __init__(self, original: Program, compressed: Program) -> None:
        self._original = original
        self._compressed = compressed
        self._names = [name for name in original.kept_boxes if name in compressed.kept_boxes]
        self._kept: dict[str, Any] = {}
        self._counts = [0, 0, 0]

    @property
    def notes(self) -> tuple[str, ...]:
        """What was counted, in a sentence; nothing where no boxes are chosen."""
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
        taps: Iterable[str] = (),
        observe: Callable[[str, Any], None] | None = None,
    ) -> Result:
        """Run the original."""

        def look(name: str, value: Any) -> None:
            if name in self._names:
                self._kept[name] = value
            elif observe is not None:
                observe(name, value)

        return run_once(self._original, sample, taps=(*taps, *self._names), observe=look)

    def compressed(
        self,
        sample: Mapping[str, Any],
        taps: Iterable[str] = (),
        observe: Callable[[str, Any], None] | None = None,
        replace: Callable[[str, Any], Any] | None = None,
    ) -> Result:
        """Run the other on the sample that the original was run on last."""

        def look(name: str, value: Any) -> None:
            if name not in self._names:
                if observe is not None:
                    observe(name, value)
            elif replace is None:
                one, other = (set(kept.tolist()) for kept in (self._kept[name], value))
                for i, kept in enumerate((one, one & other, other)):
                    self._counts[i] += len(kept)

        def swap(name: str, value: Any) -> Any:
            if name in self._names:
                return self._kept[name]
            return value if replace is None else replace(name, value)

        taps = (*taps, *self._names)
        return run_once(self._compressed, sample, taps=taps, observe=look, replace=swap)


def run_once(program: Program, sample: Mapping[str, Any], **watch: Any) -> Result:
    """Run a program on a sample by itself: states begin as zeros."""
    state = program.make_state() if program.is_stateful else None
    return program.run(sample, state=state, **watch)
