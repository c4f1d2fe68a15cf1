"""Packages that were tampered with, each of which verification refuses in its words."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import coremltools as ct
import coremltools.optimize.coreml as cto
import numpy as np
import pytest
from tampering import Edited, refused, use

import milpress
from milpress import formats as f
from milpress.compression.verification import compare_packages
from milpress.errors import PackageError, VerificationError
from milpress.formats import sparse
from milpress.mil import dtypes, values
from milpress.mil.package import Package
from milpress.mil.records import TREATMENTS, forget
from milpress.mil.values import blob_values
from milpress.recipe import Recipe, Step

# Pruning

STRUCTURES = {
    "runs": f.PruneConfig(n_m=(2, 4)),
    "runs of outputs": f.PruneConfig(n_m=(1, 3), axis=0),
    "blocks": f.PruneConfig(sparsity=0.5, block_size=2),
    "blocks of inputs": f.PruneConfig(sparsity=0.5, block_size=4, axis=1),
    "sparsity": f.PruneConfig(sparsity=0.5),
    "threshold": f.PruneConfig(threshold=0.05),
}


def keep_nothing(array: np.ndarray, *_: Any) -> np.ndarray:
    return np.zeros((array.size + 7) // 8, np.uint8)


def keep_the_first(array: np.ndarray, *_: Any) -> np.ndarray:
    """Keep two of four, whatever they are."""
    mask = np.resize(np.uint8([1, 1, 0, 0]), array.size) & (array.reshape(-1) != 0)
    return np.packbits(mask, bitorder="little")


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("kernel", [keep_nothing, keep_the_first])
def test_what_a_broken_kernel_pruned_does_not_verify(
    structure, kernel, build, tmp_path, monkeypatch
):
    source, recipe = build("layers"), Recipe.of(STRUCTURES[structure], name="glob:*lin*")
    milpress.compress(source, tmp_path / "right.mlpackage", recipe)
    (check,) = milpress.verify(source, tmp_path / "right.mlpackage").weights
    assert check.promise == "pruned"
    monkeypatch.setattr(sparse, "bitmask_of", kernel)
    with pytest.raises(VerificationError, match=r"linear_weight_0: .*(zero|pruned)"):
        milpress.compress(source, tmp_path / "out.mlpackage", recipe)
    assert not (tmp_path / "out.mlpackage").exists()


def edited(package: Path, change: Callable[[Package], Any]) -> Package:
    """Return a package whose model was changed in memory."""
    changed = Package(package)
    change(changed)
    return Package(package, model_bytes=changed.model.SerializeToString(deterministic=True))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_without_a_record_is_known_that_the_rest_of_a_pruned_weight_is_as_it_was(
    structure, build, tmp_path
):
    source, out = build("shared"), tmp_path / "out.mlpackage"
    milpress.compress(source, out, Recipe.of(STRUCTURES[structure]))
    bare = edited(out, lambda package: forget(package.model, TREATMENTS))
    checks = compare_packages(Package(source), bare).weights
    assert {check.promise for check in checks} == {"pruned"}


THEIRS = {
    "sparsity": cto.OpMagnitudePrunerConfig(target_sparsity=0.5),
    "runs": cto.OpMagnitudePrunerConfig(n_m_ratio=(2, 4)),
    "blocks": cto.OpMagnitudePrunerConfig(target_sparsity=0.5, block_size=2),
    "threshold": cto.OpThresholdPrunerConfig(threshold=0.05, minimum_sparsity_percentile=0.0),
}


@pytest.mark.parametrize("kind", THEIRS)
@pytest.mark.parametrize(
    ("coding", "promise"),
    [(f.PalettizeConfig(bits=4), "nearest"), (f.QuantizeConfig(), "half_step")],
)
def test_codes_of_what_coremltools_pruned_are_held_to_what_is_promised(
    kind, coding, promise, build, tmp_path
):
    source, out = tmp_path / "theirs.mlpackage", tmp_path / "out.mlpackage"
    model = ct.models.MLModel(str(build("shared")), skip_model_load=True)
    cto.prune_weights(model, cto.OptimizationConfig(THEIRS[kind])).save(str(source))
    milpress.compress(source, out, Recipe.of(coding))
    assert {check.promise for check in milpress.verify(source, out).weights} == {promise}


# What else may not differ

INT8 = f.QuantizeConfig()
PALETTE = f.PalettizeConfig(bits=4)
PRUNE = f.PruneConfig(sparsity=0.5)


def rename_outer(e: Edited) -> None:
    """Let one of two layers that shared a weight use another one."""
    use(e.op("second"), "weight").name = "torn"


def use_one_for_two(e: Edited) -> None:
    """Let a layer use a weight that stands for another one."""
    use(e.op("third"), "weight").name = "both_quantized"
    use(e.op("fourth"), "y").name = "both_quantized"


def rewire(e: Edited) -> None:
    use(e.op("third"), "x").name = "first"


def compute_the_weight(e: Edited) -> None:
    use(e.op("second"), "weight").name = "first"


def another_kind_of_op(e: Edited) -> None:
    e.op("fourth").type = "add"


def another_type_of_result(e: Edited) -> None:
    e.op("third").outputs[0].type.tensorType.dataType = 11


def a_parameter_less(e: Edited) -> None:
    del e.op("third").inputs["bias"]


def an_attribute_more(e: Edited) -> None:
    e.op("third").attributes["more"].CopyFrom(values.string("more"))


def an_attribute_less(e: Edited) -> None:
    del e.op("third").attributes["name"]


def another_attribute(e: Edited) -> None:
    e.op("third").attributes["name"].CopyFrom(values.string("3"))


def a_value_in_place_of_a_name(e: Edited) -> None:
    binding = use(e.op("fourth"), "transpose_x")
    stored = e.op("fourth_transpose_x_0").attributes["val"]
    binding.value.CopyFrom(stored)


def an_argument_more(e: Edited) -> None:
    e.op("third").inputs["x"].arguments.add().name = "x"


def other_numbers(e: Edited) -> None:
    """Let a bias have the numbers of scales, of which there are as many."""
    scales = use(e.op("both_quantized"), "scale").value.blobFileValue
    e.op("third_bias_0").attributes["val"].blobFileValue.offset = scales.offset


def another_shape_of_the_value(e: Edited) -> None:
    """Give the same bytes another shape; what the op says it makes stays."""
    values.set_type(e.op("torn").attributes["val"].type, dtypes.by_name("float16"), (4096,))


def another_flag(e: Edited) -> None:
    tensor = e.op("fourth_transpose_x_0").attributes["val"].immediateValue.tensor
    tensor.bools.values[0] = not tensor.bools.values[0]


def another_name(e: Edited) -> None:
    e.op("third_bias_0").outputs[0].name = "renamed"
    use(e.op("third"), "bias").name = "renamed"


def another_declared_type(e: Edited) -> None:
    e.op("third_bias_0").outputs[0].type.tensorType.dataType = 22


def an_op_less(e: Edited) -> None:
    """Take out the last op, and return what it took."""
    e.block.operations.remove(e.op("fourth"))
    e.block.outputs[0] = "third"


def an_output_more(e: Edited) -> None:
    e.block.outputs.append("first")


def another_output(e: Edited) -> None:
    e.block.outputs[0] = "third"


def a_stored_output(e: Edited) -> None:
    e.block.outputs[0] = "torn"


def a_value_more(e: Edited) -> None:
    more = e.block.operations.add()
    more.CopyFrom(e.op("third_bias_0"))
    more.outputs[0].name = "more"


def another_decoded_type(e: Edited) -> None:
    e.op("both_quantized").outputs[0].type.tensorType.dataType = 11


def without_its_record(e: Edited) -> None:
    e.record(lambda data: data["treatments"][0]["weights"].pop("both"))
    e.record(lambda data: data["treatments"][0]["weights"].update(more="more_quantized"))


def a_record_more(e: Edited) -> None:
    e.record(lambda data: data["treatments"][0]["weights"].update(torn="torn_quantized"))


def a_bias_more(e: Edited) -> None:
    e.record(lambda data: data.update(biases={"nowhere": "0" * 32}))


def another_description(e: Edited) -> None:
    e.model.description.metadata.userDefined["author"] = "another"


def another_function(e: Edited) -> None:
    functions = e.model.mlProgram.functions
    functions["other"].CopyFrom(functions["main"])
    del functions["main"]


UNTREATED = "changed, though the record says nothing was done to it"
CHANGES: list[tuple[Callable[[Edited], None], str]] = [
    (rename_outer, "^second: both must have one counterpart, got torn as another"),
    (use_one_for_two, "^third: torn must have one counterpart, got both_quantized as another"),
    (rewire, "^third must use second, got first"),
    (compute_the_weight, "^second must use both, got first"),
    (another_kind_of_op, "^fourth: the op matmul changed"),
    (another_type_of_result, "^third: the op linear changed"),
    (a_parameter_less, "^third: the op linear changed"),
    (an_attribute_more, "^third: the attribute more must be unchanged"),
    (an_attribute_less, "^third: the attribute name must be unchanged"),
    (another_attribute, f"^third: {UNTREATED}"),
    (a_value_in_place_of_a_name, "^fourth: transpose_x must be given in the same way"),
    (an_argument_more, "equally many values of x, got 1 and 2"),
    (another_flag, f"^fourth_transpose_x_0: {UNTREATED}"),
    (another_name, f"^third_bias_0: {UNTREATED}"),
    (another_declared_type, f"^third_bias_0: {UNTREATED}"),
    (other_numbers, f"^third_bias_0: {UNTREATED}"),
    (another_shape_of_the_value, f"^torn: {UNTREATED}"),
    (an_op_less, "a block's output must use fourth, got third"),
    (an_output_more, "equally many outputs of a block, got 1 and 2"),
    (another_output, "a block's output must use fourth, got third"),
    (a_stored_output, "a block's output must use fourth, got torn"),
    (a_value_more, "^more: added, though the source has no such value"),
    (another_decoded_type, r"^both: the decoded weight must be .*float16.*, got .*float32"),
    (without_its_record, "^both: changed, though the record says nothing was done to it"),
    (a_record_more, "^torn: unchanged, though the record says it was compressed"),
    (a_bias_more, "^1 layers must have a corrected bias as recorded, got 0"),
    (another_description, "the description of the model changed"),
    (another_function, "the packages differ in their models or functions"),
]


@pytest.mark.parametrize(
    ("change", "message"), CHANGES, ids=[change.__name__ for change, _ in CHANGES]
)
def test_what_was_changed_besides_is_refused(change, message, made):
    source, out = made("shared", INT8)
    compare_packages(Package(source), Package(out))
    tampered = Edited(out)
    change(tampered)
    refused(source, tampered.reopened(), message)


def test_a_value_of_another_type_with_the_same_bytes_is_refused(made, tmp_path):
    source, out = made("shared", INT8)
    shutil.copytree(out, tmp_path / "out.mlpackage")
    tampered = Edited(tmp_path / "out.mlpackage")
    value = tampered.op("torn").attributes["val"]
    path = tampered.package.weight_path(value.blobFileValue.fileName)
    data = bytearray(path.read_bytes())
    assert data[value.blobFileValue.offset + 4] == dtypes.by_name("float16").blob
    data[value.blobFileValue.offset + 4] = dtypes.by_name("int16").blob
    path.write_bytes(data)
    value.type.tensorType.dataType = dtypes.by_name("int16").mil
    refused(source, tampered.reopened(), f"^torn: {UNTREATED}")


def test_a_value_that_nothing_uses_is_kept(made):
    source, out = made("shared", INT8)
    more = Edited(source)
    a_value_more(more)
    refused(more.reopened(), Package(out), "^more: missing in the compressed package")
    both = Edited(out)
    a_value_more(both)
    assert compare_packages(more.reopened(), both.reopened())


def a_block_more(e: Edited) -> None:
    conditional = e.op("cond_0")
    conditional.blocks.add().CopyFrom(conditional.blocks[0])
    del conditional.blocks[-1].operations[:]
    conditional.blocks[-1].outputs[0] = "before"


def an_op_less_in_a_block(e: Edited) -> None:
    (inner,) = (block for block in e.op("cond_0").blocks if "again" in block.outputs)
    inner.operations.remove(e.op("again"))
    inner.outputs[0] = "before"


def an_op_more(e: Edited) -> None:
    more = e.block.operations.add()
    more.CopyFrom(e.op("squeeze_0"))
    more.outputs[0].name = "more"


def an_attribute_of_a_block(e: Edited) -> None:
    e.op("cond_0").blocks[0].attributes["more"].CopyFrom(values.string("more"))


def an_input_of_a_block(e: Edited) -> None:
    item = e.op("cond_0").blocks[1].inputs.add(name="more")
    values.set_type(item.type, dtypes.by_name("float16"), (1,))


def other_branches(e: Edited) -> None:
    conditional = e.op("cond_0")
    blocks = [type(block).FromString(block.SerializeToString()) for block in conditional.blocks]
    del conditional.blocks[:]
    conditional.blocks.extend(blocks[::-1])


BLOCKS: list[tuple[Callable[[Edited], None], str]] = [
    (a_block_more, "equally many blocks, got 3 and 4"),
    (an_op_more, "equally many ops, got 6 and 7"),
    (an_op_less_in_a_block, "a block's output must use again, got before"),
    (an_attribute_of_a_block, "the inputs or attributes of a block changed"),
    (an_input_of_a_block, "the inputs or attributes of a block changed"),
    (other_branches, "a block's output must use again, got linear_0"),
]


@pytest.mark.parametrize(("change", "message"), BLOCKS, ids=[c.__name__ for c, _ in BLOCKS])
def test_what_was_changed_in_a_block_is_refused(change, message, made):
    source, out = made("nested", INT8)
    compare_packages(Package(source), Package(out))
    tampered = Edited(out)
    change(tampered)
    refused(source, tampered.reopened(), message)


def test_a_stored_value_in_a_block_does_not_hide_one_around_it(made):
    source, out = made("nested", INT8)
    for path, names in (
        (source, ("inner", "outer")),
        (out, ("inner_quantized", "outer_quantized")),
    ):
        tampered = Edited(path)
        inner, outer = names
        tampered.op(inner).outputs[0].name = outer
        use(tampered.op("linear_0"), "weight").name = outer
        hiding = tampered.reopened()
        with pytest.raises(PackageError, match=f"a name must be defined once, got '{outer}' again"):
            compare_packages(Package(source), hiding)


# Weights that had been compressed before


def test_a_part_more_of_an_untreated_chain_is_refused(made):
    _, out = made("shared", PRUNE, PALETTE)
    tampered = Edited(out)
    offset = tampered.block.operations.add()
    offset.CopyFrom(tampered.op("third_bias_0"))
    offset.outputs[0].name = "more"
    tampered.block.operations.remove(offset)
    tampered.block.operations.insert(0, offset)
    tampered.op("both_sparsified").inputs["more"].arguments.add().name = "more"
    refused(out, tampered.reopened(), "equally many parts of both_sparsified, got 2 and 3")


def test_an_untreated_op_of_another_kind_that_decodes_to_the_same_is_refused(made):
    _, out = made("shared", INT8)
    tampered = Edited(out)
    tampered.op("both_quantized").type = "constexpr_lut_to_dense"
    refused(out, tampered.reopened(), f"^both_quantized: {UNTREATED}")


def test_a_record_goes_on_where_that_of_the_source_ends(made, tmp_path):
    _, first = made("shared", PRUNE)
    second = tmp_path / "second.mlpackage"
    milpress.compress(first, second, Recipe.of(PALETTE))
    milpress.verify(first, second)
    tampered = Edited(second)
    tampered.record(lambda data: data["treatments"][0]["steps"].pop(0))
    refused(first, tampered.reopened(), "^both_sparsified: its record does not continue the record")


def test_a_chain_with_two_masks_is_not_what_is_recorded(made):
    source, out = made("shared", PRUNE, INT8)
    tampered = Edited(out)
    last = tampered.op("both_sparsified")
    mask = use(last, "mask").value
    payload = bytearray(values.read_payload(mask, tampered.package).tobytes())
    # One weight more, and one less.
    first, second = payload.index(0xFF), payload.index(0)
    payload[first], payload[second] = payload[second], payload[first]
    mask.ClearField("blobFileValue")
    mask.immediateValue.tensor.bytes.values = bytes(payload)
    message = "^both: the weight must be compressed as recorded, got constexpr_sparse_to_dense"
    refused(source, tampered.reopened(), message)


@pytest.mark.parametrize("coding", [PALETTE, INT8])
def test_a_mask_of_a_chain_is_stored_once(coding, build, tmp_path):
    out = tmp_path / "out.mlpackage"
    recipe = Recipe(steps=(Step(treatment=PRUNE), Step(treatment=coding)))
    report = milpress.compress(build("shared"), out, recipe)
    package = Package(out)
    (graph,) = package.graphs
    (weight,) = (each for each in graph.weights if each.name == "both_sparsified")
    decoder = graph.decoder
    places = {
        (stored.blobFileValue.offset, values.stored_type(stored).dtype.name)
        for node in (weight.node, *decoder.parts(weight.node))
        for stored in blob_values(node.op)
    }
    assert [name for _, name in places].count("uint1") == 1
    (found,) = (each for each in report.weights if each.name == "both")
    stored = decoder.stored_values(weight.node)
    assert found.bytes_after == sum(values.n_stored_bytes(value) for value in stored)


def scales_of_another_type(e: Edited) -> None:
    """Decode to another type than what the op says that it makes."""
    stored = use(e.op("both_quantized"), "scale").value
    numbers = values.read(stored, e.package).values.astype(np.float32)
    stored.CopyFrom(values.immediate(numbers))


@pytest.mark.parametrize("is_recorded", [True, False])
def test_a_weight_that_decodes_to_another_type_than_its_source_is_refused(is_recorded, made):
    source, out = made("shared", INT8)
    tampered = Edited(out)
    scales_of_another_type(tampered)
    if not is_recorded:
        forget(tampered.model, TREATMENTS)
    message = "^both: it must be decoded as float16.*, got float32"
    refused(source, tampered.reopened(), message)


def test_what_was_decompressed_is_equal(made, tmp_path):
    _, out = made("shared", INT8)
    dense = tmp_path / "dense.mlpackage"
    milpress.decompress(out, dense)
    milpress.verify(out, dense)
    tampered = Edited(dense)
    offset = tampered.op("torn").attributes["val"].blobFileValue.offset
    tampered.op("both_quantized").attributes["val"].blobFileValue.offset = offset
    message = "^both_quantized: the decompressed weight differs from what the source"
    refused(out, tampered.reopened(), message)
