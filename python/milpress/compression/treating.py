"""One weight compressed, on any thread: a value that changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from milpress.errors import UnsupportedError
from milpress.formats import Compressed, Treatment, compress, feedback
from milpress.formats.feedback import Factor
from milpress.formats.rows import Floats
from milpress.kernels.device import Kernels
from milpress.mil import constexpr
from milpress.mil.constexpr import Decoder
from milpress.mil.weights import Weight

if TYPE_CHECKING:
    from milpress.calibration.second_moments import Inputs

# What is to be added to the biases of layers, by their names, for an error of their weight.
Corrections: TypeAlias = Mapping[str, NDArray[np.float64]]
Correct: TypeAlias = Callable[[NDArray[np.float64]], Corrections]


class Treated(NamedTuple):
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
class Order:
    """A weight and what is to be done to it.

    ``key`` is that of all weights that share the result, ``None`` if none does; all but the first
    of them are repeated. ``n_bytes`` are stored now. What ``importance``, called with the weight's
    elements, and ``correct`` return must be the same for weights that share a blob; so must
    ``inputs``, to feed errors back by.
    """

    weight: Weight
    treatments: tuple[Treatment, ...]
    early: bool
    key: Any
    is_repeated: bool
    n_bytes: int
    importance: Callable[[Floats], NDArray[np.float32] | None] | None = None
    correct: Correct | None = None
    inputs: Inputs | None = None


def treat(order: Order, decoder: Decoder, kernels: Kernels) -> Treated:
    """Apply treatments one after the other, those that suit."""
    weight = order.weight
    output, inputs = weight.channel_axes or (0, 1)
    made: Any = None
    if weight.is_compressed:
        made = decoder.value(weight.node)
        if made is None:
            msg = "compressed already, in a way that milpress does not build on"
            raise UnsupportedError(msg)
    dense: Any = None
    if made is None or order.importance is not None or order.correct is not None:
        dense = decoder.dense(weight.node).values
    importance = None if order.importance is None else order.importance(dense)
    suffix = ""
    applied: list[Treatment] = []
    notes: list[str] = []
    fed_back: list[bool] = []
    factors = None
    for treatment in order.treatments:
        source = dense if made is None else made
        is_fed_back = order.inputs is not None and feedback.suits(source, treatment)
        try:
            if is_fed_back and factors is None:
                factors = _factors(order, dense)
            is_fed_back = is_fed_back and factors is not None and feedback.fits(factors, treatment)
            if is_fed_back and factors is not None:
                after = feedback.compress(source, treatment, factors, importance=importance)
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
        suffix = constexpr.suffixed(suffix, made, treatment)
        made = after
        applied.append(treatment)
        fed_back.append(is_fed_back)
    if not applied:
        msg = "; ".join(notes)
        raise UnsupportedError(msg)
    corrections: Corrections = {}
    if order.correct is not None:
        corrections = order.correct(dense.astype(np.float64) - made.dense())
    return Treated(made, suffix, tuple(applied), tuple(notes), corrections, tuple(fed_back))


def _factors(order: Order, values: Floats) -> tuple[Factor, ...] | None:
    """Return what samples say of a weight's inputs together, if errors can be fed back."""
    if order.weight.channel_axes not in (None, (0, 1)) or order.inputs is None:
        return None
    return order.inputs.factors(values)
