"""Metrics of outputs and of intermediate values, added up sample by sample."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from milpress.errors import ConfigError
from milpress.evaluation.results import Metric, OutputEvaluation
from milpress.show import decibels

# The least positive float16: what a probability that vanished may have been.
_LEAST_PROBABILITY = 2.0**-24
# Probabilities rounded to float16 add up to 1 up to half a last place; twice that.
_SUM_TOLERANCE = 2.0**-10


class OutputErrors:
    """Sums over samples that the metrics of one output follow from."""

    def __init__(self) -> None:
        self._errors = ErrorSums()
        self._is_label = False
        self._n_samples = 0
        self._cosine = 0.0
        self._n_rows = 0
        self._n_agreeing = 0
        self._kl_probabilities = 0.0
        self._kl_softmax = 0.0
        self._are_probabilities = True

    def add(self, one: Any, other: Any) -> None:
        """Add the output of both models for one sample."""
        self._n_samples += 1
        if isinstance(one, dict):
            labels = list(one)
            one, other = (np.array([value[label] for label in labels]) for value in (one, other))
        if not isinstance(one, np.ndarray):
            self._is_label = True
            self._n_rows += 1
            self._n_agreeing += one == other
            return
        if one.shape != other.shape:
            shapes = f"{list(one.shape)} and {list(other.shape)}"
            msg = f"an output must have the same shape in both models, got {shapes}"
            raise ConfigError(msg)
        one, other = np.atleast_1d(one).astype(float), np.atleast_1d(other).astype(float)
        self._errors.add(one, other)
        # Infinities make these metrics no number.
        with np.errstate(invalid="ignore"):
            self._cosine += _cosine(one.reshape(-1), other.reshape(-1))
            self._add_rows(one, other)

    def _add_rows(self, one: NDArray[np.float64], other: NDArray[np.float64]) -> None:
        if one.shape[-1] < 2:
            return
        rows = [array.reshape(-1, array.shape[-1]) for array in (one, other)]
        self._n_rows += len(rows[0])
        self._n_agreeing += int((rows[0].argmax(-1) == rows[1].argmax(-1)).sum())
        self._kl_softmax += _kl(*(_log_softmax(array) for array in rows))
        self._are_probabilities &= all(_are_probabilities(array) for array in rows)
        if self._are_probabilities:
            self._kl_probabilities += _kl(
                *(np.log(array.clip(_LEAST_PROBABILITY)) for array in rows)
            )

    def evaluation(self, name: str, metrics: Collection[Metric]) -> OutputEvaluation:
        """Return the chosen metrics."""
        top1 = self._n_agreeing / self._n_rows if self._n_rows and "top1" in metrics else None
        if self._is_label:
            return OutputEvaluation(name=name, top1=top1)
        total = self._kl_probabilities if self._are_probabilities else self._kl_softmax
        return OutputEvaluation(
            name=name,
            snr_db=self._errors.snr_db if "snr" in metrics else None,
            cosine=self._cosine / self._n_samples if "cosine" in metrics else None,
            top1=top1,
            kl=total / self._n_rows if self._n_rows and "kl" in metrics else None,
            kl_of="probabilities" if self._are_probabilities else "softmax",
            max_error=self._errors.greatest if "max_error" in metrics else None,
        )


class ErrorSums:
    """Sums of squared values and errors; equal infinities and NaNs count as no error."""

    def __init__(self) -> None:
        self.signal = 0.0
        self.noise = 0.0
        self.greatest = 0.0

    def add(self, one: NDArray[Any], other: NDArray[Any]) -> None:
        """Add some values of the original, and of the compressed model."""
        comparable = np.isfinite(one) & np.isfinite(other)
        if not comparable.all():
            alike = (one == other) | (np.isnan(one) & np.isnan(other))
            if not (alike | comparable).all():
                self.noise = self.greatest = math.inf
            one, other = one[comparable], other[comparable]
        error = other - one
        self.signal += float(np.vdot(one, one))
        self.noise += float(np.vdot(error, error))
        self.greatest = max(self.greatest, float(np.abs(error).max(initial=0)))

    @property
    def snr_db(self) -> float:
        """Signal-to-noise ratio; minus infinity where only one is finite."""
        return -math.inf if self.noise == math.inf else decibels(self.signal, self.noise) or 0.0


def _cosine(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    lengths = float(np.linalg.norm(one)), float(np.linalg.norm(other))
    if 0 in lengths:
        return float(lengths[0] == lengths[1])
    return float(np.dot(one / lengths[0], other / lengths[1]))


def _log_softmax(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = rows - rows.max(-1, keepdims=True)
    logs: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return logs


def _are_probabilities(rows: NDArray[np.float64]) -> bool:
    sums = np.abs(rows.sum(-1) - 1)
    return bool((rows >= 0).all() and (sums <= _SUM_TOLERANCE).all())


def _kl(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Return the sum of the divergences of rows of logarithms."""
    return float((np.exp(one) * (one - other)).sum())
