"""Results of every kind, made by hand: nothing here was measured anywhere."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from milpress.device import schema
from milpress.device.schema import Distribution, Entry, Kind, Result
from milpress.plain.structure import Decibels

ROUNDS = {0: (1.0, 1.25, 1.5), 1: (1.0, 1.125, 4.0)}


def distribution(scale: float = 1.0) -> Distribution:
    return Distribution.of({i: [scale * each for each in row] for i, row in ROUNDS.items()})


def model(name: str = "tiny", n_bytes: int = 1000, **changes: Any) -> schema.Model:
    made = schema.Model(
        name=name,
        path=f"models/{name}.mlpackage",
        sha256="0" * 64,
        package_bytes=n_bytes + 24,
        weight_bytes=n_bytes,
        dense_weight_bytes=1000,
        specification_version=9,
        stored_as={"dense": 3},
    )
    return replace(made, **changes)


def settings(units: str, *others: str) -> schema.Settings:
    return schema.Settings(
        compute_units=units,
        warmup=10,
        samples_per_round=3,
        input_seed=0,
        input_sha256="1" * 64,
        interleaved_with=others,
    )


def device(**changes: Any) -> schema.Device:
    made = schema.Device(
        model="Mac14,2",
        chip="Apple M2",
        os="macOS 15.1",
        os_build="24B83",
        neural_engine_cores=16,
        compute_devices=("cpu", "gpu", "neural_engine"),
    )
    return replace(made, **changes)


def placement(kind: Kind, preferred: str = "neural_engine") -> schema.Placement:
    ops = (
        schema.OpPlacement(
            name="y", op_type="conv", preferred=preferred, supported=("cpu", preferred), cost=0.75
        ),
        schema.OpPlacement(name="z", op_type="softmax", preferred="cpu", cost=0.25),
        schema.OpPlacement(name="w", op_type="const", preferred="none"),
    )
    return schema.Placement(kind=kind, source="MLComputePlan", ops=ops)


def entry(kind: Kind, units: str, name: str = "tiny", scale: float = 1.0, **changes: Any) -> Entry:
    is_device = kind in ("measured", "replay")
    timing = schema.Timing(
        kind=kind,
        load_first=20.0,
        predict_first=3.0,
        e2e=distribution(1.1 * scale),
        package_compile=100.0 if is_device else None,
        load_cached=(2.0, 2.5) if is_device else (),
        core=distribution(scale) if is_device else None,
    )
    sections: dict[str, Any] = {}
    if is_device:
        sections = {
            "throughput": schema.Throughput(kind=kind, batch=16, per_second=900.0),
            "placement": placement(kind),
            "memory": schema.Memory(kind=kind, method="task_info", baseline=10, after_load=1300),
            "thermal": schema.Thermal(kind=kind, before="nominal", after="fair", rejected_rounds=1),
            "energy": schema.Energy(kind=kind, method="powermetrics", neural_engine_mw=250.0),
            "parity": schema.Parity(
                kind=kind, reference="interpreter", snr_db=Decibels(61.0), max_error=0.01
            ),
            "decompression": schema.Decompression(
                kind=kind, verdict="consistent_with_aot", evidence=("loading added much",)
            ),
        }
    made = Entry(
        id=f"{name} @ {units}",
        status="ok",
        model=model(name),
        settings=settings(units),
        timing=timing,
        accuracy=schema.Accuracy(
            kind="cpu_reference",
            engine="interpreter",
            baseline="tiny",
            n_samples=4,
            is_random=True,
            snr_db=Decibels(30.0),
            top1=0.9,
        ),
        **sections,
    )
    return replace(made, **changes)


def failed(kind: Kind, units: str, name: str = "broken") -> Entry:
    made = entry(kind, units, name)
    return replace(
        made,
        status="failed",
        failure=schema.Failure(phase="load", reason="crashed", message="ended by SIGSEGV"),
        timing=schema.Timing(kind=kind),
        throughput=None,
        placement=None,
        energy=None,
        parity=None,
        decompression=None,
    )


def result(kind: Kind, *entries: Entry, **changes: Any) -> Result:
    drivers = {
        "measured": "coreml",
        "cpu_reference": "interpreter",
        "estimate": "estimate",
        "replay": "replay",
        "fake": "fake",
    }
    origin = schema.Origin(kind="measured", sha256="a" * 64, name="r.json")
    has_device = kind in ("measured", "replay")
    made = Result(
        run_id="1",
        created="2026-01-01T00:00:00+00:00",
        tool=schema.Tool(milpress="0"),
        provenance=schema.Provenance(
            kind=kind, driver=drivers[kind], origin=origin if kind == "replay" else None
        ),
        host=schema.Host(
            system="Darwin" if has_device else "Linux", machine="arm64", n_cores=8, python="3.12"
        ),
        device=device() if has_device else None,
        entries=entries or DEFAULTS[kind](),
    )
    return replace(made, **changes)


def estimate() -> Entry:
    made = entry("estimate", "CPU_AND_NE")
    guess = schema.Estimate(kind="estimate", estimate_ms=2.0, method="roofline", source="nobody")
    return replace(made, timing=None, estimate=guess)


DEFAULTS: dict[Kind, Any] = {
    "measured": lambda: (
        entry("measured", "CPU_AND_NE"),
        entry("measured", "CPU_ONLY", placement=placement("measured", "cpu")),
        failed("measured", "ALL"),
    ),
    "cpu_reference": lambda: (entry("cpu_reference", "INTERPRETER"),),
    "estimate": lambda: (estimate(),),
    "replay": lambda: (entry("replay", "CPU_AND_NE"),),
    "fake": lambda: (entry("fake", "FAKE:CPU_AND_NE"),),
}
