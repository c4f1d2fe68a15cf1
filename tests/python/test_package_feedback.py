"""Error feedback in packages: products of inputs by the interpreter, and what is made of them."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
from command_line import failed, run
from coremltools.converters.mil.mil import Builder as mb  # noqa: N813
from small_models import TARGETS, save, weight

import milpress
from milpress.calibration import second_moments
from milpress.calibration.calibrating import calibrate
from milpress.calibration.second_moments import SecondMoments
from milpress.compression import treating
from milpress.errors import ConfigError
from milpress.formats import PalettizeConfig, PerBlock, PruneConfig, QuantizeConfig
from milpress.formats.error_feedback import factor_bytes
from milpress.interpreter import load
from milpress.mil.package import Package
from milpress.mil.records import WeightRecords, promise_of
from milpress.recipe import Recipe, Step


def model(path: Path, shape: tuple[int, ...], build: Any) -> Path:
    specs = [mb.TensorSpec(shape=shape, dtype=ct.converters.mil.mil.types.fp32)]
    return save(mb.program(input_specs=specs, opset_version=TARGETS["iOS18"])(build), path, "iOS18")


@pytest.mark.parametrize(
    ("pad_type", "pad", "strides", "dilations", "groups", "kernel"),
    [
        ("valid", None, [1, 1], [1, 1], 1, (3, 2)),
        ("valid", None, [1, 1], [1, 1], 2, (1, 1)),
        ("same", None, [2, 1], [1, 2], 2, (3, 2)),
        ("same_lower", None, [2, 3], [1, 1], 4, (3, 2)),
        ("custom", [2, 0, 1, 3], [1, 2], [2, 1], 1, (3, 2)),
    ],
)
def test_products_tell_how_large_the_output_of_a_convolution_is(
    pad_type, pad, strides, dilations, groups, kernel, tmp_path
):
    settings = {} if pad is None else {"pad": pad}
    array = weight(8, 4 // groups, *kernel, dtype=np.float32)

    def build(x: Any) -> Any:
        return mb.conv(
            x=x,
            weight=array,
            pad_type=pad_type,
            strides=strides,
            dilations=dilations,
            groups=groups,
            name="conv",
            **settings,
        )

    path = model(tmp_path / "m.mlpackage", (2, 4, 9, 8), build)
    x = np.random.default_rng(0).standard_normal((3, 2, 4, 9, 8)).astype(np.float32)
    (sums,) = SecondMoments(Package(path), {"x": x}).of(["conv"], array.shape)
    rows = array.reshape(groups, 8 // groups, -1).astype(np.float64)
    found = np.einsum("gri,gij,grj->gr", rows, sums.astype(np.float64), rows).reshape(-1)
    program = load(path)
    outputs = np.concatenate([next(iter(program(x=each).values())) for each in x])
    expected = np.square(outputs.astype(np.float64)).sum((0, 2, 3))
    # Sums of some hundred products in float32, of terms that may cancel.
    np.testing.assert_allclose(found, expected, rtol=1e3 * 2.0**-23)


@pytest.fixture(scope="module")
def samples() -> dict[str, Any]:
    """Return inputs that depend on each other, for the model of layers."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((24, 48, 64)).transpose(0, 2, 1) @ rng.standard_normal((48, 48))
    return {"x": x.transpose(0, 2, 1).reshape(24, 1, 48, 8, 8).astype(np.float32)}


TREATMENTS = {
    "palettes": [PalettizeConfig(bits=2, group_size=8)],
    "palettes with scales": [PalettizeConfig(bits=3, channel_scale=True)],
    "integers": [QuantizeConfig(dtype="int4", granularity=PerBlock(8), range="mse")],
    "pruned": [PruneConfig(sparsity=0.5)],
    "n of m, then integers": [PruneConfig(n_m=(2, 4)), QuantizeConfig(dtype="int8")],
}


@pytest.mark.parametrize("kind", TREATMENTS)
def test_feedback_lessens_the_error_of_layers_and_verifies(kind, samples, build, tmp_path):
    source = build("layers", dtype="fp32")
    recipe = Recipe(steps=tuple(Step(treatment=treatment) for treatment in TREATMENTS[kind]))
    found = {}
    for feedback in (False, True):
        out = tmp_path / f"{feedback}.mlpackage"
        report = milpress.compress(source, out, recipe, sample_data=samples, feedback=feedback)
        assert report.verified
        assert milpress.verify(source, out)
        ops = milpress.evaluate(source, out, samples, per_op=True).ops
        found[feedback] = {op.name: op.own_snr_db for op in ops}
    for layer in ("conv", "linear"):
        assert found[True][layer] > found[False][layer]
    records = WeightRecords.of(Package(tmp_path / "True.mlpackage").model).by_source
    promises = {promise_of(record.steps) for record in records.values()}
    assert "none" in promises
    assert any("feedback" in json.dumps(record.steps) for record in records.values())
    notes = {each.name: each.note for each in report.with_status("compressed")}
    for record_name, record in records.items():
        is_fed_back = all("feedback" in next(iter(step.values())) for step in record.steps)
        assert is_fed_back == ("errors not fed back" not in notes[record_name])


def square(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, n)).astype(np.float32) / n**0.5


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Path:
    """Return a model of five layers of 128 inputs each."""

    def build(x: Any) -> Any:
        for i in range(5):
            x = mb.linear(x=x, weight=square(128, i), name=f"layer{i}")
        return x

    return model(tmp_path_factory.mktemp("chain") / "m.mlpackage", (8, 128), build)


def rows(n_samples: int, *shape: int) -> dict[str, Any]:
    """Return inputs that depend on each other."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n_samples, *shape)) @ rng.standard_normal((shape[-1], shape[-1]))
    return {"x": (x / shape[-1] ** 0.5).astype(np.float32)}


# What a layer of 128 inputs takes: moments as float32, and what LAPACK makes of them.
LEAST = 40 * 128 * 128


def test_few_layers_at_a_time_give_the_same_as_all_at_once(chain, monkeypatch):
    x, runs = rows(3, 8, 128), []
    run_once = second_moments._add_products
    monkeypatch.setattr(
        second_moments, "_add_products", lambda *given: runs.append(run_once(*given))
    )
    layers = [[f"layer{i}"] for i in range(5)]
    found = []
    for memory in (second_moments.DEFAULT_MEMORY, LEAST):
        runs.clear()
        known = SecondMoments(Package(chain), x, wanted=layers, memory=memory)
        found.append([known.of(each, (128, 128)) for each in layers])
        # A third of the memory holds three layers of 4 bytes for each product.
        assert len(runs) == (3 if memory > LEAST else 6)
    np.testing.assert_array_equal(*found)


def test_a_package_is_the_same_on_any_number_of_threads_and_in_little_memory(chain, tmp_path):
    recipe = Recipe.of(PalettizeConfig(bits=3))
    files = []
    for threads, memory in ((1, None), (3, None), (3, LEAST)):
        out = tmp_path / f"{threads}-{memory}.mlpackage"
        report = milpress.compress(
            chain,
            out,
            recipe,
            sample_data=rows(3, 8, 128),
            feedback=True,
            feedback_memory=memory,
            threads=threads,
        )
        assert not any("fed back" in each.note for each in report.weights)
        files.append(next(out.rglob("weight.bin")).read_bytes())
    assert files[0] == files[1] == files[2]


def test_threads_wait_for_memory(chain, tmp_path, monkeypatch):
    at_once, most, lock = [], [], threading.Lock()
    treated = treating._treat

    def counted(job: Any, *rest: Any) -> Any:
        with lock:
            at_once.append(job)
            most.append(len(at_once))
        time.sleep(0.02)  # others would come in meanwhile
        made = treated(job, *rest)
        with lock:
            at_once.remove(job)
        return made

    monkeypatch.setattr(treating, "_treat", counted)
    milpress.compress(
        chain,
        tmp_path / "out.mlpackage",
        Recipe.of(PalettizeConfig(bits=3)),
        sample_data=rows(1, 8, 128),
        feedback=True,
        feedback_memory=LEAST,
        threads=3,
    )
    assert most == [1] * 5


def test_a_weight_that_several_layers_use_makes_up_for_all_of_them(build):
    path = build("shared")
    x = np.random.default_rng(0).standard_normal((3, 2, 64)).astype(np.float32)
    both = SecondMoments(Package(path), {"x": x})
    shape = (64, 64)
    (total,) = both.of(["first", "second"], shape)
    parts = [both.of([name], shape)[0] for name in ("first", "second")]
    np.testing.assert_array_equal(total, parts[0] + parts[1])
    assert both.of([], shape) is None
    assert both.of(["none"], shape) is None
    assert both.of(["first"], (64, 63)) is None


def test_inputs_of_many_layers_of_one_weight_add_up_as_they_come_in_little_memory(tmp_path):
    shared = square(128, 0)

    def build(x: Any) -> Any:
        weight = mb.const(val=shared, name="shared")
        for i in range(4):
            x = mb.linear(x=x, weight=weight, name=f"layer{i}")
        return x

    path, x = model(tmp_path / "m.mlpackage", (8, 128), build), rows(3, 8, 128)
    layers = [f"layer{i}" for i in range(4)]
    # Four sums of 4 bytes for each product are more than a third of it.
    small = SecondMoments(Package(path), x, wanted=[layers], memory=LEAST)
    (found,) = small.of(layers, (128, 128))
    parts = [SecondMoments(Package(path), x).of([each], (128, 128)) for each in layers]
    expected = sum(part.astype(np.float64) for (part,) in parts)
    # 4 x 3 x 8 products of float32 are added one after the other, each at most the diagonal's.
    bound = 4 * 3 * 8 * 2.0**-24 * expected.diagonal().max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=bound)


@pytest.mark.parametrize("n_groups", [1, 3])
@pytest.mark.parametrize("n_columns", [1, 128, 300, 2048, 2049, 5000])
def test_as_few_blocks_of_columns_are_made_as_memory_holds(n_groups, n_columns):
    def n_bytes(edges: Any) -> int:
        widths = np.diff(edges)
        moments = sum(4 * n_groups * int(width) ** 2 for width in widths)
        widest = int(widths.max())
        return 2 * moments + factor_bytes(n_groups, widest) - 4 * n_groups * widest**2

    whole = (0, n_columns)
    least = n_bytes((*range(0, n_columns, 128), n_columns))
    for memory in (n_bytes(whole), n_bytes(whole) - 1, n_bytes(whole) // 3, least, least - 1):
        edges = second_moments.column_edges(n_groups, n_columns, memory)
        if edges is None:
            assert memory < least
            continue
        assert edges[0] == 0
        assert edges[-1] == n_columns
        assert n_bytes(edges) <= memory
        assert (edges == whole) == (memory >= n_bytes(whole))
        assert all(edge % 128 == 0 for edge in edges[:-1])


def test_a_layer_that_memory_does_not_hold_is_fed_back_in_blocks_or_not_and_it_is_said(tmp_path):
    array = square(512, 0)
    path = model(
        tmp_path / "m.mlpackage",
        (8, 512),
        lambda x: mb.linear(x=x, weight=array, name="layer"),
    )
    x, recipe = rows(64, 8, 512), Recipe.of(PalettizeConfig(bits=3))
    snr, notes = {}, {}
    for memory in (None, 4_000_000, 10_000, 0):
        settings = {"sample_data": x} | ({} if memory == 0 else {"feedback": True})
        if memory:
            settings["feedback_memory"] = memory
        out = tmp_path / "out.mlpackage"
        report = milpress.compress(path, out, recipe, force=True, **settings)
        assert report.verified
        (row,) = (each for each in report.weights if each.shape == array.shape)
        notes[memory] = row.note
        snr[memory] = milpress.evaluate(path, out, x).outputs[0].snr_db
        (record,) = WeightRecords.of(Package(out).model).by_source.values()
        assert (promise_of(record.steps) == "none") == (memory in (None, 4_000_000))
    assert snr[0] == snr[10_000] < snr[4_000_000] < snr[None]
    assert notes[None] == notes[0] == ""
    assert notes[4_000_000].startswith("errors fed back within blocks of 256 of 512 inputs: ")
    assert notes[10_000].startswith("errors not fed back: that takes ")
    # Rows of three would go across 256 columns.
    runs = Recipe.of(PruneConfig(n_m=(1, 3)))
    report = milpress.compress(
        path, out, runs, force=True, sample_data=x, feedback=True, feedback_memory=4_000_000
    )
    (row,) = (each for each in report.weights if each.shape == array.shape)
    assert row.note.startswith("errors not fed back: runs of 3 cross blocks of 256 of 512 inputs")


@pytest.mark.parametrize("memory", [0, -1, True, 1.5, "4GB"])
def test_memory_for_feedback_is_a_number_of_bytes(memory, chain, tmp_path):
    recipe = Recipe.of(PalettizeConfig(bits=4))
    with pytest.raises(ConfigError, match="feedback_memory must be a number of bytes, at least 1"):
        milpress.compress(
            chain,
            tmp_path / "x.mlpackage",
            recipe,
            sample_data=rows(1, 8, 128),
            feedback=True,
            feedback_memory=memory,
        )


def test_memory_for_feedback_comes_with_feedback(chain, tmp_path):
    recipe = Recipe.of(PalettizeConfig(bits=4))
    with pytest.raises(ConfigError, match="feedback_memory has no effect without feedback"):
        milpress.compress(
            chain,
            tmp_path / "x.mlpackage",
            recipe,
            sample_data=rows(1, 8, 128),
            feedback_memory=10**9,
        )


def test_feedback_takes_samples(samples, build, tmp_path):
    source = build("layers", dtype="fp32")
    recipe = Recipe.of(PalettizeConfig(bits=4))
    with pytest.raises(
        ConfigError, match="feedback can't be used without samples: give sample_data"
    ):
        milpress.compress(source, tmp_path / "x.mlpackage", recipe, feedback=True)
    known = calibrate(source, samples)
    with pytest.raises(ConfigError, match="needs the samples themselves, not statistics"):
        milpress.compress(
            source, tmp_path / "x.mlpackage", recipe, feedback=True, sample_data=known
        )


def test_the_command_line_feeds_errors_back(samples, build, tmp_path):
    source, data = build("layers", dtype="fp32"), tmp_path / "data.npz"
    np.savez(data, **samples)
    out, twin = tmp_path / "out.mlpackage", tmp_path / "twin.mlpackage"
    options = ["--palettize", 4, "--calibration-data", data, "--feedback"]
    printed = run("compress", source, out, *options).stdout
    assert "errors fed back" in printed
    recipe = Recipe.of(PalettizeConfig(bits=4))
    milpress.compress(source, twin, recipe, sample_data=data, feedback=True)
    written = [next(each.rglob("weight.bin")).read_bytes() for each in (out, twin)]
    assert written[0] == written[1]
    small = ["--feedback-memory", "2MB", "--json"]
    report = json.loads(run("compress", source, out, *options, *small, "--force").stdout)
    notes = [each["note"] for each in report["weights"]]
    assert any("feedback_memory is 2.0 MB" in note for note in notes)
    assert "a size must be a number of bytes, such as 12MB" in failed(
        "compress", source, tmp_path / "x.mlpackage", *options, "--feedback-memory", "much"
    )
    assert "can't be used without samples" in failed(
        "compress", source, tmp_path / "x.mlpackage", "--palettize", 4, "--feedback"
    )
