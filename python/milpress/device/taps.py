"""Values inside a model as Core ML computes them on this Mac: they are made outputs of a copy."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from milpress.device import inputs as files
from milpress.device.drivers._mac import Mac
from milpress.device.drivers.coreml import CoreML, check_is_mac, image, plain
from milpress.errors import DriverError
from milpress.mil.package import Package
from milpress.mil.taps import expose

if TYPE_CHECKING:
    from milpress.interpreter import Feature


class CoreMLTaps:
    """Shows values inside a package as Core ML computes them.

    A copy of the package, in which the values are outputs more, is compiled and loaded once for
    each choice of values, and kept until the end. As Core ML can't give out all that it computes,
    what it would otherwise fuse may be rounded in between.

    Parameters
    ----------
    package
        An open package; what was changed in its model counts.
    functions
        Name of the function that is run of each program, by the program's place.
    units
        Name of coremltools' ``ComputeUnit``.
    core_ml, mac
        What is asked; others than the real ones make all values fake.

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
        self._folder = tempfile.TemporaryDirectory(prefix="milpress-taps-")
        self._loaded: dict[tuple[str, ...], tuple[Any, dict[str, str]]] = {}
        self._function = functions.get(())
        description = files.description_of(package, self._function)
        self._is_stateful = bool(description.state)
        self.inputs: tuple[Feature, ...] = files.features_of(package, self._function)
        self.notes: tuple[str, ...] = ()

    def __enter__(self) -> CoreMLTaps:
        return self

    def __exit__(self, *_: object) -> None:
        self._loaded.clear()
        self._folder.cleanup()

    def look(
        self, sample: Mapping[str, Any], taps: Sequence[str], observe: Callable[[str, Any], None]
    ) -> None:
        """Predict a sample, and show each tapped value by its name, as an array of float32.

        Raises
        ------
        InputError
            If the model can't take the sample.
        UnsupportedError
            If a value can't be an output.
        DriverError
            If Core ML fails.
        """
        given = self._given(sample)
        key = tuple(taps)
        if key not in self._loaded:
            self._loaded[key] = self._load(key)
        model, names = self._loaded[key]
        with self._named():
            state = self._core_ml.make_state(model) if self._is_stateful else None
            made = self._core_ml.predict(model, given, state)
        for output, tap in names.items():
            observe(tap, np.asarray(made[output], np.float32))

    def _load(self, taps: tuple[str, ...]) -> tuple[Any, dict[str, str]]:
        from milpress.compression import save_package

        copy, names = expose(self._package, self._functions, taps)
        stem = Path(self._folder.name) / f"taps-{len(self._loaded)}"
        path = stem.with_suffix(".mlpackage")
        save_package(copy, path, verify=False)
        # Naming the function takes macOS 15, which only models with several need.
        several = self._function is not None and len(self._package.programs[0].functions) > 1
        with self._named():
            compiled = self._core_ml.compile(str(path), str(stem.with_suffix(".mlmodelc")))
            model = self._core_ml.load(compiled, self._units, self._function if several else None)
        return model, names

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Say of an error of Core ML which package it is about."""
        try:
            yield
        except RuntimeError as error:
            msg = f"{self._package.path}: Core ML must be able to run the model, got: {error}"
            raise DriverError(msg) from error

    def _given(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        from milpress.interpreter.features import check_names, given_back, taken

        check_names(self.inputs, sample)
        found = {}
        for feature in self.inputs:
            value = sample.get(feature.name)
            if value is None:
                continue
            array = given_back(feature, taken(feature, value)).numpy()
            is_float = feature.layout == "gray float16"
            made = image(array, is_float) if feature.kind == "image" else plain(array)
            found[feature.name] = made
        return found
