"""A plugin of pytest, ``-p predictor``: in coremltools' tests of ops, the interpreter predicts.

It stands in for the compiled module by which coremltools talks to Core ML. Tests then take the
machine for a Mac, and compare what they compute with what the interpreter does.
"""

from __future__ import annotations

import functools
import os
import sys
import types
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import op_differences
import pytest
from matching import reasons

from milpress import interpreter
from milpress.errors import ExecutionError

# What coremltools says of a Mac that runs the models of iOS18 as it should, and of their version.
MACOS = (15, 2)
SPECIFICATION = 9

# Cases of a test of the PyTorch converter differ in what it sees, not in the ops that it makes.
AT_MOST = {"test_torch_ops.py": 4}

# Why coremltools expects the test that runs to fail.
excuses: list[str] = []
MARKED = pytest.StashKey[list[str]]()

# The test that runs, if it computes what it expects in 16 bits.
halves: list[str] = []

# Core ML's words, which tests look for.
FAILED = "Unable to compute the prediction using ML Program. "


class StateProxy:
    """What Core ML keeps of a stateful model."""

    def __init__(self, state: interpreter.State) -> None:
        self.state = state

    def read_state(self, name: str) -> np.ndarray:
        return self.state[name]

    def write_state(self, name: str, value: np.ndarray) -> None:
        self.state[name] = value


class ModelProxy:
    """A model that Core ML has loaded."""

    def __init__(self, path: str, units: str, function: str, hints: Any, asset: Any) -> None:
        if not path.endswith(".mlpackage"):
            msg = f"the interpreter runs ML programs, got {Path(path).suffix}"
            raise RuntimeError(msg)
        self._program = interpreter.load(path, function or None, precision="float16")

    @staticmethod
    def maximum_supported_specification_version() -> int:
        return SPECIFICATION

    def newState(self) -> StateProxy:  # noqa: N802
        return StateProxy(self._program.make_state())

    def predict(self, data: Mapping[str, Any], state: StateProxy | None = None) -> dict[str, Any]:
        known = {feature.name: feature for feature in self._program.inputs}
        given = {name: taken(known[name], value) for name, value in data.items()}
        try:
            outputs = self._program.run(given, state=None if state is None else state.state).outputs
        except ExecutionError as error:
            raise RuntimeError(FAILED + str(error)) from error
        return {name: handed_back(value) for name, value in outputs.items()}

    def batchPredict(self, data: list[Mapping[str, Any]]) -> list[dict[str, Any]]:  # noqa: N802
        return [self.predict(each) for each in data]


def taken(feature: interpreter.Feature, value: Any) -> np.ndarray:
    """Return an input as the interpreter wants it: Core ML turns floats into integers."""
    array = np.asarray(value)
    is_array = feature.kind == "array" and not feature.dtype.startswith("float")
    return array.astype(np.int32) if is_array else array


def handed_back(value: Any) -> Any:
    """Return an output as Core ML gives it: no array has rank 0."""
    return value.reshape(1) if isinstance(value, np.ndarray) and not value.ndim else value


def install() -> None:
    """Put the stand-in where coremltools looks for its compiled module, before it is imported."""
    module = types.ModuleType("coremltools.libcoremlpython")
    module._MLModelProxy = ModelProxy
    for name in (
        "_MLModelAssetProxy",
        "_MLComputePlanProxy",
        "_MLCPUComputeDeviceProxy",
        "_MLGPUComputeDeviceProxy",
        "_MLNeuralEngineComputeDeviceProxy",
    ):
        setattr(module, name, type(name, (), {}))
    sys.modules[module.__name__] = module


# At once: coremltools' conftest.py, which pytest reads next, imports coremltools.
install()


def compared(own: Callable[..., Any]) -> Callable[..., Any]:
    """Let what a test computes in 16 bits be compared as what a program of 16 bits gives."""

    @functools.wraps(own)
    def compare(*arguments: Any, dtype: str = "fp32", **settings: Any) -> Any:
        return own(*arguments, dtype="fp16" if halves else dtype, **settings)

    return compare


def answer() -> None:
    """Let coremltools take the machine for a Mac, and its tests run what they would excuse."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from coremltools import _deps
        from coremltools.converters.mil import testing_utils
    testing_utils.compare_backend = compared(testing_utils.compare_backend)
    _deps._IS_MACOS = True
    answers = {"_is_macos": lambda: True, "_macos_version": lambda: MACOS, "_IS_MACOS": True}
    for name, module in list(sys.modules.items()):
        if name.startswith("coremltools."):
            for asked in answers.keys() & vars(module).keys():
                setattr(module, asked, answers[asked])
    # As coremltools means it of Core ML and its converter: the test goes on, and may well pass.
    pytest.xfail = lambda reason="", **_kwargs: excuses.append(reason)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--ops-at-most", type=int, help="so many cases of each test, not all")
    parser.addoption("--ops-counts", type=Path, help="the page whose table of counts must be true")


def pytest_configure(config: pytest.Config) -> None:
    # Programs of 32 bits alone: those of 16 are compared within a half, which says little.
    os.environ["PYMIL_TEST_TARGETS"] = "mlprogram"
    os.environ["INCLUDE_MIL_FP32_UNIT_TESTS"] = "1"
    os.environ["TORCH_FRONTENDS"] = "TORCHSCRIPT"
    config.addinivalue_line("filterwarnings", "ignore")
    config.addinivalue_line("markers", "slow: as coremltools marks it")
    answer()
    from coremltools.converters.mil import testing_reqs

    testing_reqs.backends[:] = [("mlprogram", "fp32")]
    testing_reqs.backends_internal[:] = [
        each for each in testing_reqs.backends_internal if each.precision == "fp32"
    ]


def name_of(item: pytest.Item) -> str:
    """Return a test's name, with its file and folder."""
    place = "/".join(item.path.parts[-2:])
    return f"{place}::{item.nodeid.partition('::')[2]}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept = sampled(items, config.getoption("--ops-at-most"))
    kept = [item for item in kept if not reasons(op_differences.NOT_RUN, name_of(item))]
    chosen = {id(item) for item in kept}
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in chosen])
    items[:] = kept
    for item in items:
        item.stash[MARKED] = [mark.kwargs["reason"] for mark in item.iter_markers("xfail")]
        for node in item.listchain():
            node.own_markers = [mark for mark in node.own_markers if mark.name != "xfail"]
        for reason in reasons(op_differences.EXPLAINED, name_of(item))[:1]:
            item.add_marker(pytest.mark.xfail(strict=True, reason=reason))


def sampled(items: list[pytest.Item], at_most: int | None) -> list[pytest.Item]:
    """Return so many cases of each test, evenly, but not from the first on in each.

    Of all that are run, if no number is given, those that are explained are.
    """
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        tests.setdefault(name_of(item).partition("[")[0], []).append(item)
    kept: list[pytest.Item] = []
    for i, cases in enumerate(tests.values()):
        most = at_most or AT_MOST.get(cases[0].path.name, len(cases))
        count = min(most, len(cases))
        kept += [cases[(i + k * len(cases) // count) % len(cases)] for k in range(count)]
    if at_most is None:
        known = {id(item) for item in kept}
        kept += [item for item in items if id(item) not in known and is_explained(item)]
    return kept


def is_explained(item: pytest.Item) -> bool:
    return bool(reasons(op_differences.EXPLAINED, name_of(item)))


def pytest_collection_finish(session: pytest.Session) -> None:
    import gc

    gc.freeze()  # coremltools collects garbage after each conversion: leave the tests out of it


def is_of_halves(item: pytest.Item) -> bool:
    """Whether a test's own parameters, beside the program's precision, are of 16 bits."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    texts = [str(value) for name, value in parameters.items() if name != "backend"]
    return any("fp16" in text or "float16" in text for text in texts)


def pytest_runtest_setup(item: pytest.Item) -> None:
    halves[:] = [item.nodeid] * is_of_halves(item)
    excuses[:] = item.stash[MARKED]
    np.random.seed(0)  # noqa: NPY002 - the tests draw from it
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Any:
    report = yield
    if report.failed and report.when == "call" and call.excinfo is not None and excuses:
        report.outcome, report.wasxfail = "skipped", op_differences.EXCUSED
    return report


def counts(stats: Mapping[str, list[Any]]) -> dict[str, int]:
    """Return how many cases had each outcome, the explained ones by reason."""
    explained = Counter(report.wasxfail for report in stats.get("xfailed", []))
    return {
        op_differences.PASSED: len(stats.get("passed", [])),
        op_differences.SKIPPED: len(stats.get("skipped", [])),
        **{reason: explained[reason] for reason in sorted(explained)},
    }


def table(found: Mapping[str, int]) -> str:
    """Return counts as the rows of a table."""
    return "\n".join(f"| {outcome} | {count:,} |" for outcome, count in found.items())


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    found = table(counts(terminalreporter.stats))
    terminalreporter.section("counts")
    terminalreporter.write_line(found)
    page = config.getoption("--ops-counts")
    if page and found not in page.read_text():
        terminalreporter.write_line(f"{page} has another table", red=True)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    page = session.config.getoption("--ops-counts")
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if page and reporter and table(counts(reporter.stats)) not in page.read_text():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
