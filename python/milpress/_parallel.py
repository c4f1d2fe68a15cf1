"""Work on several weights at a time, with results in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from milpress import _core

Item = TypeVar("Item")
Made = TypeVar("Made")


def in_order(
    function: Callable[[Item], Made], items: Iterable[Item], n_threads: int | None = None
) -> Generator[Made, None, None]:
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
        waiting: deque[Future[Made]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > n_threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
