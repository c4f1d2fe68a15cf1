"""Core ML on this Mac as an engine: intermediate values become outputs of a copy of the model."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from milpress.engines.calls import CoreML, check_is_mac, image, plain
from milpress.engines.features import features_of
from milpress.engines.mac import Mac
from milpress.errors import DriverError
from milpress.mil.expose import expose
from milpress.mil.package import Package, description_of
from milpress.mil.staging import save_changed

if TYPE_CHECKING:
    from milpress.interpreter import Feature


class CoreMLEngine:
    """Runs a package by Core ML; see `Engine`.

    A copy of the package that has the intermediate values as further outputs is compiled and loaded
    once for each choice of values, and kept until the end. What Core ML would otherwise fuse may be
    rounded in between.

    Parameters
    ----------
    package
        An open package; changes to its model count.
    functions
        Name of the function that is run of each program, by the program's place.
    units
        Name of coremltools' ``ComputeUnit``.
    core_ml, mac
        The framework and the machine; tests put others in their place.

    Raises
    ------
    DriverError
        If this is no Mac.
    """

    def __init__(
        self,
        package: Package,
        functions: Mapping[tuple[str, ...], str],
        *,
        units: str = "ALL",
        core_ml: CoreML | None = None,
        mac: Mac | None = None,
    ) -> None:
        check_is_mac(mac or Mac())
        self._package = package
        self._functions = functions
        self._units = units
        self._core_ml = core_ml or CoreML()
        self._folder = tempfile.TemporaryDirectory(prefix="milpress-core-ml-")
        self._loaded: dict[tuple[str, ...], tuple[Any, dict[str, str]]] = {}
        self._function = functions.get(())
        description = description_of(package.model, self._function)
        self._is_stateful = bool(description.state)
        self.inputs: tuple[Feature, ...] = features_of(package, self._function)
        self.notes: tuple[str, ...] = ()

    def __enter__(self) -> CoreMLEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self._loaded.clear()
        self._folder.cleanup()

    def intermediate(
        self, sample: Mapping[str, Any], names: Sequence[str], observe: Callable[[str, Any], None]
    ) -> None:
        """Run a sample, and call ``observe`` with name and float32 array of each named value.

        Raises
        ------
        InputError
            If the model can't take the sample.
        UnsupportedError
            If a value can't be an output.
        DriverError
            If Core ML fails.
        """
        features = self._features(sample)
        key = tuple(names)
        if key not in self._loaded:
            self._loaded[key] = self._load(key)
        model, exposed = self._loaded[key]
        with self._named():
            state = self._core_ml.make_state(model) if self._is_stateful else None
            outputs = self._core_ml.predict(model, features, state)
        for output, name in exposed.items():
            observe(name, np.asarray(outputs[output], np.float32))

    def _load(self, names: tuple[str, ...]) -> tuple[Any, dict[str, str]]:
        """Return the model that exposes some values, and their names by those of its outputs."""
        copy, exposed = expose(self._package, self._functions, names)
        stem = Path(self._folder.name) / str(len(self._loaded))
        path = stem.with_suffix(".mlpackage")
        save_changed(copy, path)
        # Naming the function takes macOS 15, which only models with several need.
        several = self._function is not None and len(self._package.programs[0].functions) > 1
        with self._named():
            compiled = self._core_ml.compile(str(path), str(stem.with_suffix(".mlmodelc")))
            model = self._core_ml.load(compiled, self._units, self._function if several else None)
        return model, exposed

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Name the package in an error of Core ML."""
        try:
            yield
        except RuntimeError as error:
            msg = f"{self._package.path}: Core ML can't run the model: {error}"
            raise DriverError(msg) from error

    def _features(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        from milpress.interpreter.features import check_names, given_back, taken

        check_names(self.inputs, sample)
        values = {}
        for feature in self.inputs:
            value = sample.get(feature.name)
            if value is None:
                continue
            array = given_back(feature, taken(feature, value)).numpy()
            is_float = feature.layout == "gray float16"
            values[feature.name] = (
                image(array, is_float) if feature.kind == "image" else plain(array)
            )
        return values
