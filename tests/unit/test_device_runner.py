"""The order of measuring, with sessions that play a script and a clock that only it moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from milpress.device.drivers.fake import FakeDriver
from milpress.device.runner import Findings, Job, Plan, Runner
from milpress.device.sessions import ProcessSession, SessionError, worker_command
from milpress.errors import ConfigError
from milpress.samples.files import write_samples


class Clock:
    def __init__(self) -> None:
        self.slept: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)


class Scripted:
    """A session on a fake driver in this process; what it is asked is written down."""

    def __init__(self, driver: FakeDriver, log: list[str]) -> None:
        self.driver, self.log = driver, log
        self.units = ""
        self.is_closed = False

    def ask(self, command: str, timeout: float, **arguments: Any) -> dict[str, Any]:
        assert not self.is_closed
        self.units = arguments.get("units", self.units)
        self.log.append(f"{self.units} {command}{arguments.get('n', '')}")
        try:
            return getattr(self.driver, command)(**arguments)
        except RuntimeError as error:
            raise SessionError(str(error)) from error

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def samples(tmp_path):
    path = tmp_path / "samples.npz"
    write_samples(path, [{"x": np.ones((1, 4), np.float32)}])
    return path


Go = Callable[..., list[Findings]]


@pytest.fixture
def go(samples, tmp_path) -> Go:
    def run(
        drivers: list[FakeDriver], units: str, plan: Plan, log: list[str], clock: Any = None
    ) -> list[Findings]:
        made = iter(drivers)
        jobs = [
            Job(
                id=name,
                package="m.mlpackage",
                units=name,
                folder=str(tmp_path),
                outputs=str(tmp_path / f"{name}.npz"),
            )
            for name in units
        ]
        runner = Runner(lambda: Scripted(next(made), log), str(samples), plan, clock or Clock())
        return runner.run(jobs)

    return run


SHORT = Plan(
    warmup=3, samples_per_round=2, min_rounds=3, max_rounds=3, precision=0, cached_loads=0, batch=0
)


def predictions(log: list[str]) -> list[str]:
    return [line for line in log if "predict" in line]


def test_configurations_take_turns_and_warm_up_first(go):
    log: list[str] = []
    go([FakeDriver(core_ms={"": (1.0, 2.0)}), FakeDriver()], "AB", SHORT, log)
    warmup = ["A predict1", "A predict2", "B predict1", "B predict2"]
    rounds = [f"{name} predict2" for name in "AB BA AB".replace(" ", "")]
    assert predictions(log) == [*warmup, *rounds]


def test_first_prediction_and_warm_up_are_no_samples(go):
    script = (90.0, 80.0, 70.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
    (found,) = go([FakeDriver(core_ms={"": script})], "A", SHORT, [])
    assert found.first_ms == 90
    assert found.core == {0: [1.0, 2.0], 1: [3.0, 4.0], 2: [5.0, 6.0]}


def test_rounds_end_once_all_are_precise_enough(go):
    plan = Plan(warmup=1, samples_per_round=4, min_rounds=3, max_rounds=9, cached_loads=0, batch=0)
    steady, shaky = {"": (1.0,)}, {"": (1.0, 1.0, 1.0, 1.0, 1.0, 9.0, 9.0, 9.0, 9.0)}
    (alone,) = go([FakeDriver(core_ms=steady)], "A", plan, [])
    assert list(alone.core) == [0, 1, 2]
    both = go([FakeDriver(core_ms=steady), FakeDriver(core_ms=shaky)], "AB", plan, [])
    # The steady one goes on, so that they share their rounds.
    assert list(both[0].core) == list(both[1].core)
    assert len(both[0].core) > 3


def test_a_round_on_a_warm_device_is_thrown_away_and_waited_for(go):
    # One state at the start, then one before and one behind each round.
    states = ["nominal", "nominal", "fair", "serious", "nominal", "nominal"]
    clock = Clock()
    plan = Plan(
        warmup=1,
        samples_per_round=1,
        min_rounds=2,
        max_rounds=2,
        cooldown=7,
        cached_loads=0,
        batch=0,
    )
    (found,) = go([FakeDriver(states=states, core_ms={"": (1, 2, 3, 4, 5)})], "A", plan, [], clock)
    assert found.n_rejected == 2
    assert found.core == {2: [4], 3: [5]}
    assert clock.slept == [7, 7]


def test_a_device_that_stays_warm_is_a_failure_and_others_go_on(go):
    plan = Plan(
        warmup=1,
        samples_per_round=1,
        min_rounds=2,
        max_rounds=2,
        max_rejected=3,
        cached_loads=0,
        batch=0,
    )
    hot, cool = go([FakeDriver(states=["fair"]), FakeDriver()], "AB", plan, [])
    assert hot.failure is not None
    assert (hot.failure.phase, hot.failure.reason) == ("predict", "too_warm")
    assert cool.failure is None
    assert len(cool.core) == 2


@pytest.mark.parametrize("phase", ["compile", "load", "predict"])
def test_a_failure_keeps_none_of_the_others_from_running(go, phase):
    drivers = [FakeDriver(), FakeDriver(fail={phase: "error"}), FakeDriver()]
    first, broken, last = go(drivers, "ABC", SHORT, [])
    assert broken.failure is not None
    assert (broken.failure.phase, broken.failure.reason) == (phase, "error")
    assert f"{phase} was to fail" in broken.failure.message
    assert not broken.core
    for found in (first, last):
        assert found.failure is None
        assert len(found.core) == 3
    assert first.interleaved_with == ("C",)


@pytest.mark.parametrize("phase", ["memory", "thermal", "placement", "throughput", "energy"])
def test_what_may_be_missing_is_a_warning_at_most(go, phase):
    plan = Plan(
        warmup=1, samples_per_round=1, min_rounds=1, max_rounds=1, cached_loads=0, energy_seconds=1
    )
    (found,) = go([FakeDriver(fail={phase: "error"})], "A", plan, [])
    assert found.failure is None
    assert found.core == {0: [1.0]}
    assert sum(phase in warning for warning in found.warnings) == 1


def test_cached_loads_are_of_new_sessions_and_a_load_of_nothing_is_none(go):
    plan = Plan(warmup=1, samples_per_round=1, min_rounds=1, max_rounds=1, cached_loads=3, batch=0)
    drivers = [FakeDriver(loads=[ms]) for ms in (50.0, 3.0, 0.0, 2.0)]
    log: list[str] = []
    (found,) = go(drivers, "A", plan, log)
    assert found.load_ms == 50
    assert found.cached_ms == [3, 2]
    assert any("a load of 0 ms was discarded" in warning for warning in found.warnings)
    assert [line for line in log if "load" in line] == ["A load"] * 4


def test_groups_are_no_larger_than_asked(go):
    log: list[str] = []
    plan = Plan(
        warmup=1,
        samples_per_round=1,
        min_rounds=2,
        max_rounds=2,
        cached_loads=0,
        batch=0,
        at_once=2,
    )
    found = go([FakeDriver() for _ in range(3)], "ABC", plan, log)
    assert predictions(log) == [f"{name} predict1" for name in "ABABBACCC"]
    assert [each.interleaved_with for each in found] == [("B",), ("A",), ()]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup": 0}, "warmup must be at least 1, got 0"),
        ({"samples_per_round": 0}, "samples_per_round must be at least 1"),
        ({"min_rounds": 5, "max_rounds": 4}, "max_rounds must be at least 5, got 4"),
        ({"precision": float("nan")}, "precision must be at least 0, got nan"),
        ({"timeout": 0}, "timeout must be above 0"),
        ({"cooldown": -1}, "cooldown must be at least 0"),
        ({"at_once": 0}, "at_once must be at least 1"),
    ],
)
def test_a_wrong_plan_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Plan(**settings)


@pytest.mark.parametrize(
    ("event", "reason", "message"),
    [
        ("error", "error", "RuntimeError: load was to fail"),
        ("crash", "crashed", "ended by SIGABRT"),
        ("kill", "killed", "where memory runs out"),
        ("hang", "timed_out", "load: no answer in 1 s"),
    ],
)
def test_whatever_a_process_does_is_told(event, reason, message):
    session = ProcessSession(worker_command("fake", fail={"load": event}))
    try:
        assert session.ask("describe", 60)["kind"] == "fake"
        with pytest.raises(SessionError) as caught:
            session.ask("load", 1 if event == "hang" else 60, path="", units="")
        assert caught.value.reason == reason
        assert message in caught.value.message
        assert caught.value.is_over == (event != "error")
        if event != "error":
            with pytest.raises(SessionError):
                session.ask("describe", 60)
    finally:
        session.close()


def test_a_process_that_can_not_start_says_its_last_words():
    session = ProcessSession(worker_command("none"))
    with pytest.raises(SessionError, match="a driver must be one of coreml"):
        session.ask("describe", 60)
    session.close()
