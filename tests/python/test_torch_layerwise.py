"""LayerwiseCompressor: layers found on any graph, what comes to each, and what is made of it."""

from __future__ import annotations

import copy
import threading

import attrs
import coremltools as ct
import numpy as np
import pytest
import torch
from coremltools.optimize.torch import layerwise_compression as reference
from oracles import decoded
from torch import nn
from torch.nn import functional as F  # noqa: N812

import milpress as cto
from milpress.errors import ConfigError, ConfigTypeError, UnsupportedError
from milpress.interpreter import load
from milpress.torch._module_weights import weights_of
from milpress.torch.layerwise_compression import (
    GPTQ,
    DefaultInputCacher,
    FirstLayerInputCacher,
    GPTFirstLayerInputCacher,
    LayerwiseCompressionAlgorithm,
    LayerwiseCompressionAlgorithmConfig,
    LayerwiseCompressor,
    LayerwiseCompressorConfig,
    ModuleGPTQConfig,
    ModuleGPTQPaletteConfig,
    ModuleSparseGPTConfig,
)
from milpress.torch.layerwise_compression._layer_moments import LAYERS, LayerMoments

INT4 = {"algorithm": "gptq", "weight_dtype": "int4"}


def config(settings=INT4, **more):
    return LayerwiseCompressorConfig.from_dict({"global_config": settings, **more})


class Graph(nn.Module):
    """Layers that are registered in another order than they are run in, around a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(24, 8)
        self.down = nn.Linear(32, 16)
        self.words = nn.Embedding(20, 16)
        self.up = nn.Linear(16, 32)
        self.query, self.key = nn.Linear(16, 16), nn.Linear(16, 16)
        self.conv = nn.Conv1d(16, 8, 3, padding="same")

    def forward(self, ids, scale=None):
        x = self.words(ids)
        x = x + torch.tanh(self.query(x) * self.key(x))
        x = x + self.down(F.gelu(self.up(x)))
        y = self.conv(x.transpose(1, 2)).transpose(1, 2)
        x = self.last(torch.cat([x, y], dim=2))
        return x if scale is None else x * scale


def graph() -> Graph:
    torch.manual_seed(0)
    return Graph()


def ids(n: int = 4, seed: int = 0):
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 20, (3, 15), generator=random) for _ in range(n)]


IN_ORDER = ("query", "key", "up", "down", "conv", "last")


def one_by_one(model: nn.Module, batches, settings: ModuleGPTQConfig, names=IN_ORDER):
    """Compress layers by the algorithm's class, running the whole model again for each."""
    model = copy.deepcopy(model).eval()
    for name in names:
        layer = model.get_submodule(name)
        algorithm = GPTQ(layer, settings)
        handle = layer.register_forward_pre_hook(
            lambda _, args, algorithm=algorithm: algorithm.add_batch(args[0])
        )
        with torch.no_grad():
            for batch in batches:
                model(batch)
        handle.remove()
        algorithm.compress()
    return model


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(6, 4),
        nn.Conv1d(6, 4, 3),
        nn.Conv1d(6, 4, 3, padding="same", dilation=2),
        nn.Conv1d(6, 4, 4, padding="valid", stride=2),
        nn.Conv2d(6, 4, (3, 2), stride=(2, 1), padding=(2, 1)),
        nn.Conv2d(6, 6, 3, groups=6, padding=1),
        nn.Conv2d(6, 4, 3, groups=2, padding=1, dilation=(1, 2), padding_mode="reflect"),
        nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(6, 4, 1, padding="same", padding_mode="replicate"),
        nn.Conv3d(6, 4, (1, 2, 3), stride=(1, 2, 1), padding=(0, 1, 1), groups=2),
    ],
    ids=str,
)
def test_moments_tell_how_large_the_output_of_any_weight_is(layer):
    torch.manual_seed(0)
    rank = layer.weight.ndim - 2
    shapes = [(2, 6, *[7] * rank), (1, 6, *[9] * rank)] if rank else [(2, 5, 6), (3, 6)]
    moments = LayerMoments(layer)
    total = np.zeros(layer.weight.shape[0])
    layer = layer.double()
    layer.bias = None
    for shape in shapes:
        x = torch.randn(shape, dtype=torch.float64)
        y = layer(x).detach()
        total += y.square().transpose(0, 1 if rank else -1).flatten(1).sum(1).numpy()
        moments.add(x)
    sums = moments.sums().astype(np.float64)
    w = layer.weight.detach().numpy().reshape(len(sums), -1, sums.shape[1])
    found = np.einsum("gri,gij,grj->gr", w, sums, w).reshape(-1)
    # Sums of some hundred products in float32, of terms that may cancel.
    np.testing.assert_allclose(found, total, rtol=1e3 * 2.0**-23)


def test_layers_get_what_their_compressed_predecessors_give_them():
    model, batches = graph(), ids()
    compressor = LayerwiseCompressor(model, config(module_name_configs={"words": None}))
    made = compressor.compress(batches)
    oracle = one_by_one(model, batches, ModuleGPTQConfig.from_dict(INT4))
    for name in IN_ORDER:
        torch.testing.assert_close(
            made.get_submodule(name).weight, oracle.get_submodule(name).weight, rtol=0, atol=0
        )
    assert compressor.report().left == {}
    assert set(compressor.report()) == {f"{name}.weight" for name in IN_ORDER}


def test_each_sample_runs_through_the_model_once_and_one_at_a_time():
    model = graph()
    runs, busy = [], []

    def enter(*_):
        runs.append(threading.current_thread())

    model.last.register_forward_hook(enter)

    def watched(*_):
        busy.append(sum(thread.is_alive() for thread in set(runs)))

    model.words.register_forward_hook(watched)
    before = threading.active_count()
    LayerwiseCompressor(model, config()).compress(ids(5), inplace=True)
    assert len(runs) == 6  # once more to count how often layers are called
    assert threading.active_count() == before


@pytest.mark.parametrize("kind", [tuple, list, dict])
def test_batches_are_arguments_of_the_model(kind):
    model, batches = graph(), ids()
    scale = torch.ones(1)
    given = [
        {"scale": scale, "ids": batch} if kind is dict else kind((batch, scale))
        for batch in batches
    ]
    made = LayerwiseCompressor(model, config()).compress(given)
    plain = LayerwiseCompressor(model, config()).compress(batches)
    for ours, other in zip(made.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, other)


def test_padding_does_not_count_where_a_mask_says_so():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x, attention_mask=None):
            return self.b(torch.relu(self.a(x)))

    torch.manual_seed(0)
    model = Masked()
    x = torch.randn(3, 10, 8)
    mask = (torch.arange(10) < torch.tensor([[10], [4], [7]])).long()
    padded = torch.where(mask[..., None] > 0, x, 9)
    alone = [x[i : i + 1, : int(mask[i].sum())] for i in range(3)]
    made = LayerwiseCompressor(model, config()).compress([{"x": padded, "attention_mask": mask}])
    other = LayerwiseCompressor(model, config()).compress([{"x": part} for part in alone])
    blind = LayerwiseCompressor(model, config(mask=None)).compress(
        [{"x": padded, "attention_mask": mask}]
    )
    assert torch.equal(made.b.weight, other.b.weight)
    assert not torch.equal(made.b.weight, blind.b.weight)


def test_a_layer_that_is_run_twice_is_compressed_with_all_that_comes_to_it():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x):
            return self.head(torch.tanh(self.layer(torch.tanh(self.layer(x)))))

    torch.manual_seed(0)
    model, x = Twice(), torch.randn(64, 8)
    made = LayerwiseCompressor(model, config()).compress([x])
    algorithm = GPTQ(copy.deepcopy(model.layer), ModuleGPTQConfig.from_dict(INT4))
    algorithm.add_batch(x)
    algorithm.add_batch(torch.tanh(model.layer(x)))
    algorithm.compress()
    assert torch.equal(made.layer.weight, algorithm.weight.tensor)


def test_tied_layers_are_compressed_once():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    compressor = LayerwiseCompressor(model, config())
    made = compressor.compress([torch.randn(80, 8)])
    assert made[0].weight is made[2].weight
    assert len(compressor.report().weights) == 1
    assert "tied to 2.weight" in compressor.report()["0.weight"]["note"]
    for layer in (made[0], made[2]):
        assert layer.get_buffer("_COREML_/weight/quantization_n_bits") == 4


def test_what_can_not_be_compressed_is_left_with_a_reason(caplog):
    class Odd(Graph):
        def __init__(self):
            super().__init__()
            self.unused = nn.Linear(4, 4)
            self.place = nn.Parameter(torch.randn(15, 16))
            self.gates, self.turned = nn.GRU(4, 4), nn.ConvTranspose1d(4, 4, 2)

        def forward(self, ids):
            return self.query(self.words(ids) + self.place)

    torch.manual_seed(0)
    model = Odd()
    model.key.weight.data[0, 0] = float("nan")
    settings = {**INT4, "granularity": "per_block", "block_size": 16}
    names = {
        "up": {"algorithm": "gptq", "weight_dtype": "float32"},
        "last": None,
        "words": None,
        "query": {**settings, "block_size": 5},
    }
    compressor = LayerwiseCompressor(model, config(settings, module_name_configs=names))
    made = compressor.compress(ids())
    left = compressor.report().left
    assert {"up.weight", "last.weight"}.isdisjoint(compressor.report())
    assert "5" in left["query.weight"]
    assert "no sample came" in left["down.weight"]
    assert "no sample came" in left["place"]
    assert "not fed back to GRU" in left["gates.weight_hh_l0"]
    assert "not fed back to ConvTranspose1d" in left["turned.weight"]
    assert "must divide" in left["unused.weight"] or "block" in left["unused.weight"]
    assert "Left as it is." in caplog.text
    for ours, given in zip(made.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours.nan_to_num(), given.nan_to_num())


def test_inputs_that_are_not_finite_leave_a_layer():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    x = torch.randn(40, 4)
    x[3, 2] = float("inf")
    compressor = LayerwiseCompressor(model, config())
    compressor.compress([x])
    assert all("finite" in reason for reason in compressor.report().left.values())


def test_few_positions_are_noted():
    model = nn.Sequential(nn.Linear(16, 4))
    compressor = LayerwiseCompressor(model, config())
    compressor.compress([torch.randn(127, 16)])
    assert "0.weight" in repr(compressor.report()).splitlines()[-1]
    compressor.compress([torch.randn(128, 16)])
    assert compressor.report().notes == ()


def test_the_model_is_as_before_whatever_happens():
    model = graph().train()
    model.conv.eval()
    state = copy.deepcopy(model.state_dict())
    threads = threading.active_count()

    def failing(done, _total, _name):
        if done > 500:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        LayerwiseCompressor(model, config()).compress(ids(), progress=failing)

    def broken(module, _args):
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("broken")

    handle = model.down.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="broken"):
        LayerwiseCompressor(model, config()).compress(ids())
    handle.remove()
    assert threading.active_count() == threads
    assert model.training
    assert not model.conv.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    made = LayerwiseCompressor(model, config()).compress(ids(), inplace=True)
    assert made is model
    assert made.training


def test_a_run_that_was_interrupted_goes_on_where_it_was(tmp_path):
    model, folder = graph(), tmp_path / "kept"
    whole = LayerwiseCompressor(model, config()).compress(ids())

    def interrupted(_done, _total, name):
        if name == "down.weight":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        LayerwiseCompressor(model, config()).compress(
            ids(), progress=interrupted, checkpoint=folder
        )
    assert len(list(folder.iterdir())) == 4
    other = config({**INT4, "hessian_dampening": 0.1})
    with pytest.raises(ConfigError, match="holds a layer of other weights or settings"):
        LayerwiseCompressor(model, other).compress(ids(), checkpoint=folder)
    names = []
    compressor = LayerwiseCompressor(model, config())
    made = compressor.compress(
        ids(), progress=lambda _done, _total, name: names.append(name), checkpoint=folder
    )
    assert names == ["down.weight", "conv.weight", "last.weight", ""]
    assert not folder.exists()
    for (name, ours), other in zip(
        made.state_dict().items(), whole.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, other), name
    assert list(compressor.report().left) == []
    assert len(compressor.report()) == 7


def test_a_file_that_is_no_layer_is_refused(tmp_path):
    (tmp_path / "layer-00000.pt").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match=r"layer-00000\.pt: not a layer of an interrupted run"):
        LayerwiseCompressor(graph(), config()).compress(ids(), checkpoint=tmp_path)


def test_what_has_its_place_stays_there_and_is_left_if_it_has_no_values(monkeypatch):
    monkeypatch.setattr(nn.Module, "to", lambda *_: pytest.fail("the model was moved"))
    for mark in ("_hf_hook", "hf_device_map", "none"):  # the first two are accelerate's
        model = graph()
        model.spare = nn.Linear(4, 4, device="cpu" if mark == "_hf_hook" else "meta")
        setattr(model, mark, {})
        compressor = LayerwiseCompressor(model, config())
        compressor.compress(ids(), device="cpu:0", inplace=True)
        assert list(compressor.report().left) == ["spare.weight"]
        if mark != "_hf_hook":
            assert "load them before" in compressor.report().left["spare.weight"]


def test_progress_counts_all_elements_once():
    model, calls = graph(), []
    LayerwiseCompressor(model, config()).compress(ids(), progress=lambda *a: calls.append(a))
    sizes = [model.get_submodule(name).weight.numel() for name in ("words", *IN_ORDER)]
    assert [done for done, _, _ in calls] == [sum(sizes[:i]) for i in range(8)]
    assert {total for _, total, _ in calls} == {sum(sizes)}


@pytest.mark.parametrize("inplace", [False, True])
def test_layers_are_named_or_given_as_modules(inplace):
    for layers in (["u.*", "down"], [r"up", "down", "no such"]):
        compressor = LayerwiseCompressor(graph(), config(layers=layers))
        compressor.compress(ids(), inplace=inplace)
        assert set(compressor.report()) == {"up.weight", "down.weight"}
    model = graph()
    settings = config()
    settings.layers = [model.up, model.conv]
    compressor = LayerwiseCompressor(model, settings)
    made = compressor.compress(ids(), inplace=inplace)
    assert set(compressor.report()) == {"up.weight", "conv.weight"}
    assert made.up.get_buffer("_COREML_/weight/quantization_n_bits") == 4
    nested = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 4))
    compressor = LayerwiseCompressor(nested, config(layers=["0"]))
    compressor.compress([torch.randn(40, 4)])
    assert set(compressor.report()) == {"0.0.weight", "0.1.weight"}


def test_input_cachers_give_what_comes_to_the_first_layer():
    model = graph().eval()
    (batch,) = ids(1)
    inputs, kwargs = DefaultInputCacher(model, None).cache([batch, batch], 1, "cpu")
    assert len(inputs) == 1
    assert kwargs == {}
    inputs, kwargs = GPTFirstLayerInputCacher(model, ["up"]).cache([batch], 5, "cpu")
    with torch.no_grad():
        x = model.words(batch)
        x = x + torch.tanh(model.query(x) * model.key(x))
        assert torch.equal(inputs[0][0], x)
    assert kwargs == {}
    assert not model.up._forward_pre_hooks
    with pytest.raises(ConfigError, match="layers must name a module"):
        GPTFirstLayerInputCacher(model, "none").cache([batch], 5, "cpu")


def test_an_input_cacher_of_ones_own_feeds_the_layers():
    class Doubled(FirstLayerInputCacher):
        def cache(self, dataloader, nsamples, device):
            return [2 * batch for batch in dataloader][:nsamples], {}

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4))
    batches = [torch.randn(50, 6) for _ in range(3)]
    made = LayerwiseCompressor(model, config(input_cacher=Doubled)).compress(batches)
    other = LayerwiseCompressor(model, config()).compress([2 * batch for batch in batches])
    assert torch.equal(made[2].weight, other[2].weight)


def test_an_algorithm_of_ones_own_is_used_by_its_name():
    @LayerwiseCompressionAlgorithmConfig.register("halve")
    @attrs.define
    class HalveConfig(LayerwiseCompressionAlgorithmConfig):
        algorithm: str = "halve"

    @LayerwiseCompressionAlgorithm.register("halve")
    class Halve(LayerwiseCompressionAlgorithm):
        def __init__(self, layer, config):
            self.layer, self.outputs = layer, []

        def add_batch(self, inp, out):
            assert torch.equal(self.layer.forward(inp), out)
            self.outputs.append(out)

        def compress(self):
            assert len(self.outputs) == 2
            self.layer.weight.data /= 2

        def cleanup(self):
            self.outputs = None

    model = nn.Sequential(nn.Linear(4, 4))
    compressor = LayerwiseCompressor(model, config({"algorithm": "halve"}))
    made = compressor.compress([torch.randn(3, 4), torch.randn(2, 4)])
    assert torch.equal(2 * made[0].weight, model[0].weight)
    row = compressor.report()["0.weight"]
    expected = (model[0].weight / 2).square().mean().sqrt().item()
    assert row["error"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "settings",
    [
        INT4,
        {**INT4, "range": "mse", "quantization_scheme": "affine"},
        {"algorithm": "gptq", "weight_dtype": "uint3"},
        {"algorithm": "gptq", "weight_dtype": "uint4", "enable_normal_float": True},
        {"algorithm": "gptq_palette", "n_bits": 3},
        {"algorithm": "sparse_gpt"},
        {"algorithm": "sparse_gpt", "weight_dtype": "float32"},
    ],
    ids=str,
)
def test_modules_of_16_bits_hold_just_what_their_codes_stand_for(dtype, settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8)).to(dtype)
    compressor = LayerwiseCompressor(model, config(settings))
    made = compressor.compress([torch.randn(200, 16, dtype=dtype)])
    assert compressor.report().left == {}
    for weight in weights_of(made, LAYERS):
        assert weight.tensor.dtype == dtype
        stored = cto.torch._metadata.read(weight)  # which looks each element up
        assert torch.equal(torch.from_numpy(stored.dense()).to(dtype), weight.tensor)


class Kinds(nn.Module):
    """Every kind of layer, grouped and depthwise ones too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1d = nn.Conv1d(8, 16, 3, padding="same")
        self.conv2d = nn.Conv2d(16, 32, (1, 3), padding=(0, 1), groups=2)
        self.depthwise = nn.Conv2d(32, 32, (1, 3), padding=(0, 1), groups=32)
        self.conv3d = nn.Conv3d(32, 24, (1, 1, 3), padding=(0, 0, 1))
        self.head = nn.Linear(24, 16)

    def forward(self, x):
        x = torch.relu(self.conv1d(x))[:, :, None]
        x = torch.relu(self.depthwise(self.conv2d(x)))[:, :, None]
        return self.head(self.conv3d(x)[:, :, 0, 0].transpose(1, 2))


SETTINGS = {
    "uint8": {"algorithm": "gptq"},
    "int4 in blocks": {
        **INT4,
        "granularity": "per_block",
        "block_size": 4,
        "on_indivisible": "divisor",
    },
    "uint4 affine clipped": {
        "algorithm": "gptq",
        "weight_dtype": "uint4",
        "quantization_scheme": "affine",
        "range": "mse",
    },
    "uint3": {"algorithm": "gptq", "weight_dtype": "uint3"},
    "normal floats": {
        "algorithm": "gptq",
        "weight_dtype": "uint4",
        "enable_normal_float": True,
        "use_activation_order_heuristic": True,
    },
    "palettes": {"algorithm": "gptq_palette"},
    "palettes in groups": {
        "algorithm": "gptq_palette",
        "n_bits": 3,
        "granularity": "per_grouped_channel",
        "group_size": 8,
        "use_activation_order_heuristic": True,
    },
    "int8 tables": {"algorithm": "gptq_palette", "lut_dtype": "int8"},
    "half pruned": {"algorithm": "sparse_gpt", "weight_dtype": "float32"},
    "2 of 4, uint4": {"algorithm": "sparse_gpt", "n_m_ratio": (2, 4), "weight_dtype": "uint4"},
    "pruned normal floats": {
        "algorithm": "sparse_gpt",
        "target_sparsity": 0.25,
        "weight_dtype": "uint4",
        "enable_normal_float": True,
    },
}


@pytest.fixture(scope="module")
def kinds():
    torch.manual_seed(0)
    return Kinds().eval(), [torch.randn(4, 8, 20) for _ in range(8)]


@pytest.mark.parametrize("kind", SETTINGS)
def test_convert_stores_every_layer_as_it_is(kind, kinds, tmp_path):
    model, batches = kinds
    compressor = LayerwiseCompressor(model, config(SETTINGS[kind]))
    made = compressor.compress(batches)
    assert compressor.report().left == {}
    path, x = tmp_path / "model.mlpackage", batches[0][:1]
    precision = ct.precision.FLOAT32
    package = cto.torch.convert(made, (x,), path, compute_precision=precision)
    assert package.compression_report.verified
    stored = list(decoded(path).values())
    for weight in weights_of(made, LAYERS):
        array = weight.tensor.detach().numpy()
        assert any(np.array_equal(array, value) for value in stored), weight.name
    program = load(path)
    (name,) = (feature.name for feature in program.inputs)
    (found,) = program(**{name: x.numpy()}).values()
    expected = made(x).detach().numpy().astype(np.float64)
    # 60 dB: the same weights in the same precision, some hundred additions in another order.
    assert np.square(found - expected).sum() < 1e-6 * np.square(expected).sum()


@pytest.mark.parametrize(
    ("kind", "frontend"),
    [
        pytest.param(kind, way, marks=[pytest.mark.large] if way == "export" and i else [])
        for i, kind in enumerate(SETTINGS)
        for way in ("trace", "export")
    ],
)
def test_ct_convert_makes_constexpr_ops_of_the_buffers(kind, frontend, kinds, tmp_path):
    model, batches = kinds
    made = LayerwiseCompressor(model, config(SETTINGS[kind])).compress(batches)
    x = batches[0][:1]
    settings = {"inputs": [ct.TensorType(shape=x.shape)]} if frontend == "trace" else {}
    program = torch.jit.trace(made, x) if settings else torch.export.export(made, (x,))
    program = program if settings else program.run_decompositions({})
    package = ct.convert(
        program, minimum_deployment_target=ct.target.iOS18, skip_model_load=True, **settings
    )
    package.save(str(tmp_path / "model.mlpackage"))
    stored = list(decoded(tmp_path / "model.mlpackage").values())
    for weight in weights_of(made, LAYERS):
        array = weight.tensor.detach().numpy()
        # A scale or entry, and its product with a code or scale, are rounded to float16.
        tolerance = 3 * 2.0**-11 * np.abs(array).max() + 2.0**-24
        others = [value for value in stored if value.shape == array.shape]
        assert any((np.abs(value - array) <= tolerance).all() for value in others), weight.name


REFERENCE = {
    "uint4": {"algorithm": "gptq", "weight_dtype": "uint4"},
    "uint4 affine": {
        "algorithm": "gptq",
        "weight_dtype": "uint4",
        "quantization_scheme": "affine",
    },
    "uint4 in blocks": {
        "algorithm": "gptq",
        "weight_dtype": "uint4",
        "granularity": "per_block",
        "block_size": 16,
    },
    "in activation order": {
        "algorithm": "gptq",
        "weight_dtype": "uint4",
        "use_activation_order_heuristic": True,
    },
    "normal floats": {"algorithm": "gptq", "weight_dtype": "uint4", "enable_normal_float": True},
    "half": {"algorithm": "sparse_gpt", "weight_dtype": "float32"},
    "2 of 4": {"algorithm": "sparse_gpt", "weight_dtype": "float32", "n_m_ratio": (2, 4)},
    "half of uint8": {"algorithm": "sparse_gpt"},
}


@pytest.mark.parametrize("kind", REFERENCE)
def test_one_layer_has_coremltools_error_or_less(kind):
    torch.manual_seed(0)
    x = torch.randn(512, 96) @ torch.randn(96, 96)
    model = nn.Sequential(nn.Linear(96, 64, bias=False))
    settings = {"global_config": REFERENCE[kind]}
    ours = LayerwiseCompressor(model, LayerwiseCompressorConfig.from_dict(settings)).compress([x])
    theirs = reference.LayerwiseCompressor(
        model, reference.LayerwiseCompressorConfig.from_dict(settings)
    ).compress([x], device="cpu")
    with torch.no_grad():
        errors = [(made(x) - model(x)).square().sum().item() for made in (ours, theirs)]
    # Where the method is the same, sums in another order may round a weight the other way.
    assert errors[0] <= errors[1] * 1.01


def test_configs_go_to_dictionaries_and_back():
    settings = config(
        SETTINGS["int4 in blocks"],
        module_type_configs={"Conv1d": SETTINGS["palettes in groups"]},
        module_name_configs={"head": SETTINGS["2 of 4, uint4"], "up": None},
        layers=["a", "b.*"],
        calibration_nsamples=7,
    )
    again = LayerwiseCompressorConfig.from_dict(settings.as_dict())
    assert again == settings
    assert isinstance(settings.module_type_configs[nn.Conv1d], ModuleGPTQPaletteConfig)
    assert isinstance(settings.module_name_configs["head"], ModuleSparseGPTConfig)
    assert LayerwiseCompressorConfig().global_config == ModuleGPTQConfig()


def test_configs_of_coremltools_are_taken():
    theirs = reference.LayerwiseCompressorConfig.from_dict(
        {"global_config": REFERENCE["uint4 in blocks"], "calibration_nsamples": 3}
    )
    compressor = LayerwiseCompressor(nn.Sequential(nn.Linear(32, 8)), theirs)
    made = compressor.compress([torch.randn(30, 32) for _ in range(5)])
    assert made[0].get_buffer("_COREML_/weight/quantization_scale").shape == (8, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"algorithm": "gptq", "weight_dtype": "int5"}, "weight_dtype must be one of"),
        ({"algorithm": "gptq", "weight_dtype": "float16"}, "weight_dtype must be one of"),
        ({"algorithm": "none"}, "must be one of"),
        ({"weight_dtype": "int4"}, "must name an algorithm"),
        ({"algorithm": "gptq", "enable_normal_float": True}, "3 or 4 bits"),
        ({"algorithm": "gptq", "block_size": 0}, "block_size must be at least 1"),
        ({"algorithm": "gptq", "block_size": 4, "granularity": "per_tensor"}, "per_tensor"),
        ({"algorithm": "gptq", "block_size": 4, "weight_dtype": "uint3"}, "3 bits"),
        ({"algorithm": "gptq", "hessian_dampening": -1.0}, "hessian_dampening must be finite"),
        ({"algorithm": "gptq", "processing_group_size": 0}, "must be at least 1"),
        ({"algorithm": "gptq", "weight_n_bits": 5}, "weight_n_bits must be that of"),
        ({"algorithm": "sparse_gpt", "target_sparsity": 1.5}, "target_sparsity"),
        ({"algorithm": "sparse_gpt", "n_m_ratio": (3, 2)}, "n_m_ratio"),
        ({"algorithm": "sparse_gpt", "n_m_ratio": 2}, "n_m_ratio"),
        ({"algorithm": "gptq_palette", "cluster_dim": 2}, "cluster_dim must be 1"),
        ({"algorithm": "gptq_palette", "n_bits": 5}, "n_bits must be one of"),
    ],
)
def test_settings_that_can_only_fail_later_fail_at_once(settings, message):
    with pytest.raises(ConfigError, match=message):
        config(settings)


def test_bad_arguments_are_refused():
    with pytest.raises(ConfigError, match="dataloader gives no batch"):
        LayerwiseCompressor(graph(), config()).compress([])
    with pytest.raises(ConfigTypeError, match="layers must be a list"):
        LayerwiseCompressorConfig(layers="up")
    with pytest.raises(ConfigError, match="FirstLayerInputCacher must be one of"):
        config(input_cacher="none")
    with pytest.raises(UnsupportedError, match="linear or a convolution"):
        GPTQ(nn.Embedding(4, 4), ModuleGPTQConfig())
    with pytest.raises(UnsupportedError, match="no sample came"):
        GPTQ(nn.Linear(4, 4), ModuleGPTQConfig()).compress()
