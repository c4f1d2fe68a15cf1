"""Plans by what treatments do to outputs, held to naive errors and to exact plans."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import failed, run
from coremltools.converters.mil.mil import Builder as mb  # noqa: N813
from coremltools.converters.mil.mil import types
from small_models import TARGETS, save, weight

import milpress
from milpress import formats as f
from milpress.errors import ConfigError, InputError, UnsupportedError, UnsupportedOpError
from milpress.interpreter import load
from milpress.interpreter.sensitivity import Change, Gradients, Likewise, OutputError
from milpress.planner import cache, calibrated
from milpress.planner.cache import ScoreCache
from milpress.planner.first_order import first_order_errors

PARTS = ("first", "aside", "last")
FORMATS = ["palette-2", "palette-3", "palette-4", "palette-6", "palette-4-group-16", "int8"]


def perceptron(path: Path, *, last: str = "") -> Path:
    """Three layers of which the second matters little: what it adds is divided by 50."""

    @mb.program(
        input_specs=[mb.TensorSpec(shape=(1, 64), dtype=types.fp16)],
        opset_version=TARGETS["iOS18"],
    )
    def prog(x: Any) -> Any:
        first = mb.relu(x=mb.linear(x=x, weight=weight(96, 64), name="first"))
        aside = mb.linear(x=first, weight=weight(96, 96, seed=1), name="aside")
        both = mb.add(x=first, y=mb.mul(x=aside, y=np.float16(0.02)))
        y = mb.linear(x=both, weight=weight(48, 96, seed=2), name="last")
        if last == "softmax":
            return mb.softmax(x=y, axis=-1, name="y")
        return mb.identity(x=y, name="y")

    return save(prog, path, "iOS18")


def samples(n: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.standard_normal((1, 64)).astype(np.float32)} for _ in range(n)]


@pytest.fixture
def model(tmp_path) -> Path:
    return perceptron(tmp_path / "model.mlpackage")


def outputs(package: Path, data: list[dict[str, np.ndarray]]) -> np.ndarray:
    program = load(package)
    return np.concatenate([next(iter(program(**one).values())) for one in data]).astype(np.float64)


def naive(metric: str, own: np.ndarray, other: np.ndarray) -> float:
    if metric == "snr":
        return float(np.square(other - own).sum() / np.square(own).sum())
    if metric == "cosine":
        dots = (own * other).sum(1) / np.linalg.norm(own, axis=1) / np.linalg.norm(other, axis=1)
        return float(np.mean(1 - dots))
    p, q = (np.exp(one - one.max(1, keepdims=True)) for one in (own, other))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    return float(np.mean((p * np.log(p / q)).sum(1)))


@pytest.mark.parametrize("metric", ["snr", "cosine", "kl"])
def test_the_error_of_a_package_is_that_of_its_outputs(model, tmp_path, metric):
    data = samples(6)
    out = tmp_path / "out.mlpackage"
    milpress.compress(model, out, milpress.Recipe.of(f.PalettizeConfig(bits=4)))
    mine, theirs = load(model).to_torch(), load(out).to_torch()
    values = {
        name: theirs.get_parameter(theirs.attributes[f"{name}_palettized"]).detach().numpy()
        for name in mine.attributes
        if f"{name}_palettized" in theirs.attributes
    }
    assert len(values) == 3
    found = OutputError(load(model), data, metric).error(values)
    expected = naive(metric, outputs(model, data), outputs(out, data))
    # The divergence is taken to second order: its third is as small as the change of a probability.
    assert found == pytest.approx(expected, rel=0.05 if metric == "kl" else 1e-4)


def test_probabilities_are_compared_as_they_are(tmp_path):
    data = samples(6)
    scores = OutputError(load(perceptron(tmp_path / "a.mlpackage")), data, "kl")
    given = OutputError(load(perceptron(tmp_path / "b.mlpackage", last="softmax")), data, "kl")
    program = load(tmp_path / "a.mlpackage").to_torch()
    (name,) = [one for one in program.attributes if "last" in one and "weight" in one]
    moved = program.get_parameter(program.attributes[name]).detach().numpy() * 1.05
    (other,) = [one for one in load(tmp_path / "b.mlpackage").to_torch().attributes if one == name]
    # What is rounded to float32 twice differs by a few ulps of the points.
    assert scores.error({name: moved}) == pytest.approx(given.error({other: moved}), rel=1e-3)


def test_gradients_are_the_diagonal_of_a_linear_model(tmp_path):
    """For y = W x the outputs move by x_j where w_ij does, so squares are sums of x_j squared."""

    @mb.program(
        input_specs=[mb.TensorSpec(shape=(1, 64), dtype=types.fp16)],
        opset_version=TARGETS["iOS18"],
    )
    def prog(x: Any) -> Any:
        return mb.linear(x=x, weight=weight(96, 64), name="y")

    path = save(prog, tmp_path / "linear.mlpackage", "iOS18")
    data = samples(40)
    error = OutputError(load(path), data, "snr")
    (name,) = [one for one in load(path).to_torch().attributes if "weight" in one]
    (found,) = error.gradients([([name], 0)])
    inputs = np.concatenate([one["x"] for one in data]).astype(np.float64)
    total = np.square(outputs(path, data)).sum()
    expected = np.broadcast_to(np.square(inputs).sum(0) / total, (96, 64))
    squares = np.outer(found.channels, found.places)
    np.testing.assert_allclose(squares, expected, rtol=1e-4)
    # A channel that is multiplied moves its own output only: w_i x for each sample, up to the sign.
    dense = weight(96, 64).astype(np.float64)
    np.testing.assert_allclose(
        np.square(found.along), np.square(inputs @ dense.T) / total, rtol=1e-3, atol=1e-9
    )
    # To first order the model is exact: multiplying channels by 1.01 and 0.98.
    change = (dense * np.where(np.arange(96) % 2, 0.01, -0.02)[:, None]).astype(np.float32)
    everything = Change(np.arange(96), change, Likewise(np.zeros(0, int), 1.0))
    assert found.error(dense.astype(np.float32), [everything]) == pytest.approx(
        error.error({name: dense + change}), rel=0.3
    )


def test_a_weight_that_matters_little_gets_few_bits(model):
    made = milpress.plan(model, target_bits=4.5, sample_data=samples(16), use_cache=False)
    by_name = {one.name: one for one in made.weights}
    bits = {
        part: one.bits_per_weight
        for part in ("first", "aside", "last")
        for name, one in by_name.items()
        if part in name
    }
    assert bits["aside"] < min(bits["first"], bits["last"])
    assert made.scored_by == "outputs"
    blind = milpress.plan(model, target_bits=4.5, use_cache=False)
    held_out = samples(16, seed=9)
    errors = []
    for plan in (made, blind):
        out = model.with_name("out.mlpackage")
        milpress.compress(model, out, plan.recipe, force=True)
        errors.append(naive("snr", outputs(model, held_out), outputs(out, held_out)))
    assert errors[0] < errors[1] / 2


@pytest.mark.parametrize("bits", [3.5, 4.0, 4.5])
def test_first_order_plans_are_as_good_as_exact_ones(model, tmp_path, bits):
    data = samples(16)
    errors = []
    for exact in (False, True):
        made = milpress.plan(
            model, target_bits=bits, sample_data=data, exact=exact, use_cache=False
        )
        out = tmp_path / "out.mlpackage"
        milpress.compress(model, out, made.recipe, force=True)
        errors.append(naive("snr", outputs(model, data), outputs(out, data)))
    # Errors of treatments are off by some 5 %, and three weights leave few plans to choose from.
    assert errors[0] <= 1.15 * errors[1]


def test_exact_errors_are_those_of_one_treatment_at_a_time(model, tmp_path, monkeypatch):
    data = samples(5)
    made: list[calibrated.Calibrated] = []
    original = calibrated.calibrate

    def spy(package: Any, items: Any, *arguments: Any, **settings: Any) -> Any:
        made.append(original(package, items, *arguments, **settings))
        names.extend(item.name for item in items)
        return made[-1]

    names: list[str] = []
    monkeypatch.setattr(calibrated, "calibrate", spy)
    milpress.plan(
        model, target_bits=5, sample_data=data, exact=True, formats=FORMATS, use_cache=False
    )
    treatments = milpress.planner.menu.menu(FORMATS)
    for i, name in enumerate(names):
        for kind in ("palette-3", "int8"):
            out = tmp_path / "one.mlpackage"
            recipe = milpress.Recipe.of(treatments[kind], name=name)
            milpress.compress(model, out, recipe, force=True)
            expected = naive("snr", outputs(model, data), outputs(out, data))
            # float16 tables are read as float32: all that differs is the order of sums.
            assert made[0].errors[i][kind] == pytest.approx(expected, rel=1e-3)


def test_running_the_model_corrects_what_gradients_overlook(tmp_path):
    # The output is a sum of squares of what the layer gives: far from linear in the weight.
    @mb.program(
        input_specs=[mb.TensorSpec(shape=(1, 64), dtype=types.fp16)],
        opset_version=TARGETS["iOS18"],
    )
    def prog(x: Any) -> Any:
        y = mb.linear(x=x, weight=weight(96, 64), name="inner")
        y = mb.linear(x=mb.square(x=y), weight=np.abs(weight(48, 96, seed=2)), name="outer")
        return mb.square(x=y, name="y")

    model = save(prog, tmp_path / "model.mlpackage", "iOS18")
    notes = milpress.plan(model, target_bits=4, sample_data=samples(8), use_cache=False).notes
    assert any("treatments of weights to correct them" in note for note in notes)


@pytest.mark.parametrize("name", ["palette-3-group-16", "palette-4", "int4-block-32"])
def test_no_uniform_setting_of_its_size_does_better_than_a_plan(model, tmp_path, name):
    data = samples(8)
    uniform = milpress.Recipe.of(milpress.planner.menu.menu([name])[name])
    out = tmp_path / "out.mlpackage"
    stored = milpress.compress(model, out, uniform).asked
    bits = 8 * sum(one.bytes_after for one in stored) / sum(np.prod(one.shape) for one in stored)
    error = naive("snr", outputs(model, data), outputs(out, data))
    made = milpress.plan(model, target_bits=bits, sample_data=data, use_cache=False)
    milpress.compress(model, out, made.recipe, force=True)
    # Tables are those that were judged: all that differs is the order of sums.
    assert naive("snr", outputs(model, data), outputs(out, data)) <= 1.001 * error
    assert any("plans and uniform settings" in note for note in made.notes)


def test_without_samples_random_inputs_show_which_weights_matter(model):
    made = milpress.plan(model, target_bits=4.5, use_cache=False)
    bits = {part: one.bits_per_weight for one in made.weights for part in PARTS if part in one.name}
    assert bits["aside"] < min(bits["first"], bits["last"])
    assert made.scored_by == "weights"
    assert "16 random inputs show which weights matter" in made.notes
    blind = milpress.plan(model, target_bits=4.5, use_cache=False, random_samples=0)
    assert not any("random" in note or "run" in note for note in blind.notes)
    with pytest.raises(ConfigError, match="random_samples must be at least 0, got -1"):
        milpress.plan(model, target_bits=4.5, random_samples=-1)


def test_a_model_that_cannot_be_run_is_planned_by_its_weights(model, monkeypatch):
    def refuse(*_: Any, **__: Any) -> Any:
        raise UnsupportedOpError("odd", "CoreML8", "main")

    monkeypatch.setattr(calibrated, "suited_programs", refuse)
    made = milpress.plan(model, target_bits=4.5, use_cache=False)
    assert any("random inputs show nothing: " in note for note in made.notes)
    blind = milpress.plan(model, target_bits=4.5, use_cache=False, random_samples=0)
    assert made.recipe == blind.recipe


def test_probabilities_are_kept_by_their_divergence_and_features_by_their_squares(tmp_path):
    data = samples(4)
    for last, metric in (("softmax", "kl"), ("", "snr")):
        program = load(perceptron(tmp_path / f"{metric}.mlpackage", last=last))
        (name,) = [
            one for one in program.to_torch().attributes if "last" in one and "weight" in one
        ]
        module = program.to_torch()
        moved = module.get_parameter(module.attributes[name]).detach().numpy() * 1.05
        auto, given = (OutputError(program, data, each) for each in ("auto", metric))
        assert auto.error({name: moved}) == given.error({name: moved})


def test_a_part_of_a_weight_tells_what_the_whole_does(tmp_path):
    """Channels of unequal weight, some of them by far: a sixteenth of all are tried."""
    rng = np.random.default_rng(0)
    array = (rng.standard_normal((4096, 128)) * rng.lognormal(0, 0.5, (4096, 1))).astype(np.float16)
    counts = rng.lognormal(0, 1, 4096)
    counts[::512] *= 1000
    places = rng.dirichlet(np.ones(128))
    gradients = Gradients(counts, places, rng.standard_normal((4, 4096)) / 100)
    treatments = milpress.planner.menu.menu(["palette-4", "palette-3-group-16", "int4-block-32"])
    axes = {"channel_axis": 0, "input_axis": 1}
    found = first_order_errors(array, treatments, gradients, **axes)
    for name, treatment in treatments.items():
        change = f.compress(array, treatment).dense().astype(np.float64) - array
        everything = Change(np.arange(4096), change, Likewise(np.zeros(0, int), 1.0))
        whole = gradients.error(array, [everything])
        # What is tried of the channels that count little: some 200, each off by its own chance.
        assert found[name] == pytest.approx(whole, rel=0.15)


def test_errors_are_kept_and_read_again_only_for_the_same_samples(model, monkeypatch):
    first = milpress.plan(model, target_bits=4, sample_data=samples(4))
    kept = cache.path_for(model)
    lines = len(kept.read_text().splitlines())
    monkeypatch.setattr(
        OutputError, "gradients", lambda *_: pytest.fail("gradients were computed again")
    )
    assert milpress.plan(model, target_bits=4, sample_data=samples(4)).to_yaml() == first.to_yaml()
    assert len(kept.read_text().splitlines()) == lines
    with pytest.raises(pytest.fail.Exception, match="computed again"):
        milpress.plan(model, target_bits=4, sample_data=samples(4, seed=1))


def test_plans_with_samples_are_the_same_on_every_run(model):
    texts = {
        milpress.plan(
            model, target_bits=4, sample_data=samples(4), use_cache=False, threads=n
        ).to_yaml()
        for n in (1, 2)
    }
    assert len(texts) == 1


def test_tied_weights_move_the_outputs_together(tmp_path):
    """A constant used twice counts with the sum of both gradients."""

    @mb.program(
        input_specs=[mb.TensorSpec(shape=(1, 64), dtype=types.fp16)],
        opset_version=TARGETS["iOS18"],
    )
    def prog(x: Any) -> Any:
        both = mb.const(val=weight(64, 64), name="both")
        y = mb.linear(x=x, weight=both)
        return mb.add(x=y, y=mb.linear(x=x, weight=both), name="y")

    path = save(prog, tmp_path / "tied.mlpackage", "iOS18")
    data = samples(40)
    error = OutputError(load(path), data, "snr")
    (found,) = error.gradients([(["both"], 0)])
    inputs = np.concatenate([one["x"] for one in data]).astype(np.float64)
    expected = 4 * np.square(inputs).sum(0) / np.square(outputs(path, data)).sum()
    np.testing.assert_allclose(found.channels[0] * found.places, expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"metric": "top1"},
            ConfigError,
            "metric must be one of auto, snr, cosine, kl, got 'top1'",
        ),
        ({"sample_data": [{"z": np.zeros((1, 64))}]}, InputError, "must be an array for each"),
        ({"sample_data": []}, InputError, "no samples in it"),
    ],
)
def test_bad_samples_are_named(model, settings, error, message):
    with pytest.raises(error, match=message):
        milpress.plan(model, **({"target_bits": 4, "sample_data": samples(2)} | settings))


def test_a_metric_that_no_output_suits_is_named(tmp_path):
    @mb.program(
        input_specs=[mb.TensorSpec(shape=(1, 64), dtype=types.fp16)],
        opset_version=TARGETS["iOS18"],
    )
    def prog(x: Any) -> Any:
        y = mb.linear(x=x, weight=weight(96, 64))
        return mb.reduce_sum(x=y, axes=[1], keep_dims=True, name="y")

    path = save(prog, tmp_path / "single.mlpackage", "iOS18")
    with pytest.raises(UnsupportedError, match="no output of floats that suits kl"):
        milpress.plan(path, target_bits=4, sample_data=samples(2), metric="kl")


def test_the_command_line_takes_samples(model, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for i, one in enumerate(samples(4)):
        np.savez(data / f"{i}.npz", **one)
    options = ["--target-bits", 4, "--calibration-data", data]
    found = json.loads(run("plan", model, *options, "--metric", "cosine", "--json").stdout)
    assert found["scored_by"] == "outputs"
    out = tmp_path / "out.mlpackage"
    shown = run("compress", model, out, *options).stdout
    assert "calibrated with 4 samples" in shown
    assert "metric must be one of" in failed("plan", model, *options, "--metric", "speed")


def test_a_cache_in_a_folder_that_takes_no_files_is_said(model, monkeypatch):
    def refuse(*_: Any) -> Any:
        raise PermissionError

    monkeypatch.setattr(cache.os, "open", refuse)
    made = milpress.plan(model, target_bits=4)
    assert any("scores could not be kept in" in note for note in made.notes)
    assert not ScoreCache(cache.path_for(model)).get("nothing", 1)
