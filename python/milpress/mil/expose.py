"""Packages that give out values inside: a copy of one, with outputs more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NoReturn

from milpress.errors import UnsupportedError
from milpress.mil import dtypes, proto, values
from milpress.mil.graph import Graph, new_const, new_op
from milpress.mil.package import Package, description_of, pipeline_models

_FLOAT32 = dtypes.by_name("float32")
# Of ArrayFeatureType: FLOAT32.
_ARRAY_OF_FLOAT32 = 65568
_MAX_RANK = 5


def expose(
    package: Package, functions: Mapping[tuple[str, ...], str], taps: Sequence[str]
) -> tuple[Package, dict[str, str]]:
    """Return a copy of an open package that gives out values, and these by its new outputs' names.

    Each is given out as an array of float32. In memory alone; the weights are the package's.

    Parameters
    ----------
    package
        The package; what was changed in its model counts.
    functions
        Name of the function that is run of each program, by the program's place.
    taps
        Names of computed floats; in a pipeline after the names of their models and slashes.

    Raises
    ------
    UnsupportedError
        If a value is of a nested block, or its rank is that of no output.
    """
    copy = Package(package.path, model_bytes=package.model.SerializeToString())
    copy.retyped = dict(package.retyped)
    shown: dict[str, str] = {}
    for program in copy.programs:
        prefix = "".join(f"{part}/" for part in program.place)
        own = {tap: tap.removeprefix(prefix) for tap in taps if tap.startswith(prefix)}
        if not own:
            continue
        name = functions[program.place]
        outputs = _outputs(program.functions[name], own, first=len(shown))
        for container in _around(copy.model, program.place):
            for output, (_, shape) in outputs.items():
                _describe(description_of(container, name), output, shape)
        shown |= {output: tap for output, (tap, _) in outputs.items()}
    return copy, shown


def _outputs(
    function: proto.Function, wanted: Mapping[str, str], *, first: int
) -> dict[str, tuple[str, tuple[int | None, ...]]]:
    """Add outputs to a function; return the tap that each shows, and its shape."""
    block = function.block_specializations[function.opset]
    graph = Graph(function, block)
    outer = graph.scopes[0]
    outputs: dict[str, tuple[str, tuple[int | None, ...]]] = {}
    for tap, name in wanted.items():
        definition = outer.find(name)
        kind = None if definition is None else values.type_of(definition[1])
        if definition is None or kind is None:
            _refuse(tap, "be outside of nested blocks")
        if not 1 <= len(kind.shape) <= _MAX_RANK:
            _refuse(tap, f"have 1 to {_MAX_RANK} dimensions")
        output = graph.unique_name(f"milpress_tap_{first + len(outputs)}")
        op = new_op("identity" if kind.dtype == _FLOAT32 else "cast", output, x=name)
        op.outputs[0].type.CopyFrom(definition[1])
        op.outputs[0].type.tensorType.dataType = _FLOAT32.mil
        if op.type == "cast":
            const = new_const(graph.unique_name(f"{output}_dtype_0"), values.string("fp32"))
            op.inputs["dtype"].arguments.add(name=const.outputs[0].name)
            block.operations.append(const)
        block.operations.append(op)
        block.outputs.append(output)
        outputs[output] = tap, kind.shape
    return outputs


def _refuse(tap: str, what: str) -> NoReturn:
    msg = f"{tap}: a value that Core ML is to show must {what}; the interpreter shows any"
    raise UnsupportedError(msg)


def _around(model: proto.Model, place: tuple[str, ...]) -> Iterator[proto.Model]:
    """Yield the model, and those in it on the way to a program."""
    yield model
    if place:
        yield from _around(dict(pipeline_models(model))[place[0]], place[1:])


def _describe(
    description: proto.ModelDescription | proto.FunctionDescription,
    name: str,
    shape: tuple[int | None, ...],
) -> None:
    item = description.output.add(name=name)
    item.type.multiArrayType.dataType = _ARRAY_OF_FLOAT32
    if None not in shape:
        item.type.multiArrayType.shape.extend(size for size in shape if size is not None)
