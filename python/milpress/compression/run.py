"""The options that travel together, whatever is done to a package."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from milpress.kernels.device import DeviceName, Kernels, using
from milpress.kernels.threads import thread_limit
from milpress.progress import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """How a package is worked on.

    Parameters
    ----------
    verify, progress, threads, device, force, dry_run
        As of `milpress.compress`.
    """

    verify: bool = True
    progress: Progress | bool | None = None
    threads: int | None = None
    device: DeviceName = "cpu"
    force: bool = False
    dry_run: bool = False

    @contextlib.contextmanager
    def limits(self) -> Iterator[Kernels]:
        """Limit threads, and give the kernels on the device."""
        with thread_limit(self.threads), using(self.device) as kernels:
            yield kernels
