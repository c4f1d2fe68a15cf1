"""Modules of torch, converted by coremltools and run by the interpreter, beside themselves."""

from __future__ import annotations

import coremltools as ct
import numpy as np
import pytest
import torch
from coremltools.converters.mil.mil import Builder as mb  # noqa: N813
from coremltools.converters.mil.mil import types
from torch import nn
from torch.nn import functional

from milpress import interpreter
from milpress.errors import ExecutionError

IMAGE, LINE, SEQUENCE, HEADS = (1, 3, 12, 10), (2, 5, 6), (7, 2, 3), (2, 2, 5, 4)


class Together(nn.Module):
    """Applies several modules or functions to the same input and returns all they give."""

    def __init__(self, parts):
        super().__init__()
        self.modules_ = nn.ModuleList(part for part in parts if isinstance(part, nn.Module))
        self.parts = parts

    def forward(self, x):
        outputs = []
        for part in self.parts:
            found = part(x)
            for item in found if isinstance(found, tuple) else (found,):
                # Outputs of a program are floats of different ops: none is another's copy.
                outputs.append(item.float() * 1)
        return tuple(outputs)


def recurrent(layer):
    def run(x):
        output, state = layer(x)
        return (output, *state) if isinstance(state, tuple) else (output, state)

    return run


def module(layer):
    return layer.eval().requires_grad_(False)


def transposed(*arguments, **options):
    return module(nn.ConvTranspose2d(3, 6, *arguments, **options))


def resized(**options):
    return lambda x: functional.interpolate(x, **options)


def sampled(sampling, padding, align):
    places = torch.randn(1, 4, 5, 2, generator=torch.Generator().manual_seed(1))
    return lambda x: functional.grid_sample(x, places, sampling, padding, align)


def pools():
    for kernel, stride, pad, ceil in ((3, 2, 1, True), (2, 2, 0, True), (3, 2, 1, False)):
        yield nn.MaxPool2d(kernel, stride, pad, ceil_mode=ceil)
        for counted in (True, False):
            yield nn.AvgPool2d(kernel, stride, pad, ceil_mode=ceil, count_include_pad=counted)


def attended(x):
    places = torch.arange(5)
    mask = places[None] <= places[:, None]
    return (
        functional.scaled_dot_product_attention(x, x, x),
        functional.scaled_dot_product_attention(x, x, x, mask),
        torch.einsum("bhqd,bhkd->bhqk", x, x),
        x @ x.transpose(-1, -2),
    )


PLACES, ROWS, FIRST = torch.tensor([4, 0, 2]), torch.tensor([2, 0]), torch.tensor([0, 1])


def indexed(x):
    places = PLACES.expand(2, 5, 3)
    changed = x.clone()
    changed[:, 1:3, ::2] = 0
    return (
        torch.gather(x, 2, places),
        torch.index_select(x, 1, ROWS),
        x[:, [0, 2], [1, 3]],
        x[:, -1],
        x[:, ::2, 1:-1:3],
        x.flip([1, 2]),
        changed,
        x.scatter(2, places, 9.0),
        x.scatter_add(2, places, torch.ones(2, 5, 3)),
        x.index_put((FIRST,), torch.zeros(2, 5, 6)),
        x.masked_fill(x > 0, -1.0),
        torch.where(x > 0, x, -x),
        *torch.topk(x, 3, -1),
        *torch.sort(x, 1),
        x.cumsum(1),
        torch.roll(x, 2, 1),
        torch.tril(x, 1),
        torch.triu(x, -1),
    )


def reduced(x):
    return (
        x.mean((1, 2)),
        x.sum(),
        x.amax(1),
        x.amin(-1),
        x.std(1),
        x.var(2),
        x.logsumexp(1),
        x.norm(dim=1),
        x.abs().sum(1),
        x.argmax(1),
        x.argmin(-1, keepdim=True),
        functional.normalize(x, dim=1),
    )


def calculated(x):
    whole = (x * 4).int()
    return (
        x.abs().sqrt(),
        x.exp(),
        x.abs().log(),
        x.sin(),
        x.cos(),
        x.tan(),
        x.atan(),
        torch.asin(x.tanh()),
        torch.erf(x),
        x.floor(),
        x.ceil(),
        x.round(),
        x.sign(),
        x.abs().rsqrt(),
        x / (1 + x.abs()),
        x**3,
        x.clamp(-0.5, 0.5),
        torch.sinh(x),
        torch.cosh(x),
        x.remainder(0.7),
        whole // 3,
        whole % 3,
        whole / 2,
        (whole > 1) & ~(whole == 5),
        torch.maximum(x, -x),
    )


def laid_out(x):
    return (
        torch.cat([x, x], 1),
        torch.stack([x, x], 1),
        x.chunk(3, -1)[1],
        x.split([1, 4], 1)[0],
        x.repeat(1, 2, 1),
        x[:, :1].expand(2, 5, 6),
        x.permute(2, 0, 1),
        x.reshape(-1, 6),
        x.flatten(1),
        x.unsqueeze(1),
    )


def padded(x):
    return tuple(
        functional.pad(x, (2, 1, 1, 3), mode=mode) for mode in ("reflect", "replicate", "constant")
    )


FAMILIES = {
    "activations": (IMAGE, lambda: [
        nn.ReLU(), nn.ReLU6(), nn.ELU(0.7), nn.SELU(), nn.GELU(), nn.GELU("tanh"), nn.SiLU(),
        nn.Hardswish(), nn.Hardsigmoid(), nn.Hardtanh(-0.5, 0.8), nn.LeakyReLU(0.2),
        module(nn.PReLU(3, init=0.3)), nn.Softplus(), nn.Softplus(2.0), nn.Softsign(),
        nn.LogSoftmax(1), nn.Softmax(1), nn.Mish(), nn.GLU(-1), nn.Tanhshrink(),
    ]),
    "convolutions": (IMAGE, lambda: [
        module(nn.Conv2d(3, 6, 3, 1, 1)), module(nn.Conv2d(3, 6, 4, 2, 1, groups=3)),
        module(nn.Conv2d(3, 6, 3, 2, 0, 2)), module(nn.Conv2d(3, 6, 4, padding="same")),
        transposed(3, 2, 1, 1), transposed(4, 2, 1, groups=3), transposed(3, dilation=2),
    ]),
    "pools": (IMAGE, lambda: [
        *pools(), nn.AdaptiveAvgPool2d(1), nn.AdaptiveAvgPool2d((3, 2)),
        nn.AdaptiveMaxPool2d((3, 2)),
    ]),
    "norms": (IMAGE, lambda: [
        module(nn.BatchNorm2d(3)), module(nn.InstanceNorm2d(3, affine=True)),
        module(nn.GroupNorm(3, 3)), nn.LocalResponseNorm(3), module(nn.LayerNorm(10)),
        module(nn.LayerNorm([12, 10])),
    ]),
    "resizes": (IMAGE, lambda: [
        *(resized(scale_factor=2, mode="bilinear", align_corners=flag) for flag in (False, True)),
        *(resized(size=(17, 9), mode="bilinear", align_corners=flag) for flag in (False, True)),
        resized(scale_factor=3), resized(size=(18, 15)), resized(scale_factor=(1.5, 0.7)),
    ]),
    "samples": (IMAGE, lambda: [
        sampled(sampling, padding, align) for sampling in ("bilinear", "nearest")
        for padding in ("zeros", "border", "reflection") for align in (False, True)
    ]),
    "recurrent": (SEQUENCE, lambda: [
        recurrent(module(nn.LSTM(3, 4))), recurrent(module(nn.LSTM(3, 4, 2, bidirectional=True))),
        recurrent(module(nn.GRU(3, 4))), recurrent(module(nn.RNN(3, 4))),
    ]),
    "attention": (HEADS, lambda: [attended]),
    "indices": (LINE, lambda: [indexed]),
    "reductions": (LINE, lambda: [reduced]),
    "calculations": (LINE, lambda: [calculated]),
    "layout": (LINE, lambda: [laid_out, module(nn.Linear(6, 3))]),
    "padding": (IMAGE, lambda: [padded, lambda x: functional.unfold(x, 3, padding=1)]),
    "shuffles": ((1, 8, 4, 6), lambda: [nn.PixelShuffle(2)]),
}  # fmt: skip


@pytest.mark.parametrize(
    "target",
    [
        "iOS15",
        pytest.param("iOS16", marks=pytest.mark.large),
        pytest.param("iOS17", marks=pytest.mark.large),
        "iOS18",
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_converted_module_gives_what_torch_gives(family, target, tmp_path):
    shape, parts = FAMILIES[family]
    torch.manual_seed(0)
    together = Together(parts()).eval()
    x = torch.randn(shape)
    traced = torch.jit.trace(together, x, check_trace=False)
    converted = ct.convert(
        traced,
        inputs=[ct.TensorType(name="x", shape=shape)],
        minimum_deployment_target=getattr(ct.target, target),
        compute_precision=ct.precision.FLOAT32,
        skip_model_load=True,
    )
    converted.save(str(tmp_path / "model.mlpackage"))
    program = interpreter.load(tmp_path / "model.mlpackage")
    ours, theirs = program(x=x.numpy()).values(), traced(x)
    assert len(ours) == len(theirs)
    for i, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        expected = other.numpy().astype(np.float64)
        assert one.shape == expected.shape, i
        noise = np.square(one - expected).sum()
        # 110 dB: five digits and a half of float32's seven.
        assert noise <= 1e-11 * np.square(expected).sum(), i


class Packed(nn.Module):
    """Runs a layer over sequences of several lengths."""

    def __init__(self):
        super().__init__()
        self.layer = nn.LSTM(4, 6, 2, batch_first=True)

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        return nn.utils.rnn.pad_packed_sequence(self.layer(packed)[0], batch_first=True)[0]


@pytest.mark.parametrize("lengths", [[5, 2, 1], [2, 2, 1]])
def test_an_lstm_of_packed_sequences_gives_what_torch_gives(lengths, tmp_path):
    torch.manual_seed(0)
    layer = Packed().eval().requires_grad_(False)
    x, counts = torch.randn(3, lengths[0], 4), torch.tensor(lengths, dtype=torch.int32)
    converted = ct.convert(
        torch.jit.trace(layer, (x, counts)),
        inputs=[
            ct.TensorType(name="x", shape=x.shape),
            ct.TensorType(name="lengths", shape=counts.shape, dtype=np.int32),
        ],
        minimum_deployment_target=ct.target.iOS17,
        compute_precision=ct.precision.FLOAT32,
        skip_model_load=True,
    )
    converted.save(str(tmp_path / "model.mlpackage"))
    program = interpreter.load(tmp_path / "model.mlpackage")
    (made,) = program(x=x.numpy(), lengths=counts.numpy()).values()
    expected = layer(x, counts).numpy().astype(np.float64)
    assert made.shape == expected.shape
    # 110 dB: five digits and a half of float32's seven.
    assert np.square(made - expected).sum() <= 1e-11 * np.square(expected).sum()


def test_an_op_that_cannot_compute_says_which_it_is_and_where(tmp_path):
    @mb.program(
        input_specs=[mb.TensorSpec((3,)), mb.TensorSpec((2,), types.int32)],
        opset_version=ct.target.iOS17,
    )
    def program(x, places):
        return mb.gather(x=x, indices=places, validate_indices=True, name="taken")

    converted = ct.convert(
        program,
        minimum_deployment_target=ct.target.iOS17,
        compute_precision=ct.precision.FLOAT32,
        skip_model_load=True,
    )
    converted.save(str(tmp_path / "model.mlpackage"))
    run = interpreter.load(tmp_path / "model.mlpackage")
    x = np.float32([1, 2, 3])
    np.testing.assert_array_equal(run(x=x, places=np.int32([2, 0]))["taken"], [3, 1])
    message = r"'taken': gather .*indices must be in \[0, 3\), got 0 to 3"
    with pytest.raises(ExecutionError, match=message):
        run(x=x, places=np.int32([3, 0]))
