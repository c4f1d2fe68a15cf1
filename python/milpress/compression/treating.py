"""One weight compressed, on any thread: a value that changes nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from milpress.errors import UnsupportedError
from milpress.formats import Compressed, Treatment, compress, error_feedback
from milpress.formats.error_feedback import Factor
from milpress.formats.rows import Floats
from milpress.kernels.device import Kernels
from milpress.mil import encode
from milpress.mil.program import Weight

if TYPE_CHECKING:
    from milpress.calibration.second_moments import WeightInputs

# What is to be added to the biases of layers, by their names, for an error of their weight.
Corrections: TypeAlias = Mapping[str, NDArray[np.float64]]
Correct: TypeAlias = Callable[[NDArray[np.float64]], Corrections]


class Outcome(NamedTuple):
    """What treatments made of a weight: its name gets the suffix; notes say which did not suit.

    ``fed_back`` says of which of them errors were fed back.
    """

    value: Compressed
    suffix: str
    treatments: tuple[Treatment, ...]
    notes: tuple[str, ...]
    corrections: Corrections
    fed_back: tuple[bool, ...] = ()


@dataclass(frozen=True, slots=True)
class Job:
    """A weight and what is to be done to it.

    ``key`` is what jobs have alike that share a result, ``None`` if it can't be shared; all but the
    first of them are repeated. ``n_bytes`` are stored now. What ``importance``, called with the
    weight's elements, and ``correct`` return must be the same for weights that share a blob; so
    must ``inputs``, to feed errors back by. ``layers`` are those by whose inputs errors count, and
    ``note`` says of that what is out of the ordinary.
    """

    weight: Weight
    treatments: tuple[Treatment, ...]
    key: Any
    n_bytes: int
    is_repeated: bool = False
    importance: Callable[[Floats], NDArray[np.float32] | None] | None = None
    correct: Correct | None = None
    inputs: WeightInputs | None = None
    layers: tuple[str, ...] = ()
    note: str = ""


Make: TypeAlias = Callable[[Job], Outcome]


def treat(job: Job, kernels: Kernels) -> Outcome:
    """Apply treatments one after the other, those that suit.

    Raises
    ------
    UnsupportedError
        If none does.
    """
    with contextlib.nullcontext() if job.inputs is None else job.inputs.room():
        return _treat(job, kernels)


def _treat(job: Job, kernels: Kernels) -> Outcome:
    weight = job.weight
    output, inputs = weight.channel_axes or (0, 1)
    value: Any = None
    if weight.is_compressed:
        value = weight.value()
        if value is None:
            msg = "already compressed in a form that milpress can't compress further"
            raise UnsupportedError(msg)
    dense: Any = None
    if value is None or job.importance is not None or job.correct is not None:
        dense = weight.dense()
    importance = None if job.importance is None else job.importance(dense)
    suffix = ""
    applied: list[Treatment] = []
    notes: list[str] = []
    fed_back: list[bool] = []
    factors = None
    for treatment in job.treatments:
        source = dense if value is None else value
        is_fed_back = False
        try:
            if job.inputs is not None and error_feedback.suits(source, treatment):
                factors = factors or _factors(job, dense)
                is_fed_back = factors is not None and error_feedback.fits(factors, treatment)
            if is_fed_back and factors is not None:
                after = error_feedback.compress(source, treatment, factors, importance=importance)
            else:
                after = compress(
                    source,
                    treatment,
                    channel_axis=output,
                    input_axis=inputs,
                    importance=importance,
                    device=kernels,
                )
        except UnsupportedError as error:
            notes.append(str(error))
            continue
        suffix = encode.suffixed(suffix, value, treatment)
        value = after
        applied.append(treatment)
        fed_back.append(is_fed_back)
    if not applied:
        msg = "; ".join(notes)
        raise UnsupportedError(msg)
    corrections: Corrections = {}
    if job.correct is not None:
        corrections = job.correct(dense.astype(np.float64) - value.dense())
    return Outcome(value, suffix, tuple(applied), tuple(notes), corrections, tuple(fed_back))


def _factors(job: Job, values: Floats) -> tuple[Factor, ...] | None:
    """Return what samples say of a weight's inputs together, if errors can be fed back."""
    if job.weight.channel_axes not in (None, (0, 1)) or job.inputs is None:
        return None
    return job.inputs.factors(values)
