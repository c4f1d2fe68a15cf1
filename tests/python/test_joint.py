"""Joint compression: chains of constexpr ops, written, decoded by coremltools, verified."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
from coremltools.converters.mil.mil import Builder as mb  # noqa: N813
from coremltools.converters.mil.mil import types
from hypothesis import given
from hypothesis import strategies as st
from oracles import assert_coremltools_agrees, decoded, decompressed_by_coremltools, ops_of
from small_models import TARGETS, save, weight

import milpress
from milpress import formats as f
from milpress.errors import UnsupportedError, VerificationError
from milpress.mil.package import Package
from milpress.mil.records import TREATMENTS
from milpress.recipe import Recipe, Select, Step

PRUNE = f.PruneConfig(sparsity=0.5)
PALETTE = f.PalettizeConfig(bits=4)
GROUPS = f.PalettizeConfig(bits=3, group_size=8)
VECTORS = f.PalettizeConfig(bits=4, vector_size=2)
INT8 = f.QuantizeConfig()
LUT8 = f.QuantizeConfig(granularity=f.PerTensor())
LUT8_OFFSET = f.QuantizeConfig(dtype="uint8", offset=True, granularity=f.PerTensor())
INT4_BLOCKS = f.QuantizeConfig(dtype="int4", granularity=f.PerBlock(8), offset=True)

CHAINS = {
    "prune, palettize": ((PRUNE, PALETTE), ["lut_to_sparse", "sparse_to_dense"], "nearest"),
    "prune, groups": ((PRUNE, GROUPS), ["lut_to_sparse", "sparse_to_dense"], "nearest"),
    "prune, vectors": ((PRUNE, VECTORS), ["lut_to_sparse", "sparse_to_dense"], "none"),
    "prune, int8": (
        (PRUNE, INT8),
        ["sparse_blockwise_shift_scale", "sparse_to_dense"],
        "half_step",
    ),
    "prune, int4 blocks": (
        (PRUNE, INT4_BLOCKS),
        ["sparse_blockwise_shift_scale", "sparse_to_dense"],
        "half_step",
    ),
    "palettize, int8": ((PALETTE, LUT8), ["blockwise_shift_scale", "lut_to_dense"], "none"),
    "groups, uint8": ((GROUPS, LUT8_OFFSET), ["blockwise_shift_scale", "lut_to_dense"], "none"),
    "int8, palettize": ((INT8, PALETTE), ["blockwise_shift_scale", "lut_to_dense"], "none"),
    "prune, palettize, int8": (
        (PRUNE, PALETTE, LUT8),
        ["blockwise_shift_scale", "lut_to_sparse", "sparse_to_dense"],
        "none",
    ),
    "palettize, prune": ((PALETTE, PRUNE), ["lut_to_sparse", "sparse_to_dense"], "none"),
    "vectors, prune": ((VECTORS, PRUNE), ["lut_to_sparse", "sparse_to_dense"], "none"),
    "int8, prune": ((INT8, PRUNE), ["sparse_blockwise_shift_scale", "sparse_to_dense"], "none"),
}


def in_one(*steps) -> Recipe:
    return Recipe(steps=tuple(Step(treatment=treatment) for treatment in steps))


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("kind", ["layers", "shared", "nested"])
def test_a_chain_is_decoded_by_coremltools_and_keeps_its_promise(build, tmp_path, kind, chain):
    steps, kinds, promise = CHAINS[chain]
    source, out = build(kind), tmp_path / "out.mlpackage"
    report = milpress.compress(source, out, in_one(*steps))
    assert report.with_status("compressed")
    promises = {check.promise for check in milpress.verify(source, out).weights}
    # Where vectors don't divide the channels, a weight is pruned only.
    assert promises - ({"pruned"} if "vectors" in chain else set()) == {promise}
    assert_coremltools_agrees(out, decompressed_by_coremltools)
    if kind == "layers":
        chains = [op for op, *_ in ops_of(out) if op.startswith("constexpr_")]
        assert chains[: len(kinds)] == [f"constexpr_{name}" for name in kinds]


@pytest.mark.parametrize("chain", CHAINS)
def test_a_chain_made_in_several_runs_equals_one_made_at_once(build, tmp_path, chain):
    steps, _, _ = CHAINS[chain]
    source, once = build("layers"), tmp_path / "once.mlpackage"
    milpress.compress(source, once, in_one(*steps))
    current = source
    for i, treatment in enumerate(steps):
        step = tmp_path / f"{i}.mlpackage"
        milpress.compress(current, step, Recipe.of(treatment))
        current = step
    milpress.verify(source, current)
    ours, theirs = decoded(once), decoded(current)
    assert set(ours) == set(theirs)
    for name, values in ours.items():
        np.testing.assert_array_equal(values, theirs[name], err_msg=name)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((PRUNE, PRUNE), "pruned weight can't be pruned again"),
        ((PALETTE, PALETTE), "palette can't be palettized again"),
        ((INT8, INT8), "quantized weight can't be quantized again"),
        ((PALETTE, INT8), "tables of a palette must be quantized to 8 bits per tensor"),
        ((PALETTE, LUT8, LUT8), "a table can't be quantized again"),
        ((PRUNE, INT8, PALETTE), "a pruned weight with codes can't be palettized again"),
    ],
)
def test_what_has_no_form_in_core_ml_is_refused(steps, message):
    value = np.linspace(-1, 1, 4096).astype(np.float16).reshape(64, 64)
    *first, last = steps
    for treatment in first:
        value = f.compress(value, treatment)
    with pytest.raises(UnsupportedError, match=message):
        f.compress(value, last)


def test_joint_compression_takes_ios18(build, tmp_path):
    with pytest.raises(UnsupportedError, match="joint compression must be stored in an iOS18"):
        milpress.compress(build("layers", "iOS16"), tmp_path / "out", in_one(PRUNE, PALETTE))
    assert list(tmp_path.iterdir()) == []


@given(seed=st.integers(0, 1000), bits=st.sampled_from([1, 2, 3, 4]))
def test_zeros_have_no_influence_on_the_table_of_a_pruned_weight(seed, bits):
    weight = np.random.default_rng(seed).standard_normal((8, 16)).astype(np.float16)
    sparse = f.sparsify(weight, PRUNE)
    value = f.compress(sparse, f.PalettizeConfig(bits=bits))
    alone = f.palettize(sparse.nonzeros, f.PalettizeConfig(bits=bits))
    np.testing.assert_array_equal(value.value.lut.reshape(-1), alone.lut.reshape(-1))
    np.testing.assert_array_equal(value.dense()[sparse.mask()], alone.dense())
    assert not value.dense()[~sparse.mask()].any()


def test_a_vector_is_kept_if_any_of_its_weights_is():
    weight = np.zeros((4, 32), np.float16)
    weight[0] = np.arange(32)
    sparse = f.sparsify(weight, f.PruneConfig(threshold=0.0))
    value = f.compress(sparse, f.PalettizeConfig(bits=4, vector_size=2))
    expected = np.repeat((weight.reshape(2, 2, 32) != 0).any(axis=1), 2, axis=0)
    np.testing.assert_array_equal(value.mask(), expected)


def test_results_are_named_as_coremltools_names_them(build, tmp_path):
    names = {
        "prune, palettize": "conv_weight_0_sparsified",
        "palettize, int8": "conv_weight_0_palettized",
        "int8, palettize": "conv_weight_0_quantized",
        "int8, prune": "conv_weight_0_quantized_sparsified",
    }
    for chain, name in names.items():
        current = build("layers")
        for i, treatment in enumerate(CHAINS[chain][0]):
            step = tmp_path / f"{chain}{i}.mlpackage"
            milpress.compress(current, step, Recipe.of(treatment))
            current = step
        assert name in decoded(current)


def test_a_weight_of_just_the_least_size_is_taken(build, tmp_path):
    size = 64 * 48 * 9  # of the first convolution, which is the largest
    for least, n in ((size, 1), (size + 1, 0)):
        recipe = Recipe.of(PALETTE, name="conv_weight_0", min_size=least)
        if n:
            report = milpress.compress(build("layers"), tmp_path / "out", recipe)
            assert len(report.with_status("compressed")) == n
        else:
            with pytest.raises(UnsupportedError, match="no weight can be compressed"):
                milpress.compress(build("layers"), tmp_path / "none", recipe)


@pytest.mark.parametrize("chain", ["palettize, int8", "prune, palettize, int8", "prune, int8"])
def test_a_byte_changed_in_any_op_of_a_chain_that_was_not_treated_is_found(build, tmp_path, chain):
    out = tmp_path / "out.mlpackage"
    milpress.compress(build("layers"), out, in_one(*CHAINS[chain][0]))
    package = Package(out)
    (graph,) = package.graphs
    ops = [node.op for node in graph.nodes if node.op.type.startswith("constexpr_")]
    places = [
        binding.value.blobFileValue.offset
        for op in ops[: len(CHAINS[chain][1])]
        for argument in op.inputs.values()
        for binding in argument.arguments
        if binding.value.HasField("blobFileValue")
    ]
    assert len(places) >= 2
    for place in sorted(set(places)):
        bad = tmp_path / f"{place}.mlpackage"
        shutil.copytree(out, bad)
        path = bad / "Data/com.apple.CoreML/weights/weight.bin"
        data = bytearray(path.read_bytes())
        data[place + 64] ^= 1
        path.write_bytes(data)
        with pytest.raises(VerificationError, match="changed, though the record says"):
            milpress.verify(out, bad)


TAKEN = ("w_sparsified", "w_sparsified_0", "w_sparsified_1_nonzero_data_0_palettized")


def with_weights(path: Path, *names: str) -> Path:
    """Save a model of linear layers whose weights have these names."""

    @mb.program(
        input_specs=[mb.TensorSpec(shape=(1, 64), dtype=types.fp16)], opset_version=TARGETS["iOS18"]
    )
    def prog(x: Any) -> Any:
        for i, name in enumerate(names):
            x = mb.linear(x=x, weight=mb.const(val=weight(64, 64, seed=i), name=name))
        return x

    return save(prog, path, "iOS18")


@pytest.mark.parametrize("is_second", [False, True])
def test_a_name_that_is_taken_gets_a_number(tmp_path, is_second):
    source, out = tmp_path / "source.mlpackage", tmp_path / "out.mlpackage"
    crowded = with_weights(tmp_path / "crowded.mlpackage", "w", *TAKEN)
    if is_second:  # it shares what was made for the first function, under other names
        alone = with_weights(tmp_path / "alone.mlpackage", "w")
        description = ct.utils.MultiFunctionDescriptor()
        description.add_function(str(alone), "main", "a")
        description.add_function(str(crowded), "main", "b")
        description.default_function_name = "a"
        ct.utils.save_multifunction(description, str(source))
    else:
        source = crowded
    only = Select(name="re:(./)?w")
    recipe = Recipe(
        steps=tuple(Step(treatment=treatment, select=only) for treatment in (PRUNE, PALETTE))
    )
    report = milpress.compress(source, out, recipe)
    assert len(report.with_status("compressed")) == 1 + is_second
    graph = Package(out).graphs[-1]
    names = [output.name for node in graph.nodes for output in node.op.outputs]
    assert len(set(names)) == len(names)
    inner = f"{TAKEN[-1]}_0"
    assert {*TAKEN, "w_sparsified_1", f"{inner}_0", f"{inner}_1"} <= set(names)
    before, after = decoded(source), decoded(out)
    for name in TAKEN:
        full_name = f"{graph.prefix}{name}"
        np.testing.assert_array_equal(after[full_name], before[full_name])


@pytest.mark.parametrize("coding", [PALETTE, INT8])
def test_verify_finds_a_chain_that_did_not_prune_the_least_magnitudes(build, tmp_path, coding):
    source, out = build("shared"), tmp_path / "out.mlpackage"
    milpress.compress(source, out, in_one(f.PruneConfig(n_m=(2, 4)), coding))
    package = Package(out)
    metadata = package.model.description.metadata.userDefined
    record = json.loads(metadata[TREATMENTS])
    for item in record["treatments"]:
        assert item["steps"][0] == {"prune": {"n_m": [2, 4]}}
        item["steps"][0] = {"prune": {"sparsity": 0.5}}  # just as many, but others
    metadata[TREATMENTS] = json.dumps(record)
    package.model_path.write_bytes(package.model.SerializeToString())
    with pytest.raises(VerificationError, match=r"both: .* was pruned, .* was not"):
        milpress.verify(source, out)
