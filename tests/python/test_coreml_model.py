"""Models in and out: what a package is opened from, and the ``MLModel`` that it becomes."""

from __future__ import annotations

import copy
import gc
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import coremltools as ct
import coremltools.optimize.coreml as cto
import pytest
from coremltools.converters.mil.mil import Program

import milpress
from milpress import formats as f
from milpress.engines.mlmodel import opened, returned, temporary_package
from milpress.errors import ConfigTypeError, ModelKindError, PackageNotFoundError
from milpress.mil.package import Package


def load(path: Path, **settings: Any) -> Any:
    return ct.models.MLModel(str(path), skip_model_load=True, **settings)


def compressed(source: Any, config: Any = f.QuantizeConfig()) -> Any:  # noqa: B008
    """Return a model, compressed into a temporary package."""
    with temporary_package() as path:
        milpress.compress(opened(source).path, path, milpress.Recipe.of(config))
        return returned(path, source, temporary=True)


@pytest.fixture
def pipeline(build) -> Any:
    models = []
    for names in (("x", "between"), ("between", "z")):
        loaded = load(build("shared", "iOS16"))
        spec = loaded.get_spec()
        ct.utils.rename_feature(spec, spec.description.output[0].name, names[1])
        ct.utils.rename_feature(spec, "x", names[0])
        models.append(ct.models.MLModel(spec, weights_dir=loaded.weights_dir, skip_model_load=True))
    return ct.utils.make_pipeline(*models)


@pytest.fixture
def multifunction(build, tmp_path) -> Path:
    description = ct.utils.MultiFunctionDescriptor()
    description.add_function(str(build("shared", "iOS18")), "main", "first")
    description.add_function(str(build("nested", "iOS18")), "main", "second")
    description.default_function_name = "first"
    source = tmp_path / "multifunction.mlpackage"
    ct.utils.save_multifunction(description, str(source))
    return source


def test_what_was_changed_on_a_model_is_what_is_opened(crepe_tiny):
    model = load(crepe_tiny)
    before = opened(model)
    assert before.path == crepe_tiny
    model.short_description = "changed"
    model.user_defined_metadata["com.example.key"] = "value"
    after = opened(model)
    assert after.model.description.metadata.userDefined["com.example.key"] == "value"
    assert after.model_bytes == model.get_spec().SerializeToString(deterministic=True)
    assert b"changed" in after.model_bytes
    assert b"changed" not in before.model_bytes
    assert b"changed" not in after.model_path.read_bytes()
    assert after.model.mlProgram == Package(crepe_tiny).model.mlProgram


def test_models_without_a_package_of_their_own_are_opened(crepe_tiny):
    loaded = load(crepe_tiny)
    model = ct.models.MLModel(
        loaded.get_spec(), weights_dir=loaded.weights_dir, skip_model_load=True
    )
    assert opened(model).path == Path(model.package_path)
    assert opened(str(crepe_tiny)).model_bytes == opened(crepe_tiny).model_bytes


def test_functions_and_pipelines_are_opened(pipeline, multifunction):
    assert [program.place for program in opened(pipeline).programs] == [("model0",), ("model1",)]
    (program,) = opened(load(multifunction, function_name="second")).programs
    assert list(program.functions) == ["first", "second"]


def neural_network() -> Any:
    builder = ct.models.neural_network.NeuralNetworkBuilder(
        [("x", ct.models.datatypes.Array(3))], [("y", ct.models.datatypes.Array(3))]
    )
    builder.add_activation("relu", "RELU", "x", "y")
    return ct.models.MLModel(builder.spec, skip_model_load=True)


def packaged(spec: Any, path: Path) -> Path:
    ct.utils.save_spec(spec, str(path.with_suffix(".mlmodel")))
    folder = path / "Data" / "com.apple.CoreML"
    folder.mkdir(parents=True)
    shutil.move(path.with_suffix(".mlmodel"), folder / "model.mlmodel")
    (path / "Manifest.json").write_text(
        '{"fileFormatVersion": "1.0.0", "rootModelIdentifier": "a", "itemInfoEntries": {"a": '
        '{"author": "com.apple.CoreML", "name": "model.mlmodel", "description": "",'
        ' "path": "com.apple.CoreML/model.mlmodel"}}}'
    )
    return path


def test_models_of_other_kinds_are_refused(tmp_path):
    network = neural_network()
    spec = ct.proto.Model_pb2.Model(specificationVersion=4)
    spec.description.CopyFrom(network.get_spec().description)
    spec.pipeline.models.add().CopyFrom(network.get_spec())
    network_package = packaged(network.get_spec(), tmp_path / "network.mlpackage")
    pipeline_package = packaged(spec, tmp_path / "pipeline.mlpackage")
    sources = [
        network,
        ct.models.MLModel(spec, skip_model_load=True),
        network_package,
        pipeline_package,
        load(network_package),
        load(pipeline_package),
    ]
    for source in sources:
        message = "is meant to be used only with mlprogram typed coreml models.* convert it again"
        with pytest.raises(ModelKindError, match=message) as caught:
            opened(source)
        assert isinstance(caught.value, TypeError)
        assert isinstance(caught.value, milpress.CompressionError)


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(ConfigTypeError, match=r"an \.mlpackage, got Model$"):
        opened(ct.proto.Model_pb2.Model())
    with pytest.raises(PackageNotFoundError, match="no such package"):
        opened(tmp_path / "none.mlpackage")


def test_a_model_is_returned_as_its_source_was_set_up(build, multifunction, tmp_path):
    source = load(
        multifunction,
        function_name="second",
        compute_units=ct.ComputeUnit.CPU_ONLY,
        optimization_hints={},
    )
    model = returned(
        shutil.copytree(multifunction, tmp_path / "c.mlpackage"), source, temporary=False
    )
    assert isinstance(model, ct.models.MLModel)
    assert model.package_path == str(tmp_path / "c.mlpackage")
    assert model.function_name == "second"
    assert model.compute_unit is ct.ComputeUnit.CPU_ONLY
    assert model.optimization_hints == {}
    assert not model.is_temp_package
    assert model.__proxy__ is None
    del model
    gc.collect()
    assert (tmp_path / "c.mlpackage").exists()
    plain = returned(build("layers", "iOS18"), build("layers", "iOS18"), temporary=False)
    assert plain.compute_unit is ct.ComputeUnit.ALL
    assert plain.function_name is None


def test_a_model_is_loaded_by_core_ml_if_its_source_was(build, monkeypatch):
    asked: list[bool] = []
    original = ct.models.MLModel._get_proxy_and_spec

    def noted(self: Any, *args: Any, skip_model_load: bool, **settings: Any) -> Any:
        asked.append(skip_model_load)
        return original(self, *args, skip_model_load=True, **settings)

    monkeypatch.setattr(ct.models.MLModel, "_get_proxy_and_spec", noted)
    source = load(build("layers", "iOS18"))
    returned(build("layers", "iOS18"), source, temporary=False)
    source.__proxy__ = object()
    returned(build("layers", "iOS18"), source, temporary=False)
    assert asked == [True, True, False]


def n_loads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    from coremltools.converters.mil.frontend.milproto import load as module

    calls: list[int] = []
    original = module.load_mil_proto
    monkeypatch.setattr(module, "load_mil_proto", lambda *args: calls.append(1) or original(*args))
    return calls


def test_the_program_is_read_once_and_only_when_asked_for(build, tmp_path, monkeypatch):
    calls = n_loads(monkeypatch)
    model = compressed(load(build("layers", "iOS18")))
    model.save(str(tmp_path / "saved.mlpackage"))
    copied = copy.deepcopy(model)
    model.get_spec()
    assert calls == []
    program = model._mil_program
    assert isinstance(program, Program)
    assert model._mil_program is program
    assert len(calls) == 1
    quantized = program.functions["main"].find_ops(op_type="constexpr_blockwise_shift_scale")
    assert len(quantized) == 7
    assert isinstance(model._get_mil_internal(), Program)
    model.save(str(tmp_path / "saved.mlpackage"))
    assert model._mil_program is program
    assert isinstance(copied._mil_program, Program)
    assert len(calls) == 2
    model._mil_program = None
    assert model._mil_program is None


def test_a_program_that_cannot_be_read_stays_an_error(build):
    model = returned(build("layers", "iOS18"), build("layers", "iOS18"), temporary=False)
    model._spec.mlProgram.version = 2
    for _ in range(2):
        with pytest.raises(ValueError, match="Invalid program version"):
            _ = model._mil_program


def test_a_pipeline_has_no_single_program(pipeline, multifunction):
    assert compressed(pipeline)._mil_program is None
    assert set(compressed(load(multifunction))._mil_program.functions) == {"first", "second"}


def test_a_returned_model_is_saved_and_made_anew(build, tmp_path):
    model = compressed(load(build("layers", "iOS18")))
    model.user_defined_metadata["com.example.key"] = "value"
    model.save(str(tmp_path / "saved.mlpackage"))
    milpress.verify(build("layers", "iOS18"), model.package_path)
    saved = load(tmp_path / "saved.mlpackage")
    assert saved.get_spec() == model.get_spec()
    assert saved.user_defined_metadata["com.example.key"] == "value"
    anew = ct.models.MLModel(model.get_spec(), weights_dir=model.weights_dir, skip_model_load=True)
    assert anew.get_spec() == model.get_spec()
    weights = [Path(m.weights_dir, "weight.bin").read_bytes() for m in (model, saved, anew)]
    assert weights[0] == weights[1] == weights[2]
    assert cto.decompress_weights(model)._mil_program is not None


def test_coremltools_utilities_take_a_returned_model(build, tmp_path):
    model = compressed(load(build("layers", "iOS18")))
    changed = ct.utils.change_input_output_tensor_type(
        ml_model=model,
        from_type=ct.proto.FeatureTypes_pb2.ArrayFeatureType.FLOAT16,
        to_type=ct.proto.FeatureTypes_pb2.ArrayFeatureType.FLOAT32,
    )
    assert changed.get_spec().description.output[0].type.multiArrayType.dataType == (
        ct.proto.FeatureTypes_pb2.ArrayFeatureType.FLOAT32
    )
    description = ct.utils.MultiFunctionDescriptor(model.package_path)
    description.add_function(str(build("shared", "iOS18")), "main", "other")
    description.default_function_name = "main"
    ct.utils.save_multifunction(description, str(tmp_path / "multi.mlpackage"))
    again = compressed(load(tmp_path / "multi.mlpackage"), f.PalettizeConfig(bits=4))
    assert set(again._mil_program.functions) == {"main", "other"}


def test_a_returned_model_joins_a_pipeline(build):
    models = []
    for names in (("x", "between"), ("between", "z")):
        model = compressed(load(build("shared", "iOS16")))
        output = model._spec.description.output[0].name
        ct.utils.rename_feature(model._spec, output, names[1])
        ct.utils.rename_feature(model._spec, "x", names[0])
        models.append(model)
    pipeline = ct.utils.make_pipeline(*models)
    assert [program.place for program in opened(pipeline).programs] == [("model0",), ("model1",)]


def test_a_returned_model_is_compressed_again(crepe_tiny):
    rule = {"select": {"name": "glob:*classifier*"}, "quantize": {}}
    with temporary_package() as path:
        once_recipe = milpress.Recipe.from_dict({"steps": [rule]})
        milpress.compress(crepe_tiny, path, once_recipe)
        once = returned(path, load(crepe_tiny), temporary=True)
    twice = compressed(once, f.PalettizeConfig(bits=4))
    kinds = [op.op_type for op in twice._mil_program.functions["main"].operations]
    assert kinds.count("constexpr_affine_dequantize") == 1
    assert kinds.count("constexpr_lut_to_dense") == 6
    config = cto.OptimizationConfig(cto.OpLinearQuantizerConfig())
    assert isinstance(cto.linear_quantize_weights(once, config), ct.models.MLModel)


def test_a_temporary_package_lives_as_long_as_a_copy_of_its_model(build):
    model = compressed(load(build("layers", "iOS18")))
    folder = Path(model.package_path).parent
    assert model.is_temp_package
    assert folder.parent == Path(tempfile.gettempdir())
    shallow = copy.copy(model)
    deep = copy.deepcopy(model)
    del model
    gc.collect()
    assert folder.is_dir()
    del shallow
    gc.collect()
    assert isinstance(deep._mil_program, Program)
    del deep
    gc.collect()
    assert not folder.exists()


def test_a_temporary_package_leaves_its_neighbours_alone(build, tmp_path):
    path = tmp_path / "one.mlpackage"
    shutil.copytree(build("layers", "iOS18"), path)
    (tmp_path / "other").write_text("kept")
    model = returned(path, build("layers", "iOS18"), temporary=True)
    del model
    gc.collect()
    assert [entry.name for entry in tmp_path.iterdir()] == ["other"]


def test_a_forked_child_does_not_remove_the_package_of_its_parent(build):
    model = compressed(load(build("layers", "iOS18")))
    child = os.fork()
    if child == 0:
        model._files = None
        gc.collect()
        os._exit(0)
    os.waitpid(child, 0)
    assert Path(model.package_path).is_dir()


def test_a_temporary_package_is_removed_when_python_ends(build):
    code = (
        "import milpress, sys\n"
        "from milpress.engines.mlmodel import returned, temporary_package\n"
        "with temporary_package() as path:\n"
        "    milpress.compress(sys.argv[1], path, milpress.Recipe.from_dict("
        "{'steps': [{'quantize': {}}]}))\n"
        "    model = returned(path, sys.argv[1], temporary=True)\n"
        "print(model.package_path)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(build("layers", "iOS18"))],
        check=True,
        capture_output=True,
        text=True,
    )
    path = Path(run.stdout.splitlines()[-1])
    assert path.name == "model.mlpackage"
    assert not path.parent.exists()


def test_a_failure_leaves_no_temporary_folder():
    folders = []

    def fail() -> None:
        with temporary_package() as path:
            folders.append(path.parent)
            assert path.parent.is_dir()
            raise ValueError("planted")

    with pytest.raises(ValueError, match="planted"):
        fail()
    assert not folders[0].exists()


def test_opening_a_path_imports_no_coremltools(crepe_tiny):
    code = (
        "import sys; from milpress.engines.mlmodel import opened; opened(sys.argv[1]); "
        "assert 'coremltools' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(crepe_tiny)], check=True)
