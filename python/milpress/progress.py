"""How work that takes long tells how far it is: by calling a function, or by a bar."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

from milpress.errors import printable

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

# Called with what is done, what there is in all (0 if that is not known), and the name of what is
# at hand.
Progress: TypeAlias = Callable[[int, int, str], None]

_PAUSE = 0.1  # seconds between two pictures of a bar in a notebook


@contextlib.contextmanager
def shown(progress: Progress | bool | None) -> Iterator[Progress]:
    """Yield what work is to call: the function that was given, or what moves a bar.

    Parameters
    ----------
    progress
        ``True`` shows a bar with the time that is left, on a terminal or in a notebook, and takes
        it away when the block ends, however it does; elsewhere it shows nothing. ``False`` and
        ``None`` show nothing anywhere.
    """
    if callable(progress):
        yield progress
    elif progress and _is_notebook():
        bar = _bar()
        with _displayed(bar) as draw:
            yield _Moves(bar, draw)
    elif progress and sys.stderr is not None and sys.stderr.isatty():
        with _bar() as bar:
            yield _Moves(bar)
    else:
        yield lambda *_: None


def _bar() -> Bar:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    # Behind the bar, a name of any length moves nothing.
    name = TextColumn("{task.description}", markup=False)
    columns = (BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), name)
    return Progress(*columns, console=Console(stderr=True), transient=True)


class _Moves:
    """Moves a bar as far as work is; work that begins again is timed anew."""

    def __init__(self, bar: Bar, draw: Callable[[], None] = lambda: None) -> None:
        self._bar = bar
        self._draw = draw
        self._task = bar.add_task("", total=None)
        self._done, self._total = 0, 0

    def __call__(self, done: int, total: int, name: str) -> None:
        if done < self._done or total != self._total:
            self._bar.remove_task(self._task)
            self._task = self._bar.add_task("", total=total or None)
        self._done, self._total = done, total
        self._bar.update(self._task, completed=done, description=printable(name))
        self._draw()


def _is_notebook() -> bool:
    """Whether IPython runs here in the kernel of a notebook."""
    ipython: Any = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


@contextlib.contextmanager
def _displayed(bar: Bar) -> Iterator[Callable[[], None]]:
    """Display a bar in a notebook, which draws nothing by itself; yield what draws it again."""
    from IPython.display import display

    picture = display(bar, display_id=True)
    last = time.monotonic()

    def draw() -> None:
        nonlocal last
        if time.monotonic() - last >= _PAUSE:
            picture.update(bar)
            last = time.monotonic()

    try:
        yield draw
    finally:
        picture.update({"text/plain": ""}, raw=True)
