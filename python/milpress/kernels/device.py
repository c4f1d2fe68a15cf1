"""Where kernels run: on the CPU, or on the GPU of a Mac through Metal."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar, cast, get_args

import milpress._core as _core
from milpress.errors import ConfigError

DeviceName: TypeAlias = Literal["cpu", "metal", "auto"]
_Kernel = TypeVar("_Kernel", bound=Callable[..., Any])
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Something that kernels can run on, or why they can't.

    Parameters
    ----------
    name
        As the workflows take it: ``"cpu"`` or ``"metal"``.
    hardware
        What it is, as the system says; empty if there is none.
    reason
        Why it can't be used; empty if it can.
    """

    name: DeviceName
    hardware: str
    reason: str = ""

    @property
    def is_usable(self) -> bool:
        """Whether kernels can run on it."""
        return not self.reason


@functools.cache
def devices() -> tuple[Device, ...]:
    """Return the devices of this machine, usable or not.

    The GPU computes known answers first, once in a process; it is usable if they are the CPU's to
    the last bit.

    Examples
    --------
    >>> devices()[0].name
    'cpu'
    """
    hardware, reason = _core.metal.device()
    gpu = Device(name="metal", hardware=hardware, reason=reason or _core.metal.self_test())
    return Device(name="cpu", hardware="CPU"), gpu


class Kernels:
    """The kernels that a GPU can run, on the device that was asked for.

    Where the GPU can't run one, the CPU does, and the reason is logged and noted. Results are the
    same to the last bit.

    Parameters
    ----------
    device
        ``"metal"`` for the GPU; ``"cpu"`` and, as long as no size is known at which the GPU wins,
        ``"auto"`` for the CPU.

    Raises
    ------
    ConfigError
        If it is none of these.
    """

    def __init__(self, device: DeviceName = "cpu") -> None:
        if device not in get_args(DeviceName):
            msg = f"device must be one of {get_args(DeviceName)}, got {device!r}"
            raise ConfigError(msg)
        self._counts: dict[str, int] = {}
        self._lock = threading.Lock()
        self._metal = None
        if device == "metal":
            self._metal = devices()[1]
            if not self._metal.is_usable:
                self._note(f"all kernels ran on the CPU: {self._metal.reason}")

    @property
    def notes(self) -> tuple[str, ...]:
        """What ran on the GPU, and what did not although it was asked for."""
        return tuple(note if n == 1 else f"{note} ({n} times)" for note, n in self._counts.items())

    def dispatch(self, kernel: _Kernel) -> _Kernel:
        """Return a kernel of `_core` to call on the device: its twin there has its name.

        Examples
        --------
        >>> import numpy as np
        >>> Kernels().dispatch(_core.keep_above)(np.float32([1, -3, 0]), 0.5)
        array([3], dtype=uint8)
        """
        return cast("_Kernel", functools.partial(self._run, kernel))

    def _run(self, kernel: Callable[..., Any], *arguments: object) -> Any:
        name = kernel.__name__
        if self._metal is None or not self._metal.is_usable:
            return kernel(*arguments)
        twin = getattr(_core.metal, name, None)
        if twin is None:
            self._note(f"{name} ran on the CPU: the GPU has no such kernel")
            return kernel(*arguments)
        try:
            result = twin(*arguments)
        except _core.metal.DeviceError as error:
            self._note(f"{name} ran on the CPU: {error}")
            return kernel(*arguments)
        self._count(f"{name} ran on {self._metal.hardware}")
        return result

    def _note(self, note: str) -> None:
        if self._count(note) == 1:
            _logger.warning("%s", note)

    def _count(self, note: str) -> int:
        with self._lock:
            self._counts[note] = self._counts.get(note, 0) + 1
            return self._counts[note]


# What may be said of where to run: nothing leaves it to the `using` block around, or to the CPU.
Placement: TypeAlias = DeviceName | Kernels | None
_around: ContextVar[Kernels] = ContextVar("_around")


def kernels_for(device: Placement) -> Kernels:
    """Return the kernels on a device; for ``None`` those of the `using` block around, or the CPU's.

    A block holds for its own thread; another thread has to be given its kernels.

    Raises
    ------
    ConfigError
        If there is no such device.
    """
    if isinstance(device, Kernels):
        return device
    if device is not None:
        return Kernels(device)
    return _around.get(None) or Kernels()


@contextlib.contextmanager
def using(device: Placement) -> Iterator[Kernels]:
    """Run the kernels of this block on a device.

    Raises
    ------
    ConfigError
        If there is no such device.
    """
    kernels = kernels_for(device)
    token = _around.set(kernels)
    try:
        yield kernels
    finally:
        _around.reset(token)
