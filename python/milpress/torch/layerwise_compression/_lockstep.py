"""Many runs of a program side by side, each of which stops where the others do.

A model is run on each batch only once, although its layers are compressed on the way: a run waits
at a layer until all have come there, the layer is compressed with what they bring, and they go on
through the compressed layer. What is between two layers is in the frames of the runs themselves, so
the model may be any program.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch

from milpress.torch.layerwise_compression._caller_modes import CallerModes

_UNTRIMMED = 1 << 26  # bytes by which memory may grow before what is free of it is given back
_TORCH = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"

# Called where a run gives way; returns what is called where it goes on.
Leave: TypeAlias = Callable[[], Callable[[], None]]


class _Cancelled(BaseException):
    """A run is not wanted any more."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Where a run waits, and with what."""

    place: int
    content: Any


class Lockstep:
    """Runs of a program, of which one at a time is at work; what each does may call `wait`.

    Parameters
    ----------
    calls
        What each run does.
    leave
        Called by a run that gives way; what it returns, when the run goes on.
    """

    def __init__(
        self,
        calls: Sequence[Callable[[], object]],
        leave: Leave = lambda: _stay,
    ) -> None:
        modes = CallerModes()
        self._runs = [_PausedCall(partial(modes.call, call), leave) for call in calls]
        self._trimmed = _resident()
        self._numbers = {run.thread: i for i, run in enumerate(self._runs)}

    def wait(self, place: int, content: Any) -> None:
        """Stop the run that calls this until the others are there; do nothing in other threads."""
        number = self.current()
        if number is not None:
            self._runs[number].wait(Stop(place, content))

    def current(self) -> int | None:
        """Return the number of the run that calls this; ``None`` outside of them."""
        return self._numbers.get(threading.current_thread())

    def stops(
        self, choose: Callable[[Mapping[int, int]], int]
    ) -> Iterator[tuple[int, dict[int, Any]]]:
        """Yield a place where runs wait, with what each of them brings, until all have ended.

        ``choose`` returns which, of the places where each run waits.
        """
        try:
            self._resume(self._runs)
            while places := {i: run.stop.place for i, run in enumerate(self._runs) if run.stop}:
                place = choose(places)
                here = {i: self._runs[i] for i in places if places[i] == place}
                yield place, {i: run.stop.content for i, run in here.items() if run.stop}
                self._resume(list(here.values()))
        finally:
            for run in self._runs:
                run.cancel()

    def _resume(self, runs: Sequence[_PausedCall]) -> None:
        for run in runs:
            run.resume()
            if _resident() > self._trimmed + _UNTRIMMED:
                _trim()
                self._trimmed = _resident()


def _stay() -> None:
    """Do nothing."""


def _resident() -> int:
    """Return how many bytes of the process are in memory; 0 where that is not known."""
    if sys.platform != "linux":
        return 0
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def _trim() -> None:
    """Give back what threads have freed: glibc and MKL keep it for each of them, and they wait."""
    for library, name in ((_TORCH, "mkl_serv_free_buffers"), (None, "malloc_trim")):
        if library is None or library.exists():
            function = getattr(ctypes.CDLL(None if library is None else str(library)), name, None)
            if function is not None:
                function(0)


class _PausedCall:
    """A call in a thread of its own, which is at work only while someone waits for it."""

    def __init__(self, call: Callable[[], object], leave: Leave) -> None:
        self._call: Callable[[], object] | None = call
        self._leave = leave
        self._go = threading.Semaphore(0)
        self._back = threading.Semaphore(0)
        self._cancelled = False
        self._error: BaseException | None = None
        self.stop: Stop | None = None
        self.thread = threading.Thread(target=self._work, daemon=True)

    def resume(self) -> None:
        """Let the call go on to where it waits next, or to its end; raise what it raises."""
        self.stop = None
        if self.thread.ident is None:
            self.thread.start()
        self._go.release()
        self._back.acquire()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self, stop: Stop) -> None:
        """Give way until `resume` is called again."""
        go_on = self._leave()
        self.stop = stop
        del stop
        self._back.release()
        self._go.acquire()
        go_on()
        if self._cancelled:
            raise _Cancelled

    def cancel(self) -> None:
        """End the call where it waits, if it does not go on."""
        if self.thread.ident is not None and self.thread.is_alive():
            self._cancelled = True
            self._go.release()
            self.thread.join()
        self.stop = None

    def _work(self) -> None:
        self._go.acquire()
        call, self._call = self._call, None
        try:
            if not self._cancelled and call is not None:
                with torch.no_grad():
                    call()
        except _Cancelled:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self.stop = None
            self._back.release()
