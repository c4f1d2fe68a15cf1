"""The main job, end to end: written packages against their sources and against coremltools."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import coremltools as ct
import coremltools.optimize.coreml as cto
import numpy as np
import pytest
from oracles import (
    assert_coremltools_agrees,
    decoded,
    decoded_by_coremltools,
    decompressed_by_coremltools,
    ops_of,
)

import milpress
from milpress import formats as f
from milpress.errors import UnsupportedError, VerificationError
from milpress.mil.package import Package
from milpress.mil.records import TREATMENTS, forget

EARLY = {
    "int8": f.QuantizeConfig(),
    "int8 per tensor": f.QuantizeConfig(granularity=f.PerTensor()),
    "uint8": f.QuantizeConfig(dtype="uint8"),
    "uint8 offset": f.QuantizeConfig(dtype="uint8", offset=True),
    "palette 1": f.PalettizeConfig(bits=1),
    "palette 2": f.PalettizeConfig(bits=2),
    "palette 4": f.PalettizeConfig(bits=4),
    "palette 6": f.PalettizeConfig(bits=6),
    "palette 8": f.PalettizeConfig(bits=8),
    "sparse": f.PruneConfig(sparsity=0.5),
    "threshold": f.PruneConfig(threshold=0.03),
}
LATE = {
    "palette 3": f.PalettizeConfig(bits=3),
    "palette 4 group 16": f.PalettizeConfig(bits=4, group_size=16),
    "int4 block 32": f.QuantizeConfig(dtype="int4", granularity=f.PerBlock(32)),
    "uint4 block 8 offset": f.QuantizeConfig(dtype="uint4", granularity=f.PerBlock(8), offset=True),
    "int4": f.QuantizeConfig(dtype="int4"),
}


@pytest.mark.parametrize("target", [None, "iOS17", "iOS18", "iOS26"])
@pytest.mark.parametrize("treatment", EARLY)
def test_crepe_tiny_is_decoded_by_coremltools_bit_for_bit(crepe_tiny, tmp_path, treatment, target):
    out = tmp_path / "out.mlpackage"
    recipe = milpress.Recipe.of(EARLY[treatment], target=target)
    report = milpress.compress(crepe_tiny, out, recipe)
    assert report.verified
    assert report.package_bytes_after < report.package_bytes_before
    assert_coremltools_agrees(out)


@pytest.mark.parametrize("treatment", LATE)
def test_ios18_forms_are_decoded_by_coremltools_bit_for_bit(crepe_tiny, tmp_path, treatment):
    out = tmp_path / "out.mlpackage"
    milpress.compress(crepe_tiny, out, milpress.Recipe.of(LATE[treatment], target="iOS18"))
    assert_coremltools_agrees(out)
    assert_coremltools_agrees(out, decompressed_by_coremltools)


@pytest.mark.parametrize("treatment", [*EARLY, *LATE])
def test_basic_pitch_of_ios15_is_raised_and_decoded_by_coremltools(
    basic_pitch, tmp_path, treatment
):
    out = tmp_path / "out.mlpackage"
    target = "iOS18" if treatment in LATE else None
    report = milpress.compress(
        basic_pitch, out, milpress.Recipe.of((EARLY | LATE)[treatment], target=target)
    )
    assert report.notes == (f"raised from iOS15 to {target or 'iOS16'}",)
    assert_coremltools_agrees(out)


def kinds_and_treatments() -> Iterator[Any]:
    """Yield each kind with each treatment for every target and type; all but one are large."""
    kinds = ("layers", "shared", "lookup", "nested", "recurrent", "awkward")
    variants = list(itertools.product(("iOS15", "iOS16", "iOS17", "iOS18"), ("fp16", "fp32")))
    for (i, kind), (j, treatment) in itertools.product(enumerate(kinds), enumerate(EARLY | LATE)):
        for k, variant in enumerate(variants):
            marks = () if k == (i + j) % len(variants) else pytest.mark.large
            yield pytest.param(kind, treatment, *variant, marks=marks)


@pytest.mark.parametrize(("kind", "treatment", "target", "dtype"), list(kinds_and_treatments()))
def test_every_kind_of_layer_survives_every_treatment(
    build, tmp_path, kind, treatment, target, dtype
):
    if kind == "recurrent" and dtype == "fp16" and target in ("iOS15", "iOS16"):
        dtype = "fp32"  # lstm takes float16 from iOS17 on
    out = tmp_path / "out.mlpackage"
    late = "iOS18" if treatment in LATE else None
    recipe = milpress.Recipe.of((EARLY | LATE)[treatment], target=late, min_size=100)
    report = milpress.compress(build(kind, target, dtype), out, recipe)
    assert report.with_status("compressed")
    assert_coremltools_agrees(out)


@pytest.mark.parametrize(
    ("treatment", "config"),
    [
        ("int8", cto.OpLinearQuantizerConfig()),
        ("int4 block 32", cto.OpLinearQuantizerConfig(dtype="int4", granularity="per_block")),
        ("palette 4", cto.OpPalettizerConfig(nbits=4)),
        (
            "palette 4 group 16",
            cto.OpPalettizerConfig(nbits=4, granularity="per_grouped_channel", group_size=16),
        ),
        ("sparse", cto.OpMagnitudePrunerConfig(target_sparsity=0.5)),
    ],
)
@pytest.mark.parametrize("target", ["iOS16", "iOS18"])
def test_ops_have_the_form_and_names_that_coremltools_writes(
    build, tmp_path, treatment, config, target
):
    if treatment in LATE and target == "iOS16":
        target = "iOS18"
    source = build("layers", target)
    model = ct.models.MLModel(str(source), skip_model_load=True)
    apply = {
        cto.OpLinearQuantizerConfig: cto.linear_quantize_weights,
        cto.OpPalettizerConfig: cto.palettize_weights,
        cto.OpMagnitudePrunerConfig: cto.prune_weights,
    }[type(config)]
    apply(model, cto.OptimizationConfig(config)).save(str(tmp_path / "theirs.mlpackage"))
    milpress.compress(
        source, tmp_path / "ours.mlpackage", milpress.Recipe.of((EARLY | LATE)[treatment])
    )

    def compressed(path: Path) -> dict[str, Any]:
        return {op[3][0]: op for op in ops_of(path) if op[0].startswith("constexpr_")}

    ours, theirs = (
        compressed(tmp_path / "ours.mlpackage"),
        compressed(tmp_path / "theirs.mlpackage"),
    )
    # coremltools skips what a group or block does not divide; the rest must be the same.
    assert set(theirs) <= set(ours)
    assert len(theirs) >= 2
    for name, op in theirs.items():
        assert ours[name] == op


def test_magnitude_pruning_zeroes_exactly_the_number_asked_for(crepe_tiny, tmp_path):
    out = tmp_path / "out.mlpackage"
    milpress.compress(crepe_tiny, out, milpress.Recipe.of(f.PruneConfig(sparsity=0.37)))
    dense = decoded(crepe_tiny)
    for name, ours in decoded(out).items():
        if name.endswith("_sparsified"):
            source = dense[name.removesuffix("_sparsified")]
            assert np.count_nonzero(ours == 0) == int(np.floor(source.size * 0.37))
            np.testing.assert_array_equal(ours[ours != 0], source[ours != 0])


def test_what_was_not_asked_to_change_is_the_same_byte_for_byte(crepe_tiny, tmp_path):
    out = tmp_path / "out.mlpackage"
    copy = tmp_path / "source.mlpackage"
    shutil.copytree(crepe_tiny, copy)
    (copy / "Data" / "com.example").mkdir()
    (copy / "Data" / "com.example" / "notes.txt").write_bytes(b"kept")
    recipe = {"steps": [{"quantize": {"dtype": "int8"}, "select": {"op_types": ["linear"]}}]}
    milpress.compress(copy, out, milpress.Recipe.from_dict(recipe))
    assert (out / "Data" / "com.example" / "notes.txt").read_bytes() == b"kept"
    assert (out / "Manifest.json").read_bytes() == (copy / "Manifest.json").read_bytes()
    before, after = decoded(copy), decoded(out)
    changed = {name for name in before if name not in after}
    assert changed == {"model_classifier_weight_to_fp16"}
    for name in before.keys() & after.keys():
        assert before[name].tobytes() == after[name].tobytes()


def test_unknown_protobuf_fields_survive(crepe_tiny, tmp_path):
    copy, out = tmp_path / "source.mlpackage", tmp_path / "out.mlpackage"
    shutil.copytree(crepe_tiny, copy)
    model = copy / "Data" / "com.apple.CoreML" / "model.mlmodel"
    unknown = bytes([0xFA, 0xFF, 0x3F, 3]) + b"abc"  # field 131,071, three bytes
    model.write_bytes(model.read_bytes() + unknown)
    milpress.compress(copy, out, milpress.Recipe.of(f.QuantizeConfig()))
    assert unknown in (out / "Data" / "com.apple.CoreML" / "model.mlmodel").read_bytes()


def test_decompressing_gives_the_decoded_weights_bit_for_bit(crepe_tiny, tmp_path):
    small, dense = tmp_path / "small.mlpackage", tmp_path / "dense.mlpackage"
    recipe = milpress.Recipe.of(LATE["palette 4 group 16"], target="iOS18")
    milpress.compress(crepe_tiny, small, recipe)
    report = milpress.decompress(small, dense)
    assert len(report.with_status("compressed")) == 7
    after = decoded(dense)
    for name, weight in decoded(small).items():
        assert after[name].tobytes() == weight.tobytes()
    milpress.verify(small, dense)
    assert_coremltools_agrees(dense)


JOINT = {
    "prune, palettize": [
        (cto.prune_weights, cto.OpMagnitudePrunerConfig(target_sparsity=0.5)),
        (cto.palettize_weights, cto.OpPalettizerConfig(nbits=4)),
    ],
    "prune, quantize": [
        (cto.prune_weights, cto.OpMagnitudePrunerConfig(target_sparsity=0.5)),
        (cto.linear_quantize_weights, cto.OpLinearQuantizerConfig()),
    ],
    "palettize, quantize": [
        (cto.palettize_weights, cto.OpPalettizerConfig(nbits=4)),
        (cto.linear_quantize_weights, cto.OpLinearQuantizerConfig(granularity="per_tensor")),
    ],
    "vectors": [(cto.palettize_weights, cto.OpPalettizerConfig(nbits=4, cluster_dim=2))],
}


@pytest.mark.parametrize("chain", JOINT)
def test_chains_that_coremltools_writes_are_inspected_and_decompressed(build, tmp_path, chain):
    model = ct.models.MLModel(str(build("layers", "iOS18")), skip_model_load=True)
    for i, (function, config) in enumerate(JOINT[chain]):
        model = function(model, cto.OptimizationConfig(config), joint_compression=i > 0)
    path, dense = tmp_path / "chained.mlpackage", tmp_path / "dense.mlpackage"
    model.save(str(path))
    assert any(" > " in w.stored_as for w in milpress.inspect(path).weights) == (chain != "vectors")
    assert_coremltools_agrees(path, decompressed_by_coremltools)
    milpress.decompress(path, dense)
    assert not any("constexpr" in op[0] for op in ops_of(dense))
    after = decoded(dense)
    for name, weight in decoded(path).items():
        assert after[name].tobytes() == weight.tobytes()
    assert_coremltools_agrees(dense)


@pytest.mark.parametrize("treatment", ["int8", "palette 4", "sparse"])
def test_compressed_weights_of_ios16_take_their_ios18_form_when_raised(build, tmp_path, treatment):
    source, early, late = (
        build("shared", "iOS16"),
        tmp_path / "e.mlpackage",
        tmp_path / "l.mlpackage",
    )
    recipe = {"steps": [{"select": {"name": "both"}, **_dict(EARLY[treatment])}]}
    milpress.compress(source, early, milpress.Recipe.from_dict(recipe))
    rest = {"target": "iOS18", "steps": [{"select": {"name": "torn"}, "palettize": {"bits": 4}}]}
    milpress.compress(early, late, milpress.Recipe.from_dict(rest))
    before, after = decoded(early), decoded(late)
    for name in before.keys() & after.keys():
        assert before[name].tobytes() == after[name].tobytes()
    assert_coremltools_agrees(late)


def _dict(treatment: Any) -> dict[str, Any]:
    from milpress.recipe import treatment_dict

    return treatment_dict(treatment)


def test_a_gather_that_may_be_negative_gets_a_guard_when_raised(build, tmp_path):
    out = tmp_path / "out.mlpackage"
    recipe = milpress.Recipe.of(f.QuantizeConfig(), target="iOS18")
    milpress.compress(build("lookup", "iOS16"), out, recipe)
    kinds = [op[0] for op in ops_of(out)]
    assert kinds.index("select") < kinds.index("gather")
    assert {"greater_equal", "add", "select"} <= set(kinds)
    assert_coremltools_agrees(out)


def test_shared_blobs_stay_shared(build, tmp_path):
    out = tmp_path / "out.mlpackage"
    one, two = build("shared", "iOS18"), build("nested", "iOS18")
    description = ct.utils.MultiFunctionDescriptor()
    description.add_function(str(one), "main", "first")
    description.add_function(str(one), "main", "second")
    description.add_function(str(two), "main", "third")
    description.default_function_name = "first"
    source = tmp_path / "source.mlpackage"
    ct.utils.save_multifunction(description, str(source))
    report = milpress.compress(source, out, milpress.Recipe.of(f.PalettizeConfig(bits=4)))
    assert {w.name for w in report.with_status("compressed")} >= {"first/both", "second/both"}
    spec = Package(out)
    offsets = {}
    for graph in spec.graphs:
        for weight in graph.weights:
            if weight.node.op.type == "constexpr_lut_to_dense":
                value = weight.node.op.inputs["indices"].arguments[0].value
                offsets[weight.name] = value.blobFileValue.offset
    assert offsets["first/both_palettized"] == offsets["second/both_palettized"]
    for function in ("first", "second", "third"):
        theirs = decoded_by_coremltools(out, function)
        for name, ours in decoded(out).items():
            place, _, short = name.partition("/")
            if place == function:
                assert ours.tobytes() == np.ascontiguousarray(theirs[short]).tobytes()


def test_a_pipeline_keeps_one_weight_file_per_model(build, tmp_path):
    first = ct.models.MLModel(str(build("shared", "iOS16")), skip_model_load=True)
    names = [first.get_spec().description.output[0].name, "x"]
    second_spec = ct.models.MLModel(str(build("shared", "iOS16")), skip_model_load=True)
    spec = second_spec.get_spec()
    ct.utils.rename_feature(spec, "x", names[0])
    ct.utils.rename_feature(spec, names[0], names[0], rename_inputs=False)
    ct.utils.rename_feature(spec, spec.description.output[0].name, "z", rename_inputs=False)
    second = ct.models.MLModel(spec, weights_dir=second_spec.weights_dir, skip_model_load=True)
    source, out = tmp_path / "source.mlpackage", tmp_path / "out.mlpackage"
    ct.utils.make_pipeline(first, second).save(str(source))
    files = sorted(path.name for path in source.rglob("*.bin"))
    assert len(files) == 2
    report = milpress.compress(source, out, milpress.Recipe.of(f.QuantizeConfig()))
    assert len(report.with_status("compressed")) == 2
    assert sorted(path.name for path in out.rglob("*.bin")) == files
    milpress.verify(source, out)


def test_bytes_are_the_same_on_any_number_of_threads(crepe_tiny, tmp_path):
    for treatment in ("palette 4 group 16", "int4 block 32"):
        outputs = []
        for threads in (1, 2, 3):
            out = tmp_path / f"{threads}.mlpackage"
            recipe = milpress.Recipe.of(LATE[treatment], target="iOS18")
            milpress.compress(crepe_tiny, out, recipe, threads=threads, force=True)
            outputs.append([path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()])
        assert outputs[0] == outputs[1] == outputs[2]


def test_a_dry_run_tells_the_exact_size_and_writes_nothing(build, tmp_path):
    for treatment, target in [("palette 4", "iOS16"), ("sparse", "iOS18"), ("int8", "iOS16")]:
        source = build("layers", target)
        recipe = milpress.Recipe.of(EARLY[treatment])
        dry = milpress.compress(source, tmp_path / "out.mlpackage", recipe, dry_run=True)
        assert list(tmp_path.iterdir()) == []
        wet = milpress.compress(source, tmp_path / "out.mlpackage", recipe)
        assert dry.package_bytes_after == wet.package_bytes_after
        assert [w.bytes_after for w in dry.weights] == [w.bytes_after for w in wet.weights]
        shutil.rmtree(tmp_path / "out.mlpackage")


def test_a_weight_that_does_not_suit_is_left_and_named(build, tmp_path):
    report = milpress.compress(
        build("awkward", "iOS18"),
        tmp_path / "out.mlpackage",
        milpress.Recipe.of(LATE["palette 4 group 16"]),
    )
    left = {weight.name: weight.note for weight in report.with_status("left")}
    assert left["infinite_weight_0"] == "a weight must be finite, got inf at [4, 5]"
    assert len(report.asked) == len(left) + len(report.with_status("compressed"))


def test_a_weight_that_is_not_finite_is_left_with_its_position(build, tmp_path):
    for name in ("int8", "palette 4", "sparse"):
        out = tmp_path / f"{name}.mlpackage"
        recipe = milpress.Recipe.of(EARLY[name])
        report = milpress.compress(build("awkward", "iOS18"), out, recipe)
        (left,) = report.with_status("left")
        assert left.name == "infinite_weight_0"
        assert left.note == "a weight must be finite, got inf at [4, 5]"
        with pytest.raises(UnsupportedError, match=r"infinite_weight_0.*finite.*\[4, 5\]"):
            milpress.compress(
                build("awkward", "iOS18"), tmp_path / "strict", recipe, on_unsupported="error"
            )


def test_group_sizes_are_strict_when_asked(build, tmp_path):
    with pytest.raises(UnsupportedError, match="group size 10, as 16 does not divide 40"):
        milpress.compress(
            build("layers", "iOS18"),
            tmp_path / "out.mlpackage",
            milpress.Recipe.of(LATE["palette 4 group 16"]),
            on_unsupported="error",
        )
    assert list(tmp_path.iterdir()) == []


def test_compressing_nothing_is_an_error(crepe_tiny, tmp_path):
    with pytest.raises(
        UnsupportedError, match=r"no weight can be compressed \(none was selected\)"
    ):
        milpress.compress(
            crepe_tiny, tmp_path / "out", milpress.Recipe.of(f.QuantizeConfig(), min_size=10**9)
        )
    assert list(tmp_path.iterdir()) == []


def tampered(source: Path, out: Path, change: Any) -> Path:
    """Copy a compressed package and change its model in memory and its weights on disk."""
    shutil.copytree(source, out)
    package = Package(out)
    change(package)
    package.model_path.write_bytes(package.model.SerializeToString(deterministic=True))
    return out


def _flip(package: Package, parameter: str, byte: int = 0) -> None:
    (graph,) = package.graphs
    for node in graph.nodes:
        if node.op.type.startswith("constexpr_"):
            value = node.op.attributes[parameter]
            path = package.weight_path(value.blobFileValue.fileName)
            data = bytearray(path.read_bytes())
            data[value.blobFileValue.offset + 64 + byte] ^= 0x55
            path.write_bytes(data)
            return


def _flip_bias(package: Package) -> None:
    (graph,) = package.graphs
    node = next(n for n in graph.nodes if n.name.endswith("conv3_bias_to_fp16"))
    value = node.op.attributes["val"]
    path = package.weight_path(value.blobFileValue.fileName)
    data = bytearray(path.read_bytes())
    data[value.blobFileValue.offset + 64] ^= 1
    path.write_bytes(data)


def _rename_op(package: Package) -> None:
    (graph,) = package.graphs
    next(n for n in graph.nodes if n.op.type == "relu").op.type = "relu6"


def _rewire(package: Package) -> None:
    (graph,) = package.graphs
    convs = [n for n in graph.nodes if n.op.type == "conv"]
    three, four = (c.op.inputs["weight"].arguments[0] for c in convs[2:4])
    four.name = three.name


def _forget_weight(package: Package) -> None:
    metadata = package.model.description.metadata.userDefined
    record = json.loads(metadata[TREATMENTS])
    record["treatments"][0]["weights"].popitem()
    metadata[TREATMENTS] = json.dumps(record)


def _describe_otherwise(package: Package) -> None:
    package.model.specificationVersion += 1


@pytest.mark.parametrize(
    ("treatment", "change", "message"),
    [
        ("int8", lambda p: _flip(p, "quantized_data"), "more than half a step off"),
        ("int8", lambda p: _flip(p, "scale", 1), "more than half a step off"),
        ("palette 4", lambda p: _flip(p, "indices"), "don't name the nearest entry"),
        (
            "palette 4",
            lambda p: _flip(p, "lut", 1),
            "entries of a table do not ascend|nearest entry",
        ),
        ("sparse", lambda p: _flip(p, "nonzero_data"), "not pruned are changed"),
        ("int8", _flip_bias, "changed, though the record says"),
        ("int8", _rename_op, "the op relu changed"),
        ("int8", _rewire, "must have one counterpart|half a step"),
        ("int8", _forget_weight, "the record says nothing was done to it"),
        ("int8", _describe_otherwise, "the description of the model changed"),
    ],
)
def test_verify_finds_tampering(crepe_tiny, tmp_path, treatment, change, message):
    out = tmp_path / "out.mlpackage"
    milpress.compress(crepe_tiny, out, milpress.Recipe.of(EARLY[treatment]))
    bad = tampered(out, tmp_path / "bad.mlpackage", change)
    with pytest.raises(VerificationError, match=message):
        milpress.verify(crepe_tiny, bad)


@pytest.mark.parametrize("settings", [{}, {"group_size": 8}, {"group_size": 8, "channel_axis": 1}])
@pytest.mark.parametrize("parameter", ["indices", "lut"])
def test_verify_finds_vectors_at_other_than_a_nearest_entry(build, tmp_path, settings, parameter):
    source, out = build("shared"), tmp_path / "out.mlpackage"
    treatment = f.PalettizeConfig(bits=4, vector_size=2, **settings)
    milpress.compress(source, out, milpress.Recipe.of(treatment, name="both"))
    (check,) = milpress.verify(source, out).weights
    assert check.promise == "nearest"

    def change(package: Package) -> None:
        (graph,) = package.graphs
        node = next(n for n in graph.nodes if n.op.type == "constexpr_lut_to_dense")
        where = node.op.inputs[parameter].arguments[0].value.blobFileValue
        path = package.weight_path(where.fileName)
        data = bytearray(path.read_bytes())
        data[where.offset + 65] ^= 0x15
        path.write_bytes(data)

    bad = tampered(out, tmp_path / "bad.mlpackage", change)
    with pytest.raises(VerificationError, match="don't name the nearest vector of their table"):
        milpress.verify(source, bad)


def test_verify_reports_the_error_of_packages_without_a_record(crepe_tiny, tmp_path):
    out = tmp_path / "out.mlpackage"
    milpress.compress(crepe_tiny, out, milpress.Recipe.of(f.PalettizeConfig(bits=6)))
    bare = tampered(out, tmp_path / "bare.mlpackage", lambda p: forget(p.model, TREATMENTS))
    checks = milpress.verify(crepe_tiny, bare).weights
    assert {check.promise for check in checks} == {"none"}
    dense, after = decoded(crepe_tiny), decoded(bare)
    for check in checks:
        source = dense[check.name].astype(np.float64)
        noise = ((source - after[f"{check.name}_palettized"]) ** 2).sum()
        expected = 10 * np.log10((source**2).sum() / noise)
        # The sums of squares of float16 values are taken in float32 within a chunk of 1,024.
        assert check.snr_db == pytest.approx(expected, abs=1e-4)


def test_a_failed_verification_leaves_the_destination_as_it_was(crepe_tiny, tmp_path, monkeypatch):
    out = tmp_path / "out.mlpackage"
    milpress.compress(crepe_tiny, out, milpress.Recipe.of(f.PalettizeConfig(bits=6)))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def refuse(*_: Any) -> None:
        raise VerificationError("planted")

    monkeypatch.setattr("milpress.compression.packages.compare_packages", refuse)
    with pytest.raises(VerificationError, match="planted"):
        milpress.compress(crepe_tiny, out, milpress.Recipe.of(f.QuantizeConfig()), force=True)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert list(tmp_path.iterdir()) == [out]
