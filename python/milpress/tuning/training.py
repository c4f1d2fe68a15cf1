"""The loop that moves arrays so that outputs come closer to the original's."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from milpress.plain.arrays import Arrays
from milpress.progress import Progress
from milpress.tuning.arrays import TunedArray, TunedWeight
from milpress.tuning.config import TuneConfig
from milpress.tuning.lessons import Lesson

if TYPE_CHECKING:
    from milpress.interpreter.distillation import Distance, Student

# A state is validated, and kept for a run to go on from, so many times in a run.
_N_VALIDATIONS = 20
_BETAS = (0.9, 0.999)
_EPSILON = 1e-8
_LONGEST_GRADIENT = 1.0
# Steps grow to their full size over this share of all.
_WARM_UP = 0.05
# A scale moves by less than this share of what it was, so that it keeps its sign.
_FARTHEST = 0.9


class Place(NamedTuple):
    """Where a program uses a weight: which program, and its name there."""

    student: int
    name: str


@dataclass(slots=True, eq=False)
class Moving:
    """An array as it moves: by how much, in units of what its numbers belong to.

    Parameters
    ----------
    array, unit
        The array, and how large what each number belongs to is.
    places
        Where each of its weights is used.
    """

    array: TunedArray
    unit: NDArray[np.float32]
    places: list[tuple[TunedWeight, list[Place]]]
    moved: NDArray[np.float32] = field(init=False)
    first: NDArray[np.float32] = field(init=False)
    second: NDArray[np.float32] = field(init=False)

    def __post_init__(self) -> None:
        self.moved, self.first, self.second = (
            np.zeros(self.array.stored.shape, np.float32) for _ in range(3)
        )

    def floats(self) -> NDArray[np.float32]:
        """Return the numbers as they are by now, in float32."""
        floats: NDArray[np.float32] = self.array.stored.astype(np.float32) + self.unit * self.moved
        return floats

    def rounded(self) -> NDArray[Any]:
        """Return the numbers as they would be stored: finite, and scales not zero."""
        dtype = self.array.stored.dtype
        most = float(np.finfo(dtype).max)
        rounded = np.clip(self.floats(), -most, most).astype(dtype)
        if self.array.is_factor:
            rounded = np.where(rounded == 0, self.array.stored, rounded)
        return rounded

    def step(self, gradient: NDArray[np.float64], n: int, rate: float) -> None:
        """Take the n-th step by Adam (Kingma and Ba 2015, arXiv 1412.6980)."""
        wide = gradient.astype(np.float32)
        self.first += np.float32(1 - _BETAS[0]) * (wide - self.first)
        self.second += np.float32(1 - _BETAS[1]) * (wide * wide - self.second)
        mean = self.first / np.float32(1 - _BETAS[0] ** n)
        root = np.sqrt(self.second / np.float32(1 - _BETAS[1] ** n))
        self.moved -= np.float32(rate) * mean / (root + np.float32(_EPSILON))
        if self.array.is_factor:
            most = np.float32(_FARTHEST) * np.abs(self.array.stored.astype(np.float32))
            limit = np.divide(most, self.unit, out=np.zeros_like(self.unit), where=self.unit > 0)
            self.moved = np.asarray(np.clip(self.moved, -limit, limit), np.float32)


class Validated(NamedTuple):
    """A state, and how far the outputs are from the original's with it."""

    step: int
    distances: dict[str, float]
    arrays: list[NDArray[Any]]

    @property
    def loss(self) -> float:
        """Mean distance of the outputs."""
        return sum(self.distances.values()) / len(self.distances)


@dataclass(slots=True, kw_only=True)
class Trainer:
    """Moves arrays by what samples say.

    Parameters
    ----------
    config
        The settings.
    students
        The programs whose weights are made of the arrays.
    arrays
        What moves.
    kinds
        Of each program, how each output is compared, and what its distance is multiplied by.
    learned, aside
        The samples that are learned from, and those that states are chosen by: of each, the program
        that it is for, and its place among all.
    lesson
        Returns the sample at a place, with what the original makes of it.
    keep
        Keeps a state for a run to go on from.
    """

    config: TuneConfig
    students: Sequence[Student]
    arrays: Sequence[Moving]
    kinds: Sequence[Mapping[str, tuple[Distance, float]]]
    names: Sequence[str]
    learned: Sequence[tuple[int, int]]
    aside: Sequence[tuple[int, int]]
    lesson: Callable[[int], Lesson]
    keep: Callable[[Arrays], None]
    n_done: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    unreached: set[int] = field(default_factory=set)
    # How it was at first, and the best so far.
    kept: tuple[Validated, Validated] | None = None

    def run(self, note: Progress) -> tuple[Validated, Validated]:
        """Move the arrays; return how it was at first, and the best state that was met."""
        began = time.monotonic() - self.seconds
        n_steps = self.config.steps
        if self.kept is None:
            first = self.validated()
            self.kept = first, first
            self.keep(self.state(*self.kept))
        start, best = self.kept
        is_finite = math.isfinite(start.loss)
        if not is_finite:
            self.notes.append("outputs of the compressed package are not finite: nothing to learn")
        while is_finite and self.n_done < n_steps:
            done = self._share_done(time.monotonic() - began)
            if done >= 1:
                self.notes.append(f"ended after {self.n_done} steps, as the time was over")
                break
            note(self.n_done, n_steps, f"distance {best.loss:.4g}")
            broken = self._step(done)
            if broken:
                self.notes.append(broken)
                break
            self.n_done += 1
            now = self._share_done(time.monotonic() - began)
            if int(_N_VALIDATIONS * now) > int(_N_VALIDATIONS * done) and now < 1:
                best = self._better(best)
                self.seconds = time.monotonic() - began
                self.keep(self.state(start, best))
        best = self._better(best)
        note(n_steps, n_steps, "")
        return start, best

    def _share_done(self, seconds: float) -> float:
        """Return which share of the run is over, by steps or by the time that it may take."""
        spent = 0.0 if self.config.time is None else seconds / self.config.time
        return max(self.n_done / self.config.steps, spent)

    def _better(self, best: Validated) -> Validated:
        """Return the present state if it is better than the best so far."""
        validated = self.validated()
        return validated if validated.loss < best.loss else best

    def validated(self) -> Validated:
        """Return the present state as it would be stored, and how good it is."""
        arrays = [each.rounded() for each in self.arrays]
        self._set(arrays, tuned=False)
        sums: dict[str, list[float]] = {}
        for i, at in self.aside:
            sample, expected = self.lesson(at)
            distances = self.students[i].distances(sample, expected, self.kinds[i])
            for name, distance in distances.items():
                sums.setdefault(self.names[i] + name, []).append(distance)
        means = {name: math.fsum(own) / len(own) for name, own in sums.items()}
        return Validated(self.n_done, means, arrays)

    def _step(self, done: float) -> str:
        """Take a step; return what is wrong, if something is."""
        self._set([each.floats() for each in self.arrays], tuned=True)
        for k in range(self.config.batch):
            i, at = self.learned[self._order(self.n_done * self.config.batch + k)]
            sample, expected = self.lesson(at)
            loss = self.students[i].learn(sample, expected, self.kinds[i])
            if not math.isfinite(loss):
                return (
                    f"ended after {self.n_done} steps: the distance for sample {at} is not "
                    "finite; try a smaller lr"
                )
        gradients = [self._gradient(each) for each in self.arrays]
        squares = sum(float(np.square(each).sum()) for each in gradients)
        if not math.isfinite(squares):
            return f"ended after {self.n_done} steps: a gradient is not finite; try a smaller lr"
        factor = min(1.0, _LONGEST_GRADIENT / max(math.sqrt(squares), 1e-30))
        rate = self.config.lr * (1 + math.cos(math.pi * done)) / 2
        # The first gradients tell little of how large they are on the average.
        rate *= min(1.0, (done + 1 / self.config.steps) / _WARM_UP)
        for each, gradient in zip(self.arrays, gradients, strict=True):
            each.step(gradient * factor, self.n_done + 1, rate)
        return ""

    def _order(self, at: int) -> int:
        """Return which sample comes at a place in the order: each once before any again."""
        n = len(self.learned)
        rng = np.random.default_rng([self.config.seed, 1, at // n])
        return int(rng.permutation(n)[at % n])

    def _set(self, arrays: Sequence[NDArray[Any]], *, tuned: bool) -> None:
        for each, array in zip(self.arrays, arrays, strict=True):
            for weight, places in each.places:
                dense = weight.dense(array)
                for place in places:
                    self.students[place.student].set(place.name, dense, tuned=tuned)

    def _gradient(self, moving: Moving) -> NDArray[np.float64]:
        """Return the gradient of an array, in its units."""
        total = np.zeros(moving.array.stored.shape)
        is_reached = False
        for weight, places in moving.places:
            for place in places:
                gradient = self.students[place.student].gradient(place.name)
                if gradient is not None:
                    is_reached = True
                    total += weight.gradient(gradient)
        if not is_reached and self.n_done == 0:
            self.unreached.add(id(moving))
        return total * moving.unit / self.config.batch

    def state(self, start: Validated, best: Validated) -> Arrays:
        """Return all that a run needs to go on."""
        arrays: Arrays = {
            "n_done": np.array(self.n_done),
            "seconds": np.array(self.seconds),
            "best_step": np.array(best.step),
            "start": np.array(list(start.distances.values())),
            "best": np.array(list(best.distances.values())),
        }
        for i, each in enumerate(self.arrays):
            arrays |= {
                f"moved {i}": each.moved,
                f"first {i}": each.first,
                f"second {i}": each.second,
                f"best {i}": best.arrays[i],
                f"reached {i}": np.array(id(each) not in self.unreached),
            }
        return arrays

    def resume(self, arrays: Arrays, outputs: Sequence[str]) -> None:
        """Go on from a state that was kept."""
        self.n_done = int(arrays["n_done"])
        self.seconds = float(arrays["seconds"])
        best = []
        for i, each in enumerate(self.arrays):
            each.moved = arrays[f"moved {i}"].copy()
            each.first = arrays[f"first {i}"].copy()
            each.second = arrays[f"second {i}"].copy()
            best.append(arrays[f"best {i}"].copy())
            if not arrays[f"reached {i}"]:
                self.unreached.add(id(each))
        stored = [each.array.stored for each in self.arrays]
        self.kept = (
            Validated(0, dict(zip(outputs, arrays["start"].tolist(), strict=True)), stored),
            Validated(
                int(arrays["best_step"]),
                dict(zip(outputs, arrays["best"].tolist(), strict=True)),
                best,
            ),
        )
