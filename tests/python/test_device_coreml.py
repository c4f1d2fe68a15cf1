"""The drivers for Apple's devices, as far as can be known without one.

Calls are held to the signatures of the installed coremltools: that shows that they are made as it
takes them, not that Core ML does what it should. A stub fails in each way that is documented.
"""

from __future__ import annotations

import ast
import asyncio
import dataclasses
import inspect
import json
import plistlib
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import core_ml_stub
import coremltools as ct
import numpy as np
import pytest
from core_ml_stub import StubCoreML, StubMac
from coremltools.models import CompiledMLModel, MLModel
from coremltools.models.compute_plan import MLComputePlan
from coremltools.models.ml_program.experimental.async_wrapper import MLModelAsyncWrapper
from coremltools.models.ml_program.experimental.remote_device import (
    AppSigningCredentials,
    Device,
    DeviceType,
)
from coremltools.models.utils import compile_model

from milpress import device, errors
from milpress.device import evidence, schema
from milpress.device.drivers import coreml, iphone
from milpress.device.drivers.coreml import CoreMLDriver
from milpress.device.sessions import ProcessSession
from milpress.engines.calls import CoreML, plain
from milpress.engines.mac import Mac, power_of
from milpress.samples.files import read_samples, write_samples

# Each call in the drivers to coremltools, and what it is a call of.
CALLS: dict[tuple[str, str], Any] = {
    ("CoreML.compile", "compile_model"): compile_model,
    ("CoreML.load", "CompiledMLModel"): CompiledMLModel,
    ("CoreML.plan", "load_from_path"): MLComputePlan.load_from_path,
    ("CoreML.devices", "get_available_compute_devices"): MLModel.get_available_compute_devices,
    ("CoreML.predict", "predict"): lambda data, state=None: None,
    ("CoreML.make_state", "make_state"): lambda: None,
    ("RemoteCoreML.connected", "get_connected_devices"): Device.get_connected_devices,
    ("RemoteCoreML.prepare", "AppSigningCredentials"): AppSigningCredentials,
    ("RemoteCoreML.prepare", "prepare_for_model_debugging"): (
        lambda credentials=None, working_directory=None, clean=False: None
    ),
    ("RemoteCoreML.model", "from_spec_or_path"): MLModelAsyncWrapper.from_spec_or_path,
}


def calls(kind: type, method: str) -> dict[str, ast.Call]:
    """Return the calls in a method by the name of what is called."""
    source = textwrap.dedent(inspect.getsource(getattr(kind, method)))
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return {
        node.func.attr
        if isinstance(node.func, ast.Attribute)
        else getattr(node.func, "id", ""): node
        for node in found
    }


@pytest.mark.parametrize(("place", "target"), CALLS.items(), ids=map("-".join, CALLS))
def test_a_call_binds_to_the_signature_of_coremltools(place, target):
    owner, method = place[0].split(".")
    kind = {"CoreML": CoreML, "RemoteCoreML": iphone.RemoteCoreML}[owner]
    call = calls(kind, method)[place[1]]
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    assert None not in keywords
    inspect.signature(target).bind(*call.args, **keywords)


@pytest.mark.parametrize(
    ("stands_for", "target"),
    [
        (CALLS["CoreML.predict", "predict"], CompiledMLModel.predict),
        (CALLS["CoreML.make_state", "make_state"], CompiledMLModel.make_state),
        (
            CALLS["RemoteCoreML.prepare", "prepare_for_model_debugging"],
            Device.prepare_for_model_debugging,
        ),
    ],
    ids=["predict", "make_state", "prepare_for_model_debugging"],
)
def test_methods_take_what_was_thought(stands_for, target):
    _, *taken = inspect.signature(target).parameters.values()
    wanted = inspect.signature(stands_for).parameters.values()
    assert [(each.name, each.default) for each in taken] == [
        (each.name, each.default) for each in wanted
    ]


def test_attributes_that_the_drivers_read_are_there():
    # `CompiledMLModel` keeps what has the durations in `_proxy`, by these methods.
    assert "self._proxy = _MLModelProxy(" in inspect.getsource(CompiledMLModel.__init__)
    for name in ("load_duration_in_nano_seconds", "last_predict_duration_in_nano_seconds"):
        getter = f"self.__proxy__.get_{name}()"
        assert getter in inspect.getsource(getattr(MLModel, name).fget)
        assert hasattr(MLModelAsyncWrapper, name)
    for name in ("load", "predict", "retrieve_compute_plan"):
        assert inspect.iscoroutinefunction(getattr(MLModelAsyncWrapper, name))
    assert list(inspect.signature(MLModelAsyncWrapper.predict).parameters) == [
        "self",
        "inputs",
        "state",
    ]
    assert {unit.name for unit in ct.ComputeUnit} == set(schema.APPLE_UNITS)
    assert {DeviceType.IPHONE, DeviceType.IPAD} <= set(DeviceType)
    fields = Device.__dataclass_fields__
    assert {"name", "os_version", "os_build_number"} <= set(fields)
    from coremltools.models import compute_device, compute_plan

    for name in coreml._DEVICES:
        assert hasattr(compute_device, name)
    assert isinstance(compute_device.MLNeuralEngineComputeDevice.total_core_count, property)
    for kind, names in {
        compute_plan.MLComputePlanDeviceUsage: {
            "preferred_compute_device",
            "supported_compute_devices",
        },
        compute_plan.MLComputePlanCost: {"weight"},
        compute_plan.MLModelStructure: {"program"},
        compute_plan.MLModelStructureProgram: {"functions"},
        compute_plan.MLModelStructureProgramFunction: {"block"},
        compute_plan.MLModelStructureProgramBlock: {"operations"},
        compute_plan.MLModelStructureProgramOperation: {"operator_name", "outputs", "blocks"},
        compute_plan.MLModelStructureProgramNamedValueType: {"name"},
    }.items():
        assert names <= set(kind.__dataclass_fields__)
    for name in (
        "get_compute_device_usage_for_mlprogram_operation",
        "get_estimated_cost_for_mlprogram_operation",
    ):
        assert list(inspect.signature(getattr(MLComputePlan, name)).parameters) == [
            "self",
            "operation",
        ]


def test_a_measuring_process_holds_no_framework():
    code = """
import sys
from milpress.device.worker import leave_out
leave_out("coreml")
from coremltools.models import CompiledMLModel, MLModel
from coremltools.models.compute_plan import MLComputePlan
from coremltools.models.ml_program.experimental import async_wrapper, remote_device
from coremltools.models.utils import compile_model
from milpress.device.drivers import coreml, iphone
assert not [name for name in ("torch", "sklearn") if sys.modules.get(name)]
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(sys.platform == "darwin", reason="Core ML is there")
@pytest.mark.parametrize("driver", ["coreml", "iphone"])
def test_without_a_mac_there_is_one_sentence_and_no_number(driver, crepe_tiny):
    with pytest.raises(errors.DriverError) as caught:
        device.run([crepe_tiny], driver=driver)
    assert str(caught.value) == (
        "the driver coreml needs a Mac, as Core ML is there alone; "
        "the driver interpreter runs anywhere, as a reference and not for speed"
    )


@pytest.fixture
def samples(tmp_path, crepe_tiny):
    path = tmp_path / "samples.npz"
    rng = np.random.default_rng(0)
    write_samples(path, [{"frames": rng.standard_normal((1, 1024), np.float32)} for _ in range(3)])
    return path


@pytest.fixture
def started(tmp_path, crepe_tiny, samples):
    """Return a function that makes a driver with a loaded model."""

    def start(**fail: str) -> CoreMLDriver:
        driver = CoreMLDriver(core_ml=StubCoreML(fail), mac=StubMac(fail))
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        found = driver.compile(str(crepe_tiny), "CPU_AND_NE", str(folder))
        assert found["ms"] >= 0
        driver.feed(str(samples))
        assert driver.load(found["path"], "CPU_AND_NE") == {
            "ms": {"none": None, "zero": 0.0}.get(fail.get("load", ""), 5.0)
        }
        return driver

    return start


def test_core_ml_s_own_time_and_the_whole_call_are_both_told(started):
    found = started().predict(4)
    assert found["core_ms"] == [0.25] * 4
    assert len(found["e2e_ms"]) == 4
    assert all(each > 0 for each in found["e2e_ms"])


def test_missing_durations_are_none_and_not_zero(started):
    driver = started(load="none", predict="none")
    found = driver.predict(2)
    assert found["core_ms"] is None
    assert len(found["e2e_ms"]) == 2
    assert driver.throughput(2) == {"ms": None}


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        (np.float16, np.float32),
        (np.float64, np.float32),
        (np.int64, np.int32),
        (np.uint8, np.int32),
        (bool, np.int32),
    ],
)
def test_numbers_reach_core_ml_in_the_types_that_it_takes(given, taken):
    array = np.array([[1, 0], [0, 1]], given).T
    made = plain(array)
    assert made.dtype == taken
    assert made.flags.c_contiguous
    np.testing.assert_array_equal(made, array)


def test_samples_are_not_changed_by_a_prediction(started, samples, tmp_path):
    driver = started()
    halves = [{name: a.astype(np.float16) for name, a in s.items()} for s in read_samples(samples)]
    write_samples(tmp_path / "halves.npz", halves)
    driver.feed(str(tmp_path / "halves.npz"))
    driver.predict(3)
    assert all(a.dtype == np.float16 for sample in driver._samples for a in sample.values())


def test_a_plan_tells_constants_apart(started):
    found = started().placement()
    assert found["source"] == "MLComputePlan"
    assert [(op["name"], op["op_type"], op["preferred"], op["cost"]) for op in found["ops"]] == [
        ("w", "constexpr_lut_to_dense", "none", None),
        ("a", "conv", "neural_engine", 0.75),
        ("b", "softmax", "cpu", 0.25),
    ]
    assert found["ops"][1]["supported"] == ["cpu", "gpu", "neural_engine"]
    assert started(plan="none").placement()["ops"] == []


def test_ops_in_nested_blocks_are_placed_too():
    inner = SimpleNamespace(operator_name="add", outputs=[SimpleNamespace(name="i")], blocks=[])
    block = SimpleNamespace(operations=[inner])
    outer = SimpleNamespace(operator_name="ios15.cond", outputs=[], blocks=[block])
    plan = core_ml_stub.Plan([("x", "x")], ["cpu"])
    plan.model_structure.program.functions = {
        "main": SimpleNamespace(block=SimpleNamespace(operations=[outer]))
    }
    assert [op["name"] for op in coreml.placed(plan, None)] == ["cond", "i"]


def test_a_machine_without_neural_engine_says_so(crepe_tiny):
    found = CoreMLDriver(core_ml=StubCoreML(devices="cpu gpu"), mac=StubMac()).describe()
    assert found["device"]["compute_devices"] == ["cpu", "gpu"]
    assert found["device"]["neural_engine_cores"] is None
    with_engine = CoreMLDriver(core_ml=StubCoreML(), mac=StubMac()).describe()
    assert with_engine["device"]["neural_engine_cores"] == 16
    # macOS before 14 does not tell; nothing is then called a Neural Engine's.
    old = CoreMLDriver(core_ml=StubCoreML({"devices": "error"}), mac=StubMac()).describe()
    assert old["device"]["compute_devices"] == []


def test_what_a_stand_in_says_is_fake():
    assert CoreMLDriver(core_ml=StubCoreML(), mac=StubMac()).describe()["kind"] == "fake"
    assert CoreML.is_real
    assert iphone.RemoteCoreML.is_real


PLAN = device.Plan(
    warmup=2, samples_per_round=2, min_rounds=2, max_rounds=2, cached_loads=1, batch=4, timeout=60
)
STUB = Path(core_ml_stub.__file__)


def grid(model: Path, asked: dict[str, dict[str, str]], timeout: float = 60) -> schema.Result:
    """Run a model on the stub, in every choice of units for which something is asked, and one."""
    result = device.run(
        [model],
        driver="coreml",
        units=("CPU_ONLY", *asked),
        plan=dataclasses.replace(PLAN, timeout=timeout),
        open_session=lambda: ProcessSession([sys.executable, str(STUB), json.dumps(asked)]),
    )
    well = result.entries[0]
    assert well.status == "ok"
    assert well.timing is not None
    assert well.timing.core is not None
    assert well.timing.core.samples == (0.25,) * 4
    assert well.timing.load_cached == (5.0,)
    assert result.provenance.kind == "fake"
    assert result.device is None
    return result


def test_failures_are_in_the_result_and_the_rest_of_the_grid_goes_on(crepe_tiny, tmp_path):
    asked = {
        "CPU_AND_GPU": {"load": "error"},
        "CPU_AND_NE": {"predict": "crash"},
        "ALL": {"load": "kill"},
    }
    device.save(grid(crepe_tiny, asked), tmp_path / "result.json")
    entries = device.load(tmp_path / "result.json").entries
    failures = [entry.failure for entry in entries if entry.failure is not None]
    assert [(each.phase, each.reason) for each in failures] == [
        ("load", "error"),
        ("predict", "crashed"),
        ("load", "killed"),
    ]
    for failure, words in zip(
        failures, ("model execution plan", "SIGSEGV", "where memory runs out"), strict=True
    ):
        assert words in failure.message
    assert all(entry.status == "failed" for entry in entries[1:])


def test_what_is_missing_is_a_warning_and_latency_stays(crepe_tiny):
    asked = {
        "CPU_AND_GPU": {"plan": "error", "load": "zero"},
        "CPU_AND_NE": {"plan": "crash"},
        "ALL": {"memory": "error"},
    }
    _, *entries = grid(crepe_tiny, asked).entries
    for entry, words in zip(
        entries,
        ("a load of 0 ms was discarded", "placement: ended by SIGSEGV", "memory: RuntimeError"),
        strict=True,
    ):
        assert entry.status == "ok"
        assert entry.timing is not None
        assert entry.timing.core is not None
        assert any(words in warning for warning in entry.warnings), entry.warnings
    assert any("placement: RuntimeError" in warning for warning in entries[0].warnings)


def test_hanging_and_running_out_of_memory_end_only_what_does(crepe_tiny):
    asked = {
        "CPU_AND_GPU": {"compile": "error"},
        "CPU_AND_NE": {"load": "hang"},
        "ALL": {"predict": "memory"},
    }
    _, refused, hanging, full = grid(crepe_tiny, asked, timeout=5).entries
    assert refused.failure is not None
    assert (refused.failure.phase, refused.failure.reason) == ("compile", "error")
    assert hanging.failure is not None
    assert (hanging.failure.phase, hanging.failure.reason) == ("load", "timed_out")
    assert full.failure is not None
    assert "MemoryError" in full.failure.message


def measured(findings: Any, models: Path, **changes: Any) -> schema.Entry:
    """Return the entry that findings would make if they were measured."""
    from milpress.device.entries import Candidate, EntryBuilder, model_of

    settings: dict[str, Any] = {
        "kind": "measured",
        "plan": PLAN,
        "function": None,
        "seed": 0,
        "digest": "0" * 64,
        "n_samples": 1,
        "is_random": True,
        "baseline": Candidate(package=models, name="m"),
        "references": lambda _: "not run",
        **changes,
    }
    candidate = Candidate(package=models, name="m")
    return EntryBuilder(**settings).entry(model_of(candidate), candidate, findings)


def test_what_a_mac_would_tell_is_in_the_entry(crepe_tiny, tmp_path):
    from milpress.device.runner import Findings, Job

    outputs = tmp_path / "outputs.npz"
    write_samples(outputs, [{"y": np.float32([3, 4, 0])}])
    reference = [{"y": np.float32([3, 4, 0.5])}]
    job = Job(id="m", package="", units="CPU_AND_NE", folder="", outputs=str(outputs))
    findings = Findings(
        job=job,
        compile_ms=10.0,
        load_ms=5.0,
        first_ms=2.0,
        core={0: [1.0, 2.0]},
        e2e={0: [1.5, 2.5]},
        memory={"method": "task_info", "baseline": 100, "after_load": 900, "peak": 950},
        thermal=["nominal", None, "fair"],
        n_rejected=1,
        placement={
            "source": "MLComputePlan",
            "ops": [
                {"name": "y", "op_type": "conv", "preferred": "gpu", "supported": [], "cost": 1.0}
            ],
        },
        throughput_ms=2.0,
        energy={"method": "powermetrics", "cpu_mw": 5.0},
        has_outputs=True,
    )
    entry = measured(findings, crepe_tiny, references=lambda _: reference)
    assert entry.memory is not None
    assert entry.memory.model == 800
    assert entry.throughput is not None
    assert entry.throughput.per_second == 1e3 * PLAN.batch / 2.0
    assert entry.thermal == schema.Thermal(
        kind="measured", before="nominal", after="fair", rejected_rounds=1
    )
    assert entry.placement is not None
    assert entry.placement.counts["gpu"] == 1
    assert entry.parity is not None
    # An error of 1/2 beside a length of sqrt(9 + 16 + 1/4).
    assert entry.parity.snr_db == pytest.approx(10 * np.log10(25.25 / 0.25), rel=1e-6)
    assert entry.parity.max_error == 0.5
    assert entry.timing is not None
    assert entry.timing.package_compile == 10
    assert measured(Findings(job=job), crepe_tiny).placement is None


def test_decompression_is_never_more_than_consistent(crepe_tiny):
    from device_results import entry, model

    def found(grown: int, ratio: float) -> schema.Decompression | None:
        base = entry("measured", "CPU_AND_NE", "base")
        memory = schema.Memory(kind="measured", method="", baseline=0, after_load=grown)
        small = entry(
            "measured",
            "CPU_AND_NE",
            "small",
            scale=ratio,
            model=model("small", 250),
            memory=memory,
        )
        return evidence.decompression(small, base)

    for grown, ratio, verdict in (
        (300, 0.5, "consistent_with_jit"),
        (300, 1.0, "consistent_with_jit"),
        (1000, 1.0, "consistent_with_aot"),
        (1000, 0.5, "unknown"),
    ):
        made = found(grown, ratio)
        assert made is not None
        assert made.verdict == verdict
        assert len(made.evidence) == 1 + (ratio < 1)
    dense = entry("measured", "CPU_AND_NE", "dense")
    assert evidence.decompression(dense, dense) is None


def test_a_neural_engine_that_changes_nothing_is_doubted():
    from device_results import entry

    def doubts(scale: float) -> list[str]:
        entries = [
            entry("measured", "CPU_ONLY", "m"),
            entry("measured", "CPU_AND_NE", "m", scale=scale),
        ]
        _, found = evidence.with_evidence(entries)
        return [text for text in found.warnings if "may not be used" in text]

    assert len(doubts(1.0)) == 1
    assert doubts(0.1) == doubts(9.0) == []


def test_power_is_read_in_either_form():
    power = {"processor": {"cpu_power": 120.5, "gpu_power": 3, "ane_power": 250.0}}
    expected = {"cpu_mw": 120.5, "gpu_mw": 3.0, "neural_engine_mw": 250.0}
    assert power_of(plistlib.dumps(power)) == expected
    assert power_of(b"\0" + plistlib.dumps(power) + b"\0") == expected
    energy = {"elapsed_ns": 2_000_000_000, "processor": {"ane_energy": 500}}
    assert power_of(plistlib.dumps(energy)) == {"neural_engine_mw": 250.0}
    for nothing in (b"", b"garbage", plistlib.dumps({}), plistlib.dumps([1])):
        assert power_of(nothing) == {}


@pytest.mark.apple
@pytest.mark.skipif(sys.platform != "darwin", reason="asks macOS")
def test_a_mac_tells_of_itself():
    mac = Mac()
    found = mac.footprint()
    assert found is not None
    now, peak = found
    assert 0 < now <= (peak or now)
    assert mac.thermal_state() in ("nominal", "fair", "serious", "critical")
    assert mac.describe()["os"].startswith("macOS ")


class Phone:
    """A device at the cable, and coremltools' way to it, as far as the driver may know."""

    is_real = False
    version = "stub"

    def __init__(self, names: tuple[str, ...] = ("Phone",)) -> None:
        self._names = names
        self.last_predict_duration_in_nano_seconds = 300_000
        self.load_duration_in_nano_seconds: int | None = 7_000_000

    def connected(self) -> list[Any]:
        return [
            SimpleNamespace(name=name, os_version="18.1", os_build_number="22B83")
            for name in self._names
        ]

    async def prepare(self, device: Any, team: str, bundle: str | None, folder: Path) -> Any:
        assert folder.is_dir()
        return device

    def model(self, *arguments: Any) -> Phone:
        self._path = arguments[0]
        return self

    async def load(self) -> None:
        await asyncio.sleep(0)

    async def predict(self, inputs: dict[str, Any], state: Any = None) -> dict[str, Any]:
        return {"y": np.zeros(2, np.float32)}


def test_a_phone_tells_its_own_times(crepe_tiny, samples, tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    phone: Any = Phone()
    driver = iphone.IPhoneDriver(core_ml=phone, mac=StubMac())
    assert driver.describe()["device"]["os"] == "iOS 18.1"
    assert driver.describe()["kind"] == "fake"
    path = driver.compile(str(crepe_tiny), "CPU_AND_NE", str(tmp_path))["path"]
    driver.feed(str(samples))
    assert driver.load(path, "CPU_AND_NE") == {"ms": 7.0}
    # What coremltools says of a model that is loaded already.
    phone.load_duration_in_nano_seconds = 0
    assert driver.load(path, "CPU_AND_NE") == {"ms": None}
    assert driver.predict(2)["core_ms"] == [0.3, 0.3]
    assert driver.thermal() == {"state": None}


@pytest.mark.parametrize("names", [(), ("One", "Two")])
def test_one_phone_must_be_there_or_be_named(names):
    phone: Any = Phone(names)
    with pytest.raises(errors.DriverError, match=r"one iPhone or iPad must be connected"):
        iphone.IPhoneDriver(core_ml=phone, mac=StubMac())
    if names:
        found = iphone.IPhoneDriver(core_ml=phone, mac=StubMac(), device_name="Two")
        assert found.describe()["device"]["model"] == "Two"


@pytest.mark.apple
@pytest.mark.skipif(sys.platform != "darwin", reason="wants Core ML")
def test_core_ml_itself_runs_a_model(crepe_tiny):
    result = device.run([crepe_tiny], units=("CPU_ONLY",), plan=PLAN)
    (entry,) = result.entries
    assert result.provenance.kind == "measured"
    assert entry.failure is None
    assert entry.parity is not None
    assert entry.parity.snr_db > 30
