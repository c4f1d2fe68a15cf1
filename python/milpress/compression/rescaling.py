"""Scales of output channels moved out of weights, so that one table suits all channels."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from milpress.compression.run import Run
from milpress.compression.writer import WeightWriter, is_own, rewriting
from milpress.errors import ConfigError, UnsupportedError, fail_verification
from milpress.mil import decode, values
from milpress.mil.graph import Node, new_op
from milpress.mil.package import Package
from milpress.mil.program import ProgramGraph, Weight
from milpress.plain import json, patterns
from milpress.recipe import DEFAULT_MIN_SIZE
from milpress.show import escaped, named_table

if TYPE_CHECKING:
    from rich.table import Table

_LAYERS = ("conv", "linear")


@dataclass(frozen=True, slots=True, kw_only=True)
class RescaledLayer:
    """A layer whose weight was rescaled, or why it was not.

    Parameters
    ----------
    name
        Name of the weight.
    op_type
        Kind of the layer; empty if the weight is of none.
    n_channels
        How many of its output channels are now multiplied behind it.
    least_scale
        The smallest scale.
    reason
        Why it stays as it was; empty if it does not.
    """

    name: str
    op_type: str
    n_channels: int = 0
    least_scale: float = 1.0
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rescaling:
    """What `rescale` did.

    Parameters
    ----------
    source, destination
        The packages.
    layers
        The weights that were asked for, in the order of the graph.
    seconds
        Wall time.
    """

    source: str
    destination: str
    layers: tuple[RescaledLayer, ...]
    seconds: float = 0.0

    @property
    def rescaled(self) -> tuple[RescaledLayer, ...]:
        """The layers that were rescaled."""
        return tuple(layer for layer in self.layers if not layer.reason)

    @property
    def summary(self) -> str:
        """One line."""
        return (
            f"Rescaled {len(self.rescaled)} of {len(self.layers)} selected weights, without any "
            "error"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON can hold it."""
        return {"version": 1, **json.record(self, "source", "destination", "seconds", "layers")}

    def __rich__(self) -> Table:
        """Return the layers as a table."""
        table = named_table("weight", "used by", "channels rescaled", "least scale", "left")
        for layer in self.layers:
            table.add_row(
                escaped(layer.name),
                escaped(layer.op_type),
                "" if layer.reason else str(layer.n_channels),
                "" if layer.reason else f"1/{round(1 / layer.least_scale)}",
                escaped(layer.reason),
            )
        return table


def rescale(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    name: str | None = None,
    largest: int = 64,
    min_size: int = DEFAULT_MIN_SIZE,
    force: bool = False,
) -> Rescaling:
    """Divide each output channel of a conv or linear by a power of two, and multiply behind it.

    Channels of very different sizes then fit into one table, or one range, for the whole weight; a
    ``mul`` with one number a channel gives each its size back, behind the layer and its bias.
    Powers of two change no digit: weights, biases and float results are the same to the last bit,
    unless a result exceeds what its type can hold. Core ML is given no scaled ``constexpr`` op.

    Parameters
    ----------
    source, destination
        Paths of the ``.mlpackage`` to read and of the one to write.
    name
        Name of the weights, or a pattern (``glob:``, ``re:``); ``None`` for all.
    largest
        The most a channel may become larger by, a power of two: what the layer computes becomes
        larger as well before it is multiplied, and float16 ends at 65,504.
    min_size
        Least number of elements of a weight.
    force
        Whether an existing package at the destination is replaced.

    Returns
    -------
    Rescaling
        What happened to each layer.

    Raises
    ------
    ConfigError
        If an argument is wrong by itself.
    UnsupportedError
        If no weight could be rescaled.
    VerificationError
        If the result is not the same to the last bit; nothing is left of it.
    PackageError
        If the source is damaged or of an unsupported kind.
    """
    started = time.perf_counter()
    if isinstance(largest, bool) or largest < 2 or largest & (largest - 1):
        msg = f"largest must be a power of two from 2 on, got {largest}"
        raise ConfigError(msg)
    if name is not None:
        patterns.check(name)
    package = Package(source)
    layers: list[RescaledLayer] = []
    with rewriting(package, destination, Run(force=force)) as writer:
        behind: dict[str, _Behind] = {}
        for graph in package.graphs:
            changes = []
            for weight in graph.weights:
                if len(weight.shape) < 2 or weight.size < min_size:
                    continue
                if name is None or patterns.matches(name, weight.name):
                    change, layer = _change(weight, largest)
                    layers.append(layer)
                    changes.extend([] if change is None else [change])
            behind |= _apply(graph, changes, writer)
        if not behind:
            reasons = "; ".join(f"{layer.name}: {layer.reason}" for layer in layers[:3])
            msg = f"{package.path}: no weight can be rescaled ({reasons})"
            raise UnsupportedError(msg)
        writer.commit(functools.partial(_check, behind=behind))
    return Rescaling(
        source=str(source),
        destination=str(destination),
        layers=tuple(layers),
        seconds=time.perf_counter() - started,
    )


class _Change(NamedTuple):
    """A layer that is to be rescaled: its weight and bias, and the scale of each channel."""

    weight: Weight
    layer: Node
    bias: Node | None
    scales: NDArray[np.float64]


class _Behind(NamedTuple):
    """Names of a rescaled layer's bias, and of the scales that it is multiplied by."""

    bias: str | None
    scale: str


def _change(weight: Weight, largest: int) -> tuple[_Change | None, RescaledLayer]:
    use = weight.node.uses[0] if weight.node.uses else None
    layer = None if use is None else use.node
    kind = "" if layer is None else layer.op.type
    bias, reason = None, ""
    if decode.is_constexpr(weight.node) or not weight.dtype.is_float:
        reason = "not a dense float"
    elif layer is None or len(weight.node.uses) != 1 or weight.node.is_block_output:
        reason = "not used by one op"
    elif kind not in _LAYERS or weight.node.uses[0].parameter != "weight":
        reason = "not the weight of a conv or linear"
    else:
        bias, reason = _bias(weight, layer)
    scales = np.ones(weight.shape[0])
    if not reason:
        scales = _scales(weight.dense(), largest)
        reason = "" if (scales < 1).any() else "its channels are of one size"
        if bias is not None:
            given = weight.graph.decoder.dense(bias).values
            with np.errstate(over="ignore"):
                if not np.isfinite((given / scales).astype(given.dtype)).all():
                    reason = f"its bias would exceed {given.dtype}"
    report = RescaledLayer(
        name=weight.name,
        op_type=kind,
        n_channels=int((scales < 1).sum()),
        least_scale=float(scales.min()),
        reason=reason,
    )
    if reason or layer is None:
        return None, report
    return _Change(weight, layer, bias, scales), report


def _bias(weight: Weight, layer: Node) -> tuple[Node | None, str]:
    """Return the constant that is the layer's bias, or why the layer can't be rescaled."""
    if layer.binding("bias") is None:
        return None, ""
    producer = weight.graph.producer(layer, "bias")
    if producer is None or producer[0].op.type != "const" or not is_own(producer[0]):
        return None, "its bias is not a constant of its own"
    return producer[0], ""


def _scales(weight: NDArray[Any], largest: int) -> NDArray[np.float64]:
    """Return powers of two, at most 1, by which the channels' greatest magnitudes are alike."""
    if not np.isfinite(weight).all():
        return np.ones(len(weight))
    greatest = np.abs(weight.astype(np.float64)).reshape(len(weight), -1).max(axis=1)
    alive = greatest > 0
    if not alive.any():
        return np.ones(len(weight))
    exponents = np.frexp(greatest)[1].astype(np.int64)
    most = int(largest).bit_length() - 1
    below = np.where(alive, np.minimum(exponents[alive].max() - exponents, most), 0)
    scales: NDArray[np.float64] = np.ldexp(1.0, -below)
    return scales


def _apply(graph: ProgramGraph, changes: list[_Change], writer: WeightWriter) -> dict[str, _Behind]:
    """Write what a graph stores, rescaled or as it is, and put the ops behind the layers."""
    divided: dict[Node, NDArray[np.float64]] = {}
    for change in changes:
        rank = len(change.weight.shape)
        divided[change.weight.node] = change.scales.reshape(-1, *[1] * (rank - 1))
        if change.bias is not None:
            divided[change.bias] = change.scales
    for node in graph.nodes:
        if node in divided:
            tensor = graph.decoder.dense(node)
            quotient = (tensor.values / divided[node]).astype(tensor.values.dtype)
            stored = node.op.attributes["val"]
            file_name = stored.blobFileValue.fileName if values.is_blob(stored) else None
            writer.store_const(values.Tensor(tensor.dtype, quotient), node, file_name)
        else:
            writer.copy(node)
    behind: dict[str, _Behind] = {}
    for change in changes:
        node = change.layer
        kind = node.type
        rank = 1 if kind is None else len(kind.shape)
        shape = (1, -1, *[1] * (rank - 2)) if node.op.type == "conv" else (-1,)
        numbers = change.scales.astype(change.weight.dtype.storage).reshape(shape)
        tensor = values.Tensor(change.weight.dtype, numbers)
        scale_name = graph.unique_name(f"{node.name}_scale")
        scale = writer.const(tensor, scale_name, None)
        layer = type(node.op).FromString(node.op.SerializeToString())
        layer.outputs[0].name = graph.unique_name(f"{node.name}_unscaled")
        product_name = graph.unique_name(f"{node.name}_scaled")
        product = new_op("mul", product_name, x=layer.outputs[0].name, y=scale_name)
        product.outputs[0].CopyFrom(node.op.outputs[0])
        graph.insert_before(node, [scale, layer])
        node.op.CopyFrom(product)
        bias = None if change.bias is None else change.bias.name
        behind[change.weight.name] = _Behind(bias, scale_name)
    graph.apply()
    return behind


def _check(original: Package, rescaled: Package, behind: dict[str, _Behind]) -> None:
    """Check that what is stored, multiplied again, is the original's to the last bit."""
    for left, right in zip(original.graphs, rescaled.graphs, strict=True):
        before, after = dict(_constants(left)), dict(_constants(right))
        factors: dict[str, NDArray[np.floating]] = {}
        for name, layer in behind.items():
            own = name.removeprefix(left.prefix)
            if name.startswith(left.prefix) and own in before and layer.scale in after:
                scales = right.decoder.dense(after.pop(layer.scale)).values.reshape(-1)
                rank = len(before[own].op.outputs[0].type.tensorType.dimensions)
                factors[own] = scales.reshape(-1, *[1] * (rank - 1))
                if layer.bias is not None:
                    factors[layer.bias] = scales
        if before.keys() != after.keys():
            fail_verification(f"{left.prefix}: constants were added or removed")
        for name, node in before.items():
            one = left.decoder.dense(node).values
            other = right.decoder.dense(after[name]).values
            if name in factors:
                other = (other * factors[name]).astype(one.dtype)
            if one.shape != other.shape or one.tobytes() != np.ascontiguousarray(other).tobytes():
                fail_verification(
                    f"{left.prefix}{name}: the rescaled weight does not give back the original "
                    "bit for bit"
                )
        computing = [
            [node.op.type for node in graph.nodes if not node.is_stored] for graph in (left, right)
        ]
        n_layers = sum(f"{left.prefix}{name}" in behind for name in factors)
        if sorted(computing[0] + ["mul"] * n_layers) != sorted(computing[1]):
            fail_verification(
                f"{left.prefix}: a mul must be behind each rescaled layer and nothing else"
            )


def _constants(graph: ProgramGraph) -> Iterator[tuple[str, Node]]:
    """Yield the constants of numbers by their names."""
    for node in graph.nodes:
        if node.op.type == "const" and node.type is not None:
            yield node.name, node
