"""What a package holds, read by ours and by coremltools, for tests to compare."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, TypeAlias

import coremltools as ct
import coremltools.optimize.coreml as cto
import numpy as np
from coremltools.converters.mil.frontend.milproto.load import load as load_mil

from milpress.formats import Compressed
from milpress.mil import values
from milpress.mil.decode import is_constexpr, is_part
from milpress.mil.graph import Graph, Node
from milpress.mil.package import Package


def decoded(path: Path) -> dict[str, np.ndarray]:
    """Return every weight of a package, as ours decodes it."""
    package = Package(path)
    return {
        weight.name: graph.decoder.dense(weight.node).values
        for graph in package.graphs
        for weight in graph.weights
    }


def stored(path: Path) -> dict[str, Compressed]:
    """Return what each compressed weight of a package is stored as."""
    package = Package(path)
    found = {}
    for graph in package.graphs:
        decoder = graph.decoder
        for weight in graph.weights:
            if is_constexpr(weight.node):
                value = decoder.value(weight.node)
                assert value is not None
                found[weight.name] = value
    return found


def decoded_by_coremltools(path: Path, function: str = "main") -> dict[str, np.ndarray]:
    """Return every weight of a package, as coremltools loads, type-checks and decodes it."""
    model = ct.models.MLModel(str(path), skip_model_load=True)
    program = load_mil(
        model.get_spec(),
        specification_version=model.get_spec().specificationVersion,
        file_weights_dir=model.weights_dir,
    )
    found = {}
    queue = list(program.functions[function].operations)
    while queue:
        op = queue.pop()
        for block in op.blocks:
            queue.extend(block.operations)
        is_stored = op.op_type == "const" or op.op_type.startswith("constexpr_")
        if is_stored and len(op.outputs) == 1:
            value = op.outputs[0].val
            if value is None:
                value = op.materialized_val_inference()
            found[op.outputs[0].name] = np.asarray(value)
    return found


def decompressed_by_coremltools(path: Path) -> dict[str, np.ndarray]:
    """Return every weight of a package after coremltools' own decompress_weights."""
    model = cto.decompress_weights(ct.models.MLModel(str(path), skip_model_load=True))
    found = {}
    queue = list(model._mil_program.functions["main"].operations)
    while queue:
        op = queue.pop()
        for block in op.blocks:
            queue.extend(block.operations)
        if op.op_type == "const" and isinstance(op.outputs[0].val, np.ndarray):
            found[op.outputs[0].name] = op.outputs[0].val
    return found


def assert_coremltools_agrees(path: Path, decode: Any = decoded_by_coremltools) -> None:
    theirs = decode(path)
    for name, ours in decoded(path).items():
        if name in theirs:
            assert ours.dtype == theirs[name].dtype, name
            assert ours.tobytes() == np.ascontiguousarray(theirs[name]).tobytes(), name
        else:  # its passes keep one of equal constants
            assert any(np.array_equal(ours, other) for other in theirs.values()), name


Form: TypeAlias = tuple[str, dict[str, Any], list[Any]]


def forms(path: Path) -> dict[str, Form]:
    """Return how each weight is compressed: type, parameters and outputs of its op, by its name.

    A parameter is its element type and shape, or the form of the op that makes it, with its name;
    the numbers in that follow no order with coremltools, and are left out.
    """
    (graph,) = Package(path).graphs
    return {
        node.name: _form(graph, node)
        for node in graph.nodes
        if is_constexpr(node) and not is_part(node)
    }


def _form(graph: Graph, node: Node) -> Form:
    parameters: dict[str, Any] = {
        key: _kind(value.type) for key, value in node.op.attributes.items() if key != "name"
    }
    for key in node.op.inputs:
        found = graph.producer(node, key)
        if graph.constant(node, key) is None and found is not None:
            parameters[key] = (re.sub(r"\d+", "N", found[0].op_name), *_form(graph, found[0]))
        else:
            parameters[key] = _kind(graph.value_type(node, key))
    return node.op.type, parameters, [_kind(output.type) for output in node.op.outputs]


def _kind(value_type: Any) -> tuple[str, tuple[int | None, ...]]:
    tensor = values.type_of(value_type)
    assert tensor is not None
    return tensor.dtype.name, tensor.shape


def ops_of(path: Path) -> list[tuple[str, list[str], list[str], list[str]]]:
    """Return what each op is, with its parameters, in order; how values are stored aside."""
    (graph,) = Package(path).graphs
    return [
        (
            node.op.type,
            sorted(node.op.attributes),
            sorted(node.op.inputs),
            [output.name for output in node.op.outputs],
        )
        for node in graph.nodes
    ]
