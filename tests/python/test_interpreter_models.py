"""Whole models in the interpreter, against the source that they were converted from."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import onnxruntime
import pytest
import torch
from small_models import TARGETS
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import milpress
from benchmarks import minilm
from milpress.formats import PalettizeConfig, PerBlock, PruneConfig, QuantizeConfig
from milpress.interpreter import load
from milpress.recipe import Recipe, Select, Step

# What is promised of float32: rounding errors of 24 bits, which add up over the layers.
FLOAT32_DB = 110
# Of packages that store float16: its 11 bits are 66 dB at best for a single rounded value.
FLOAT16_DB = 60


def snr(expected: Any, got: Any) -> float:
    expected, got = (np.asarray(array, np.float64) for array in (expected, got))
    assert expected.shape == got.shape
    noise = ((expected - got) ** 2).sum()
    return math.inf if noise == 0 else 10 * math.log10((expected**2).sum() / noise)


# Real models


def test_basic_pitch_agrees_with_the_onnx_file_in_its_wheel(basic_pitch):
    (path,) = (f for f in importlib.metadata.files("basic-pitch") or [] if f.suffix == ".onnx")
    session = onnxruntime.InferenceSession(str(path.locate()))
    rng = np.random.default_rng(0)
    audio = (0.1 * rng.standard_normal((1, 43844, 1))).astype(np.float32)
    # The outputs have no common names; two have the same shape.
    expected = session.run(None, {session.get_inputs()[0].name: audio})
    made = load(basic_pitch)(input_2=audio)
    assert len(made) == len(expected) == 3
    for got in made.values():
        assert max(snr(each, got) for each in expected if each.shape == got.shape) > FLOAT32_DB


def pitch(probabilities: np.ndarray) -> np.ndarray:
    """Return the pitch in Hz: the mean of CREPE's bins around the best, 20 cents apart."""
    cents = 1997.3794084376191 + 20 * np.arange(360)
    best = probabilities.argmax(-1)[:, None] + np.arange(-4, 5)
    weights = np.take_along_axis(probabilities, best.clip(0, 359), -1)
    return 10 * 2 ** ((weights * cents[best.clip(0, 359)]).sum(-1) / weights.sum(-1) / 1200)


@pytest.mark.parametrize("size", ["tiny", "full"])
def test_crepe_hears_the_pitch_of_a_tone(size, request):
    program = load(request.getfixturevalue(f"crepe_{size}"))
    tones = np.array([110.0, 220.0, 440.0, 659.3, 987.8])
    frames = np.sin(2 * np.pi * tones[:, None] * np.arange(1024) / 16000)
    frames = (frames - frames.mean(-1, keepdims=True)) / frames.std(-1, keepdims=True)
    heard = pitch(program(frames=frames)["probabilities"])
    # Half of one of its bins, which are 20 cents apart.
    assert np.abs(1200 * np.log2(heard / tones)).max() < 10


@pytest.mark.large
@pytest.mark.filterwarnings("ignore:Converting a tensor to a Python float:Warning:benchmarks.*")
def test_minilm_agrees_with_its_source_of_the_weights_that_it_stores(tmp_path):
    path = minilm.write_package(tmp_path / "minilm.mlpackage")
    weights = {name: w.half().float() for name, w in minilm.read_weights().items()}
    ids = torch.randint(1000, 20_000, (1, 64), generator=torch.Generator().manual_seed(0)).int()
    mask = (torch.arange(64) < 40)[None].int()
    (got,) = load(path)(input_ids=ids, attention_mask=mask).values()
    assert snr(minilm.Encoder(weights).eval()(ids, mask), got) > FLOAT16_DB


# Converted models


class Cnn(nn.Module):
    """Convolutions and pools with every padding, norms, an upsampling, a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.same = nn.Conv2d(16, 16, 5, padding="same", groups=4)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=(2, 1), dilation=(2, 1), groups=16)
        self.valid = nn.Conv2d(16, 24, (3, 1))
        self.reflect = nn.Conv2d(24, 24, 3, padding=1, padding_mode="reflect")
        self.group = nn.GroupNorm(4, 24)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(24, 24, 1), nn.Hardsigmoid())
        self.up = nn.ConvTranspose2d(24, 12, 3, stride=2, padding=1, output_padding=1)
        self.head = nn.Linear(12, 10)
        self.norm.running_mean.uniform_(-1, 1)
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.norm(self.stem(x)))
        x = x + F.silu(self.same(x))
        x = F.max_pool2d(F.gelu(self.depthwise(x)), 3, 2, 1, ceil_mode=True)
        x = F.leaky_relu(self.valid(F.pad(x, (1, 0, 2, 1))), 0.1)
        x = F.avg_pool2d(self.group(self.reflect(x)), 3, 2, 1, count_include_pad=False)
        x = self.up(x * self.gate(x))
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        return self.head(x.mean((2, 3)))


class Encoder(nn.Module):
    """A transformer's encoder: embeddings, a mask, pooling, normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(100, 48), nn.Embedding(16, 48)
        self.norm = nn.LayerNorm(48)
        self.qkv, self.out = nn.Linear(48, 144), nn.Linear(48, 48)
        self.wide, self.narrow = nn.Linear(48, 96), nn.Linear(96, 48)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.norm(self.words(ids) + self.places(torch.arange(16)))
        q, k, v = self.qkv(x).reshape(1, 16, 3, 4, 12).permute(2, 0, 3, 1, 4).unbind()
        bias = (1.0 - mask.float())[:, None, None] * -1e4
        scores = F.softmax(q @ k.transpose(-1, -2) / 12**0.5 + bias, -1)
        x = self.norm(x + self.out((scores @ v).transpose(1, 2).reshape(1, 16, 48)))
        x = self.norm(x + self.narrow(F.gelu(self.wide(x))))
        kept = mask.float()[..., None]
        return F.normalize((x * kept).sum(1) / kept.sum(1).clamp(min=1e-3), dim=-1)


class Decoder(nn.Module):
    """A block like Llama's: rotary embeddings, grouped queries, RMS norm, a gated product."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(64) + 0.5)
        self.q, self.kv = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
        self.o = nn.Linear(64, 64, bias=False)
        self.gate, self.up = nn.Linear(64, 128, bias=False), nn.Linear(64, 128, bias=False)
        self.down = nn.Linear(128, 64, bias=False)
        angles = torch.arange(8)[:, None] * 10.0 ** -(torch.arange(8) / 2)
        self.register_buffer("cos", torch.cos(angles).repeat(1, 2))
        self.register_buffer("sin", torch.sin(angles).repeat(1, 2))

    def rms(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.scale

    def rotated(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * self.cos + torch.cat((-second, first), -1) * self.sin

    def forward(self, x: Tensor) -> Tensor:
        h = self.rms(x)
        q = self.rotated(self.q(h).reshape(1, 8, 4, 16).transpose(1, 2))
        k, v = self.kv(h).reshape(1, 8, 2, 2, 16).permute(2, 0, 3, 1, 4).unbind()
        k, v = (each.repeat_interleave(2, 1) for each in (self.rotated(k), v))
        mask = torch.ones(8, 8, dtype=torch.bool).tril()
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.o(a.transpose(1, 2).reshape(1, 8, 64))
        h = self.rms(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Recurrent(nn.Module):
    """An LSTM that reads both ways, and a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(12, 16, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(32, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(self.lstm(x)[0])[0]


def images() -> tuple[Tensor, ...]:
    return (torch.randn(1, 3, 30, 26),)


def sentences() -> tuple[Tensor, ...]:
    mask = (torch.arange(16) < 11)[None].int()
    return torch.randint(0, 100, (1, 16)).int() * mask, mask


def tokens() -> tuple[Tensor, ...]:
    return (torch.randn(1, 8, 64),)


def sequences() -> tuple[Tensor, ...]:
    return (torch.randn(1, 9, 12),)


SOURCES: dict[str, tuple[type[nn.Module], Callable[[], tuple[Tensor, ...]]]] = {
    "cnn": (Cnn, images),
    "encoder": (Encoder, sentences),
    "decoder": (Decoder, tokens),
    "recurrent": (Recurrent, sequences),
}


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Callable[..., tuple[Path, nn.Module, tuple[Tensor, ...]]]:
    """Return a function that converts a model, once for each target and precision."""
    folder = tmp_path_factory.mktemp("converted")

    def made(kind: str, target: str, precision: str) -> tuple[Path, nn.Module, tuple[Tensor, ...]]:
        torch.manual_seed(0)
        cls, example = SOURCES[kind]
        module, inputs = cls().eval().requires_grad_(False), example()
        path = folder / f"{kind}-{target}-{precision}.mlpackage"
        if not path.exists():
            model = ct.convert(
                torch.jit.trace(module, inputs, check_trace=False),
                inputs=[
                    ct.TensorType(
                        f"x{i}",
                        each.shape,
                        dtype=np.float32 if each.is_floating_point() else np.int32,
                    )
                    for i, each in enumerate(inputs)
                ],
                outputs=[ct.TensorType("y", dtype=np.float32)],
                minimum_deployment_target=TARGETS[target],
                compute_precision=ct.precision[precision],
                skip_model_load=True,
            )
            model.save(str(path))
        return path, module, inputs

    return made


def named(inputs: tuple[Tensor, ...]) -> dict[str, np.ndarray]:
    return {f"x{i}": each.numpy() for i, each in enumerate(inputs)}


# The earliest and the latest that the ops differ most in; the others take as long.
SOME_TARGETS = [
    pytest.param(target, marks=[] if target in ("iOS15", "iOS18") else pytest.mark.large)
    for target in ("iOS15", "iOS16", "iOS17", "iOS18")
]


@pytest.mark.parametrize("target", SOME_TARGETS)
@pytest.mark.parametrize("kind", SOURCES)
def test_a_converted_model_agrees_with_its_source(kind, target, source):
    path, module, inputs = source(kind, target, "FLOAT32")
    assert snr(module(*inputs), load(path)(**named(inputs))["y"]) > FLOAT32_DB


@pytest.mark.parametrize("target", SOME_TARGETS)
@pytest.mark.parametrize("kind", SOURCES)
def test_a_model_converted_to_float16_agrees_with_its_source(kind, target, source):
    path, module, inputs = source(kind, target, "FLOAT16")
    expected = module(*inputs)
    for precision in ("float32", "float16"):
        made = load(path, precision=precision)(**named(inputs))
        assert snr(expected, made["y"]) > FLOAT16_DB


@pytest.mark.parametrize("kind", SOURCES)
def test_every_value_has_the_shape_that_the_program_declares(kind, source):
    path, _, inputs = source(kind, "iOS18", "FLOAT16")
    program = load(path)
    checked = 0

    def check(name: str, value: Any) -> None:
        nonlocal checked
        declared = program.values[name]
        if declared is not None:  # not a list
            sizes = zip(value.shape, declared.shape, strict=True)
            assert all(size == known or known is None for size, known in sizes), name
            checked += 1

    program.run(named(inputs), taps=program.values, observe=check)
    assert checked >= 10


# The loop that a GRU becomes has no place in an exported graph.
@pytest.mark.parametrize("kind", ["cnn", "encoder", "decoder"])
def test_a_converted_model_goes_through_export(kind, source):
    path, _, inputs = source(kind, "iOS18", "FLOAT32")
    exported = torch.export.export(load(path).to_torch(), inputs).module()
    np.testing.assert_array_equal(exported(*inputs), load(path)(**named(inputs))["y"])


class Flexible(nn.Module):
    """Attention to what came before, in sequences of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)
        self.places = nn.Parameter(torch.randn(64, 32))

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        x = x + self.places[:n]
        q, k, v = self.qkv(x).reshape(1, n, 3, 2, 16).permute(2, 0, 3, 1, 4).unbind()
        mask = torch.full((n, n), -1e4).triu(1)
        scores = F.softmax(q @ k.transpose(-1, -2) / 4 + mask, -1)
        return (scores @ v).transpose(1, 2).reshape(1, n, 32).cumsum(1)


def test_a_model_of_flexible_length_agrees_with_its_source_at_each(tmp_path):
    torch.manual_seed(0)
    module = Flexible().eval().requires_grad_(False)
    path = tmp_path / "flexible.mlpackage"
    model = ct.convert(
        torch.jit.trace(module, torch.randn(1, 8, 32), check_trace=False),
        inputs=[ct.TensorType("x0", (1, ct.RangeDim(1, 64, default=8), 32))],
        outputs=[ct.TensorType("y")],
        minimum_deployment_target=ct.target.iOS17,
        compute_precision=ct.precision.FLOAT32,
        skip_model_load=True,
    )
    model.save(str(path))
    program = load(path)
    for n in (1, 5, 8, 64):
        x = torch.randn(1, n, 32)
        assert snr(module(x), program(x0=x)["y"]) > FLOAT32_DB


class Cached(nn.Module):
    """Attention that keeps keys and values between calls; the mask says how many there are."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.register_buffer("keys", torch.zeros(1, 2, 32, 8))
        self.register_buffer("values", torch.zeros(1, 2, 32, 8))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        n, end = x.shape[1], mask.shape[-1]
        q, k, v = self.qkv(x).reshape(1, n, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind()
        self.keys[:, :, end - n : end, :] = k
        self.values[:, :, end - n : end, :] = v
        keys, values = self.keys[:, :, :end, :], self.values[:, :, :end, :]
        made = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        return made.transpose(1, 2).reshape(1, n, 16)


def test_a_decoder_with_a_cache_agrees_with_its_source_step_by_step(tmp_path):
    torch.manual_seed(0)
    module = Cached().eval().requires_grad_(False)
    path = tmp_path / "cached.mlpackage"
    n, end = ct.RangeDim(1, 32, default=1), ct.RangeDim(1, 32, default=4)
    half = np.float16
    example = (torch.zeros(1, 1, 16), torch.zeros(1, 1, 1, 4))
    model = ct.convert(
        torch.jit.trace(module, example, check_trace=False),
        inputs=[
            ct.TensorType("x0", (1, n, 16), dtype=half),
            ct.TensorType("x1", (1, 1, n, end), dtype=half),
        ],
        outputs=[ct.TensorType("y", dtype=half)],
        states=[
            ct.StateType(ct.TensorType(shape=(1, 2, 32, 8), dtype=half), name)
            for name in ("keys", "values")
        ],
        minimum_deployment_target=ct.target.iOS18,
        skip_model_load=True,
    )
    model.save(str(path))
    module.keys.zero_()
    module.values.zero_()
    module.qkv.half().float()  # what the package stores
    program = load(path)
    state = program.make_state()
    seen = 0
    for n_new in (7, 1, 1, 4):
        seen += n_new
        x = torch.randn(1, n_new, 16)
        mask = torch.full((n_new, seen), -1e4).triu(1 + seen - n_new)[None, None]
        assert snr(module(x, mask), program(x0=x, x1=mask, state=state)["y"]) > FLOAT32_DB
    assert snr(module.keys, state["keys"]) > FLOAT32_DB


# Compressed models


def joint(*treatments: Any, target: str | None = "iOS18") -> Recipe:
    select = Select(min_size=64)
    steps = tuple(Step(treatment=each, select=select) for each in treatments)
    return Recipe(steps=steps, target=target)


INT8, FOUR_BITS, HALF = (
    QuantizeConfig(dtype="int8"),
    PalettizeConfig(bits=4),
    PruneConfig(sparsity=0.5),
)
RECIPES = {
    "int8": joint(INT8, target=None),
    "int8 with offsets": joint(QuantizeConfig(dtype="uint8", offset=True), target=None),
    "4 bits": joint(FOUR_BITS, target=None),
    "sparse": joint(HALF, target=None),
    "blocks of int4": joint(QuantizeConfig(dtype="int4", granularity=PerBlock(8))),
    "3 bits in groups": joint(PalettizeConfig(bits=3, group_size=4)),
    "sparse, 4 bits": joint(HALF, FOUR_BITS),
    "sparse, int8": joint(HALF, INT8),
    "4 bits, table of int8": joint(FOUR_BITS, INT8),
}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("kind", ["cnn", "decoder"])
def test_a_compressed_model_runs_as_its_decompressed_one(kind, name, source, tmp_path):
    path, module, inputs = source(kind, "iOS16", "FLOAT16")
    compressed, dense = tmp_path / "compressed.mlpackage", tmp_path / "dense.mlpackage"
    report = milpress.compress(path, compressed, RECIPES[name])
    assert len(report.with_status("compressed")) >= 3
    milpress.decompress(compressed, dense)
    got = load(compressed)(**named(inputs))["y"]
    np.testing.assert_array_equal(got, load(dense)(**named(inputs))["y"])
    # Compressed it is, and still the same model.
    assert 3 < snr(module(*inputs), got) < FLOAT16_DB
