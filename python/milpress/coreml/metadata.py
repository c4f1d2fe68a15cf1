"""What the weights of a model are, and which ops use them; read only where it is looked at."""

from __future__ import annotations

import functools
import math
import numbers
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import FrozenInstanceError, dataclass
from typing import Any, NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray

from milpress.engines.mlmodel import opened
from milpress.errors import ConfigTypeError, UnsupportedError
from milpress.formats.order import distinct
from milpress.mil import values
from milpress.mil.decode import Decoder, is_constexpr, is_part
from milpress.mil.graph import Node, Scope
from milpress.mil.package import Package
from milpress.mil.program import ProgramGraph
from milpress.mil.values import TensorType

_Item = TypeVar("_Item", bound=Hashable)


@dataclass(frozen=True)
class CoreMLOpMetaData:
    """An op that uses a weight.

    Parameters
    ----------
    op_type
        Its kind, such as ``conv``.
    name
        Its name.
    params_name_mapping
        The names of its weights by the parameters that they are bound to, such as
        ``{"weight": "conv_1_weight", "bias": "conv_1_bias"}``. Where a parameter takes several
        values, its number stands behind it: ``values[1]``.
    """

    op_type: str
    name: str
    params_name_mapping: dict[str, str]

    def __post_init__(self) -> None:
        _check_type("op_type", self.op_type, str)
        _check_type("name", self.name, str)
        _check_type("params_name_mapping", self.params_name_mapping, dict)

    def __str__(self) -> str:
        weights = "".join(f"{key}={name}, " for key, name in self.params_name_mapping.items())
        return f"{self.op_type}(name={self.name}, {weights}...)"


class CoreMLWeightMetaData:
    """A weight, statistics of its values, and the ops that use it.

    One that `get_weights_metadata` returns reads the weight when `val`, `sparsity` or
    `unique_values` is first looked at. The statistics are those of the weight in the model,
    whatever is done to `val`.

    Parameters
    ----------
    val
        The weight.
    sparsity
        Share of elements whose absolute value is at most 1e-12; counted if not given.
    unique_values
        Number of distinct values; counted if not given.
    child_ops
        The ops that use it, if known.

    Examples
    --------
    >>> data = np.array([[1.0, 0.0], [0.0, 6.0]], dtype=np.float32)
    >>> print(CoreMLWeightMetaData(data))  # doctest: +NORMALIZE_WHITESPACE
    [
      val: np.ndarray(shape=(2, 2), dtype=float32)
      sparsity: 0.5
      unique_values: 3
    ]
    """

    child_ops: list[CoreMLOpMetaData] | None
    _read: Callable[[], NDArray[Any]]
    _shape: tuple[int, ...]
    _dtype: np.dtype[Any]

    def __init__(
        self,
        val: NDArray[Any],
        sparsity: float | None = None,
        unique_values: int | None = None,
        child_ops: list[CoreMLOpMetaData] | None = None,
    ) -> None:
        _check_type("val", val, np.ndarray)
        statistics: dict[str, Any] = {"val": val}
        if sparsity is not None:
            _check_type("sparsity", sparsity, numbers.Real)
            statistics["sparsity"] = float(sparsity)
        if unique_values is not None:
            _check_type("unique_values", unique_values, numbers.Integral)
            statistics["unique_values"] = int(unique_values)
        if child_ops is not None:
            _check_type("child_ops", child_ops, list)
        self._set_up(lambda: val, val.shape, val.dtype, child_ops)
        self.__dict__.update(statistics)

    def _set_up(
        self,
        read: Callable[[], NDArray[Any]],
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        child_ops: list[CoreMLOpMetaData] | None,
    ) -> None:
        self.__dict__.update(_read=read, _shape=shape, _dtype=dtype, child_ops=child_ops)

    @classmethod
    def _stored(
        cls,
        read: Callable[[], NDArray[Any]],
        tensor_type: TensorType,
        child_ops: list[CoreMLOpMetaData],
    ) -> CoreMLWeightMetaData:
        """Make one that reads its weight when it is needed."""
        self = cls.__new__(cls)
        self._set_up(read, tensor_type.fixed_shape, tensor_type.dtype.storage, child_ops)
        return self

    @functools.cached_property
    def val(self) -> NDArray[Any]:
        """The weight, as ops see it."""
        array = self._read()
        return array if array.flags.writeable else array.copy()

    @functools.cached_property
    def sparsity(self) -> float:
        """Share of elements whose absolute value is at most 1e-12."""
        array = self._read()
        if array.dtype.kind in "fc":
            n_zeros = np.count_nonzero(np.abs(array) <= 1e-12)
        else:
            n_zeros = array.size - np.count_nonzero(array)
        return float(n_zeros / max(array.size, 1))

    @functools.cached_property
    def unique_values(self) -> int:
        """Number of distinct values."""
        array = self._read()
        n_bytes = array.dtype.itemsize
        if n_bytes > 2:
            return len(distinct(array))
        # So few values are possible that marking those that occur is faster than sorting all.
        codes = np.arange(1 << 8 * n_bytes, dtype=f"u{n_bytes}")
        occurs = np.zeros(codes.size, np.bool_)
        occurs[np.ascontiguousarray(array).reshape(-1).view(codes.dtype)] = True
        return len(distinct(codes[occurs].view(array.dtype)))

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        msg = f"cannot assign to field {name!r}"
        raise FrozenInstanceError(msg)

    def __delattr__(self, name: str) -> NoReturn:
        msg = f"cannot delete field {name!r}"
        raise FrozenInstanceError(msg)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CoreMLWeightMetaData):
            return NotImplemented
        return (
            (self._shape, self._dtype, self.child_ops)
            == (other._shape, other._dtype, other.child_ops)
            and np.array_equal(self.val, other.val, equal_nan=self.val.dtype.kind in "fc")
            and (self.sparsity, self.unique_values) == (other.sparsity, other.unique_values)
        )

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.val, self.sparsity, self.unique_values, self.child_ops)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} shape={self._shape} dtype={self._dtype}>"

    def __str__(self) -> str:
        lines = [
            f"  val: np.ndarray(shape={self._shape}, dtype={self._dtype})",
            f"  sparsity: {self.sparsity}",
            f"  unique_values: {self.unique_values}",
        ]
        if self.child_ops is not None:
            lines += ["  child_ops: [", *(f"    {op}" for op in self.child_ops), "  ]"]
        return "\n".join(["[  ", *lines, "]"])


class WeightsMetaData(OrderedDict[str, CoreMLWeightMetaData]):
    """Metadata of weights by their names, which prints one below the other."""

    def __str__(self) -> str:
        return "".join(f"{name}\n{metadata}\n" for name, metadata in self.items())


def get_weights_metadata(mlmodel: Any, weight_threshold: int = 2048) -> WeightsMetaData:
    """List the weights of a model, and the ops that use them, without reading the weights.

    A compressed weight is listed under its own name, and its values are those that ops see.

    Parameters
    ----------
    mlmodel
        A coremltools ``MLModel``, or the path of an ``.mlpackage``. Neither is needed afterwards.
    weight_threshold
        Weights with fewer elements are left out.

    Returns
    -------
    WeightsMetaData
        A `CoreMLWeightMetaData` for each weight, by its name; where the model has several functions
        or is a pipeline, the function or model stands before each name, with a slash between.

    Raises
    ------
    ConfigTypeError
        If the model is neither, or the threshold no number.
    ModelKindError
        If the model is not made of ML programs.
    PackageError
        If the package is damaged.
    """
    _check_type("weight_threshold", weight_threshold, numbers.Real)
    package = opened(mlmodel)
    metadata = WeightsMetaData()
    for graph in package.graphs:
        _add_weights(metadata, package, graph, weight_threshold)
    return metadata


def _add_weights(
    metadata: WeightsMetaData, package: Package, graph: ProgramGraph, weight_threshold: float
) -> None:
    nodes: dict[Scope, list[Node]] = {scope: [] for scope in graph.scopes}
    for node in graph.nodes:
        nodes[node.scope].append(node)
    types = {
        node: tensor_type
        for scope in _postorder(graph.scopes, lambda scope: scope)
        for node in nodes[scope]
        if (tensor_type := _weight_type(node)) is not None
        and math.prod(tensor_type.fixed_shape) >= weight_threshold
    }
    names = _unique_names(types, graph.prefix)
    order = {node: i for i, node in enumerate(_postorder(graph.nodes, lambda node: node.scope))}
    decoder = graph.decoder
    for node, tensor_type in types.items():
        for value in decoder.stored_values(node):
            if values.is_blob(value):
                # A file that is open can be read after the package is gone.
                package.reader(value.blobFileValue.fileName)
        children = sorted({use.node for use in node.uses}, key=order.__getitem__)
        metadata[names[node]] = CoreMLWeightMetaData._stored(
            functools.partial(_read, node, decoder, names[node]),
            tensor_type,
            [
                CoreMLOpMetaData(
                    child.op.type,
                    f"{graph.prefix}{child.op_name}",
                    _parameters(child, names, order),
                )
                for child in children
            ],
        )


def _postorder(items: Iterable[_Item], scope_of: Callable[[_Item], Scope]) -> Iterator[_Item]:
    """Put what is inside a block before the op or block around it, as coremltools does."""
    around: list[tuple[int, _Item]] = []
    for item in items:
        depth, scope = 0, scope_of(item)
        while scope.parent is not None:
            depth, scope = depth + 1, scope.parent
        while around and around[-1][0] >= depth:
            yield around.pop()[1]
        around.append((depth, item))
    while around:
        yield around.pop()[1]


def _weight_type(node: Node) -> TensorType | None:
    """Return the type of a weight, or ``None`` if an op is none that anyone but a decoder uses."""
    if is_constexpr(node):
        tensor_type = node.type if len(node.op.outputs) == 1 else None
    elif node.op.type == "const" and "val" in node.op.attributes:
        tensor_type = values.type_of(node.op.attributes["val"].type)
    else:
        return None
    return None if tensor_type is None or not tensor_type.shape or is_part(node) else tensor_type


def _unique_names(nodes: Iterable[Node], prefix: str) -> dict[Node, str]:
    names = {node: f"{prefix}{node.op_name}" for node in nodes}
    taken: set[str] = set()
    for node, name in names.items():
        unique, i = name, 0
        while unique in taken or (i and unique in names.values()):
            unique, i = f"{name}_{i}", i + 1
        taken.add(unique)
        names[node] = unique
    return names


def _parameters(node: Node, names: dict[Node, str], order: dict[Node, int]) -> dict[str, str]:
    """Return the names of an op's weights by parameter, in the order of the weights."""
    parameters: list[tuple[int, str, str]] = []
    for parameter, argument in node.op.inputs.items():
        for i, binding in enumerate(argument.arguments):
            if binding.WhichOneof("choice") != "name":
                continue
            producer = node.scope.find(binding.name)
            if producer is not None and producer[0] in names:
                key = parameter if len(argument.arguments) == 1 else f"{parameter}[{i}]"
                parameters.append((order[producer[0]], key, names[producer[0]]))
    return {key: name for _, key, name in sorted(parameters)}


def _read(node: Node, decoder: Decoder, name: str) -> NDArray[Any]:
    dtype, array = decoder.dense(node)
    if "float" in dtype.name and dtype.storage.kind != "f":
        msg = f"{name}: a weight must be of a type that NumPy has to be read, got {dtype.name}"
        raise UnsupportedError(msg)
    return array


def _check_type(name: str, value: Any, kind: type[Any]) -> None:
    if not isinstance(value, kind):
        msg = f"{name} must be of type {kind.__name__}, got {type(value).__name__}"
        raise ConfigTypeError(msg)
