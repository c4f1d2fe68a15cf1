"""Order of the measurements of a benchmark: pure logic, given sessions and a clock."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from milpress.device import stats
from milpress.device.schema import Failure
from milpress.device.sessions import Session, SessionError
from milpress.errors import ConfigError
from milpress.progress import Progress

_NOMINAL = ("nominal", None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much is measured.

    Parameters
    ----------
    warmup
        Predictions that are discarded before the first round, the very first included.
    samples_per_round
        Predictions of a configuration before the next has its turn.
    min_rounds, max_rounds
        How many turns each has, at least and at most.
    precision
        Half of the 95 % interval of the median, as a share of it, at which rounds end early.
    cached_loads
        How many new processes load the model once more.
    batch
        Predictions that are handed over at once to tell the throughput; 0 leaves it out.
    energy_seconds
        For how long power is sampled; 0 leaves it out.
    cooldown
        Seconds to wait after a round that the device was too warm for.
    max_rejected
        Rounds of a configuration that may be thrown away before it fails.
    timeout
        Seconds that an answer may take; compilers for the Neural Engine may take minutes.
    at_once
        How many configurations take turns; each holds its model in memory.
    """

    warmup: int = 10
    samples_per_round: int = 20
    min_rounds: int = 5
    max_rounds: int = 20
    precision: float = 0.01
    cached_loads: int = 2
    batch: int = 16
    energy_seconds: float = 0.0
    cooldown: float = 30.0
    max_rejected: int = 10
    timeout: float = 900.0
    at_once: int = 16

    def __post_init__(self) -> None:
        least = {
            "warmup": 1,
            "samples_per_round": 1,
            "min_rounds": 1,
            "max_rounds": self.min_rounds,
            "precision": 0,
            "cached_loads": 0,
            "batch": 0,
            "energy_seconds": 0,
            "cooldown": 0,
            "max_rejected": 0,
            "at_once": 1,
        }
        for name, low in least.items():
            if not getattr(self, name) >= low:
                msg = f"{name} must be at least {low}, got {getattr(self, name)}"
                raise ConfigError(msg)
        if not self.timeout > 0:
            msg = f"timeout must be above 0, got {self.timeout}"
            raise ConfigError(msg)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A configuration to be run: its name, the package, the units, and where to compile it to."""

    id: str
    package: str
    units: str
    folder: str
    outputs: str


@dataclass(slots=True, kw_only=True)
class Findings:
    """What a configuration gave, up to where it failed if it did."""

    job: Job
    failure: Failure | None = None
    compile_ms: float | None = None
    load_ms: float | None = None
    cached_ms: list[float] = field(default_factory=list)
    first_ms: float | None = None
    core: dict[int, list[float]] = field(default_factory=dict)
    e2e: dict[int, list[float]] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    thermal: list[str | None] = field(default_factory=list)
    n_rejected: int = 0
    placement: dict[str, Any] = field(default_factory=dict)
    throughput_ms: float | None = None
    energy: dict[str, Any] = field(default_factory=dict)
    has_outputs: bool = False
    interleaved_with: tuple[str, ...] = ()
    warnings: list[str] = field(default_factory=list)

    @property
    def best(self) -> dict[int, list[float]]:
        """Core ML's own times, or those of whole calls if it has none."""
        return self.core or self.e2e


class Clock(Protocol):
    """Waits, as the module `time` does."""

    def sleep(self, seconds: float, /) -> None:
        """Wait so many seconds."""


@dataclass(frozen=True, slots=True)
class Runner:
    """Runs configurations, so that none can take another down with it.

    Each session is a process of its own; ``samples`` is the file with the inputs. ``progress`` is
    called with steps done, steps in all and what is at hand.
    """

    open_session: Callable[[], Session]
    samples: str
    plan: Plan = field(default_factory=Plan)
    clock: Clock = time
    progress: Progress = lambda *_: None

    def run(self, jobs: Sequence[Job]) -> list[Findings]:
        """Run all configurations, in groups whose members take turns."""
        findings: list[Findings] = []
        for begin in range(0, len(jobs), self.plan.at_once):
            group = jobs[begin : begin + self.plan.at_once]
            findings += self._run_group(group, len(findings), len(jobs))
        self.progress(len(jobs), len(jobs), "")
        return findings

    def _run_group(self, jobs: Sequence[Job], n_done: int, n_jobs: int) -> list[Findings]:
        turns = [_Turn(job, self.open_session, self.plan) for job in jobs]
        try:
            for i, turn in enumerate(turns):
                self.progress(n_done + i, n_jobs, f"{turn.job.id}: loading")
                turn.start(self.samples)
            self._take_turns(turns, n_done, n_jobs)
            for turn in turns:
                others = (each.job.id for each in turns if each is not turn and each.is_alive)
                turn.findings.interleaved_with = tuple(others)
            for turn in turns:
                turn.finish()
        finally:
            for turn in turns:
                turn.close()
        # After all others are gone, or they would be in each other's way.
        for turn in turns:
            turn.load_again()
        return [turn.findings for turn in turns]

    def _take_turns(self, turns: Sequence[_Turn], n_done: int, n_jobs: int) -> None:
        for i in range(self.plan.max_rounds + self.plan.max_rejected):
            waiting = [turn for turn in turns if turn.wants_round]
            if not waiting:
                return
            was_warm = False
            # All go on until each is precise enough, so that any two share their rounds. Each round
            # begins with another one, as to be the first after a pause is no advantage.
            first = i % len(waiting)
            for turn in (*waiting[first:], *waiting[:first]):
                self.progress(n_done, n_jobs, f"{turn.job.id}: round {i + 1}")
                was_warm |= turn.take(i)
            if was_warm:
                self.clock.sleep(self.plan.cooldown)
            alive = [turn for turn in turns if turn.is_alive]
            if all(turn.is_precise for turn in alive):
                return


class _Turn:
    """One configuration while it is measured."""

    def __init__(self, job: Job, open_session: Callable[[], Session], plan: Plan) -> None:
        self.job = job
        self.findings = Findings(job=job)
        self._open = open_session
        self._plan = plan
        self._session: Session | None = None
        self._end = SessionError("the process is gone", "crashed")
        self._path = ""
        self._has_state = True

    @property
    def is_alive(self) -> bool:
        return self._session is not None and self.findings.failure is None

    @property
    def wants_round(self) -> bool:
        return self.is_alive and len(self.findings.e2e) < self._plan.max_rounds

    @property
    def is_precise(self) -> bool:
        rounds = list(self.findings.best.values())
        if len(rounds) < self._plan.min_rounds:
            return False
        if len(rounds) >= self._plan.max_rounds:
            return True
        value = stats.median([sample for each in rounds for sample in each])
        width = stats.relative_half_width(value, stats.median_interval(rounds))
        return width <= self._plan.precision

    def start(self, samples: str) -> None:
        """Compile, load, predict once, warm up, write outputs."""
        try:
            self._session = self._open()
        except OSError as error:
            self.findings.failure = Failure(phase="open", reason="error", message=str(error))
            return
        phase = "compile"
        try:
            self._compile()
            phase = "load"
            self._load(samples)
            phase = "predict"
            self._predict()
        except SessionError as error:
            self._fail(phase, error)

    def _compile(self) -> None:
        job = self.job
        answer = self._ask("compile", package=job.package, units=job.units, folder=job.folder)
        self.findings.compile_ms, self._path = answer["ms"], answer["path"]

    def _load(self, samples: str) -> None:
        self._ask("feed", inputs=samples)
        before = self._try("memory")
        self.findings.load_ms = self._ask("load", path=self._path, units=self.job.units)["ms"]
        after = self._try("memory")
        if before.get("bytes") is not None and after.get("bytes") is not None:
            self.findings.memory = {
                "method": after["method"],
                "baseline": before["bytes"],
                "after_load": after["bytes"],
            }

    def _predict(self) -> None:
        first = self._ask("predict", n=1)
        self.findings.first_ms = (first["core_ms"] or first["e2e_ms"])[0]
        if self._plan.warmup > 1:
            self._ask("predict", n=self._plan.warmup - 1)
        self.findings.thermal.append(self._state())
        self._ask("outputs", path=self.job.outputs)
        self.findings.has_outputs = True

    def take(self, i: int) -> bool:
        """Take a turn, and tell whether the device was too warm for it to count."""
        findings = self.findings
        try:
            before = self._state()
            answer = self._ask("predict", n=self._plan.samples_per_round)
            after = self._state()
        except SessionError as error:
            self._fail("predict", error)
            return False
        findings.thermal.append(after)
        if before not in _NOMINAL or after not in _NOMINAL:
            findings.n_rejected += 1
            if findings.n_rejected > self._plan.max_rejected:
                states = f"{before} and {after}"
                msg = f"the device must be cool (nominal) for a round, got {states} again"
                self._fail("predict", SessionError(msg, "too_warm"))
            return True
        findings.e2e[i] = answer["e2e_ms"]
        if answer["core_ms"] is not None:
            findings.core[i] = answer["core_ms"]
        return False

    def finish(self) -> None:
        """Ask what can be told without disturbing rounds; nothing of it is worth failing for."""
        if not self.is_alive:
            return
        findings, plan = self.findings, self._plan
        if not findings.best:
            msg = "no round counts, as the device was too warm in each"
            self._fail("predict", SessionError(msg, "too_warm"))
            return
        peak = self._try("memory").get("peak")
        if findings.memory and peak is not None:
            findings.memory["peak"] = peak
        if plan.batch:
            findings.throughput_ms = self._try("throughput", batch=plan.batch).get("ms")
        if plan.energy_seconds:
            findings.energy = self._try("energy", seconds=plan.energy_seconds)
        findings.placement = self._try("placement")

    def load_again(self) -> None:
        """Load in new processes what has been loaded before."""
        if self.findings.failure is not None:
            return
        for _ in range(self._plan.cached_loads):
            try:
                with contextlib.closing(self._open()) as session:
                    ms = session.ask(
                        "load", self._plan.timeout, path=self._path, units=self.job.units
                    )["ms"]
            except (SessionError, OSError) as error:
                self.findings.warnings.append(f"cached load: {error}")
                return
            if ms is None:
                return
            if ms == 0:
                self.findings.warnings.append(
                    "cached load: a load of 0 ms was discarded, as it was none"
                )
                continue
            self.findings.cached_ms.append(ms)

    def close(self) -> None:
        """End the session."""
        if self._session is not None:
            self._session.close()
            self._session = None

    def _ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        if self._session is None:
            raise self._end
        return self._session.ask(command, self._plan.timeout, **arguments)

    def _try(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Ask for what may be missing; a session that ends over it has no more to say."""
        try:
            return self._ask(command, **arguments)
        except SessionError as error:
            warning = f"{command}: {error.message}"
            if warning not in self.findings.warnings:
                self.findings.warnings.append(warning)
            if error.is_over:
                self._end = error
                self.close()
            return {}

    def _state(self) -> str | None:
        """Return the thermal state, or that it is not known; who can't tell is not asked again."""
        if not self._has_state:
            return None
        answer = self._try("thermal")
        self._has_state = "state" in answer
        state: str | None = answer.get("state")
        return state

    def _fail(self, phase: str, error: SessionError) -> None:
        self.findings.failure = Failure(phase=phase, reason=error.reason, message=error.message)
        self.close()
