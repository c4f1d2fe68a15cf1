"""How much of a weight is left in what was made of it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

import milpress._core as _core
from milpress.formats.joint import Compressed
from milpress.formats.palette import Palette
from milpress.formats.quantized import Quantized
from milpress.formats.rows import Floats, to_rows


class Fidelity(NamedTuple):
    """Sums of squares of a weight and of its error, and how many of its values are further off.

    That are codes that name another entry of their table than the nearest, integers more than half
    a step off, and floats that differ at all.
    """

    signal: float
    noise: float
    n_outside: int


def fidelity(source: Floats, value: Floats | Compressed) -> Fidelity:
    """Compare a weight with what was made of it, which must be of its type.

    The tables of a palette must ascend.
    """
    if isinstance(value, Palette) and value.vector_size > 1:
        vectors = value.vector_rows(source)
        return Fidelity(*_core.compare_vectors(vectors, value.vector_size, *value.rows()))
    if isinstance(value, Palette):
        rows = to_rows(source, value.group_shape)
        return Fidelity(*_core.compare_palette(rows, *value.rows()))
    if isinstance(value, Quantized):
        rows = to_rows(source, value.block_shape)
        return Fidelity(*_core.compare_quantized(rows, *value.rows()))
    dense = value if isinstance(value, np.ndarray) else value.dense()
    return Fidelity(*_core.compare(source.reshape(-1), dense.reshape(-1)))


class ValueCounts(NamedTuple):
    """The distinct values of a weight of float16, and how often each occurs."""

    values: NDArray[np.float64]
    counts: NDArray[np.float64]

    @classmethod
    def of(cls, weight: Floats) -> ValueCounts:
        """Count the values of a weight."""
        return cls(*_core.value_counts(weight.reshape(-1)))

    def fidelity(self, n_entries: int) -> Fidelity:
        """Return what the best table of so many entries gives: each code names the nearest."""
        rows = self.values.astype(np.float16)[None]
        # float32 holds counts up to 2**24, and few weights have so many equal values.
        luts = _core.kmeans1d(rows, n_entries, self.counts.astype(np.float32)[None])
        error = self.values - luts[0][_core.lut_assign(rows, luts)[0]]
        signal, noise = self.values * self.values, error * error
        return Fidelity(float(self.counts @ signal), float(self.counts @ noise), 0)
