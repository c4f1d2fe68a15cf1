"""Where in the graph of a model values are rounded.

A layer with what follows it exclusively, batch normalization and an activation, counts as one op:
its inputs and its output are rounded, nothing between. Ops that only move values, or mix some of
one range, pass the rounding of their input on; what is concatenated shares one.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from milpress.torch._lifecycle import asleep
from milpress.torch._modes import evaluating
from milpress.torch.quantization._fake_quantize import FakeQuantize, FixedQuantize
from milpress.torch.quantization.quantization_config import (
    ModuleLinearQuantizerConfig,
    QuantizationScheme,
)
from milpress.torch.registration import CONVOLUTIONS, TRANSPOSED, Kinds

WEIGHTED: Kinds = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear, nn.Embedding)

_NORMS = {
    nn.Conv1d: nn.BatchNorm1d,
    nn.ConvTranspose1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.ConvTranspose2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
    nn.ConvTranspose3d: nn.BatchNorm3d,
    nn.Linear: nn.BatchNorm1d,
}
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

# Their output is never negative, so an offset leaves all integers to it.
_NONNEGATIVE = {nn.ReLU, nn.ReLU6, functional.relu, functional.relu6, torch.relu, "relu", "relu_"}
_NONNEGATIVE |= {functional.relu_, torch.relu_}

# Scale and offset of what has a range of its own: from 0 to 1, and from -1 to 1.
_UNIT, _SIGNED_UNIT = (1 / 256, 0), (2 / 256, 128)
_FIXED: dict[Any, tuple[float, int]] = {
    **dict.fromkeys((nn.Sigmoid, torch.sigmoid, functional.sigmoid, "sigmoid"), _UNIT),
    **dict.fromkeys(("sigmoid_", "hardsigmoid", "hardsigmoid_"), _UNIT),
    **dict.fromkeys((nn.Hardsigmoid, functional.hardsigmoid), _UNIT),
    **dict.fromkeys((nn.Softmax, functional.softmax, torch.softmax, "softmax"), _UNIT),
    **dict.fromkeys((nn.Tanh, torch.tanh, functional.tanh, "tanh", "tanh_"), _SIGNED_UNIT),
}

_ACTIVATIONS: set[Any] = {
    *_NONNEGATIVE,
    *_FIXED,
    *(nn.PReLU, nn.RReLU, nn.LeakyReLU, nn.LogSigmoid, nn.SiLU, nn.ELU, nn.CELU, nn.SELU, nn.GLU),
    *(nn.Mish, nn.GELU, nn.Hardtanh, nn.LogSoftmax, nn.Hardswish),
    *(functional.prelu, functional.rrelu, functional.leaky_relu, functional.logsigmoid),
    *(functional.silu, functional.elu, functional.celu, functional.selu, functional.glu),
    *(functional.mish, functional.gelu, functional.hardtanh, functional.log_softmax),
    *(functional.hardswish, torch.log_softmax, torch.selu, torch.celu, torch.exp2),
    *(functional.rrelu_, functional.leaky_relu_, functional.elu_, functional.celu_),
    *(functional.selu_, functional.hardtanh_, "exp2"),
}

_BINARY: set[Any] = {
    *(operator.add, operator.sub, operator.mul, operator.matmul, operator.iadd, operator.imul),
    *(torch.add, torch.sub, torch.mul, torch.matmul, torch.bmm, torch.einsum),
    *("add", "add_", "sub", "mul", "mul_", "matmul", "bmm"),
}

_CONCATENATIONS: set[Any] = {torch.cat, torch.concat, torch.concatenate, torch.stack}

# Dropout does nothing to a model that runs, and scales what it trains on.
_DROPOUTS: set[Any] = {
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, functional.dropout, nn.Identity),
}
_PASSING: set[Any] = {
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.Flatten),
    *(functional.max_pool1d, functional.max_pool2d, functional.max_pool3d),
    *(functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d),
    *(functional.adaptive_avg_pool1d, functional.adaptive_avg_pool2d),
    *(functional.adaptive_avg_pool3d, torch.mean, torch.flatten, torch.reshape, torch.squeeze),
    *(torch.unsqueeze, torch.transpose, torch.permute, operator.getitem),
    *("mean", "flatten", "reshape", "view", "squeeze", "unsqueeze", "transpose", "permute"),
    "contiguous",
}


@dataclass(frozen=True, slots=True)
class RoundedLayer:
    """A module whose weight is rounded, and the batch normalization that is folded into it."""

    name: str
    config: ModuleLinearQuantizerConfig
    norm: str | None


class _Tracer(fx.Tracer):
    def __init__(self, leaves: Iterable[str] = ()) -> None:
        super().__init__()
        self.leaves = set(leaves)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module is one node, and not looked into."""
        is_named = module_qualified_name in self.leaves
        return is_named or super().is_leaf_module(m, module_qualified_name)


class _Unused:
    """Names in the state of a model that its graph does not have, as nothing computes with them."""

    def __init__(self, names: set[str]) -> None:
        self.names = names

    def drop(self, _model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        """Take them out of a checkpoint of the model."""
        for name in self.names:
            state.pop(prefix + name, None)


def traced(model: nn.Module, leaves: Iterable[str]) -> fx.GraphModule:
    """Return a model as a graph, with the same modules, that loads the model's checkpoints."""
    graph = fx.GraphModule(model, _Tracer(leaves).trace(model), type(model).__name__)
    unused = model.state_dict().keys() - graph.state_dict().keys()
    if unused:
        graph.register_load_state_dict_pre_hook(_Unused(unused).drop)  # type: ignore[no-untyped-call]
    return graph


def ranks(model: fx.GraphModule, inputs: tuple[Any, ...]) -> dict[fx.Node, int | None]:
    """Return the number of dimensions of what each node makes: ``None`` where it is no float.

    Empty if the model can't run on the inputs.
    """
    ranks_of: dict[fx.Node, int | None] = {}

    class Runner(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            output = super().run_node(n)
            is_float = isinstance(output, torch.Tensor) and output.is_floating_point()
            ranks_of[n] = output.ndim if is_float else None
            return output

    try:
        with evaluating(model), asleep(model), torch.no_grad():
            Runner(model).run(*inputs)
    except Exception:  # whatever a user's own model raises
        ranks_of.clear()
    return ranks_of


class Placing:
    """Finds what is rounded in a graph, and puts layers there that do it.

    Parameters
    ----------
    model
        The graph, which `insert` changes.
    config_of
        Returns the config of a module by its name, or of a function under the name "".
    dimensions
        What `ranks` returned.
    """

    def __init__(
        self,
        model: fx.GraphModule,
        config_of: Callable[[str, Any], Any],
        dimensions: dict[fx.Node, int | None],
    ) -> None:
        self.model = model
        self.config_of = config_of
        self.dimensions = dimensions
        self.nodes = list(model.graph.nodes)
        self.layers: list[RoundedLayer] = []
        # What is rounded after a node: the config that asks for it.
        self.wanted: dict[fx.Node, ModuleLinearQuantizerConfig] = {}
        self.ends: set[fx.Node] = set()  # the last node of each op
        self.inner: set[fx.Node] = set()
        self.parents: dict[fx.Node, fx.Node] = {}
        self._calls = Counter(node.target for node in self.nodes if node.op == "call_module")
        self._find_ops()
        self._pass_on()

    def kind(self, node: fx.Node) -> Any:
        """Return the class of a node's module, its function, or the name of its method."""
        if node.op == "call_module":
            return type(self.model.get_submodule(str(node.target)))
        return node.target if node.op in ("call_function", "call_method") else None

    def _config(self, node: fx.Node) -> Any:
        if node.op == "call_module":
            name = str(node.target)
            return self.config_of(name, self.model.get_submodule(name))
        return self.config_of("", node.target)

    def _find_ops(self) -> None:
        """Find the ops, their weights, and the values that they want rounded."""
        for node in self.nodes:
            kind = self.kind(node)
            if node in self.inner or kind is None:
                continue
            is_weighted = kind in WEIGHTED
            is_op = is_weighted or kind in _BINARY or kind in _ACTIVATIONS or kind in _BATCH_NORMS
            if not is_op and kind not in _CONCATENATIONS:
                continue
            config = self._config(node)
            end, norm = node, None
            if is_op:
                end, norm = self._end(node, kind)
            if config is None:
                continue
            self.ends.add(end)
            if is_weighted and config.quantizes_weights:
                self.layers.append(RoundedLayer(str(node.target), config, norm))
            if config.quantizes_activations and self._is_float(end):
                self.wanted.setdefault(end, config)
                for source in self._sources(node):
                    if kind is not nn.Embedding:
                        self.wanted.setdefault(source, config)

    def _end(self, node: fx.Node, kind: Any) -> tuple[fx.Node, str | None]:
        """Return the last node that counts as part of an op, and a batch normalization in it."""
        end, norm = node, None
        following = self._only_user(end)
        if following is not None and self._folds(node, kind, following):
            end, norm = following, str(following.target)
            self.inner.add(following)
            following = self._only_user(end)
        goes_on = kind in WEIGHTED or kind in _BINARY or kind in _BATCH_NORMS
        if goes_on and kind is not nn.Embedding and following is not None:
            is_first = following.args and following.args[0] is end
            if self.kind(following) in _ACTIVATIONS and is_first:
                end = following
                self.inner.add(following)
        return end, norm

    def _folds(self, node: fx.Node, kind: Any, following: fx.Node) -> bool:
        expected = _NORMS.get(kind)
        if expected is None or self.kind(following) is not expected:
            return False
        norm = self.model.get_submodule(str(following.target))
        calls = (self._calls[str(node.target)], self._calls[str(following.target)])
        # Of more than two dimensions, a linear layer's channels are not those that are normalized.
        fits = kind is not nn.Linear or self.dimensions.get(node) == 2
        return calls == (1, 1) and fits and norm.running_var is not None

    def _only_user(self, node: fx.Node) -> fx.Node | None:
        return next(iter(node.users)) if len(node.users) == 1 else None

    def _sources(self, node: fx.Node) -> list[fx.Node]:
        """Return the nodes whose values an op takes, parameters aside."""
        arguments, kind = node.args, self.kind(node)
        if kind in _CONCATENATIONS and arguments and isinstance(arguments[0], (list, tuple)):
            arguments = tuple(arguments[0])
        nodes = [item for item in arguments if isinstance(item, fx.Node)]
        if kind in WEIGHTED or kind in _ACTIVATIONS:
            nodes = nodes[:1]
        return [self._origin(item) for item in nodes if self._is_value(item)]

    def _is_value(self, node: fx.Node) -> bool:
        return node.op != "get_attr" and self._is_float(node)

    def _is_float(self, node: fx.Node) -> bool:
        return not self.dimensions or self.dimensions.get(node) is not None

    def _origin(self, node: fx.Node) -> fx.Node:
        """Return the node behind ops that do nothing to a range."""
        while self.kind(node) in _PASSING or self.kind(node) in _DROPOUTS:
            if not node.args or not isinstance(node.args[0], fx.Node):
                break
            if not self._is_value(node.args[0]) or self._config(node) is None:
                break
            node = node.args[0]
        return node

    def _pass_on(self) -> None:
        """Find the values that have the rounding of others."""
        for node in self.nodes:
            kind = self.kind(node)
            if kind in _CONCATENATIONS and node in self.wanted:
                for source in self._sources(node):
                    if source in self.wanted:
                        self._join(source, node)
            elif kind in _PASSING and node.args and isinstance(node.args[0], fx.Node):
                origin = self._origin(node)
                if origin in self.wanted and origin is not node and self._is_float(node):
                    self.wanted[node] = self.wanted[origin]
                    self._join(origin, node)

    def _root(self, node: fx.Node) -> fx.Node:
        while self.parents.get(node, node) is not node:
            node = self.parents[node]
        return node

    def _join(self, first: fx.Node, second: fx.Node) -> None:
        self.parents[self._root(second)] = self._root(first)

    def insert(self) -> None:
        """Put layers after the nodes whose values are rounded."""
        groups: dict[fx.Node, list[fx.Node]] = {}
        for node in self.nodes:
            if node in self.wanted:
                groups.setdefault(self._root(node), []).append(node)
        nonnegative = self._nonnegative()
        names: dict[fx.Node, str] = {}
        for i, (root, members) in enumerate(groups.items()):
            names[root] = f"activation_post_process_{i}"
            self.model.add_submodule(names[root], self._fake(members, nonnegative))
        inputs = [node for node in self.nodes if node.op == "placeholder"]
        for node in self.nodes:
            if node in self.wanted:
                # An input is rounded behind the last of the inputs.
                with self.model.graph.inserting_after(inputs[-1] if node in inputs else node):
                    rounded = self.model.graph.call_module(names[self._root(node)], (node,))
                others = [user for user in node.users if user is not rounded]
                for user in others:
                    user.replace_input_with(node, rounded)
        self.model.graph.lint()
        self.model.recompile()

    def _fake(self, members: list[fx.Node], nonnegative: set[fx.Node]) -> FakeQuantize:
        config = self.wanted[members[0]]
        sources = [n for n in members if self.kind(n) not in _PASSING | _CONCATENATIONS]
        ranges = {_FIXED.get(self.kind(node)) if node in self.ends else None for node in sources}
        if len(ranges) == 1 and (known := ranges.pop()) is not None:
            return FixedQuantize(*known)
        scheme = config.quantization_scheme
        # What is concatenated with values that are never negative has a lopsided range, too.
        if any(node in nonnegative for node in sources):
            scheme = QuantizationScheme.affine
        return FakeQuantize(
            config.activation_observer,
            bits=8,
            signed=False,
            scheme=scheme,
            is_learnable=config.algorithm == "learnable",
        )

    def _nonnegative(self) -> set[fx.Node]:
        """Return the nodes whose values can't be negative."""
        nodes: set[fx.Node] = set()
        for node in self.nodes:
            kind = self.kind(node)
            if kind in _NONNEGATIVE:
                nodes.add(node)
                continue
            keeps = kind in _PASSING or kind in _DROPOUTS or kind in _CONCATENATIONS
            keeps |= kind in {operator.add, operator.mul, torch.add, torch.mul, "add", "mul"}
            sources = self._all_sources(node)
            if keeps and sources and all(source in nodes for source in sources):
                nodes.add(node)
        return nodes

    def _all_sources(self, node: fx.Node) -> list[fx.Node]:
        if self.kind(node) in _CONCATENATIONS:
            return self._sources(node)
        if self.kind(node) in _PASSING or self.kind(node) in _DROPOUTS:
            return [node.args[0]] if node.args and isinstance(node.args[0], fx.Node) else []
        # A number beside a value may be negative.
        is_plain = all(isinstance(item, fx.Node) for item in node.args)
        return [item for item in node.args if isinstance(item, fx.Node)] if is_plain else []
