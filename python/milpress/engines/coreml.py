"""Values inside a model as Core ML computes them on this Mac: they are made outputs of a copy."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from milpress.engines import inputs as files
from milpress.engines.mac import Mac
from milpress.errors import DependencyError, DriverError
from milpress.mil.expose import expose
from milpress.mil.package import Package
from milpress.mil.staging import save_changed

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
        copy, names = expose(self._package, self._functions, taps)
        stem = Path(self._folder.name) / f"taps-{len(self._loaded)}"
        path = stem.with_suffix(".mlpackage")
        save_changed(copy, path)
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


class CoreML:
    """The calls of coremltools that reach Core ML."""

    is_real = True

    @property
    def version(self) -> str:
        """Of coremltools."""
        import coremltools as ct

        return str(ct.__version__)

    def compile(self, package: str, destination: str) -> str:
        """Make an ``.mlmodelc`` of an ``.mlpackage``."""
        from coremltools.models.utils import compile_model

        return str(compile_model(package, destination_path=destination))

    def load(self, path: str, units: str, function: str | None) -> Any:
        """Load an ``.mlmodelc``."""
        import coremltools as ct
        from coremltools.models import CompiledMLModel

        return CompiledMLModel(path, compute_units=ct.ComputeUnit[units], function_name=function)

    def predict(self, model: Any, data: Any, state: Any = None) -> Any:
        """Predict one sample, or a list of them at once."""
        return model.predict(data, state=state)

    def make_state(self, model: Any) -> Any:
        """Return a new state."""
        return model.make_state()

    def load_duration(self, model: Any) -> int | None:
        """Nanoseconds of the load, by Core ML."""
        duration: int | None = model._proxy.get_load_duration_in_nano_seconds()
        return duration

    def predict_duration(self, model: Any) -> int | None:
        """Nanoseconds of the last prediction, by Core ML."""
        duration: int | None = model._proxy.get_last_predict_duration_in_nano_seconds()
        return duration

    def plan(self, path: str, units: str) -> Any:
        """Return the plan for an ``.mlmodelc``."""
        import coremltools as ct
        from coremltools.models.compute_plan import MLComputePlan

        return MLComputePlan.load_from_path(path=path, compute_units=ct.ComputeUnit[units])

    def devices(self) -> list[Any]:
        """Return what Core ML may use."""
        from coremltools.models import MLModel

        return list(MLModel.get_available_compute_devices())


def check_is_mac(mac: Mac) -> None:
    """Raise if this is no Mac.

    Raises
    ------
    DriverError
        If this is no Mac.
    """
    if not mac.is_here:
        msg = (
            "the driver coreml must run on a Mac, as Core ML is there alone, got another system; "
            "the driver interpreter runs anywhere, as a reference and not for speed"
        )
        raise DriverError(msg)


def plain(array: Any) -> Any:
    """Return numbers as the array that coremltools takes."""
    array = np.asarray(array)
    return np.ascontiguousarray(array, np.float32 if array.dtype.kind == "f" else np.int32)


def image(array: Any, is_float: bool) -> Any:
    """Return pixels as the image that coremltools takes; gray ones may be floats."""
    try:
        from PIL import Image  # type: ignore[import-not-found, unused-ignore]
    except ModuleNotFoundError as error:
        msg = (
            "a model that takes images must have Pillow to run, got none; install it with: "
            "pip install 'milpress[images]'"
        )
        raise DependencyError(msg) from error

    if is_float:
        return Image.fromarray(np.asarray(array, np.float32), "F")
    return Image.fromarray(np.asarray(array).round().clip(0, 255).astype(np.uint8))
