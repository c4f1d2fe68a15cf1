"""Where kernels run: on the CPU, or on the GPU of a Mac through Metal."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, ParamSpec, TypeAlias, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

import milpress._core as _core
from milpress.errors import ConfigError

DeviceName: TypeAlias = Literal["cpu", "metal", "auto"]
_P = ParamSpec("_P")
_R = TypeVar("_R")
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
    hardware, reason = _core.metal_device()
    if not reason:
        reason = _core.metal_self_test()
    return Device(name="cpu", hardware="CPU"), Device(
        name="metal", hardware=hardware, reason=reason
    )


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

    def kmeans1d(
        self, weights: NDArray[Any], n_entries: int, importance: NDArray[np.float32] | None
    ) -> NDArray[Any]:
        """Call the kernel of that name."""
        return self._run(_core.kmeans1d, _core.metal_kmeans1d, weights, n_entries, importance)

    def kmeans_vector(
        self,
        weights: NDArray[Any],
        n_entries: int,
        dim: int,
        seed: int,
        importance: NDArray[np.float32] | None,
    ) -> tuple[NDArray[Any], NDArray[np.uint8]]:
        """Call the kernel of that name."""
        return self._run(_core.kmeans_vector, None, weights, n_entries, dim, seed, importance)

    def lut_assign(self, weights: NDArray[Any], luts: NDArray[Any]) -> NDArray[np.uint8]:
        """Call the kernel of that name."""
        return self._run(_core.lut_assign, _core.metal_lut_assign, weights, luts)

    def quantize(
        self, weights: NDArray[Any], code_min: int, code_max: int, fit_offset: bool
    ) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None]:
        """Call the kernel of that name."""
        return self._run(
            _core.quantize, _core.metal_quantize, weights, code_min, code_max, fit_offset
        )

    def quantize_mse(
        self, weights: NDArray[Any], code_min: int, code_max: int, fit_offset: bool
    ) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None]:
        """Call the kernel of that name."""
        return self._run(
            _core.quantize_mse, _core.metal_quantize_mse, weights, code_min, code_max, fit_offset
        )

    def quantize_mse_weighted(
        self,
        weights: NDArray[Any],
        importance: NDArray[np.float32],
        code_min: int,
        code_max: int,
        fit_offset: bool,
    ) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None]:
        """Call the kernel of that name."""
        kernel = _core.quantize_mse_weighted
        return self._run(kernel, None, weights, importance, code_min, code_max, fit_offset)

    def keep_largest(self, weights: NDArray[Any], n_zeros: int) -> NDArray[np.uint8]:
        """Call the kernel of that name."""
        return self._run(_core.keep_largest, _core.metal_keep_largest, weights, n_zeros)

    def keep_above(self, weights: NDArray[Any], threshold: float) -> NDArray[np.uint8]:
        """Call the kernel of that name."""
        return self._run(_core.keep_above, _core.metal_keep_above, weights, threshold)

    def keep_n_m(
        self, weights: NDArray[Any], outer: int, n_channels: int, inner: int, n: int, m: int
    ) -> NDArray[np.uint8]:
        """Call the kernel of that name."""
        return self._run(
            _core.keep_n_m, _core.metal_keep_n_m, weights, outer, n_channels, inner, n, m
        )

    def keep_blocks(
        self,
        weights: NDArray[Any],
        outer: int,
        n_channels: int,
        inner: int,
        block_size: int,
        n_zeros: int,
    ) -> NDArray[np.uint8]:
        """Call the kernel of that name."""
        return self._run(
            _core.keep_blocks, None, weights, outer, n_channels, inner, block_size, n_zeros
        )

    def compact(self, weights: NDArray[Any], bitmask: NDArray[np.uint8]) -> NDArray[Any]:
        """Call the kernel of that name."""
        return self._run(_core.compact, _core.metal_compact, weights, bitmask)

    def _run(
        self,
        on_cpu: Callable[_P, _R],
        on_gpu: Callable[_P, _R] | None,
        *arguments: _P.args,
        **named: _P.kwargs,
    ) -> _R:
        name = on_cpu.__name__
        if self._metal is None or not self._metal.is_usable:
            return on_cpu(*arguments, **named)
        if on_gpu is None:
            self._note(f"{name} ran on the CPU: the GPU has no such kernel")
            return on_cpu(*arguments, **named)
        try:
            result = on_gpu(*arguments, **named)
        except _core.DeviceError as error:
            self._note(f"{name} ran on the CPU: {error}")
            return on_cpu(*arguments, **named)
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
