"""A program whose weights are changed so that its outputs come closer to another program's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from milpress.errors import ConfigError
from milpress.interpreter import features as io
from milpress.interpreter.layers import _kept
from milpress.interpreter.module import called
from milpress.interpreter.program import Program

# Of rows of probabilities as they are, and of others through softmax.
Distance: TypeAlias = Literal["mse", "kl", "kl of probabilities"]
Arrays: TypeAlias = dict[str, NDArray[np.float32]]

# What results depend on beside the samples and the settings.
TORCH_VERSION = str(torch.__version__)

_LEAST_PROBABILITY = 2.0**-24
# Probabilities rounded to float16 add up to 1 up to half a last place; twice that.
_SUM_TOLERANCE = 2.0**-10


def check_device(device: str) -> None:
    """Refuse a device that this machine's torch does not have.

    Raises
    ------
    ConfigError
        If it has none.
    """
    if device == "cuda":
        is_there = torch.cuda.is_available()
    else:
        is_there = device == "cpu" or torch.backends.mps.is_available()
    if not is_there:
        msg = f"device {device!r} is not there for torch on this machine; take 'cpu'"
        raise ConfigError(msg)


@contextlib.contextmanager
def repeatable(device: str) -> Iterator[None]:
    """Have torch make new tensors on a device, and sum there in one order."""
    if device == "cpu":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with torch.device(device):
            yield
    finally:
        torch.use_deterministic_algorithms(before)


class Student:
    """A program as a module, with weights that can be set and that have gradients.

    States are zero as each sample begins.

    Parameters
    ----------
    program
        The program. Of one that chooses boxes, the outputs are what they are chosen by.
    device
        Where it runs.
    mask
        The input, of shape ``(batch, length)``, that is zero at padding; ``None`` for none.
    """

    def __init__(self, program: Program, *, device: str = "cpu", mask: str | None = None) -> None:
        program = program.before_suppression()
        self._device = device
        self._mask = mask
        self._module = program.to_torch().to(device)
        self._module.requires_grad_(False)
        self._inputs = [feature for feature in program.inputs if not feature.is_unused]
        self._outputs = [feature.name for feature in program.outputs]

    def has(self, name: str) -> bool:
        """Whether a stored tensor of that name is a parameter of the module."""
        path = self._module.attributes.get(name)
        return path is not None and path in dict(self._module.named_parameters())

    def set(self, name: str, array: NDArray[np.float32], *, tuned: bool) -> None:
        """Give a weight other numbers; if it is tuned, calls of `learn` add up its gradient."""
        parameter = self._parameter(name)
        parameter.data = torch.from_numpy(np.ascontiguousarray(array)).to(self._device)
        parameter.grad = None
        parameter.requires_grad_(tuned)

    def gradient(self, name: str) -> NDArray[np.float32] | None:
        """Return the gradient of a weight since it was set; ``None`` if none has reached it."""
        gradient = self._parameter(name).grad
        return None if gradient is None else gradient.cpu().numpy()

    def outputs(self, sample: Mapping[str, Any]) -> Arrays:
        """Return the outputs that hold floats, by name."""
        with torch.no_grad():
            return {name: output.cpu().numpy() for name, output in self._run(sample).items()}

    def distances(
        self,
        sample: Mapping[str, Any],
        expected: Mapping[str, NDArray[np.float32]],
        kinds: Mapping[str, tuple[Distance, float]],
    ) -> dict[str, float]:
        """Return how far each output is from what is expected, times its share."""
        with torch.no_grad():
            distances = self._distances(sample, expected, kinds)
            return {name: float(distance) for name, distance in distances.items()}

    def learn(
        self,
        sample: Mapping[str, Any],
        expected: Mapping[str, NDArray[np.float32]],
        kinds: Mapping[str, tuple[Distance, float]],
    ) -> float:
        """Add the gradient of the distances, times their shares, and return their sum."""
        with repeatable(self._device):
            distances = self._distances(sample, expected, kinds)
            total = torch.stack(list(distances.values())).sum()
            if total.requires_grad and bool(torch.isfinite(total)):
                torch.autograd.backward(total)
        return float(total.detach())

    def _parameter(self, name: str) -> nn.Parameter:
        return self._module.get_parameter(self._module.attributes[name])

    def _run(self, sample: Mapping[str, Any]) -> dict[str, Tensor]:
        with repeatable(self._device):
            inputs = [
                io.taken(feature, sample.get(feature.name)).to(self._device)
                for feature in self._inputs
            ]
            outputs = called(self._module, inputs)
        return {
            name: each
            for name, each in zip(self._outputs, outputs, strict=True)
            if isinstance(each, Tensor) and each.is_floating_point()
        }

    def _distances(
        self,
        sample: Mapping[str, Any],
        expected: Mapping[str, NDArray[np.float32]],
        kinds: Mapping[str, tuple[Distance, float]],
    ) -> dict[str, Tensor]:
        given = None if self._mask is None else sample.get(self._mask)
        mask = None if given is None else torch.from_numpy(np.asarray(given) != 0).to(self._device)
        outputs = self._run(sample)
        return {
            name: share
            * _distance(
                kind,
                _kept(torch.from_numpy(expected[name]).to(self._device), mask),
                _kept(outputs[name], mask),
            )
            for name, (kind, share) in kinds.items()
        }


def _distance(kind: Distance, expected: Tensor, given: Tensor) -> Tensor:
    """Return a sum over elements or rows; what is not finite in what is expected is left out."""
    finite = torch.isfinite(expected)
    if kind == "mse":
        zero = torch.zeros((), device=expected.device)
        return (
            (torch.where(finite, given, zero) - torch.where(finite, expected, zero)).square().sum()
        )
    if kind == "kl":
        logs = [tensor.log_softmax(-1) for tensor in (expected, given)]
        shares = logs[0].exp()
    else:
        logs = [tensor.clamp_min(_LEAST_PROBABILITY).log() for tensor in (expected, given)]
        shares = expected
    counts = finite & (shares > 0)
    zero = torch.zeros((), device=expected.device)
    apart = torch.where(counts, logs[0], zero) - torch.where(counts, logs[1], zero)
    return (torch.where(counts, shares, zero) * apart).sum()


def sum_of_squares(value: Tensor, mask: Tensor | None) -> tuple[float, int]:
    """Return the sum of squares of a value, but for rows that are padding, and of how many."""
    kept = _kept(value, mask)
    return float(kept.double().square().sum()), kept.numel()


class OutputScale:
    """What samples tell of the size and the kind of an output, added up one by one."""

    def __init__(self) -> None:
        self._power = 0.0
        self._n_rows = 0
        self._n = 0
        self.n_columns = 0
        self.are_probabilities = True

    def add(self, output: NDArray[np.float32], sample: Mapping[str, Any], mask: str | None) -> None:
        """Add the output of one sample, but for rows at positions that are padding."""
        given = None if mask is None else sample.get(mask)
        if given is not None:
            kept = _kept(torch.from_numpy(output), torch.from_numpy(np.asarray(given) != 0))
            output = kept.numpy()
        wide = np.where(np.isfinite(output), output, 0).astype(np.float64)
        self._n += 1
        self._power += float(np.square(wide).sum())
        self.n_columns = output.shape[-1] if output.ndim else 1
        self._n_rows += output.size // max(self.n_columns, 1)
        self.are_probabilities &= _are_probabilities(wide)

    def of(self, distance: Distance) -> float:
        """Return what distances of a sample are divided by: its power, or its number of rows."""
        total = self._power if distance == "mse" else float(self._n_rows)
        return total / self._n or 1.0


def _are_probabilities(outputs: NDArray[np.float64]) -> bool:
    if not outputs.ndim or outputs.shape[-1] < 2:
        return False
    sums = np.abs(outputs.sum(-1) - 1)
    return bool((outputs >= 0).all() and (sums <= _SUM_TOLERANCE).all())
