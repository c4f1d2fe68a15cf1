"""Error feedback in packages: products of inputs by the interpreter, and what is made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
from command_line import failed, run
from coremltools.converters.mil.mil import Builder as mb  # noqa: N813
from small_models import TARGETS, save, weight

import milpress
from milpress import moments
from milpress.errors import ConfigError
from milpress.formats import PalettizeConfig, PerBlock, PruneConfig, QuantizeConfig
from milpress.interpreter import load
from milpress.mil import treatments
from milpress.mil.package import Package
from milpress.moments import SecondMoments, calibrate
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
    sums = SecondMoments(Package(path), {"x": x}).of(["conv"], array.shape).astype(np.float64)
    rows = array.reshape(groups, 8 // groups, -1).astype(np.float64)
    found = np.einsum("gri,gij,grj->gr", rows, sums, rows).reshape(-1)
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
    records = treatments.read(Package(tmp_path / "True.mlpackage").model).by_source
    promises = {record.promise for record in records.values()}
    assert "none" in promises
    assert any("feedback" in json.dumps(record.steps) for record in records.values())
    notes = {each.name: each.note for each in report.with_status("compressed")}
    for record_name, record in records.items():
        is_fed_back = all("feedback" in next(iter(step.values())) for step in record.steps)
        assert is_fed_back == ("errors not fed back" not in notes[record_name])


def test_few_layers_at_a_time_give_the_same_as_all_at_once(samples, build, tmp_path, monkeypatch):
    source = build("layers", dtype="fp32")
    recipe = Recipe.of(PalettizeConfig(bits=3))
    files = []
    for most in (1 << 30, 1):
        monkeypatch.setattr(moments, "_MOST_BYTES", most)
        out = tmp_path / f"{most}.mlpackage"
        milpress.compress(source, out, recipe, sample_data=samples, feedback=True)
        files.append(next(out.rglob("weight.bin")).read_bytes())
    assert files[0] == files[1]


def test_a_weight_that_several_layers_use_makes_up_for_all_of_them(build):
    path = build("shared")
    x = np.random.default_rng(0).standard_normal((3, 2, 64)).astype(np.float32)
    both = SecondMoments(Package(path), {"x": x})
    shape = (64, 64)
    total = both.of(["first", "second"], shape)
    parts = [both.of([name], shape) for name in ("first", "second")]
    np.testing.assert_array_equal(total, parts[0] + parts[1])
    assert both.of([], shape) is None
    assert both.of(["none"], shape) is None
    assert both.of(["first"], (64, 63)) is None


def test_feedback_takes_samples(samples, build, tmp_path):
    source = build("layers", dtype="fp32")
    recipe = Recipe.of(PalettizeConfig(bits=4))
    with pytest.raises(ConfigError, match="feedback must come with samples, got none"):
        milpress.compress(source, tmp_path / "x.mlpackage", recipe, feedback=True)
    known = calibrate(source, samples)
    with pytest.raises(ConfigError, match="got their moments alone"):
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
    assert "must come with samples" in failed(
        "compress", source, tmp_path / "x.mlpackage", "--palettize", 4, "--feedback"
    )
