"""PostTrainingPalettizer: tables, codes, buffers and reports of every kind of module."""

from __future__ import annotations

import copy
import logging

import numpy as np
import pytest
import torch
from coremltools.optimize.torch import palettization as reference
from coremltools.optimize.torch._utils.metadata_utils import CompressionMetadata
from torch import nn
from torch.nn.utils import parametrizations
from torch_models import layers

import milpress as cto
from milpress.errors import UnsupportedError
from milpress.formats import Masked, Quantized
from milpress.torch import _metadata
from milpress.torch._module_weights import ModuleWeight, weights_of
from milpress.torch.registration import KINDS

P = cto.torch.palettization


def palettize(model: nn.Module, home=P, **settings):
    """Return a palettized copy of a model, and the report."""
    config = home.PostTrainingPalettizerConfig.from_dict({"global_config": settings})
    palettizer = home.PostTrainingPalettizer(model, config)
    return palettizer.compress(), palettizer.report()


def weight(model: nn.Module, name: str) -> np.ndarray:
    return model.get_parameter(name).detach().float().numpy()


def table(model: nn.Module, name: str) -> np.ndarray:
    module, _, parameter = name.rpartition(".")
    return model.get_submodule(module).get_buffer(f"_COREML_/{parameter}/lut").numpy()


# What must come out of a group of channels, whatever the kind of module.
SETTINGS = {
    "4 bits": {},
    "3 bits in groups": {
        "n_bits": 3,
        "granularity": "per_grouped_channel",
        "group_size": 16,
    },
    "groups of inputs": {
        "granularity": "per_grouped_channel",
        "group_size": 16,
        "channel_axis": 1,
    },
    "vectors": {"n_bits": 3, "cluster_dim": 2},
    "vectors of inputs in groups": {
        "n_bits": 2,
        "cluster_dim": 4,
        "channel_axis": 1,
        "granularity": "per_grouped_channel",
        "group_size": 16,
    },
    "scales": {"n_bits": 2, "enable_per_channel_scale": True},
    "int8 tables": {"lut_dtype": "int8", "granularity": "per_grouped_channel", "group_size": 16},
    "uint8 tables with scales": {
        "n_bits": 2,
        "lut_dtype": torch.uint8,
        "enable_per_channel_scale": True,
    },
    "1 bit": {"n_bits": 1},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_what_the_buffers_say_is_exactly_what_the_weights_are(dtype, settings):
    model, report = palettize(layers().to(dtype), **settings)
    asked = [w.name for w in weights_of(model, KINDS)]
    assert list(report) == asked
    for found in weights_of(model, KINDS):
        if found.name in report.left:
            # Grouped convolution, 16 inputs of a group: one group of 16 is the whole axis.
            assert "divide" in report.left[found.name]
            continue
        stored = _metadata.read(found)  # which compares each element
        assert found.tensor.dtype == dtype
        n_values = stored.value.lut.shape[-2]
        assert n_values == 2 ** settings.get("n_bits", 4)
    assert len(report.left) <= 2


def distances(values: np.ndarray, lut: np.ndarray) -> np.ndarray:
    return np.abs(values.astype(np.float64).reshape(-1, 1) - lut.reshape(1, -1))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("channel_axis", [0, 1])
def test_each_group_of_channels_has_its_own_table_and_nearest_entries(transposed, channel_axis):
    torch.manual_seed(1)
    layer = nn.ConvTranspose2d(32, 48, 3) if transposed else nn.Conv2d(32, 48, 3)
    model, _ = palettize(
        layer,
        granularity="per_grouped_channel",
        group_size=8,
        channel_axis=channel_axis,
    )
    before, after, lut = weight(layer, "weight"), weight(model, "weight"), table(model, "weight")
    axis = channel_axis ^ transposed  # 0 means output channels, also where torch has them second
    n_groups = before.shape[axis] // 8
    assert lut.shape == (*(n_groups if i == axis else 1 for i in range(4)), 16, 1)
    for group in range(n_groups):
        part = [slice(None)] * 4
        part[axis] = slice(8 * group, 8 * group + 8)
        entries = np.take(lut, group, axis).reshape(-1)
        near = distances(before[tuple(part)], entries)
        np.testing.assert_array_equal(
            np.abs(before[tuple(part)].astype(np.float64) - after[tuple(part)]).reshape(-1),
            near.min(axis=1),
        )


def test_the_table_has_no_greater_error_than_that_of_coremltools_even_of_tiny_weights():
    for sigma in (1.0, 2e-3, 2e-5):
        torch.manual_seed(2)
        layer = nn.Linear(64, 64)
        with torch.no_grad():
            layer.weight.normal_(0, sigma)
        errors = []
        for home in (P, reference):
            model, _ = palettize(copy.deepcopy(layer), home, n_bits=4)
            errors.append(np.square(weight(model, "weight") - weight(layer, "weight")).sum())
        assert errors[0] <= errors[1]
        # An exact table of 16 normal values leaves 0.95 % of the power (Max 1960, table 1).
        assert errors[0] / np.square(weight(layer, "weight")).sum() < 0.0115


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"granularity": "per_grouped_channel", "group_size": 8, "channel_axis": 1},
        {"cluster_dim": 4},
        {"enable_per_channel_scale": True},
        {"lut_dtype": "uint8", "granularity": "per_grouped_channel", "group_size": 16},
    ],
)
@pytest.mark.parametrize("name", ["linear", "conv", "embedding", "attention"])
def test_buffers_have_the_names_and_shapes_of_coremltools(settings, name):
    torch.manual_seed(3)
    layer = {
        "linear": nn.Linear(32, 32),
        "conv": nn.Conv2d(16, 32, 3),
        "embedding": nn.Embedding(64, 16),
        "attention": nn.MultiheadAttention(16, 2),
    }[name]
    ours, theirs = (
        dict(palettize(copy.deepcopy(layer), home, **settings)[0].named_buffers())
        for home in (P, reference)
    )
    assert ours.keys() == theirs.keys()
    for key, buffer in theirs.items():
        assert ours[key].shape == buffer.shape, key
        assert ours[key].is_floating_point() == buffer.is_floating_point(), key
    (metadata,) = CompressionMetadata.from_state_dict(
        {key: value for key, value in ours.items() if "." not in key}
    ).values()
    assert metadata.lut is not None


def test_inplace_changes_the_parameters_themselves_and_copies_none():
    model = layers()
    before = {name: (p, p.data_ptr()) for name, p in model.named_parameters()}
    palettizer = P.PostTrainingPalettizer(model)
    assert palettizer.compress(inplace=True) is model
    for name, parameter in model.named_parameters():
        assert before[name] == (parameter, parameter.data_ptr())
    assert model.words.weight.unique().numel() == 16


def test_a_copy_is_compressed_unless_inplace_and_always_of_the_same_model():
    model = layers()
    state = copy.deepcopy(model.state_dict())
    palettizer = P.PostTrainingPalettizer(model)
    first, second = palettizer.compress(), palettizer.compress()
    assert first is not model
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])


def test_a_tied_weight_is_compressed_once_and_known_to_both_modules():
    model = nn.Sequential(nn.Embedding(40, 16), nn.Linear(16, 40, bias=False))
    model[1].weight = model[0].weight
    compressed, report = palettize(model)
    assert compressed[1].weight is compressed[0].weight
    assert report["0.weight"]["note"] == "tied to 1.weight"
    assert len(report) == 2
    assert len(report.weights) == 1
    for module in compressed:
        assert torch.equal(module.get_buffer("_COREML_/weight/compression_type"), torch.tensor([2]))
    config = P.PostTrainingPalettizerConfig(module_type_configs={"Embedding": None})
    config.set_global(P.ModulePostTrainingPalettizerConfig(n_bits=2))
    palettizer = P.PostTrainingPalettizer(model, config)
    assert palettizer.compress()[0].weight.unique().numel() == 4
    assert "the others ask otherwise" in palettizer.report()["0.weight"]["note"]


def broken() -> dict[str, nn.Module]:
    infinite = nn.Linear(8, 8)
    with torch.no_grad():
        infinite.weight[2, 3] = torch.inf
    coded = nn.Linear(8, 8)
    coded = P.PostTrainingPalettizer(coded).compress()
    return {
        "infinite": infinite,
        "computed": parametrizations.weight_norm(nn.Linear(8, 8)),
        "lazy": nn.LazyLinear(8),
        "coded": coded,
        "absent": nn.Linear(8, 8, device="meta"),
        "wide": nn.Linear(8, 8, dtype=torch.float64),
        "empty": nn.Linear(0, 8),
    }


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("infinite", r"must be finite, got inf at \[2, 3\]"),
        ("computed", "is computed from it, by a parametrization"),
        ("lazy", "no shape yet"),
        ("coded", "compressed already"),
        ("absent", "meta"),
        ("wide", "float64"),
        ("empty", "no elements"),
    ],
)
def test_a_weight_that_can_not_be_compressed_is_in_the_report_with_the_reason(kind, reason, caplog):
    model = nn.ModuleDict({"good": nn.Linear(8, 8), "bad": broken()[kind]})
    palettizer = P.PostTrainingPalettizer(model)
    with caplog.at_level(logging.WARNING, "milpress"):
        palettizer.compress(inplace=True)
    report = palettizer.report()
    *_, name = report.left
    assert name.startswith("bad.")
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(report.left[name])
    assert report[name]["note"] == report.left[name]
    assert report.left[name] in str(report)
    n_weights = 1 + len(report.left)
    assert report.summary.startswith(f"Compressed 1 of {n_weights} selected weights: ")
    assert any(report.left[name] in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"granularity": "per_grouped_channel", "group_size": 7}, "group size 7 does not divide"),
        ({"cluster_dim": 5}, "vectors of 5"),
        ({"cluster_dim": 4}, "conv group"),
    ],
)
def test_a_shape_that_does_not_suit_is_left_with_the_reason(settings, reason):
    model, report = palettize(nn.Conv2d(16, 24, 1, groups=4), **settings)
    assert reason in report.left["weight"]
    assert not list(model.buffers())


def test_an_indivisible_group_takes_the_greatest_divisor_on_request():
    model, report = palettize(
        nn.Linear(8, 24),
        granularity="per_grouped_channel",
        group_size=7,
        on_indivisible="divisor",
    )
    assert table(model, "weight").shape == (4, 1, 16, 1)
    assert "group size 6" in report["weight"]["note"]


@pytest.mark.parametrize("n", [97, 131])
def test_a_prime_number_of_channels_gets_one_table_on_request(n):
    settings = {"granularity": "per_grouped_channel", "group_size": 16}
    model, report = palettize(nn.Linear(24, n), **settings, on_indivisible="divisor")
    assert table(model, "weight").shape == (1, 1, 16, 1)
    note = f"one table, as no group size from 2 to 16 divides {n} output channels"
    assert note in report["weight"]["note"]
    _, report = palettize(nn.Linear(24, n), **settings)
    assert f"group size 16 does not divide {n} output channels" in report.left["weight"]


def test_an_indivisible_group_is_a_multiple_of_vectors_on_request():
    model, _ = palettize(
        nn.Linear(64, 130),
        granularity="per_grouped_channel",
        group_size=16,
        cluster_dim=2,
        on_indivisible="divisor",
    )
    assert table(model, "weight").shape == (13, 1, 16, 2)


def test_a_pruned_weight_keeps_its_zeros_and_its_table_is_of_the_others():
    torch.manual_seed(4)
    layer = nn.Linear(32, 32)
    with torch.no_grad():
        layer.weight[layer.weight.abs() < 0.1] = 0
    layer.register_buffer("_COREML_/weight/compression_type", torch.tensor([1]))
    for settings in ({}, {"enable_per_channel_scale": True}, {"lut_dtype": "int8"}):
        model, report = palettize(layer, **settings)
        assert torch.equal(model.weight == 0, layer.weight == 0)
        types = model.get_buffer("_COREML_/weight/compression_type").tolist()
        assert types == [1, 2] + [3] * ("lut_dtype" in settings)
        assert report["weight"]["unstructured_weight_sparsity"] == pytest.approx(
            float((layer.weight == 0).float().mean())
        )
        assert isinstance(_metadata.read(ModuleWeight("", model, "weight")).value, Masked)
    _, report = palettize(layer, cluster_dim=2)
    assert "pruned" in report.left["weight"]


def test_scales_are_dropped_where_integer_tables_would_be_larger_than_the_weight():
    model, report = palettize(
        nn.Conv2d(64, 64, 1, groups=64), enable_per_channel_scale=True, lut_dtype="int8"
    )
    assert "without scales" in report["weight"]["note"]
    assert table(model, "weight").shape == (1, 1, 1, 1, 16, 1)


def test_scaled_integer_tables_have_a_scale_for_each_output_channel():
    model, _ = palettize(nn.Conv2d(16, 24, 3), enable_per_channel_scale=True, lut_dtype="uint8")
    stored = _metadata.read(ModuleWeight("", model, "weight"))
    assert isinstance(stored.value.lut, Quantized)
    assert stored.value.lut.scale.shape == (24, 1, 1, 1, 1, 1)
    assert stored.scale is None


def test_recurrent_weights_are_left_out_of_the_buffers_that_ct_convert_reads():
    model, report = palettize(nn.LSTM(16, 16))
    names = [name for name, _ in model.named_buffers()]
    assert any(name == "_MILPRESS_/weight_ih_l0/lut" for name in names)
    assert [name for name in names if "_COREML_" in name] == ["_COREML_/metadata_version"]
    assert "milpress.torch.convert" in report["weight_ih_l0"]["note"]


def test_a_weight_that_changed_after_its_compression_is_not_read():
    model, _ = palettize(nn.Linear(16, 16))
    with torch.no_grad():
        model.weight[3] *= 1.1
    with pytest.raises(UnsupportedError, match="as it was when it was compressed"):
        _metadata.read(ModuleWeight("", model, "weight"))


def test_a_weight_that_coremltools_compressed_is_read():
    torch.manual_seed(5)
    for settings in (
        {"granularity": "per_grouped_channel", "group_size": 8},
        {"cluster_dim": 2},
        {"enable_per_channel_scale": True},
        {"lut_dtype": "int8"},
        {"n_bits": 6},  # more entries than values: their table ends in zeros
    ):
        model, _ = palettize(nn.Linear(8, 8), reference, **settings)
        dense = _metadata.read(ModuleWeight("", model, "weight")).dense()
        np.testing.assert_array_equal(dense, model.weight.detach().numpy())


def test_the_rows_of_the_report_are_those_of_coremltools():
    torch.manual_seed(6)
    model = nn.Sequential(nn.Linear(16, 16), nn.Conv2d(4, 8, 3))
    ours, theirs = (palettize(copy.deepcopy(model), home)[1] for home in (P, reference))
    assert ours.keys() == theirs.keys()
    for name, row in theirs.items():
        assert ours[name].keys() == row.keys()
        assert ours[name]["palettization_mode"] == row["palettization_mode"]
        assert ours[name]["#params"] == row["#params"]
        assert ours[name]["error"] <= row["error"]
    assert "palettization_mode" in str(ours)


def test_bits_of_the_report_count_codes_and_tables():
    _, report = palettize(nn.Linear(64, 64), granularity="per_grouped_channel", group_size=16)
    # 4 bits a weight, and 4 tables of 16 float32 entries for 4096 weights
    assert report.bits_per_weight == 4 + 4 * 16 * 32 / 4096
    assert report.weights[0].bytes_before == 4 * 4096


def test_fewer_values_or_vectors_than_entries_are_all_kept():
    torch.manual_seed(7)
    for layer, settings in (
        (nn.Linear(2, 3), {}),
        (nn.Linear(2, 4), {"cluster_dim": 2}),
        (nn.Linear(3, 4), {"cluster_dim": 4, "lut_dtype": None}),
    ):
        model, report = palettize(layer, **settings)
        assert report["weight"]["error"] == 0
        assert torch.equal(model.weight, layer.weight)
        _metadata.read(ModuleWeight("", model, "weight"))


def test_progress_counts_all_elements():
    seen: list[tuple[int, int, str]] = []
    P.PostTrainingPalettizer(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))).compress(
        progress=lambda *step: seen.append(step)
    )
    assert seen == [(0, 48, "0.weight"), (32, 48, "1.weight"), (48, 48, "")]
