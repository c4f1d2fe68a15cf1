"""Intermediate values as Core ML computes them: its part is played by the interpreter here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
import torch
from core_ml_stub import StubMac, held
from coremltools.converters.mil.frontend.milproto.load import load as load_mil
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import milpress
from milpress import coreml, interpreter
from milpress.cli.app import app
from milpress.engines import coreml as engine
from milpress.engines.calls import CoreML
from milpress.errors import ConfigError, DriverError, InputError, UnsupportedError
from milpress.mil import staging
from milpress.mil.expose import expose
from milpress.mil.package import Package
from milpress.recipe import Recipe
from milpress.samples.data import RandomSamples


class Played(CoreML):
    """Runs what it is told to load by the interpreter, as strict about inputs as coremltools."""

    def __init__(self) -> None:
        self.loaded: list[Path] = []

    def compile(self, package: str, destination: str) -> str:
        held("compile_model", package, destination_path=destination)
        return package

    def load(self, path: str, units: str, function: str | None) -> Any:
        held("CompiledMLModel", path, compute_units=units, function_name=function)
        self.loaded.append(Path(path))
        return interpreter.load(path, function)

    def make_state(self, model: Any) -> Any:
        return model.make_state()

    def predict(self, model: Any, data: Any, state: Any = None) -> Any:
        for value in data.values():
            assert isinstance(value, Image.Image) or value.dtype in (np.float32, np.int32)
        made = model.run({k: np.asarray(v) for k, v in data.items()}, state=state).outputs
        assert all(str(getattr(v, "dtype", "float32")) == "float32" for v in made.values())
        return made


@pytest.fixture
def core_ml(monkeypatch: pytest.MonkeyPatch) -> Played:
    played = Played()
    monkeypatch.setattr(engine, "CoreML", lambda: played)
    monkeypatch.setattr(engine, "Mac", StubMac)
    return played


class Convolved(nn.Module):
    """Two convolutions and what joins them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        return self.second(x) + x


class Summing(nn.Module):
    """Adds to what it saw before."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.register_buffer("seen", torch.zeros(1, 8, dtype=torch.float16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.add_(x.half())
        return self.layer(self.seen.float())


def converted(kind: str, path: Path) -> Path:
    torch.manual_seed(0)
    module, example, settings = Convolved(), torch.zeros(1, 3, 8, 6), {}
    if kind == "stateful":
        module, example = Summing(), torch.zeros(1, 8)
        state = ct.TensorType(shape=(1, 8), dtype=np.float16)
        settings["states"] = [ct.StateType(state, "seen")]
    shape: Any = example.shape
    if kind == "flexible":
        shape = (1, 3, ct.RangeDim(4, 16, default=8), 6)
    given = ct.TensorType("x", shape)
    if kind.startswith("image"):
        layout = ct.colorlayout.BGR if kind == "image BGR" else ct.colorlayout.RGB
        given = ct.ImageType("x", shape, scale=1 / 255, color_layout=layout)
    if kind == "float32":
        settings["compute_precision"] = ct.precision.FLOAT32
    model = ct.convert(
        torch.jit.trace(module.eval(), example),
        inputs=[given],
        minimum_deployment_target=ct.target.iOS18,
        skip_model_load=True,
        **settings,
    )
    model.save(str(path))
    return path


def samples(kind: str) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    if kind.startswith("image"):
        return [{"x": rng.integers(0, 256, (8, 6, 3), np.uint8)} for _ in range(3)]
    shapes = {"stateful": [(1, 8)], "flexible": [(1, 3, n, 6) for n in (4, 9)]}
    sizes = shapes.get(kind, [(1, 3, 8, 6)])
    return [{"x": rng.standard_normal(sizes[i % len(sizes)])} for i in range(3)]


def config(**settings: Any) -> coreml.OptimizationConfig:
    return coreml.OptimizationConfig(coreml.OpLinearQuantizerConfig(**settings))


KINDS = ["float16", "float32", "flexible", "stateful", "image RGB", "image BGR"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [-1, 1])
def test_core_ml_shows_the_values_that_the_interpreter_shows(kind, size, core_ml, tmp_path):
    path = converted(kind, tmp_path / "m.mlpackage")
    made = {
        engine: coreml.linear_quantize_activations(
            str(path),
            config(),
            samples(kind),
            calibration_op_group_size=size,
            engine=engine,
            destination=tmp_path / f"{engine}.mlpackage",
        ).activation_report
        for engine in ("interpreter", "coreml")
    }
    assert made["coreml"].n_pairs > 0
    assert made["coreml"] == made["interpreter"]
    n_values = len({each.name for each in made["coreml"].activations})
    assert len(core_ml.loaded) == (1 if size == -1 else n_values)
    assert not any(each.exists() for each in core_ml.loaded)
    milpress.verify(path, tmp_path / "coreml.mlpackage")


def test_values_of_a_pipeline_are_given_out_through_it(shared_pipeline, core_ml, tmp_path):
    made = [
        coreml.linear_quantize_activations(
            str(shared_pipeline),
            config(),
            RandomSamples(3),
            engine=engine,
            destination=tmp_path / f"{engine}.mlpackage",
        ).activation_report
        for engine in ("interpreter", "coreml")
    ]
    assert made[0].n_pairs > 0
    assert made[0] == made[1]


def test_values_of_one_function_of_several_are_given_out(core_ml, tmp_path):
    description = ct.utils.MultiFunctionDescriptor()
    for name, kind in (("small", "float16"), ("large", "float32")):
        path = converted(kind, tmp_path / f"{name}.mlpackage")
        description.add_function(str(path), "main", name)
    description.default_function_name = "small"
    path = tmp_path / "both.mlpackage"
    ct.utils.save_multifunction(description, str(path))
    for name in (None, "large"):
        made = [
            coreml.linear_quantize_activations(
                str(path), config(), samples(""), function=name, engine=engine
            ).activation_report
            for engine in ("interpreter", "coreml")
        ]
        assert made[0].n_pairs > 0
        assert made[0] == made[1]


def test_the_command_line_and_recipes_say_who_runs_the_model(core_ml, tmp_path):
    path = converted("float16", tmp_path / "m.mlpackage")
    np.savez(tmp_path / "samples.npz", x=np.concatenate([each["x"] for each in samples("")]))
    given = ["--calibration-data", str(tmp_path / "samples.npz")]
    arguments = ["compress", str(path), str(tmp_path / "out.mlpackage"), "--quantize", "int8"]
    engine = ["--calibration-engine", "coreml"]
    found = CliRunner().invoke(app, [*arguments, *given, *engine])
    assert found.exit_code != 0
    assert "--calibration-engine has no effect without --quantize-activations" in str(
        found.exception
    )
    activations = ["--quantize-activations", "int8", *engine]
    found = CliRunner().invoke(app, [*arguments, *given, *activations])
    assert found.exit_code == 0, found.output
    assert len(core_ml.loaded) == 1
    recipe = Recipe.from_dict(
        {"version": 1, "steps": [{"quantize_activations": {"engine": "coreml"}}]}
    )
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    milpress.compress(path, tmp_path / "again.mlpackage", recipe, sample_data=samples(""))
    assert len(core_ml.loaded) == 2


@pytest.mark.parametrize("kind", ["float16", "float32", "flexible"])
def test_coremltools_takes_a_package_that_gives_out_values(kind, tmp_path):
    package = Package(converted(kind, tmp_path / "m.mlpackage"))
    wanted = [name for name, type_ in interpreter.load(package).values.items() if type_]
    copy, outputs = expose(package, {(): "main"}, wanted)
    assert list(outputs.values()) == wanted
    assert package.model.SerializeToString() == package.reopened().model.SerializeToString()
    staging.save_changed(copy, tmp_path / "out.mlpackage")
    spec = ct.utils.load_spec(str(tmp_path / "out.mlpackage"))
    program = load_mil(
        spec,
        spec.specificationVersion,
        str(tmp_path / "out.mlpackage/Data/com.apple.CoreML/weights"),
    )
    types = {out.name: out.dtype for out in program.functions["main"].outputs}
    for output in outputs:
        assert ct.converters.mil.mil.types.builtin_to_string(types[output]) == "fp32"
    described = {each.name for each in spec.description.output}
    assert outputs.keys() < described


@pytest.mark.parametrize(
    ("rank", "reason"), [(2, "be outside of nested blocks"), (0, "have 1 to 5 dimensions")]
)
def test_what_core_ml_can_not_show_is_named(rank, reason, build):
    package = Package(build("nested"))
    kinds = interpreter.load(package).values
    inside = [name for name, kind in kinds.items() if kind is not None and len(kind.shape) == rank]
    with pytest.raises(UnsupportedError, match=f"must {reason}; the interpreter shows any"):
        expose(package, {(): "main"}, inside)


def test_core_ml_takes_a_mac_and_its_failures_are_told(tmp_path, monkeypatch, core_ml):
    path = converted("float16", tmp_path / "m.mlpackage")

    def fail(*_: Any) -> Any:
        msg = "Unable to build the model execution plan"
        raise RuntimeError(msg)

    monkeypatch.setattr(core_ml, "load", fail)
    with pytest.raises(DriverError, match=r"m\.mlpackage: .* execution plan"):
        coreml.linear_quantize_activations(str(path), config(), samples(""), engine="coreml")
    monkeypatch.undo()
    with pytest.raises(DriverError, match="the driver coreml needs a Mac"):
        coreml.linear_quantize_activations(str(path), config(), samples(""), engine="coreml")
    with pytest.raises(ConfigError, match="engine must be one of"):
        coreml.linear_quantize_activations(str(path), config(), samples(""), engine="metal")


def test_a_sample_that_does_not_suit_is_refused_before_core_ml(tmp_path, core_ml):
    path = converted("float16", tmp_path / "m.mlpackage")
    for sample, message in (
        ({"y": np.ones((1, 3, 8, 6))}, r"the inputs must be x \(float\d+ 1x3x8x6\), got y"),
        ({"x": np.ones((1, 3, 8, 7))}, "must have the shape 1x3x8x6"),
    ):
        with pytest.raises(InputError, match=message):
            coreml.linear_quantize_activations(str(path), config(), [sample], engine="coreml")
    assert len(core_ml.loaded) == 0
