"""Benchmarks: packages in every configuration, measured or replayed."""

from __future__ import annotations

import dataclasses
import datetime as dt
import hashlib
import os
import platform
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milpress._version import __version__
from milpress.device import drivers, files, schema
from milpress.device.entries import Candidate, EntryBuilder, References, model_of
from milpress.device.evidence import with_evidence
from milpress.device.runner import Clock, Job, Plan, Runner
from milpress.device.schema import Distribution, Entry, Kind, Result
from milpress.device.sessions import ProcessSession, Session, SessionError, worker_command
from milpress.engines.features import features_of
from milpress.errors import ConfigError, DriverError
from milpress.mil.package import Package
from milpress.plain.structure import structured
from milpress.progress import Progress, shown
from milpress.samples.data import RandomSamples, Samples
from milpress.samples.files import write_samples

if TYPE_CHECKING:
    from milpress.samples.data import Data

OpenSession = Callable[[], Session]


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
    progress: Progress | bool | None = None,
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
        ``True`` shows a bar; a function is called with steps done, steps in all and what is at
        hand.

    Returns
    -------
    Result
        An entry for each configuration. One that failed says why, and has not kept others from
        running.

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
    candidates = [_candidate(package) for package in packages]
    if not candidates:
        msg = "no package to measure: give at least one"
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
    models = {candidate: model_of(candidate) for candidate in candidates}
    function = options.get("function")
    with tempfile.TemporaryDirectory(prefix="milpress-bench-") as name:
        folder = Path(name)
        path = folder / "samples.npz"
        samples = Samples(
            RandomSamples(4, seed) if data is None else data,
            features_of(Package(candidates[0].package), function),
        )
        write_samples(path, samples)
        jobs = _jobs(candidates, units, folder)
        with shown(progress) as note:
            findings = Runner(open_session, str(path), plan, clock or time, note).run(list(jobs))
        references = References(folder, path, function)
        if driver == "interpreter":
            for each in findings:
                references.take(jobs[each.job].package, each)
        builder = EntryBuilder(
            kind=described["kind"],
            plan=plan,
            function=function,
            seed=seed if data is None else None,
            digest=hashlib.sha256(path.read_bytes()).hexdigest(),
            n_samples=len(samples),
            is_random=samples.is_random,
            baseline=candidates[0],
            references=references,
        )
        entries = [builder.entry(models[jobs[each.job]], jobs[each.job], each) for each in findings]
    if described["kind"] == "measured":
        entries = with_evidence(entries)
    return _result(described, driver, entries)


def replay(path: str | os.PathLike[str]) -> Result:
    """Return a recorded result with statistics made anew; figures of the device are kept.

    Raises
    ------
    ResultError
        If the file holds no valid result.
    ConfigError
        If it is itself a replay, or of estimates.
    """
    data, digest = files.read_json(path)
    recorded = files.parse(data, str(path))
    if recorded.provenance.kind in ("replay", "estimate"):
        msg = f"{path}: a replay must be of something that ran, got {recorded.provenance.kind}"
        raise ConfigError(msg)
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
        entries=tuple(_replayed(entry) for entry in recorded.entries),
    )


def _candidate(package: str | os.PathLike[str] | Candidate) -> Candidate:
    if isinstance(package, Candidate):
        return package
    return Candidate(package=Path(package), name=Path(package).stem)


def _units(driver: str, units: Sequence[str]) -> tuple[str, ...]:
    if driver == "interpreter":
        if units:
            msg = f"the interpreter has no compute units; leave out {', '.join(units)}"
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
            said = f"the driver {driver} can't start: {error.message}"
        raise DriverError(said) from None
    finally:
        session.close()


def _jobs(
    candidates: Sequence[Candidate], units: Sequence[str], folder: Path
) -> dict[Job, Candidate]:
    """Return the configurations, all of one unit together, so that they take turns."""
    names = [candidate.name for candidate in candidates]
    if len(set(names)) < len(names):
        names = [f"{i + 1} {name}" for i, name in enumerate(names)]
    jobs = {}
    for unit in units:
        for i, candidate in enumerate(candidates):
            place = folder / f"{unit}-{i}"
            place.mkdir()
            job = Job(
                id=f"{names[i]} @ {unit}",
                package=str(candidate.package.absolute()),
                units=unit,
                folder=str(place),
                outputs=str(place / "outputs.npz"),
            )
            jobs[job] = candidate
    return jobs


def _result(described: dict[str, Any], driver: str, entries: Sequence[Entry]) -> Result:
    kind: Kind = described["kind"]
    device: schema.Device | None = None
    warnings = []
    if kind == "measured":
        device = structured(described["device"], schema.Device, "device")
        if not device.has_neural_engine:
            warnings.append(
                "Core ML offers no Neural Engine here: no latency is that of a Neural Engine"
            )
        conditions = {
            "The Mac is a virtual machine": device.is_virtual,
            "Low power mode is on": device.low_power,
            "The Mac runs on battery": device.on_battery,
            "Python is one for another processor (Rosetta)": platform.machine() != "arm64",
        }
        warnings += [
            f"{condition}: latencies are not comparable"
            for condition, holds in conditions.items()
            if holds
        ]
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


def _replayed(entry: Entry) -> Entry:
    """Return an entry whose sections are a replay's, other than what was no device's."""
    changed: dict[str, Any] = {}
    for item in dataclasses.fields(Entry):
        section = getattr(entry, item.name)
        if hasattr(section, "kind") and item.name not in ("accuracy", "estimate"):
            changed[item.name] = dataclasses.replace(section, kind="replay")
    if entry.timing is not None:
        core, e2e = (
            times and _counted_anew(times) for times in (entry.timing.core, entry.timing.e2e)
        )
        changed["timing"] = dataclasses.replace(changed["timing"], core=core, e2e=e2e)
    return dataclasses.replace(entry, **changed)


def _counted_anew(times: Distribution) -> Distribution:
    """Return the statistics of recorded samples, their rounds counted from 0."""
    return Distribution.of(dict(enumerate(times.by_round.values())))


def _now() -> str:
    return dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds")
