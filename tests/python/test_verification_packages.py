"""Files, biases and pairs that were tampered with, which verification refuses in its words."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tampering import Edited, refused, use

import milpress
from milpress import formats as f
from milpress.compression.packages import save_package
from milpress.compression.verification import compare_packages
from milpress.compression.writer import WeightWriter
from milpress.errors import PackageError, VerificationError, WeightError
from milpress.mil import dtypes, values
from milpress.mil.activation_pairs import Parameters, insert
from milpress.mil.activation_sites import quantization_points
from milpress.mil.package import Package
from milpress.mil.records import ACTIVATIONS, ActivationRecord
from milpress.mil.staging import Counter
from milpress.recipe import Recipe

INT8 = f.QuantizeConfig()
PALETTE = f.PalettizeConfig(bits=4)

# Files


@pytest.fixture
def copied(made: Any, tmp_path: Path) -> tuple[Path, Path]:
    """Return a package and a compressed one, with a file of their own each, that may be changed."""
    for path, name in zip(made("shared", INT8), ("source", "out"), strict=True):
        shutil.copytree(path, tmp_path / f"{name}.mlpackage")
        (tmp_path / f"{name}.mlpackage/Data/notes").mkdir()
        (tmp_path / f"{name}.mlpackage/Data/notes/about.txt").write_text("about")
    source, out = tmp_path / "source.mlpackage", tmp_path / "out.mlpackage"
    milpress.verify(source, out)
    return source, out


@pytest.mark.parametrize("which", [0, 1])
def test_a_file_that_one_package_lacks_is_refused(which, copied):
    (copied[which] / "Data/notes/about.txt").unlink()
    with pytest.raises(
        VerificationError, match=r"about.txt: only one of the packages has this file"
    ):
        milpress.verify(*copied)


def test_a_file_with_other_bytes_is_refused_whatever_its_size_and_time(copied):
    before, after = (path / "Data/notes/about.txt" for path in copied)
    after.write_text("other")
    times = before.stat()
    os.utime(after, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (after.stat().st_size, after.stat().st_mtime_ns) == (times.st_size, times.st_mtime_ns)
    with pytest.raises(
        VerificationError, match=r"about.txt: the file differs from that of the source"
    ):
        milpress.verify(*copied)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("target", ["notes", "notes/about.txt", "nowhere"])
def test_a_link_in_a_package_is_refused(which, target, copied, tmp_path):
    (copied[which] / "Data/linked").symlink_to(copied[which] / "Data" / target)
    with pytest.raises(
        VerificationError, match=r"linked: a symbolic link, which a package must not hold"
    ):
        milpress.verify(*copied)
    if which == 0:
        with pytest.raises(
            PackageError, match=r"(a symbolic link, which|not a plain file; a package)"
        ):
            milpress.compress(copied[0], tmp_path / "new.mlpackage", Recipe.of(INT8))
        assert not (tmp_path / "new.mlpackage").exists()


def test_pipelines_of_other_lengths_are_refused(shared_pipeline, tmp_path):
    out = tmp_path / "out.mlpackage"
    milpress.compress(shared_pipeline, out, Recipe.of(INT8))
    tampered = Edited(out)
    pipeline = tampered.model.pipeline
    del pipeline.models[-1]
    message = "equally many ML programs, got 2 and 1"
    refused(shared_pipeline, tampered.reopened(), message)


# Corrected biases


@pytest.fixture(scope="module")
def corrected(build: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    source = build("layers", dtype="fp32")
    out = tmp_path_factory.mktemp("corrected") / "out.mlpackage"
    milpress.compress(
        source,
        out,
        Recipe.of(PALETTE, name="linear_weight_0"),
        sample_data=milpress.RandomSamples(2),
        bias_correction=True,
    )
    assert milpress.verify(source, out).n_corrected == 1
    return source, out


def a_computed_bias(e: Edited) -> None:
    use(e.op("linear"), "bias").name = "pooled"


def another_shape_of_the_bias(e: Edited) -> None:
    op = e.op("linear_bias_0")
    for kind in (op.outputs[0].type, op.attributes["val"].type):
        values.set_type(kind, dtypes.by_name("float32"), (1, 96))


def a_bias_for_two(e: Edited) -> None:
    use(e.op("sum"), "y").name = "linear_bias_0"


def another_digest(e: Edited) -> None:
    e.record(lambda data: data["biases"].update(linear="0" * 32))


BIASES: list[tuple[Callable[[Edited], None], str]] = [
    (a_computed_bias, "^linear: the corrected bias is not a constant"),
    (another_digest, "^linear: the corrected bias differs from the one in the record"),
    (
        another_shape_of_the_bias,
        r"^linear: the corrected bias must be .*\(96,\).*, got .*\(1, 96\)",
    ),
    (a_bias_for_two, "^linear: the corrected bias must be used once, got 2 uses"),
]


@pytest.mark.parametrize(("change", "message"), BIASES, ids=[c.__name__ for c, _ in BIASES])
def test_a_corrected_bias_is_as_recorded_and_of_one_layer(change, message, corrected):
    source, out = corrected
    tampered = Edited(out)
    change(tampered)
    refused(source, tampered.reopened(), message)


def a_bias_that_a_block_returns(e: Edited) -> None:
    e.block.outputs.append("linear_bias_0")


def test_a_corrected_bias_is_no_output(corrected):
    source, out = map(Edited, corrected)
    for each in (source, out):
        a_bias_that_a_block_returns(each)
    message = "^linear: the corrected bias must be used once, got 2 uses"
    refused(source.reopened(), out.reopened(), message)


@pytest.mark.parametrize("change", [a_bias_that_a_block_returns, a_bias_for_two])
def test_a_bias_that_others_use_too_stays_and_the_layer_gets_another(change, build):
    edited = Edited(build("layers", dtype="fp32"))
    change(edited)
    package = edited.reopened()
    (graph,) = package.graphs
    (weight,) = (each for each in graph.weights if each.name == "linear_weight_0")
    (layer,) = (node for node in graph.nodes if node.name == "linear")
    bias, _ = graph.producer(layer, "bias")
    before = bias.op.SerializeToString(deterministic=True)
    writer = WeightWriter(package, Counter(package))
    assert writer.correct(weight, layer, np.ones(96))
    assert bias.op.SerializeToString(deterministic=True) == before
    assert use(layer.op, "bias").name != bias.name


# Quantized activations


@pytest.fixture(scope="module")
def paired(build: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a model and one in which the inputs of its linear layers are quantized."""
    source, out = build("shared"), tmp_path_factory.mktemp("paired") / "out.mlpackage"
    package = Package(source)
    (graph,) = package.graphs
    points = quantization_points(graph, lambda node: "all" if node.op.type == "linear" else None)
    parameters = Parameters(np.float16(0.125), 3, "uint8")
    pairs = insert(graph, points, lambda *_: parameters)
    ActivationRecord(pairs).write(package.model)
    save_package(package, out)
    assert milpress.verify(source, out).n_quantized == len(pairs) >= 3
    return source, out


def pair_of(e: Edited) -> tuple[Any, Any]:
    dense = next(op for op in e.ops() if op.type == "dequantize")
    return e.op(use(dense, "input").name), dense


def a_pair_in_the_record_alone(e: Edited) -> None:
    e.record(lambda data: data["pairs"].update(nowhere="never"), ACTIVATIONS)


def a_dequantize_less(e: Edited) -> None:
    _, dense = pair_of(e)
    dense.type = "identity"


def a_quantize_less(e: Edited) -> None:
    codes, _ = pair_of(e)
    codes.type = "identity"


def change_scale(number: float) -> Callable[[Edited], None]:
    def change(e: Edited) -> None:
        codes, _ = pair_of(e)
        stored = e.op(use(codes, "scale").name).attributes["val"]
        stored.CopyFrom(values.immediate(np.float16(number)))

    change.__name__ = f"a_scale_of_{number}"
    return change


def a_scale_of_another_type(e: Edited) -> None:
    codes, _ = pair_of(e)
    stored = e.op(use(codes, "scale").name).attributes["val"]
    stored.CopyFrom(values.immediate(np.float32(0.125)))


def a_zero_point_of_another_type(e: Edited) -> None:
    codes, _ = pair_of(e)
    stored = e.op(use(codes, "zero_point").name).attributes["val"]
    stored.CopyFrom(values.immediate(np.int8(3)))


def codes_of_another_type(e: Edited) -> None:
    codes, _ = pair_of(e)
    codes.outputs[0].type.tensorType.dataType = dtypes.by_name("int16").mil


def codes_of_another_value(e: Edited) -> None:
    first, second, *_ = (op for op in e.ops() if op.type == "dequantize")
    use(second, "input").name = use(first, "input").name


def another_type_of_the_result(e: Edited) -> None:
    """Give it another shape, which its codes don't have."""
    _, dense = pair_of(e)
    values.set_type(dense.outputs[0].type, dtypes.by_name("float16"), (1, 64))


def another_use_of_the_codes(e: Edited) -> None:
    codes, _ = pair_of(e)
    more = e.block.operations.add()
    more.CopyFrom(e.op("third"))
    more.outputs[0].name = "more"
    use(more, "x").name = codes.outputs[0].name


def a_result_of_the_pair(e: Edited) -> None:
    _, dense = pair_of(e)
    e.block.outputs.append(dense.outputs[0].name)


PAIRS: list[tuple[Callable[[Edited], None], str]] = [
    (
        a_pair_in_the_record_alone,
        "^nowhere: the record names this dequantize, which the model does not have",
    ),
    (
        a_dequantize_less,
        "^dequantize_.: the record names this dequantize, which the model does not have",
    ),
    (a_quantize_less, "^quantize_.: the record names this quantize, which the model does not have"),
    (change_scale(0), "the scale must be one positive number of the type of the values"),
    (change_scale(-1), "the scale must be one positive number of the type of the values"),
    (change_scale(np.inf), "the scale must be one positive number of the type of the values"),
    (a_scale_of_another_type, "the scale must be one positive number of the type of the values"),
    (a_zero_point_of_another_type, "codes and zero point must be int8 or uint8, one and the same"),
    (codes_of_another_type, "codes and zero point must be int8 or uint8, one and the same"),
    (change_scale(0.25), "^dequantize_.: its scale or zero point differs from that of quantize_."),
    (codes_of_another_value, "^dequantize_.: it must take quantize_., got quantize_."),
    (another_type_of_the_result, "its type differs from that of what is quantized"),
    (another_use_of_the_codes, "^quantize_.: its codes have a use other than dequantize"),
    (a_result_of_the_pair, "added to the model, but a block returns it"),
]


@pytest.mark.parametrize(("change", "message"), PAIRS, ids=[c.__name__ for c, _ in PAIRS])
def test_a_pair_that_is_not_what_was_inserted_is_refused(change, message, paired):
    source, out = paired
    tampered = Edited(out)
    change(tampered)
    refused(source, tampered.reopened(), message)


def test_a_record_of_pairs_is_of_the_form_that_is_written(paired):
    source, out = paired
    for change in (
        lambda data: data.update(version=2),
        lambda data: data.pop("pairs"),
        lambda data: data.update(settings=[1]),
    ):
        tampered = Edited(out)
        tampered.record(change, ACTIVATIONS)
        with pytest.raises(PackageError, match=r"activations is not a record of version 1"):
            compare_packages(Package(source), tampered.reopened())


def test_a_fault_at_one_weight_names_it(copied, monkeypatch):
    def judge(*_: Any) -> None:
        raise ValueError("odd")

    monkeypatch.setattr("milpress.compression.comparison.judge", judge)
    with pytest.raises(WeightError, match=r"^both: .*ValueError: odd"):
        milpress.verify(*copied)
