"""What samples say of the weights of a package, for the work on each."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from milpress.calibration.input_statistics import Calibration
from milpress.calibration.second_moments import SecondMoments, WeightInputs, checked_memory
from milpress.calibration.weight_statistics import WeightStatistics
from milpress.compression.treating import Job, Outcome
from milpress.errors import ConfigError
from milpress.mil.package import Package
from milpress.mil.program import Weight
from milpress.samples.data import Data


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleSettings:
    """Samples to calibrate with, and what for."""

    data: Data | Calibration
    cache: str | os.PathLike[str] | None = None
    mask: str | None = None
    bias_correction: bool = False
    feedback: bool = False
    feedback_memory: int | None = None

    @property
    def identity(self) -> tuple[Any, ...]:
        """What results depend on besides the samples."""
        return (self.bias_correction, self.feedback, checked_memory(self.feedback_memory))

    @classmethod
    def of(cls, data: Data | Calibration | None, **settings: Any) -> SampleSettings | None:
        """Return the settings; ``None`` without samples.

        Raises
        ------
        ConfigError
            If something is set that takes samples.
        """
        memory = settings.get("feedback_memory")
        checked_memory(memory)
        if memory is not None and not settings.get("feedback"):
            msg = "feedback_memory has no effect without feedback"
            raise ConfigError(msg)
        if data is not None:
            if isinstance(data, Calibration) and settings.get("feedback"):
                msg = "feedback needs the samples themselves, not statistics of them"
                raise ConfigError(msg)
            # Weights and activations each go through them.
            return cls(data=list(data) if isinstance(data, Iterator) else data, **settings)
        unserved = [name for name, value in settings.items() if value]
        if unserved:
            msg = f"{' and '.join(unserved)} can't be used without samples: give sample_data"
            raise ConfigError(msg)
        return None


@dataclass(frozen=True, slots=True)
class Advice:
    """WeightStatistics of a package's weights, and what they are used for.

    Parameters
    ----------
    statistics
        How errors of each weight count.
    corrects
        Whether biases make up for mean errors.
    moments
        What errors are fed back by, if they are.
    """

    statistics: WeightStatistics
    corrects: bool = False
    moments: SecondMoments | None = None

    @classmethod
    def of(
        cls,
        samples: SampleSettings,
        calibration: Calibration,
        package: Package,
        weights: Iterable[Weight],
    ) -> Advice:
        """Return the advice for weights, in the order in which they will ask for it."""
        statistics = WeightStatistics(calibration, package)
        if not samples.feedback or isinstance(samples.data, Calibration):
            return cls(statistics, samples.bias_correction)
        moments = SecondMoments(
            package.reopened(),
            samples.data,
            mask=samples.mask,
            wanted=[statistics.layers_of(weight) for weight in weights],
            memory=checked_memory(samples.feedback_memory),
        )
        return cls(statistics, samples.bias_correction, moments)

    def of_weight(self, weight: Weight) -> dict[str, Any]:
        """Return what a `Job` takes."""
        layers = tuple(self.statistics.layers_of(weight))
        advice: dict[str, Any] = {
            "importance": functools.partial(self.statistics.importance, weight),
            "layers": layers,
            "note": self.statistics.note(weight, feedback=self.moments is not None),
        }
        if self.corrects:
            advice["correct"] = functools.partial(self.statistics.correct, weight)
        if self.moments is not None:
            evenly = functools.partial(self.statistics.evenly, weight)
            advice["inputs"] = WeightInputs(self.moments, layers, weight.shape, evenly)
        return advice

    def notes(self, job: Job, outcome: Outcome) -> tuple[str, ...]:
        """Return what the report says of how errors counted and were fed back; mostly nothing."""
        fed_back = ""
        if self.moments is not None:
            is_fed_back = all(outcome.fed_back)
            fed_back = self.moments.note(job.layers, job.treatments, is_fed_back=is_fed_back)
        return tuple(filter(None, (job.note, fed_back)))
