"""The samples that every configuration of a run is given, and outputs, as files."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from milpress.errors import UnsupportedError, UnsupportedOpError
from milpress.mil.package import Package
from milpress.plain.files import system_errors

if TYPE_CHECKING:
    from milpress.interpreter import Feature
    from milpress.samples.data import Data

Arrays: TypeAlias = dict[str, NDArray[Any]]
# Its functions have no types.
_formats: Any = np.lib.format


def features(source: str | Path, function: str | None = None) -> tuple[Feature, ...]:
    """Return the inputs of a package, also of one that the interpreter can't run.

    Raises
    ------
    PackageError
        If it is no package of ML programs.
    DependencyError
        If torch is not installed.
    """
    return features_of(Package(source), function)


def features_of(package: Package, function: str | None = None) -> tuple[Feature, ...]:
    """Return the inputs of an open package, as `features` does."""
    from milpress.interpreter import load
    from milpress.mil.features import described
    from milpress.mil.values import type_of

    try:
        found = load(package, function).inputs
    except UnsupportedOpError:
        if package.model.WhichOneof("choice") != "mlProgram":
            raise
    else:
        for feature in found:
            if feature.origin:
                msg = (
                    f"{package.path}: a benchmark must give the package's own inputs, got "
                    f"{feature.name}, {feature.origin}"
                )
                raise UnsupportedError(msg)
        return tuple(feature for feature in found if not feature.is_unused)
    described_by = description_of(package, function)
    name = function or package.model.description.defaultFunctionName or "main"
    types = {item.name: type_of(item.type) for item in package.programs[0].functions[name].inputs}
    return tuple(described(item, types[item.name]) for item in described_by.input)


def description(source: str | Path, function: str | None = None) -> Any:
    """Return the description of a package's inputs, outputs and states."""
    return description_of(Package(source), function)


def description_of(package: Package, function: str | None) -> Any:
    """Return the description of an open package's inputs, outputs and states."""
    whole = package.model.description
    name = function or whole.defaultFunctionName
    return next((each for each in whole.functions if each.name == name), whole)


def write_samples(
    source: str | Path, data: Data, path: Path, *, function: str | None = None
) -> tuple[int, bool, str]:
    """Write the samples for a package to a file: their number, whether random, and their hash."""
    from milpress.samples.data import Samples

    samples = Samples(data, features(source, function))
    write(path, samples)
    return len(samples), samples.is_random, hashlib.sha256(path.read_bytes()).hexdigest()


def write(path: Path, samples: Iterable[Mapping[str, Any]]) -> None:
    """Write samples, or outputs, to a file."""
    arrays = {
        f"{i}/{name}": array
        for i, sample in enumerate(samples)
        for name, array in numbers(sample).items()
    }
    # Not by np.savez, which puts times into the file and can't take every name.
    with system_errors(path), zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        for name, array in arrays.items():
            with file.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                _formats.write_array(member, array, allow_pickle=False)


def read(path: str | Path) -> list[Arrays]:
    """Return what `write` wrote."""
    found: dict[int, Arrays] = {}
    with np.load(path, allow_pickle=False) as file:
        for key in file.files:
            i, _, name = key.partition("/")
            found.setdefault(int(i), {})[name] = file[key]
    return [found[i] for i in sorted(found)]


def numbers(outputs: Mapping[str, Any]) -> Arrays:
    """Return the outputs that are numbers; of probabilities by label, in the order of labels."""
    found: Arrays = {}
    for name, value in outputs.items():
        if isinstance(value, Mapping):
            found[name] = np.array([value[label] for label in sorted(value, key=str)])
            continue
        array = np.asarray(value)
        if array.dtype.kind in "fiub":
            found[name] = array
    return found
