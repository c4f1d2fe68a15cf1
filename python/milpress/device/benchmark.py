"""Running packages in every configuration, and what comes of it as a result."""

from __future__ import annotations

import dataclasses
import datetime as dt
import hashlib
import math
import os
import platform
import tempfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from milpress.device import agreement, drivers, files, schema, stats
from milpress.device.runner import (
    Clock,
    Findings,
    Job,
    Plan,
    Progress,
    Runner,
    SystemClock,
    distributions,
)
from milpress.device.schema import Entry, Failure, Kind, Result
from milpress.device.sessions import ProcessSession, Session, SessionError, worker_command
from milpress.engines import inputs
from milpress.errors import ConfigError, DriverError
from milpress.plain.structure import Decibels

if TYPE_CHECKING:
    from milpress.samples.data import Data

# A weight counts as compressed, for what memory suggests, if it takes at most so much of its size.
_CLEARLY_SMALLER = 0.75
# Nobody waits for the interpreter to be fast, nor should one that hangs be waited for.
_REFERENCE_SECONDS = 1800.0

OpenSession = Callable[[], Session]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A package that is to be run: what it is called, and what was done to it, in words."""

    package: Path
    name: str
    treatment: str = ""


def run(
    packages: Sequence[str | os.PathLike[str] | Candidate],
    *,
    driver: str = "coreml",
    units: Sequence[str] = (),
    data: Data | None = None,
    seed: int = 0,
    plan: Plan | None = None,
    options: Mapping[str, Any] | None = None,
    open_session: OpenSession | None = None,
    clock: Clock | None = None,
    progress: Progress | None = None,
) -> Result:
    """Run packages in every configuration, and compare outputs with the interpreter's.

    Parameters
    ----------
    packages
        What is run. The first one is the baseline of accuracy and ratios.
    driver
        What runs them: ``"coreml"``, ``"iphone"``, ``"interpreter"``, or ``"fake"`` in tests.
    units
        Core ML's names of compute units; by default all four. The interpreter has none.
    data
        Samples, as `milpress.evaluate` takes them; by default random ones.
    seed
        Where random samples start from.
    plan
        How much is measured.
    options
        Of the driver.
    open_session
        Makes sessions instead of the driver's own.
    clock
        What waits.
    progress
        Called with steps done, steps in all and what is at hand.

    Returns
    -------
    Result
        What was found. A configuration that failed says why, and has not kept others from running.

    Raises
    ------
    DriverError
        If the driver can do nothing on this machine.
    ConfigError
        If units are unknown, or there is no package.
    PackageError
        If one is no package of ML programs.
    InputError
        If the samples don't suit the first package.
    """
    from milpress.samples.data import RandomSamples

    candidates = [_candidate(package) for package in packages]
    if not candidates:
        msg = "there must be a package to run, got none"
        raise ConfigError(msg)
    options = dict(options or {})
    units = _units(driver, units)
    plan = plan or Plan()
    # On a device at a cable, the app of one process ends that of another.
    if driver == "iphone":
        plan = dataclasses.replace(plan, at_once=1)
    # The interpreter keeps nothing between processes that could be loaded faster.
    if driver == "interpreter":
        plan = dataclasses.replace(plan, cached_loads=0)
    open_session = open_session or sessions_of(driver, options)
    described = check_driver(open_session, driver)
    models = [model_of(candidate) for candidate in candidates]
    with tempfile.TemporaryDirectory(prefix="milpress-bench-") as folder:
        samples = Path(folder) / "samples.npz"
        n_samples, is_random, digest = inputs.write_samples(
            candidates[0].package,
            RandomSamples(4, seed) if data is None else data,
            samples,
            function=options.get("function"),
        )
        jobs = _jobs(candidates, units, Path(folder))
        runner = Runner(
            open_session, str(samples), plan, clock or SystemClock(), progress or (lambda *_: None)
        )
        found = runner.run([job for _, job in jobs])
        references = _References(Path(folder), samples, options.get("function"))
        if driver == "interpreter":
            for (i, _), findings in zip(jobs, found, strict=True):
                references.take(candidates[i].package, findings)
        assembly = _Assembly(
            kind=described["kind"],
            plan=plan,
            function=options.get("function"),
            seed=seed if data is None else None,
            digest=digest,
            n_samples=n_samples,
            is_random=is_random,
            baseline=candidates[0],
            references=references,
        )
        entries = [
            assembly.entry(models[i], candidates[i], findings)
            for (i, _), findings in zip(jobs, found, strict=True)
        ]
    if described["kind"] == "measured":
        entries = _with_evidence(entries)
    return _result(described, driver, entries)


def replay(path: str | os.PathLike[str]) -> Result:
    """Play a recorded result through runner and statistics; what only a device tells is kept.

    Raises
    ------
    ResultError
        If the file holds no valid result.
    ConfigError
        If it is itself a replay, or of estimates.
    """
    from milpress.device.drivers.replay import ReplayDriver

    data, digest = files.read_json(path)
    recorded = files.parse(data, str(path))
    if recorded.provenance.kind in ("replay", "estimate"):
        msg = f"{path}: a replay must be of something that ran, got {recorded.provenance.kind}"
        raise ConfigError(msg)
    entries = []
    for entry in recorded.entries:
        timing = entry.timing
        if timing is not None and timing.best is not None:
            best = timing.best
            plan = Plan(
                warmup=1,
                samples_per_round=max(best.round_sizes),
                min_rounds=len(best.rounds),
                max_rounds=len(best.rounds),
                cached_loads=0,
                batch=0,
            )
            driver = ReplayDriver(entry)
            runner = Runner(lambda driver=driver: InProcess(driver), "", plan)  # type: ignore[misc]
            job = Job(id=entry.id, package="", units="", folder="", outputs="")
            (found,) = runner.run([job])
            core, e2e = distributions(found)
            timing = dataclasses.replace(timing, core=core, e2e=e2e if timing.e2e else None)
        entries.append(_relabelled(dataclasses.replace(entry, timing=timing)))
    provenance = schema.Provenance(
        kind="replay",
        driver="replay",
        origin=schema.Origin(kind=recorded.provenance.kind, sha256=digest, name=Path(path).name),
    )
    return dataclasses.replace(
        recorded,
        run_id=str(uuid.uuid4()),
        created=_now(),
        provenance=provenance,
        entries=tuple(entries),
    )


class InProcess:
    """A session without a process: for drivers that can't do harm."""

    def __init__(self, driver: drivers.Driver) -> None:
        self._driver = driver

    def ask(self, command: str, timeout: float, **arguments: Any) -> dict[str, Any]:
        """Return the driver's answer."""
        del timeout
        try:
            answer: dict[str, Any] = getattr(self._driver, command)(**arguments)
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            raise SessionError(message) from error
        return answer

    def close(self) -> None:
        """Do nothing."""


def _candidate(package: str | os.PathLike[str] | Candidate) -> Candidate:
    if isinstance(package, Candidate):
        return package
    return Candidate(package=Path(package), name=Path(package).stem)


def _units(driver: str, units: Sequence[str]) -> tuple[str, ...]:
    if driver == "interpreter":
        if units:
            msg = f"the interpreter must have no compute units, got {', '.join(units)}"
            raise ConfigError(msg)
        return (schema.INTERPRETER_UNITS,)
    unknown = [name for name in units if name not in schema.APPLE_UNITS]
    if unknown:
        msg = f"units must be of {', '.join(schema.APPLE_UNITS)}, got {', '.join(unknown)}"
        raise ConfigError(msg)
    return tuple(dict.fromkeys(units)) or schema.APPLE_UNITS


def sessions_of(driver: str, options: Mapping[str, Any]) -> OpenSession:
    """Return what makes sessions of a driver, each in a process of its own.

    Raises
    ------
    ConfigError
        If there is none of that name.
    """
    if driver not in drivers.DRIVERS:
        msg = f"a driver must be one of {', '.join(drivers.DRIVERS)}, got {driver!r}"
        raise ConfigError(msg)
    return lambda: ProcessSession(worker_command(driver, **options))


def check_driver(open_session: OpenSession, driver: str) -> dict[str, Any]:
    """Return what a driver says of itself, before anything is written or run.

    Raises
    ------
    DriverError
        If it can't run here.
    """
    session = open_session()
    try:
        return session.ask("describe", 300)
    except SessionError as error:
        # The driver's own words, behind the type of the error.
        said = error.message.rpartition("last words: ")[2].rpartition("DriverError: ")[2]
        if error.is_over and "DriverError: " not in error.message:
            said = f"the driver {driver} must be able to start, got: {error.message}"
        raise DriverError(said) from None
    finally:
        session.close()


def _jobs(
    candidates: Sequence[Candidate], units: Sequence[str], folder: Path
) -> list[tuple[int, Job]]:
    """Return the configurations, all of one unit together, so that they take turns."""
    names = [candidate.name for candidate in candidates]
    if len(set(names)) < len(names):
        names = [f"{i + 1} {name}" for i, name in enumerate(names)]
    jobs = []
    for unit in units:
        for i, candidate in enumerate(candidates):
            place = folder / f"{unit}-{i}"
            place.mkdir()
            jobs.append(
                (
                    i,
                    Job(
                        id=f"{names[i]} @ {unit}",
                        package=str(candidate.package.absolute()),
                        units=unit,
                        folder=str(place),
                        outputs=str(place / "outputs.npz"),
                    ),
                )
            )
    return jobs


class _References:
    """What the interpreter makes of the samples, once for each package, in a process of its own."""

    def __init__(self, folder: Path, samples: Path, function: str | None) -> None:
        self._folder, self._samples = folder, samples
        self._options = {} if function is None else {"function": function}
        self._known: dict[Path, list[inputs.Arrays] | str] = {}

    def __call__(self, package: Path) -> list[inputs.Arrays] | str:
        """Return the outputs for each sample, or why there are none."""
        if package not in self._known:
            self._known[package] = self._run(package, f"reference-{len(self._known)}.npz")
        return self._known[package]

    def take(self, package: Path, findings: Findings) -> None:
        """Take what the interpreter has already made of the samples."""
        if findings.has_outputs:
            self._known[package] = inputs.read(findings.job.outputs)

    def _run(self, package: Path, name: str) -> list[inputs.Arrays] | str:
        session = ProcessSession(worker_command("interpreter", **self._options))
        path = self._folder / name
        try:
            session.ask("feed", _REFERENCE_SECONDS, inputs=str(self._samples))
            session.ask("load", _REFERENCE_SECONDS, path=str(package.absolute()), units="")
            session.ask("outputs", _REFERENCE_SECONDS, path=str(path))
        except SessionError as error:
            return error.message
        finally:
            session.close()
        return inputs.read(path)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Assembly:
    """Makes entries of findings; what was not measured on a device gets no device's fields."""

    kind: Kind
    plan: Plan
    function: str | None
    seed: int | None
    digest: str
    n_samples: int
    is_random: bool
    baseline: Candidate
    references: Callable[[Path], list[inputs.Arrays] | str]

    def entry(self, model: schema.Model, candidate: Candidate, findings: Findings) -> Entry:
        warnings = list(findings.warnings)
        units = findings.job.units
        if self.kind == "fake":
            units = f"{schema.FAKE_UNITS_PREFIX}{units}"
        device: dict[str, Any] = {}
        if self.kind == "measured":
            device = self._device_sections(findings, candidate, warnings)
        else:
            seen = {
                "placement": findings.placement,
                "memory": findings.memory,
                "energy": findings.energy,
            }
            warnings += [
                f"{name}: withheld, as nothing was measured on a device"
                for name, value in seen.items()
                if value
            ]
        failure = findings.failure
        core, e2e = (None, None) if failure else distributions(findings)
        return Entry(
            id=findings.job.id if self.kind != "fake" else f"fake: {findings.job.id}",
            status="ok" if failure is None else "failed",
            failure=failure,
            model=model,
            settings=schema.Settings(
                compute_units=units,
                warmup=self.plan.warmup,
                samples_per_round=self.plan.samples_per_round,
                input_seed=self.seed,
                input_sha256=self.digest,
                interleaved_with=tuple(
                    each if self.kind != "fake" else f"fake: {each}"
                    for each in findings.interleaved_with
                ),
                function=self.function,
            ),
            timing=schema.Timing(
                kind=self.kind,
                package_compile=findings.compile_ms,
                load_first=findings.load_ms,
                load_cached=tuple(findings.cached_ms) if self.kind != "cpu_reference" else (),
                predict_first=findings.first_ms,
                core=core,
                e2e=e2e,
            ),
            accuracy=self._accuracy(candidate, warnings),
            warnings=tuple(warnings),
            **device,
        )

    def _device_sections(
        self, findings: Findings, candidate: Candidate, warnings: list[str]
    ) -> dict[str, Any]:
        kind = self.kind
        found: dict[str, Any] = {}
        if findings.memory:
            found["memory"] = schema.Memory(kind=kind, **findings.memory)
        states = [state for state in findings.thermal if state is not None]
        if states:
            found["thermal"] = schema.Thermal(
                kind=kind,
                before=states[0],
                after=states[-1],
                rejected_rounds=findings.n_rejected,
            )
        if findings.failure is not None:
            return found
        if findings.placement.get("ops"):
            ops = [
                schema.OpPlacement(**{**op, "supported": tuple(op["supported"])})
                for op in findings.placement["ops"]
            ]
            found["placement"] = schema.Placement(
                kind=kind, source=findings.placement["source"], ops=tuple(ops)
            )
        else:
            warnings.append("placement: Core ML gave no plan")
        if findings.throughput_ms:
            rate = 1e3 * self.plan.batch / findings.throughput_ms
            found["throughput"] = schema.Throughput(
                kind=kind, batch=self.plan.batch, per_second=rate
            )
        if findings.energy:
            found["energy"] = schema.Energy(kind=kind, **findings.energy)
        parity = self._parity(findings, candidate, warnings)
        if parity is not None:
            found["parity"] = parity
        return found

    def _parity(
        self, findings: Findings, candidate: Candidate, warnings: list[str]
    ) -> schema.Parity | None:
        if not findings.has_outputs:
            return None
        reference = self.references(candidate.package)
        if isinstance(reference, str):
            warnings.append(f"parity: the interpreter has no outputs: {reference}")
            return None
        found = agreement.compare(reference, inputs.read(findings.job.outputs))
        if found is None:
            warnings.append("parity: no output is comparable with the interpreter's")
            return None
        return schema.Parity(
            kind=self.kind,
            reference="interpreter, float32",
            snr_db=Decibels(found.snr_db),
            max_error=found.max_error,
        )

    def _accuracy(self, candidate: Candidate, warnings: list[str]) -> schema.Accuracy | None:
        expected, got = self.references(self.baseline.package), self.references(candidate.package)
        if isinstance(expected, str) or isinstance(got, str):
            reason = expected if isinstance(expected, str) else got
            warnings.append(f"accuracy: the interpreter has no outputs: {reason}")
            return None
        found = agreement.compare(expected, got)
        if found is None:
            warnings.append("accuracy: no output is comparable with the baseline's")
            return None
        return schema.Accuracy(
            kind="cpu_reference",
            engine="interpreter, float32",
            baseline=self.baseline.name,
            n_samples=self.n_samples,
            is_random=self.is_random,
            snr_db=Decibels(found.snr_db),
            top1=found.top1,
        )


def _with_evidence(entries: Sequence[Entry]) -> list[Entry]:
    """Add what memory and latency suggest of when weights are decoded."""
    baselines: dict[str, Entry] = {}
    for entry in entries:
        if entry.status == "ok":
            baselines.setdefault(entry.settings.compute_units, entry)
    on_cpu = {
        entry.model.sha256: entry for entry in entries if entry.settings.compute_units == "CPU_ONLY"
    }
    return [
        dataclasses.replace(
            entry,
            decompression=decompression(entry, baselines.get(entry.settings.compute_units)),
            warnings=(*entry.warnings, *_doubts(entry, on_cpu.get(entry.model.sha256))),
        )
        for entry in entries
    ]


def _doubts(entry: Entry, on_cpu: Entry | None) -> list[str]:
    """Return whether a model is no faster with the Neural Engine than without."""
    if entry.settings.compute_units != "CPU_AND_NE" or on_cpu is None:
        return []
    if entry.timing is None or on_cpu.timing is None:
        return []
    one, two = entry.timing.best, on_cpu.timing.best
    if one is None or two is None or one.ci95[0] > two.ci95[1] or one.ci95[1] < two.ci95[0]:
        return []
    return ["CPU_AND_NE takes as long as CPU_ONLY: the Neural Engine may not be used at all"]


def decompression(entry: Entry, baseline: Entry | None) -> schema.Decompression | None:
    """Return what the figures of a compressed model are consistent with; ``None`` if it is none.

    No interface tells when Core ML decodes weights: at load (ahead of time) or at each use (just in
    time). Memory that grows by the dense size speaks for the first, by the stored size for the
    second; a prediction faster than the baseline's, on a model bound by weights, for the second.
    """
    model = entry.model
    if entry.timing is None or model.weight_bytes > _CLEARLY_SMALLER * model.dense_weight_bytes:
        return None
    evidence: list[str] = []
    votes: set[str] = set()
    if entry.memory is not None:
        grown = entry.memory.model
        between = (model.weight_bytes + model.dense_weight_bytes) / 2
        vote = "jit" if grown < between else "aot"
        votes.add(vote)
        evidence.append(
            f"loading added {grown} bytes to the process, where weights take "
            f"{model.weight_bytes} as stored and {model.dense_weight_bytes} dense; memory of the "
            "Neural Engine may be outside the process"
        )
    if baseline is not None and baseline is not entry:
        ratio = ratio_of(baseline, entry)
        if ratio is not None and ratio.interval.high < 1:
            votes.add("jit")
            evidence.append(
                f"a prediction takes {ratio.value:.3f} times the baseline's "
                f"({ratio.interval.low:.3f} to {ratio.interval.high:.3f})"
            )
    verdict = f"consistent_with_{votes.pop()}" if len(votes) == 1 else "unknown"
    return schema.Decompression(
        kind=entry.timing.kind,
        verdict=cast("schema.Verdict", verdict),
        evidence=tuple(evidence),
    )


def ratio_of(baseline: Entry, entry: Entry) -> stats.Ratio | None:
    """Return how many times as long one entry takes as another that it took turns with."""
    if baseline.timing is None or entry.timing is None:
        return None
    for name in ("core", "e2e"):
        one, two = getattr(baseline.timing, name), getattr(entry.timing, name)
        if one is not None and two is not None:
            return stats.paired_ratio(one.by_round, two.by_round)
    return None


def model_of(candidate: Candidate) -> schema.Model:
    """Return what the bytes of a package say."""
    from milpress.inspection import inspect
    from milpress.mil.dtypes import by_name

    found = inspect(candidate.package)
    stored_as: dict[str, int] = {}
    for weight in found.weights:
        stored_as[weight.stored_as] = stored_as.get(weight.stored_as, 0) + 1
    return schema.Model(
        name=candidate.name,
        path=str(candidate.package),
        sha256=package_digest(candidate.package),
        package_bytes=found.package_bytes,
        weight_bytes=sum(weight.n_bytes for weight in found.weights),
        dense_weight_bytes=sum(
            by_name(weight.dtype).n_bytes(math.prod(weight.shape)) for weight in found.weights
        ),
        specification_version=found.specification_version,
        stored_as=stored_as,
        treatment=candidate.treatment,
    )


def package_digest(package: Path) -> str:
    """Return a hash of all files of a package and their names."""
    digest = hashlib.sha256()
    for path in sorted(path for path in package.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(package).as_posix()}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _result(described: dict[str, Any], driver: str, entries: Sequence[Entry]) -> Result:
    from milpress._version import __version__

    kind: Kind = described["kind"]
    device = None
    if kind == "measured":
        given = described["device"]
        device = schema.Device(**{**given, "compute_devices": tuple(given["compute_devices"])})
    warnings = []
    if device is not None and not device.has_neural_engine:
        warnings.append("Core ML offers no Neural Engine here: no time is one of a Neural Engine")
    if device is not None:
        spoils = {
            "a virtual machine": device.is_virtual,
            "low power mode": device.low_power,
            "running on battery": device.on_battery,
            "Python for another processor (Rosetta)": platform.machine() != "arm64",
        }
        warnings += [f"{what} spoils figures" for what, is_so in spoils.items() if is_so]
    return Result(
        run_id=str(uuid.uuid4()),
        created=_now(),
        tool=schema.Tool(milpress=__version__, **described["tool"]),
        provenance=schema.Provenance(kind=kind, driver=driver),
        host=schema.Host(
            system=platform.system(),
            machine=platform.machine(),
            n_cores=os.cpu_count() or 1,
            python=platform.python_version(),
        ),
        device=device,
        entries=tuple(entries),
        warnings=tuple(warnings),
    )


def _relabelled(entry: Entry) -> Entry:
    """Return an entry whose sections are a replay's, other than what was no device's."""
    changed: dict[str, Any] = {}
    for item in dataclasses.fields(Entry):
        section = getattr(entry, item.name)
        if hasattr(section, "kind") and item.name not in ("accuracy", "estimate"):
            changed[item.name] = dataclasses.replace(section, kind="replay")
    return dataclasses.replace(entry, **changed)


def _now() -> str:
    return dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds")


def failed_entry(candidate: Candidate, model: schema.Model, units: str, failure: Failure) -> Entry:
    """Return the entry of a configuration that could not even be begun."""
    settings = schema.Settings(
        compute_units=units, warmup=0, samples_per_round=0, input_seed=None, input_sha256=""
    )
    return Entry(
        id=f"{candidate.name} @ {units}",
        status="failed",
        model=model,
        settings=settings,
        failure=failure,
    )
