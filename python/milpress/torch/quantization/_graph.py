"""Where in the graph of a model values are rounded.

A layer with what follows it exclusively, batch normalization and an activation, counts as one op:
its inputs and its output are rounded, nothing between. Ops that only move values, or mix some of
one range, pass the rounding of their input on; what is concatenated shares one.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx, nn

from milpress.torch._lifecycle import asleep
from milpress.torch._modes import device_of, evaluating
from milpress.torch.quantization import _ops as ops
from milpress.torch.quantization._fake_quantize import (
    FakeQuantize,
    QuantizeDequantize,
    activation_layer,
)
from milpress.torch.quantization._folding import RoundedLayer
from milpress.torch.quantization.quantization_config import ModuleLinearQuantizerConfig
from milpress.torch.registration import axes_of_weights

_MAX_RANK = 5


class _Tracer(fx.Tracer):
    def __init__(self, leaves: Iterable[str] = ()) -> None:
        super().__init__()
        self.leaves = set(leaves)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module is one node, and not looked into."""
        is_leaf = module_qualified_name in self.leaves or bool(axes_of_weights(m))
        return is_leaf or super().is_leaf_module(m, module_qualified_name)


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

    def parts(self) -> list[str]:
        """Return the modules in the graph with layers that it does not show."""
        names = dict.fromkeys(str(node.target) for node in self.nodes if node.op == "call_module")
        modules = [(name, self.model.get_submodule(name)) for name in names]
        return [
            name
            for name, module in modules
            if type(module) not in ops.WEIGHTED
            and any(axes_of_weights(m) for m in module.modules())
        ]

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
            is_weighted = kind in ops.WEIGHTED
            is_op = (
                is_weighted
                or kind in ops.BINARY
                or kind in ops.ACTIVATIONS
                or kind in ops.BATCH_NORMS
            )
            if not is_op and kind not in ops.CONCATENATIONS:
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
                    if kind not in ops.EMBEDDINGS:
                        self.wanted.setdefault(source, config)

    def _end(self, node: fx.Node, kind: Any) -> tuple[fx.Node, str | None]:
        """Return the last node that counts as part of an op, and a batch normalization in it."""
        end, norm = node, None
        following = self._only_user(end)
        if following is not None and self._folds(node, kind, following):
            end, norm = following, str(following.target)
            self.inner.add(following)
            following = self._only_user(end)
        goes_on = kind in ops.WEIGHTED or kind in ops.BINARY or kind in ops.BATCH_NORMS
        if goes_on and kind not in ops.EMBEDDINGS and following is not None:
            is_first = following.args and following.args[0] is end
            if self.kind(following) in ops.ACTIVATIONS and is_first:
                end = following
                self.inner.add(following)
        return end, norm

    def _folds(self, node: fx.Node, kind: Any, following: fx.Node) -> bool:
        expected = ops.NORMS.get(kind)
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
        if kind in ops.CONCATENATIONS and arguments and isinstance(arguments[0], (list, tuple)):
            arguments = tuple(arguments[0])
        nodes = [item for item in arguments if isinstance(item, fx.Node)]
        if kind in ops.WEIGHTED or kind in ops.ACTIVATIONS:
            nodes = nodes[:1]
        return [self._origin(item) for item in nodes if self._is_value(item)]

    def _is_value(self, node: fx.Node) -> bool:
        return node.op != "get_attr" and self._is_float(node)

    def _is_float(self, node: fx.Node) -> bool:
        return not self.dimensions or self.dimensions.get(node) is not None

    def _origin(self, node: fx.Node) -> fx.Node:
        """Return the node behind ops that do nothing to a range."""
        while self.kind(node) in ops.PASSING or self.kind(node) in ops.DROPOUTS:
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
            if kind in ops.CONCATENATIONS and node in self.wanted:
                for source in self._sources(node):
                    if source in self.wanted:
                        self._join(source, node)
            elif kind in ops.PASSING and node.args and isinstance(node.args[0], fx.Node):
                origin = self._origin(node)
                is_other = origin is not node and self._is_float(node) and self._is_rounded(node)
                if origin in self.wanted and is_other:
                    self.wanted[node] = self.wanted[origin]
                    self._join(origin, node)

    def _is_rounded(self, node: fx.Node) -> bool:
        """Whether values may be rounded here: Core ML lets those of rank 6 only move."""
        return (self.dimensions.get(node) or 0) <= _MAX_RANK

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
            fake = self._fake(members, nonnegative).to(device_of(self.model))
            self.model.add_submodule(names[root], fake)
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
        sources = [n for n in members if self.kind(n) not in ops.PASSING | ops.CONCATENATIONS]
        ranges = {ops.FIXED.get(self.kind(node)) if node in self.ends else None for node in sources}
        known = ranges.pop() if len(ranges) == 1 else None
        # What is concatenated with values that are never negative has a lopsided range, too.
        return activation_layer(config, known, any(node in nonnegative for node in sources))

    def _nonnegative(self) -> set[fx.Node]:
        """Return the nodes whose values can't be negative."""
        nodes: set[fx.Node] = set()
        for node in self.nodes:
            kind = self.kind(node)
            if kind in ops.NONNEGATIVE:
                nodes.add(node)
                continue
            keeps = kind in ops.PASSING or kind in ops.DROPOUTS or kind in ops.CONCATENATIONS
            keeps |= kind in {operator.add, operator.mul, torch.add, torch.mul, "add", "mul"}
            sources = self._all_sources(node)
            if keeps and sources and all(source in nodes for source in sources):
                nodes.add(node)
        return nodes

    def _all_sources(self, node: fx.Node) -> list[fx.Node]:
        if self.kind(node) in ops.CONCATENATIONS:
            return self._sources(node)
        if self.kind(node) in ops.PASSING or self.kind(node) in ops.DROPOUTS:
            return [node.args[0]] if node.args and isinstance(node.args[0], fx.Node) else []
        # A number beside a value may be negative.
        is_plain = all(isinstance(item, fx.Node) for item in node.args)
        return [item for item in node.args if isinstance(item, fx.Node)] if is_plain else []


def settle(model: fx.GraphModule, norms: set[str]) -> list[str]:
    """Put ops that round in the place of layers that did, and take folded modules out.

    Returns
    -------
    list
        The names of the layers that nothing has passed, which are left out.
    """
    unused = []
    for node in list(model.graph.nodes):
        if node.op != "call_module":
            continue
        name = str(node.target)
        module = model.get_submodule(name) if name not in norms else None
        is_unused = isinstance(module, FakeQuantize) and not module.is_begun
        if module is None or is_unused:
            if is_unused:
                unused.append(name)
            node.replace_all_uses_with(node.args[0])
            model.graph.erase_node(node)
        elif isinstance(module, FakeQuantize):
            holder, _, own_name = name.rpartition(".")
            setattr(model.get_submodule(holder), own_name, QuantizeDequantize(module))
    model.delete_all_unused_submodules()
    model.graph.lint()
    model.recompile()
    return unused
