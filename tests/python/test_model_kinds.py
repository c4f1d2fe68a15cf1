"""Pipelines with stages of other kinds: passed by at the ends, refused in the middle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
from command_line import failed, run
from stages import head, other, piped

import milpress
from milpress import formats as f
from milpress.errors import InputError, UnsupportedError
from milpress.interpreter import load
from milpress.mil.model_kinds import _KINDS


def scaler(**features: dict[str, int]) -> Any:
    return other(lambda model: model.scaler.scaleValue.append(2), **features)


def classifier(**features: dict[str, int]) -> Any:
    return other(lambda model: model.glmClassifier.SetInParent(), **features)


def described(stage: Any) -> Any:
    return (stage.get_spec() if hasattr(stage, "get_spec") else stage).description


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> Path:
    """A scaler, and what takes what it gives."""
    stages = [scaler(inputs={"raw": 768}, outputs={"x": 768}), head()]
    path = tmp_path_factory.mktemp("first") / "m.mlpackage"
    return piped(path, stages, described(stages[0]).input, described(stages[1]).output)


@pytest.fixture(scope="module")
def last(tmp_path_factory) -> Path:
    """A network, and a classifier of one of its outputs and of an input of its own."""
    stages = [head(), classifier(inputs={"scores": 320, "age": 1}, outputs={"label": 1})]
    path = tmp_path_factory.mktemp("last") / "m.mlpackage"
    inputs = [*described(stages[0]).input, described(stages[1]).input[1]]
    return piped(path, stages, inputs, described(stages[1]).output)


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((1, 3, 16, 16)).astype(np.float32)


def test_a_stage_that_comes_first_is_passed_by(first, tmp_path):
    program = load(first)
    assert program.notes == (
        "stage 1, 'stage0' (scaler), was passed by: what it gives, x, must be given",
    )
    alone = tmp_path / "alone.mlpackage"
    head().save(str(alone))
    made, expected = program(x=picture(0)), load(alone)(x=picture(0))
    for name, values in expected.items():
        np.testing.assert_array_equal(made[name], values)
    wanted = r"x \(float32 1x3x16x16, which stage 1, 'stage0' \(scaler\), would give\), got raw"
    with pytest.raises(InputError, match=wanted):
        program(raw=np.zeros(768))
    with pytest.raises(InputError, match=r"x \(which stage 1, 'stage0' \(scaler\), would give\)"):
        milpress.evaluate(first, first, {"raw": np.zeros(768)})
    # What the stage itself takes may be there too.
    program(x=picture(0), raw=np.zeros(768))


def test_a_stage_that_comes_last_is_passed_by(last):
    program = load(last)
    assert program.notes == (
        "stage 2, 'stage1' (GLM classifier), was passed by: what it takes is what comes out",
    )
    assert [feature.name for feature in program.outputs] == ["scores"]
    assert program(x=picture(0))["scores"].shape == (64, 5)
    found = milpress.evaluate(last, last, [{"x": picture(0), "age": np.ones(1)}])
    assert found.notes == program.notes
    assert found.snr_db == np.inf


@pytest.mark.parametrize("which", ["first", "last"])
def test_samples_go_through_what_can_be_run(which, request, tmp_path):
    path = request.getfixturevalue(which)
    data, out = [{"x": picture(seed)} for seed in range(3)], tmp_path / "out.mlpackage"
    recipe = milpress.Recipe.of(f.PalettizeConfig(bits=4), min_size=100)
    report = milpress.compress(path, out, recipe, sample_data=data)
    plan = milpress.plan(path, target_bits=5, sample_data=data, use_cache=False, min_size=100)
    evaluation = milpress.evaluate(path, out, data)
    ran = milpress.run(path, data[0])
    for notes in (report.notes, plan.notes, evaluation.notes, ran.notes):
        assert any("was passed by" in note for note in notes)


def test_the_command_line_says_what_was_passed_by(last, tmp_path):
    np.save(tmp_path / "x.npy", picture(0))
    assert (
        "(GLM classifier), was passed by"
        in run("run", last, "--input", f"x={tmp_path / 'x.npy'}").stdout
    )


def test_a_stage_in_the_middle_is_refused_by_its_number_and_kind(tmp_path):
    network, again = head(), head()
    spec = again.get_spec()
    ct.utils.rename_feature(spec, "x", "y")
    for name in ("scores", "boxes"):
        ct.utils.rename_feature(spec, name, f"{name}_again", rename_inputs=False)
    again = ct.models.MLModel(spec, weights_dir=again.weights_dir, skip_model_load=True)
    between = other(lambda model: model.neuralNetwork.SetInParent(), {"scores": 320}, {"y": 768})
    path = piped(
        tmp_path / "m.mlpackage",
        [network, between, again],
        described(network).input,
        spec.description.output,
    )
    message = r"got stage 2, 'stage1' \(neural network\), whose 'y' a later one takes; split"
    with pytest.raises(UnsupportedError, match=message):
        load(path)
    assert "stage 2, 'stage1' (neural network)" in failed("evaluate", path, path, "--random", 1)


def test_stages_behind_one_that_is_passed_by_are_passed_by_too(tmp_path):
    network = head()
    stages = [
        network,
        scaler(inputs={"scores": 320}, outputs={"scores": 320}),
        classifier(inputs={"scores": 320}, outputs={"label": 1}),
    ]
    outputs = [*described(network).output, *described(stages[2]).output]
    program = load(piped(tmp_path / "m.mlpackage", stages, described(network).input, outputs))
    assert [note.endswith("what it takes is what comes out") for note in program.notes] == [
        True
    ] * 2
    # What the scaler takes, not what it gives under the same name.
    assert {feature.name for feature in program.outputs} == {"boxes", "scores"}
    assert program(x=picture(0))["scores"].max() <= 1


def test_a_pipeline_in_a_pipeline_passes_by_what_it_must(tmp_path):
    network = head()
    inner = ct.proto.Model_pb2.Model(specificationVersion=9)
    scales = scaler(inputs={"raw": 768}, outputs={"x": 768})
    for name, spec in (("scale", scales), ("network", network.get_spec())):
        inner.pipeline.models.add().CopyFrom(spec)
        inner.pipeline.names.append(name)
    inner.description.input.extend(scales.description.input)
    inner.description.output.extend(network.get_spec().description.output)
    network._spec = inner
    path = piped(
        tmp_path / "m.mlpackage", [network], inner.description.input, inner.description.output
    )
    program = load(path)
    assert program.notes[0].startswith("stage 1, 'stage0/scale' (scaler), was passed by")
    assert program(x=picture(0))["scores"].shape == (64, 5)


def test_every_kind_of_model_that_coremltools_knows_has_a_name():
    fields = ct.proto.Model_pb2.Model.DESCRIPTOR.oneofs_by_name["Type"].fields
    ours = {"pipelineClassifier", "pipelineRegressor", "pipeline", "mlProgram"}
    rest = {each.number for each in fields if each.name not in {*ours, "nonMaximumSuppression"}}
    assert set(_KINDS) == rest
