"""Values of a program that are quantized where coremltools quantizes activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from milpress.mil.graph import Graph, Node, Use, Value
from milpress.mil.values import TensorType

Setting = TypeVar("Setting")

# What coremltools quantizes, by the parameters that must all be computed.
_INPUTS = {
    "conv": ("x",),
    "avg_pool": ("x",),
    "max_pool": ("x",),
    "linear": ("x",),
    "add": ("x", "y"),
}
# An op of the above and one of these behind it are one step of the hardware.
_FUSED = frozenset({"leaky_relu", "tanh", "scaled_tanh", "sigmoid", "relu", "relu6"})


@dataclass(slots=True)
class QuantizationPoints(Generic[Setting]):
    """Where activations of a graph are to be quantized, and as what settings say.

    ``before`` are inputs of ops that take quantized values; ``after`` are values that are quantized
    as soon as they are computed, with the op that makes them.
    """

    before: list[tuple[Use, Value, Setting]] = field(default_factory=list)
    after: dict[Value, tuple[Node, Setting]] = field(default_factory=dict)
    types: dict[Value, TensorType] = field(default_factory=dict)

    @property
    def wanted(self) -> dict[Value, list[Setting]]:
        """The values to quantize, in order, and the settings for each."""
        settings: dict[Value, list[Setting]] = {}
        for value, (_, setting) in self.after.items():
            settings.setdefault(value, []).append(setting)
        for _, value, setting in self.before:
            if setting not in settings.setdefault(value, []):
                settings[value].append(setting)
        return settings


def quantization_points(
    graph: Graph, setting_of: Callable[[Node], Setting | None]
) -> QuantizationPoints[Setting]:
    """Find where coremltools would quantize activations.

    Inputs of convolutions, linear layers and pools are quantized, and those of additions of two
    computed values; then what such an op makes, after a relu or the like behind it, unless all that
    takes it quantizes it anyway. What a block returns stays as it is. Values that are quantized in
    the model already stay so.

    Parameters
    ----------
    graph
        The graph; nothing is changed in it.
    setting_of
        Gives the setting of an op, ``None`` to leave it.
    """
    points: QuantizationPoints[Setting] = QuantizationPoints()
    cores: list[tuple[Node, Setting]] = []
    for node in graph.nodes:
        taken = [_computed(graph, node, each) for each in _INPUTS.get(node.op.type, ())]
        setting = setting_of(node) if taken and None not in taken else None
        if setting is None:
            continue
        cores.append((node, setting))
        for use, value, kind in filter(None, taken):
            if value.producer is None or value.producer.op.type != "dequantize":
                points.before.append((use, value, setting))
                points.types[value] = kind
    quantizing = {use.place for use, _, _ in points.before}
    for node, setting in cores:
        last = _last_of_step(node, quantizing)
        if last is not None and last.type is not None:
            value = last.scope.value(last.name)
            points.after[value] = (last, setting)
            points.types[value] = last.type
    return points


def _computed(graph: Graph, node: Node, parameter: str) -> tuple[Use, Value, TensorType] | None:
    """Return the float value that a parameter takes, if it is not known beforehand."""
    binding = node.binding(parameter)
    if binding is None or binding.WhichOneof("choice") != "name":
        return None
    producer = graph.producer(node, parameter)
    if producer is not None and producer[0].is_stored:
        return None
    value = node.scope.value(binding.name)
    kind = value.type
    if kind is None or not kind.dtype.is_float:
        return None
    return Use(node, parameter, binding), value, kind


def _last_of_step(core: Node, quantizing: set[tuple[Node, str]]) -> Node | None:
    """Return the op whose result is to be quantized after a core op; ``None`` for none."""

    def takers(node: Node) -> list[str]:
        """Return what takes a result: kinds of ops, or ``quantize`` where that comes first."""
        return ["quantize" if use.place in quantizing else use.node.op.type for use in node.uses]

    kind = core.type
    if kind is None or not kind.dtype.is_float or takers(core) in ([], ["quantize"]):
        return None
    plain = [use.node for use in core.uses if use.place not in quantizing]
    if not plain or plain[0].op.type not in _FUSED or plain[0].scope is not core.scope:
        return core
    after = takers(plain[0])
    if not after:
        return core
    return None if after == ["quantize"] else plain[0]
