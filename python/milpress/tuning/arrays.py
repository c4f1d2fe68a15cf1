"""The arrays of a package that tuning moves, and the weights that are made of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from milpress.errors import package_errors
from milpress.formats import Compressed, Masked, Palette, Quantized, Sparse
from milpress.formats.rows import Floats
from milpress.mil import values
from milpress.mil.graph import Node
from milpress.mil.package import Package
from milpress.mil.program import ProgramGraph
from milpress.tuning.config import Kind
from milpress.tuning.forms import Layout, floats_of, gradient_of, with_floats

# Of each op, the parameters that are no weight and can be tuned.
_ROLES: dict[tuple[str, str], Kind] = {
    ("linear", "bias"): "biases",
    ("conv", "bias"): "biases",
    ("conv_transpose", "bias"): "biases",
    ("layer_norm", "gamma"): "norms",
    ("layer_norm", "beta"): "norms",
    ("batch_norm", "gamma"): "norms",
    ("batch_norm", "beta"): "norms",
    ("instance_norm", "gamma"): "norms",
    ("instance_norm", "beta"): "norms",
}
_FLOATS = ("float16", "float32")
# What pruning kept is exact, but makes up for what it dropped.
_GRAIN_OF_VALUES = 2.0**-4

# A blob of a weight file, or an op and its parameter.
Key: TypeAlias = tuple[str, int] | tuple[str, str, str]


class Holder(NamedTuple):
    """Where an array is stored: an op, and which of its parameters."""

    graph: ProgramGraph
    node: Node
    parameter: str

    @property
    def value(self) -> Any:
        """What is stored."""
        return values.held(self.node.op, self.parameter)

    @property
    def op(self) -> str:
        """Name of the op, as records have it."""
        return f"{self.graph.prefix}{self.node.name}"

    @property
    def key(self) -> Key:
        """What tells the numbers from others."""
        value = self.value
        if values.is_blob(value):
            return value.blobFileValue.fileName, value.blobFileValue.offset
        return self.graph.prefix, self.node.name, self.parameter


@dataclass(frozen=True, slots=True, eq=False)
class TunedWeight:
    """A weight as programs use it, which is decoded from a tuned array.

    Parameters
    ----------
    graph, name
        Where it is, and its name there.
    value
        What it is made of; ``None`` if it is the array itself.
    layout
        How the array as it is stored becomes the floats of ``value``.
    """

    graph: ProgramGraph
    name: str
    value: Compressed | None
    layout: Layout

    def dense(self, array: Floats) -> NDArray[np.float32]:
        """Return the weight of other numbers, rounded as their type wants it."""
        if self.value is None:
            return array.astype(np.float32)
        dense = with_floats(self.value, self.layout.unfold(array)).dense()
        return dense.astype(np.float32, copy=False)

    def gradient(self, gradient: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return the gradient of the array, given that of the weight."""
        if self.value is None:
            return gradient.astype(np.float64)
        return np.asarray(self.layout.fold(gradient_of(self.value, gradient)), np.float64)


@dataclass(slots=True, eq=False)
class TunedArray:
    """Numbers that are stored once, and move together.

    Parameters
    ----------
    kind
        What they are.
    stored
        The numbers, in the type and shape in which they are stored.
    holders
        The ops that hold them.
    weights
        What is decoded from them.
    uses
        The ops that take a bias, gamma or beta, and as which parameter.
    """

    kind: Kind
    stored: Floats
    holders: list[Holder] = field(default_factory=list)
    weights: list[TunedWeight] = field(default_factory=list)
    uses: list[tuple[ProgramGraph, Node, str]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Name of the first op that holds it."""
        return self.holders[0].op

    @property
    def parameter(self) -> str:
        """Which parameter of that op it is."""
        return self.holders[0].parameter

    @property
    def is_factor(self) -> bool:
        """Whether each number multiplies what it belongs to, so that it moves relative to itself.

        These are scales, also those of tables.
        """
        return self.parameter == "scale" or any(_has_scale(each.value) for each in self.weights)

    @property
    def grain(self) -> float:
        """Distance of neighbours among what its codes stand for, relative to their size."""
        grains = [_grain(each.value) for each in self.weights if each.value is not None]
        return max(grains, default=0.0)

    def unit(self, grain: float) -> NDArray[np.float32]:
        """Return how far each number may well move, as far as the package tells.

        That is the distance of neighbours in its weight. Biases and norms, which have none, move by
        the ``grain`` that is given.
        """
        wide = self.stored.astype(np.float32)
        own = np.float32(self.grain or grain)
        if self.is_factor:
            return np.asarray(own * np.abs(wide), np.float32)
        if self.kind == "tables":
            layout = self.weights[0].layout
            entries = np.square(layout.unfold(wide))
            roots = own * np.sqrt(entries.mean(axis=(-2, -1), keepdims=True))
            unit: NDArray[np.float32] = layout.fold(np.broadcast_to(roots, entries.shape))
            return unit
        return np.full(wide.shape, own * np.sqrt(np.square(wide).mean()), np.float32)


def _grain(value: Compressed) -> float:
    inner = value.value if isinstance(value, Masked) else value
    if isinstance(inner, Sparse):
        return _GRAIN_OF_VALUES
    bits = inner.bits / inner.vector_size if isinstance(inner, Palette) else inner.bits
    return float(2.0**-bits)


def _has_scale(value: Compressed | None) -> bool:
    inner = value.value if isinstance(value, Masked) else value
    table = inner.lut if isinstance(inner, Palette) else inner
    return isinstance(table, Quantized)


@dataclass(frozen=True, slots=True)
class Found:
    """What can be tuned in a package, and why other compressed weights can't.

    ``grain`` is that of all compressed weights together, the root of the mean square.
    """

    arrays: tuple[TunedArray, ...]
    left: dict[str, str]
    n_compressed: int
    grain: float = 0.0


def find_arrays(package: Package, train: Sequence[Kind]) -> Found:
    """Return the arrays of a package that can be tuned, of some kinds."""
    found: dict[Key, TunedArray] = {}
    kinds: dict[Key, set[Kind]] = {}
    left: dict[str, str] = {}
    n_compressed = 0
    grains: list[tuple[float, int]] = []
    for graph in package.graphs:
        names = Counter(node.name for node in graph.nodes if node.is_stored)
        for weight in graph.find_weights(0):
            if not weight.is_compressed:
                continue
            n_compressed += 1
            with package_errors(weight.name):
                value = weight.value()
            holder = None if value is None else _holder_of(graph, weight.node, value)
            if value is not None:
                grains.append((_grain(value), weight.size))
            if value is None or holder is None or names[weight.node.name] > 1:
                left[weight.name] = "stored in a form that tune leaves as it is"
                continue
            shape = values.stored_type(holder.value).fixed_shape
            tuned = TunedWeight(
                graph, weight.node.name, value, Layout(shape, floats_of(value).shape)
            )
            kind = _kind_of(value)
            _add(found, kinds, holder, kind, package).weights.append(tuned)
        for node, uses in _constants(graph):
            if names[node.name] > 1:
                continue
            holder = Holder(graph, node, "val")
            array = _add(found, kinds, holder, _ROLES[uses[0]], package)
            kinds[holder.key].update(_ROLES[use] for use in uses)
            shape = array.stored.shape
            array.weights.append(TunedWeight(graph, node.name, None, Layout(shape, shape)))
            array.uses.extend((graph, use.node, use.parameter) for use in node.uses)
    shared = _n_holders(package)
    arrays = []
    for key, array in found.items():
        if not kinds[key] <= set(train):
            continue
        if len(array.holders) < shared.get(key, 0):
            left[array.name] = "shares its numbers with something that is not tuned"
        else:
            arrays.append(array)
    total = sum(n for _, n in grains)
    grain = math.sqrt(sum(n * each**2 for each, n in grains) / max(total, 1))
    return Found(tuple(arrays), left, n_compressed, grain)


def _add(
    found: dict[Key, TunedArray],
    kinds: dict[Key, set[Kind]],
    holder: Holder,
    kind: Kind,
    package: Package,
) -> TunedArray:
    key = holder.key
    if key not in found:
        found[key] = TunedArray(kind, values.read(holder.value, package).values.copy())
        kinds[key] = set()
    kinds[key].add(kind)
    array = found[key]
    if all(
        (each.node, each.parameter) != (holder.node, holder.parameter) for each in array.holders
    ):
        array.holders.append(holder)
    return array


def _n_holders(package: Package) -> Counter[Key]:
    """Return how many values are stored at each place of a weight file."""
    return Counter(
        (value.blobFileValue.fileName, value.blobFileValue.offset)
        for graph in package.graphs
        for node in graph.nodes
        for value in values.blob_values(node.op)
    )


def _kind_of(value: Compressed) -> Kind:
    inner = value.value if isinstance(value, Masked) else value
    if isinstance(inner, Sparse):
        return "values"
    return "tables" if isinstance(inner, Palette) else "scales"


def _holder_of(graph: ProgramGraph, node: Node, value: Compressed) -> Holder | None:
    """Return where the floats of a weight are stored."""
    if isinstance(value, Masked):
        source = graph.producer(node, "nonzero_data")
        return None if source is None else _holder_of(graph, source[0], value.value)
    if isinstance(value, Sparse):
        return _holder(graph, node, "nonzero_data")
    if isinstance(value, Quantized):
        return _holder(graph, node, "scale")
    if isinstance(value.lut, Quantized):
        source = graph.producer(node, "lut")
        return None if source is None else _holder_of(graph, source[0], value.lut)
    return _holder(graph, node, "lut")


def _holder(graph: ProgramGraph, node: Node, parameter: str) -> Holder | None:
    if values.held(node.op, parameter) is not None:
        return Holder(graph, node, parameter)
    source = graph.producer(node, parameter)
    if source is None or source[0].op.type != "const":
        return None
    return Holder(graph, source[0], "val")


def _constants(graph: ProgramGraph) -> Iterator[tuple[Node, list[tuple[str, str]]]]:
    """Yield the constants that are nothing but biases or parts of norms, with their uses."""
    for node in graph.nodes:
        if node.op.type != "const" or node.is_block_output or not node.uses:
            continue
        uses = [(use.node.op.type, use.parameter) for use in node.uses]
        kind = node.type
        if kind is not None and kind.dtype.name in _FLOATS and all(use in _ROLES for use in uses):
            yield node, uses
