"""Statistics of weights: those of the inputs of all layers that use them."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from milpress.calibration.input_statistics import Calibration, InputStatistics, importance
from milpress.mil.package import Package
from milpress.mil.program import Weight

# Of each op that multiplies parameters by what is computed: which ones.
_MULTIPLIED = {
    "linear": ("weight",),
    "conv": ("weight",),
    "conv_transpose": ("weight",),
    "matmul": ("x", "y"),
    "lstm": ("weight_ih", "weight_hh", "weight_ih_back", "weight_hh_back"),
    "gru": ("weight_ih", "weight_hh"),
    "rnn": ("weight_ih", "weight_hh"),
}
_ELEMENTS_AT_ONCE = 1 << 20
# What the relative error of a lookup counts beside that of a layer's outputs: what is looked up
# goes through all layers after it.
_LOOKUP_SHARE = 4.0
# Ops that hand on elements of their parameter x as they are.
_LOOKUPS = ("gather", "gather_along_axis", "gather_nd", "slice_by_index", "slice_by_size")


@dataclass(slots=True)
class _Uses:
    """The uses of one stored weight.

    Parameters
    ----------
    layers
        What goes into the layers that samples ran.
    alike
        Names of uses to which the error of each element counts alike: lookups, and layers that no
        sample ran, of whose inputs nothing is known.
    share
        What their relative errors count together, beside that of a layer that samples ran.
    others
        Names of uses of which is not known what the error of an element does to them.
    """

    layers: list[InputStatistics] = field(default_factory=list)
    alike: list[str] = field(default_factory=list)
    share: float = 0.0
    others: list[str] = field(default_factory=list)

    @property
    def count(self) -> list[InputStatistics]:
        """The layers by which errors count: none if there is another use."""
        return [] if self.others else self.layers


class WeightStatistics:
    """A calibration, by weights, of which those that share a blob count as one.

    Every use of a weight counts. The squared error of a layer's outputs is what the second moments
    of its inputs say. A lookup hands on each element as it is, so that errors of all elements count
    alike; how much, beside layers, follows from the signal: the relative squared error of what is
    looked up counts four times that of an average layer's outputs. Errors count alike for a layer
    that no sample ran, too, once. A weight with a use of another kind is treated as if there were
    no samples.
    """

    def __init__(self, calibration: Calibration, package: Package) -> None:
        by_weight: dict[str, list[InputStatistics]] = {}
        for each in calibration.layers:
            by_weight.setdefault(each.weight, []).append(each)
        self._uses: dict[str, _Uses] = {}
        twins: dict[Any, _Uses] = {}
        for graph in package.graphs:
            for weight in graph.weights:
                places = weight.places
                key = (places, weight.shape) if places else weight.name
                shared = twins.setdefault(key, _Uses())
                _add_uses(shared, weight, by_weight.get(weight.name, ()))
                self._uses[weight.name] = shared

    def layers_of(self, weight: Weight) -> list[str]:
        """Return the layers by whose inputs errors of a weight's blob count."""
        return [each.layer for each in self._uses[weight.name].count]

    def note(self, weight: Weight, *, feedback: bool = False) -> str:
        """Return what the report is to say of how errors of a weight count; mostly nothing."""
        uses = self._uses[weight.name]
        if uses.layers and uses.others:
            return f"not calibrated: used by {_some(uses.others)} too"
        if not uses.layers:
            return "not calibrated"
        if not uses.alike:
            return ""
        loss = " (may lose a little by feedback)" if feedback else ""
        return f"errors of all elements count alike for {_some(uses.alike)}{loss}"

    def importance(
        self, weight: Weight, values: NDArray[np.floating[Any]]
    ) -> NDArray[np.float32] | None:
        """Return what `importance` does, for all uses of the blob of a weight of these values."""
        uses = self._uses[weight.name]
        return importance(uses.count, weight.shape, evenly=self.evenly(weight, values))

    def evenly(self, weight: Weight, values: NDArray[np.floating[Any]]) -> float:
        """Return what the error of each element counts for lookups, as second moments do."""
        uses = self._uses[weight.name]
        if not uses.count or not uses.alike:
            return 0.0
        signal, outputs = 0.0, 0.0
        seconds = [each.second_for(weight.shape) for each in uses.count]
        n_rows = max(1, _ELEMENTS_AT_ONCE * len(values) // values.size)
        for begin in range(0, len(values), n_rows):
            rows = slice(begin, begin + n_rows)
            squares = np.square(values[rows], dtype=np.float64)
            signal += float(squares.sum())
            with np.errstate(invalid="ignore"):  # of inputs that are not finite
                outputs += sum(float((second[rows] * squares).sum()) for second in seconds)
        # No error is made of zeros, whatever it counts; what is not finite is refused by itself.
        if signal == 0 or not math.isfinite(signal) or not math.isfinite(outputs):
            return 0.0
        return uses.share * outputs / signal / len(uses.count)

    def correct(self, weight: Weight, error: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        """Return, by layer, what an error of the weight takes from its outputs on average."""
        means = {each.layer: each.mean_error(error) for each in self._uses[weight.name].layers}
        return {layer: mean for layer, mean in means.items() if mean is not None}


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _add_uses(uses: _Uses, weight: Weight, layers: Collection[InputStatistics]) -> None:
    """Sort the uses of a weight by what is known of them."""
    uses.layers.extend(layers)
    ran = {each.layer for each in layers}
    for use in weight.node.uses:
        kind = use.node.op.type
        layer = f"{weight.prefix}{use.node.name}"
        named = f"{kind} {layer!r}"
        if use.parameter in _MULTIPLIED.get(kind, ()):
            if not ran & {layer, f"{layer}: {use.parameter}"}:
                uses.alike.append(f"{named}, whose inputs no sample shows")
                uses.share += 1.0
        elif kind in _LOOKUPS and use.parameter == "x":
            uses.alike.append(named)
            uses.share += _LOOKUP_SHARE
        else:
            uses.others.append(named)
