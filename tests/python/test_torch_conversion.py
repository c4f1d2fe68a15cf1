"""Compressed modules in Core ML, by ct.convert from their buffers and by milpress.torch.convert."""

from __future__ import annotations

import copy

import coremltools as ct
import numpy as np
import pytest
import torch
from coremltools.optimize.torch import palettization as reference
from oracles import decoded, decoded_by_coremltools, decompressed_by_coremltools
from torch import nn
from torch_models import IDS, layers

import milpress as cto
from milpress.errors import ConfigError, ConfigTypeError, DestinationError, UnsupportedError
from milpress.formats import (
    Blocks,
    PalettizeConfig,
    PerTensor,
    PruneConfig,
    QuantizeConfig,
    compress,
)
from milpress.interpreter import load
from milpress.mil.package import Package
from milpress.torch import _relayout
from milpress.torch._module_weights import weights_of
from milpress.torch.registration import KINDS

P, Q = cto.torch.palettization, cto.torch.quantization

GROUPS = {"granularity": "per_grouped_channel", "group_size": 8}
SETTINGS = {
    "4 bits in groups": (P.PostTrainingPalettizer, GROUPS),
    "vectors": (P.PostTrainingPalettizer, {"cluster_dim": 2}),
    "3 bits with scales": (
        P.PostTrainingPalettizer,
        {"n_bits": 3, "enable_per_channel_scale": True},
    ),
    "int8 tables with scales": (
        P.PostTrainingPalettizer,
        {"n_bits": 3, "enable_per_channel_scale": True, "lut_dtype": "int8"},
    ),
    "int8": (Q.PostTrainingQuantizer, {}),
    "uint4 affine in blocks": (
        Q.PostTrainingQuantizer,
        {
            "weight_dtype": "uint4",
            "quantization_scheme": "affine",
            "granularity": "per_block",
            "block_size": 8,
        },
    ),
    "int4 clipped": (Q.PostTrainingQuantizer, {"weight_dtype": "int4", "range": "mse"}),
}


BY_BOTH = ("4 bits in groups", "uint4 affine in blocks")  # export is slow, and knows no kinds


def compressed(kind: str, model: nn.Module) -> nn.Module:
    optimizer, settings = SETTINGS[kind]
    config = optimizer._config_class.from_dict({"global_config": settings})
    optimizer(model, config).compress(inplace=True)
    return model


def by_coremltools(model: nn.Module, frontend: str):
    if frontend == "export":
        program = torch.export.export(model, (IDS,)).run_decompositions({})
        settings = {}
    else:
        torch.backends.mha.set_fastpath_enabled(False)
        program = torch.jit.trace(model, IDS)
        torch.backends.mha.set_fastpath_enabled(True)
        settings = {"inputs": [ct.TensorType(shape=IDS.shape, dtype=np.int32)]}
    return ct.convert(
        program, minimum_deployment_target=ct.target.iOS18, skip_model_load=True, **settings
    )


def compressed_weights(path) -> dict[str, np.ndarray]:
    """Return the weights of a package that it does not store densely."""
    package = Package(path)
    names = {
        weight.name for graph in package.graphs for weight in graph.weights if weight.is_compressed
    }
    return {name: value for name, value in decoded(path).items() if name in names}


def assert_held(model: nn.Module, found: dict[str, np.ndarray], *, exact: bool) -> None:
    """Check that each weight of a module is one of those found."""
    for weight in weights_of(model, KINDS):
        own = weight.tensor.detach().float().numpy()
        others = [value for value in found.values() if value.shape == own.shape]
        if exact:
            assert any(np.array_equal(own.astype(np.float16), value) for value in others)
            continue
        # A scale and its product with a code are rounded to float16, and so may be an offset's
        # part of it; below the normal numbers the error is absolute.
        tolerance = 3 * 2.0**-11 * np.abs(own).max() + 2.0**-24
        assert any((np.abs(own - value) <= tolerance).all() for value in others), weight.name


WAYS = [
    pytest.param(
        kind,
        frontend,
        marks=[pytest.mark.large] if frontend == "export" and kind not in BY_BOTH else [],
    )
    for kind in SETTINGS
    for frontend in ("export", "trace")
]


@pytest.mark.parametrize(("kind", "frontend"), WAYS)
def test_ct_convert_makes_constexpr_ops_of_the_buffers(kind, frontend, tmp_path):
    model = compressed(kind, layers(recurrent=False))
    made = by_coremltools(model, frontend)
    made.save(str(tmp_path / "model.mlpackage"))
    found = compressed_weights(tmp_path / "model.mlpackage")
    assert len(found) == len(list(weights_of(model, KINDS)))
    assert_held(model, found, exact=False)


@pytest.mark.parametrize(("kind", "frontend"), WAYS)
def test_convert_stores_every_weight_as_it_is(kind, frontend, tmp_path):
    model = compressed(kind, layers(recurrent=False))
    path = tmp_path / "model.mlpackage"
    made = cto.torch.convert(model, (IDS,), path, frontend=frontend)
    report = made.compression_report
    assert [weight.name for weight in report.weights] == [w.name for w in weights_of(model, KINDS)]
    assert {weight.status for weight in report.weights} == {"compressed"}
    found = compressed_weights(path)
    assert len(found) == len(report.weights)
    assert_held(
        model,
        found,
        exact="palettizer" in SETTINGS[kind][0].__name__.lower() and "int8" not in kind,
    )
    # coremltools decodes chains of ops only as a whole.
    decode = decompressed_by_coremltools if "tables" in kind else decoded_by_coremltools
    theirs = decode(path)
    for name, value in found.items():
        assert value.tobytes() == np.ascontiguousarray(theirs[name]).tobytes(), name


@pytest.mark.parametrize(
    "kind",
    [kind if kind in BY_BOTH else pytest.param(kind, marks=pytest.mark.large) for kind in SETTINGS],
)
def test_convert_finds_the_weights_of_recurrent_layers_in_other_orders_and_parts(kind):
    model = compressed(kind, nn.Sequential(layers().recurrent[0], layers().recurrent[1]))
    made = cto.torch.convert(model, (torch.rand(12, 1, 32),))
    report = made.compression_report
    assert len(report.weights) == 6
    assert {weight.status for weight in report.weights} == {"compressed"}
    for weight in report.weights:
        assert weight.snr_db > 60
    n_rows = {len(value) for value in compressed_weights(made.package_path).values()}
    assert n_rows == {64, 32}  # an LSTM's four gates of 16 together, a GRU's of 32 one by one


class Pooled(nn.Module):
    """Attention of two tokens to others, whose projections are split."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x[:, :2], x, x, need_weights=False)[0]


@pytest.mark.parametrize("kind", BY_BOTH)
@pytest.mark.parametrize("frontend", ["export", "trace"])
def test_the_projections_of_cross_attention_are_found_in_their_parts(kind, frontend):
    model = compressed(kind, Pooled())
    made = cto.torch.convert(model, (torch.rand(1, 12, 32),), frontend=frontend)
    report = made.compression_report
    assert {weight.status for weight in report.weights} == {"compressed"}
    found = compressed_weights(made.package_path)
    assert sorted(len(value) for value in found.values()) == [32, 32, 64]
    projection = model.attention.in_proj_weight.detach().numpy().astype(np.float16)
    both = np.concatenate([v for name, v in found.items() if "out_proj" not in name])
    tolerance = 2.0**-9 * np.abs(projection).max()
    assert (np.abs(np.sort(both, 0) - np.sort(projection, 0)) <= tolerance).all()


@pytest.mark.parametrize("kind", BY_BOTH)
@pytest.mark.parametrize("recurrent", [False, True])
def test_a_converted_model_computes_what_the_compressed_module_does(kind, recurrent, tmp_path):
    model = compressed(kind, layers(recurrent=recurrent))
    path = tmp_path / "model.mlpackage"
    cto.torch.convert(model, (IDS,), path, compute_precision=ct.precision.FLOAT32)
    program = load(path)
    (name,) = (item.name for item in program.inputs)
    (found,) = program(**{name: IDS.numpy().astype(np.int32)}).values()
    with torch.no_grad():
        expected = model(IDS).numpy()
    error = np.asarray(found, np.float64).reshape(expected.shape) - expected
    # 60 dB: the same weights in the same precision, some thousand additions in another order.
    assert np.square(error).sum() < 1e-6 * np.square(expected.astype(np.float64)).sum()


def test_the_module_is_as_before(tmp_path):
    model = compressed("int8", layers(recurrent=False)).train()
    state = copy.deepcopy(model.state_dict())
    cto.torch.convert(model, (IDS,))
    assert list(model.state_dict()) == list(state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
    assert model.training
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_modules_of_16_bits_convert_without_loss(dtype, tmp_path):
    model = compressed("4 bits in groups", nn.Sequential(nn.Linear(32, 32), nn.ReLU()).to(dtype))
    path = tmp_path / "model.mlpackage"
    cto.torch.convert(model, (torch.rand(2, 32, dtype=dtype),), path)
    assert_held(model, compressed_weights(path), exact=True)
    assert model[0].weight.dtype == dtype


def test_a_model_of_float32_holds_the_very_weights(tmp_path):
    model = compressed("uint4 affine in blocks", nn.Sequential(nn.Linear(32, 32)))
    path = tmp_path / "model.mlpackage"
    cto.torch.convert(model, (torch.rand(2, 32),), path, compute_precision=ct.precision.FLOAT32)
    (value,) = compressed_weights(path).values()
    np.testing.assert_array_equal(value, model[0].weight.detach().numpy())


def test_an_early_target_holds_what_it_can_and_refuses_the_rest_by_name():
    early = {"minimum_deployment_target": ct.target.iOS16}
    inputs = (torch.rand(2, 32),)
    for kind, word in (
        ("4 bits in groups", "groups of channels"),
        ("uint4 affine in blocks", "4 bits"),
        ("int8 tables with scales", "groups of channels"),
    ):
        model = compressed(kind, nn.Sequential(nn.Linear(32, 32)))
        with pytest.raises(ConfigError, match=f"^0.weight: {word}.* iOS18"):
            cto.torch.convert(model, inputs, **early)
    for optimizer in (P.PostTrainingPalettizer, Q.PostTrainingQuantizer):
        model = optimizer(nn.Sequential(nn.Linear(32, 32))).compress()
        made = cto.torch.convert(model, inputs, **early)
        assert made.compression_report.weights[0].status == "compressed"


def test_batch_normalization_is_not_folded_into_a_compressed_weight(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16)).eval()
    with torch.no_grad():
        model[1].running_var.uniform_(1, 9)
    path = tmp_path / "model.mlpackage"
    cto.torch.convert(compressed("int8", model), (torch.rand(1, 8, 5, 5),), path)
    assert_held(model, compressed_weights(path), exact=False)


def test_a_folded_weight_is_in_the_report_as_it_is_in_the_model():
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 8, 3)).eval()
    with torch.no_grad():
        model[1].running_var.uniform_(1, 9)
    made = cto.torch.convert(
        compressed("int8", model),
        (torch.rand(1, 8, 5, 5),),
        pass_pipeline=ct.PassPipeline.DEFAULT,
    )
    first, second = made.compression_report.weights
    assert (first.status, first.note) == ("left", "no constant of the converted model holds it")
    assert second.status == "compressed"


def test_a_weight_whose_tables_would_be_larger_is_left_with_the_reason():
    model = compressed("3 bits with scales", nn.Sequential(nn.Conv2d(32, 32, 2, groups=32)))
    made = cto.torch.convert(model, (torch.rand(1, 32, 5, 5),))
    (weight,) = made.compression_report.weights
    assert weight.status == "left"
    assert "compressed it would be larger" in weight.note


def test_a_weight_whose_scales_vanish_in_float16_stays_dense():
    layer = nn.Linear(64, 64)
    with torch.no_grad():
        layer.weight.normal_(0, 1e-6)
    made = cto.torch.convert(compressed("int8", nn.Sequential(layer)), (torch.rand(2, 64),))
    (weight,) = made.compression_report.weights
    assert weight.status == "left"
    assert "scales are too small for float16" in weight.note


def test_vectors_that_a_recurrent_layer_takes_apart_stay_dense():
    # 3 gates of 6 rows each, in parts: vectors of 9 rows reach from one into the next.
    model = nn.GRU(16, 6)
    config = P.PostTrainingPalettizerConfig.from_dict(
        {"global_config": None, "module_type_configs": {"GRU": {"n_bits": 1, "cluster_dim": 2}}}
    )
    made = cto.torch.convert(
        P.PostTrainingPalettizer(model, config).compress(), (torch.rand(4, 1, 16),)
    )
    assert {weight.status for weight in made.compression_report.weights} == {"compressed"}
    config.module_type_configs[nn.GRU].cluster_dim = 9
    made = cto.torch.convert(
        P.PostTrainingPalettizer(model, config).compress(), (torch.rand(4, 1, 16),)
    )
    for weight in made.compression_report.weights:
        assert weight.status == "left"
        assert "takes its vectors apart" in weight.note


def test_a_pruned_and_palettized_weight_becomes_a_chain(tmp_path):
    layer = nn.Linear(64, 64)
    with torch.no_grad():
        layer.weight[layer.weight.abs() < 0.06] = 0
    layer.register_buffer("_COREML_/weight/compression_type", torch.tensor([1]))
    model = compressed("4 bits in groups", nn.Sequential(layer))
    path = tmp_path / "model.mlpackage"
    made = cto.torch.convert(model, (torch.rand(2, 64),), path)
    assert made.compression_report.weights[0].treatment == "pruned, 4 bits, 8 tables"
    (value,) = compressed_weights(path).values()
    np.testing.assert_array_equal(value == 0, layer.weight.detach().numpy() == 0)
    assert_held(model, compressed_weights(path), exact=True)


def test_a_tied_weight_is_stored_once(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(64, 32)
            self.head = nn.Linear(32, 64, bias=False)
            self.head.weight = self.words.weight

        def forward(self, ids):
            return self.head(self.words(ids))

    path = tmp_path / "model.mlpackage"
    cto.torch.convert(compressed("4 bits in groups", Tied()), (IDS,), path)
    dense = 64 * 32 * 2
    assert sum(f.stat().st_size for f in path.rglob("weight*.bin")) < dense


def test_what_coremltools_compressed_converts_too(tmp_path):
    model = reference.PostTrainingPalettizer(nn.Sequential(nn.Linear(32, 32))).compress()
    path = tmp_path / "model.mlpackage"
    cto.torch.convert(model, (torch.rand(2, 32),), path)
    assert_held(model, compressed_weights(path), exact=True)


def test_wrong_arguments_are_refused_before_any_work(tmp_path):
    model = compressed("int8", nn.Sequential(nn.Linear(32, 32)))
    inputs = (torch.rand(2, 32),)
    with pytest.raises(ConfigError, match="frontend must be"):
        cto.torch.convert(model, inputs, frontend="onnx")
    with pytest.raises(ConfigError, match="convert_to must be"):
        cto.torch.convert(model, inputs, convert_to="neuralnetwork")
    with pytest.raises(ConfigTypeError, match="must be a tuple"):
        cto.torch.convert(model, inputs[0])
    with pytest.raises(UnsupportedError, match="no weight of the module is compressed"):
        cto.torch.convert(nn.Linear(4, 4), inputs)
    (tmp_path / "taken").mkdir()
    with pytest.raises(DestinationError):
        cto.torch.convert(model, inputs, tmp_path / "taken")
    with torch.no_grad():
        model[0].weight += 1e-3
    with pytest.raises(UnsupportedError, match=r"^0\.weight: .* as it was when it was compressed"):
        cto.torch.convert(model, inputs)


rng = np.random.default_rng(0)
MATRIX = (rng.standard_normal((24, 16)) * 0.1).astype(np.float32)
VALUES = {
    "palette": [PalettizeConfig(bits=3, group_size=6)],
    "vectors of rows": [PalettizeConfig(bits=3, vector_size=2)],
    "vectors of columns": [PalettizeConfig(bits=2, vector_size=4, channel_axis=1)],
    "quantized": [QuantizeConfig(dtype="uint4", offset=True, granularity=Blocks((3, 8)))],
    "sparse": [PruneConfig(sparsity=0.5)],
    "masked": [PruneConfig(sparsity=0.5), PalettizeConfig(bits=4, group_size=12)],
    "quantized table": [
        PalettizeConfig(bits=4, group_size=12),
        QuantizeConfig(granularity=PerTensor()),
    ],
}


def made_of(kind: str):
    value = MATRIX
    for treatment in VALUES[kind]:
        value = compress(value, treatment)
    return value


@pytest.mark.parametrize("kind", VALUES)
def test_a_value_transposed_is_that_of_the_transposed_weight(kind):
    value = made_of(kind)
    np.testing.assert_array_equal(_relayout.transposed(value).dense(), value.dense().T)


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize(
    "rows",
    [np.r_[12:18, 0:6, 18:24, 6:12], np.r_[6:12], np.r_[20:24, 0:2], np.arange(24)],
    ids=["gates", "a gate", "across groups", "as they are"],
)
def test_rows_of_a_value_are_the_rows_of_its_weight(kind, rows):
    value = made_of(kind)
    np.testing.assert_array_equal(_relayout.taken(value, rows).dense(), value.dense()[rows])


def test_vectors_are_not_taken_apart():
    with pytest.raises(UnsupportedError, match="takes its vectors apart"):
        _relayout.taken(made_of("vectors of rows"), np.arange(24)[::-1].copy())


def test_a_table_beyond_float16_is_refused():
    value = compress(MATRIX * np.float32(1e6), PalettizeConfig())
    with pytest.raises(UnsupportedError, match="beyond the range of float16"):
        _relayout.cast(value, np.float16)
