"""First-order errors of a model's outputs, from gradients and parts of weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from milpress.formats import Treatment
from milpress.planner.parts import Part, part_of, takes_whole, whole

if TYPE_CHECKING:
    from milpress.interpreter.sensitivity import Change, Gradients


def first_order_errors(
    weight: NDArray[Any],
    treatments: Mapping[str, Treatment],
    gradients: Gradients,
    *,
    channel_axis: int,
    input_axis: int,
) -> dict[str, float]:
    """Return the error of the outputs that each treatment of a weight makes, to first order.

    Treatments are tried on the channels by which the outputs move most, and on others that lie
    evenly over the weight: these stand for the rest.

    Parameters
    ----------
    weight
        A float16 or float32 array.
    treatments
        Those that suit its shape, by name.
    gradients
        How the outputs move with it.
    channel_axis, input_axis
        Axes of the output and input channels.
    """
    n = weight.shape[channel_axis]
    rows = np.moveaxis(weight, channel_axis, 0).reshape(n, -1)
    part = part_of(gradients.of_channels(rows), rows.shape[1], treatments.values())
    errors = {}
    for name, treatment in treatments.items():
        own = whole(n) if takes_whole(treatment) else part
        array = own.of(weight, channel_axis)
        value = own.compressed(array, treatment, channel_axis, input_axis).dense()
        change = np.moveaxis(value.astype(np.float64) - array, channel_axis, 0)
        changes = _changes(own, change.reshape(len(own.chosen), -1))
        errors[name] = gradients.error(rows, changes)
    return errors


def _changes(part: Part, change: NDArray[np.float64]) -> list[Change]:
    """Return how all channels change, those that are not chosen like those that are."""
    from milpress.interpreter.sensitivity import Change, Likewise

    none = np.zeros(0, np.intp)
    top, rest = np.flatnonzero(part.is_top), np.flatnonzero(~part.is_top)
    changes = [Change(part.chosen[top], change[top], Likewise(none, 1.0))]
    if len(rest):
        like = Likewise(part.others, part.factor)
        changes.append(Change(part.chosen[rest], change[rest], like))
    return changes
