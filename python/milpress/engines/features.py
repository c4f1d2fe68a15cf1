"""Features of a package: its inputs, outputs and states."""

from __future__ import annotations

from typing import TYPE_CHECKING

from milpress.errors import UnsupportedError, UnsupportedOpError
from milpress.mil.package import Package, description_of

if TYPE_CHECKING:
    from milpress.interpreter import Feature


def features_of(package: Package, function: str | None = None) -> tuple[Feature, ...]:
    """Return the inputs of a package, also of one that the interpreter can't run.

    Raises
    ------
    UnsupportedError
        If an input would come from a stage of a pipeline that can't be run.
    DependencyError
        If torch is not installed.
    """
    from milpress.interpreter import load
    from milpress.mil.features import described
    from milpress.mil.values import type_of

    try:
        inputs = load(package, function).inputs
    except UnsupportedOpError:
        if package.model.WhichOneof("choice") != "mlProgram":
            raise
    else:
        for feature in inputs:
            if feature.origin:
                msg = (
                    f"{package.path}: a benchmark must give the package's own inputs, got "
                    f"{feature.name}, {feature.origin}"
                )
                raise UnsupportedError(msg)
        return tuple(feature for feature in inputs if not feature.is_unused)
    name = function or package.model.description.defaultFunctionName or "main"
    types = {item.name: type_of(item.type) for item in package.programs[0].functions[name].inputs}
    return tuple(
        described(item, types[item.name]) for item in description_of(package.model, function).input
    )
