"""`milpress bench` as a user runs it, where there is no Apple device."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command_line import failed, run
from device_results import device as device_of
from device_results import entry, model, placement, result

import milpress
from milpress import device, errors
from milpress.device import files, rules, schema, suite
from milpress.samples.files import read_samples, write_samples

QUICK = ("--warmup", 1, "--round", 2, "--min-rounds", 2, "--max-rounds", 2)


@pytest.fixture(scope="module")
def benched(crepe_tiny, tmp_path_factory):
    """Return a folder with a result of the interpreter, and the packages that it is of."""
    folder = tmp_path_factory.mktemp("bench")
    shutil.copytree(crepe_tiny, folder / "tiny.mlpackage")
    run("compress", folder / "tiny.mlpackage", folder / "small.mlpackage", "--palettize", 4)
    packages = [folder / "tiny.mlpackage", folder / "small.mlpackage"]
    shown = run(
        *("bench", "run", *packages, "--driver", "interpreter", *QUICK),
        *("-o", folder / "result.json"),
    ).stdout
    assert "2 configurations; CPU reference, not a device" in shown
    return folder


def test_a_run_on_any_machine_is_a_reference_and_says_so(benched):
    found = device.load(benched / "result.json")
    assert found.provenance == schema.Provenance(kind="cpu_reference", driver="interpreter")
    assert found.device is None
    one, two = found.entries
    for each in (one, two):
        assert each.settings.compute_units == "INTERPRETER"
        assert each.timing is not None
        assert each.timing.core is None
        assert each.timing.e2e is not None
        assert len(each.timing.e2e.samples) == 4
        assert each.placement is each.memory is each.parity is None
    assert one.settings.interleaved_with == (two.id,)
    assert one.accuracy is not None
    assert two.accuracy is not None
    assert one.accuracy.snr_db == float("inf")
    assert 0 < two.accuracy.snr_db < 100
    assert two.accuracy.is_random
    assert two.model.weight_bytes < one.model.weight_bytes == one.model.dense_weight_bytes
    assert two.model.dense_weight_bytes == one.model.dense_weight_bytes
    assert one.model.sha256 != two.model.sha256


def test_accuracy_is_that_of_evaluate(benched):
    from milpress.samples.data import RandomSamples

    found = device.load(benched / "result.json").entries[1].accuracy
    assert found is not None
    paths = (benched / "tiny.mlpackage", benched / "small.mlpackage")
    expected = milpress.evaluate(*paths, RandomSamples(found.n_samples, 0))
    assert found.snr_db == pytest.approx(expected.snr_db, rel=1e-9)
    assert found.top1 == expected.outputs[0].top1


def test_compare_and_validate_print_what_they_find(benched):
    path = benched / "result.json"
    assert "valid, cpu_reference, 2 configurations" in run("bench", "validate", path).stdout
    shown = run("bench", "compare", path).stdout
    assert "CPU reference, not a device" in shown
    data = json.loads(run("bench", "compare", path, "--json").stdout)
    assert data["kind"] == "cpu_reference"
    assert data["rows"][0]["ratio"] is None
    assert data["rows"][1]["paired"] is True
    assert data["rows"][1]["ratio"] > 0


def test_a_replay_says_what_it_is_of_and_has_the_same_statistics(benched, tmp_path):
    origin, out = benched / "result.json", tmp_path / "replay.json"
    run("bench", "run", "--driver", "replay", "--recorded", origin, "-o", out)
    run("bench", "validate", out, "--origin", origin)
    recorded, played = device.load(origin), device.load(out)
    assert played.provenance.kind == "replay"
    assert played.provenance.origin is not None
    assert played.provenance.origin.kind == "cpu_reference"
    for one, two in zip(recorded.entries, played.entries, strict=True):
        assert one.timing is not None
        assert two.timing is not None
        assert two.timing.e2e == one.timing.e2e
        assert two.timing.kind == "replay"
    again = tmp_path / "again.json"
    line = failed("bench", "run", "--driver", "replay", "--recorded", out, "-o", again)
    assert "a replay must be of something that ran, got replay" in line
    other = tmp_path / "other.json"
    files.save(result("measured"), other)
    line = failed("bench", "validate", out, "--origin", other, code=1)
    assert "it must be a replay of measured" in line


def test_a_replay_of_a_measured_result_keeps_what_the_device_told(tmp_path):
    origin = tmp_path / "measured.json"
    files.save(result("measured"), origin)
    played = device.replay(origin)
    assert rules.problems(played) == []
    assert played.device == result("measured").device
    for one, two in zip(result("measured").entries, played.entries, strict=True):
        assert one.timing is not None
        assert two.timing is not None
        assert (two.timing.core, two.timing.e2e) == (one.timing.core, one.timing.e2e)
        assert (one.placement is None) == (two.placement is None)


@pytest.mark.skipif(sys.platform == "darwin", reason="Core ML is there")
@pytest.mark.parametrize("command", ["run", "suite"])
def test_without_a_mac_core_ml_is_refused_and_nothing_is_written(command, crepe_tiny, tmp_path):
    out = tmp_path / "out"
    line = failed("bench", command, crepe_tiny, "--driver", "coreml", "-o", out)
    assert line.startswith("error: the driver coreml needs a Mac, as Core ML is there alone")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "no package to measure: give at least one"),
        (["run", "none.mlpackage"], "none.mlpackage: no such package"),
        (["run", "m", "--driver", "gpu"], "a driver must be one of coreml, iphone"),
        (["run", "m", "--units", "NPU", "--driver", "coreml"], "units must be of CPU_ONLY"),
        (["run", "m", "--units", "ALL"], "the interpreter has no compute units; leave out ALL"),
        (["run", "m", "--team", "T"], "--team and --bundle have no effect without --driver iphone"),
        (["run", "m", "--warmup", "0"], "warmup must be at least 1, got 0"),
        (["run", "m", "--recorded", "r"], "--recorded has no effect without --driver replay"),
        (["run", "m", "-o", "no/r.json"], "/no does not exist"),
        (["suite", "none.mlpackage"], "none.mlpackage: no such package"),
        (["suite", "m", "--suite", "none.yaml"], "none.yaml: no such file"),
    ],
)
def test_a_wrong_call_is_one_sentence(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "--driver" not in arguments:
        arguments = [*arguments, "--driver", "interpreter"]
    assert message in failed("bench", *arguments)
    assert not list(tmp_path.iterdir())


def test_results_are_not_overwritten_unless_asked(benched, tmp_path):
    out = tmp_path / "r.json"
    out.write_text("mine")
    arguments = ("bench", "run", "--driver", "replay", "--recorded", benched / "result.json")
    assert f"{out} exists already; --force (force=True) replaces it" in failed(
        *arguments, "-o", out
    )
    assert out.read_text() == "mine"
    run(*arguments, "-o", out, "--force")
    device.load(out)


def test_kinds_do_not_stand_in_one_table(tmp_path):
    paths = []
    for kind in ("measured", "cpu_reference"):
        paths.append(tmp_path / f"{kind}.json")
        files.save(result(kind), paths[-1])
    line = failed("bench", "compare", *paths)
    assert "results must be of one kind to stand in one table, got cpu_reference and meas" in line


def test_machines_are_named_where_they_differ(tmp_path):
    without = device_of(compute_devices=("cpu", "gpu"), neural_engine_cores=None)
    quiet = entry("measured", "CPU_AND_NE", placement=placement("measured", "gpu"), energy=None)
    one, two = result("measured"), result("measured", quiet, device=without)
    rows = device.compare([one, two]).rows
    assert [row.units for row in rows] == [
        *("CPU_AND_NE", "CPU_ONLY", "ALL"),
        "CPU_AND_NE (no Neural Engine here)",
    ]
    other = result("measured", quiet, device=device_of(chip="Apple M4"))
    paths = []
    for name, made in (("one", one), ("other", other)):
        paths.append(tmp_path / f"{name}.json")
        files.save(made, paths[-1])
    data = json.loads(run("bench", "compare", *paths, "--json").stdout)
    assert len({row["machine"] for row in data["rows"]}) == 2
    assert data["rows"][3]["ratio"] is None
    shown = run("bench", "compare", *paths).stdout
    assert "machine" in shown
    assert "Apple M4" in shown


def test_runs_are_named_where_there_are_several(tmp_path):
    made = [result("measured"), result("measured", created="2026-03-04T05:06:07Z", run_id="b")]
    paths = [tmp_path / f"{i}.json" for i in range(2)]
    for path, each in zip(paths, made, strict=True):
        files.save(each, path)
    shown = run("bench", "compare", *paths).stdout
    lines = [line for line in shown.splitlines() if line.strip().startswith("tiny ")]
    assert ["1, 2026-01-01 00:00" in line for line in lines] == [True, True, False, False]
    assert ["2, 2026-03-04 05:06" in line for line in lines] == [False, False, True, True]
    data = json.loads(run("bench", "compare", *paths, "--json").stdout)
    assert [row["run_id"] for row in data["rows"]] == ["1"] * 3 + ["b"] * 3
    assert "2026-01-01" not in run("bench", "compare", paths[0]).stdout


def test_an_invalid_result_is_exit_code_1(tmp_path):
    path = tmp_path / "r.json"
    data = result("cpu_reference").to_dict()
    data["provenance"]["kind"] = "measured"
    path.write_text(json.dumps(data))
    line = failed("bench", "validate", path, code=1)
    assert "a result of kind measured must be by coreml or iphone, got interpreter" in line
    assert "got Linux" in line


def test_hostile_names_do_not_steer_the_terminal(tmp_path):
    evil = "[/red][bold]\x1b[2J\r\nevil\u202e"
    path = tmp_path / "r.json"
    made = entry("cpu_reference", "INTERPRETER", evil, model=model(evil))
    files.save(result("cpu_reference", made), path)
    shown = run("bench", "compare", path).stdout
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    assert "[/red][bold]" in shown.replace("\n", "").replace(" ", "")


def test_samples_survive_their_file(tmp_path):
    samples = [{"a/b": np.float16([[1, 2]]), "n": np.int32(3)}, {"a/b": np.ones((2, 2))}]
    write_samples(tmp_path / "s.npz", samples)
    first = (tmp_path / "s.npz").read_bytes()
    write_samples(tmp_path / "s.npz", samples)
    assert (tmp_path / "s.npz").read_bytes() == first
    for got, expected in zip(read_samples(tmp_path / "s.npz"), samples, strict=True):
        assert got.keys() == expected.keys()
        for name in got:
            np.testing.assert_array_equal(got[name], expected[name])
            assert got[name].dtype == expected[name].dtype


GRID = """
version: 1
target: iOS18
units: [CPU_AND_NE]
variants:
  - name: original
  - {name: palette, steps: [{palettize: {bits: 4}}]}
"""


def test_the_grid_that_comes_along_has_what_is_worth_knowing():
    found = suite.Suite.from_yaml()
    assert found.units == schema.APPLE_UNITS
    names = {each.name for each in found.variants}
    assert {"original", "int8", "int4-block-32", "sparse-75", "sparse-50-palette-4"} <= names
    assert {f"palette-{bits}" for bits in (8, 6, 4)} <= names
    assert [v.name for v in found.variants if v.recipe and v.recipe.activations] == ["w8a8"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("palettize: {bits", "palette: {bits", "unknown key palette; the keys are"),
        ("bits: 4", "bits: 5", "bits must be one of"),
        ("version: 1", "version: 2", "with version 1"),
        ("units: [CPU_AND_NE]", "units: [NPU]", "units must be a list of CPU_ONLY"),
        ("name: original", "name: ../original", "a name must be that of a file"),
        ("name: original", "name: palette", "the name of a variant must be its own"),
        ("name: original", "{name: original, recipe: r.yaml}", "must be a mapping of name, steps"),
    ],
)
def test_a_wrong_grid_is_one_sentence(old, new, message, tmp_path):
    path = tmp_path / "grid.yaml"
    assert old in GRID
    path.write_text(GRID.replace(old, new))
    with pytest.raises(errors.ConfigError, match=message):
        suite.Suite.from_yaml(path)


def test_a_suite_leaves_models_reports_result_and_page(crepe_tiny, tmp_path):
    grid = tmp_path / "grid.yaml"
    grid.write_text(
        """
version: 1
target: iOS18
variants:
  - name: original
  - {name: int8, steps: [{quantize: {dtype: int8}}]}
  - {name: nothing, steps: [{palettize: {bits: 4}, select: {name: "no such weight"}}]}
"""
    )
    out = tmp_path / "out"
    shown = run(
        *("bench", "suite", crepe_tiny, "--suite", grid, "--driver", "interpreter"),
        *("-o", out, *QUICK),
    ).stdout
    assert "3 configurations, 1 failed; CPU reference" in shown
    found = device.load(out / "results.json")
    assert [each.status for each in found.entries] == ["ok", "ok", "failed"]
    failure = found.entries[2].failure
    assert failure is not None
    assert failure.phase == "compress"
    assert "no weight can be compressed" in failure.message
    report = json.loads((out / "reports" / "int8.json").read_text())
    assert report["verified"] is True
    assert Path(report["destination"]) == out / "models" / "int8.mlpackage"
    page = (out / "report.html").read_text()
    assert "CPU reference" in page
    assert "no weight can be compressed" in page
    assert "Published by Apple" in page
    assert "exists already and is not an empty folder" in failed(
        *("bench", "suite", crepe_tiny, "--driver", "interpreter", "-o", out)
    )


def test_a_variant_with_activations_gets_samples(crepe_tiny, tmp_path):
    (variant,) = [each for each in suite.Suite.from_yaml().variants if each.name == "w8a8"]
    words = suite._make(crepe_tiny, tmp_path / "w8a8.mlpackage", tmp_path, variant, None, 0)
    assert words == "8-bit activations, then quantize int8, per channel"
    found = milpress.inspect(tmp_path / "w8a8.mlpackage")
    assert found.op_counts["quantize"] > 0
    assert any("int8" in weight.stored_as for weight in found.weights)


def test_bench_loads_neither_torch_nor_coremltools_to_look_at_results(tmp_path):
    path = tmp_path / "r.json"
    files.save(result("measured"), path)
    code = f"""
import sys
from milpress.cli import root
for arguments in (["bench", "validate", {str(path)!r}], ["bench", "compare", {str(path)!r}],
                  ["report", {str(path)!r}, "-o", {str(tmp_path / "r.html")!r}]):
    sys.argv = ["milpress", *arguments]
    assert root.run() == 0
assert not {{"torch", "coremltools", "sklearn"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
