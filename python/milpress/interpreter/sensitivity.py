"""Sensitivity of a program's outputs to changes of its weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from milpress.errors import ConfigError, ExecutionError, UnsupportedError
from milpress.interpreter import features as io
from milpress.interpreter.program import Program
from milpress.mil.features import Probabilities

OutputMetric: TypeAlias = Literal["snr", "cosine", "kl"]
Note: TypeAlias = Callable[[int, int, str], None]

# Draws of a random direction over all samples: the deviation of a mean square is a quarter of it.
_N_DRAWS = 32
_LEAST_PROBABILITY = 1e-8
_SUM_TOLERANCE = 1e-3


class Gradients(NamedTuple):
    """How the outputs move with a weight.

    Parameters
    ----------
    squares
        For each element, what the square of its change adds to the error if changes are as good as
        independent.
    along
        For each draw and output channel, how far the outputs move when the channel is multiplied;
        the error of such changes, which are not independent, is the sum of the squares over draws
        of what they add up to.
    """

    squares: NDArray[np.floating[Any]]
    along: NDArray[np.floating[Any]]

    def plus(self, other: Gradients) -> Gradients:
        """Return how the outputs of two runs of a weight move together."""
        along = np.concatenate([self.along, other.along])
        return Gradients(self.squares + other.squares, along)

    def error(self, weight: NDArray[Any], change: NDArray[Any], axis: int) -> float:
        """Return the error that a change of the weight makes, to first order.

        Codes err towards the mean, so that a channel as a whole shrinks: that part of the change
        is taken apart, and what is left of it counts as independent.
        """
        rows, changes, squares = (
            np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)
            for array in (weight, change, self.squares)
        )
        lengths = np.einsum("ij,ij->i", rows, rows)
        shares = np.einsum("ij,ij->i", rows, changes) / np.where(lengths > 0, lengths, 1)
        rest = changes - shares[:, None] * rows
        apart = float(np.einsum("ij,ij,ij->", squares, rest, rest))
        together = self.along @ shares
        return apart + float(together @ together)


class OutputError:
    """The error of a program's outputs on samples, as a function of its weights.

    Each metric is a sum of squared distances between what the program gives with its own weights
    and with others: of the outputs over their squares (``snr``), of the outputs divided by their
    length (``cosine``: 1 minus the cosine), or of the square roots of probabilities (``kl``: the
    divergence to second order). Several outputs count alike.

    Parameters
    ----------
    program
        The program, computing in float32. Of one that chooses boxes, the outputs are what they are
        chosen by.
    samples
        Inputs by name, all of which are held in memory.
    metric
        ``"snr"``, ``"cosine"`` or ``"kl"``.

    Raises
    ------
    ConfigError
        If there is no such metric.
    UnsupportedError
        If no output suits the metric.
    """

    def __init__(
        self, program: Program, samples: Iterable[Mapping[str, Any]], metric: OutputMetric
    ) -> None:
        if metric not in get_args(OutputMetric):
            msg = f"metric must be one of {', '.join(get_args(OutputMetric))}, got {metric!r}"
            raise ConfigError(msg)
        program = program.before_suppression()
        self._module = program.to_torch()
        self._metric = metric
        taken = [feature for feature in program.inputs if not feature.is_unused]
        self._inputs = [
            tuple(io.taken(feature, sample.get(feature.name)) for feature in taken)
            for sample in samples
        ]
        with torch.no_grad():
            runs = [self._run(inputs) for inputs in self._inputs]
        by_output = list(zip(*runs, strict=True))
        self._used = [i for i, outputs in enumerate(by_output) if _suits(outputs, metric)]
        if not self._used:
            msg = f"the model has no output of floats that suits {metric}"
            raise UnsupportedError(msg)
        self._given = {
            i: metric == "kl" and all(map(_are_probabilities, by_output[i])) for i in self._used
        }
        self._expected = [self._points(outputs) for outputs in runs]
        self._shares = [self._share(k) / len(self._used) for k in range(len(self._used))]

    @property
    def n_samples(self) -> int:
        """How many samples there are."""
        return len(self._inputs)

    def has(self, name: str) -> bool:
        """Whether the program uses a weight of that name."""
        return name in self._module.attributes

    def gradients(
        self, groups: Sequence[tuple[Sequence[str], int]], note: Note = lambda *_: None
    ) -> list[Gradients]:
        """Return what changes of weights do to the outputs, to first order.

        The outputs are multiplied by random signs, so that the mean square of the gradient is what
        the change of one element adds to the error (Hutchinson's estimator of the diagonal of the
        Gauss-Newton matrix).

        Parameters
        ----------
        groups
            Names of weights, those together that always have the same values, and the axis of
            their output channels.
        note
            Called with samples done, samples in all and what is at hand.
        """
        parameters = [[self._parameter(name) for name in names] for names, _ in groups]
        flat = [parameter for some in parameters for parameter in some]
        n_draws = math.ceil(_N_DRAWS / self.n_samples)
        sums = [torch.zeros_like(some[0]) for some in parameters]
        along: list[list[Tensor]] = [[] for _ in groups]
        generator = torch.Generator().manual_seed(0)
        self._module.requires_grad_(False)
        for parameter in flat:
            parameter.requires_grad_(True)
        try:
            for i in range(self.n_samples * n_draws):
                note(i // n_draws, self.n_samples, "gradients")
                gradients = iter(self._gradients(self._inputs[i // n_draws], flat, generator))
                for k, (some, (_, axis)) in enumerate(zip(parameters, groups, strict=True)):
                    gradient = torch.stack([next(gradients) for _ in some]).sum(0)
                    sums[k].addcmul_(gradient, gradient)
                    others = [one for one in range(gradient.ndim) if one != axis]
                    along[k].append((gradient * some[0].detach()).sum(others))
        finally:
            self._module.requires_grad_(False)
        return [
            Gradients((total / n_draws).numpy(), torch.stack(dots).numpy() / math.sqrt(n_draws))
            for total, dots in zip(sums, along, strict=True)
        ]

    def _gradients(
        self, inputs: tuple[Tensor, ...], flat: Sequence[nn.Parameter], generator: torch.Generator
    ) -> list[Tensor]:
        value = torch.zeros(())
        for point, share in zip(self._points(self._run(inputs)), self._shares, strict=True):
            signs = torch.randint(0, 2, point.shape, generator=generator) * 2.0 - 1
            value = value + math.sqrt(share) * (signs * point).sum()
        if not value.requires_grad:
            return [torch.zeros_like(parameter) for parameter in flat]
        gradients = torch.autograd.grad(value, flat, allow_unused=True)
        return [
            torch.zeros_like(parameter) if gradient is None else gradient
            for gradient, parameter in zip(gradients, flat, strict=True)
        ]

    def error(self, weights: Mapping[str, NDArray[Any]]) -> float:
        """Return the error that other values of some weights make."""
        own = {name: self._parameter(name).data for name in weights}
        try:
            for name, values in weights.items():
                given = torch.from_numpy(np.asarray(values, np.float32))
                self._parameter(name).data = given.reshape(own[name].shape)
            total = 0.0
            with torch.no_grad():
                for inputs, expected in zip(self._inputs, self._expected, strict=True):
                    points = self._points(self._run(inputs))
                    for point, known, share in zip(points, expected, self._shares, strict=True):
                        total += share * float((point - known).double().square().sum())
        finally:
            for name, tensor in own.items():
                self._parameter(name).data = tensor
        return total if math.isfinite(total) else math.inf

    def _parameter(self, name: str) -> nn.Parameter:
        return self._module.get_parameter(self._module.attributes[name])

    def _run(self, inputs: tuple[Tensor, ...]) -> list[Any]:
        self._module.reset_states()
        try:
            output = self._module(*inputs)
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            msg = f"the model can't compute the samples: {error}"
            raise ExecutionError(msg) from error
        outputs = output if isinstance(output, tuple) else (output,)
        return [each.tensor if isinstance(each, Probabilities) else each for each in outputs]

    def _points(self, outputs: Sequence[Any]) -> list[Tensor]:
        """Return the points whose squared distances are the error."""
        points = []
        for i in self._used:
            output = torch.nan_to_num(outputs[i].to(torch.float32), posinf=0, neginf=0)
            if self._metric == "cosine":
                output = output / output.norm().clamp_min(torch.finfo(output.dtype).tiny)
            elif self._metric == "kl" and self._given[i]:
                output = output.clamp_min(_LEAST_PROBABILITY).sqrt()
            elif self._metric == "kl":
                output = (output.log_softmax(-1) / 2).exp()
            points.append(output)
        return points

    def _share(self, k: int) -> float:
        """Return by what the squared distances of an output are multiplied."""
        expected = [points[k] for points in self._expected]
        if self._metric == "cosine":
            return 0.5 / self.n_samples
        if self._metric == "kl":
            return 2 / sum(point.numel() // point.shape[-1] for point in expected)
        return 1 / sum(float(point.double().square().sum()) for point in expected)


def _suits(outputs: Sequence[Any], metric: OutputMetric) -> bool:
    """Whether an output is of floats, not all zero, and for ``kl`` has several in a row."""
    if not all(isinstance(one, Tensor) and one.is_floating_point() for one in outputs):
        return False
    if metric == "kl" and not all(one.ndim and one.shape[-1] > 1 for one in outputs):
        return False
    return any(bool(torch.nan_to_num(one, posinf=0, neginf=0).any()) for one in outputs)


def _are_probabilities(output: Tensor) -> bool:
    off = (output.sum(-1) - 1).abs().max()
    return bool((output >= 0).all() and off <= _SUM_TOLERANCE)
