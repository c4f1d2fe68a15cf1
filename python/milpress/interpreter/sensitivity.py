"""How far the outputs of a program move when its weights do."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from milpress.errors import ConfigError, ExecutionError, UnsupportedError
from milpress.interpreter import features as io
from milpress.interpreter.program import Program

OutputMetric: TypeAlias = Literal["snr", "cosine", "kl"]
Note: TypeAlias = Callable[[int, int, str], None]

# Draws of a random direction over all samples: the deviation of a mean square is a quarter of it.
_N_DRAWS = 32
_LEAST_PROBABILITY = 1e-8
_SUM_TOLERANCE = 1e-3


class OutputError:
    """The error of a program's outputs on samples, as a function of its weights.

    Each metric is a sum of squared distances between what the program gives with its own weights
    and with others: of the outputs over their squares (``snr``), of the outputs divided by their
    length (``cosine``: 1 minus the cosine), or of the square roots of probabilities (``kl``: the
    divergence to second order). Several outputs count alike.

    Parameters
    ----------
    program
        A single ML program, computing in float32.
    samples
        Inputs by name, all of which are held in memory.
    metric
        ``"snr"``, ``"cosine"`` or ``"kl"``.

    Raises
    ------
    ConfigError
        If there is no such metric.
    UnsupportedError
        If the model is a pipeline, or no output suits the metric.
    """

    def __init__(
        self, program: Program, samples: Iterable[Mapping[str, Any]], metric: OutputMetric
    ) -> None:
        if metric not in get_args(OutputMetric):
            msg = f"metric must be one of {', '.join(get_args(OutputMetric))}, got {metric!r}"
            raise ConfigError(msg)
        self._module = program.to_torch()
        self._metric = metric
        self._inputs = [_tensors(program, sample) for sample in samples]
        with torch.no_grad():
            outputs = [self._run(inputs) for inputs in self._inputs]
        self._used = [
            i for i in range(len(outputs[0])) if _suits([made[i] for made in outputs], metric)
        ]
        if not self._used:
            msg = f"the model must have an output of floats that suits {metric}, got none"
            raise UnsupportedError(msg)
        self._given = {
            i: metric == "kl" and all(_are_probabilities(made[i]) for made in outputs)
            for i in self._used
        }
        self._expected = [self._points(made) for made in outputs]
        self._shares = [self._share(k) / len(self._used) for k in range(len(self._used))]

    @property
    def n_samples(self) -> int:
        """How many samples there are."""
        return len(self._inputs)

    def has(self, name: str) -> bool:
        """Whether the program uses a weight of that name."""
        return name in self._module.attributes

    def squared_gradients(
        self, groups: Sequence[Sequence[str]], note: Note = lambda *_: None
    ) -> list[NDArray[np.float32]]:
        """Return what a small change of each element does to the error, to first order.

        The error that changes ``d`` make is about the sum of the result times ``d * d``, if they
        are as good as independent: outputs are multiplied by random signs, and the squares of the
        gradients averaged (Hutchinson's estimator of the diagonal of the Gauss-Newton matrix).

        Parameters
        ----------
        groups
            Names of weights, those together that always have the same values.
        note
            Called with passes done, passes in all and what is at hand.
        """
        parameters = [[self._parameter(name) for name in names] for names in groups]
        sums = [torch.zeros_like(some[0]) for some in parameters]
        n_draws = math.ceil(_N_DRAWS / self.n_samples)
        generator = torch.Generator().manual_seed(0)
        for some in parameters:
            for parameter in some:
                parameter.requires_grad_(True)
        try:
            for i, inputs in enumerate(self._inputs):
                note(i, self.n_samples, "gradients")
                for _ in range(n_draws):
                    self._draw(inputs, parameters, sums, generator)
        finally:
            self._module.requires_grad_(False)
            self._module.zero_grad(set_to_none=True)
        return [(total / n_draws).numpy() for total in sums]

    def _draw(
        self,
        inputs: tuple[Tensor, ...],
        parameters: Sequence[Sequence[nn.Parameter]],
        sums: Sequence[Tensor],
        generator: torch.Generator,
    ) -> None:
        points = self._points(self._run(inputs))
        value = torch.zeros(())
        for point, share in zip(points, self._shares, strict=True):
            signs = torch.randint(0, 2, point.shape, generator=generator) * 2.0 - 1
            value = value + math.sqrt(share) * (signs * point).sum()
        if not value.requires_grad:
            return
        flat = [parameter for some in parameters for parameter in some]
        found = iter(torch.autograd.grad(value, flat, allow_unused=True))
        for some, total in zip(parameters, sums, strict=True):
            gradients = [
                gradient for gradient in (next(found) for _ in some) if gradient is not None
            ]
            if gradients:
                together = torch.stack(gradients).sum(0) if len(gradients) > 1 else gradients[0]
                total.add_(together.square())

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
            made = self._module(*inputs)
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            msg = f"the model must be able to compute the samples, got: {error}"
            raise ExecutionError(msg) from error
        return list(made) if isinstance(made, tuple) else [made]

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


def _tensors(program: Program, sample: Mapping[str, Any]) -> tuple[Tensor, ...]:
    return tuple(
        io.filled(feature)
        if sample.get(feature.name) is None
        else io.taken(feature, sample[feature.name])
        for feature in program.inputs
    )


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
