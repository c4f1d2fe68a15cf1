"""LayerwiseCompressor: weights that a forward multiplies by itself, whole or in parts."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from test_torch_layerwise import INT4 as PER_CHANNEL
from test_torch_layerwise import SETTINGS, config, ids
from test_torch_layerwise_runs import Mixture, one_by_one
from torch import nn
from torch.nn import functional as F  # noqa: N812

from milpress.errors import ConfigError, ConfigTypeError
from milpress.torch import _metadata
from milpress.torch._module_weights import ModuleWeight
from milpress.torch.layerwise_compression import LayerwiseCompressor
from milpress.torch.registration import register_module

INT4 = SETTINGS["int4 in blocks"]


def compressed(model, batches, settings=INT4, **more):
    compressor = LayerwiseCompressor(model, config(settings, **more))
    return compressor.compress(batches), compressor.report()


def parameter(layer: nn.Module) -> nn.Parameter:
    return nn.Parameter(layer.weight.detach().clone())


class Twins(nn.Module):
    """A model of modules, and the same that multiplies by parameters in some way."""

    def __init__(self, way: str | None) -> None:
        super().__init__()
        self.way = way
        torch.manual_seed(0)
        layers = [nn.Linear(8, 16, bias=False), nn.Linear(16, 8, bias=False)]
        if way is None:
            self.layers = nn.ModuleList(layers)
            return
        weights = [parameter(layer).detach() for layer in layers]
        is_turned = way in ("@", "matmul", "mm", "addmm", "einsum", "bmm", "of three axes")
        weights = [w.mT.contiguous() if is_turned else w for w in weights]
        if way in ("bmm", "of three axes"):
            weights = [w[None] for w in weights]
        self.weights = nn.ParameterList(weights)

    def multiplied(self, x: torch.Tensor, i: int) -> torch.Tensor:
        if self.way is None:
            return self.layers[i](x)
        w = self.weights[i]
        match self.way:
            case "F.linear":
                return F.linear(x, w)
            case "F.linear by name":
                return F.linear(weight=w, input=x)
            case "@":
                return x @ w
            case "matmul":
                return torch.matmul(x[None], other=w)[0]
            case "mm":
                return torch.mm(x, w)
            case "addmm":
                return torch.addmm(torch.zeros(w.shape[1]), x, w, beta=0.5)
            case "einsum":
                return torch.einsum("ni, io -> no", x, w)
            case "einsum of a list":
                return torch.einsum("oi,ni->no", [w, x])
            case "from the left":
                return (w @ x.mT).mT
            case "bmm":
                return torch.bmm(x[None], w)[0]
            case "expanded":
                both = torch.stack([x[:9], x[9:]])
                return torch.bmm(both, w.mT.expand(2, -1, -1)).flatten(0, 1)
        return torch.matmul(x, w)[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.multiplied(torch.tanh(self.multiplied(x, 0)), 1)


WAYS = (
    "F.linear", "F.linear by name", "@", "matmul", "mm", "addmm", "einsum", "einsum of a list",
    "from the left", "bmm", "of three axes", "expanded",
)  # fmt: skip


def assert_same(made, twin, weights, layers):
    """Check that weights are those of layers, as they are or transposed, and what is said of it."""
    for name, layer in zip(weights, layers, strict=True):
        module_name, _, own_name = name.rpartition(".")
        weight = ModuleWeight(module_name, made.get_submodule(module_name), own_name)
        ours, other = weight.tensor.squeeze(0), twin.get_submodule(layer).weight
        assert torch.equal(ours if ours.shape == other.shape else ours.mT, other), name
        stored = _metadata.read(weight)  # which looks each element up
        assert np.array_equal(stored.dense(), weight.tensor.detach().numpy())


@pytest.mark.parametrize("way", WAYS)
def test_a_product_is_compressed_as_a_linear_layer_wherever_it_is_made(way):
    batches = [torch.randn(18, 8) for _ in range(4)]
    twin, other = compressed(Twins(None), batches)
    made, report = compressed(Twins(way), batches)
    assert report.left == {}
    assert_same(made, twin, ("weights.0", "weights.1"), ("layers.0", "layers.1"))
    for ours, theirs in zip(report.values(), other.values(), strict=True):
        assert ours["error"] == pytest.approx(theirs["error"])
    for ours, theirs in zip(report.weights, other.weights, strict=True):
        assert ours.snr_db == pytest.approx(theirs.snr_db)
        assert (ours.bytes_after, ours.treatment) == (theirs.bytes_after, theirs.treatment)


class Elementwise(nn.Module):
    """`Twins` whose products are sums of elements, which are no product of torch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Linear(8, 16, bias=False), nn.Linear(16, 8, bias=False)]
        self.first = parameter(layers[0])
        self.second = nn.Parameter(layers[1].weight.detach().mT.contiguous()[None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh((self.first * x[:, None]).sum(-1))
        return (self.second[0] * hidden[:, :, None]).sum(1)

    def hidden(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [torch.tanh(F.linear(x, self.first))]


AXES = {"first": (0, 1), "second": (2, 1)}


def test_a_module_can_say_what_its_weights_multiply():
    batches = [torch.randn(18, 8) for _ in range(4)]
    products = {"first": lambda _, x: x, "second": Elementwise.hidden}
    register_module(Elementwise, AXES, products=products)
    twin, _ = compressed(Twins(None), batches)
    made, report = compressed(nn.Sequential(Elementwise()), batches)
    assert report.left == {}
    names = ("0.first", "0.second")
    for name, layer in zip(names, twin.layers, strict=True):
        ours = made.get_parameter(name)
        ours = ours[0].mT if ours.ndim > 2 else ours
        assert torch.equal(ours, layer.weight)
    assert not made[0]._forward_pre_hooks


@pytest.mark.parametrize("value", [torch.ones(3, 7), [torch.ones(3, 8)]])
def test_wrong_products_are_told_with_the_parameter(value):
    register_module(Elementwise, AXES, products={"first": lambda *_: value})
    with pytest.raises(ConfigError, match=r"products of Elementwise\.first .* 8 input channels"):
        compressed(Elementwise(), [torch.randn(3, 8)])


def test_products_are_refused_that_nothing_can_be_done_with():
    with pytest.raises(ConfigError, match="products must be of first, got 'third'"):
        register_module(Elementwise, "first", products={"third": lambda _, x: x})
    with pytest.raises(ConfigTypeError, match="products must be functions, got 'x' for first"):
        register_module(Elementwise, "first", products={"first": "x"})
    with pytest.raises(ConfigError, match="axes of first must be neighbours"):
        register_module(Elementwise, "first", (0, 2), products={"first": lambda _, x: x})


@pytest.mark.parametrize("kind", SETTINGS)
def test_every_treatment_fits_a_transposed_weight(kind):
    batches = [torch.randn(18, 8) for _ in range(4)]
    twin, _ = compressed(Twins(None), batches, SETTINGS[kind])
    made, report = compressed(Twins("@"), batches, SETTINGS[kind])
    assert report.left == {}
    assert_same(made, twin, ("weights.0", "weights.1"), ("layers.0", "layers.1"))


class Stacked(nn.Module):
    """The experts of `Mixture` in two parameters, whose matrices are multiplied in some way."""

    def __init__(self, mixture: Mixture, way: str) -> None:
        super().__init__()
        self.way = way
        self.is_turned = way in ("@", "picked by index_select")
        self.router, self.out = mixture.router, mixture.out
        self.biases = [[layer.bias for layer in part] for part in (mixture.up, mixture.down)]
        weights = [
            torch.stack([layer.weight.detach() for layer in part])
            for part in (mixture.up, mixture.down)
        ]
        self.up, self.down = (
            nn.Parameter(w.mT.contiguous() if self.is_turned else w) for w in weights
        )

    def multiplied(self, x, i, name):
        weight, bias = getattr(self, name), self.biases[name == "down"][i]
        if self.way == "F.linear":
            return F.linear(x, weight[i], bias)
        return x @ weight[i] + bias

    def picked(self, x, chosen, name):
        """Multiply each row by the matrices that were chosen for it; ``x`` has a row for each."""
        weight, biases = getattr(self, name), torch.stack(self.biases[name == "down"])
        match self.way:
            case "picked":
                product = torch.bmm(weight[chosen.flatten()], x[..., None])[..., 0]
            case "picked by index_select":
                matrices = torch.index_select(weight, dim=0, index=chosen.flatten())
                product = torch.bmm(x[:, None], matrices)[:, 0]
            case _:
                rows = x.unflatten(0, chosen.shape)
                product = torch.einsum("nci,ncoi->nco", rows, weight[chosen]).flatten(0, 1)
        return product + biases[chosen.flatten()]

    def forward(self, x):
        chosen = self.router(x).topk(2, dim=-1).indices
        y = torch.zeros_like(x)
        if self.way.startswith("picked"):
            chosen = chosen.sort().values
            rows = torch.arange(len(x)).repeat_interleave(2)
            hidden = torch.relu(self.picked(x[rows], chosen, "up"))
            return self.out(y.index_add(0, rows, self.picked(hidden, chosen, "down")))
        for i in range(5):
            rows = (chosen == i).any(dim=-1).nonzero()[:, 0]
            if len(rows):
                hidden = torch.relu(self.multiplied(x[rows], i, "up"))
                y.index_add_(0, rows, self.multiplied(hidden, i, "down"))
        return self.out(y)


@pytest.mark.parametrize(
    "way", ["F.linear", "@", "picked", "picked by index_select", "picked for einsum"]
)
def test_each_expert_of_a_stack_sees_all_that_is_routed_to_it(way):
    torch.manual_seed(0)
    mixture = Mixture(out_is_first=False)
    batches = [torch.randn(3, 8) for _ in range(16)]
    names = ["router", *(f"{part}.{i}" for i in range(5) for part in ("up", "down")), "out"]
    oracle = one_by_one(mixture, batches, names)
    model = Stacked(mixture, way).eval()
    made, report = compressed(model, batches, PER_CHANNEL)
    assert report.left == {}
    # Matrices that are picked are multiplied by another function, which rounds otherwise.
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if way.startswith("picked") else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(made.out.weight, oracle.out.weight, **tolerance)
    for name in ("up", "down"):
        weight = ModuleWeight("", made, name)
        expected = torch.stack([layer.weight for layer in getattr(oracle, name)])
        ours = weight.tensor.mT if model.is_turned else weight.tensor
        torch.testing.assert_close(ours, expected, **tolerance)
        assert np.array_equal(_metadata.read(weight).dense(), weight.tensor.detach().numpy())


def test_experts_that_are_picked_in_inference_mode_see_what_is_routed_to_them():
    torch.manual_seed(0)
    batches = [torch.randn(3, 8) for _ in range(16)]
    mixture = Mixture(out_is_first=False)
    expected, _ = compressed(Stacked(mixture, "picked").eval(), batches, PER_CHANNEL)
    with torch.inference_mode():
        model = Stacked(copy.deepcopy(mixture), "picked").eval()
        made, report = compressed(model, batches, PER_CHANNEL)
    assert report.left == {}
    for name in ("up", "down", "out.weight"):
        assert torch.equal(made.get_parameter(name), expected.get_parameter(name)), name


def test_experts_that_no_sample_comes_to_are_rounded_without_feedback():
    torch.manual_seed(0)
    model = Stacked(Mixture(out_is_first=False), "F.linear").eval()
    with torch.no_grad():
        model.router.weight[2] = 0
        model.router.weight[:2] *= 100
        model.router.weight[3] *= -100
        model.router.weight[3] = -model.router.weight[:2].sum(0)
    batches = [torch.randn(1, 8) for _ in range(2)]
    routed = {int(i) for x in batches for i in model.router(x).topk(2).indices[0]}
    unseen = [i for i in range(5) if i not in routed]
    assert unseen
    made, report = compressed(model, batches, PER_CHANNEL)
    (note,) = [note for note in report.notes if "no sample came to" in note]
    for i in range(5):
        assert (f"up[{i}]" in note) == (i in unseen)
    assert f"{len(unseen)} of 5 parts without feedback" in report["up"]["note"]
    rounded, _ = compressed(
        nn.Sequential(embedding := nn.Embedding(8, 8)), [torch.arange(8)], PER_CHANNEL
    )
    embedding.weight.data.copy_(model.up[unseen[0]])
    rounded, _ = compressed(nn.Sequential(embedding), [torch.arange(8)], PER_CHANNEL)
    assert torch.equal(made.up[unseen[0]], rounded[0].weight)


class Attention(nn.Module):
    """Attention of torch's, to itself or to something else."""

    def __init__(self, kind: str, is_own: bool) -> None:
        super().__init__()
        sizes = {"kdim": 8, "vdim": 8} if kind == "of other sizes" else {}
        torch.manual_seed(0)
        self.kind = kind
        self.attention = nn.MultiheadAttention(16, 2, bias=False, batch_first=True, **sizes)
        # In the first module, the same as layers.
        a = self.attention
        if a.in_proj_weight is None:
            parts = [a.q_proj_weight, a.k_proj_weight, a.v_proj_weight]
        else:
            parts = a.in_proj_weight.chunk(3)
        self.parts = nn.ModuleList(nn.Linear(p.shape[1], 16, bias=False) for p in parts)
        for layer, part in zip(self.parts, parts, strict=True):
            layer.weight = nn.Parameter(part.detach().clone())
        self.project = nn.Linear(16, 16, bias=False)
        self.project.weight = nn.Parameter(a.out_proj.weight.detach().clone())
        if is_own:
            del self.attention
        else:
            del self.parts, self.project

    def forward(self, x):
        other = torch.cos(x[..., :8] if self.kind == "of other sizes" else x)
        others = {"to itself": (x, x), "to another": (other, other)}.get(
            self.kind, (other, torch.sin(other))
        )
        if hasattr(self, "attention"):
            return self.attention(x, *others, need_weights=False)[0]
        q, k, v = (
            layer(each).unflatten(-1, (2, 8)).transpose(1, 2)
            for layer, each in zip(self.parts, (x, *others), strict=True)
        )
        y = F.scaled_dot_product_attention(q, k, v)
        return self.project(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("settings", [PER_CHANNEL, INT4, SETTINGS["palettes in groups"]], ids=str)
@pytest.mark.parametrize("kind", ["to itself", "to another", "to two others", "of other sizes"])
def test_the_projections_of_attention_see_what_they_multiply(kind, settings):
    torch.manual_seed(1)
    batches = [torch.randn(4, 9, 16) for _ in range(4)]
    twin, _ = compressed(Attention(kind, is_own=True).eval(), batches, settings)
    made, report = compressed(Attention(kind, is_own=False).eval(), batches, settings)
    assert report.left == {}
    a = made.attention
    if kind == "of other sizes":
        parts = [a.q_proj_weight, a.k_proj_weight, a.v_proj_weight]
    else:
        weight = ModuleWeight("", a, "in_proj_weight")
        assert np.array_equal(_metadata.read(weight).dense(), weight.tensor.detach().numpy())
        parts = a.in_proj_weight.chunk(3)
    pairs = [*zip(parts, (layer.weight for layer in twin.parts), strict=True)]
    for ours, other in [*pairs, (a.out_proj.weight, twin.project.weight)]:
        # Positions are added up in another order. A weight that is rounded the other way is off by
        # a seventh of the greatest, some 6 % of its power; this lets one in twenty be.
        assert (ours - other).square().sum() < 3e-3 * other.square().sum()


@pytest.mark.parametrize(
    "settings", [PER_CHANNEL, {"algorithm": "gptq_palette", "n_bits": 3}], ids=str
)
def test_an_embedding_is_rounded_without_feedback_and_one_that_is_tied_as_the_head(settings):
    class Tied(nn.Module):
        def __init__(self, is_tied):
            super().__init__()
            torch.manual_seed(0)
            self.words, self.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
            self.mix = nn.Linear(8, 8)
            if is_tied:
                self.head.weight = self.words.weight

        def forward(self, ids):
            return self.head(torch.tanh(self.mix(self.words(ids))))

    made, report = compressed(Tied(is_tied=False), ids(12), settings)
    assert report.left == {}
    assert "a lookup multiplies nothing" in report["words.weight"]["note"]
    assert "feedback" not in report.weights[0].treatment
    if settings is PER_CHANNEL:
        weight = made.words.weight.detach()
        original = Tied(is_tied=False).words.weight.detach()
        step = made.words.get_buffer("_COREML_/weight/quantization_scale")
        assert ((weight - original).abs() <= step * (0.5 + 1e-6)).all()
    made, report = compressed(Tied(is_tied=True), ids(12), settings)
    assert report.left == {}
    assert made.head.weight is made.words.weight
    assert "tied to head.weight" in report["words.weight"]["note"]
    assert "feedback" in report.weights[0].treatment
    for module in (made.words, made.head):
        assert _metadata.compressed_parameters(module) == ["weight"]


def test_a_convolution_by_function_is_compressed_as_its_module():
    class Convolved(nn.Module):
        def __init__(self, is_module):
            super().__init__()
            torch.manual_seed(0)
            self.conv = nn.Conv2d(4, 6, 3, stride=(2, 1), padding=1, groups=2, bias=False)
            self.kernel = parameter(self.conv)
            if is_module:
                del self.kernel
            else:
                del self.conv

        def forward(self, x):
            if hasattr(self, "conv"):
                return self.conv(x)
            return F.conv2d(x, self.kernel, None, (2, 1), padding=1, groups=2)

    batches = [torch.randn(2, 4, 9, 9) for _ in range(4)]
    twin, _ = compressed(Convolved(is_module=True), batches, PER_CHANNEL)
    made, report = compressed(Convolved(is_module=False), batches, PER_CHANNEL)
    assert report.left == {}
    assert torch.equal(made.kernel, twin.conv.weight)


def test_padding_does_not_count_where_positions_are_in_one_axis():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 4))

        def forward(self, x, attention_mask=None):
            return torch.mm(x.view(-1, 8), self.weight)

    torch.manual_seed(0)
    model, x = Flat(), torch.randn(3, 10, 8)
    mask = (torch.arange(10) < torch.tensor([[10], [4], [7]])).long()
    padded = torch.where(mask[..., None] > 0, x, 9)
    made, _ = compressed(model, [{"x": padded, "attention_mask": mask}])
    alone, _ = compressed(model, [x[i : i + 1, : int(mask[i].sum())] for i in range(3)])
    assert torch.equal(made.weight, alone.weight)


def test_a_weight_that_is_multiplied_along_either_axis_is_noted():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.code = nn.Parameter(torch.randn(4, 8))

        def forward(self, x):
            return F.linear(x, self.code) @ self.code

    made, report = compressed(Both(), [torch.randn(64, 8)], PER_CHANNEL)
    assert report.notes[-1].endswith("did not count: code.")
    layer = nn.Linear(8, 4)
    assert made.get_buffer("_COREML_/code/quantization_scale").shape == (4, 1)
    assert layer.weight.shape == made.code.shape


def test_the_weights_of_transformers_are_compressed():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 40}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    gpt2 = transformers.GPT2Config(
        vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=16, **tokens
    )
    mixtral = transformers.MixtralConfig(**sizes, **heads, **tokens, num_local_experts=4)
    eager = transformers.MixtralConfig(**sizes, **heads, **tokens, num_local_experts=4)
    eager._experts_implementation = "eager"
    picked = transformers.MixtralConfig(**sizes, **heads, **tokens, num_local_experts=4)
    picked._experts_implementation = "batched_mm"
    torch.manual_seed(0)
    models = [
        transformers.GPT2LMHeadModel(gpt2),
        transformers.MixtralForCausalLM(mixtral),
        transformers.MixtralForCausalLM(eager),
        transformers.MixtralForCausalLM(picked),
    ]
    batches = [{"input_ids": batch % 40} for batch in ids(3)]
    for model in models:
        for settings in (PER_CHANNEL, {"algorithm": "gptq_palette", "n_bits": 4}):
            _, report = compressed(model.eval(), batches, settings)
            assert report.left == {}
            rows = {id(model.get_parameter(name)) for name in report}
            assert rows == {id(p) for p in model.parameters() if p.ndim > 1}


@pytest.mark.parametrize("settings", ["int4 in blocks", "palettes in groups"])
def test_a_run_that_was_interrupted_knows_the_parts_that_were_done(settings, tmp_path):
    torch.manual_seed(0)
    model = Stacked(Mixture(out_is_first=False), "@").eval()
    batches = [torch.randn(3, 8) for _ in range(10)]
    expected, _ = compressed(model, batches, SETTINGS[settings])

    def interrupted(_done, _total, name):
        if name == "down[3]":
            raise KeyboardInterrupt

    optimizer = LayerwiseCompressor(model, config(SETTINGS[settings]))
    with pytest.raises(KeyboardInterrupt):
        optimizer.compress(batches, progress=interrupted, checkpoint=tmp_path)
    assert len(list(tmp_path.iterdir())) > 3
    names = []
    optimizer = LayerwiseCompressor(model, config(SETTINGS[settings]))
    made = optimizer.compress(
        batches, progress=lambda _done, _total, name: names.append(name), checkpoint=tmp_path
    )
    assert "up[0]" not in names
    assert "down[3]" in names
    for (name, ours), other in zip(
        made.state_dict().items(), expected.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, other), name
