"""Calls of coremltools that reach Core ML."""

from __future__ import annotations

from typing import Any

import numpy as np

from milpress.engines.mac import Mac
from milpress.errors import DependencyError, DriverError


class CoreML:
    """The calls, so that tests can stand in for Core ML."""

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
    """Raise `DriverError` if this is no Mac."""
    if not mac.is_here:
        msg = (
            "the driver coreml needs a Mac, as Core ML is there alone; the driver interpreter runs "
            "anywhere, as a reference and not for speed"
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
            "a model that takes images needs Pillow to run; install it with: "
            "pip install 'milpress[images]'"
        )
        raise DependencyError(msg) from error

    if is_float:
        return Image.fromarray(np.asarray(array, np.float32), "F")
    return Image.fromarray(np.asarray(array).round().clip(0, 255).astype(np.uint8))
