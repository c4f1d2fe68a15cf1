"""What a package holds, read by ours and by coremltools, for tests to compare."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from milpress.mil.constexpr import Decoder
from milpress.mil.package import Package
from milpress.mil.weights import sites, weights

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import coremltools as ct
    import coremltools.optimize.coreml as cto
    from coremltools.converters.mil.frontend.milproto.load import load as load_mil


def decoded(path: Path) -> dict[str, np.ndarray]:
    """Return every weight of a package, as ours decodes it."""
    package = Package(path)
    return {
        weight.name: Decoder(site.graph, package).dense(weight.node).values
        for site in sites(package)
        for weight in weights(site.prefix, site.graph)
    }


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
        assert ours.dtype == theirs[name].dtype, name
        assert ours.tobytes() == np.ascontiguousarray(theirs[name]).tobytes(), name


def ops_of(path: Path) -> list[tuple[str, list[str], list[str], list[str]]]:
    """Return what each op is, with its parameters, in order; how values are stored aside."""
    (site,) = sites(Package(path))
    return [
        (
            node.op.type,
            sorted(node.op.attributes),
            sorted(node.op.inputs),
            [output.name for output in node.op.outputs],
        )
        for node in site.graph.nodes
    ]
