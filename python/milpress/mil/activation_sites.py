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


class Consumers:
    """Who uses each value of a graph."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._uses: dict[Value, list[Use]] = {}
        for node in graph.nodes:
            for parameter, argument in node.op.inputs.items():
                for binding in argument.arguments:
                    if binding.WhichOneof("choice") == "name":
                        value = node.scope.value(binding.name)
                        self._uses.setdefault(value, []).append(Use(node, parameter, binding))

    def of(self, value: Value) -> list[Use]:
        """Return the parameters that name a value."""
        return self._uses.get(value, [])

    def computed(self, node: Node, parameter: str) -> Value | None:
        """Return the float value that a parameter takes, if it is not known beforehand."""
        if parameter not in node.op.inputs or len(node.op.inputs[parameter].arguments) != 1:
            return None
        binding = node.op.inputs[parameter].arguments[0]
        if binding.WhichOneof("choice") != "name":
            return None
        producer = self.graph.producer(node, parameter)
        if producer is not None and producer[0].is_stored:
            return None
        value = node.scope.value(binding.name)
        kind = value.type
        return value if kind is not None and kind.dtype.is_float else None


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
    consumers = Consumers(graph)
    points: QuantizationPoints[Setting] = QuantizationPoints()
    cores: list[tuple[Node, Setting]] = []
    for node in graph.nodes:
        parameters = _INPUTS.get(node.op.type, ())
        taken = [consumers.computed(node, parameter) for parameter in parameters]
        setting = setting_of(node) if taken and None not in taken else None
        if setting is None:
            continue
        cores.append((node, setting))
        for parameter, value in zip(parameters, taken, strict=True):
            if value is not None and _maker(value) != "dequantize":
                binding = node.op.inputs[parameter].arguments[0]
                use = Use(node, parameter, binding)
                points.before.append((use, value, setting))
                points.types[value] = _float_type(value)
    quantizing = {use.place for use, _, _ in points.before}
    for node, setting in cores:
        last = _last_of_step(node, consumers, quantizing)
        if last is not None:
            value = last.scope.value(last.name)
            points.after[value] = (last, setting)
            points.types[value] = _float_type(value)
    return points


def _float_type(value: Value) -> TensorType:
    kind = value.type
    assert kind is not None  # noqa: S101 - `computed` looked at it
    return kind


def _maker(value: Value) -> str:
    node = value.producer
    return "" if node is None else node.op.type


def _last_of_step(
    core: Node, consumers: Consumers, quantizing: set[tuple[Node, str]]
) -> Node | None:
    """Return the op whose result is to be quantized after a core op; ``None`` for none."""

    def takers(node: Node) -> tuple[list[Node], int]:
        """Return the ops that take a result as it is, and how often it is quantized."""
        uses = consumers.of(node.scope.value(node.name))
        plain = [use.node for use in uses if use.place not in quantizing]
        return plain, len(uses) - len(plain)

    def is_quantized(plain: list[Node], n_quantized: int) -> bool:
        kinds = [node.op.type for node in plain] + ["quantize"] * n_quantized
        return kinds == ["quantize"]

    kind = core.type
    if kind is None or not kind.dtype.is_float:
        return None
    plain, n_quantized = takers(core)
    if (not plain and not n_quantized) or is_quantized(plain, n_quantized):
        return None
    if not plain or plain[0].op.type not in _FUSED or plain[0].scope is not core.scope:
        return core
    after = takers(plain[0])
    if not after[0] and not after[1]:
        return core
    return None if is_quantized(*after) else plain[0]
