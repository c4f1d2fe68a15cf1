"""Weights that several ops use: each use counts in importance and feedback, or it is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
from coremltools.converters.mil.mil import Builder as mb  # noqa: N813
from coremltools.converters.mil.mil import types
from small_models import TARGETS, save

import milpress
from milpress.calibration.calibrating import calibrate
from milpress.calibration.weight_statistics import WeightStatistics
from milpress.formats import PalettizeConfig, PruneConfig, QuantizeConfig
from milpress.mil.package import Package
from milpress.mil.records import WeightRecords, promise_of
from milpress.recipe import Recipe

N = 64


def table(n_rows: int = N, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((n_rows, N)) * 0.05).astype(np.float32)


def program(path: Path, build: Any, *inputs: Any) -> Path:
    """Save the model that a function builds of inputs of these shapes and types."""
    specs = [mb.TensorSpec(shape=shape, dtype=dtype) for shape, dtype in inputs]
    return save(mb.program(input_specs=specs, opset_version=TARGETS["iOS18"])(build), path, "iOS18")


def dependent(n_samples: int, *shape: int) -> np.ndarray:
    """Return inputs of a few directions, and a little of the others."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((n_samples, *shape[:-1], 4)) @ rng.standard_normal((4, shape[-1]))
    return (x + 0.1 * rng.standard_normal((n_samples, *shape))).astype(np.float32)


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    """Return a model whose embedding is looked up by a gather and read by a linear layer."""
    array = table(512)

    def build(ids: Any, x: Any) -> Any:
        embedding = mb.const(val=array, name="table")
        found = mb.gather(x=embedding, indices=ids, axis=0, validate_indices=False, name="found")
        return found, mb.linear(x=x, weight=embedding, name="scores")

    path = tmp_path_factory.mktemp("tied") / "m.mlpackage"
    return program(path, build, ((32,), types.int32), ((8, N), types.fp32))


def samples(n_samples: int = 16) -> list[dict[str, Any]]:
    ids = np.random.default_rng(2).integers(0, 512, (n_samples, 32)).astype(np.int32)
    return [{"ids": i, "x": x} for i, x in zip(ids, dependent(n_samples, 8, N), strict=True)]


def noises(source: Path, out: Path, data: Any) -> dict[str, float]:
    """Return the noise of each output, relative to its signal."""
    found = milpress.evaluate(source, out, data).outputs
    return {each.name: 10 ** (-each.snr_db / 10) for each in found}


@pytest.mark.parametrize(
    "treatment",
    [
        PalettizeConfig(bits=3, group_size=16),
        QuantizeConfig(dtype="int4", range="mse"),
        PruneConfig(sparsity=0.4),
    ],
    ids=["palettize", "quantize", "prune"],
)
def test_feedback_lessens_the_error_of_lookups_and_layers_together(treatment, tied, tmp_path):
    found = {}
    for feedback in (False, True):
        out = tmp_path / f"{feedback}.mlpackage"
        report = milpress.compress(
            tied, out, Recipe.of(treatment), sample_data=samples(), feedback=feedback
        )
        assert report.verified
        assert milpress.verify(tied, out)
        found[feedback] = noises(tied, out, samples())
        (row,) = (each for each in report.weights if each.name == "table")
        assert "count alike for gather 'found'" in row.note
        assert ("may lose a little by feedback" in row.note) == feedback
        (record,) = WeightRecords.of(Package(out).model).by_source.values()
        assert ("feedback" in next(iter(record.steps[0].values()))) == feedback
    # A lookup counts four times: what it loses is made up for by four times that of the layer.
    lost = found[True]["found"] - found[False]["found"]
    gained = found[False]["scores"] - found[True]["scores"]
    assert gained > 4 * max(lost, 0)


def weight_named(path: Path, name: str) -> Any:
    for graph in Package(path).graphs:
        for weight in graph.weights:
            if weight.name == name:
                return weight
    raise AssertionError(name)


def test_lookups_count_by_their_share_of_the_signal(tied):
    calibration = calibrate(tied, samples())
    statistics = WeightStatistics(calibration, Package(tied))
    weight, array = weight_named(tied, "table"), table(512).astype(np.float64)
    power = np.square(np.stack([each["x"] for each in samples()]), dtype=np.float64).sum((0, 1))
    evenly = 4 * (array**2 * power).sum() / (array**2).sum()
    # Sums of a few thousand doubles in another order.
    assert statistics.evenly(weight, table(512)) == pytest.approx(evenly, rel=1e-12)
    found = statistics.importance(weight, table(512))
    expected = np.broadcast_to((power + evenly) / (power + evenly).mean(), found.shape)
    np.testing.assert_allclose(found, expected, rtol=2.0**-23)
    assert statistics.evenly(weight, np.zeros_like(table(512))) == 0


OTHER_USES = {
    "mul": lambda weight, x: mb.mul(x=x, y=weight, name="other"),
    "concat": lambda weight, x: mb.concat(values=[x, weight], axis=0, name="other"),
    "transpose": lambda weight, x: mb.matmul(
        x=x, y=mb.transpose(x=weight, perm=[1, 0], name="other"), name="product"
    ),
    "reshape": lambda weight, x: mb.add(
        x=x, y=mb.reshape(x=weight, shape=[N, N], name="other"), name="sum"
    ),
}


@pytest.mark.parametrize("kind", OTHER_USES)
@pytest.mark.parametrize("feedback", [False, True])
def test_a_weight_with_another_use_is_treated_as_without_samples(kind, feedback, tmp_path):
    array = table()

    def build(x: Any) -> Any:
        weight = mb.const(val=array, name="both")
        return mb.linear(x=x, weight=weight, name="layer"), OTHER_USES[kind](weight, x)

    source = program(tmp_path / "m.mlpackage", build, ((N, N), types.fp32))
    data = {"x": dependent(4, N, N)}
    files = []
    for name, given in (("plain", {}), ("with", {"sample_data": data, "feedback": feedback})):
        out = tmp_path / f"{name}.mlpackage"
        report = milpress.compress(source, out, Recipe.of(PalettizeConfig(bits=3)), **given)
        files.append(next(out.rglob("weight.bin")).read_bytes())
    assert files[0] == files[1]
    (row,) = (each for each in report.weights if each.name == "both")
    assert f"not calibrated: used by {kind} 'other' too" in row.note
    assert ("errors not fed back" in row.note) == feedback
    (record,) = WeightRecords.of(Package(out).model).by_source.values()
    assert promise_of(record.steps) == "nearest"


def test_layers_along_other_axes_count_in_importance_and_are_not_fed_back(tmp_path):
    array = table()

    def build(x: Any, y: Any) -> Any:
        weight = mb.const(val=array, name="both")
        return mb.linear(x=x, weight=weight, name="layer"), mb.matmul(x=y, y=weight, name="product")

    shape = ((8, N), types.fp32)
    source = program(tmp_path / "m.mlpackage", build, shape, shape)
    loud = np.geomspace(0.1, 1, N).astype(np.float32)
    data = {"x": dependent(4, 8, N) * loud, "y": dependent(4, 8, N) * loud[::-1]}
    found = WeightStatistics(calibrate(source, data), Package(source)).importance(
        weight_named(source, "both"), array
    )
    power = [np.square(data[name], dtype=np.float64).sum((0, 1)) for name in ("x", "y")]
    expected = power[0][None, :] + power[1][:, None]
    np.testing.assert_allclose(found, expected / expected.mean(), rtol=2.0**-23)
    out = tmp_path / "out.mlpackage"
    report = milpress.compress(
        source, out, Recipe.of(PalettizeConfig(bits=3)), sample_data=data, feedback=True
    )
    (row,) = (each for each in report.weights if each.name == "both")
    assert row.note.endswith("errors not fed back")


def test_a_function_that_no_sample_suits_counts_and_is_named(tmp_path):
    array = table()

    def build(x: Any) -> Any:
        return mb.linear(x=x, weight=mb.const(val=array, name="both"), name="layer")

    description = ct.utils.MultiFunctionDescriptor()
    for name, n_rows in (("prompt", 8), ("step", 1)):
        path = program(tmp_path / f"{name}.mlpackage", build, ((n_rows, N), types.fp32))
        description.add_function(str(path), "main", name)
    description.default_function_name = "prompt"
    source = tmp_path / "functions.mlpackage"
    ct.utils.save_multifunction(description, str(source))
    data = {"x": dependent(4, 8, N)}
    statistics = WeightStatistics(calibrate(source, data), Package(source))
    power = np.square(data["x"], dtype=np.float64).sum((0, 1))
    squares = array.astype(np.float64) ** 2
    for name in ("prompt/both", "step/both"):
        evenly = statistics.evenly(weight_named(source, name), array)
        expected = (squares * power).sum() / squares.sum()
        assert evenly == pytest.approx(expected, rel=1e-12)
    out = tmp_path / "out.mlpackage"
    report = milpress.compress(
        source, out, Recipe.of(PalettizeConfig(bits=3)), sample_data=data, feedback=True
    )
    assert report.verified
    notes = [each.note for each in report.weights if each.name.endswith("/both")]
    assert all("for linear 'step/layer', whose inputs no sample shows" in note for note in notes)
    assert len(notes) == 2
