"""What is known of a layer's inputs, made ready to feed errors back by."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from milpress.errors import ConfigError, UnsupportedError

_F32: TypeAlias = NDArray[np.float32]
_F64: TypeAlias = NDArray[np.float64]

_SMALL = 64  # columns whose triangular factor is inverted directly
_DAMPENINGS = 6  # tries, each with ten times the last one's
_WHOLE = 2048  # columns up to which a factor is LAPACK's, with copies of the whole
_BAND = 256  # rows of a larger one that are at hand


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedbackConfig:
    """How errors are fed back.

    Parameters
    ----------
    dampening
        What is added to the diagonal of the second moments, relative to its mean: the more, the
        less is fed back.
    activation_order
        Whether columns are rounded in the order of their inputs' power, the greatest first, instead
        of that in which they stand.
    panel_size
        Columns that are rounded before the columns beyond them are updated, all at once.
    """

    dampening: float = 0.01
    activation_order: bool = False
    panel_size: int = 128

    def __post_init__(self) -> None:
        if not 0 <= self.dampening < math.inf:
            msg = f"dampening must be finite and not negative, got {self.dampening}"
            raise ConfigError(msg)
        if self.panel_size < 1:
            msg = f"panel_size must be at least 1, got {self.panel_size}"
            raise ConfigError(msg)


@dataclass(frozen=True, slots=True, kw_only=True)
class Factor:
    """What is known of a layer's inputs, as the kernels take it.

    Parameters
    ----------
    upper
        float32 of shape ``(n_groups, n, n)``: the upper Cholesky factor of the inverse of the
        second moments, for each group of a grouped convolution.
    power
        float32 of shape ``(n_groups, n)``: the diagonal of the second moments.
    order
        Of shape ``(n_groups, n)``: the columns of the weight in the order of the factor's; ``None``
        for that in which they stand.
    dampening
        What it took, relative to the mean of the diagonal.
    """

    upper: _F32
    power: _F32
    order: NDArray[np.intp] | None
    dampening: float


def factor_bytes(n_groups: int, n_columns: int) -> int:
    """Return how much memory `factorize` takes at most, its result included.

    Some working memory of fixed size comes on top.
    """
    size = n_columns * n_columns
    if n_columns > _WHOLE:
        return 4 * n_groups * size + 4 * size + 12 * _BAND * n_columns
    return 4 * n_groups * size + 32 * min(n_groups * size, _WHOLE * _WHOLE)


def factorize(
    moments: NDArray[np.floating[Any]], config: FeedbackConfig, *, evenly: float = 0.0
) -> Factor:
    """Prepare the second moments of a layer's inputs.

    The result is that of LAPACK up to 2,048 columns, and computed in bands of rows beyond.

    Parameters
    ----------
    moments
        Of shape ``(n_groups, n, n)``: sums of products of inputs, for each group of a grouped
        convolution, one group otherwise; in the order of the weight's elements after its first
        axis.
    config
        How errors are fed back.
    evenly
        What the squared error of each element counts besides, whatever the inputs are.

    Raises
    ------
    UnsupportedError
        If the moments are not finite.
    """
    if not all(np.isfinite(rows).all() for each in moments for _, rows in _bands(each)):
        msg = "the inputs of the layer are not finite (NaN or infinity)"
        raise UnsupportedError(msg)
    diagonal = np.diagonal(moments, axis1=1, axis2=2)
    power = np.ascontiguousarray(diagonal + np.float64(evenly), np.float32)
    order = np.argsort(-power, axis=1, kind="stable") if config.activation_order else None
    mean = diagonal.mean(axis=1, dtype=np.float64) + evenly
    # Inputs that are always zero leave nothing to feed back.
    unit = np.where(mean > 0, mean, 1)
    dampening = config.dampening
    for _ in range(_DAMPENINGS):
        added = np.where(mean > 0, dampening, 1) * unit + evenly
        try:
            upper = _inverse_factors(moments, order, added)
            break
        except np.linalg.LinAlgError:
            dampening = max(10 * dampening, 1e-4)
    else:
        msg = f"the inputs of the layer depend on each other too much for dampening {dampening}"
        raise UnsupportedError(msg)
    return Factor(upper=upper, power=power, order=order, dampening=dampening)


def _inverse_factors(
    moments: NDArray[np.floating[Any]], order: NDArray[np.intp] | None, added: _F64
) -> _F32:
    """Return the factors of the inverses, of moments with something added to their diagonals."""
    n_groups, n, _ = moments.shape
    upper = np.zeros((n_groups, n, n), np.float32)
    if n > _WHOLE:
        for g in range(n_groups):
            _fill_large(upper[g], moments[g], None if order is None else order[g], added[g])
        return upper
    n_at_once = _WHOLE * _WHOLE // (n * n)
    for begin in range(0, n_groups, n_at_once):
        groups = slice(begin, begin + n_at_once)
        columns = None if order is None else order[groups]
        upper[groups] = _of_small(moments[groups], columns, added[groups])
    return upper


def _of_small(
    moments: NDArray[np.floating[Any]], order: NDArray[np.intp] | None, added: _F64
) -> _F64:
    if order is not None:
        moments = np.take_along_axis(moments, order[:, :, None], 1)
        moments = np.take_along_axis(moments, order[:, None, :], 2)
    # Upside down, a lower factor is an upper one.
    reverse = np.array(moments[:, ::-1, ::-1], np.float64)
    diagonal = np.einsum("gii->gi", reverse)
    diagonal += added[:, None]
    lower = np.linalg.cholesky(reverse)
    del reverse, diagonal
    return _inverse_of_upper(np.ascontiguousarray(lower[:, ::-1, ::-1]))


def _bands(matrix: NDArray[Any]) -> Iterator[tuple[slice, NDArray[Any]]]:
    for begin in range(0, len(matrix), _BAND):
        rows = slice(begin, min(begin + _BAND, len(matrix)))
        yield rows, matrix[rows]


def _fill_large(
    upper: _F32, moments: NDArray[np.floating[Any]], order: NDArray[np.intp] | None, added: float
) -> None:
    """Do what `_of_small` does, in bands of rows, each from the diagonal on."""
    places: list[slice] = []
    bands: list[_F64] = []
    for rows, part in _bands(moments):
        columns = slice(rows.start, None)
        chosen = part[:, columns] if order is None else moments[np.ix_(order[rows], order[columns])]
        band = chosen.astype(np.float64)
        diagonal = np.einsum("ii->i", band[:, : len(band)])
        diagonal += added
        places.append(rows)
        bands.append(band)
    _factor_bands(places, bands)
    _invert_bands(places, bands)
    for i, rows in enumerate(places):
        upper[rows, rows.start :] = bands[i]
        bands[i] = np.zeros((0, 0))


def _factor_bands(places: list[slice], bands: list[_F64]) -> None:
    """Make bands of a matrix those of its factor: upper, times its transpose the matrix."""
    for j in reversed(range(len(bands))):
        width = len(bands[j])
        right = bands[j][:, width:]
        for i in range(j + 1):
            at = places[j].start - places[i].start
            block, beyond = bands[i][:, at : at + width], bands[i][:, at + width :]
            block -= beyond @ right.T
        corner = bands[j][:, :width]
        corner[:] = np.linalg.cholesky(corner[::-1, ::-1])[::-1, ::-1]
        inverse = _inverse_of_corner(bands[j])
        for i in range(j):
            at = places[j].start - places[i].start
            block = bands[i][:, at : at + width]
            block[:] = block @ inverse.T


def _invert_bands(places: list[slice], bands: list[_F64]) -> None:
    """Make bands of an upper matrix those of its inverse."""
    for j, (rows, band) in enumerate(zip(places, bands, strict=True)):
        width = len(band)
        inverse = _inverse_of_corner(band)
        above = [(bands[i], rows.start - places[i].start) for i in range(j)]
        blocks = [other[:, at : at + width] for other, at in above]
        column = np.concatenate([np.zeros((0, width)), *blocks])
        for place, (other, at), block in zip(places, above, blocks, strict=False):
            block[:] = -((other[:, :at] @ column[place.start :]) @ inverse)
        band[:, :width] = inverse


def _inverse_of_corner(band: _F64) -> _F64:
    corner = np.ascontiguousarray(band[:, : len(band)])
    inverse: _F64 = _inverse_of_upper(corner[None])[0]
    return inverse


def _inverse_of_upper(matrix: _F64) -> _F64:
    n = matrix.shape[1]
    if n <= _SMALL:
        return np.triu(np.linalg.inv(matrix))
    half = n // 2
    inverse = np.zeros_like(matrix)
    first, last = matrix[:, :half, :half], matrix[:, half:, half:]
    inverse[:, :half, :half] = _inverse_of_upper(first)
    inverse[:, half:, half:] = _inverse_of_upper(last)
    across = inverse[:, :half, :half] @ matrix[:, :half, half:]
    inverse[:, :half, half:] = -(across @ inverse[:, half:, half:])
    return inverse
