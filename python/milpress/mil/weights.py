"""The weights of a program: what is stored, for whom, and along which axes channels lie."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from milpress.errors import PackageError
from milpress.mil import values
from milpress.mil.constexpr import is_compressed, is_constexpr
from milpress.mil.dtypes import DType
from milpress.mil.graph import Graph, Node
from milpress.mil.package import Package, Program

# Smaller constants are settings of ops (strides, axes, a scale), not weights.
MIN_WEIGHT_ELEMENTS = 10


@dataclass(frozen=True, slots=True)
class Weight:
    """A stored tensor that ops use.

    Parameters
    ----------
    prefix
        The functions or models it is in, with slashes behind; empty where the package has one.
    node
        The op that holds it: ``const``, or the last of a chain of ``constexpr_*``.
    graph
        The graph it belongs to.
    dtype, shape
        Type and shape as ops see it.
    """

    prefix: str
    node: Node
    graph: Graph
    dtype: DType
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """Its name in the package, as it is now."""
        return f"{self.prefix}{self.node.name}"

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def op_types(self) -> tuple[str, ...]:
        """Kinds of the ops that use it, each once, in order."""
        return tuple(dict.fromkeys(use.node.op.type for use in self.node.uses))

    @property
    def is_compressed(self) -> bool:
        """Whether it is stored compressed; one that is only cast is not."""
        return is_compressed(self.node, self.graph)

    @property
    def decoded_by(self) -> tuple[str, ...]:
        """Kinds of the ``constexpr_*`` ops that decode it, last first; none if it is dense."""
        return tuple(_chain(self.node, self.graph))

    @property
    def channel_axes(self) -> tuple[int, int] | None:
        """Axes of output and input channels; ``None`` if the ops that use it disagree."""
        found = {self._axes_for(use.node, use.parameter) for use in self.node.uses}
        if len(found) != 1:
            return None
        rank = len(self.shape)
        output, inputs = found.pop()
        return output % rank, inputs % rank

    def _axes_for(self, node: Node, parameter: str) -> tuple[int, int]:
        if node.op.type == "conv_transpose":
            return 1, 0
        if node.op.type == "matmul":
            transposed = bool(self.graph.scalar(node, f"transpose_{parameter}"))
            return (-2, -1) if transposed == (parameter == "y") else (-1, -2)
        return 0, 1


def _chain(node: Node, graph: Graph) -> Iterator[str]:
    if is_constexpr(node):
        yield node.op.type
        for parameter in sorted(node.op.inputs):
            found = graph.producer(node, parameter)
            if found is not None:
                yield from _chain(found[0], graph)


class Site(NamedTuple):
    """A block of a function, where it stands in the package, and its graph.

    ``prefix`` is what the names of its weights begin with: empty in a package with one function.
    """

    prefix: str
    program: Program
    function_name: str
    function: Any
    block: Any
    graph: Graph


def sites(package: Package) -> Iterator[Site]:
    """Yield every block of every function, in an order that does not depend on the file's.

    Raises
    ------
    PackageError
        If a function has no block, or an op uses a value that nothing defines.
    """
    for program in package.programs:
        functions = program.functions
        for function_name, function in functions.items():
            place = (*program.place, function_name) if len(functions) > 1 else program.place
            specializations = sorted(function.block_specializations.items())
            if not specializations:
                msg = f"{package.path}: function {function_name!r} must have a block, got none"
                raise PackageError(msg)
            for opset_name, block in specializations:
                shown = (*place, opset_name) if len(specializations) > 1 else place
                prefix = "".join(f"{part}/" for part in shown)
                graph = Graph(function, block)
                yield Site(prefix, program, function_name, function, block, graph)


def weights(prefix: str, graph: Graph, *, least: int = MIN_WEIGHT_ELEMENTS) -> Iterator[Weight]:
    """Yield the weights of one graph, in order: those that some other op uses or a block returns.

    Those of fewer than ``least`` elements are left out.

    Raises
    ------
    PackageError
        If one has no fixed shape.
    """
    for node in graph.nodes:
        if not node.is_stored or len(node.op.outputs) != 1:
            continue
        used = any(not is_constexpr(use.node) for use in node.uses) or node.is_block_output
        if not used:
            continue
        try:
            tensor_type = node.type
            if tensor_type is None or tensor_type.dtype.name == "bool":
                continue
            shape = tensor_type.fixed_shape
        except PackageError as error:
            msg = f"{prefix}{node.name}: {error}"
            raise PackageError(msg) from error
        if math.prod(shape) >= least:
            yield Weight(prefix, node, graph, tensor_type.dtype, shape)


def blob_values(op: Any) -> Iterator[Any]:
    """Yield every value of an op that is stored in a weight file."""
    for _, value in sorted(op.attributes.items()):
        if values.is_blob(value):
            yield value
    for _, argument in sorted(op.inputs.items()):
        for binding in argument.arguments:
            if binding.WhichOneof("choice") == "value" and values.is_blob(binding.value):
                yield binding.value


def blob_places(stored: Sequence[Any]) -> tuple[tuple[str, int], ...]:
    """Return where in which weight files some values are stored."""
    return tuple(
        (value.blobFileValue.fileName, value.blobFileValue.offset)
        for value in stored
        if values.is_blob(value)
    )


def weight_files(package: Package) -> tuple[str, ...]:
    """Return the weight files that the model names, each once, sorted."""
    if package.weight_files is None:
        names = {
            value.blobFileValue.fileName
            for program in package.programs
            for function in program.functions.values()
            for block in function.block_specializations.values()
            for op in _all_ops(block)
            for value in blob_values(op)
        }
        package.weight_files = tuple(sorted(names))
    return package.weight_files


def _all_ops(block: Any) -> Iterator[Any]:
    for op in block.operations:
        yield op
        for inner in op.blocks:
            yield from _all_ops(inner)
