"""Programs of a package: the graphs of their blocks, and the weights in them."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from numpy.typing import NDArray

from milpress.errors import package_errors
from milpress.formats import Compressed
from milpress.mil import proto
from milpress.mil.decode import Decoder, is_compressed, is_constexpr
from milpress.mil.dtypes import DType
from milpress.mil.graph import Graph, Node
from milpress.mil.opset import Opset, by_name
from milpress.mil.values import WeightSource, blob_places, n_stored_bytes

# Smaller constants are settings of ops (strides, axes, a scale), not weights.
MIN_WEIGHT_ELEMENTS = 10


@dataclass(frozen=True, slots=True)
class Weight:
    """A stored tensor that ops use.

    Parameters
    ----------
    node
        The op that holds it: ``const``, or the last of a chain of ``constexpr_*``.
    graph
        The graph it belongs to.
    dtype, shape
        Type and shape as ops see it.
    """

    node: Node
    graph: ProgramGraph
    dtype: DType
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """Its name in the package, as it is now."""
        return f"{self.graph.prefix}{self.node.name}"

    @property
    def prefix(self) -> str:
        """The functions or models it is in, with slashes behind."""
        return self.graph.prefix

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
        ops = (self.node, *self.parts)
        return tuple(node.op.type for node in ops if is_constexpr(node))

    @property
    def stored(self) -> list[proto.Value]:
        """All that is stored for it, what its parts share once."""
        return self.graph.decoder.stored_values(self.node)

    @property
    def places(self) -> tuple[tuple[str, int], ...]:
        """Where in which weight files it is stored."""
        return blob_places(self.stored)

    @property
    def n_bytes(self) -> int:
        """Size of what is stored for it."""
        return sum(n_stored_bytes(value) for value in self.stored)

    @property
    def parts(self) -> list[Node]:
        """The stored ops that it is decoded from, each once; others may use them too."""
        return self.graph.decoder.parts(self.node)

    def dense(self) -> NDArray[Any]:
        """Return its elements.

        Raises
        ------
        PackageError
            If what is stored does not fit together.
        """
        return self.graph.decoder.dense(self.node).values

    def value(self) -> Compressed | None:
        """Return what it is made of, if that is one palette, quantized or sparse weight."""
        return self.graph.decoder.value(self.node)

    @property
    def channel_axes(self) -> tuple[int, int] | None:
        """Axes of output and input channels; ``None`` if the ops that use it disagree."""
        axes = {self._axes_for(use.node, use.parameter) for use in self.node.uses}
        if len(axes) != 1:
            return None
        rank = len(self.shape)
        output, inputs = axes.pop()
        return output % rank, inputs % rank

    def _axes_for(self, node: Node, parameter: str) -> tuple[int, int]:
        if node.op.type == "conv_transpose":
            return 1, 0
        if node.op.type == "matmul":
            transposed = bool(self.graph.scalar(node, f"transpose_{parameter}"))
            return (-2, -1) if transposed == (parameter == "y") else (-1, -2)
        return 0, 1


class Program(NamedTuple):
    """One ML program of a package, and where in a pipeline it stands.

    ``place`` is empty for a package that is one program, else the names of the pipeline's models.
    """

    place: tuple[str, ...]
    model: proto.Model

    @property
    def functions(self) -> dict[str, proto.Function]:
        """The functions, in the order of their names."""
        return dict(sorted(self.model.mlProgram.functions.items()))


class ProgramGraph(Graph):
    """The graph of one block of a function, where it stands, and the weights in it.

    Parameters
    ----------
    function, block
        The function, and the one of its blocks.
    source
        Gives the weight files.
    place
        The pipeline's models that it is in.
    function_name
        The name of the function.
    prefix
        What the names of its weights begin with: empty in a package with one function.
    """

    def __init__(
        self,
        function: proto.Function,
        block: proto.Block,
        source: WeightSource,
        *,
        place: tuple[str, ...] = (),
        function_name: str = "",
        prefix: str = "",
    ) -> None:
        super().__init__(function, block)
        self.function = function
        self.block = block
        self.source = source
        self.place = place
        self.function_name = function_name
        self.prefix = prefix
        self.decoder = Decoder(self, source)

    @property
    def opset(self) -> Opset:
        """The opset of its function."""
        return by_name(self.function.opset)

    @property
    def is_run(self) -> bool:
        """Whether its function runs this block; others are for other opsets."""
        return self.block is self.function.block_specializations[self.function.opset]

    @functools.cached_property
    def weights(self) -> tuple[Weight, ...]:
        """The weights, in order: what is stored and other ops use or a block returns.

        Raises
        ------
        PackageError
            If one has no fixed shape.
        """
        return tuple(self.find_weights(MIN_WEIGHT_ELEMENTS))

    def find_weights(self, least: int) -> Iterator[Weight]:
        """Yield the weights of at least so many elements, in order."""
        for node in self.nodes:
            if not node.is_stored or len(node.op.outputs) != 1:
                continue
            if not node.is_block_output and all(is_constexpr(use.node) for use in node.uses):
                continue
            with package_errors(f"{self.prefix}{node.name}"):
                tensor_type = node.type
                if tensor_type is None or tensor_type.dtype.name == "bool":
                    continue
                shape = tensor_type.fixed_shape
            if math.prod(shape) >= least:
                yield Weight(node, self, tensor_type.dtype, shape)

    def anew(self) -> ProgramGraph:
        """Return the graph of the same block, as it is by now."""
        return ProgramGraph(
            self.function,
            self.block,
            self.source,
            place=self.place,
            function_name=self.function_name,
            prefix=self.prefix,
        )
