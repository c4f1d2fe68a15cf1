"""Pipelines with a non-maximum suppression, held to its definition in naive NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from command_line import failed, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from stages import N_CLASSES, detector, suppression

import milpress
from milpress import formats as f
from milpress.errors import InputError, PackageError, UnsupportedError
from milpress.interpreter import load
from milpress.interpreter.suppression import Settings, kept_boxes, suppression_of
from milpress.mil import proto
from milpress.samples.data import Samples


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    sides = [
        min(one[k] + one[2 + k] / 2, other[k] + other[2 + k] / 2)
        - max(one[k] - one[2 + k] / 2, other[k] - other[2 + k] / 2)
        for k in (0, 1)
    ]
    shared = max(sides[0], 0) * max(sides[1], 0)
    union = one[2] * one[3] + other[2] * other[3] - shared
    return shared / union if union > 0 else 0.0


def oracle(
    confidence: np.ndarray, boxes: np.ndarray, iou: float, threshold: float, per_class: bool
) -> list[int]:
    best = confidence.max(1)
    labels = confidence.argmax(1)
    left = sorted(np.flatnonzero(best >= threshold), key=lambda i: (-best[i], i))
    kept: list[int] = []
    for i in left:
        if not any(
            overlap(boxes[i], boxes[k]) > iou and (labels[i] == labels[k] or not per_class)
            for k in kept
        ):
            kept.append(int(i))
    return kept


# Few values, so that there are ties, boxes alike and areas of zero; all sums are exact.
eighths = st.integers(0, 8).map(lambda n: n / 8)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), n=st.integers(0, 12), n_classes=st.integers(1, 3))
def test_boxes_are_those_of_the_definition(data, n, n_classes):
    confidence, boxes = (
        data.draw(npst.arrays(np.float32, (n, width), elements=eighths)) for width in (n_classes, 4)
    )
    iou, threshold = data.draw(eighths), data.draw(eighths)
    per_class = data.draw(st.booleans())
    chosen = Settings(iou=iou, confidence=threshold, per_class=per_class)
    found = kept_boxes(torch.from_numpy(confidence), torch.from_numpy(boxes), chosen)
    expected = oracle(confidence.astype(float), boxes.astype(float), iou, threshold, per_class)
    assert found.tolist() == expected


def test_a_box_without_a_number_as_its_confidence_is_left_out():
    confidence = torch.tensor([[np.nan], [0.5]])
    chosen = Settings(iou=0.5, confidence=0.0, per_class=False)
    assert kept_boxes(confidence, torch.zeros(2, 4), chosen).tolist() == [1]


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((1, 3, 16, 16)).astype(np.float32)


def given_and_kept(path: Any, **inputs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    program = load(path)
    return program.before_suppression()(x=inputs["x"]), program(**inputs)


@pytest.mark.parametrize("per_class", [False, True])
def test_a_detector_gives_the_boxes_that_are_kept(tmp_path, per_class):
    path = detector(tmp_path / "m.mlpackage", per_class=per_class)
    program = load(path)
    assert [feature.name for feature in program.inputs] == ["x"]
    assert [feature.name for feature in program.outputs] == ["confidence", "coordinates"]
    counts = set()
    for seed in range(3):
        taken, made = given_and_kept(path, x=picture(seed))
        kept = oracle(
            *(taken[name].astype(float) for name in ("scores", "boxes")), 0.3, 0.5, per_class
        )
        np.testing.assert_array_equal(made["confidence"], taken["scores"][kept])
        np.testing.assert_array_equal(made["coordinates"], taken["boxes"][kept])
        counts.add(len(kept))
    assert 0 < min(counts) < 64


def test_thresholds_may_be_inputs(tmp_path):
    path = detector(
        tmp_path / "m.mlpackage",
        iouThresholdInputFeatureName="iou",
        confidenceThresholdInputFeatureName="least",
    )
    program = load(path)
    taken, plain = given_and_kept(path, x=picture(0))
    same = program(x=picture(0), iou=0.3, least=np.float64([0.5]))
    np.testing.assert_array_equal(plain["confidence"], same["confidence"])
    for iou, least in ((1.0, 0.5), (0.1, 0.7)):
        made = program(x=picture(0), iou=iou, least=torch.tensor(least))
        kept = oracle(
            *(taken[name].astype(float) for name in ("scores", "boxes")), iou, least, False
        )
        np.testing.assert_array_equal(made["confidence"], taken["scores"][kept])
    assert len(program(x=picture(0), iou=1.0, least=0.0)["confidence"]) == 64
    with pytest.raises(InputError, match="'iou' must be one number"):
        program(x=picture(0), iou=[0.1, 0.2])
    # Random samples leave them as the stage has them.
    (sample,) = Samples(milpress.RandomSamples(1), program.inputs)
    assert sample.keys() == {"x"}


@pytest.mark.parametrize("n_rows", [(70, 70), (0, 3), (2, 5)])
def test_boxes_are_cut_off_and_filled_up_with_zeros(tmp_path, n_rows):
    plain = load(detector(tmp_path / "a.mlpackage"))(x=picture(1))
    made = load(detector(tmp_path / "b.mlpackage", n_rows=n_rows))(x=picture(1))
    for name, rows in plain.items():
        n = min(max(len(rows), n_rows[0]), n_rows[1])
        padded = np.concatenate([rows, np.zeros((70, rows.shape[1]), np.float32)])[:n]
        np.testing.assert_array_equal(made[name], padded)


def test_labels_must_suit_the_confidences(tmp_path):
    path = detector(tmp_path / "m.mlpackage", n_labels=4)
    with pytest.raises(InputError, match=r"'scores' must have the shape \?x4, got 64x5"):
        load(path)(x=picture(0))
    path = detector(tmp_path / "m.mlpackage", coordinatesInputFeatureName="")
    with pytest.raises(PackageError, match=r"stage1: .* has no coordinatesInputFeatureName"):
        load(path)


def test_what_comes_before_becomes_a_module(tmp_path):
    program = load(detector(tmp_path / "m.mlpackage"))
    with pytest.raises(UnsupportedError, match=r"that of before_suppression\(\), got 'stage1'"):
        program.to_torch()
    module = program.before_suppression().to_torch()
    made = program.before_suppression()(x=picture(0))
    for ours, theirs in zip(module(torch.from_numpy(picture(0))), made.values(), strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs)


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    """A detector, and the same with tables of 16."""
    folder = tmp_path_factory.mktemp("detectors")
    path, out = detector(folder / "m.mlpackage"), folder / "out.mlpackage"
    milpress.compress(path, out, milpress.Recipe.of(f.PalettizeConfig(bits=3), min_size=100))
    return path, out


@pytest.mark.parametrize("per_op", [False, True])
def test_detectors_are_compared_where_the_original_keeps_a_box(compressed, per_op):
    path, out = compressed
    data = [{"x": picture(seed)} for seed in range(4)]
    found = milpress.evaluate(path, out, data, per_op=per_op)
    signal, noise = {}, {}
    counts = [0, 0, 0]
    for one in data:
        before = [load(package).before_suppression()(**one) for package in (path, out)]
        kept = [
            oracle(*(made[name].astype(float) for name in ("scores", "boxes")), 0.3, 0.5, False)
            for made in before
        ]
        for name, source in (("confidence", "scores"), ("coordinates", "boxes")):
            mine, theirs = (np.float64(made[source][kept[0]]) for made in before)
            signal[name] = signal.get(name, 0) + np.square(mine).sum()
            noise[name] = noise.get(name, 0) + np.square(theirs - mine).sum()
        both = set(kept[0]) & set(kept[1])
        counts = [a + b for a, b in zip(counts, map(len, (kept[0], both, kept[1])), strict=True)]
    assert counts[0] != counts[2] or counts[1] < counts[0]  # or nothing is shown
    for output in found.outputs:
        expected = 10 * np.log10(signal[output.name] / noise[output.name])
        assert output.snr_db == pytest.approx(expected, rel=1e-6)
    assert found.notes == (
        f"of the {counts[0]} boxes that the original keeps, the other keeps {counts[1]}, and "
        f"{counts[2] - counts[1]} more; outputs are compared where the original keeps a box",
    )
    assert found.to_dict()["notes"] == list(found.notes)
    alike = milpress.evaluate(path, path, data, per_op=per_op)
    assert alike.snr_db == np.inf


def test_detectors_are_compressed_by_samples(compressed, tmp_path):
    path, _ = compressed
    data = [{"x": picture(seed)} for seed in range(4)]
    out = tmp_path / "out.mlpackage"
    recipe = milpress.Recipe.of(f.PalettizeConfig(bits=4), min_size=100)
    report = milpress.compress(path, out, recipe, sample_data=data)
    assert not any("not calibrated" in weight.note for weight in report.with_status("compressed"))
    plan = milpress.plan(path, target_bits=5, sample_data=data, use_cache=False, min_size=100)
    assert plan.scored_by == "outputs"
    assert any("what a non-maximum suppression takes" in note for note in plan.notes)
    config = milpress.coreml.OptimizationConfig(
        global_config=milpress.coreml.OpLinearQuantizerConfig(mode="linear_symmetric")
    )
    milpress.coreml.linear_quantize_activations(path, config, data)


def test_the_command_line_runs_detectors(compressed, tmp_path):
    path, out = compressed
    np.savez(tmp_path / "x.npz", x=picture(0))
    shown = run("run", path, "--input", tmp_path / "x.npz").stdout
    assert "confidence" in shown
    assert f"x{N_CLASSES}" in shown
    shown = run("evaluate", path, out, "--data", tmp_path / "x.npz").stdout
    assert "boxes that the original keeps" in shown
    np.savez(tmp_path / "z.npz", z=picture(0))
    assert "inputs must be x (float32 1x3x16x16)" in failed(
        "run", path, "--input", tmp_path / "z.npz"
    )


def test_either_output_may_say_how_many_boxes_there_are():
    def n_boxes(confidence: list[int], coordinates: list[int]) -> Any:
        message = suppression()
        for output, shape in zip(
            message.description.output, (confidence, coordinates), strict=True
        ):
            output.type.multiArrayType.ClearField("shapeRange")
            output.type.multiArrayType.shape.extend(shape)
        model = proto.Model.FromString(message.SerializeToString())
        return suppression_of(model, "stage").n_boxes

    assert n_boxes([7, N_CLASSES], [7, 4]) == n_boxes([], [7, 4]) == (7, 7)
    assert n_boxes([7, N_CLASSES], []) == (7, 7)
    assert n_boxes([], []) == (0, None)
    with pytest.raises(
        PackageError, match="the two outputs have room for different numbers of boxes"
    ):
        n_boxes([7, N_CLASSES], [8, 4])
