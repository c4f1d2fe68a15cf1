"""Tuning moves tables, scales and biases towards the original, and nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
from command_line import failed, run
from coremltools.converters.mil.mil import Builder as mb  # noqa: N813
from coremltools.converters.mil.mil import types
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import TARGETS, save, weight
from tampering import Edited, refused

import milpress
from milpress import TuneConfig
from milpress import formats as f
from milpress.compression.verification import compare_packages
from milpress.errors import (
    CompressionError,
    ConfigError,
    DestinationError,
    InputError,
    UnsupportedError,
)
from milpress.mil import values
from milpress.mil.package import Package
from milpress.mil.records import TUNED
from milpress.recipe import Recipe, Select, Step
from milpress.tuning.arrays import find_arrays
from milpress.tuning.config import KINDS
from milpress.tuning.forms import Layout, floats_of, gradient_of, with_floats

# Each form that a weight is stored in, and what makes it.
FORMS: dict[str, tuple[f.Treatment, ...]] = {
    "palette": (f.PalettizeConfig(bits=2),),
    "groups": (f.PalettizeConfig(bits=3, group_size=8),),
    "input groups": (f.PalettizeConfig(bits=2, group_size=8, channel_axis=1),),
    "channel scales": (f.PalettizeConfig(bits=3, channel_scale=True),),
    "vectors": (f.PalettizeConfig(bits=4, vector_size=2),),
    "quantized table": (
        f.PalettizeConfig(bits=4, group_size=8),
        f.QuantizeConfig(granularity=f.PerTensor()),
    ),
    "per tensor": (f.QuantizeConfig(granularity=f.PerTensor()),),
    "per channel": (f.QuantizeConfig(),),
    "blocks": (f.QuantizeConfig(dtype="int4", granularity=f.PerBlock(8)),),
    "offsets": (f.QuantizeConfig(dtype="uint4", granularity=f.PerBlock(8), offset=True),),
    "sparse": (f.PruneConfig(sparsity=0.5),),
    "masked palette": (f.PruneConfig(sparsity=0.5), f.PalettizeConfig(bits=2)),
    "masked codes": (f.PruneConfig(sparsity=0.5), f.QuantizeConfig(granularity=f.PerTensor())),
    "pruned palette": (f.PalettizeConfig(bits=3), f.PruneConfig(sparsity=0.25)),
    "codes with a palette": (f.QuantizeConfig(), f.PalettizeConfig(bits=4)),
}
# Those that iOS16 has, whose parameters are attributes.
EARLY = ("palette", "per tensor", "per channel", "sparse")
CODED = ("tables", "scales", "values")


def recipe(*treatments: f.Treatment) -> Recipe:
    select = Select(min_size=100)
    return Recipe(steps=tuple(Step(treatment=each, select=select) for each in treatments))


def network(target: str = "iOS18", dtype: type = np.float16) -> Any:
    """Two layers with biases, and a norm between them."""
    element = types.fp16 if dtype is np.float16 else types.fp32

    @mb.program(
        input_specs=[mb.TensorSpec((1, 16), element)],
        opset_version=TARGETS[target],
    )
    def prog(x: Any) -> Any:
        bias = weight(24, dtype=dtype, seed=3)
        x = mb.linear(x=x, weight=weight(24, 16, dtype=dtype), bias=bias, name="first")
        gamma = (1 + weight(24, dtype=dtype, seed=4)).astype(dtype)
        beta = weight(24, dtype=dtype, seed=5)
        x = mb.layer_norm(x=x, axes=[1], gamma=gamma, beta=beta, name="norm")
        x = mb.relu(x=x)
        return mb.linear(
            x=x,
            weight=weight(16, 24, dtype=dtype, seed=1),
            bias=weight(16, dtype=dtype, seed=6),
            name="y",
        )

    return prog


def drawn(n: int, seed: int = 0, n_inputs: int = 16) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.standard_normal((1, n_inputs)).astype(np.float32)} for _ in range(n)]


SAMPLES = drawn(24)
QUICK = TuneConfig(steps=12, batch=4, lr=2e-2)


@pytest.fixture(scope="module")
def compressed(tmp_path_factory) -> Callable[..., tuple[Path, Path]]:
    """Return a function that gives the network and what a recipe makes of it, once each."""
    folder = tmp_path_factory.mktemp("tuning")
    found: dict[Any, tuple[Path, Path]] = {}

    def make(form: str, target: str = "iOS18") -> tuple[Path, Path]:
        if (form, target) not in found:
            source = folder / f"{target}.mlpackage"
            if not source.exists():
                save(network(target), source, target)
            out = folder / f"{len(found)}.mlpackage"
            milpress.compress(source, out, recipe(*FORMS[form]))
            found[form, target] = source, out
        return found[form, target]

    return make


def snr(original: Path, other: Path, samples: Any = SAMPLES) -> float:
    (output,) = milpress.evaluate(original, other, samples).outputs
    assert output.snr_db is not None
    return output.snr_db


def contents(package: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(package)): path.read_bytes()
        for path in sorted(package.rglob("*"))
        if path.is_file()
    }


def integers(package: Path) -> dict[tuple[str, str], tuple[str, bytes]]:
    """Return all that a package stores but floats, by op and parameter."""
    opened = Package(package)
    stored = {}
    for graph in opened.graphs:
        for node in graph.nodes:
            for parameter in (*node.op.attributes, *node.op.inputs):
                value = values.held(node.op, parameter)
                if value is None or values.type_of(value.type) is None:
                    continue
                dtype, array = values.read(value, opened)
                if not dtype.is_float:
                    stored[node.name, parameter] = dtype.name, array.tobytes()
    return stored


@pytest.mark.parametrize(
    ("form", "target"),
    [*((form, "iOS18") for form in FORMS), *((form, "iOS16") for form in EARLY)],
)
def test_every_form_comes_closer_with_the_codes_that_it_has(form, target, compressed, tmp_path):
    source, before = compressed(form, target)
    after = tmp_path / "tuned.mlpackage"
    report = milpress.tune(source, before, after, SAMPLES, config=QUICK, validation=SAMPLES)
    assert report.is_better
    assert report.after < report.before
    assert not report.left
    assert integers(before) == integers(after)
    assert snr(source, after) > snr(source, before)
    for one in (source, before):
        checked = milpress.verify(one, after)
        assert checked.n_tuned > 0
        # One number for a weight may be the nearest that float16 has.
        n_tuned = sum(each.promise == "tuned" for each in checked.weights)
        assert n_tuned == sum(bool(each.change) for each in report.arrays if each.kind in CODED)
    assert {each.kind for each in report.arrays if each.change} >= {"biases", "norms"}


def test_zeros_stay_zeros(compressed, tmp_path):
    source, before = compressed("masked palette")
    after = tmp_path / "tuned.mlpackage"
    milpress.tune(source, before, after, SAMPLES, config=QUICK, validation=SAMPLES)
    for one, other in zip(Package(before).weights, Package(after).weights, strict=True):
        if one.is_compressed:
            assert not other.dense()[one.dense() == 0].any()
            assert (one.dense() == 0).mean() >= 0.5
            assert one.value().mask().tobytes() == other.value().mask().tobytes()


@pytest.mark.parametrize("kinds", [("tables",), ("biases",), ("norms",), ("tables", "norms")])
def test_only_what_is_named_moves(kinds, compressed, tmp_path):
    source, before = compressed("palette")
    after = tmp_path / "tuned.mlpackage"
    config = TuneConfig(steps=4, batch=4, train=kinds)
    report = milpress.tune(source, before, after, SAMPLES, config=config, validation=SAMPLES)
    assert {each.kind for each in report.arrays} == set(kinds)
    record = json.loads(Package(after).model.description.metadata.userDefined[TUNED])
    names = {"tables": {"lut"}, "biases": {"val"}, "norms": {"val"}}
    found = {name for parameters in record["arrays"].values() for name in parameters}
    assert found == set().union(*(names[kind] for kind in kinds))


floats = st.integers(0, 2**32 - 1).map(np.random.default_rng)


@given(rng=floats, form=st.sampled_from(sorted(FORMS)))
@settings(max_examples=60)
def test_a_gradient_goes_to_an_array_by_the_adjoint_of_decoding(rng, form):
    """Decoding is linear, so that the change along any direction is exact for any difference."""
    value: Any = (rng.standard_normal((16, 24)) * 0.1).astype(np.float32)
    for treatment in FORMS[form]:
        value = f.compress(value, treatment)
    own = floats_of(value)
    # Sixteenths and small integers: products and sums are exact in float32.
    change = (rng.integers(-16, 17, own.shape) / 16).astype(np.float32)
    direction = rng.integers(-4, 5, value.shape).astype(np.float32)
    moved = with_floats(value, change).dense().astype(np.float64)
    expected = float((moved * direction).sum())
    assert float((gradient_of(value, direction) * change).sum()) == expected
    assert with_floats(value, own).dense().tobytes() == value.dense().tobytes()


def test_the_table_of_least_squares_is_found(tmp_path):
    """Of one linear layer, the best table for its codes is the solution of normal equations."""

    @mb.program(input_specs=[mb.TensorSpec((24, 16), types.fp32)], opset_version=TARGETS["iOS18"])
    def prog(x: Any) -> Any:
        return mb.linear(x=x, weight=weight(24, 16, dtype=np.float32), name="y")

    source = save(prog, tmp_path / "source.mlpackage", "iOS18")
    before, after = tmp_path / "before.mlpackage", tmp_path / "after.mlpackage"
    milpress.compress(source, before, recipe(f.PalettizeConfig(bits=2)))
    # Inputs of very different sizes, so that the table of least error of the weight is not best.
    inputs = np.concatenate([each["x"] for each in drawn(24)]) * np.linspace(0.1, 3, 16)
    samples = [{"x": inputs.astype(np.float32)}]
    config = TuneConfig(steps=400, batch=1, lr=5e-2, train=("tables",))
    milpress.tune(source, before, after, samples, config=config, validation=samples)
    (dense,), (palette,) = (
        [each for each in Package(path).weights if each.size > 100] for path in (source, before)
    )
    codes = palette.value().codes
    columns = np.stack([(inputs @ (codes == k).T).reshape(-1) for k in range(4)], axis=1)
    wanted = (inputs @ dense.dense().astype(np.float64).T).reshape(-1)
    table, *_ = np.linalg.lstsq(columns, wanted, rcond=None)
    (tuned,) = [each for each in Package(after).weights if each.size > 100]
    found = tuned.value().lut.reshape(-1)
    started = palette.value().lut.reshape(-1)
    assert np.abs(found - table).max() <= 1e-4 < np.abs(started - table).max()


def interrupted(at: int) -> Callable[[int, int, str], None]:
    def note(done: int, total: int, name: str) -> None:
        if name.startswith("distance") and done == at:
            raise KeyboardInterrupt

    return note


@pytest.mark.parametrize("at", [0, 7])
def test_a_run_that_was_interrupted_ends_with_the_same_bytes(at, compressed, tmp_path):
    source, before = compressed("groups")
    whole, resumed = tmp_path / "whole.mlpackage", tmp_path / "resumed.mlpackage"
    report = milpress.tune(source, before, whole, SAMPLES, config=QUICK)
    with pytest.raises(KeyboardInterrupt):
        milpress.tune(source, before, resumed, SAMPLES, config=QUICK, progress=interrupted(at))
    assert not resumed.exists()
    folder = tmp_path / "resumed.mlpackage.milpress-tune"
    assert folder.is_dir()
    again = milpress.tune(source, before, resumed, SAMPLES, config=QUICK, resume=True)
    assert contents(whole) == contents(resumed)
    assert [each.change for each in again.arrays] == [each.change for each in report.arrays]
    assert (again.before, again.after) == (report.before, report.after)
    assert not folder.exists()


def test_an_interrupted_run_is_not_dropped_or_mixed_up(compressed, tmp_path):
    source, before = compressed("groups")
    out = tmp_path / "out.mlpackage"
    with pytest.raises(ConfigError, match="no interrupted run to resume"):
        milpress.tune(source, before, out, SAMPLES, config=QUICK, resume=True)
    with pytest.raises(KeyboardInterrupt):
        milpress.tune(source, before, out, SAMPLES, config=QUICK, progress=interrupted(3))
    with pytest.raises(DestinationError, match="left of an interrupted run; --resume"):
        milpress.tune(source, before, out, SAMPLES, config=QUICK)
    other = TuneConfig(steps=12, batch=4, lr=3e-3)
    with pytest.raises(ConfigError, match="other packages, samples or settings"):
        milpress.tune(source, before, out, SAMPLES, config=other, resume=True)
    with pytest.raises(ConfigError, match="other packages, samples or settings"):
        milpress.tune(source, before, out, drawn(24, seed=1), config=QUICK, resume=True)
    (tmp_path / "out.mlpackage.milpress-tune" / "run.json").write_text("[]")
    with pytest.raises(ConfigError, match="not of an interrupted run"):
        milpress.tune(source, before, out, SAMPLES, config=QUICK, resume=True)
    (tmp_path / "out.mlpackage.milpress-tune" / "run.json").unlink()
    with pytest.raises(DestinationError, match="not of an interrupted run; move it elsewhere"):
        milpress.tune(source, before, out, SAMPLES, config=QUICK, force=True)
    (tmp_path / "out.mlpackage.milpress-tune" / "run.json").touch()
    milpress.tune(source, before, out, SAMPLES, config=QUICK, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.mlpackage"]


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(compressed, tmp_path):
    source, before = compressed("blocks")
    outs = [tmp_path / f"{i}.mlpackage" for i in range(3)]
    for out, seed in zip(outs, (0, 0, 1), strict=True):
        config = TuneConfig(steps=3, batch=4, seed=seed)
        milpress.tune(source, before, out, SAMPLES, config=config, validation=SAMPLES)
    assert contents(outs[0]) == contents(outs[1]) != contents(outs[2])


@pytest.mark.parametrize("lr", [1e3, 1e30])
def test_what_only_gets_worse_gives_the_package_back(lr, compressed, tmp_path):
    source, before = compressed("palette")
    out = tmp_path / "out.mlpackage"
    config = TuneConfig(steps=5, batch=4, lr=lr)
    report = milpress.tune(source, before, out, SAMPLES, config=config)
    assert contents(out) == contents(before)
    assert not report.is_better
    assert report.before == report.after
    assert "Nothing gained" in report.summary


def test_time_ends_a_run(compressed, tmp_path):
    source, before = compressed("palette")
    config = TuneConfig(steps=10**6, batch=4, time=2)
    out = tmp_path / "out.mlpackage"
    report = milpress.tune(source, before, out, SAMPLES, config=config, validation=SAMPLES)
    assert report.n_steps < 10**6
    # Steps grow and fall with the time that is over.
    assert report.is_better
    assert any("as the time was over" in note for note in report.notes)


def test_a_value_that_is_not_finite_ends_a_run_with_the_best_so_far(
    compressed, tmp_path, monkeypatch
):
    from milpress.interpreter.distillation import Student

    learn, calls = Student.learn, []

    def broken(self: Any, *arguments: Any) -> float:
        calls.append(0)
        return learn(self, *arguments) if len(calls) <= 20 else math.nan

    monkeypatch.setattr(Student, "learn", broken)
    source, before = compressed("palette")
    out = tmp_path / "out.mlpackage"
    report = milpress.tune(source, before, out, SAMPLES, config=QUICK, validation=SAMPLES)
    assert report.n_steps == 5
    assert 0 < report.best_step <= 5
    assert any("ended after 5 steps: the distance for sample" in note for note in report.notes)


@pytest.fixture(scope="module")
def tuned(compressed, tmp_path_factory) -> tuple[Path, Path, Path]:
    out = tmp_path_factory.mktemp("verified") / "tuned.mlpackage"
    source, before = compressed("groups")
    milpress.tune(source, before, out, SAMPLES, config=QUICK, validation=SAMPLES)
    return source, before, out


@pytest.mark.parametrize("which", [0, 1])
def test_a_table_that_is_not_the_recorded_one_is_noticed(tuned, which):
    edited = Edited(tuned[2])
    edited.record(
        lambda data: data["arrays"]["first_weight_0_palettized"].update(lut="0" * 32), TUNED
    )
    refused(tuned[which], edited.reopened(), "the tuned lut differs from the one in the record")


@pytest.mark.parametrize("which", [0, 1])
def test_an_array_without_a_record_is_noticed(tuned, which):
    edited = Edited(tuned[2])
    edited.record(lambda data: data["arrays"].pop("norm_gamma_0"), TUNED)
    refused(tuned[which], edited.reopened(), "norm_gamma_0: changed, though the record says")


@pytest.mark.parametrize("which", [0, 1])
def test_a_record_of_what_is_not_there_is_noticed(tuned, which):
    edited = Edited(tuned[2])
    edited.record(lambda data: data["arrays"].update(ghost={"lut": "0"}), TUNED)
    refused(tuned[which], edited.reopened(), "ghost: the record says that its lut was tuned")


@pytest.mark.parametrize("which", [0, 1])
def test_codes_that_changed_are_noticed_beside_the_package_they_are_of(tuned, which):
    edited = Edited(tuned[2])
    op = edited.op("first_weight_0_palettized")
    twin = edited.op("y_weight_0_palettized")
    twin.inputs["indices"].CopyFrom(op.inputs["indices"])
    if which:
        refused(tuned[1], edited.reopened(), "y_weight_0_palettized")
    else:
        with pytest.raises(CompressionError):
            compare_packages(Package(tuned[0]), edited.reopened())


def test_a_weight_that_is_said_to_be_tuned_needs_a_digest(tuned):
    edited = Edited(tuned[2])
    edited.record(lambda data: data["arrays"].pop("y_weight_0_palettized"), TUNED)
    refused(tuned[0], edited.reopened(), "says that it was tuned, but not what came of it")


@pytest.mark.parametrize("record", ["[]", '{"version": 2}', '{"version": 1, "arrays": 3}'])
def test_a_broken_record_is_refused(tuned, record):
    edited = Edited(tuned[2])
    edited.model.description.metadata.userDefined[TUNED] = record
    with pytest.raises(CompressionError, match=f"{TUNED} is not a record of version 1"):
        compare_packages(Package(tuned[0]), edited.reopened())


def test_a_tuned_package_can_be_tuned_treated_and_decompressed(tuned, tmp_path):
    source, _, out = tuned
    again = tmp_path / "again.mlpackage"
    milpress.tune(source, out, again, SAMPLES, config=TuneConfig(steps=4, batch=4))
    for one in tuned:
        milpress.verify(one, again)
    pruned = tmp_path / "pruned.mlpackage"
    milpress.compress(out, pruned, recipe(f.PruneConfig(sparsity=0.75)))
    for one in tuned:
        milpress.verify(one, pruned)
    eight = tmp_path / "eight.mlpackage"
    milpress.compress(out, eight, recipe(f.QuantizeConfig(granularity=f.PerTensor())))
    milpress.verify(source, eight)
    dense = tmp_path / "dense.mlpackage"
    milpress.decompress(out, dense)
    assert TUNED not in Package(dense).model.description.metadata.userDefined


def test_a_corrected_bias_is_tuned_and_its_record_too(compressed, tmp_path):
    source, _ = compressed("palette")
    before, after = tmp_path / "before.mlpackage", tmp_path / "after.mlpackage"
    milpress.compress(
        source,
        before,
        recipe(f.PalettizeConfig(bits=2)),
        sample_data=SAMPLES,
        bias_correction=True,
        feedback=True,
    )
    milpress.tune(source, before, after, SAMPLES, config=QUICK, validation=SAMPLES)
    assert milpress.verify(source, after).n_corrected == 2
    assert milpress.verify(before, after).n_corrected == 2
    corrected = tmp_path / "corrected.mlpackage"
    again = recipe(f.PruneConfig(sparsity=0.75))
    milpress.compress(after, corrected, again, sample_data=SAMPLES, bias_correction=True)
    milpress.verify(source, corrected)
    milpress.verify(after, corrected)


def test_a_package_without_records_is_tuned_too(compressed, tmp_path):
    """As other tools write it."""
    from milpress.compression.packages import save_package
    from milpress.mil.records import TREATMENTS, forget

    source, before = compressed("groups")
    bare, after = tmp_path / "bare.mlpackage", tmp_path / "after.mlpackage"
    package = Package(before)
    forget(package.model, TREATMENTS)
    save_package(package, bare, verify=False)
    milpress.tune(source, bare, after, SAMPLES, config=QUICK, validation=SAMPLES)
    assert milpress.verify(source, after).n_tuned == milpress.verify(bare, after).n_tuned > 0
    assert TREATMENTS not in Package(after).model.description.metadata.userDefined


def test_functions_that_share_weights_are_tuned_together(tmp_path):
    """A blob of both stays one; what no sample runs stays as it is."""
    source = joined(tmp_path, one=shared_and_own(1), two=shared_and_own(2, "z"))
    before, after = tmp_path / "before.mlpackage", tmp_path / "after.mlpackage"
    # Tables of 16 entries are in the weight file, where functions share them.
    milpress.compress(source, before, recipe(f.PalettizeConfig(bits=4)))
    both = [*drawn(8), *({"z": each["x"]} for each in drawn(8, seed=1))]
    report = milpress.tune(source, before, after, both, config=QUICK, validation=both)
    assert [output.name for output in report.outputs] == ["one/y", "two/y"]
    assert all(output.after < output.before for output in report.outputs)
    named = {each.name: each for each in Package(after).weights if each.is_compressed}
    assert len(named) == 4
    places = [each.places for each in named.values()]
    assert len(set(places)) == 3
    milpress.verify(source, after)
    alone = tmp_path / "alone.mlpackage"
    report = milpress.tune(source, before, alone, both[:8], config=QUICK, validation=both[:8])
    left = {each.name for each in report.arrays if each.note == "no sample runs what uses it"}
    assert left == {"two/own_weight_1_palettized"}
    kept = [
        next(each for each in Package(path).weights if each.name in left).dense().tobytes()
        for path in (before, alone)
    ]
    assert kept[0] == kept[1]


def shared_and_own(seed: int, name: str = "x") -> Any:
    """A layer that functions share, and one of each one's own."""

    def body(x: Any) -> Any:
        common = mb.linear(x=x, weight=weight(16, 16), name="common")
        return mb.add(
            x=common, y=mb.linear(x=x, weight=weight(16, 16, seed=seed), name="own"), name="y"
        )

    decorate = mb.program(
        input_specs=[mb.TensorSpec((1, 16), types.fp16)], opset_version=TARGETS["iOS18"]
    )
    return decorate(lambda x: body(x)) if name == "x" else decorate(lambda z: body(z))


def joined(folder: Path, **programs: Any) -> Path:
    """Save programs as the functions of one package."""
    description = ct.utils.MultiFunctionDescriptor()
    for name, program in programs.items():
        path = save(program, folder / f"{name}.mlpackage", "iOS18")
        description.add_function(str(path), "main", name)
    description.default_function_name = next(iter(programs))
    path = folder / "joined.mlpackage"
    ct.utils.save_multifunction(description, str(path))
    return path


def test_a_pipeline_is_tuned_as_a_whole(shared_pipeline, tmp_path):
    before, after = tmp_path / "before.mlpackage", tmp_path / "after.mlpackage"
    milpress.compress(shared_pipeline, before, recipe(f.PalettizeConfig(bits=2)))
    rng = np.random.default_rng(0)
    samples = [{"x": rng.standard_normal((2, 64)).astype(np.float32)} for _ in range(6)]
    report = milpress.tune(
        shared_pipeline, before, after, samples, config=QUICK, validation=samples
    )
    assert report.after < report.before
    milpress.verify(shared_pipeline, after)


def test_states_are_zero_as_a_sample_begins(tmp_path):
    @mb.program(
        input_specs=[mb.TensorSpec((1, 16), types.fp16), mb.StateTensorSpec((1, 16), types.fp16)],
        opset_version=TARGETS["iOS18"],
    )
    def prog(x: Any, memory: Any) -> Any:
        inner = mb.linear(x=x, weight=weight(16, 16), name="inner")
        kept = mb.coreml_update_state(
            state=memory, value=mb.add(x=mb.read_state(input=memory), y=inner)
        )
        return mb.linear(x=kept, weight=weight(16, 16, seed=1), name="outer")

    source = save(prog, tmp_path / "source.mlpackage", "iOS18")
    before, after = tmp_path / "before.mlpackage", tmp_path / "after.mlpackage"
    milpress.compress(source, before, recipe(f.PalettizeConfig(bits=2)))
    report = milpress.tune(source, before, after, SAMPLES, config=QUICK, validation=SAMPLES)
    assert snr(source, after) > snr(source, before)
    assert any("states begin as zeros" in note for note in report.notes)


def token_model(folder: Path, n_words: int = 40) -> Path:
    """A classifier of each token, with an input that tells padding."""

    @mb.program(
        input_specs=[mb.TensorSpec((1, 6), types.int32), mb.TensorSpec((1, 6), types.int32)],
        opset_version=TARGETS["iOS18"],
    )
    def prog(ids: Any, attention_mask: Any) -> Any:
        x = mb.gather(x=weight(30, 16), indices=ids, axis=0, validate_indices=False)
        shown = mb.expand_dims(x=mb.cast(x=attention_mask, dtype="fp16"), axes=[2])
        x = mb.add(x=x, y=mb.sub(x=shown, y=np.float16(1)))
        return mb.linear(x=x, weight=weight(n_words, 16, seed=1), name="logits")

    return save(prog, folder / "tokens.mlpackage", "iOS18")


def tokens(n: int, padding: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(n):
        ids, mask = rng.integers(1, 30, (1, 6)), np.ones((1, 6), np.int32)
        ids[0, 6 - padding :], mask[0, 6 - padding :] = 0, 0
        found.append({"ids": ids.astype(np.int32), "attention_mask": mask})
    return found


def test_padding_does_not_count(tmp_path):
    """Whatever stands there, and whatever the model makes of it."""
    source = token_model(tmp_path)
    before = tmp_path / "before.mlpackage"
    milpress.compress(source, before, recipe(f.PalettizeConfig(bits=2)))
    outs = []
    for filler in (0, 7):
        samples = tokens(8, padding=3)
        for sample in samples:
            sample["ids"][0, 3:] = filler
        out = tmp_path / f"{filler}.mlpackage"
        report = milpress.tune(source, before, out, samples, config=QUICK, validation=samples)
        assert report.is_better
        outs.append(contents(out))
    assert outs[0] == outs[1]
    counting = tmp_path / "counting.mlpackage"
    config = TuneConfig(steps=12, batch=4, lr=2e-2, mask="ids")
    milpress.tune(source, before, counting, samples, config=config, validation=samples)
    assert contents(counting) != outs[0]


@pytest.mark.parametrize(
    ("n_words", "loss", "expected"),
    [(40, "auto", "kl"), (20, "auto", "mse"), (20, "kl", "kl"), (40, "mse", "mse")],
)
def test_rows_of_logits_are_compared_as_what_softmax_makes_of_them(
    n_words, loss, expected, tmp_path
):
    source = token_model(tmp_path, n_words)
    before, after = tmp_path / "before.mlpackage", tmp_path / "after.mlpackage"
    milpress.compress(source, before, recipe(f.PalettizeConfig(bits=1)))
    samples = tokens(8, padding=0)
    config = TuneConfig(steps=12, batch=4, lr=2e-2, loss=loss)
    report = milpress.tune(source, before, after, samples, config=config, validation=samples)
    (output,) = report.outputs
    assert (output.name, output.loss) == ("logits", expected)
    for path, found in ((before, output.before), (after, output.after)):
        (measured,) = milpress.evaluate(source, path, samples).outputs
        wanted = measured.kl if expected == "kl" else 10 ** (-measured.snr_db / 10)
        # float32 outputs of some 100 terms beside float64 sums.
        assert found == pytest.approx(wanted, rel=100 * 2.0**-23, abs=1e-6)


def several_outputs(folder: Path) -> Path:
    """Probabilities, the place of the greatest, and what a weight behind that makes."""

    @mb.program(input_specs=[mb.TensorSpec((1, 16), types.fp16)], opset_version=TARGETS["iOS18"])
    def prog(x: Any) -> Any:
        scores = mb.linear(x=x, weight=weight(16, 16), name="scores")
        likely = mb.softmax(x=scores, axis=-1, name="likely")
        place = mb.reduce_argmax(x=scores, axis=-1, keep_dims=True, name="place")
        lost = mb.linear(x=mb.round(x=scores), weight=weight(16, 16, seed=2), name="lost")
        return likely, place, lost

    return save(prog, folder / "several.mlpackage", "iOS18")


def test_outputs_are_chosen_and_what_no_gradient_reaches_is_listed(tmp_path):
    source = several_outputs(tmp_path)
    before, after = tmp_path / "before.mlpackage", tmp_path / "after.mlpackage"
    milpress.compress(source, before, recipe(f.PalettizeConfig(bits=2)))
    config = TuneConfig(steps=8, batch=4, lr=2e-2, outputs=("likely",))
    report = milpress.tune(source, before, after, SAMPLES, config=config, validation=SAMPLES)
    assert [(each.name, each.loss) for each in report.outputs] == [
        ("likely", "kl of probabilities")
    ]
    assert {each.name: each.note for each in report.arrays} == {
        "scores_weight_0_palettized": "",
        "scores_bias_0": "",
        "lost_weight_0_palettized": "no gradient reaches it",
        "lost_bias_0": "no gradient reaches it",
    }
    config = TuneConfig(outputs=("place",))
    with pytest.raises(ConfigError, match="hold floats, likely, lost, got 'place'"):
        milpress.tune(source, before, tmp_path / "no.mlpackage", SAMPLES, config=config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be a whole number from 1 on, got 0"),
        ({"batch": 0.5}, "batch must be a whole number from 1 on, got 0.5"),
        ({"loss": "l1"}, "loss must be one of auto, mse, kl, got 'l1'"),
        ({"train": ()}, "train must name at least one of tables, "),
        ({"train": ("code",)}, "train must be one of tables, .*, got 'code'"),
        ({"validation_share": 1}, "validation_share must be between 0 and 1, got 1"),
        ({"lr": math.inf}, "lr must be above 0 and finite, got inf"),
        ({"seed": -1}, "seed must be a whole number from 0 on, got -1"),
        ({"time": 0}, "time must be a number of seconds above 0, got 0"),
        ({"device": "tpu"}, "device must be one of cpu, mps, cuda, got 'tpu'"),
    ],
)
def test_a_wrong_setting_is_refused(settings, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        TuneConfig(**settings)


def test_what_can_not_be_tuned_is_refused(compressed, tmp_path):
    source, before = compressed("palette")
    out = tmp_path / "out.mlpackage"

    def refusal(kind: Any, message: str, *arguments: Any, **options: Any) -> None:
        given = (source, before, out, SAMPLES)
        arguments = (*arguments, *given[len(arguments) :])
        with pytest.raises(kind, match=message):
            milpress.tune(*arguments, **options)
        assert not any(tmp_path.glob("out*"))

    refusal(UnsupportedError, "no weight is compressed", source, source)
    other = save(token_stub(), tmp_path / "other.mlpackage", "iOS18")
    refusal(ConfigError, f"{before} is not {other} compressed: ", other)
    refusal(InputError, "at least 2 samples", source, before, out, SAMPLES[:1])
    refusal(
        InputError, "'x' must have the shape 1x16", source, before, out, [{"x": np.ones((2, 3))}]
    )
    refusal(InputError, "an array for each of the inputs x", source, before, out, [{"z": 1}])
    refusal(ConfigError, "mask must be one of the inputs x, got 'm'", config=TuneConfig(mask="m"))
    refusal(ConfigError, "outputs must be among", config=TuneConfig(outputs=("z",)))
    refusal(
        UnsupportedError, "nothing of scales can be tuned", config=TuneConfig(train=("scales",))
    )
    refusal(ConfigError, "device 'mps' is not there", config=TuneConfig(device="mps"))
    broken = [{"x": np.full((1, 16), np.nan, np.float32)}, *SAMPLES]
    with pytest.raises(InputError, match="sample 0: the original's output 'y' holds no numbers"):
        milpress.tune(source, before, out, broken)
    assert not any(tmp_path.glob("out*"))
    with pytest.raises(DestinationError, match="apart from the source"):
        milpress.tune(source, before, source, SAMPLES)
    out.mkdir()
    with pytest.raises(DestinationError, match="exists already"):
        milpress.tune(source, before, out, SAMPLES)


def token_stub() -> Any:
    @mb.program(input_specs=[mb.TensorSpec((1, 16), types.fp16)], opset_version=TARGETS["iOS18"])
    def prog(x: Any) -> Any:
        return mb.linear(x=x, weight=weight(16, 16), name="y")

    return prog


def test_quantized_activations_come_after(compressed, tmp_path):
    source, before = compressed("palette")
    out = tmp_path / "activations.mlpackage"
    given = Recipe.from_dict({"steps": [{"quantize_activations": {"dtype": "int8"}}]})
    milpress.compress(before, out, given, sample_data=SAMPLES)
    with pytest.raises(UnsupportedError, match="its activations are quantized"):
        milpress.tune(source, out, tmp_path / "tuned.mlpackage", SAMPLES)


def test_only_integers_come_out(tmp_path):
    @mb.program(input_specs=[mb.TensorSpec((1, 16), types.fp16)], opset_version=TARGETS["iOS18"])
    def prog(x: Any) -> Any:
        return mb.reduce_argmax(x=mb.linear(x=x, weight=weight(16, 16)), axis=-1, name="y")

    source = save(prog, tmp_path / "source.mlpackage", "iOS18")
    before = tmp_path / "before.mlpackage"
    milpress.compress(source, before, recipe(f.PalettizeConfig(bits=2)))
    with pytest.raises(UnsupportedError, match="no output holds floats"):
        milpress.tune(source, before, tmp_path / "out.mlpackage", SAMPLES)


class TestCommand:
    @pytest.fixture
    def samples(self, tmp_path) -> Path:
        path = tmp_path / "samples.npz"
        np.savez(path, x=np.concatenate([each["x"] for each in SAMPLES]))
        return path

    def test_it_writes_what_the_function_writes(self, samples, compressed, tmp_path):
        source, before = compressed("groups")
        out, expected = tmp_path / "out.mlpackage", tmp_path / "expected.mlpackage"
        settings = ("--steps", 12, "--batch", 4, "--lr", 0.02, "--train", "tables, biases")
        given = ("--data", samples, "--validation", samples, *settings)
        done = run("tune", source, before, out, *given)
        assert "distance from the original" in done.stdout
        assert f"verified and written to {out}" in done.stdout
        assert done.stderr == ""
        config = TuneConfig(steps=12, batch=4, lr=0.02, train=("tables", "biases"))
        milpress.tune(source, before, expected, samples, config=config, validation=samples)
        assert contents(out) == contents(expected)
        data = json.loads(run("tune", source, before, out, *given, "--force", "--json").stdout)
        assert data["after"] < data["before"]
        assert data["version"] == 1

    def test_it_says_that_nothing_was_gained_and_ends_well(self, samples, compressed, tmp_path):
        source, before = compressed("groups")
        out = tmp_path / "out.mlpackage"
        given = ("--data", samples, "--steps", 2, "--lr", 1e6, "--time", "5m")
        done = run("tune", source, before, out, *given)
        assert done.stderr.startswith("warning: Nothing gained in 2 steps")
        assert contents(out) == contents(before)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ((), "samples are missing: give --data FILE or FOLDER"),
            (("--time", "soon"), "--time must be a number of seconds, minutes or hours"),
            (("--train", "codes"), "train must be one of tables, "),
            (("--train", ","), "train must name at least one of"),
        ],
    )
    def test_it_refuses_in_one_line(self, options, message, samples, compressed, tmp_path):
        data = ("--data", samples) if options else ()
        line = failed("tune", *compressed("groups"), tmp_path / "out.mlpackage", *data, *options)
        assert message in line


def test_the_package_says_what_can_be_tuned(compressed):
    _, before = compressed("groups")
    found = find_arrays(Package(before), KINDS)
    assert sorted((each.kind, each.parameter) for each in found.arrays) == [
        ("biases", "val"),
        ("biases", "val"),
        ("norms", "val"),
        ("norms", "val"),
        ("tables", "lut"),
        ("tables", "lut"),
    ]


@given(rng=floats, n=st.integers(1, 5), folded=st.sampled_from([(), (1,), None]))
def test_numbers_are_laid_out_and_gradients_gathered_likewise(rng, n, folded):
    """A number that stands for all of a row has the sum of their gradients."""
    layout = Layout((n,) if folded is None else folded, (1, n, 1))
    array = rng.integers(-8, 9, layout.stored).astype(np.float32)
    gradient = rng.integers(-8, 9, layout.held).astype(np.float64)
    assert float((layout.unfold(array) * gradient).sum()) == float(
        (array * layout.fold(gradient)).sum()
    )
    assert layout.unfold(array).shape == layout.held
    assert layout.fold(gradient).shape == layout.stored
