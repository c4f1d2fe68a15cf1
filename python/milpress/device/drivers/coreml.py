"""Driver for Core ML on this Mac.

Pitfalls that are handled here:

- Core ML's own time of a prediction leaves out conversion from and to Python. Both are told.
- ``CompiledMLModel`` loads an ``.mlmodelc``; ``MLModel`` would compile the package at each load.
- ``CompiledMLModel`` has no durations; the object that it wraps has.
- ``predict`` takes arrays of float32 and int32; it converts float16 itself, in the dictionary that
  it is given. So conversion is done before.
- ``predict`` holds Python's lock, so threads can't predict at once; a list of samples can.
"""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

from milpress.device.drivers import Driver, ms_of, ms_since
from milpress.engines.calls import CoreML, check_is_mac, image, plain
from milpress.engines.mac import Mac
from milpress.mil.package import Package, description_of
from milpress.plain.arrays import Arrays

_DEVICES = {
    "MLCPUComputeDevice": "cpu",
    "MLGPUComputeDevice": "gpu",
    "MLNeuralEngineComputeDevice": "neural_engine",
}
# What stores a weight and is not run.
_CONSTANTS = ("const", "constexpr_")
# Of the color spaces in a model's description.
_GRAY_FLOAT16 = 40


class CoreMLDriver(Driver):
    """Measures an ``.mlpackage`` on this Mac.

    Parameters
    ----------
    function
        Which function of a package with several.
    core_ml, mac
        The framework and the machine; tests put others in their place, and all numbers are fake.

    Raises
    ------
    DriverError
        If this is no Mac.
    """

    def __init__(
        self, function: str | None = None, *, core_ml: CoreML | None = None, mac: Mac | None = None
    ) -> None:
        super().__init__()
        self._core_ml = core_ml or CoreML()
        self._mac = mac or Mac()
        self._function = function
        self._model: Any = None
        self._path = ""
        self._units = ""
        self._images: dict[str, bool] = {}
        self._is_stateful = False
        check_is_mac(self._mac)

    def describe(self) -> dict[str, Any]:
        """Return the Mac, and that what follows is measured."""
        device = self._mac.describe()
        try:
            device |= devices_of(self._core_ml.devices())
        except RuntimeError:
            # macOS before 14 does not tell. Nothing is then called a Neural Engine's.
            device |= devices_of([])
        return {
            "kind": "measured" if self._core_ml.is_real else "fake",
            "device": device,
            "tool": {"coremltools": self._core_ml.version},
        }

    def compile(self, package: str, units: str, folder: str) -> dict[str, Any]:
        """Compile a package to a path at which nothing has ever been loaded."""
        del units
        self._look_at(package)
        destination = str(Path(folder) / f"{Path(package).stem}.mlmodelc")
        started = time.perf_counter()
        path = self._core_ml.compile(package, destination)
        return {"ms": ms_since(started), "path": path}

    def load(self, path: str, units: str) -> dict[str, Any]:
        """Load, and return Core ML's own time of it."""
        self._path, self._units = path, units
        self._model = self._core_ml.load(path, units, self._function)
        return {"ms": ms_of(self._core_ml.load_duration(self._model))}

    def predict(self, n: int) -> dict[str, Any]:
        """Predict the samples in turn."""
        core, e2e = [], []
        # Made before the clock starts, as an app would have them.
        for data in [self._features(sample) for sample in self._in_turn(n)]:
            state = self._state()
            started = time.perf_counter()
            self._core_ml.predict(self._model, data, state)
            e2e.append(ms_since(started))
            core.append(self._duration())
        return {"core_ms": None if None in core else core, "e2e_ms": e2e}

    def output(self, sample: Arrays) -> Any:
        """Predict one sample."""
        return self._core_ml.predict(self._model, self._features(sample), self._state())

    def _duration(self) -> float | None:
        return ms_of(self._core_ml.predict_duration(self._model))

    def memory(self) -> dict[str, Any]:
        """Return the footprint of this process."""
        footprint = self._mac.footprint()
        if footprint is None:
            return {}
        n_bytes, peak = footprint
        return {"bytes": n_bytes, "peak": peak, "method": "task_info phys_footprint"}

    def thermal(self) -> dict[str, Any]:
        """Return the state of the Mac."""
        return {"state": self._mac.thermal_state()}

    def placement(self) -> dict[str, Any]:
        """Return the plan, op by op."""
        plan = self._core_ml.plan(self._path, self._units)
        return {"source": "MLComputePlan", "ops": placed(plan, self._function)}

    def throughput(self, batch: int) -> dict[str, Any]:
        """Hand over a list of samples, which Core ML may run at once."""
        if self._is_stateful:
            return {"ms": None}
        taken = itertools.islice(itertools.cycle(self._samples), batch)
        data = [self._features(sample) for sample in taken]
        self._core_ml.predict(self._model, data)
        return {"ms": self._duration()}

    def energy(self, seconds: float) -> dict[str, Any]:
        """Predict for a while, and sample power meanwhile."""
        sampling = self._mac.start_power(seconds)
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            self.predict(1)
        power = self._mac.power(sampling)
        return power | {"method": "powermetrics"} if power else {}

    def _look_at(self, package: str) -> None:
        """Find out which inputs are images, and whether there are states."""
        description = description_of(Package(package).model, self._function)
        self._images = {
            each.name: each.type.imageType.colorSpace == _GRAY_FLOAT16
            for each in description.input
            if each.type.WhichOneof("choice") == "imageType"
        }
        self._is_stateful = bool(description.state)

    def _state(self) -> Any:
        return self._core_ml.make_state(self._model) if self._is_stateful else None

    def _features(self, sample: Arrays) -> dict[str, Any]:
        return {
            name: image(array, self._images[name]) if name in self._images else plain(array)
            for name, array in sample.items()
        }


def devices_of(devices: list[Any]) -> dict[str, Any]:
    """Return what of a device's description follows from what Core ML may use."""
    # By name: the classes are another's where Core ML is not the real one.
    names = [_DEVICES.get(type(each).__name__, type(each).__name__) for each in devices]
    cores = None
    for each, name in zip(devices, names, strict=True):
        if name == "neural_engine":
            cores = int(each.total_core_count)
    return {"compute_devices": sorted(set(names)), "neural_engine_cores": cores}


def placed(plan: Any, function: str | None) -> list[dict[str, Any]]:
    """Return where each op of a plan is to run, those in nested blocks included."""
    program = plan.model_structure.program
    if program is None:
        return []
    functions = program.functions
    chosen = functions.get(function or "main") or next(iter(functions.values()))
    return [_op(plan, op) for op in _operations(chosen.block)]


def _operations(block: Any) -> Any:
    for op in block.operations:
        yield op
        for inner in op.blocks or ():
            yield from _operations(inner)


def _op(plan: Any, op: Any) -> dict[str, Any]:
    # Types are prefixed by their opset, as in ios16.conv.
    kind = str(op.operator_name).rsplit(".", 1)[-1]
    usage = plan.get_compute_device_usage_for_mlprogram_operation(op)
    cost = plan.get_estimated_cost_for_mlprogram_operation(op)
    preferred, supported = "none", []
    if usage is not None and not kind.startswith(_CONSTANTS):
        preferred = _DEVICES.get(type(usage.preferred_compute_device).__name__, "none")
        supported = [
            _DEVICES[type(each).__name__]
            for each in usage.supported_compute_devices
            if type(each).__name__ in _DEVICES
        ]
    return {
        "name": str(op.outputs[0].name) if op.outputs else kind,
        "op_type": kind,
        "preferred": preferred,
        "supported": supported,
        "cost": None if cost is None else float(cost.weight),
    }
