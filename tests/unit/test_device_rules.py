"""No number without where it is from: valid results pass, and each way to lie is named."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from device_results import (
    device,
    distribution,
    entry,
    estimate,
    failed,
    model,
    placement,
    result,
    settings,
)

from milpress import errors
from milpress.device import files, rules, schema
from milpress.device.schema import Entry, Result
from milpress.plain.structure import Decibels


@pytest.mark.parametrize("kind", schema.KINDS)
def test_a_result_of_every_kind_passes_and_survives_json(kind):
    made = result(kind)
    assert rules.problems(made) == []
    assert files.parse(json.loads(json.dumps(made.to_dict()))) == made


@pytest.mark.parametrize("name", ["no Neural Engine", "stub", "stub phone", "phone", "limits"])
def test_what_is_allowed_passes(name):
    assert rules.problems(ALLOWED[name]) == []


def changed(made: Result, **changes: Any) -> Result:
    """Change the first entry."""
    first, *others = made.entries
    return replace(made, entries=(replace(first, **changes), *others))


def provenance(made: Result, **changes: Any) -> Result:
    return replace(made, provenance=replace(made.provenance, **changes))


def timing(made: Result, **changes: Any) -> Result:
    found = made.entries[0].timing
    assert found is not None
    return changed(made, timing=replace(found, **changes))


def sections(made: Entry) -> dict[str, Any]:
    names = ("throughput", "placement", "memory", "thermal", "energy", "parity", "decompression")
    return {name: getattr(made, name) for name in names}


MEASURED, REFERENCE, FAKE = (result(kind) for kind in ("measured", "cpu_reference", "fake"))
REPLAY, ESTIMATE = result("replay"), result("estimate")
ORIGIN = schema.Origin(kind="measured", sha256="a" * 64, name="r.json")
FAKE_ORIGIN = replace(ORIGIN, kind="fake")
NO_ENGINE = device(compute_devices=("cpu", "gpu"), neural_engine_cores=None)
SHORT = replace(distribution(), samples=(1.0, 1.25, 1.5, 1.0, 1.125))
NEGATIVE = schema.Distribution.of({0: [-1.0, 2.0]})
COSTLY = schema.OpPlacement(name="y", op_type="conv", preferred="cpu", cost=1.5)
ELSEWHERE = schema.OpPlacement(name="y", op_type="conv", preferred="cloud")

QUIET = schema.Energy(kind="measured", method="powermetrics", cpu_mw=0.0)
FREE = schema.OpPlacement(name="y", op_type="conv", preferred="gpu", cost=0.0)
WHOLE = replace(FREE, name="z", cost=1.0)
ALLOWED = {
    "no Neural Engine": changed(
        replace(MEASURED, device=NO_ENGINE, entries=MEASURED.entries[:1]),
        placement=placement("measured", "gpu"),
        energy=QUIET,
    ),
    "stub": timing(
        provenance(FAKE, driver="coreml"),
        core=distribution(),
        package_compile=1.0,
        load_cached=(1.0,),
    ),
    "stub phone": provenance(FAKE, driver="iphone"),
    "phone": replace(REPLAY, device=device(os="iOS 18.1")),
    # One sample in a round, no time at all, all of the cost and none of it.
    "limits": timing(
        changed(MEASURED, placement=replace(placement("measured"), ops=(FREE, WHOLE))),
        core=schema.Distribution.of({0: [0.0], 4: [2.0]}),
        load_first=0.0,
    ),
}
BREACHES = {
    # Who may say that something was measured.
    "measured by the interpreter": (
        provenance(MEASURED, driver="interpreter"),
        "kind measured must be by coreml or iphone, got interpreter",
    ),
    "measured by the fake": (provenance(MEASURED, driver="fake"), "got fake"),
    "measured on Linux": (
        replace(MEASURED, host=replace(MEASURED.host, system="Linux")),
        "must be from a Mac (Darwin), got Linux",
    ),
    "a reference by Core ML": (
        provenance(REFERENCE, driver="coreml"),
        "by interpreter, got coreml",
    ),
    "a replay by Core ML": (provenance(REPLAY, driver="coreml"), "by replay, got coreml"),
    "an estimate by Core ML": (provenance(ESTIMATE, driver="coreml"), "by estimate, got coreml"),
    "a fake by the interpreter": (provenance(FAKE, driver="interpreter"), "got interpreter"),
    # Replays.
    "a replay of nothing": (
        provenance(REPLAY, origin=None),
        "a replay must name its origin",
    ),
    "a replay of a replay": (
        provenance(REPLAY, origin=replace(ORIGIN, kind="replay")),
        "must be of something that ran, got replay",
    ),
    "a replay of an estimate": (
        provenance(REPLAY, origin=replace(ORIGIN, kind="estimate")),
        "must be of something that ran, got estimate",
    ),
    "a replay without hash": (
        provenance(REPLAY, origin=replace(ORIGIN, sha256="abc")),
        "must have a SHA-256, got 'abc'",
    ),
    "an origin of what is no replay": (
        provenance(MEASURED, origin=ORIGIN),
        "only a replay must have an origin, not a result of kind",
    ),
    # Devices.
    "measured without device": (
        replace(MEASURED, device=None),
        "must describe its device",
    ),
    "a reference with a device": (
        replace(REFERENCE, device=device()),
        "a device must be that of a measured result, got cpu_reference",
    ),
    "a fake with a device": (replace(FAKE, device=device()), "got fake"),
    "an estimate with a device": (replace(ESTIMATE, device=device()), "got estimate"),
    "a replayed fake with a device": (
        provenance(REPLAY, origin=FAKE_ORIGIN),
        "a device must be that of a measured result, got fake",
    ),
    "a phone as a Mac": (
        replace(MEASURED, device=device(os="iOS 18.1")),
        "must be macOS , got 'iOS 18.1'",
    ),
    "a Mac as a phone": (provenance(MEASURED, driver="iphone"), "must be iOS , got 'macOS 15.1'"),
    "a replay on Linux as a device": (
        replace(REPLAY, device=device(os="Linux")),
        "must be macOS or iOS, got 'Linux'",
    ),
    **{
        f"{kind} with {name}": (
            changed(result(kind), **{name: replace(section, kind=kind)}),
            f"{name} must be measured on a device, got {kind}",
        )
        for kind in ("cpu_reference", "fake", "estimate")
        for name, section in sections(MEASURED.entries[0]).items()
    },
    **{
        f"a replayed fake with {name}": (
            changed(
                replace(provenance(REPLAY, origin=FAKE_ORIGIN), device=None),
                settings=settings("FAKE:x"),
            ),
            f"{name} must be measured on a device, got fake",
        )
        for name in sections(MEASURED.entries[0])
    },
    "a reference with Core ML's time": (
        timing(REFERENCE, core=distribution()),
        "timing.core must be Core ML's, got cpu_reference",
    ),
    "a reference with a compile time": (
        timing(REFERENCE, package_compile=1.0),
        "timing.package_compile must be Core ML's",
    ),
    "a reference with cached loads": (
        timing(REFERENCE, load_cached=(1.0,)),
        "timing.load_cached must be Core ML's",
    ),
    # Units.
    "the interpreter on the Neural Engine": (
        changed(REFERENCE, settings=settings("CPU_AND_NE")),
        "compute_units of cpu_reference must be INTERPRETER, got CPU_AND_NE",
    ),
    "the interpreter as Core ML's CPU": (
        changed(REFERENCE, settings=settings("CPU_ONLY")),
        "compute_units of cpu_reference must be INTERPRETER, got CPU_ONLY",
    ),
    "a fake on the Neural Engine": (
        changed(FAKE, settings=settings("CPU_AND_NE")),
        "compute_units of fake must be FAKE:..., got CPU_AND_NE",
    ),
    "a replayed fake on the Neural Engine": (
        provenance(REPLAY, origin=FAKE_ORIGIN),
        "compute_units of fake must be FAKE:..., got CPU_AND_NE",
    ),
    "measured in the interpreter's units": (
        changed(MEASURED, settings=settings("INTERPRETER")),
        "compute_units of measured must be one of CPU_ONLY",
    ),
    "measured in unknown units": (
        changed(MEASURED, settings=settings("NPU")),
        "compute_units of measured must be one of CPU_ONLY",
    ),
    # Each number says its kind.
    **{
        f"{name} of another kind than its run": (
            changed(MEASURED, **{name: replace(getattr(MEASURED.entries[0], name), kind="fake")}),
            f"the kind of {name} must be measured, got fake",
        )
        for name in ("timing", *sections(MEASURED.entries[0]))
    },
    "a reference that says measured": (
        timing(REFERENCE, kind="measured"),
        "the kind of timing must be cpu_reference, got measured",
    ),
    "a replay that says measured": (
        timing(REPLAY, kind="measured"),
        "the kind of timing must be replay, got measured",
    ),
    "a fake that says measured": (
        timing(FAKE, kind="measured"),
        "the kind of timing must be fake, got measured",
    ),
    "accuracy that says measured": (
        changed(MEASURED, accuracy=replace(MEASURED.entries[0].accuracy, kind="measured")),
        "the kind of accuracy must be cpu_reference, got measured",
    ),
    "an estimate that says measured": (
        changed(ESTIMATE, estimate=replace(ESTIMATE.entries[0].estimate, kind="measured")),
        "the kind of estimate must be estimate, got measured",
    ),
    "an estimate beside measured numbers that says so": (
        changed(MEASURED, estimate=replace(estimate().estimate, kind="measured")),
        "the kind of estimate must be estimate, got measured",
    ),
    # Estimates.
    "an estimate with times": (
        changed(ESTIMATE, timing=schema.Timing(kind="estimate", e2e=distribution())),
        "an estimate must have estimate_ms and no timing",
    ),
    # A Neural Engine that is not there.
    "ops on a Neural Engine that is not there": (
        replace(MEASURED, device=NO_ENGINE),
        "ops are placed on a Neural Engine, which the device does not have",
    ),
    "power of a Neural Engine that is not there": (
        changed(replace(MEASURED, device=NO_ENGINE), placement=placement("measured", "gpu")),
        "power is given of a Neural Engine, which the device does not have",
    ),
    "cores of a Neural Engine that is not there": (
        replace(MEASURED, device=replace(NO_ENGINE, neural_engine_cores=16)),
        "must have no cores of it",
    ),
    # Statistics.
    **{
        f"a {name} that does not follow": (
            timing(MEASURED, core=replace(distribution(), **{name: 1.26})),
            f"timing.core.{name} must be ",
        )
        for name in ("median", "p90", "p99", "minimum", "maximum")
    },
    "a median of whole calls that does not follow": (
        timing(REFERENCE, e2e=replace(distribution(), median=0.5)),
        "timing.e2e.median must be 1.1875, as the samples say, got 0.5",
    ),
    "an interval outside of the samples": (
        timing(MEASURED, core=replace(distribution(), ci95=(0.5, 1.25))),
        "timing.core.ci95 must be an interval within the samples",
    ),
    "an interval the wrong way round": (
        timing(MEASURED, core=replace(distribution(), ci95=(1.5, 1.25))),
        "timing.core.ci95 must be an interval within the samples",
    ),
    "samples without a round": (
        timing(MEASURED, core=SHORT),
        "rounds must hold each of 5 samples once",
    ),
    "a round twice": (
        timing(MEASURED, core=replace(distribution(), rounds=(0, 0))),
        "rounds must hold each of 6 samples once",
    ),
    "a round without samples": (
        timing(MEASURED, core=replace(distribution(), rounds=(0, 1, 2), round_sizes=(3, 3, 0))),
        "rounds must hold each of 6 samples once",
    ),
    "sizes of other rounds": (
        timing(MEASURED, core=replace(distribution(), rounds=(0, 1, 2))),
        "rounds must hold each of 6 samples once",
    ),
    "no samples": (
        timing(MEASURED, core=replace(distribution(), samples=(), rounds=(), round_sizes=())),
        "rounds must hold each of 0 samples once",
    ),
    # What can't be.
    "a negative size": (
        changed(MEASURED, model=model(n_bytes=-1000)),
        "model.weight_bytes must be at least 0, got -1000",
    ),
    "a negative load": (
        timing(MEASURED, load_first=-1.0),
        "timing.load_first must be at least 0, got -1.0",
    ),
    "a negative cached load": (
        timing(MEASURED, load_cached=(1.0, -1.0)),
        "timing.load_cached must be at least 0, got -1.0",
    ),
    "a negative latency": (
        timing(MEASURED, core=NEGATIVE),
        "timing.core.samples must be at least 0, got -1.0",
    ),
    **{
        f"negative {name}.{field}": (
            changed(MEASURED, **{name: replace(getattr(MEASURED.entries[0], name), **{field: -1})}),
            f"{name}.{field} must be at least 0, got -1",
        )
        for name, field in (
            ("throughput", "per_second"),
            ("memory", "after_load"),
            ("energy", "neural_engine_mw"),
        )
    },
    "a negative estimate": (
        changed(ESTIMATE, estimate=replace(estimate().estimate, estimate_ms=-1.0)),
        "estimate.estimate_ms must be at least 0",
    ),
    "more than the whole cost": (
        changed(MEASURED, placement=replace(placement("measured"), ops=(COSTLY,))),
        "the cost of an op must be from 0 to 1, got 1.5",
    ),
    "an unknown processor": (
        changed(MEASURED, placement=replace(placement("measured"), ops=(ELSEWHERE,))),
        "a processor must be one of",
    ),
    # Failures.
    "failed without reason": (
        replace(MEASURED, entries=(replace(failed("measured", "ALL"), failure=None),)),
        "a failed entry must say why",
    ),
    "failed with a latency": (
        replace(
            MEASURED,
            entries=(replace(failed("measured", "ALL"), timing=entry("measured", "ALL").timing),),
        ),
        "a failed entry must have no latency",
    ),
    "ok with a failure": (
        changed(MEASURED, failure=failed("measured", "ALL").failure),
        "only a failed entry must have a failure",
    ),
    "ok without a latency": (
        timing(MEASURED, core=None, e2e=None),
        "must have a latency or an estimate",
    ),
    "two entries of a name": (
        replace(MEASURED, entries=MEASURED.entries[:1] * 2),
        "several entries have the id",
    ),
}


@pytest.mark.parametrize(("broken", "sentence"), BREACHES.values(), ids=BREACHES)
def test_a_breach_is_named_and_refused(broken, sentence, tmp_path):
    assert any(sentence in problem for problem in rules.problems(broken))
    with pytest.raises(errors.ResultError) as caught:
        files.parse(json.loads(json.dumps(broken.to_dict())))
    assert sentence in str(caught.value)
    with pytest.raises(errors.ResultError):
        files.save(broken, tmp_path / "result.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rule", rules.RULES, ids=lambda rule: rule.__name__)
def test_each_rule_is_the_only_one_to_catch_something(rule, monkeypatch):
    monkeypatch.setattr(rules, "RULES", tuple(each for each in rules.RULES if each is not rule))
    assert any(not rules.problems(broken) for broken, _ in BREACHES.values())


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ([], [], "the result must be a mapping, got []"),
        (["schema"], "milpress-bench/2", "schema must be 'milpress-bench/1', got"),
        (["extra"], 1, "the result: unknown key extra; the keys are run_id, "),
        (["provenance", "kind"], "guessed", "provenance: kind must be one of measured"),
        (["provenance", "kind"], ["measured"], "provenance: kind must be one of measured"),
        (["host", "n_cores"], True, "host: n_cores must be a whole number, got True"),
        (["host", "n_cores"], 2.5, "host: n_cores must be a whole number, got 2.5"),
        (["entries", 0, "timing", "load_first"], "1", "load_first must be a finite number"),
        (["entries", 0, "timing", "load_first"], True, "load_first must be a finite number"),
        (
            ["entries", 0, "timing", "load_first"],
            float("inf"),
            "load_first must be a finite number",
        ),
        (["entries", 0, "timing", "load_first"], 10**400, "load_first must be a finite number"),
        (
            ["entries", 0, "timing", "core", "ci95"],
            [1.0],
            "core: ci95 must be a list of 2, got [1.0]",
        ),
        (
            ["entries", 0, "model", "stored_as", "dense"],
            "3",
            "stored_as['dense'] must be a whole number",
        ),
        (["entries", 0, "parity", "snr_db"], "nan", "snr_db must be a finite number, got 'nan'"),
        (["entries", 0, "model"], None, "entries[0]: model must be a mapping, got None"),
        (["device"], {}, "device: model, chip, os, os_build must be given"),
    ],
)
def test_another_form_is_refused_and_its_place_named(path, value, sentence):
    data: Any = result("measured").to_dict()
    if path:
        place = data
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
    else:
        data = value
    with pytest.raises(errors.ResultError) as caught:
        files.parse(data)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 100_000, '{"schema": NaN}', "\udcff".encode("utf-8", "surrogatepass")]
)
def test_a_file_that_is_no_result_is_one_sentence(text, tmp_path):
    path = tmp_path / "result.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(errors.ResultError, match=r"result\.json"):
        files.load(path)
    with pytest.raises(errors.PackageNotFoundError):
        files.load(tmp_path / "none.json")


def test_infinite_ratios_survive_json():
    parity = replace(MEASURED.entries[0].parity, snr_db=Decibels(float("inf")))
    made = changed(MEASURED, parity=parity)
    assert files.parse(json.loads(json.dumps(made.to_dict(), allow_nan=False))) == made


def test_a_replay_is_held_to_its_origin(tmp_path):
    recorded, other = tmp_path / "r.json", tmp_path / "other.json"
    files.save(MEASURED, recorded)
    files.save(replace(MEASURED, run_id="2"), other)
    origin = replace(ORIGIN, sha256=files.read_json(recorded)[1])
    files.check_origin(provenance(REPLAY, origin=origin), recorded, "replay")
    for wrong in (other, recorded):
        named = origin if wrong is other else replace(origin, kind="cpu_reference")
        with pytest.raises(errors.ResultError, match="it must be a replay of measured"):
            files.check_origin(provenance(REPLAY, origin=named), wrong, "replay")
    with pytest.raises(errors.ResultError, match=r"it must be a replay of measured \w+, \S+$"):
        files.check_origin(MEASURED, recorded, "replay")
