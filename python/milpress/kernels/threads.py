"""Work on several weights at a time, with results in order."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import milpress._core as _core
from milpress.errors import ConfigError

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], n_threads: int | None = None
) -> Generator[Result, None, None]:
    """Yield what a function makes of each item, in their order.

    As many items are worked on at a time as kernels may use threads, or ``n_threads``, so that one
    reads while another computes; no more results than that wait to be taken. What the function
    raises is raised here, in its turn. With one thread, nothing runs ahead.
    """
    n_threads = n_threads or _core.thread_limit()
    if n_threads == 1:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(n_threads, "milpress", _core.set_thread_limit, (n_threads,)) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > n_threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


class Room:
    """So much of something, of which threads take what they need, in the order in which they ask.

    Parameters
    ----------
    size
        How much there is. Who asks for more gets it once nobody else has any.
    """

    def __init__(self, size: int) -> None:
        self._left = self._size = size
        self._queue: deque[object] = deque()
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def taken(self, amount: int) -> Iterator[None]:
        """Wait until there is so much left, and have it in this block."""
        amount = min(amount, self._size)
        place = object()
        with self._changed:
            self._queue.append(place)
            try:
                self._changed.wait_for(lambda: self._queue[0] is place and self._left >= amount)
                self._left -= amount
            finally:
                self._queue.remove(place)
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._left += amount
                self._changed.notify_all()


_MOST_THREADS = 4096


@contextlib.contextmanager
def thread_limit(threads: int | None) -> Iterator[None]:
    """Limit the threads of kernels called in this block.

    Raises
    ------
    ConfigError
        If the number is below 1, or above what any machine has.
    """
    if threads is not None and threads < 1:
        msg = f"threads must be at least 1, got {threads}"
        raise ConfigError(msg)
    if threads is not None and threads > _MOST_THREADS:
        msg = f"threads must be at most {_MOST_THREADS}, got {threads}"
        raise ConfigError(msg)
    before = _core.set_thread_limit(threads or 0)
    try:
        yield
    finally:
        _core.set_thread_limit(before)
