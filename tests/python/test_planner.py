"""Plans: within the budget to the byte, the same on every run, and obeyed by compress."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from command_line import failed, run
from coremltools.converters.mil.mil import Builder as mb  # noqa: N813
from coremltools.converters.mil.mil import types
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from small_models import TARGETS, linear, save, weight

import milpress
import milpress._core as _core
from milpress import formats as f
from milpress.errors import ConfigError, UnsupportedError
from milpress.interpreter.sensitivity import OutputError
from milpress.mil.package import Package
from milpress.planner import cache, scores
from milpress.planner.menu import menu
from milpress.planner.parts import part_of
from milpress.planner.sizes import package_bytes
from milpress.recipe import Recipe


@pytest.fixture
def model(crepe_tiny, tmp_path) -> Path:
    return Path(shutil.copytree(crepe_tiny, tmp_path / "model.mlpackage"))


def plan(source: Path, **settings: Any) -> milpress.Plan:
    return milpress.plan(source, **({"target": "iOS18", "use_cache": False} | settings))


def compressed(source: Path, recipe: Any) -> milpress.Report:
    return milpress.compress(source, source.with_name("out.mlpackage"), recipe, force=True)


@given(array=npst.arrays(np.uint16, st.integers(0, 300)))
def test_value_counts_are_those_of_numpy(array):
    halves = array.view(np.float16)
    finite = halves[np.isfinite(halves)].astype(np.float64) + 0.0  # one zero
    expected = np.unique(finite, return_counts=True)
    values, counts = _core.value_counts(halves)
    np.testing.assert_array_equal(values, expected[0])
    np.testing.assert_array_equal(counts, expected[1])


@pytest.mark.parametrize("bits", [3.5, 4.0, 4.5])
def test_the_package_is_as_large_as_planned_and_within_1_percent_of_the_budget(model, bits):
    made = plan(model, target_bits=bits)
    report = compressed(model, made.recipe)
    assert report.package_bytes_after == made.package_bytes
    assert [(one.name, one.bytes_after) for one in report.asked] == [
        (one.name, one.n_bytes) for one in made.weights
    ]
    assert report.bits_per_weight == pytest.approx(made.bits_per_weight)
    assert 0.99 * bits <= made.bits_per_weight <= bits
    assert made.notes[0] == "raised from iOS16 to iOS18"
    assert not any("budget" in note for note in made.notes)


@pytest.mark.parametrize("size", [220_000, 300_000, 411_235])
def test_a_package_of_a_target_size_is_at_most_1_percent_smaller(model, size):
    made = plan(model, target_size=size)
    after = compressed(model, made.recipe).package_bytes_after
    assert after == made.package_bytes
    assert 0.99 * size <= after <= size


@pytest.mark.parametrize(
    "kind", ["layers", "every_layer", "shared", "lookup", "nested", "recurrent"]
)
@pytest.mark.parametrize("target", ["iOS17", "iOS18"])
def test_every_size_is_known_without_compressing(build, kind, target):
    """Also with constants that several ops share, nested blocks, and float32."""
    for dtype in ("fp16", "fp32"):
        package = build(kind, target, dtype)
        for name, treatment in menu().items():
            late = {"group", "block", "scale", "vector", "3"} & set(
                name.replace("int4", "block").split("-")
            )
            if treatment is None or (late and target == "iOS17"):
                continue
            recipe = Recipe.of(treatment, min_size=1000)
            predicted = package_bytes(Package(package), recipe)
            report = milpress.compress(package, "unused", recipe, dry_run=True)
            assert predicted == report.package_bytes_after, name


def test_scores_are_what_compressing_gives(model):
    made = plan(model, target_bits=4.0, exact=True)
    report = compressed(model, made.recipe)
    assert not any(one.is_estimate for one in made.weights)
    for planned, done in zip(made.weights, report.asked, strict=True):
        # The table made from counts may be another one that is optimal, up to its rounding.
        assert done.snr_db == pytest.approx(planned.snr_db, abs=1e-3)
    relative = [10 ** (-one.snr_db / 10) for one in made.weights]
    shares = [4 if "classifier" in one.name else 1 for one in made.weights]
    assert made.snr_db == pytest.approx(-10 * np.log10(np.average(relative, weights=shares)))


@pytest.mark.parametrize(
    ("shape", "axis"), [((1024, 128), 0), ((96, 640), 1), ((1030, 130), 0)], ids=str
)
def test_a_part_of_a_weight_says_what_all_of_it_would(shape, axis):
    # Channels differ by up to a factor of 4; the parts are a sixth to a quarter of the weight.
    rng = np.random.default_rng(1)
    scale = np.exp2(rng.uniform(-1, 1, shape[axis])).reshape(
        [-1 if i == axis else 1 for i in (0, 1)]
    )
    array = (rng.standard_normal(shape) * scale).astype(np.float16)
    size = 10 if shape == (1030, 130) else 16
    chosen = [
        f.PalettizeConfig(bits=4, group_size=size),
        f.PalettizeConfig(bits=3, channel_scale=True),
        f.QuantizeConfig(dtype="int4", range="mse"),
    ]
    whole = scores.scores_of(array, chosen, channel_axis=axis, sample_size=None)
    part = scores.scores_of(array, chosen, channel_axis=axis, sample_size=array.size // 5)
    for treatment in chosen:
        assert part[treatment].sampled
        # Each relative error is a mean over 30 channels or more that differ by a few dB.
        assert part[treatment].relative == pytest.approx(whole[treatment].relative, rel=0.15)


def test_a_regular_pattern_does_not_fool_the_sample():
    # A sample at a fixed distance would see all or none of the channels that are larger.
    array = np.random.default_rng(2).standard_normal((512, 64)).astype(np.float16)
    array[::4] *= 10
    treatment = f.PalettizeConfig(bits=4, channel_scale=True)
    part = scores.scores_of(array, [treatment], sample_size=128 * 64)[treatment]
    whole = scores.scores_of(array, [treatment], sample_size=None)[treatment]
    assert part.relative == pytest.approx(whole.relative, rel=0.1)


def test_plans_are_the_same_on_any_number_of_threads_and_from_the_cache(model):
    texts = {plan(model, target_bits=4.0, threads=n).to_yaml() for n in (1, 2)}
    texts |= {plan(model, target_bits=4.0, use_cache=True).to_yaml() for _ in range(2)}
    assert len(texts) == 1


def test_scores_are_kept_beside_the_package_and_read_again(model, monkeypatch):
    plan(model, target_bits=4.0, use_cache=True)
    kept = cache.path_for(model)
    lines = kept.read_text().splitlines()
    monkeypatch.setattr(scores, "scores_of", lambda *_, **__: pytest.fail("computed again"))
    monkeypatch.setattr(scores, "lookup_scores_of", lambda *_, **__: pytest.fail("computed again"))
    monkeypatch.setattr(OutputError, "gradients", lambda *_: pytest.fail("computed again"))
    plan(model, target_bits=5.0, use_cache=True)
    after = kept.read_text().splitlines()
    # What is new are the errors of whole plans.
    assert after[: len(lines)] == lines
    assert all("all" in line for line in after[len(lines) :] if line)


def test_an_interrupted_scan_goes_on_where_it_stopped(model, monkeypatch):
    whole = plan(model, target_bits=4.0, use_cache=True)
    kept = cache.path_for(model)
    all_lines = kept.read_text()
    # The last line is cut off, as by a full disk or a killed process.
    kept.write_text(all_lines[: len(all_lines) // 2])
    computed = []
    original = scores.scores_of
    monkeypatch.setattr(
        scores, "scores_of", lambda *a, **k: computed.append(1) or original(*a, **k)
    )
    assert plan(model, target_bits=4.0, use_cache=True).to_yaml() == whole.to_yaml()
    assert 0 < len(computed) < len(whole.weights)


def test_a_changed_weight_is_scored_anew(tmp_path):
    folder = tmp_path / "model.mlpackage"
    first = weight(96, 64)
    linear(first).save(str(folder))
    before = plan(folder, target_bits=4.5, use_cache=True)
    shutil.rmtree(folder)
    linear((first * np.float16(2) + np.float16(0.25)).astype(np.float16)).save(str(folder))
    after = plan(folder, target_bits=4.5, use_cache=True)
    assert after.snr_db != before.snr_db
    assert after.snr_db == plan(folder, target_bits=4.5).snr_db


@pytest.mark.parametrize("content", ["not json", '[1, 2]\n{"a": 3}\n["k", ["x"]]\n', "\x00\xff"])
def test_a_damaged_cache_is_as_good_as_none(model, content):
    cache.path_for(model).write_bytes(content.encode("latin-1"))
    assert (
        plan(model, target_bits=4.0, use_cache=True).to_yaml()
        == plan(model, target_bits=4.0).to_yaml()
    )


def test_a_constant_of_several_ops_is_decided_on_once(build):
    made = plan(build("shared"), target_bits=4.5, target=None)
    by_name = {one.name: one for one in made.weights}
    assert len(by_name) == 2  # each is used by two ops
    assert compressed_size_agrees(build("shared"), made)


def twice_stored(path: Path) -> Path:
    """Return a model in which two constants name the same blob, and a third one another."""

    @mb.program(
        input_specs=[mb.TensorSpec(shape=(1, 64), dtype=types.fp16)],
        opset_version=TARGETS["iOS18"],
    )
    def prog(x: Any) -> Any:
        x = mb.linear(x=x, weight=weight(64, 64), name="first")
        x = mb.linear(x=x, weight=weight(64, 64) + np.float16(1), name="second")
        return mb.linear(x=x, weight=weight(64, 64, seed=5), name="third")

    save(prog, path, "iOS18")
    package = Package(path)
    (graph,) = package.graphs
    first, second, _ = (w for w in graph.weights if len(w.shape) == 2)
    second.node.op.attributes["val"].blobFileValue.CopyFrom(
        first.node.op.attributes["val"].blobFileValue
    )
    package.model_path.write_bytes(package.model.SerializeToString())
    return path


def compressed_size_agrees(source: Path, made: milpress.Plan) -> bool:
    report = milpress.compress(source, "unused", made.recipe, dry_run=True)
    return report.package_bytes_after == made.package_bytes


def test_weights_that_share_a_blob_get_the_same_and_are_counted_once(tmp_path):
    source = twice_stored(tmp_path / "twice.mlpackage")
    made = plan(source, target_bits=5.0)
    first, second, third = made.weights
    assert first.treatment == second.treatment
    assert (second.n_bytes, second.shares_with) == (0, first.name)
    assert made.n_bytes == first.n_bytes + third.n_bytes
    assert made.bits_per_weight == 8 * made.n_bytes / (2 * 64 * 64)
    assert compressed_size_agrees(source, made)


def test_kept_weights_stay_and_count(model):
    made = plan(model, target_bits=8.0, keep=["glob:*classifier*", "op:linear"])
    by_name = {one.name: one for one in made.weights}
    classifier = by_name["model_classifier_weight_to_fp16"]
    assert (classifier.format, classifier.bits_per_weight) == ("keep", 16)
    assert made.bits_per_weight <= 8
    report = compressed(model, made.recipe)
    assert classifier.name not in {one.name for one in report.asked}
    with pytest.raises(ConfigError, match="got op:lstm"):
        plan(model, target_bits=4.0, keep=["op:lstm"])


@pytest.mark.parametrize("most", [1, 2])
def test_a_plan_has_no_more_formats_than_allowed(model, most):
    free = plan(model, target_bits=4.5)
    made = plan(model, target_bits=4.5, max_formats=most)
    assert len(made.formats) <= most < len(free.formats)
    assert made.bits_per_weight <= 4.5
    assert made.snr_db <= free.snr_db


def test_a_plan_for_the_neural_engine_brings_no_known_risk(build, tmp_path):
    source = build("layers")
    made = plan(source, target_bits=4.5, prefer="ane")
    report = milpress.compress(source, tmp_path / "out.mlpackage", made.recipe)
    assert report.with_status("compressed")
    assert milpress.lint(tmp_path / "out.mlpackage", unit="ane").findings == ()
    offered = plan(source, target_bits=4.5, formats=["int4-block-32", "int8", "int4-channel"])
    assert "int4-block-32" in offered.formats
    only = plan(
        source, target_bits=6, formats=["int4-block-32", "int8", "int4-channel"], prefer="ane"
    )
    assert "int4-block-32" not in only.formats


def test_a_model_of_floats_of_32_bits_is_planned_for_the_neural_engine_too(build):
    # That it runs elsewhere anyway is no reason against any format.
    made = plan(build("layers", "iOS18", "fp32"), target_bits=4.5, prefer="ane")
    assert all(one.treatment is not None for one in made.weights)


def test_early_models_get_what_they_can_hold(model):
    made = plan(model, target_bits=5.0, target=None)
    assert not any("group" in one.format or "3" in one.format for one in made.weights)
    assert 0.95 * 5 <= made.bits_per_weight <= 5.0
    assert compressed(model, made.recipe).package_bytes_after == made.package_bytes


def test_the_smallest_plan_of_a_score_has_it(model):
    made = plan(model, min_snr=20)
    assert made.snr_db >= 20
    smaller = plan(model, target_bits=made.bits_per_weight * 0.97)
    assert smaller.snr_db < made.snr_db
    with pytest.raises(UnsupportedError, match="the score can be"):
        plan(model, min_snr=90, formats=["palette-*"])


def test_the_curve_rises_and_the_plan_lies_on_or_below_it(model):
    made = plan(model, target_bits=4.2)
    sizes = [point.package_bytes for point in made.curve]
    assert sizes == sorted(sizes)
    assert [p.snr_db for p in made.curve] == sorted(p.snr_db for p in made.curve)
    next_up = next(p for p in made.curve if p.bits_per_weight >= made.bits_per_weight)
    assert made.snr_db <= next_up.snr_db
    assert 0 < made.knee < len(made.curve) - 1


def test_weights_that_suit_nothing_stay_with_the_reason(build):
    made = plan(build("awkward"), target_bits=9.0, formats=["palette-*", "int8"])
    by_name = {one.name: one for one in made.weights}
    (infinite,) = [one for one in by_name.values() if "finite" in one.reason]
    assert (infinite.format, infinite.treatment) == ("keep", None)


def test_the_recipe_is_yaml_with_what_is_expected_behind_each_weight(model):
    made = plan(model, target_bits=4.0)
    text = made.to_yaml()
    assert Recipe.from_dict(yaml.safe_load(text)) == made.recipe
    (line,) = [line for line in text.splitlines() if "classifier" in line]
    assert line.startswith("      - {name: model_classifier_weight_to_fp16, palettize: {bits: ")
    assert line.endswith(" dB")


def test_names_that_look_like_patterns_mean_themselves(tmp_path):
    path = tmp_path / "odd.mlpackage"
    linear(weight(96, 64)).save(str(path))
    package = Package(path)
    (graph,) = package.graphs
    (found,) = (w for w in graph.weights if len(w.shape) == 2)
    for use in found.node.uses:
        use.binding.name = "re:.*[#"
    found.node.op.outputs[0].name = "re:.*[#"
    package.model_path.write_bytes(package.model.SerializeToString())
    made = plan(path, target_bits=4.5)
    assert Recipe.from_dict(yaml.safe_load(made.to_yaml())) == made.recipe
    assert len(compressed(path, made.recipe).with_status("compressed")) == 1


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({}, ConfigError, "one of target_bits, target_size and min_snr must be given, got none"),
        ({"target_bits": 4, "min_snr": 20}, ConfigError, "got bits and snr"),
        ({"target_bits": 0}, ConfigError, "must be a positive number, got 0"),
        ({"target_bits": float("nan")}, ConfigError, "must be a positive number, got nan"),
        (
            {"target_bits": 1.0},
            UnsupportedError,
            r"target_bits must be at least 2\.\d\d, which the smallest formats and .*, got 1$",
        ),
        ({"target_size": 1000}, UnsupportedError, "takes .* bytes at least, got 1000"),
        (
            {"target_size": 1000, "max_formats": 1},
            UnsupportedError,
            "takes .* bytes at least, got 1000",
        ),
        ({"target_bits": 4, "formats": ["palette-5"]}, ConfigError, "bits must be one of"),
        ({"target_bits": 4, "formats": ["int5"]}, ConfigError, "a format must be such as"),
        ({"target_bits": 4, "formats": []}, ConfigError, "formats is empty: name at least one"),
        ({"target_bits": 4, "max_formats": 0}, ConfigError, "max_formats must be at least 1"),
        ({"target_bits": 4, "prefer": "npu"}, ConfigError, "a compute unit must be one of"),
        ({"target_bits": 4, "keep": ["re:["]}, ConfigError, "regular expression"),
        ({"target_bits": 4, "min_size": 10**9}, UnsupportedError, "no weight to plan"),
    ],
)
def test_bad_settings_are_named(model, settings, error, message):
    with pytest.raises(error, match=message):
        plan(model, **settings)


def test_the_least_bits_that_a_refusal_names_can_be_had(model):
    with pytest.raises(UnsupportedError) as caught:
        plan(model, target_bits=0.25)
    least = float(re.search(r"at least (\d+\.\d\d),", str(caught.value)).group(1))
    made = plan(model, target_bits=least)
    assert least - 0.01 <= made.bits_per_weight <= least
    with pytest.raises(UnsupportedError, match=f"at least {least:.2f}, .* got {least - 0.01:g}$"):
        plan(model, target_bits=least - 0.01)


def test_a_size_that_is_too_small_is_refused_in_the_size_of_the_package_with_samples_too(build):
    source = build("lookup", dtype="fp32")
    samples = [{"ids": np.arange(5, dtype=np.int32)}]
    with pytest.raises(UnsupportedError, match=r"the package takes \d+ bytes at least, got 900"):
        plan(source, target_size=900, sample_data=samples, min_size=10)


def test_a_budget_that_is_not_reached_is_said(model):
    made = plan(model, target_bits=12.0, formats=["palette-8"])
    assert any("the budget is more than" in note for note in made.notes)
    coarse = plan(model, target_bits=4.9, formats=["palette-4"])
    assert any("budget" in note for note in coarse.notes)


def test_the_command_line_plans_compresses_and_warns_of_nothing(model, tmp_path):
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "small.mlpackage"
    options = ["--upgrade-to", "iOS18", "--prefer", "ane"]
    shown = run("plan", model, "-o", recipe, "--target-size", "300kB", *options)
    assert "knee" in shown.stdout
    assert "this plan" in shown.stdout
    assert f"written to {recipe}" in shown.stdout.replace("\n", "")
    assert cache.path_for(model).exists()
    assert f"{recipe} exists already; --force (force=True) replaces it" in failed(
        "plan", model, "-o", recipe, "--target-bits", 4
    )
    done = run("compress", model, out, "--recipe", recipe)
    assert done.stderr == ""
    data = json.loads(run("plan", model, "--target-bits", 4, *options, "--json").stdout)
    assert data["bits_per_weight"] <= 4
    direct = run("compress", model, out, "--target-bits", 4, "--upgrade-to", "iOS18", "--force")
    assert "4.00 bits per weight" in direct.stdout or "3.9" in direct.stdout
    assert "--palettize and --target-bits can't be combined" in failed(
        "compress", model, out, "--palettize", 4, "--target-bits", 4
    )
    assert "a size must be a number of bytes, such as 12MB" in failed(
        "plan", model, "--target-size", "big"
    )


def test_rows_that_are_looked_up_count_each_by_its_own_size():
    """Small rows, and one far out, as of a token that begins texts: groups suit it."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((4096, 64)) * rng.choice([0.1, 1.0], 256).repeat(16)[:, None]
    rows[1000, :4] = 60.0
    array = rows.astype(np.float16)
    treatments = [f.PalettizeConfig(bits=4), f.PalettizeConfig(bits=4, group_size=16)]
    found = scores.lookup_scores_of(array, treatments)
    for treatment in treatments:
        noise = np.square(f.palettize(array, treatment).dense().astype(np.float64) - rows).sum(1)
        relative = noise / np.square(rows).sum(1)
        expected = 0.95 * relative.mean() + 0.05 * relative.max()
        assert found[treatment].relative == pytest.approx(expected, rel=0.1)
    plain = scores.scores_of(array, treatments)
    one, groups = treatments
    assert found[one].relative > 2 * plain[one].relative
    assert found[groups].relative < found[one].relative / 2


def test_a_tied_weight_counts_as_what_is_looked_up_and_as_what_is_multiplied(tmp_path):
    @mb.program(
        input_specs=[mb.TensorSpec(shape=(1, 8), dtype=types.int32)],
        opset_version=TARGETS["iOS18"],
    )
    def prog(ids: Any) -> Any:
        table = mb.const(val=weight(256, 64), name="table")
        return mb.linear(x=mb.gather(x=table, indices=ids, axis=0), weight=table, name="y")

    path = save(prog, tmp_path / "tied.mlpackage", "iOS18")
    (tied,) = plan(path, target_bits=6, formats=["palette-3", "int8"], random_samples=0).weights
    array = weight(256, 64)
    treatment = tied.treatment
    parts = scores.scores_of(array, [treatment]), scores.lookup_scores_of(array, [treatment])
    relative = sum(part[treatment].relative for part in parts)
    assert tied.snr_db == pytest.approx(-10 * np.log10(relative), abs=0.01)


@given(
    counts=npst.arrays(np.float64, st.integers(1, 300), elements=st.floats(0, 100)),
    group_size=st.sampled_from([1, 4, 16]),
    n_places=st.sampled_from([1, 700, 20_000]),
)
def test_the_channels_of_a_part_stand_for_all(counts, group_size, n_places):
    n = len(counts)
    size = group_size if n % group_size == 0 else None
    treatments = [f.PalettizeConfig(bits=4, group_size=size), f.QuantizeConfig()]
    part = part_of(counts, n_places, treatments)
    assert part.counts.sum() == pytest.approx(n)
    assert sorted([*part.chosen, *part.others]) == list(range(n))
    run = size or 1
    np.testing.assert_array_equal(part.chosen.reshape(-1, run)[:, 0] % run, 0)
    np.testing.assert_array_equal(np.diff(part.chosen.reshape(-1, run)), 1)
    left_out = counts[part.others]
    if len(left_out) and not part.is_top.all():
        tried = counts[part.chosen[~part.is_top]].sum()
        if tried > 0:
            assert part.factor * tried == pytest.approx(tried + left_out.sum())


VECTORS = ["palette-4-vector-2", "palette-6-vector-2", "palette-8-vector-2", "palette-6"]


def test_plans_with_tables_of_vectors_are_as_large_as_the_package(model):
    made = plan(model, target_bits=3.0, formats=VECTORS, random_samples=0)
    assert {"palette-4-vector-2", "palette-6-vector-2"} & set(made.formats)
    report = compressed(model, made.recipe)
    assert report.package_bytes_after == made.package_bytes
    assert [one.bytes_after for one in report.asked] == [one.n_bytes for one in made.weights]
    for after, planned in zip(report.asked, made.weights, strict=True):
        assert planned.snr_db == pytest.approx(after.snr_db, abs=0.5)


def test_the_neural_engine_gets_vectors_only_if_asked_and_only_in_small_tables(model):
    settings = {"target_bits": 6.5, "formats": VECTORS, "prefer": "ane", "random_samples": 0}
    assert plan(model, **settings).formats == ("palette-6",)
    settings["target_bits"] = 3.0
    with pytest.raises(UnsupportedError, match="target_bits must be at least"):
        plan(model, **settings)
    made = plan(model, **settings, vectors=True)
    assert "palette-6-vector-2" in made.formats
    assert "palette-8-vector-2" not in made.formats
    options = ["--target-bits", 3, "--prefer", "ane", "--vectors", "--random", 0, "--no-cache"]
    options += [f"--formats={name}" for name in VECTORS]
    shown = json.loads(run("plan", model, *options, "--upgrade-to", "iOS18", "--json").stdout)
    assert shown["formats"] == list(made.formats)
    out = model.with_name("vectors.mlpackage")
    milpress.compress(model, out, made.recipe)
    found = {one.fact.id for one in milpress.lint(out, unit="ane", chip="M6").findings}
    assert not any("vector" in name for name in found)
    found = {one.fact.id for one in milpress.lint(out, unit="ane", chip="A17").findings}
    assert "vectors-on-older-ane" in found
