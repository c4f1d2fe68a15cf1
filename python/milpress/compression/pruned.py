"""Which weights were pruned: as many as promised, and those of least magnitude.

Settings are those of a ``prune`` step, in the recipe's words, as the record in a package has them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from milpress.formats.rows import Floats
from milpress.formats.sparse import n_pruned

# Weights looked at together, so that memory does not grow with the weight.
_PIECE = 1 << 18

_BITS: dict[int, np.dtype[Any]] = {2: np.dtype(np.uint16), 4: np.dtype(np.uint32)}


@dataclass(frozen=True, slots=True)
class _Runs:
    """Runs of equal length along an axis, as ``(n_outer, n_runs, length, n_inner)``.

    ``magnitudes`` are the bits of the absolute values, which order as these do; ``stays`` says
    which weights are not zero afterwards.
    """

    weights: Floats
    magnitudes: NDArray[Any]
    stays: NDArray[np.bool_]

    @property
    def length(self) -> int:
        return int(self.weights.shape[2])

    def n_gone(self) -> NDArray[np.int32]:
        """Return how many weights of each run are zero afterwards."""
        return _reduced(np.add, (~self.stays).astype(np.int32))

    def n_before(self) -> NDArray[np.int32]:
        """Return how many weights of each run were zero already."""
        return _reduced(np.add, (self.magnitudes == 0).astype(np.int32))


def _reduced(function: np.ufunc, values: NDArray[Any]) -> NDArray[Any]:
    """Reduce each run to one number, in order; for short runs, faster than along their axis."""
    return functools.reduce(function, np.moveaxis(values, 2, 0))


def wrong_runs(source: Floats, kept: NDArray[np.bool_], settings: Mapping[str, Any]) -> str:
    """Return in words what is wrong with n:m pruning; empty if nothing is.

    In each run of ``m`` as many weights must be zero as promised, or as were zero already, and none
    that is kept may be smaller than one that is pruned. A shorter last run counts as filled up with
    zeros, which go first.
    """
    (n, m), axis = settings["n_m"], settings.get("axis", 1)
    if axis >= source.ndim:
        return _no_axis(axis, source.ndim)
    for runs in _runs(source, kept, axis, m):
        n_gone = runs.n_gone()
        expected = np.maximum(_n_of_run(n, m, runs.length), runs.n_before())
        wrong = np.flatnonzero(n_gone != expected)
        if wrong.size:
            i = wrong[0]
            return _wrong_number(expected.flat[i], n_gone.flat[i], runs.length, axis)
        most = np.iinfo(runs.magnitudes.dtype).max
        greatest_gone = _reduced(np.maximum, np.where(runs.stays, 0, runs.magnitudes))
        least_left = _reduced(np.minimum, np.where(runs.stays, runs.magnitudes, most))
        wrong = np.flatnonzero(greatest_gone > least_left)
        if wrong.size:
            greater, less = (
                bits.reshape(-1)[wrong[:1]].view(source.dtype)[0]
                for bits in (greatest_gone, least_left)
            )
            return f"{greater} was pruned, {less} of the same run along axis {axis} was not"
    return ""


def wrong_blocks(source: Floats, kept: NDArray[np.bool_], settings: Mapping[str, Any]) -> str:
    """Return in words what is wrong with pruning by blocks; empty if nothing is.

    Blocks must be zero or kept as a whole, zero in the order of their norms, until the next would
    make it more weights than promised. Blocks that were zero already are the first. Of equal norms,
    any may be.
    """
    size, axis = settings["block_size"], settings.get("axis", 0)
    if axis >= source.ndim:
        return _no_axis(axis, source.ndim)
    squares, sizes, stay = [], [], []
    for runs in _runs(source, kept, axis, size):
        n_gone = runs.n_gone()
        stays = n_gone < runs.length
        if (stays & (n_gone > runs.n_before())).any():
            return f"a block of {size} along axis {axis} is pruned in part"
        # Added up as when blocks were pruned.
        squares.append(_reduced(np.add, np.square(runs.weights.astype(np.float64))).reshape(-1))
        sizes.append(np.full(stays.size, runs.length))
        stay.append(stays.reshape(-1))
    return _wrong_choice(
        np.concatenate(squares),
        np.concatenate(sizes),
        np.concatenate(stay),
        n_pruned(source.size, settings["sparsity"]),
    )


def _wrong_choice(
    squares: NDArray[np.float64], sizes: NDArray[np.int_], stay: NDArray[np.bool_], n_zeros: int
) -> str:
    """Judge which blocks were pruned, by the squares of their norms and their sizes."""
    n_gone = int(sizes[~stay].sum())
    if n_gone > n_zeros and (squares[~stay] > 0).any():
        return f"at most {n_zeros} weights must be zero in blocks, got {n_gone}"
    if not stay.any():
        return ""
    least = float(squares[stay].min())
    greatest = float(squares[~stay].max(initial=0))
    if greatest > least:
        return f"a block of norm {greatest**0.5} was pruned, one of {least**0.5} was not"
    if n_gone + int(sizes[stay & (squares == least)].max()) <= n_zeros:
        return _too_few_blocks(n_zeros, n_gone)
    return ""


def too_few_zeros(zero: NDArray[np.bool_], settings: Mapping[str, Any]) -> str:
    """Return in words which zeros are missing, whatever else is zero; empty if none is.

    For weights of which it is not known what they were when they were pruned. Where errors are fed
    back, all that an output is made from is one axis, and groups of outputs are pruned apart.
    """
    n_zeros = n_pruned(zero.size, settings.get("sparsity", 0.0))
    if "feedback" in settings:
        zero = zero.reshape(len(zero), -1)
        # Exactly, so that no group has to have more zeros than it rounds down to.
        share = Fraction(settings.get("sparsity", 0.0))
        n_zeros = len(zero) * math.floor(zero.shape[1] * share)
    axis = settings.get("axis", 1 if "n_m" in settings else 0)
    if settings.keys() & {"n_m", "block_size"} and axis >= zero.ndim:
        return _no_axis(axis, zero.ndim)
    if "n_m" in settings:
        n, m = settings["n_m"]
        for length, n_gone in _zeros_of_runs(zero, axis, m):
            expected, least = _n_of_run(n, m, length), int(n_gone.min())
            if least < expected:
                return _wrong_number(expected, least, length, axis)
        return ""
    if "block_size" not in settings:
        n_found = int(np.count_nonzero(zero))
        return f"{n_zeros} weights must be zero, got {n_found}" if n_found < n_zeros else ""
    size = settings["block_size"]
    n_found = sum(
        int(np.count_nonzero(n_gone == length)) * length
        for length, n_gone in _zeros_of_runs(zero, axis, size)
    )
    if n_found < zero.size and n_found + size <= n_zeros:
        return _too_few_blocks(n_zeros, n_found)
    return ""


def too_many_zeros(
    zero: NDArray[np.bool_], free: NDArray[np.bool_], settings: Mapping[str, Any]
) -> str:
    """Return in words which weights must not be zero; empty if none is said to be left.

    ``free`` are those that may have been zero before they were pruned.
    """
    if "n_m" in settings:
        (n, m), axis = settings["n_m"], settings.get("axis", 1)
        if axis >= zero.ndim:
            return _no_axis(axis, zero.ndim)
        for (length, n_gone), (_, n_free) in zip(
            _zeros_of_runs(zero, axis, m), _zeros_of_runs(free, axis, m), strict=True
        ):
            expected = np.maximum(_n_of_run(n, m, length), n_free)
            wrong = np.flatnonzero(n_gone > expected)
            if wrong.size:
                i = wrong[0]
                return _wrong_number(expected.flat[i], n_gone.flat[i], length, axis)
        return ""
    if "sparsity" not in settings:
        return ""
    n_zeros, n_before = n_pruned(zero.size, settings["sparsity"]), int(np.count_nonzero(free))
    # Of a block that is kept some may be zero, and no others go for them.
    n_most = n_zeros + n_before if "block_size" in settings else max(n_zeros, n_before)
    n_found = int(np.count_nonzero(zero))
    return f"at most {n_most} weights must be zero, got {n_found}" if n_found > n_most else ""


def _zeros_of_runs(
    zero: NDArray[np.bool_], axis: int, length: int
) -> Iterator[tuple[int, NDArray[np.int32]]]:
    """Yield the length of runs along an axis, and how many weights of each are zero."""
    left = ~zero
    for runs in _runs(left.astype(np.float16), left, axis, length):
        yield runs.length, runs.n_gone()


def _n_of_run(n: int, m: int, length: int) -> int:
    return max(0, n - (m - length))


def _runs(source: Floats, kept: NDArray[np.bool_], axis: int, length: int) -> Iterator[_Runs]:
    """Yield the runs along an axis, some at a time; shorter last ones by themselves."""
    axis %= source.ndim
    n_channels = source.shape[axis]
    length = min(length, n_channels)
    shape = (math.prod(source.shape[:axis]), n_channels, math.prod(source.shape[axis + 1 :]))
    end = n_channels - n_channels % length
    n_outer = max(1, _PIECE // (n_channels * shape[2]))
    step = max(1, _PIECE // (length * shape[2])) * length
    edges = [(begin, min(begin + step, end), length) for begin in range(0, end, step)]
    if end < n_channels:
        edges.append((end, n_channels, n_channels - end))
    bits = _BITS[source.itemsize]
    arrays: list[NDArray[Any]] = [source, source.reshape(-1).view(bits), kept]
    for outer in range(0, shape[0], n_outer):
        for begin, stop, size in edges:
            weights, encoded, stays = (
                array.reshape(shape)[outer : outer + n_outer, begin:stop].reshape(
                    -1, (stop - begin) // size, size, shape[2]
                )
                for array in arrays
            )
            magnitudes = encoded & bits.type(np.iinfo(bits).max >> 1)
            yield _Runs(weights, magnitudes, stays & (magnitudes != 0))


def _wrong_number(n_zeros: int, n_found: int, length: int, axis: int) -> str:
    return f"{n_zeros} weights of a run of {length} along axis {axis} must be zero, got {n_found}"


def _too_few_blocks(n_zeros: int, n_found: int) -> str:
    return f"as many blocks as fit into {n_zeros} weights must be zero, got {n_found} weights"


def _no_axis(axis: int, n_axes: int) -> str:
    return f"it must have an axis {axis} to be pruned along, got {n_axes} axes"
