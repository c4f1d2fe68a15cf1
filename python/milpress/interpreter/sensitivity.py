"""Sensitivity of a program's outputs to changes of its weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from milpress.errors import ConfigError, UnsupportedError
from milpress.interpreter import features as io
from milpress.interpreter.module import called
from milpress.interpreter.program import Program

OutputMetric: TypeAlias = Literal["auto", "snr", "cosine", "kl"]
Note: TypeAlias = Callable[[int, int, str], None]

# Draws of a random direction over all samples: the deviation of a mean square is a quarter of it.
_N_DRAWS = 32
_LEAST_PROBABILITY = 1e-8
_SUM_TOLERANCE = 1e-3
# A last layer so wide, and so much wider than its inputs, has logits as outputs, not features.
_LEAST_VOCABULARY = 1000
_WIDENS = 2
_TINY = float(np.finfo(np.float64).tiny)


class Gradients(NamedTuple):
    """How the outputs move with a weight.

    What the square of an element's change adds to the error, if changes are as good as independent,
    is taken as a product of what its output channel counts and of what its place in the channel
    counts: for a layer, those are the second moments of the gradients of its outputs and of its
    inputs (as K-FAC has it: Martens and Grosse 2015, arXiv 1503.05671).

    Parameters
    ----------
    channels
        Of the shape ``(n,)``: the sum over each output channel.
    places
        Of the shape ``(m,)``: what each place in a channel counts, 1 in all.
    along
        Of the shape ``(n_draws, n)``: for each draw and output channel, how far the outputs move
        when the channel is multiplied; the error of such changes, which are not independent, is the
        sum of the squares over draws of what they add up to.
    """

    channels: NDArray[np.float64]
    places: NDArray[np.float64]
    along: NDArray[np.float64]

    def plus(self, other: Gradients) -> Gradients:
        """Return how the outputs of two runs of a weight move together."""
        totals = self.channels.sum(), other.channels.sum()
        places = totals[0] * self.places + totals[1] * other.places
        return Gradients(
            self.channels + other.channels,
            places / max(places.sum(), _TINY),
            np.concatenate([self.along, other.along]),
        )

    def of_channels(self, weight: NDArray[Any]) -> NDArray[np.float64]:
        """Return the error if each channel of a weight, ``(n, m)``, were all error."""
        return np.asarray(self.channels * (np.square(weight, dtype=np.float64) @ self.places))

    def error(self, weight: NDArray[Any], changes: Sequence[Change]) -> float:
        """Return the error that changes of the weight make, to first order.

        Codes err towards the mean, so that a channel as a whole shrinks: that part of the change
        is taken apart, and what is left of it counts as independent.

        Parameters
        ----------
        weight
            The weight as ``(n, m)``, output channels first.
        changes
            Of some channels each, how they change, and how much all channels count that change
            likewise: every channel is one of one change.
        """
        apart, together = 0.0, np.zeros(len(self.along))
        for chosen, change, like in changes:
            rows = weight[chosen].astype(np.float64)
            lengths = np.einsum("ij,ij->i", rows, rows)
            shares = np.einsum("ij,ij->i", rows, change) / np.where(lengths > 0, lengths, 1)
            rest = np.square(change - shares[:, None] * rows) @ self.places
            apart += like.factor * float(self.channels[chosen] @ rest)
            together += self.along[:, chosen] @ shares
            if len(like.others):
                together += self.along[:, like.others].sum(1) * shares.mean()
        return apart + float(together @ together)


class Likewise(NamedTuple):
    """The channels that are taken to change as some do.

    Parameters
    ----------
    others
        Which.
    factor
        What all of them count beside those that are known.
    """

    others: NDArray[np.intp]
    factor: float


class Change(NamedTuple):
    """How some channels of a weight change, ``(n_chosen, m)``, and which others do likewise."""

    chosen: NDArray[np.intp]
    change: NDArray[np.float64]
    like: Likewise


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
        ``"snr"``, ``"cosine"`` or ``"kl"``; ``"auto"`` is the divergence if every output of floats
        is one of probabilities or of logits over a vocabulary, else ``"snr"``.

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
        if metric == "auto":
            metric = "kl" if _gives_probabilities(program) else "snr"
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
        sums = [_Sums([self._parameter(name) for name in names], axis) for names, axis in groups]
        n_draws = max(1, _N_DRAWS // self.n_samples)
        generator = torch.Generator().manual_seed(0)
        self._module.requires_grad_(False)
        try:
            for each in sums:
                each.watch()
            for i in range(self.n_samples * n_draws):
                note(i // n_draws, self.n_samples, "gradients")
                self._backward(self._inputs[i // n_draws], generator)
                for each in sums:
                    each.end()
        finally:
            for each in sums:
                each.leave()
            self._module.requires_grad_(False)
        return [each.gradients(n_draws) for each in sums]

    def _backward(self, inputs: tuple[Tensor, ...], generator: torch.Generator) -> None:
        value = torch.zeros(())
        for point, share in zip(self._points(self._run(inputs)), self._shares, strict=True):
            signs = torch.randint(0, 2, point.shape, generator=generator) * 2.0 - 1
            value = value + math.sqrt(share) * (signs * point).sum()
        if value.requires_grad:
            value.backward()  # type: ignore[no-untyped-call]

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
        return called(self._module, inputs)

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


class _Sums:
    """What is added up of the gradients of one weight; no gradient is kept."""

    def __init__(self, parameters: Sequence[nn.Parameter], axis: int) -> None:
        self._parameters = parameters
        self._axis = axis
        first = parameters[0]
        n = first.shape[axis]
        self._weight = first.detach().movedim(axis, 0).reshape(n, -1)
        self._channels = torch.zeros(n, dtype=torch.float64)
        self._places = torch.zeros(self._weight.shape[1], dtype=torch.float64)
        self._along: list[Tensor] = []
        self._hooks: list[Any] = []
        self._waiting: Tensor | None = None
        self._n_seen = 0

    def watch(self) -> None:
        """Let gradients come here as they are computed."""
        for parameter in self._parameters:
            parameter.requires_grad_(True)
            hook = parameter.register_post_accumulate_grad_hook(self._take)  # type: ignore[no-untyped-call]
            self._hooks.append(hook)

    def leave(self) -> None:
        """Undo `watch`."""
        for hook in self._hooks:
            hook.remove()
        for parameter in self._parameters:
            parameter.grad = None

    def end(self) -> None:
        """End a draw, which may have moved none of the parameters, or only some."""
        if self._waiting is not None:
            self._add(self._waiting)
        elif not self._n_seen:
            self._along.append(torch.zeros(len(self._channels), dtype=torch.float64))
        self._waiting, self._n_seen = None, 0

    def gradients(self, n_draws: int) -> Gradients:
        """Return what the draws of all samples say."""
        along = torch.stack(self._along).numpy() / math.sqrt(n_draws)
        places = self._places.numpy()
        channels = self._channels.numpy() / n_draws
        return Gradients(channels, places / max(places.sum(), _TINY), along)

    def _take(self, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is None:
            return
        self._n_seen += 1
        # Parameters that always have the same values move the outputs together.
        if self._n_seen < len(self._parameters):
            self._waiting = gradient if self._waiting is None else self._waiting + gradient
            return
        self._add(gradient if self._waiting is None else self._waiting + gradient)
        self._waiting = None

    def _add(self, gradient: Tensor) -> None:
        rows = gradient.movedim(self._axis, 0).reshape(self._weight.shape)
        self._along.append(torch.einsum("ij,ij->i", rows, self._weight).double())
        squares = rows.square()
        self._channels += squares.sum(1)
        self._places += squares.sum(0)


def _gives_probabilities(program: Program) -> bool:
    """Whether all outputs of floats come from a softmax, or are logits over a vocabulary."""
    kinds = program.op_types
    wide = {
        layer.prefix + layer.name
        for layer in program.layers
        if layer.kind == "linear"
        and layer.shape[0] >= max(_LEAST_VOCABULARY, _WIDENS * layer.shape[1])
    }
    outputs = [one.name for one in program.outputs if one.dtype.startswith("float")]
    return bool(outputs) and all(
        kinds.get(name) in ("softmax", "log_softmax") or name in wide for name in outputs
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
