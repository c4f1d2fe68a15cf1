"""Plans with samples of packages of several functions, of pipelines and of classifiers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
import torch
from command_line import run
from coremltools.converters.mil.mil import Builder as mb  # noqa: N813
from coremltools.converters.mil.mil import types
from plans import errors_of, plain_error
from small_models import TARGETS, save, weight

import milpress
from milpress import formats as f
from milpress.errors import InputError, UnsupportedError


def samples(n: int, name: str = "x") -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{name: rng.standard_normal((1, 48)).astype(np.float32)} for _ in range(n)]


def adapted(seed: int, name: str = "x") -> Any:
    """A layer that functions share, and an adapter of each one's own."""

    def body(**given: Any) -> Any:
        (x,) = given.values()
        common = mb.linear(x=x, weight=weight(48, 48), name="common")
        return mb.add(
            x=common, y=mb.linear(x=x, weight=weight(48, 48, seed=seed), name="own"), name="y"
        )

    spec = mb.TensorSpec(shape=(1, 48), dtype=types.fp16)
    if name == "x":
        return mb.program(input_specs=[spec], opset_version=TARGETS["iOS18"])(lambda x: body(x=x))
    return mb.program(input_specs=[spec], opset_version=TARGETS["iOS18"])(lambda z: body(z=z))


def joined(folder: Path, **programs: Any) -> Path:
    """Save programs as the functions of one package, the first as the default one."""
    description = ct.utils.MultiFunctionDescriptor()
    for name, program in programs.items():
        path = save(program, folder / f"{name}.mlpackage", "iOS18")
        description.add_function(str(path), "main", name)
    description.default_function_name = next(iter(programs))
    ct.utils.save_multifunction(description, str(folder / "all.mlpackage"))
    return folder / "all.mlpackage"


def compressed(path: Path, *names: str) -> Path:
    """Compress some weights to tables of 8."""
    out = path.with_name("out.mlpackage")
    rules = [{"name": name, "min_size": 1, "palettize": {"bits": 3}} for name in names]
    recipe = milpress.Recipe.from_dict({"steps": [{"rules": rules}]})
    milpress.compress(path, out, recipe, force=True)
    return out


@pytest.fixture
def adapters(tmp_path) -> Path:
    return joined(tmp_path, base=adapted(1), tuned=adapted(2))


def test_a_weight_counts_in_every_function_that_uses_it(adapters):
    data = samples(5)
    found = errors_of(adapters, data, exact=True)
    assert len(found) == 3
    for name, errors in found.items():
        twins = [one.name for one in found.plan.weights if name in (one.name, one.shares_with)]
        assert len(twins) == (2 if "common" in name else 1)
        out = compressed(adapters, *twins)
        each = [plain_error(adapters, out, data, function) for function in ("base", "tuned")]
        assert (min(each) > 0) == ("common" in name)
        # Only the order of sums in float32 differs.
        assert errors["palette-3"] == pytest.approx(sum(each) / 2, rel=1e-3)
    assert found.plan.scored_by == "outputs"
    assert not any("no sample reaches" in note for note in found.plan.notes)


def test_first_order_errors_of_functions_add_up(adapters):
    exact, first = (errors_of(adapters, samples(16), exact=one) for one in (True, False))
    for name, errors in first.items():
        # The model is linear in each weight. A square of 32 draws is off by a deviation of a
        # quarter, and as much again by what the errors of one table have in common.
        assert errors["palette-3"] == pytest.approx(exact[name]["palette-3"], rel=0.5)


def test_weights_of_functions_that_the_samples_do_not_suit_count_as_without(tmp_path):
    path = joined(tmp_path, base=adapted(1), other=adapted(2, name="z"))
    data = samples(4)
    found = errors_of(path, data, exact=True)
    assert "the samples do not suit other, which were not run" in found.plan.notes
    (note,) = [note for note in found.plan.notes if "no sample reaches them" in note]
    (own,) = [name for name in found if name.startswith("other/")]
    assert note.endswith(f": {own}")
    # Without samples, errors of weights of equal size are those of the same table: on the scale of
    # the others, the geometric mean of which they are.
    by_itself = {
        one.name: 10 ** (-one.snr_db / 10)
        for bits in (3,)
        for one in milpress.plan(
            path, target_bits=bits + 1, formats=["palette-3"], use_cache=False, exact=True
        ).weights
        if one.treatment is not None
    }
    seen = {name: errors for name, errors in found.items() if name != own}
    only = errors_of(path, data, exact=True, formats=["palette-3"], target_bits=4)
    ratios = [only[name]["palette-3"] / by_itself[name] for name in seen]
    expected = by_itself[own] * np.exp(np.mean(np.log(ratios)))
    # Every last layer counts four times, and both layers here are last ones: that cancels out.
    assert only[own]["palette-3"] == pytest.approx(expected, rel=1e-6)
    with pytest.raises(InputError, match="there must be an array for each of the inputs"):
        milpress.plan(path, target_bits=6, sample_data=samples(2, name="q"))


def test_each_function_is_run_on_the_samples_that_suit_it(tmp_path):
    path = joined(tmp_path, base=adapted(1), other=adapted(2, name="z"))
    mine, theirs = samples(3), samples(2, name="z")
    found = errors_of(path, [*mine, *theirs], exact=True)
    assert not any("do not suit" in note or "no sample" in note for note in found.plan.notes)
    for name, errors in found.items():
        twins = [one.name for one in found.plan.weights if name in (one.name, one.shares_with)]
        out = compressed(path, *twins)
        each = plain_error(path, out, mine, "base"), plain_error(path, out, theirs, "other")
        # Only the order of sums in float32 differs.
        assert errors["palette-3"] == pytest.approx(sum(each) / 2, rel=1e-3)
    with pytest.raises(InputError, match="sample 3: there must be an array for each"):
        milpress.plan(path, target_bits=6, sample_data=[*mine, {"q": np.zeros(1)}, *theirs])


def test_a_branch_that_no_sample_takes_counts_as_without(tmp_path):
    @mb.program(
        input_specs=[
            mb.TensorSpec(shape=(1, 48), dtype=types.fp16),
            mb.TensorSpec(shape=(1,), dtype=types.bool),
        ],
        opset_version=TARGETS["iOS18"],
    )
    def prog(x: Any, flag: Any) -> Any:
        return mb.cond(
            pred=mb.squeeze(x=flag),
            _true_fn=lambda: mb.linear(x=x, weight=weight(48, 48), name="taken"),
            _false_fn=lambda: mb.linear(
                x=x, weight=mb.const(val=weight(48, 48, seed=2), name="untaken")
            ),
        )

    path = save(prog, tmp_path / "m.mlpackage", "iOS18")
    data = [{**one, "flag": np.ones(1, np.int32)} for one in samples(3)]
    found = errors_of(path, data)
    assert found["untaken"]["palette-3"] > 0
    assert any(note.endswith("without samples: untaken") for note in found.plan.notes)


def test_samples_that_reach_no_weight_are_refused(tmp_path):
    @mb.program(
        input_specs=[mb.TensorSpec(shape=(1, 48), dtype=types.fp16)],
        opset_version=TARGETS["iOS18"],
    )
    def prog(x: Any) -> Any:
        y = mb.linear(x=x, weight=weight(48, 48))
        return mb.add(x=x, y=mb.mul(x=y, y=np.float16(0)), name="y")

    path = save(prog, tmp_path / "m.mlpackage", "iOS18")
    with pytest.raises(
        UnsupportedError, match="with these samples, no weight of the plan has an effect"
    ):
        milpress.plan(path, target_bits=6, sample_data=samples(2), use_cache=False)


# Pipelines


class Picture(torch.nn.Module):
    """Makes another picture of one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Conv2d(3, 24, 3, padding=1)
        self.outer = torch.nn.Conv2d(24, 3, 3, padding=1)

    def forward(self, image):
        return 128 + 200 * self.outer(torch.tanh(self.inner(image / 64 - 2)))


class Reading(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen = torch.nn.Conv2d(3, 32, 3)
        self.last = torch.nn.Linear(32, 40)

    def forward(self, image):
        return self.last(torch.relu(self.seen(image / 64 - 2)).mean((2, 3)))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A model that gives a picture in one layout of colors, and one that takes it in another."""
    folder = tmp_path_factory.mktemp("pictures")
    torch.manual_seed(0)
    settings = {"minimum_deployment_target": ct.target.iOS18, "skip_model_load": True}
    shape = (1, 3, 8, 8)
    first = ct.convert(
        torch.jit.trace(Picture().eval(), torch.zeros(shape)),
        inputs=[ct.ImageType("image", shape, color_layout="RGB")],
        outputs=[ct.ImageType("between", color_layout="RGB")],
        **settings,
    )
    second = ct.convert(
        torch.jit.trace(Reading().eval(), torch.zeros(shape)),
        inputs=[ct.ImageType("between", shape, color_layout="BGR")],
        outputs=[ct.TensorType("y")],
        **settings,
    )
    whole = ct.utils.make_pipeline(first, second)
    spec = whole.get_spec()
    stages = spec.pipeline.models
    stages[1].description.input[0].type.imageType.colorSpace = 20  # RGB
    assert stages[0].description.output[0].type.imageType.colorSpace == 30  # BGR
    path = folder / "pipeline.mlpackage"
    ct.models.MLModel(spec, weights_dir=whole.weights_dir, skip_model_load=True).save(str(path))
    return path


def shown(n: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{"image": rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)} for _ in range(n)]


def test_weights_of_all_models_of_a_pipeline_count_with_what_comes_out(pictures, tmp_path):
    data = shown(4)
    found = errors_of(pictures, data, exact=True, min_size=100)
    assert {name.partition("/")[0] for name in found} == {"model0", "model1"}
    assert len(found) == 4
    out = tmp_path / "out.mlpackage"
    for name, errors in found.items():
        recipe = milpress.Recipe.of(f.PalettizeConfig(bits=3), name=name, min_size=1)
        milpress.compress(pictures, out, recipe, force=True)
        # Only the order of sums in float32 differs.
        assert errors["palette-3"] == pytest.approx(plain_error(pictures, out, data), rel=1e-3)


def test_gradients_go_through_the_pictures_between_models(pictures):
    exact, first = (
        errors_of(pictures, shown(16), exact=one, min_size=100) for one in (True, False)
    )
    for name, errors in first.items():
        # Tables of 16 change so little that the model is nearly linear; a square of 32 draws is off
        # by a deviation of a quarter, and rounding to pixels adds an error of its own.
        ratio = errors["palette-4"] / exact[name]["palette-4"]
        assert 1 / 3 < ratio < 3, name


def test_the_module_of_a_pipeline_computes_what_the_program_does(pictures):
    program = milpress.interpreter.load(pictures)
    module = program.to_torch()
    (one,) = shown(1)
    planes = torch.from_numpy(one["image"]).permute(2, 0, 1)[None].float()
    np.testing.assert_array_equal(module(planes).detach().numpy(), program(**one)["y"])


def test_the_command_line_plans_a_pipeline(pictures, tmp_path):
    np.savez(tmp_path / "samples.npz", image=np.stack([one["image"] for one in shown(3)]))
    out = tmp_path / "out.mlpackage"
    options = ["--target-bits", 5, "--weight-threshold", 99]
    made = run("compress", pictures, out, *options, "--calibration-data", tmp_path / "samples.npz")
    assert "calibrated with 3 samples" in made.stdout
    assert milpress.verify(pictures, out)


# Classifiers


@pytest.mark.parametrize("metric", ["snr", "kl"])
def test_a_classifier_counts_with_its_probabilities(tmp_path, metric):
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(48, 16), torch.nn.Softmax(-1)).eval()
    model = ct.convert(
        torch.jit.trace(module, torch.zeros(1, 48)),
        inputs=[ct.TensorType("x", (1, 48))],
        classifier_config=ct.ClassifierConfig([f"c{i}" for i in range(16)]),
        minimum_deployment_target=ct.target.iOS18,
        skip_model_load=True,
    )
    path, out = tmp_path / "m.mlpackage", tmp_path / "out.mlpackage"
    model.save(str(path))
    data = samples(6)
    found = errors_of(path, data, exact=True, min_size=100, metric=metric)
    ((name, errors),) = found.items()
    recipe = milpress.Recipe.of(f.PalettizeConfig(bits=3), name=name, min_size=1)
    milpress.compress(path, out, recipe, force=True)

    def probabilities(package: Path) -> np.ndarray:
        program = milpress.interpreter.load(package)
        rows = [program(**one) for one in data]
        return np.float64(
            [[*next(v for v in row.values() if isinstance(v, dict)).values()] for row in rows]
        )

    p, q = probabilities(path), probabilities(out)
    expected = np.square(p - q).sum() / np.square(p).sum()
    if metric == "kl":
        expected = (p * np.log(p / q)).sum(-1).mean()
    # The divergence is taken to second order: its third is as small as the change.
    rel = 0.1 if metric == "kl" else 1e-3
    assert errors["palette-3"] == pytest.approx(expected, rel=rel)
