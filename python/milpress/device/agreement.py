"""Differences between the outputs of two runs of a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from milpress.plain.arrays import Arrays
from milpress.show import decibels


class Agreement(NamedTuple):
    """Signal-to-noise ratio and greatest error over all outputs; top-1 of rows, if there are."""

    snr_db: float
    max_error: float
    top1: float | None


def compare(reference: Sequence[Arrays], other: Sequence[Arrays]) -> Agreement | None:
    """Compare outputs sample by sample; ``None`` if there is nothing that both have.

    The ratio is that of the worst output, as in `milpress.evaluate`.
    """
    names = [name for name in (reference[0] if reference else ()) if other and name in other[0]]
    ratios, greatest, n_agreeing, n_rows = [], 0.0, 0, 0
    for name in names:
        signal = noise = 0.0
        for one, two in zip(reference, other, strict=True):
            expected, output = (np.asarray(each[name], np.float64) for each in (one, two))
            if expected.shape != output.shape:
                return None
            error = output - expected
            with np.errstate(invalid="ignore"):
                signal += float(np.vdot(expected, expected))
                noise += float(np.vdot(error, error))
                greatest = max(greatest, float(np.abs(error).max(initial=0)))
            if expected.ndim and expected.shape[-1] > 1:
                rows = [each.reshape(-1, each.shape[-1]).argmax(-1) for each in (expected, output)]
                n_agreeing += int((rows[0] == rows[1]).sum())
                n_rows += len(rows[0])
        is_finite = math.isfinite(signal) and math.isfinite(noise)
        ratios.append((decibels(signal, noise) or 0.0) if is_finite else -math.inf)
    if not ratios:
        return None
    if not math.isfinite(greatest):
        return Agreement(-math.inf, float(np.finfo(np.float64).max), None)
    return Agreement(min(ratios), greatest, n_agreeing / n_rows if n_rows else None)
