"""Quantized activations: placed as coremltools places them, calibrated by the interpreter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import coremltools as ct
import coremltools.optimize as theirs
import numpy as np
import pytest
from coremltools.converters.mil.mil import Builder as mb  # noqa: N813
from coremltools.converters.mil.mil import types
from coremltools.converters.mil.mil.passes.defs import optimize_quantization
from coremltools.optimize.coreml.experimental import _model_debugger
from coremltools.optimize.coreml.experimental import _post_training_quantization as stats
from oracles import decoded_by_coremltools
from small_models import TARGETS, save, weight
from typer.testing import CliRunner

import milpress as ours
from milpress import interpreter
from milpress.cli.app import app
from milpress.coreml import (
    OpLinearQuantizerConfig,
    OpPalettizerConfig,
    OptimizationConfig,
    linear_quantize_activations,
    linear_quantize_weights,
)
from milpress.errors import (
    CompressionError,
    ConfigError,
    InputError,
    UnsupportedError,
    VerificationError,
)
from milpress.mil.package import Package
from milpress.mil.records import ActivationRecord


def program(target: str, dtype: type, **shapes: tuple[int, ...]) -> Any:
    element = types.fp16 if dtype is np.float16 else types.fp32
    specs = [mb.TensorSpec(shape=shape, dtype=element) for shape in shapes.values()]
    return mb.program(input_specs=specs, opset_version=TARGETS[target])


def cnn(target: str, dtype: type) -> Any:
    """Residual addition, pools, a concat, activations; a constant that is added."""

    @program(target, dtype, x=(1, 3, 12, 12))
    def prog(x: Any) -> Any:
        a = mb.conv(x=x, weight=weight(8, 3, 3, 3, dtype=dtype), pad_type="same", name="c1")
        a = mb.relu(x=a, name="r1")
        b = mb.conv(x=a, weight=weight(8, 8, 3, 3, dtype=dtype), pad_type="same", name="c2")
        b = mb.relu(x=mb.add(x=a, y=b, name="sum"), name="r2")
        pooled = {"kernel_sizes": [2, 2], "strides": [2, 2], "pad_type": "valid"}
        c = mb.max_pool(x=b, name="greatest", **pooled)
        d = mb.avg_pool(x=b, name="mean", exclude_padding_from_average=False, **pooled)
        e = mb.concat(values=[c, d], axis=1, name="joined")
        f = mb.conv(x=e, weight=weight(8, 16, 1, 1, dtype=dtype), name="c3")
        f = mb.sigmoid(x=f, name="s")
        f = mb.reshape(x=f, shape=[1, 8 * 36], name="flat")
        f = mb.add(x=f, y=dtype(0.5), name="shifted")
        f = mb.linear(x=f, weight=weight(16, 288, dtype=dtype), name="fc1")
        f = mb.linear(x=f, weight=weight(10, 16, dtype=dtype), name="fc2")
        return mb.softmax(x=f, axis=-1, name="y")

    return prog


def mlp(target: str, dtype: type) -> Any:
    """Linear layers and products of matrices; values with several users; one op is the output."""

    @program(target, dtype, x=(4, 24), z=(4, 16))
    def prog(x: Any, z: Any) -> Any:
        a = mb.linear(x=x, weight=weight(16, 24, dtype=dtype), name="fc1")
        b = mb.gelu(x=a, mode="EXACT", name="g")
        c = mb.add(x=b, y=z, name="sum")
        d = mb.linear(x=c, weight=weight(16, 16, dtype=dtype), name="q")
        e = mb.linear(x=c, weight=weight(16, 16, dtype=dtype, seed=1), name="k")
        s = mb.matmul(x=d, y=e, transpose_y=True, name="scores")
        v = mb.matmul(x=mb.softmax(x=s, name="p"), y=c, name="mixed")
        v = mb.leaky_relu(x=mb.add(x=v, y=c, name="again"), alpha=dtype(0.1), name="l")
        w = mb.linear(x=v, weight=weight(8, 16, dtype=dtype), name="fc2")
        u = mb.tanh(
            x=mb.linear(x=v, weight=weight(8, 16, dtype=dtype, seed=2), name="fc3"), name="t"
        )
        return mb.mul(x=mb.add(x=w, y=u, name="both"), y=w, name="y")

    return prog


def grown(target: str, dtype: type) -> Any:
    """A dense block: each concat takes what the ones before it took."""

    @program(target, dtype, x=(1, 4, 8, 8))
    def prog(x: Any) -> Any:
        for i in range(3):
            n = x.shape[1]
            more = mb.conv(
                x=x, weight=weight(4, n, 3, 3, dtype=dtype), pad_type="same", name=f"c{i}"
            )
            more = mb.relu(x=more, name=f"r{i}")
            x = mb.concat(values=[x, more], axis=1, name=f"joined{i}")
        return mb.reduce_mean(x=mb.relu6(x=x, name="r"), axes=[2, 3], keep_dims=False, name="y")

    return prog


def branches(target: str, dtype: type) -> Any:
    """Layers inside the branches of a condition, behind one that is outside."""

    @program(target, dtype, x=(2, 16), flag=(1,))
    def prog(x: Any, flag: Any) -> Any:
        x = mb.linear(x=x, weight=weight(16, 16, dtype=dtype), name="before")

        def twice() -> Any:
            a = mb.linear(x=x, weight=weight(32, 16, dtype=dtype), name="inner1")
            a = mb.relu(x=a, name="inner_relu")
            a = mb.linear(x=a, weight=weight(16, 32, dtype=dtype), name="inner2")
            return mb.add(x=a, y=x, name="inner_sum")

        def once() -> Any:
            return mb.linear(x=x, weight=weight(16, 16, dtype=dtype, seed=1), name="other")

        pred = mb.squeeze(x=mb.cast(x=flag, dtype="bool"))
        return mb.tanh(x=mb.cond(pred=pred, _true_fn=twice, _false_fn=once), name="y")

    return prog


NETS = {"cnn": cnn, "mlp": mlp, "grown": grown}
BUILT = NETS | {"branches": branches}


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("nets")
    built: dict[Any, Path] = {}

    def make(kind: str, target: str = "iOS18", dtype: str = "fp16") -> Path:
        key = kind, target, dtype
        if key not in built:
            element = np.float16 if dtype == "fp16" else np.float32
            path = folder / f"{kind}-{target}-{dtype}.mlpackage"
            built[key] = save(BUILT[kind](target, element), path, target)
        return built[key]

    return make


def samples_of(path: Path, n: int = 3, seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    inputs = interpreter.load(path).inputs
    # Scales fall, so that the last sample is no stand-in for all of them.
    return [
        {each.name: rng.standard_normal(each.shape).astype(np.float32) * (n - i) for each in inputs}
        for i in range(n)
    ]


def model_of(path: Path) -> Any:
    return ct.models.MLModel(str(path), skip_model_load=True)


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> Any:
    """coremltools' own function, with the interpreter in place of macOS.

    Its range is that of the last sample, which is mended here. Its default passes make one scale of
    an addition 1 by scaling the values; milpress does not change the values.
    """

    def mended(name: str, value: Any, into: Any) -> None:
        low, high = float(np.min(value)), float(np.max(value))
        known = into[name]
        known["rmin"] = min(low, known.get("rmin", low))
        known["rmax"] = max(high, known.get("rmax", high))

    def quantized(path: Path, config: Any, samples: Any) -> Any:
        run = interpreter.load(path)

        def predict(self: Any, inputs: Any, names: Any, compute_units: Any = None) -> Any:
            made = run.run(inputs, taps=names)
            return made.outputs | made.taps

        monkeypatch.setattr(_model_debugger.ModelDebugger, "predict_intermediate_outputs", predict)
        return theirs.coreml.linear_quantize_activations(model_of(path), config, samples)

    monkeypatch.setattr(
        _model_debugger.ModelDebugger,
        "record_intermediate_output",
        staticmethod(lambda value, name, into: mended(name, value, into)),
    )
    monkeypatch.setattr(stats, "_update_tensor_range", mended)
    monkeypatch.setattr(
        optimize_quantization.distributive_quantized_binary_op_scale_normalization,
        "apply",
        lambda self, prog: None,
    )
    return quantized


def ops_in(model: Any) -> list[Any]:
    """Return the ops that compute, in order, with the names of pairs counted through."""
    renamed: dict[str, str] = {}
    found = []
    for op in model._mil_program.functions["main"].operations:
        if op.op_type == "const" or op.op_type.startswith("constexpr_"):
            continue
        settings: tuple[Any, ...] = ()
        if op.op_type in ("quantize", "dequantize"):
            renamed[op.outputs[0].name] = f"{op.op_type} {len(renamed)}"
            zero = 0 if op.zero_point is None else int(op.zero_point.val)
            kind = (
                op.input.op.outputs[0].dtype if op.op_type == "dequantize" else op.outputs[0].dtype
            )
            settings = (
                op.scale.val.dtype.name,
                float(op.scale.val),
                zero,
                types.builtin_to_string(kind),
            )
        inputs = [
            renamed.get(each.name, each.name)
            for value in op.inputs.values()
            if value is not None
            for each in (value if isinstance(value, (list, tuple)) else [value])
            if each.op is None or each.op.op_type not in ("const",)
        ]
        names = [renamed.get(each.name, each.name) for each in op.outputs]
        found.append((op.op_type, names, inputs, settings))
    return found


SETTINGS = {
    "int8": {},
    "uint8": {"dtype": "uint8"},
    "int8 linear": {"mode": "linear"},
    "uint8 linear": {"mode": "linear", "dtype": "uint8"},
}


def is_same(mine: Any, other: Any) -> bool:
    """Whether two ops agree; coremltools' zero points are computed in float16."""
    if mine[:3] != other[:3] or not mine[3]:
        return mine == other
    (*scale, zero, kind), (*other_scale, other_zero, other_kind) = mine[3], other[3]
    # coremltools turns int8 codes with the zero point -128 into uint8 codes without one only where
    # one op dequantizes them at the time; both stand for the same values.
    shift = {"int8": 128, "uint8": 0}
    distance = abs(zero + shift[kind] - other_zero - shift[other_kind])
    return scale == other_scale and distance <= 1


@pytest.mark.parametrize("target", ["iOS17", "iOS18"])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", NETS)
def test_pairs_are_where_coremltools_puts_them(net, reference, kind, setting, target):
    source = net(kind, target)
    samples = samples_of(source)
    config = OptimizationConfig(OpLinearQuantizerConfig(**SETTINGS[setting]))
    same = theirs.coreml.OptimizationConfig(
        theirs.coreml.OpLinearQuantizerConfig(**SETTINGS[setting])
    )
    mine = ops_in(linear_quantize_activations(model_of(source), config, samples))
    other = ops_in(reference(source, same, samples))
    assert [op[:3] for op in mine] == [op[:3] for op in other]
    for one, two in zip(mine, other, strict=True):
        assert is_same(one, two), (one, two)


def test_ops_are_left_as_the_config_says_by_name_and_by_type(net, reference):
    source = net("cnn")
    samples = samples_of(source)
    chosen = {"op_type_configs": {"add": None, "max_pool": None}, "op_name_configs": {"c2": None}}
    made = linear_quantize_activations(
        source, OptimizationConfig(OpLinearQuantizerConfig(), **chosen), samples
    )
    same = theirs.coreml.OptimizationConfig(theirs.coreml.OpLinearQuantizerConfig(), **chosen)
    assert ops_in(made) == ops_in(reference(source, same, samples))


def test_float32_models_have_scales_of_float32(net):
    source = net("cnn", dtype="fp32")
    made = linear_quantize_activations(source, OpLinearQuantizerConfig(), samples_of(source))
    scales = [op[3][0] for op in ops_in(made) if op[3]]
    assert set(scales) == {"float32"}
    assert len(scales) == len([op for op in ops_in(made) if "quantize" in op[0]])


@pytest.mark.parametrize("calibration", ["minmax", "percentile", "mse", "entropy"])
def test_the_number_of_values_looked_at_in_a_run_makes_no_difference(net, tmp_path, calibration):
    source = net("grown")
    texts = []
    for size in (-1, 1, 3):
        path = tmp_path / f"{size}.mlpackage"
        linear_quantize_activations(
            source,
            OpLinearQuantizerConfig(),
            samples_of(source),
            size,
            calibration=calibration,
            destination=path,
        )
        texts.append(Package(path).model_bytes)
    assert texts[0] == texts[1] == texts[2]


def test_all_samples_count_not_only_the_last(net):
    source = net("cnn")
    samples = samples_of(source)
    report = linear_quantize_activations(
        source, OpLinearQuantizerConfig(), samples
    ).activation_report
    (first,) = [each for each in report.activations if each.name == "x"]
    values = np.float16([sample["x"] for sample in samples])
    assert (first.low, first.high) == (values.min(), values.max()) or (
        # samples are rounded to float16 by the scale alone
        np.float16([first.low, first.high]) == [values.min(), values.max()]
    ).all()
    assert report.n_samples == 3


def test_all_that_chains_of_concats_join_has_one_range(net):
    source = net("grown")
    report = linear_quantize_activations(
        source, OpLinearQuantizerConfig(), samples_of(source)
    ).activation_report
    assert len({(each.low, each.high) for each in report.activations}) == 1
    assert {"x", "r0", "joined0", "joined1"} <= {each.name for each in report.activations}


def decibels(expected: Any, got: Any) -> float:
    return float(10 * np.log10(np.square(expected).sum() / np.square(expected - got).sum()))


def test_ops_in_nested_blocks_are_quantized_where_they_stand(net, tmp_path):
    source = net("branches", "iOS17")
    path = tmp_path / "out.mlpackage"
    rng = np.random.default_rng(0)
    samples = [
        {"x": rng.standard_normal((2, 16)).astype(np.float32), "flag": [flag]}
        for flag in (1.0, 0.0, 1.0)
    ]
    linear_quantize_activations(source, OpLinearQuantizerConfig(), samples, destination=path)
    ours.verify(source, path)
    (graph,) = Package(path).graphs
    outer, true, false = [scope.block.operations for scope in graph.scopes]
    kinds = [[op.type for op in ops if op.type != "const"] for ops in (outer, true, false)]
    pair = ["quantize", "dequantize"]
    # What is made outside is quantized there, and dequantized where it is used.
    assert kinds[0] == [*pair, "linear", "quantize", "cast", "squeeze", "cond", "tanh"]
    assert kinds[1] == [
        *["dequantize", "linear", "relu"],
        *[*pair, "linear"],
        *[*pair, "add"],
    ]
    assert kinds[2] == ["dequantize", "linear"]
    decoded_by_coremltools(path)  # loads and type-checks
    dense, coded = interpreter.load(source), interpreter.load(path)
    for sample in samples:
        # A step is 2 / 254 of the range: some 40 dB for each of at most four values on the way.
        assert decibels(dense(**sample)["y"], coded(**sample)["y"]) > 28


def test_weights_and_activations_of_8_bits_load_in_coremltools_and_verify(net, tmp_path):
    source = net("cnn")
    a8, w8a8 = tmp_path / "a8.mlpackage", tmp_path / "w8a8.mlpackage"
    config = OptimizationConfig(OpLinearQuantizerConfig(weight_threshold=16))
    linear_quantize_activations(source, config, samples_of(source), destination=a8)
    linear_quantize_weights(a8, config, destination=w8a8)
    assert ours.verify(source, a8).n_quantized == len(ActivationRecord.of(Package(a8).model).pairs)
    assert ours.verify(a8, w8a8).n_quantized == 0
    both = ours.verify(source, w8a8)
    assert both.n_quantized > 0
    assert len(both.weights) == 5
    decoded_by_coremltools(w8a8)
    back = tmp_path / "back.mlpackage"
    ours.decompress(w8a8, back)
    assert ours.verify(w8a8, back).n_quantized == 0
    assert ActivationRecord.of(Package(back).model) == ActivationRecord.of(Package(a8).model)


def test_compressing_weights_first_gives_the_same_placement(net, tmp_path):
    source = net("cnn")
    config = OptimizationConfig(OpLinearQuantizerConfig(weight_threshold=16))
    w8 = tmp_path / "w8.mlpackage"
    linear_quantize_weights(source, config, destination=w8)
    kinds = [
        [op[:3] for op in ops_in(linear_quantize_activations(path, config, samples_of(source)))]
        for path in (source, w8)
    ]
    assert [op[0] for op in kinds[0]] == [op[0] for op in kinds[1]]


def test_quantizing_twice_changes_nothing(net, tmp_path):
    source = net("cnn")
    once, twice = tmp_path / "once.mlpackage", tmp_path / "twice.mlpackage"
    samples = samples_of(source)
    linear_quantize_activations(source, OpLinearQuantizerConfig(), samples, destination=once)
    linear_quantize_activations(once, OpLinearQuantizerConfig(), samples, destination=twice)
    assert Package(once).model_bytes == Package(twice).model_bytes


def edited(path: Path, out: Path, change: Any) -> Path:
    """Write a package whose model was changed."""

    shutil.copytree(path, out)
    package = Package(out)
    (graph,) = package.graphs
    change(package, graph)
    package.model_path.write_bytes(package.model.SerializeToString(deterministic=True))
    return out


def first(graph: Any, kind: str) -> Any:
    return next(node for node in graph.nodes if node.op.type == kind)


def change_scale(value: float) -> Any:
    def change(package: Package, graph: Any) -> None:
        for kind in ("quantize", "dequantize"):
            stored = graph.constant(first(graph, kind), "scale")
            stored.immediateValue.tensor.bytes.values = np.float16(value).tobytes()

    return change


def change_one_scale(package: Package, graph: Any) -> None:
    stored = graph.constant(first(graph, "dequantize"), "scale")
    stored.immediateValue.tensor.bytes.values = np.float16(1.5).tobytes()


def change_another_op(package: Package, graph: Any) -> None:
    relu = first(graph, "relu")
    relu.op.type = "relu6"


def bypass(package: Package, graph: Any) -> None:
    """Let an op behind a pair use another value than the one that is quantized."""
    *_, node = (node for node in graph.nodes if node.op.type == "conv")
    node.op.inputs["x"].arguments[0].name = first(graph, "dequantize").name


def lose_a_pair(package: Package, graph: Any) -> None:
    found = ActivationRecord.of(package.model)
    found.pairs["nowhere"] = "quantize_0"
    found.write(package.model)


def forget_a_pair(package: Package, graph: Any) -> None:
    found = ActivationRecord.of(package.model)
    found.pairs.pop(next(iter(found.pairs)))
    found.write(package.model)


@pytest.mark.parametrize(
    "change",
    [
        change_scale(0),
        change_scale(np.inf),
        change_scale(-1),
        change_one_scale,
        change_another_op,
        bypass,
        lose_a_pair,
        forget_a_pair,
    ],
    ids=lambda change: change.__name__,
)
def test_what_was_not_inserted_as_recorded_does_not_verify(net, tmp_path, change):
    source = net("cnn")
    out = tmp_path / "a8.mlpackage"
    linear_quantize_activations(
        source, OpLinearQuantizerConfig(), samples_of(source), destination=out
    )
    ours.verify(source, out)
    broken = edited(out, tmp_path / "broken.mlpackage", change)
    with pytest.raises(VerificationError):
        ours.verify(source, broken)


def test_a_name_may_be_left_out_for_a_model_with_one_input(net):
    source = net("cnn")
    samples = samples_of(source)
    by_name = linear_quantize_activations(source, OpLinearQuantizerConfig(), samples)
    nameless = [{None: sample["x"]} for sample in samples]
    by_none = linear_quantize_activations(source, OpLinearQuantizerConfig(), iter(nameless))
    assert ops_in(by_name) == ops_in(by_none)
    assert list(nameless[0]) == [None]
    with pytest.raises(InputError, match="multiple inputs"):
        linear_quantize_activations(net("mlp"), OpLinearQuantizerConfig(), nameless)


def test_an_iOS16_model_is_raised_to_iOS17(net, tmp_path):  # noqa: N802
    source = net("grown", "iOS16")
    out = tmp_path / "out.mlpackage"
    made = linear_quantize_activations(
        source, OpLinearQuantizerConfig(), samples_of(source), destination=out
    )
    assert made.activation_report.notes == ("raised from iOS16 to iOS17",)
    assert made.get_spec().specificationVersion == 8
    ours.verify(source, out)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"config": OpLinearQuantizerConfig(dtype="int4")}, ConfigError),
        ({"config": OpPalettizerConfig(nbits=4)}, ConfigError),
        ({"sample_data": []}, InputError),
        ({"sample_data": [{"y": np.zeros((1, 3, 12, 12))}]}, InputError),
        ({"sample_data": [{"x": np.zeros((1, 3, 12, 13))}]}, InputError),
        ({"calibration": "most"}, ConfigError),
        ({"calibration_op_group_size": 0}, ConfigError),
        ({"function": "other"}, ConfigError),
    ],
    ids=str,
)
def test_bad_settings_have_a_clear_error(net, change, error):
    source = net("cnn")
    settings = {"config": OpLinearQuantizerConfig(), "sample_data": samples_of(source)} | change
    with pytest.raises(error, match=r"(?i)must|only accept|give at least one"):
        linear_quantize_activations(source, **settings)


def test_the_old_names_still_work_and_say_that_they_are_old(net):
    source = net("grown")
    old = ours.coreml.experimental
    config = OptimizationConfig(old.OpActivationLinearQuantizerConfig(mode="linear"))
    with pytest.warns(FutureWarning, match="linear_quantize_activations"):
        made = old.linear_quantize_activations(source, config, samples_of(source))
    new = OptimizationConfig(OpLinearQuantizerConfig(mode="linear"))
    assert ops_in(made) == ops_in(linear_quantize_activations(source, new, samples_of(source)))


def test_values_that_no_sample_computes_are_left_and_named(net, tmp_path, caplog):
    source = net("branches", "iOS17")
    out = tmp_path / "out.mlpackage"
    sample = {"x": np.ones((2, 16)), "flag": [0.0]}
    report = linear_quantize_activations(
        source, OpLinearQuantizerConfig(), [sample], destination=out
    ).activation_report
    left = {each.name for each in report.activations if each.note}
    assert left == {"inner_relu", "inner2"}
    assert "inner2: no sample gave it a finite value; it is not quantized" in caplog.text
    ours.verify(source, out)


def test_progress_is_told_sample_by_sample(net):
    source = net("grown")
    told: list[tuple[int, int]] = []
    linear_quantize_activations(
        source,
        OpLinearQuantizerConfig(),
        samples_of(source),
        progress=lambda done, total, _: told.append((done, total)),
    )
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]


def calibration_file(source: Path, path: Path) -> Path:
    samples = samples_of(source)
    np.savez(path, **{name: np.stack([s[name] for s in samples]) for name in samples[0]})
    return path


def test_the_command_line_and_a_recipe_do_the_same_as_the_function(net, tmp_path):
    source = net("cnn")
    data = calibration_file(source, tmp_path / "data.npz")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "steps:\n"
        "  - quantize_activations: {dtype: int8, calibration: mse}\n"
        "    rules: [{op_types: [add], keep: true}]\n"
        "  - quantize: {dtype: int8}\n"
        "    select: {min_size: 17}\n"
    )
    out = tmp_path / "out.mlpackage"
    arguments = ["compress", source, out, "--recipe", recipe, "--calibration-data", data, "--json"]
    made = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert made.exit_code == 0, made.output
    report = json.loads(made.stdout)
    assert report["verified"]
    assert report["compressed"] == 5
    config = OptimizationConfig(OpLinearQuantizerConfig(weight_threshold=16))
    chosen = OptimizationConfig(OpLinearQuantizerConfig(), op_type_configs={"add": None})
    a8 = linear_quantize_activations(source, chosen, samples_of(source), calibration="mse")
    same = tmp_path / "same.mlpackage"
    linear_quantize_weights(a8, config, destination=same)
    assert Package(out).model_bytes == Package(same).model_bytes
    again = ours.Recipe.from_yaml(recipe)
    assert ours.Recipe.from_dict(again.to_dict()) == again
    found = CliRunner().invoke(app, ["verify", str(source), str(out)])
    assert found.exit_code == 0
    assert "quantized activations" in found.stdout


def test_the_same_samples_serve_weights_and_activations(net, tmp_path):
    source = net("cnn")
    recipe = ours.Recipe.from_dict(
        {
            "steps": [
                {"quantize_activations": {"dtype": "int8"}},
                {"palettize": {"bits": 2}, "select": {"min_size": 17}},
            ]
        }
    )
    packages = {}
    for name, data in (
        ("listed", samples_of(source)),
        ("once", iter(samples_of(source))),
        ("others", samples_of(source, seed=1)),
    ):
        out = tmp_path / f"{name}.mlpackage"
        report = ours.compress(source, out, recipe, sample_data=data)
        assert report.activations is not None
        assert report.activations.n_samples == 3
        assert "calibrated with 3 samples" in report.notes
        packages[name] = Package(out)
    weights = {
        name: package.weight_path("@model_path/weights/weight.bin").read_bytes()
        for name, package in packages.items()
    }
    assert packages["listed"].model_bytes == packages["once"].model_bytes
    assert weights["listed"] == weights["once"]
    assert weights["listed"] != weights["others"]


def test_moments_alone_do_not_quantize_activations(net, tmp_path):
    source = net("cnn")
    recipe = ours.Recipe.from_dict({"steps": [{"quantize_activations": {"dtype": "int8"}}]})
    moments = ours.calibrate(source, samples_of(source))
    out = tmp_path / "out.mlpackage"
    with pytest.raises(ConfigError, match="needs the samples themselves, not statistics of them"):
        ours.compress(source, out, recipe, sample_data=moments)
    assert not out.exists()


def test_options_that_do_not_go_together_are_refused(net, tmp_path):
    source = net("cnn")
    data = calibration_file(source, tmp_path / "data.npz")
    out = tmp_path / "out.mlpackage"
    for arguments in (
        ["--quantize-activations", "int8"],
        ["--quantize-activations", "int4", "--calibration-data", str(data)],
        ["--quantize", "int8", "--calibration", "mse"],
    ):
        made = CliRunner().invoke(app, ["compress", str(source), str(out), *arguments])
        assert isinstance(made.exception, CompressionError), made.output
        assert not out.exists()


def test_a_model_with_nothing_to_quantize_is_an_error(build, tmp_path):
    source = build("lookup", "iOS18")
    step = ours.recipe.ActivationStep(select=ours.recipe.Select(op_types=("conv",)))
    recipe = ours.Recipe(steps=(), activations=step)
    with pytest.raises(UnsupportedError):
        ours.compress(
            source,
            tmp_path / "out.mlpackage",
            recipe,
            sample_data=ours.RandomSamples(1),
        )


def digits_model(path: Path) -> tuple[Path, Any, Any]:
    """Train a small network on scikit-learn's digits; return its package and the held-out part."""
    import torch
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 1, 8, 8) / 16).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(images))
    train, test = order[:1200], order[1200:]
    torch.manual_seed(0)

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.nn.Conv2d(1, 16, 3, padding=1)
            self.b = torch.nn.Conv2d(16, 16, 3, padding=1)
            self.c = torch.nn.Linear(16 * 16, 10)

        def forward(self, x: Any) -> Any:
            x = torch.relu(self.a(x))
            x = torch.relu(self.b(x) + x)
            x = torch.nn.functional.max_pool2d(x, 2)
            return self.c(x.flatten(1))

    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(12):
        for batch in torch.randperm(len(train)).split(50):
            x = torch.from_numpy(images[train][batch])
            y = torch.from_numpy(labels[train][batch])
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
    traced = torch.jit.trace(net.eval(), torch.zeros(1, 1, 8, 8))
    model = ct.convert(
        traced,
        inputs=[ct.TensorType("x", (1, 1, 8, 8))],
        minimum_deployment_target=ct.target.iOS17,
        classifier_config=ct.ClassifierConfig(list(range(10))),
        skip_model_load=True,
    )
    model.save(str(path))
    return path, images[test], labels[test]


def accuracy(path: Any, images: Any, labels: Any) -> float:
    run = interpreter.load(path)
    (name,) = [feature.name for feature in run.outputs if feature.kind == "number"]
    return float(np.mean([run(x=image[None])[name] for image in images] == labels))


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return digits_model(tmp_path_factory.mktemp("digits") / "digits.mlpackage")


@pytest.mark.parametrize("calibration", ["minmax", "percentile", "mse", "entropy"])
def test_8_bits_for_weights_and_activations_keep_the_accuracy(digits, tmp_path, calibration):
    source, images, labels = digits
    a8, w8a8 = tmp_path / "a8.mlpackage", tmp_path / "w8a8.mlpackage"
    linear_quantize_activations(
        source,
        OpLinearQuantizerConfig(),
        [{"x": image[None]} for image in images[:64]],
        calibration=calibration,
        destination=a8,
    )
    linear_quantize_weights(
        a8, OptimizationConfig(OpLinearQuantizerConfig(weight_threshold=16)), destination=w8a8
    )
    decoded_by_coremltools(w8a8)
    unseen = images[64:], labels[64:]
    before, after = accuracy(source, *unseen), accuracy(w8a8, *unseen)
    assert before > 0.95
    assert after >= before - 0.01


def test_one_function_of_several_is_quantized_and_the_others_stay(net, tmp_path):
    description = ct.utils.MultiFunctionDescriptor()
    for name, kind in (("first", "cnn"), ("second", "mlp")):
        description.add_function(str(net(kind, "iOS18")), "main", name)
    description.default_function_name = "first"
    source, out = tmp_path / "source.mlpackage", tmp_path / "out.mlpackage"
    ct.utils.save_multifunction(description, str(source))
    for function, kind, other in (("second", "mlp", "first"), (None, "cnn", "second")):
        linear_quantize_activations(
            source,
            OpLinearQuantizerConfig(),
            samples_of(net(kind, "iOS18")),
            function=function,
            destination=out,
        )
        ours.verify(source, out)
        before, after = (Package(path).model.mlProgram.functions for path in (source, out))
        kinds = {
            name: [op.type for op in made.block_specializations[made.opset].operations]
            for name, made in after.items()
        }
        assert "quantize" in kinds[function or "first"]
        same = before[other].block_specializations["CoreML8"].operations
        assert kinds[other] == [op.type for op in same]

        shutil.rmtree(out)


def test_every_model_of_a_pipeline_is_quantized(net, tmp_path):
    path = net("grown", "iOS18")
    first = model_of(path)
    second = tmp_path / "second.mlpackage"

    @program("iOS18", np.float16, y=(1, 16))
    def prog(y: Any) -> Any:
        return mb.relu(x=mb.linear(x=y, weight=weight(8, 16), name="head"), name="z")

    save(prog, second, "iOS18")
    source, out = tmp_path / "source.mlpackage", tmp_path / "out.mlpackage"
    ct.utils.make_pipeline(first, model_of(second)).save(str(source))
    samples = samples_of(source)
    report = linear_quantize_activations(
        source, OpLinearQuantizerConfig(), samples, destination=out
    ).activation_report
    places = {each.name.rpartition("/")[0] for each in report.activations}
    assert len(places) == 2
    ours.verify(source, out)
    dense, coded = interpreter.load(source)(**samples[0]), interpreter.load(out)(**samples[0])
    # Some 40 dB for a step of 2 / 254 of the range, for each of at most eight values on the way.
    assert decibels(dense["z"], coded["z"]) > 25
