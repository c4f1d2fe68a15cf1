"""Metadata of weights: against coremltools' own, and read only when it is looked at."""

from __future__ import annotations

import copy
import gc
import pickle
import shutil
import subprocess
import sys
import time
from dataclasses import FrozenInstanceError
from typing import Any

import coremltools as ct
import coremltools.optimize.coreml as cto
import numpy as np
import pytest
from coremltools.converters.mil.mil import Builder as mb  # noqa: N813
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

import milpress
from milpress import formats as f
from milpress.coreml.metadata import (
    CoreMLOpMetaData,
    CoreMLWeightMetaData,
    get_weights_metadata,
)
from milpress.errors import (
    ConfigTypeError,
    PackageNotFoundError,
    UnsupportedError,
)
from milpress.mil import dtypes, values
from milpress.mil.decode import Decoder
from milpress.mil.package import Package


def convert(program: Any, target: Any = ct.target.iOS18) -> Any:
    """Convert a MIL program without changing its graph."""
    return ct.convert(
        program,
        minimum_deployment_target=target,
        compute_precision=ct.precision.FLOAT32,
        pass_pipeline=ct.PassPipeline.EMPTY,
        skip_model_load=True,
    )


def inputs(*shape: int, n: int = 1, target: Any = ct.target.iOS18) -> Any:
    return mb.program(input_specs=[mb.TensorSpec(shape=shape)] * n, opset_version=target)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def assert_same(ours: Any, theirs: Any) -> None:
    assert list(ours) == list(theirs)
    for name, their in theirs.items():
        our = ours[name]
        assert our.val.dtype == their.val.dtype, name
        assert our.val.shape == their.val.shape, name
        assert our.val.tobytes() == np.ascontiguousarray(their.val).tobytes(), name
        assert our.val.flags.writeable
        assert our.sparsity == their.sparsity, name
        assert type(our.sparsity) is float
        assert our.unique_values == their.unique_values, name
        assert type(our.unique_values) is int
        assert len(our.child_ops) == len(their.child_ops)
        for our_op, their_op in zip(our.child_ops, their.child_ops, strict=True):
            assert (our_op.op_type, our_op.name) == (their_op.op_type, their_op.name)
            # The order of parameters is arbitrary in coremltools.
            assert our_op.params_name_mapping == dict(their_op.params_name_mapping)
            if len(our_op.params_name_mapping) < 2:
                assert str(our_op) == str(their_op)
        if all(len(op.params_name_mapping) < 2 for op in our.child_ops):
            assert str(our) == str(their)


@pytest.mark.parametrize("threshold", [1, 100, 2048, 10**5])
@pytest.mark.parametrize("model", ["crepe_tiny", "basic_pitch"])
def test_real_models_give_what_coremltools_gives(request, model, threshold):
    source = request.getfixturevalue(model)
    mlmodel = ct.models.MLModel(str(source), skip_model_load=True)
    theirs = cto.get_weights_metadata(mlmodel, weight_threshold=threshold)
    assert_same(get_weights_metadata(mlmodel, weight_threshold=threshold), theirs)
    assert_same(get_weights_metadata(source, threshold), theirs)


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("target", ["iOS15", "iOS18"])
@pytest.mark.parametrize("kind", ["layers", "shared", "lookup", "nested", "recurrent", "awkward"])
def test_every_kind_of_layer_gives_what_coremltools_gives(build, kind, target, dtype):
    if kind == "recurrent" and target == "iOS15":
        dtype = "fp32"  # lstm takes float16 from iOS17 on
    mlmodel = ct.models.MLModel(str(build(kind, target, dtype)), skip_model_load=True)
    for threshold in (1, 2048):
        theirs = cto.get_weights_metadata(mlmodel, threshold)
        assert_same(get_weights_metadata(mlmodel, threshold), theirs)


def test_the_threshold_is_the_smallest_size_listed():
    @inputs(2, 64)
    def prog(x: Any) -> Any:
        return mb.add(x=x, y=mb.const(val=random(2, 64), name="w"))

    mlmodel = convert(prog)
    assert list(get_weights_metadata(mlmodel, 128)) == ["w"]
    assert list(get_weights_metadata(mlmodel, 129)) == []


def test_weights_are_called_as_their_ops_not_as_their_values():
    @inputs(1, 30, 10, 10)
    def prog(x: Any) -> Any:
        weight = mb.const(val=random(1, 30, 10, 10), name="w_1")
        weight.name = "w_1_new"
        return mb.add(x=x, y=weight, name="add_1")

    mlmodel = convert(prog)
    found = get_weights_metadata(mlmodel, weight_threshold=100)
    assert found["w_1"].child_ops[0].params_name_mapping == {"y": "w_1"}
    assert_same(found, cto.get_weights_metadata(mlmodel, weight_threshold=100))


def test_every_kind_of_constant_counts():
    @inputs(4, 600)
    def prog(x: Any) -> Any:
        rng = np.random.default_rng(0)
        weight = mb.const(val=random(4, 600), name="weight")
        mask = mb.const(val=rng.random((4, 600)) > 0.5, name="mask")
        index = mb.const(val=rng.integers(0, 3, (4, 600)).astype(np.int32), name="index")
        small = mb.const(val=rng.integers(-9, 9, (4, 600)).astype(np.int8), name="small")
        returned = mb.const(val=random(4, 600, seed=1), name="returned")
        mb.const(val=random(4, 600, seed=2), name="unused")
        picked = mb.select(cond=mask, a=x, b=weight, name="picked")
        gathered = mb.gather_along_axis(
            x=x, indices=index, axis=0, name="gathered", validate_indices=False
        )
        return picked, gathered, mb.cast(x=small, dtype="fp32", name="cast"), returned

    mlmodel = convert(prog)
    found = get_weights_metadata(mlmodel)
    assert list(found) == ["weight", "mask", "index", "small", "returned", "unused"]
    assert_same(found, cto.get_weights_metadata(mlmodel))


def test_constants_stored_in_the_model_itself_count(build, tmp_path):
    copied = tmp_path / "immediate.mlpackage"
    shutil.copytree(build("layers", "iOS18"), copied)
    package = Package(copied)
    for graph in package.graphs:
        decoder = graph.decoder
        for node in graph.nodes:
            if node.op.type == "const" and values.is_blob(node.op.attributes["val"]):
                tensor = decoder.dense(node)
                values.write(node.op.attributes["val"], tensor, file_name=None, sink=None)
    package.model_path.write_bytes(package.model.SerializeToString())
    mlmodel = ct.models.MLModel(str(copied), skip_model_load=True)
    found = get_weights_metadata(mlmodel)
    assert_same(found, cto.get_weights_metadata(mlmodel))
    assert found == get_weights_metadata(build("layers", "iOS18"))


def test_ops_that_take_lists_and_loops_are_listed_in_the_order_they_are_defined():
    # coremltools fails here: 'list' object has no attribute 'val'.
    @inputs(4, 600)
    def prog(x: Any) -> Any:
        weight = mb.const(val=random(4, 600), name="weight")
        other = mb.const(val=random(4, 600, seed=1), name="other")

        def cond(i: Any, j: Any) -> Any:
            return mb.less(x=mb.reduce_sum(x=i), y=3.0)

        def body(i: Any, j: Any) -> Any:
            inner = mb.const(val=random(4, 600, seed=2), name="inner")
            return mb.add(x=i, y=weight, name="in_loop"), mb.add(x=j, y=inner, name="with_inner")

        first, second = mb.while_loop(_cond=cond, _body=body, loop_vars=(x, weight), name="loop")
        joined = mb.concat(values=(other, second, weight), axis=0, name="joined")
        return first, joined

    found = get_weights_metadata(convert(prog))
    assert list(found) == ["inner", "weight", "other"]
    in_loop, loop, joined = found["weight"].child_ops
    assert in_loop == CoreMLOpMetaData("add", "in_loop", {"y": "weight"})
    assert (loop.op_type, loop.params_name_mapping) == ("while_loop", {"loop_vars[1]": "weight"})
    assert joined == CoreMLOpMetaData(
        "concat", "joined", {"values[2]": "weight", "values[0]": "other"}
    )
    assert str(joined) == "concat(name=joined, values[2]=weight, values[0]=other, ...)"


def test_ops_of_one_name_are_told_apart(build, tmp_path):
    copied = tmp_path / "copied.mlpackage"
    shutil.copytree(build("layers", "iOS18"), copied)
    package = Package(copied)
    (graph,) = package.graphs
    names = ("conv_weight_0", "depthwise_weight_0")
    for node in graph.nodes:
        if node.name in names:
            node.op.attributes["name"].CopyFrom(values.string("same"))
    package.model_path.write_bytes(package.model.SerializeToString())
    found, before = get_weights_metadata(copied), get_weights_metadata(build("layers", "iOS18"))
    assert found["same"].val.tobytes() == before[names[0]].val.tobytes()
    assert found["same_0"].val.tobytes() == before[names[1]].val.tobytes()
    assert found["same_0"].child_ops[0].params_name_mapping == {"weight": "same_0"}


COMPRESSED = {
    "palette": (f.PalettizeConfig(bits=4), "palettized"),
    "quantized": (f.QuantizeConfig(), "quantized"),
    "sparse": (f.PruneConfig(sparsity=0.5), "sparsified"),
}


@pytest.mark.parametrize("target", ["iOS16", "iOS18"])
@pytest.mark.parametrize("treatment", COMPRESSED)
def test_a_compressed_weight_is_listed_as_itself(build, tmp_path, treatment, target):
    config, suffix = COMPRESSED[treatment]
    out = tmp_path / "out.mlpackage"
    source = build("layers", target)
    report = milpress.compress(source, out, milpress.Recipe.of(config))
    before, after = get_weights_metadata(source), get_weights_metadata(out)
    names = {
        name: f"{name}_{suffix}" for name in (w.name for w in report.with_status("compressed"))
    }
    assert names
    assert list(after) == [names.get(name, name) for name in before]
    dense = cto.get_weights_metadata(
        cto.decompress_weights(ct.models.MLModel(str(out), skip_model_load=True))
    )
    for name in before:
        now = after[names.get(name, name)]
        assert now.val.tobytes() == dense[names.get(name, name)].val.tobytes()
        assert [op.name for op in now.child_ops] == [op.name for op in before[name].child_ops]
        assert now.child_ops[0].params_name_mapping == {
            key: names.get(weight, weight)
            for key, weight in before[name].child_ops[0].params_name_mapping.items()
        }
    weight = after[f"matmul_t_y_0_{suffix}"]
    assert weight.val.flags.writeable
    if treatment == "palette":
        assert weight.unique_values <= 16
    if treatment == "sparse":
        assert weight.sparsity >= 0.5


def test_a_chain_of_ops_is_one_weight(build):
    model = ct.models.MLModel(str(build("layers", "iOS18")), skip_model_load=True)
    config = cto.OptimizationConfig(cto.OpMagnitudePrunerConfig(target_sparsity=0.5))
    pruned = cto.prune_weights(model, config)
    palette = cto.OptimizationConfig(cto.OpPalettizerConfig(nbits=4))
    model = cto.palettize_weights(pruned, palette, joint_compression=True)
    found = get_weights_metadata(model)
    dense = cto.get_weights_metadata(cto.decompress_weights(model))
    assert list(found) == list(get_weights_metadata(pruned))
    assert sum(name.endswith("_sparsified") for name in found) == 7
    for name, weight in found.items():
        assert weight.val.tobytes() == dense[name].val.tobytes()


def test_functions_of_a_package_are_told_apart(build, tmp_path):
    description = ct.utils.MultiFunctionDescriptor()
    description.add_function(str(build("shared", "iOS18")), "main", "first")
    description.add_function(str(build("nested", "iOS18")), "main", "second")
    description.default_function_name = "first"
    source = tmp_path / "source.mlpackage"
    ct.utils.save_multifunction(description, str(source))
    found = get_weights_metadata(ct.models.MLModel(str(source), skip_model_load=True))
    expected = {
        f"{place}/{name}": metadata
        for place, kind in (("first", "shared"), ("second", "nested"))
        for name, metadata in get_weights_metadata(build(kind, "iOS18")).items()
    }
    assert list(found) == list(expected)
    for name, metadata in found.items():
        assert metadata.val.tobytes() == expected[name].val.tobytes()
    child = found["first/both"].child_ops[0]
    assert child == CoreMLOpMetaData("linear", "first/first", {"weight": "first/both"})


def test_models_of_a_pipeline_are_told_apart(build):
    models = []
    for names in (("x", "between"), ("between", "z")):
        loaded = ct.models.MLModel(str(build("shared", "iOS16")), skip_model_load=True)
        spec = loaded.get_spec()
        ct.utils.rename_feature(spec, spec.description.output[0].name, names[1])
        ct.utils.rename_feature(spec, "x", names[0])
        models.append(ct.models.MLModel(spec, weights_dir=loaded.weights_dir, skip_model_load=True))
    found = get_weights_metadata(ct.utils.make_pipeline(*models))
    assert list(found) == ["model0/both", "model0/torn", "model1/both", "model1/torn"]
    assert found["model1/both"].val.tobytes() == found["model0/both"].val.tobytes()


@pytest.fixture
def n_reads(monkeypatch):
    """Return a list that grows by one with each weight that is read."""
    reads: list[int] = []
    dense = Decoder.dense

    def counted(self: Any, node: Any) -> Any:
        reads.append(1)
        return dense(self, node)

    monkeypatch.setattr(Decoder, "dense", counted)
    monkeypatch.setattr(
        values,
        "read_payload",
        lambda *args, read=values.read_payload: reads.append(0) or read(*args),
    )
    return reads


def test_nothing_is_read_before_it_is_looked_at(crepe_tiny, n_reads):
    found = get_weights_metadata(crepe_tiny, 1)
    weight = next(metadata for metadata in found.values() if "linear" in str(metadata.child_ops))
    repr(found)
    assert n_reads == []
    value = weight.val
    assert sum(n_reads) == 1
    assert weight.val is value
    assert sum(n_reads) == 1
    # Statistics are those of the model, whatever was done to the copy.
    value[...] = 0
    assert weight.sparsity < 0.5
    assert weight.unique_values > 1
    assert sum(n_reads) == 3
    assert (weight.sparsity, weight.unique_values) == (weight.sparsity, weight.unique_values)
    str(weight)
    assert sum(n_reads) == 3


@pytest.mark.parametrize("treatment", [None, *COMPRESSED])
def test_weights_outlive_the_package(crepe_tiny, tmp_path, treatment):
    source = tmp_path / "source.mlpackage"
    if treatment is None:
        shutil.copytree(crepe_tiny, source)
    else:
        milpress.compress(crepe_tiny, source, milpress.Recipe.of(COMPRESSED[treatment][0]))
    kept = {name: metadata.val for name, metadata in get_weights_metadata(source, 1).items()}
    found = get_weights_metadata(source, 1)
    shutil.rmtree(source)
    gc.collect()
    for name, metadata in found.items():
        assert metadata.val.tobytes() == kept[name].tobytes()
        metadata.val[...] = 0


def test_listing_the_weights_of_a_large_model_is_quick(crepe_full):
    mlmodel = ct.models.MLModel(str(crepe_full), skip_model_load=True)
    get_weights_metadata(mlmodel)
    start = time.perf_counter()
    get_weights_metadata(mlmodel)
    assert time.perf_counter() - start < 0.1


def test_a_user_makes_metadata_as_with_coremltools():
    data = np.array([[1.0, 0.0], [0.0, 6.0]], dtype=np.float32)
    ours, theirs = CoreMLWeightMetaData(data), cto.CoreMLWeightMetaData(data)
    assert ours.val is data
    assert (ours.sparsity, ours.unique_values, ours.child_ops) == (0.5, 3, None)
    assert str(ours) == str(theirs)
    given = (data, 0.25, 7, [CoreMLOpMetaData("conv", "c", {"weight": "w"})])
    their_op = cto.CoreMLOpMetaData("conv", "c", {"weight": "w"})
    assert str(CoreMLWeightMetaData(*given)) == str(
        cto.CoreMLWeightMetaData(*given[:3], [their_op])
    )
    assert CoreMLWeightMetaData(*given).unique_values == 7


def test_metadata_is_compared_by_value_and_frozen():
    data = np.array([[1.0, np.nan], [0.0, 6.0]], dtype=np.float32)
    one = CoreMLWeightMetaData(data)
    assert one == CoreMLWeightMetaData(data.copy())
    assert one != CoreMLWeightMetaData(data.astype(np.float64))
    assert one != CoreMLWeightMetaData(data + 1)
    assert one != CoreMLWeightMetaData(data, sparsity=0.5)
    assert one != CoreMLWeightMetaData(data, child_ops=[])
    assert one != "metadata"
    op = CoreMLOpMetaData("conv", "c", {})
    for frozen, name in ((one, "val"), (one, "sparsity"), (one, "other"), (op, "name")):
        with pytest.raises(FrozenInstanceError, match=name):
            setattr(frozen, name, None)
        with pytest.raises(FrozenInstanceError, match=name):
            delattr(frozen, name)
    for unhashable in (one, op):
        with pytest.raises(TypeError, match="unhashable"):
            hash(unhashable)


def test_metadata_is_copied_and_pickled(crepe_tiny):
    found = get_weights_metadata(crepe_tiny)
    for other in (pickle.loads(pickle.dumps(found)), copy.deepcopy(found), copy.copy(found)):
        assert type(other) is type(found)
        assert other == found
        assert str(other) == str(found)
    name = next(iter(found))
    assert str(found).startswith(f"{name}\n[  \n  val: np.ndarray(shape=(")


@given(
    npst.arrays(
        st.sampled_from([np.float16, np.float32, np.int8, np.uint8, np.int32, np.bool_]),
        npst.array_shapes(max_dims=3),
    )
)
def test_statistics_are_those_of_each_element(array):
    metadata = CoreMLWeightMetaData(array)
    elements = array.reshape(-1).tolist()
    assert metadata.sparsity == sum(abs(x) <= 1e-12 for x in elements) / len(elements)
    assert metadata.unique_values == len({"nan" if x != x else x for x in elements})


def test_the_smallest_integer_is_no_zero():
    # In int8, abs(-128) is -128, which coremltools takes for a zero.
    assert CoreMLWeightMetaData(np.full((2, 2), -128, np.int8)).sparsity == 0.0


def test_a_type_that_numpy_lacks_is_refused_when_read(build, tmp_path):
    copied = tmp_path / "copied.mlpackage"
    shutil.copytree(build("layers", "iOS18"), copied)
    package = Package(copied)
    (graph,) = package.graphs
    node = next(node for node in graph.nodes if node.name == "conv_weight_0")
    value = node.op.attributes["val"]
    tensor = graph.decoder.dense(node)
    values.set_type(value.type, dtypes.by_name("bfloat16"), tensor.values.shape)
    value.immediateValue.tensor.bytes.values = tensor.values.tobytes()
    package.model_path.write_bytes(package.model.SerializeToString())
    found = get_weights_metadata(copied)["conv_weight_0"]
    for name in ("val", "sparsity", "unique_values"):
        with pytest.raises(UnsupportedError, match=r"conv_weight_0: .* got bfloat16"):
            getattr(found, name)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CoreMLWeightMetaData([1.0]), "val must be of type ndarray, got list"),
        (lambda: CoreMLWeightMetaData(np.ones(2), "1"), "sparsity must be of type Real, got str"),
        (lambda: CoreMLWeightMetaData(np.ones(2), 1.0, 1.5), "unique_values must be of type Int"),
        (lambda: CoreMLWeightMetaData(np.ones(2), child_ops=()), "child_ops must be of type list"),
        (lambda: CoreMLOpMetaData(1, "c", {}), "op_type must be of type str, got int"),
        (lambda: CoreMLOpMetaData("conv", None, {}), "name must be of type str, got NoneType"),
        (lambda: CoreMLOpMetaData("conv", "c", []), "params_name_mapping must be of type dict"),
        (lambda: get_weights_metadata("x", None), "weight_threshold must be of type Real"),
        (lambda: get_weights_metadata(None), "mlmodel must be a coremltools MLModel or the path"),
    ],
)
def test_arguments_of_a_wrong_type_are_refused(make, message):
    with pytest.raises(ConfigTypeError, match=message) as caught:
        make()
    assert isinstance(caught.value, TypeError)
    assert isinstance(caught.value, milpress.CompressionError)


def test_nothing_at_a_path_is_an_error(tmp_path):
    with pytest.raises(PackageNotFoundError, match="no such package"):
        get_weights_metadata(tmp_path / "none.mlpackage")


def test_importing_the_module_imports_no_coremltools():
    code = (
        "import sys, milpress.coreml, milpress.engines.mlmodel, milpress.coreml.metadata; "
        "assert not {'coremltools', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
