"""Entries of a result: each configuration's figures, with those that were not measured withheld."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milpress.device import agreement, schema
from milpress.device.runner import Findings, Plan
from milpress.device.schema import Distribution, Entry, Failure, Kind
from milpress.device.sessions import ProcessSession, SessionError, worker_command
from milpress.inspection import inspect
from milpress.mil.digest import files_digest
from milpress.mil.dtypes import by_name
from milpress.plain.arrays import Arrays
from milpress.plain.structure import Decibels, structured
from milpress.samples.files import read_samples

# Nobody waits for the interpreter to be fast, nor should one that hangs be waited for.
_REFERENCE_SECONDS = 1800.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A package that is to be run: what it is called, and what was done to it, in words."""

    package: Path
    name: str
    treatment: str = ""


def model_of(candidate: Candidate) -> schema.Model:
    """Return what the bytes of a package say."""
    inspection = inspect(candidate.package)
    weights = inspection.weights
    return schema.Model(
        name=candidate.name,
        path=str(candidate.package),
        sha256=files_digest(candidate.package),
        package_bytes=inspection.package_bytes,
        weight_bytes=sum(weight.n_bytes for weight in weights),
        dense_weight_bytes=sum(by_name(w.dtype).n_bytes(math.prod(w.shape)) for w in weights),
        specification_version=inspection.specification_version,
        stored_as=dict(Counter(weight.stored_as for weight in weights)),
        treatment=candidate.treatment,
    )


class References:
    """Outputs of the interpreter, once for each package, in a process of its own."""

    def __init__(self, folder: Path, samples: Path, function: str | None) -> None:
        self._folder, self._samples = folder, samples
        self._options = {} if function is None else {"function": function}
        self._known: dict[Path, list[Arrays] | str] = {}

    def __call__(self, package: Path) -> list[Arrays] | str:
        """Return the outputs for each sample, or why there are none."""
        if package not in self._known:
            self._known[package] = self._run(package, f"reference-{len(self._known)}.npz")
        return self._known[package]

    def take(self, package: Path, findings: Findings) -> None:
        """Take the outputs of a run of the interpreter."""
        if findings.has_outputs:
            self._known[package] = read_samples(findings.job.outputs)

    def _run(self, package: Path, name: str) -> list[Arrays] | str:
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
        return read_samples(path)


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryBuilder:
    """Makes entries of findings; only what was measured on a device gets a device's sections."""

    kind: Kind
    plan: Plan
    function: str | None
    seed: int | None
    digest: str
    n_samples: int
    is_random: bool
    baseline: Candidate
    references: Callable[[Path], list[Arrays] | str]

    def entry(self, model: schema.Model, candidate: Candidate, findings: Findings) -> Entry:
        """Return the entry of one configuration."""
        warnings = list(findings.warnings)
        is_fake = self.kind == "fake"
        prefix = "fake: " if is_fake else ""
        device: dict[str, Any] = {}
        if self.kind == "measured":
            device = self._device_sections(findings, candidate, warnings)
        else:
            warnings += [
                f"{name}: withheld, as nothing was measured on a device"
                for name in ("placement", "memory", "energy")
                if getattr(findings, name)
            ]
        failure = findings.failure
        core, e2e = (
            Distribution.of(times) if times and failure is None else None
            for times in (findings.core, findings.e2e)
        )
        return Entry(
            id=f"{prefix}{findings.job.id}",
            status="ok" if failure is None else "failed",
            failure=failure,
            model=model,
            settings=schema.Settings(
                compute_units=f"{schema.FAKE_UNITS_PREFIX * is_fake}{findings.job.units}",
                warmup=self.plan.warmup,
                samples_per_round=self.plan.samples_per_round,
                input_seed=self.seed,
                input_sha256=self.digest,
                interleaved_with=tuple(f"{prefix}{each}" for each in findings.interleaved_with),
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
        sections: dict[str, Any] = {}
        if findings.memory:
            sections["memory"] = schema.Memory(kind=kind, **findings.memory)
        states = [state for state in findings.thermal if state is not None]
        if states:
            sections["thermal"] = schema.Thermal(
                kind=kind,
                before=states[0],
                after=states[-1],
                rejected_rounds=findings.n_rejected,
            )
        if findings.failure is not None:
            return sections
        if findings.placement.get("ops"):
            told = {"kind": kind, **findings.placement}
            sections["placement"] = structured(told, schema.Placement, "placement")
        else:
            warnings.append("placement: Core ML gave no plan")
        if findings.throughput_ms:
            rate = 1e3 * self.plan.batch / findings.throughput_ms
            sections["throughput"] = schema.Throughput(
                kind=kind, batch=self.plan.batch, per_second=rate
            )
        if findings.energy:
            sections["energy"] = schema.Energy(kind=kind, **findings.energy)
        sections["parity"] = self._parity(findings, candidate, warnings)
        return sections

    def _parity(
        self, findings: Findings, candidate: Candidate, warnings: list[str]
    ) -> schema.Parity | None:
        if not findings.has_outputs:
            return None
        reference = self.references(candidate.package)
        if isinstance(reference, str):
            warnings.append(f"parity: the interpreter has no outputs: {reference}")
            return None
        agreed = agreement.compare(reference, read_samples(findings.job.outputs))
        if agreed is None:
            warnings.append("parity: no output is comparable with the interpreter's")
            return None
        return schema.Parity(
            kind=self.kind,
            reference="interpreter, float32",
            snr_db=Decibels(agreed.snr_db),
            max_error=agreed.max_error,
        )

    def _accuracy(self, candidate: Candidate, warnings: list[str]) -> schema.Accuracy | None:
        expected, outputs = (
            self.references(package) for package in (self.baseline.package, candidate.package)
        )
        if isinstance(expected, str) or isinstance(outputs, str):
            reason = expected if isinstance(expected, str) else outputs
            warnings.append(f"accuracy: the interpreter has no outputs: {reason}")
            return None
        agreed = agreement.compare(expected, outputs)
        if agreed is None:
            warnings.append("accuracy: no output is comparable with the baseline's")
            return None
        return schema.Accuracy(
            kind="cpu_reference",
            engine="interpreter, float32",
            baseline=self.baseline.name,
            n_samples=self.n_samples,
            is_random=self.is_random,
            snr_db=Decibels(agreed.snr_db),
            top1=agreed.top1,
        )


def failed_entry(model: schema.Model, units: str, failure: Failure) -> Entry:
    """Return the entry of a configuration that could not even be begun."""
    settings = schema.Settings(
        compute_units=units, warmup=0, samples_per_round=0, input_seed=None, input_sha256=""
    )
    return Entry(
        id=f"{model.name} @ {units}",
        status="failed",
        model=model,
        settings=settings,
        failure=failure,
    )
