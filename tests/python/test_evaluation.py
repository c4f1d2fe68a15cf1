"""`evaluate`, against metrics computed naively over plain runs; and where an error was planted."""

from __future__ import annotations

import json
import math
from pathlib import Path

import coremltools as ct
import numpy as np
import pytest
from command_line import failed, run

import milpress
from milpress.errors import ConfigError, InputError, PackageNotFoundError
from milpress.evaluation.metrics import ErrorSums, OutputErrors
from milpress.evaluation.results import OutputEvaluation
from milpress.formats import PalettizeConfig
from milpress.interpreter import Feature, load
from milpress.recipe import Recipe
from milpress.samples.data import RandomSamples, Samples


def tones(n: int) -> np.ndarray:
    """Return noisy tones as CREPE wants them."""
    rng = np.random.default_rng(0)
    pitches = 110 * 2 ** rng.uniform(0, 3, (n, 1))
    frames = np.sin(2 * np.pi * pitches * np.arange(1024) / 16000)
    frames += 0.05 * rng.standard_normal(frames.shape)
    frames -= frames.mean(-1, keepdims=True)
    return (frames / frames.std(-1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def four_bits(crepe_tiny, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("crepe") / "4.mlpackage"
    milpress.compress(crepe_tiny, path, Recipe.of(PalettizeConfig(bits=4)))
    return path


# Metrics


def test_metrics_are_what_naive_numpy_says_of_plain_runs(crepe_tiny, four_bits):
    frames = tones(6)
    found = milpress.evaluate(crepe_tiny, four_bits, [{"frames": f[None]} for f in frames])
    one, other = (
        np.stack([load(path)(frames=f[None])["probabilities"][0] for f in frames]).astype(float)
        for path in (crepe_tiny, four_bits)
    )
    (output,) = found.outputs
    noise = ((one - other) ** 2).sum()
    cosines = (one * other).sum(-1) / np.sqrt((one**2).sum(-1) * (other**2).sum(-1))
    p, q = (np.exp(a) / np.exp(a).sum(-1, keepdims=True) for a in (one, other))
    assert found.n_samples == 6
    # Sums of float64 in another order.
    assert output.snr_db == pytest.approx(10 * math.log10((one**2).sum() / noise), rel=1e-9)
    assert output.cosine == pytest.approx(cosines.mean(), rel=1e-12)
    assert output.top1 == (one.argmax(-1) == other.argmax(-1)).mean()
    assert output.kl == pytest.approx((p * np.log(p / q)).sum(-1).mean(), rel=1e-6)
    assert output.kl_of == "softmax"
    assert output.max_error == np.abs(one - other).max()


def test_one_run_over_all_samples_gives_what_the_samples_give_together(crepe_tiny, four_bits):
    frames = tones(4)
    apart, together = (
        milpress.evaluate(crepe_tiny, four_bits, data).outputs[0]
        for data in ([{"frames": f[None]} for f in frames], {"frames": frames})
    )
    # The same float32 network, but batched products may add in another order: 2^-24 for each of
    # its 1,024 and fewer addends, beside errors of a thousandth of the signal.
    assert apart.snr_db == pytest.approx(together.snr_db, abs=0.1)
    assert apart.top1 == together.top1


def test_divergence_of_probabilities_is_theirs_and_not_that_of_their_softmax():
    output = OutputErrors()
    p, q = np.array([[0.5, 0.25, 0.25]]), np.array([[0.25, 0.25, 0.5]])
    output.add(p, q)
    found = output.evaluation("p", ["kl", "top1"])
    assert found.kl_of == "probabilities"
    assert found.kl == pytest.approx((p * np.log(p / q)).sum(), rel=1e-12)
    assert found.snr_db is None
    output.add(p + 1, q)
    assert output.evaluation("p", ["kl"]).kl_of == "softmax"


def test_a_classifier_agrees_where_its_labels_do():
    label, chances = OutputErrors(), OutputErrors()
    for one, other in (("cat", "cat"), ("cat", "dog")):
        label.add(one, other)
        chances.add({"cat": 0.9, "dog": 0.1}, {"dog": 0.1, "cat": 0.9})
    assert label.evaluation("label", ["top1", "snr"]) == OutputEvaluation(name="label", top1=0.5)
    assert chances.evaluation("chances", ["snr", "top1"]).snr_db == math.inf


def test_an_infinity_in_both_is_no_error_and_in_one_only_is_the_greatest():
    errors = ErrorSums()
    errors.add(np.array([1.0, math.inf, math.nan]), np.array([1.0, math.inf, math.nan]))
    assert errors.snr_db == math.inf
    errors.add(np.array([1.0]), np.array([math.inf]))
    assert errors.snr_db == -math.inf


def test_fewer_bits_give_a_lower_ratio(crepe_tiny, tmp_path):
    ratios = []
    for bits in (8, 6, 4, 3, 2):
        path = tmp_path / f"{bits}.mlpackage"
        milpress.compress(
            crepe_tiny, path, Recipe.of(PalettizeConfig(bits=bits), target="iOS18"), verify=False
        )
        ratios.append(milpress.evaluate(crepe_tiny, path, {"frames": tones(8)}).snr_db)
    assert ratios == sorted(ratios, reverse=True)


# Where the error arises


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("conv", "conv"),
        ("linear", "linear"),
        ("matmul_t", "matmul_t"),
        ("transposed", "transposed"),
    ],
)
def test_the_layer_that_an_error_was_planted_in_is_named_first(name, value, build, tmp_path):
    source, path = build("layers", dtype="fp32"), tmp_path / "planted.mlpackage"
    made = milpress.compress(
        source,
        path,
        Recipe.of(PalettizeConfig(bits=1), name=f"re:{name}_(weight|y).*", min_size=100),
    )
    assert len(made.with_status("compressed")) == 1
    found = milpress.evaluate(source, path, RandomSamples(2), per_op=True)
    assert found.ops[0].name == name
    assert found.ops[0].own_snr_db < 60
    # Other ops, given what they were given in the original, compute what they did.
    assert {op.own_snr_db for op in found.ops[1:]} == {math.inf}
    order = [each for each in load(source).values if each in {op.name for op in found.ops}]
    before = order[: order.index(name)]
    carried = {op.name: op.snr_db for op in found.ops}
    assert all(carried[each] == math.inf for each in before)
    assert all(carried[each] < math.inf for each in order[len(before) :])
    assert found.ops[0].snr_db == found.ops[0].own_snr_db
    assert found.n_uncompared == 0


def test_an_error_in_a_branch_or_a_recurrence_is_found_where_it_arises(build, tmp_path):
    for kind, value in (("nested", "before"), ("recurrent", "lstm_0")):
        source, path = build(kind, dtype="fp32"), tmp_path / f"{kind}.mlpackage"
        milpress.compress(source, path, Recipe.of(PalettizeConfig(bits=2), min_size=100))
        found = milpress.evaluate(source, path, RandomSamples(2), per_op=True)
        assert value in {op.name for op in found.ops if op.own_snr_db < 60}


def test_a_model_has_no_error_beside_itself(build):
    found = milpress.evaluate(build("layers"), build("layers"), RandomSamples(1), per_op=True)
    assert {op.own_snr_db for op in found.ops} == {math.inf}
    assert found.snr_db == math.inf
    assert json.loads(json.dumps(found.to_dict()))["outputs"][0]["snr_db"] == "inf"


@pytest.fixture(scope="module")
def functions(build, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("functions") / "source.mlpackage"
    description = ct.utils.MultiFunctionDescriptor()
    for name in ("layers", "shared"):
        description.add_function(str(build(name, dtype="fp32")), "main", name)
    description.default_function_name = "layers"
    ct.utils.save_multifunction(description, str(path))
    return path


def test_one_function_of_several_is_compared(functions, tmp_path):
    path = tmp_path / "compressed.mlpackage"
    milpress.compress(functions, path, Recipe.of(PalettizeConfig(bits=2), name="glob:shared/*"))
    for name, is_exact in (("layers", True), ("shared", False)):
        found = milpress.evaluate(functions, path, RandomSamples(1), function=name)
        assert (found.snr_db == math.inf) == is_exact


def test_values_of_all_models_of_a_pipeline_are_compared(shared_pipeline, tmp_path):
    path = tmp_path / "compressed.mlpackage"
    milpress.compress(
        shared_pipeline, path, Recipe.of(PalettizeConfig(bits=2), name="glob:model1/both")
    )
    found = milpress.evaluate(shared_pipeline, path, RandomSamples(1), per_op=True)
    planted = {op.name for op in found.ops if op.own_snr_db < math.inf}
    assert planted == {"model1/first", "model1/second"}


# Samples


def features(**shapes: tuple[int, ...]) -> list[Feature]:
    return [
        Feature(name=name, kind="array", dtype="float32", shape=shape)
        for name, shape in shapes.items()
    ]


def same(samples: Samples, expected: list[dict[str, np.ndarray]]) -> bool:
    found = list(samples)
    assert len(found) == len(samples) == len(expected)
    return all(
        one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) for k in one)
        for one, other in zip(found, expected, strict=True)
    )


def test_a_file_of_arrays_that_the_inputs_admit_is_one_sample_and_of_larger_ones_several(tmp_path):
    inputs = features(x=(1, 3), y=(2, 2))
    x, y = np.arange(12.0).reshape(4, 3), np.arange(16.0).reshape(4, 2, 2)
    np.savez(tmp_path / "b.npz", x=x[:1], y=y[0])
    np.savez(tmp_path / "a.npz", x=x, y=y)
    np.savez(tmp_path / "c.npz", x=x[:, None], y=y)
    (tmp_path / "notes.txt").write_text("no samples")
    each = [{"x": x[i : i + 1], "y": y[i]} for i in range(4)]
    assert same(Samples(tmp_path / "a.npz", inputs), each)
    assert same(Samples(tmp_path, inputs), [*each, each[0], *each])
    assert same(Samples({"x": x, "y": y}, inputs), each)
    assert same(Samples(iter(each), inputs), each)
    once, again, other = (
        Samples(data, inputs).digest() for data in (tmp_path / "a.npz", each, {"x": x, "y": y + 1})
    )
    assert once == again != other


def test_npy_files_are_named_after_the_inputs_if_there_are_several(tmp_path):
    x = np.arange(6.0).reshape(2, 3)
    np.save(tmp_path / "x.npy", x)
    assert same(Samples(tmp_path, features(frames=(1, 3))), [{"frames": row[None]} for row in x])
    np.save(tmp_path / "y.npy", -x)
    both = [{"x": row[None], "y": -row[None]} for row in x]
    assert same(Samples(tmp_path, features(x=(1, 3), y=(1, 3))), both)


def test_images_are_pixels_or_planes():
    (image,) = [Feature(name="i", kind="image", dtype="float32", shape=(1, 3, 4, 5), layout="RGB")]
    rng = np.random.default_rng(0)
    pixels, planes = rng.integers(0, 256, (2, 4, 5, 3)), rng.integers(0, 256, (2, 3, 4, 5))
    assert same(Samples({"i": pixels[0]}, [image]), [{"i": pixels[0]}])
    assert same(Samples({"i": pixels}, [image]), [{"i": each} for each in pixels])
    assert same(Samples({"i": planes}, [image]), [{"i": each[None]} for each in planes])
    (made,) = Samples(RandomSamples(1), [image])
    assert made["i"].shape == (1, 3, 4, 5)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((2, 4)), "y": np.zeros((2, 3))}, r"bad.npz: input 'x' must have .* 2x4"),
        ({"x": np.zeros((2, 3)), "y": np.zeros((3, 3))}, r"bad.npz: .* got 2 of x, 3 of y"),
        ({"x": np.zeros((2, 3))}, r"bad.npz: .* inputs x, y, got x"),
        ({"x": np.zeros((2, 3)), "z": np.zeros(1)}, r"bad.npz: .* got x, z"),
        ({"x": np.zeros((0, 3)), "y": np.zeros((0, 3))}, "no samples in it"),
    ],
)
def test_samples_that_do_not_suit_are_refused_by_file_and_input(arrays, message, tmp_path):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(InputError, match=message):
        Samples(tmp_path, features(x=(1, 3), y=(1, 3)))


def test_files_that_hold_no_samples_are_refused(tmp_path):
    inputs = features(x=(1, 3))
    (tmp_path / "a.npz").write_bytes(b"PK no zip")
    with pytest.raises(InputError, match=r"a\.npz: not a readable"):
        Samples(tmp_path / "a.npz", inputs)
    np.save(tmp_path / "b.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(InputError, match=r"b\.npy: not a readable"):
        Samples(tmp_path / "b.npy", inputs)
    for path, error in ((tmp_path / "none", PackageNotFoundError), (__file__, InputError)):
        with pytest.raises(error):
            Samples(path, inputs)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no samples in it"):
        Samples(tmp_path / "empty", inputs)
    for data in (3, [np.zeros((1, 3))], np.zeros((1, 3))):
        with pytest.raises(InputError, match="must be a"):
            Samples(data, inputs)
    with pytest.raises(ConfigError, match="at least 1 random sample, got 0"):
        RandomSamples(0)


# Faces


def test_the_command_line_says_what_the_function_returns(crepe_tiny, four_bits, tmp_path):
    np.savez(tmp_path / "frames.npz", frames=tones(3))
    arguments = [str(crepe_tiny), str(four_bits), "--data", str(tmp_path)]
    found = milpress.evaluate(crepe_tiny, four_bits, tmp_path, per_op=True)
    printed = run("evaluate", *arguments, "--per-op", "--json")
    assert json.loads(printed.stdout) == found.to_dict()
    shown = run("evaluate", *arguments, "--per-op", "--metric", "cosine").stdout
    assert f"{found.outputs[0].cosine:.6f}" in shown
    assert "SNR dB  " not in shown.splitlines()[2]
    assert found.ops[0].name in shown


def test_the_command_line_says_that_random_inputs_say_little(build):
    path = str(build("layers"))
    assert "say little" in run("evaluate", path, path, "--random", "2").stdout


def test_models_that_take_or_give_something_else_are_refused(build, crepe_tiny):
    with pytest.raises(ConfigError, match="both models must have the same inputs"):
        milpress.evaluate(crepe_tiny, build("layers"), RandomSamples(1))
    with pytest.raises(ConfigError, match=r"a metric must be one of snr, .* got psnr"):
        milpress.evaluate(crepe_tiny, crepe_tiny, RandomSamples(1), metrics=["psnr"])
    assert "give --data FILE or FOLDER, or --random N" in failed("evaluate", crepe_tiny, crepe_tiny)
