"""A stand-in for Core ML that holds every call to coremltools' signature, and fails on request.

Run as a script it is the process of a session; what fails is said for each choice of units:
``core_ml_stub.py '{"CPU_AND_NE": {"load": "error"}}'``. It is light, as many are started; calls are
held to signatures only where coremltools is loaded anyway.
"""

from __future__ import annotations

import inspect
import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from milpress.device.drivers.coreml import CoreMLDriver
from milpress.engines.calls import CoreML
from milpress.engines.mac import Mac


class MLCPUComputeDevice:
    pass


class MLGPUComputeDevice:
    pass


class MLNeuralEngineComputeDevice:
    total_core_count = 16


DEVICES = {
    "cpu": MLCPUComputeDevice(),
    "gpu": MLGPUComputeDevice(),
    "neural_engine": MLNeuralEngineComputeDevice(),
}


class Model:
    """What ``CompiledMLModel`` is, as far as the driver may know."""

    def __init__(self, fail: dict[str, str]) -> None:
        self._fail = fail
        self._proxy = SimpleNamespace(
            get_load_duration_in_nano_seconds=lambda: (
                None
                if fail.get("load") == "none"
                else 0
                if fail.get("load") == "zero"
                else 5_000_000
            ),
            get_last_predict_duration_in_nano_seconds=lambda: (
                None if fail.get("predict") == "none" else 250_000
            ),
        )

    def predict(self, data: Any, state: Any = None) -> Any:
        held("CompiledMLModel.predict", self, data, state=state)
        play(self._fail, "predict")
        assert state is None
        if isinstance(data, list):
            return [self.predict(each) for each in data]
        assert isinstance(data, dict)
        for name, value in data.items():
            if value.dtype == np.float16:
                # coremltools does so, in the caller's dictionary.
                data[name] = value.astype(np.float32)
        return {"sum": np.float32([value.sum() for value in data.values()])}


class StubCoreML(CoreML):
    """Core ML without Core ML."""

    is_real = False

    def __init__(self, fail: dict[str, str] | None = None, devices: str = "cpu gpu neural_engine"):
        self._fail = {} if fail is None else fail
        self._devices = devices.split()
        self.calls: list[str] = []

    def compile(self, package: str, destination: str) -> str:
        held("compile_model", package, destination_path=destination)
        assert destination.endswith(".mlmodelc")
        assert not Path(destination).exists()
        play(self._fail, "compile")
        self.calls.append("compile")
        Path(destination).symlink_to(package)
        return destination

    def load(self, path: str, units: str, function: str | None) -> Any:
        held("CompiledMLModel", path, compute_units=units, function_name=function)
        play(self._fail, "load")
        self.calls.append("load")
        return Model(self._fail)

    def plan(self, path: str, units: str) -> Any:
        held("MLComputePlan.load_from_path", path=path, compute_units=units)
        play(self._fail, "plan")
        if self._fail.get("plan") == "none":
            return Plan([], self._devices)
        ops = [("ios16.constexpr_lut_to_dense", "w"), ("ios15.conv", "a"), ("ios17.softmax", "b")]
        return Plan(ops, self._devices)

    def devices(self) -> list[Any]:
        play(self._fail, "devices")
        held("MLModel.get_available_compute_devices")
        return [DEVICES[name] for name in self._devices]


class Plan:
    def __init__(self, ops: list[tuple[str, str]], devices: list[str]) -> None:
        self._devices = devices
        operations = [
            SimpleNamespace(operator_name=kind, outputs=[SimpleNamespace(name=name)], blocks=[])
            for kind, name in ops
        ]
        block = SimpleNamespace(operations=operations)
        program = SimpleNamespace(functions={"main": SimpleNamespace(block=block)})
        self.model_structure = SimpleNamespace(program=program if ops else None)

    def get_compute_device_usage_for_mlprogram_operation(self, operation: Any) -> Any:
        if "const" in operation.operator_name:
            return None
        preferred = self._devices[-1] if "conv" in operation.operator_name else "cpu"
        return SimpleNamespace(
            preferred_compute_device=DEVICES[preferred],
            supported_compute_devices=[DEVICES[name] for name in self._devices],
        )

    def get_estimated_cost_for_mlprogram_operation(self, operation: Any) -> Any:
        if "const" in operation.operator_name:
            return None
        return SimpleNamespace(weight=0.75 if "conv" in operation.operator_name else 0.25)


class StubMac(Mac):
    """A Mac without a Mac."""

    def __init__(self, fail: dict[str, str] | None = None) -> None:
        self._fail = {} if fail is None else fail

    @property
    def is_here(self) -> bool:
        return True

    def describe(self) -> dict[str, Any]:
        return {
            "model": "Stub1,1",
            "chip": "Stub",
            "os": "macOS 15.0",
            "os_build": "0",
            "is_virtual": None,
            "low_power": None,
            "on_battery": None,
        }

    def footprint(self) -> tuple[int, int | None] | None:
        play(self._fail, "memory")
        return None if self._fail.get("memory") == "none" else (1_000_000, 2_000_000)

    def thermal_state(self) -> str | None:
        play(self._fail, "thermal")
        return "nominal"

    def start_power(self, seconds: float) -> Any:
        return None

    def power(self, sampling: Any) -> dict[str, Any]:
        return {}


def play(fail: dict[str, str], call: str) -> None:
    """Do what was asked for at a call."""
    event = fail.get(call)
    if event == "error":
        # What CoreMLPython throws, by pybind11.
        msg = f"Error: {call}: Unable to build the model execution plan, error code: -14."
        raise RuntimeError(msg)
    if event == "memory":
        raise MemoryError
    if event == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if event == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if event == "hang":
        signal.pause()


def held(name: str, *arguments: Any, **named: Any) -> None:
    """Bind arguments to the signature of a function of coremltools."""
    if "coremltools" not in sys.modules:
        return
    from coremltools.models import CompiledMLModel, MLModel
    from coremltools.models.compute_plan import MLComputePlan
    from coremltools.models.utils import compile_model

    known = {
        "compile_model": compile_model,
        "CompiledMLModel": CompiledMLModel,
        "CompiledMLModel.predict": CompiledMLModel.predict,
        "MLComputePlan.load_from_path": MLComputePlan.load_from_path,
        "MLModel.get_available_compute_devices": MLModel.get_available_compute_devices,
    }
    inspect.signature(known[name]).bind(*arguments, **named)


if __name__ == "__main__":
    from milpress.device.worker import serve

    by_units: dict[str, dict[str, str]] = json.loads(sys.argv[1])
    events: dict[str, str] = {}

    class Driver(CoreMLDriver):
        """Learns from the first request in which units it runs, and so what fails."""

        def compile(self, package: str, units: str, folder: str) -> dict[str, Any]:
            events.update(by_units.get(units, {}))
            return super().compile(package, units, folder)

        def load(self, path: str, units: str) -> dict[str, Any]:
            events.update(by_units.get(units, {}))
            return super().load(path, units)

    serve(Driver(core_ml=StubCoreML(events), mac=StubMac(events)))
