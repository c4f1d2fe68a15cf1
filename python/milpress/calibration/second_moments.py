"""Second moments of the inputs of layers, by which errors are fed back, in bounded memory."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from milpress.calibration.calibrating import DEFAULT_MASK, observe_inputs
from milpress.engines.programs import suited_programs
from milpress.errors import ConfigError
from milpress.formats import PruneConfig, Treatment, error_feedback
from milpress.formats.error_feedback import Factor, FeedbackConfig
from milpress.formats.rows import Floats
from milpress.kernels.threads import Room
from milpress.mil.package import Package
from milpress.samples.data import Data
from milpress.show import human_bytes

if TYPE_CHECKING:
    from milpress.interpreter import Program
    from milpress.interpreter.layers import Layer
    from milpress.interpreter.products import BlockProducts

# The same on every machine: what a layer's errors are fed back by must not depend on it.
DEFAULT_MEMORY = 4_000_000_000
_LEAST_BLOCK = 128  # columns; blocks are multiples of it
_WORKING_BYTES = 24  # for each element of a weight that is treated

Edges = tuple[int, ...]


def column_edges(n_groups: int, n_columns: int, memory: int) -> Edges | None:
    """Return where blocks of columns begin and end, as few as take no more memory than given.

    ``None`` if even the smallest would.
    """
    n_units = -(-n_columns // _LEAST_BLOCK)
    for n_blocks in range(1, n_units + 1):
        width = -(-n_units // n_blocks) * _LEAST_BLOCK
        edges = (*range(0, n_columns, width), n_columns)
        if _n_bytes(n_groups, edges) <= memory:
            return edges
    return None


def _moment_bytes(n_groups: int, edges: Edges) -> int:
    return sum(4 * n_groups * (end - begin) ** 2 for begin, end in pairwise(edges))


def _n_bytes(n_groups: int, edges: Edges) -> int:
    """Return what second moments of blocks of columns, and their factors, take."""
    moments = _moment_bytes(n_groups, edges)
    widest = max(end - begin for begin, end in pairwise(edges))
    # Factors are as large as moments; one at a time takes more while it is computed.
    working = error_feedback.factor_bytes(n_groups, widest) - _moment_bytes(n_groups, (0, widest))
    return 2 * moments + working


@dataclass(frozen=True, slots=True)
class _Group:
    """Layers that use one weight, all of them with as many columns and groups."""

    layers: tuple[str, ...]
    n_groups: int
    n_columns: int
    edges: Edges | None

    @property
    def moment_bytes(self) -> int:
        return _moment_bytes(self.n_groups, self.edges or (0,))


@dataclass(frozen=True, slots=True)
class WeightInputs:
    """Second moments of the inputs of the layers that use a weight.

    Parameters
    ----------
    moments
        Where from.
    layers, shape
        The layers, and the shape of the weight.
    evenly
        Returns, of the weight's elements, what the squared error of each counts besides.
    """

    moments: SecondMoments
    layers: tuple[str, ...]
    shape: tuple[int, ...]
    evenly: Callable[[Floats], float]

    def room(self) -> contextlib.AbstractContextManager[None]:
        """Wait until there is memory for the weight, and keep it."""
        return self.moments.room(self.layers, math.prod(self.shape))

    def factors(self, values: Floats) -> tuple[Factor, ...] | None:
        """Return a factor for each block of the weight's columns; ``None`` if nothing is known."""
        sums = self.moments.of(self.layers, self.shape)
        if sums is None:
            return None
        evenly = self.evenly(values)
        return tuple(
            error_feedback.factorize(each, FeedbackConfig(), evenly=evenly) for each in sums
        )


class SecondMoments:
    """Sums of products of the inputs of layers, computed when they are asked for.

    They take the square of a layer's inputs, so that only those of some layers are kept, one after
    the other; for each such part, the samples are run once.

    Parameters
    ----------
    package
        The package, as it is before its weights change.
    data, mask
        As of `milpress.calibrate`.
    wanted
        For each weight, the layers that use it, in the order in which they will be asked for.
    memory
        Bytes that the sums and what is made of them may take, on all threads together: a third is
        for the sums at hand. Layers that take more by themselves are cut into blocks of columns,
        between which no sums are known.

    Raises
    ------
    ConfigError
        If no memory is given.
    """

    def __init__(
        self,
        package: Package,
        data: Data,
        *,
        mask: str | None = None,
        wanted: Iterable[Sequence[str]] = (),
        memory: int = DEFAULT_MEMORY,
    ) -> None:
        self._memory = checked_memory(memory)
        self._programs = list(suited_programs(package, data))
        names = {feature.name for program, _, _ in self._programs for feature in program.inputs}
        self._mask = DEFAULT_MASK if mask is None and DEFAULT_MASK in names else mask
        self._lock = threading.Lock()
        self._room = Room(2 * self._memory // 3)
        self._layers: dict[str, Layer | None] = {}
        for program, _, prefixes in self._programs:
            for layer in program.layers:
                name = prefixes[layer.prefix] + layer.name
                # Two values of one name, in blocks beside each other, can't be told apart.
                self._layers[name] = None if name in self._layers else layer
        self._parts: list[list[_Group]] = []
        self._part_of: dict[tuple[str, ...], int] = {}
        self._at_hand: tuple[int, dict[tuple[str, ...], Any]] = (-1, {})
        self._size = 0
        for layers in wanted:
            self._plan(tuple(layers))

    def of(
        self, layers: Sequence[str], shape: tuple[int, ...]
    ) -> tuple[NDArray[np.float32], ...] | None:
        """Return the sums over all layers that use a weight of a shape.

        They are of the shape ``(groups, n, n)``, where ``n`` is the size of an output channel, or
        of a block of it; ``None`` if errors of the weight can't be fed back.
        """
        group = self._group(tuple(layers))
        if group is None or group.edges is None or group.n_columns != math.prod(shape[1:]):
            return None
        with self._lock:
            part = self._plan(group.layers)
            if self._at_hand[0] != part or group.layers not in self._at_hand[1]:
                self._at_hand = (-1, {})
                self._at_hand = part, self._computed(self._parts[part])
            sums: tuple[NDArray[np.float32], ...] | None = self._at_hand[1].get(group.layers)
            return sums

    def note(
        self, layers: Sequence[str], treatments: Sequence[Treatment], *, is_fed_back: bool
    ) -> str:
        """Return what the report is to say of a weight that was treated: nothing if all is well.

        Parameters
        ----------
        layers, treatments
            The layers that use it, and what was done to it.
        is_fed_back
            Whether errors of all treatments were fed back.
        """
        group = self._group(tuple(layers))
        limit = f"feedback_memory is {human_bytes(self._memory)}"
        if group is None or group.edges == (0, group.n_columns):
            return "" if is_fed_back else "errors not fed back"
        if group.edges is None:
            smallest = (*range(0, group.n_columns, _LEAST_BLOCK), group.n_columns)
            least = human_bytes(_n_bytes(group.n_groups, smallest))
            return f"errors not fed back: that takes {least} at least, {limit}"
        whole = human_bytes(_n_bytes(group.n_groups, (0, group.n_columns)))
        blocks = f"blocks of {group.edges[1]} of {group.n_columns} inputs"
        if is_fed_back:
            return f"errors fed back within {blocks}: all together take {whole}, {limit}"
        runs = [each.n_m[1] for each in treatments if isinstance(each, PruneConfig) and each.n_m]
        if any(edge % run for run in runs for edge in group.edges[1:-1]):
            return f"errors not fed back: runs of {runs[0]} cross {blocks}, {limit}"
        return "errors not fed back"

    def room(
        self, layers: Sequence[str], n_elements: int
    ) -> contextlib.AbstractContextManager[None]:
        """Wait until there is memory for a weight of these layers, and keep it."""
        group = self._group(tuple(layers))
        if group is None or group.edges is None:
            return contextlib.nullcontext()
        n_bytes = _n_bytes(group.n_groups, group.edges) + _WORKING_BYTES * n_elements
        return self._room.taken(n_bytes)

    def _group(self, layers: tuple[str, ...]) -> _Group | None:
        """Return the layers as a group; ``None`` if errors can't be fed back by them."""
        sizes = {
            (layer.groups, math.prod(layer.shape[1:]))
            if layer is not None and layer.takes_feedback
            else None
            for layer in map(self._layers.get, layers)
        }
        size = sizes.pop() if len(sizes) == 1 else None
        return None if size is None else _Group(layers, *size, column_edges(*size, self._memory))

    def _plan(self, layers: tuple[str, ...]) -> int:
        """Return the part that a group of layers is computed in; -1 for none."""
        group = self._group(layers)
        if layers in self._part_of or group is None or group.edges is None:
            return self._part_of.get(layers, -1)
        n_bytes = group.moment_bytes * (1 if self._adds_up(group) else len(layers))
        if not self._parts or self._size + n_bytes > self._memory // 3:
            self._parts.append([])
            self._size = 0
        self._size += n_bytes
        self._parts[-1].append(group)
        self._part_of[layers] = len(self._parts) - 1
        return self._part_of[layers]

    def _adds_up(self, group: _Group) -> bool:
        """Whether the inputs of all layers of a group go into the same sums at once."""
        return group.moment_bytes * len(group.layers) > self._memory // 3

    def _computed(self, part: Sequence[_Group]) -> dict[tuple[str, ...], Any]:
        from milpress.interpreter.products import BlockProducts

        wanted = [(group, name) for group in part for name in group.layers]
        sums: dict[Any, BlockProducts] = {}
        by_name: dict[tuple[_Group, str], BlockProducts] = {}
        for i, (program, samples, prefixes) in enumerate(self._programs):
            own = {prefixes[layer.prefix] + layer.name: layer for layer in program.layers}
            by_input: dict[str, list[tuple[Layer, BlockProducts]]] = {}
            for group, name in wanted:
                layer = own.get(name)
                if layer is None:
                    continue
                adds_up = self._adds_up(group)
                key = group if adds_up else (i, layer.input, layer.key)
                is_new = key not in sums
                if is_new:
                    sums[key] = BlockProducts(layer.groups, group.edges or ())
                if is_new or adds_up:
                    by_input.setdefault(layer.input, []).append((layer, sums[key]))
                by_name[group, name] = sums[key]
            for sample in samples if by_input else ():
                _add_products(program, sample, self._mask, by_input)
        totals = {}
        for group in part:
            names = group.layers[:1] if self._adds_up(group) else group.layers
            totals[group.layers] = _total([by_name.get((group, name)) for name in names])
        return totals


def checked_memory(memory: int | None) -> int:
    """Return how many bytes feedback may take; the default for ``None``.

    Raises
    ------
    ConfigError
        If it is no positive integer.
    """
    if memory is None:
        return DEFAULT_MEMORY
    if isinstance(memory, bool) or not isinstance(memory, int) or memory < 1:
        msg = f"feedback_memory must be a number of bytes, at least 1, got {memory!r}"
        raise ConfigError(msg)
    return memory


def _total(parts: Sequence[BlockProducts | None]) -> tuple[NDArray[np.float32], ...] | None:
    seen = [products.sums() for products in parts if products is not None and products.n_rows]
    if len(seen) < len(parts):
        return None
    first, *others = seen
    if not others:
        return first
    totals = tuple(each.copy() for each in first)
    for other in others:
        for total, each in zip(totals, other, strict=True):
            total += each
    return totals


def _add_products(
    program: Program,
    sample: dict[str, Any],
    mask_name: str | None,
    by_input: Mapping[str, Sequence[tuple[Layer, BlockProducts]]],
) -> None:
    """Run one sample, and add the products of the inputs of layers."""

    def observe(name: str, value: Any, mask: Any) -> None:
        for layer, products in by_input[name]:
            layer.add_products(value, mask, products)

    observe_inputs(program, sample, mask_name, by_input, observe)
