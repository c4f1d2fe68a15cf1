from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from mil_ops import IOS15, IOS16, IOS18, check, computed, inferred, inferred_types, operator
from torch.nn import functional

few = settings(max_examples=15, deadline=None)
small = st.integers(1, 3)

# Multiples of 1/8 up to 1 multiply and add up exactly in float32, in any order.
eighths = st.integers(-8, 8).map(lambda n: n / 8)


def exact(*shape: int) -> st.SearchStrategy:
    return npst.arrays(np.float32, shape, elements=eighths)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def same_pads(pad_type: str, size: int, extent: int, stride: int) -> tuple[int, int]:
    """Return the padding of ``same``: the definition of the format, not the text of the op.

    The text of conv puts the odd one before, which neither coremltools' shapes, nor TensorFlow,
    whose padding ``same`` stands for, nor the name of ``same_lower`` agree with.
    """
    total = max(0, (-(-size // stride) - 1) * stride + extent - size)
    less, more = total // 2, total - total // 2
    return (less, more) if pad_type == "same" else (more, less)


@st.composite
def windows(draw, rank: int, dilated: bool = True):
    """Draw sizes, kernels, strides, dilations and padding that leave something to compute."""
    sizes = [draw(st.integers(2, 5)) for _ in range(rank)]
    kernel = [draw(small) for _ in range(rank)]
    strides = [draw(small) for _ in range(rank)]
    dilations = [draw(st.integers(1, 2)) if dilated else 1 for _ in range(rank)]
    extents = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    pad_type = draw(st.sampled_from(["valid", "custom", "same", "same_lower"]))
    if pad_type == "custom":
        pads = [(draw(st.integers(0, e - 1)), draw(st.integers(0, e - 1))) for e in extents]
    elif pad_type == "valid":
        pads = [(0, 0)] * rank
    else:
        pads = [same_pads(pad_type, *each) for each in zip(sizes, extents, strides, strict=True)]
    assume(all(n + sum(p) >= e for n, p, e in zip(sizes, pads, extents, strict=True)))
    arguments = {"strides": strides, "pad_type": pad_type}
    if pad_type == "custom":
        arguments["pad"] = [amount for pair in pads for amount in pair]
    return sizes, kernel, dilations, pads, arguments


def views(x: np.ndarray, kernel, strides, dilations) -> np.ndarray:
    """Return the windows of the last axes: (..., places, kernel)."""
    rank = len(kernel)
    extents = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    seen = np.lib.stride_tricks.sliding_window_view(x, extents, tuple(range(-rank, 0)))
    steps = [slice(None, None, s) for s in strides] + [slice(None, None, d) for d in dilations]
    return seen[(..., *steps)]


@pytest.mark.parametrize("rank", [1, 2, 3])
@few
@given(data=st.data())
def test_a_convolution_is_the_sum_over_its_windows(rank, data):
    sizes, kernel, dilations, pads, arguments = data.draw(windows(rank))
    groups, c_in, c_out = data.draw(st.integers(1, 2)), data.draw(small), data.draw(small)
    x = data.draw(exact(2, groups * c_in, *sizes))
    weight = data.draw(exact(groups * c_out, c_in, *kernel))
    bias = data.draw(exact(groups * c_out))
    arguments |= {"x": x, "weight": weight, "dilations": dilations, "groups": groups}
    wide = np.pad(x.astype(np.float64), [(0, 0), (0, 0), *pads])
    seen = views(wide, kernel, arguments["strides"], dilations)
    letters = "pqr"[:rank], "uvw"[:rank]
    spec = f"nc{letters[0]}{letters[1]},oc{letters[1]}->no{letters[0]}"
    parts = [
        np.einsum(spec, seen[:, g * c_in : (g + 1) * c_in], weight[g * c_out : (g + 1) * c_out])
        for g in range(groups)
    ]
    expected = np.concatenate(parts, 1)
    check(computed("conv", **arguments), expected)
    with_bias = expected + bias.reshape([-1] + [1] * rank)
    check(computed("conv", bias=bias, **arguments), with_bias)
    assert inferred_types("conv", **arguments)[0][0] == expected.shape


@pytest.mark.parametrize("rank", [1, 2, 3])
@few
@given(data=st.data())
def test_a_transposed_convolution_is_the_transpose_of_the_convolution(rank, data):
    sizes, kernel, dilations, _, arguments = data.draw(windows(rank))
    assume(arguments["pad_type"] != "same_lower")  # which MIL has for no transposed one
    groups, c_in, c_out = data.draw(st.integers(1, 2)), data.draw(small), data.draw(small)
    weight = data.draw(exact(groups * c_out, c_in, *kernel))
    arguments |= {"weight": weight, "dilations": dilations, "groups": groups}
    before = data.draw(exact(1, groups * c_in, *sizes))
    after = computed("conv", x=before, **arguments)
    x = data.draw(exact(*after.shape))
    ours = computed("conv_transpose", x=x, output_shape=list(before.shape), **arguments)
    assert ours.shape == before.shape
    assert np.vdot(after, x) == np.vdot(before, ours)
    # Without a shape, the largest that has none beyond the last window, or whole strides.
    strides = arguments["strides"]
    free = computed("conv_transpose", x=x, **arguments)
    assert free.shape == inferred_types("conv_transpose", x=x, **arguments)[0][0]
    if free.shape == before.shape:
        check(free, ours)
    elif arguments["pad_type"] == "same":
        assert free.shape[2:] == tuple(n * s for n, s in zip(x.shape[2:], strides, strict=True))
    else:
        both = tuple(slice(min(m, n)) for m, n in zip(free.shape, ours.shape, strict=True))
        check(free[both], ours[both])
    bias = data.draw(exact(groups * c_in))
    biased = computed("conv_transpose", x=x, bias=bias, **arguments)
    check(biased, free + bias.reshape([-1] + [1] * rank))


def test_a_transposed_convolution_of_stride_beyond_its_kernel_leaves_gaps():
    x, weight = np.float32([[[1, 2]]]), np.float32([[[4]]])
    ours = computed("conv_transpose", x=x, weight=weight, strides=[3], pad_type="same")
    check(ours, np.float32([[[4, 0, 0, 8, 0, 0]]]))


def test_a_padding_type_that_mil_lacks_is_named():
    for name in ("conv", "conv_transpose"):
        with pytest.raises(ValueError, match=r"pad_type must be one of valid, .*, got full"):
            computed(name, x=normal(1, 1, 3), weight=normal(1, 1, 1), pad_type="full")


# Pools


@pytest.mark.parametrize("rank", [1, 2, 3])
@few
@given(data=st.data())
def test_a_pool_combines_what_its_windows_hold(rank, data):
    sizes, kernel, dilations, pads, arguments = data.draw(windows(rank, dilated=False))
    x = data.draw(exact(2, 2, *sizes))
    arguments |= {"x": x, "kernel_sizes": kernel}
    strides = arguments["strides"]
    around = [(0, 0), (0, 0), *pads]
    axes = tuple(range(-rank, 0))
    wide = x.astype(np.float64)
    highest = np.pad(wide, around, constant_values=-np.inf)
    expected = views(highest, kernel, strides, dilations).max(axes)
    check(computed("max_pool", **arguments), expected)
    seen = views(np.pad(wide, around), kernel, strides, dilations)
    # A quotient may be off by an ulp, and ours is one of two quotients.
    check(computed("avg_pool", **arguments), seen.mean(axes), ulps=2)
    counts = views(np.pad(np.ones_like(wide), around), kernel, strides, dilations).sum(axes)
    ours = computed("avg_pool", exclude_padding_from_average=True, **arguments)
    check(ours, seen.sum(axes) / counts, ulps=2)
    check(computed("l2_pool", **arguments), np.sqrt((seen**2).sum(axes)), ulps=2)
    assert inferred_types("max_pool", **arguments)[0][0] == expected.shape


@pytest.mark.parametrize("rank", [1, 2])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_pool_that_rounds_its_size_up_is_torchs(rank, data):
    sizes = [data.draw(st.integers(2, 6)) for _ in range(rank)]
    kernel = [data.draw(small) for _ in range(rank)]
    strides = [data.draw(st.integers(1, k)) for k in kernel]
    pads = [data.draw(st.integers(0, k // 2)) for k in kernel]
    assume(all(n + 2 * p >= k for n, p, k in zip(sizes, pads, kernel, strict=True)))
    x = data.draw(exact(1, 2, *sizes))
    arguments = {
        "x": x,
        "kernel_sizes": kernel,
        "strides": strides,
        "pad_type": "custom",
        "pad": [amount for p in pads for amount in (p, p)],
        "ceil_mode": True,
    }
    torch_max = (functional.max_pool1d, functional.max_pool2d)[rank - 1]
    torch_mean = (functional.avg_pool1d, functional.avg_pool2d)[rank - 1]
    given_x = torch.from_numpy(x)
    theirs = torch_max(given_x, kernel, strides, pads, ceil_mode=True).numpy()
    assert inferred_types("max_pool", **arguments)[0][0] == theirs.shape
    check(computed("max_pool", **arguments), theirs)
    for exclude in (False, True):
        ours = computed("avg_pool", exclude_padding_from_average=exclude, **arguments)
        theirs = torch_mean(given_x, kernel, strides, pads, True, not exclude).numpy()
        check(ours, theirs, ulps=4)


def test_pools_are_what_core_ml_gave():
    # What coremltools' own tests expect of Core ML.
    x = np.arange(1, 8, dtype=np.float32).reshape(1, 1, 7)
    arguments = {"x": x, "kernel_sizes": [3], "strides": [3], "pad_type": "same"}
    check(computed("max_pool", **arguments), np.float32([[[2, 5, 7]]]))
    check(computed("l2_pool", **arguments), np.sqrt(np.float32([[[5, 50, 85]]])), ulps=2)
    square = np.float32([[[[1, 2], [3, 4]]]])
    ours = computed("l2_pool", x=square, kernel_sizes=[2, 2], pad_type="same_lower")
    check(ours, np.sqrt(np.float32([[[[1, 5], [10, 30]]]])), ulps=2)


# Norms


@few
@given(shape=st.lists(small, min_size=3, max_size=5), data=st.data())
def test_norms_follow_their_formulas(shape, data):
    x = normal(*shape, seed=data.draw(st.integers(0, 9)))
    channels = shape[1]
    gamma, beta = normal(channels, seed=1), normal(channels, seed=2)
    along = [-1] + [1] * (len(shape) - 2)
    epsilon = 1e-3
    # Some sums of a few values of order 1, divided by something that may be as small as epsilon.
    bound = {"ulps": 16, "absolute": 2**-16}
    mean, variance = normal(channels, seed=3), normal(channels, seed=4) ** 2
    wide = x.astype(np.float64)
    scaled = (wide - mean.reshape(along)) / np.sqrt(variance.reshape(along) + np.float32(epsilon))
    arguments = {"x": x, "epsilon": epsilon}
    check(computed("batch_norm", mean=mean, variance=variance, **arguments), scaled, **bound)
    expected = scaled * gamma.reshape(along) + beta.reshape(along)
    ours = computed("batch_norm", mean=mean, variance=variance, gamma=gamma, beta=beta, **arguments)
    check(ours, expected, **bound)
    axes = tuple(range(2, len(shape)))
    centered = wide - wide.mean(axes, keepdims=True)
    scaled = centered / np.sqrt((centered**2).mean(axes, keepdims=True) + epsilon)
    check(computed("instance_norm", **arguments), scaled, **bound)
    ours = computed("instance_norm", gamma=gamma, beta=beta, **arguments)
    check(ours, scaled * gamma.reshape(along) + beta.reshape(along), **bound)
    check(computed("l2_norm", x=x), inferred("l2_norm", x=x), ulps=8)


@few
@given(shape=st.lists(st.integers(2, 4), min_size=1, max_size=4), data=st.data())
def test_a_layer_norm_over_any_axes_is_what_coremltools_infers(shape, data):
    x = normal(*shape)
    rank = len(shape)
    axes = sorted(data.draw(st.lists(st.integers(0, rank - 1), min_size=1, unique=True)))
    normalized = [shape[axis] for axis in axes]
    arguments = {"x": x, "axes": [axis - rank for axis in axes], "epsilon": np.float32(1e-3)}
    bound = {"ulps": 16, "absolute": 2**-18}
    check(computed("layer_norm", **arguments), inferred("layer_norm", **arguments), **bound)
    arguments |= {"gamma": normal(*normalized, seed=1), "beta": normal(*normalized, seed=2)}
    check(computed("layer_norm", **arguments), inferred("layer_norm", **arguments), **bound)
    whole = {"x": x, "epsilon": np.float32(1e-3)}
    theirs = inferred("layer_norm", axes=list(range(rank)), **whole)
    check(computed("layer_norm", **whole), theirs, **bound)


@few
@given(shape=st.tuples(small, st.integers(1, 6), small, small), size=st.sampled_from([1, 3, 5]))
def test_a_local_response_norm_looks_at_neighboring_channels(shape, size):
    x = normal(*shape)
    expected = np.zeros(shape)
    for channel in range(shape[1]):
        near = x[:, max(0, channel - size // 2) : channel + size // 2 + 1].astype(np.float64)
        total = (near**2).sum(1)
        expected[:, channel] = x[:, channel] / (1.5 + 0.3 / size * total) ** 0.6
    ours = computed("local_response_norm", x=x, size=size, alpha=0.3, beta=0.6, k=1.5)
    check(ours, expected, ulps=16)


# Recurrent layers

ACTIVATIONS = {
    "tanh": np.tanh,
    "scaled_tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "hard_sigmoid": lambda x: np.clip(0.2 * x + 0.5, 0, 1),
    "relu": lambda x: np.maximum(x, 0),
    "linear": lambda x: x,
}
# A few steps of sums of a few products of order 1.
RECURRENT = {"absolute": 2**-17, "ulps": 16}


def lstm_pass(x, h, c, weights, names, clip):
    """Run one direction as the definition's formulas say, in float64."""
    weight_ih, weight_hh, bias, peephole = weights
    gate, cell, output = (ACTIVATIONS[name] for name in names)
    looks = np.split(np.zeros(3 * h.shape[-1]) if peephole is None else peephole, 3)
    steps = []
    for step in x.astype(np.float64):
        sums = step @ weight_ih.T + h @ weight_hh.T + (0 if bias is None else bias)
        i, f, o, z = np.split(sums, 4, -1)
        c = gate(f + looks[1] * c) * c + gate(i + looks[0] * c) * cell(z)
        if clip is not None:
            c = np.clip(c, -clip, clip)
        h = gate(o + looks[2] * c) * output(c)
        steps.append(h)
    return np.stack(steps), h, c


@few
@given(
    sizes=st.tuples(*[small] * 4),
    direction=st.sampled_from(["forward", "reverse", "bidirectional"]),
    names=st.tuples(*[st.sampled_from(sorted(ACTIVATIONS))] * 3),
    options=st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans()),
    seed=st.integers(0, 99),
)
def test_an_lstm_follows_its_formulas(sizes, direction, names, options, seed):
    steps, batch, depth, hidden = sizes
    has_bias, peeps, clips, all_of_them = options
    both = direction == "bidirectional"

    def weights(seed):
        return (
            normal(4 * hidden, depth, seed=seed) / 4,
            normal(4 * hidden, hidden, seed=seed + 1) / 4,
            normal(4 * hidden, seed=seed + 2) if has_bias else None,
            normal(3 * hidden, seed=seed + 3) if peeps else None,
        )

    x = normal(steps, batch, depth, seed=seed)
    h = normal(batch, hidden * (1 + both), seed=seed + 1)
    c = normal(batch, hidden * (1 + both), seed=seed + 2)
    clip = 0.5 if clips else None
    ahead, back = weights(seed), weights(seed + 50)
    arguments = dict(zip(("weight_ih", "weight_hh", "bias", "peephole"), ahead, strict=True))
    if both:
        names_back = ("weight_ih_back", "weight_hh_back", "bias_back", "peephole_back")
        arguments |= dict(zip(names_back, back, strict=True))
    arguments = {key: value for key, value in arguments.items() if value is not None}
    if clip is not None:
        arguments["clip"] = np.float32(clip)
    ours = computed(
        "lstm",
        x=x,
        initial_h=h,
        initial_c=c,
        direction=direction,
        output_sequence=all_of_them,
        recurrent_activation=names[0],
        cell_activation=names[1],
        activation=names[2],
        **arguments,
    )
    read = x if direction != "reverse" else x[::-1]
    seen, last_h, last_c = lstm_pass(read, h[:, :hidden], c[:, :hidden], ahead, names, clip)
    seen = seen if all_of_them else seen[-1:]
    if both:
        h_back, c_back = h[:, hidden:], c[:, hidden:]
        seen_back, h_back, c_back = lstm_pass(x[::-1], h_back, c_back, back, names, clip)
        seen_back = seen_back[::-1] if all_of_them else seen_back[-1:]
        seen = np.concatenate([seen, seen_back], -1)
        last_h = np.concatenate([last_h, h_back], -1)
        last_c = np.concatenate([last_c, c_back], -1)
    check(ours, (seen, last_h, last_c), **RECURRENT)


def ifoz(weight: torch.Tensor) -> np.ndarray:
    """Return torch's weights (input, forget, cell, output) in MIL's order."""
    i, f, z, o = weight.detach().chunk(4)
    return torch.cat([i, f, o, z]).numpy()


@pytest.mark.parametrize("both", [False, True])
def test_an_lstm_is_torchs(both):
    torch.manual_seed(0)
    layer = torch.nn.LSTM(3, 4, bidirectional=both)
    x, (h, c) = torch.randn(5, 2, 3), torch.randn(2, 1 + both, 2, 4)
    output, (last_h, last_c) = layer(x, (h, c))

    def merged(state):
        return torch.cat(list(state), -1).detach().numpy()

    arguments = {}
    for end, suffix in (("", ""), ("_reverse", "_back"))[: 1 + both]:
        arguments[f"weight_ih{suffix}"] = ifoz(getattr(layer, f"weight_ih_l0{end}"))
        arguments[f"weight_hh{suffix}"] = ifoz(getattr(layer, f"weight_hh_l0{end}"))
        bias = getattr(layer, f"bias_ih_l0{end}") + getattr(layer, f"bias_hh_l0{end}")
        arguments[f"bias{suffix}"] = ifoz(bias)
    ours = computed(
        "lstm",
        x=x.numpy(),
        initial_h=merged(h),
        initial_c=merged(c),
        direction="bidirectional" if both else "forward",
        output_sequence=True,
        **arguments,
    )
    check(ours, (output.detach().numpy(), merged(last_h), merged(last_c)), **RECURRENT)


def roz(weight: torch.Tensor) -> np.ndarray:
    """Return torch's weights (reset, update, new) in MIL's order."""
    r, z, o = weight.detach().chunk(3)
    return torch.cat([r, o, z]).numpy()


def test_a_gru_with_reset_after_is_torchs():
    torch.manual_seed(0)
    layer = torch.nn.GRU(3, 4)
    x, h = torch.randn(5, 2, 3), torch.randn(1, 2, 4)
    output, last = layer(x, h)
    ours = computed(
        "gru",
        x=x.numpy(),
        initial_h=h[0].numpy(),
        weight_ih=roz(layer.weight_ih_l0),
        weight_hh=roz(layer.weight_hh_l0),
        input_bias=roz(layer.bias_ih_l0),
        bias=roz(layer.bias_hh_l0),
        reset_after=True,
        output_sequence=True,
    )
    check(ours, (output.detach().numpy(), last[0].detach().numpy()), **RECURRENT)


@few
@given(
    sizes=st.tuples(*[small] * 4),
    direction=st.sampled_from(["forward", "reverse"]),
    names=st.tuples(*[st.sampled_from(sorted(ACTIVATIONS))] * 2),
    options=st.tuples(st.booleans(), st.booleans()),
    seed=st.integers(0, 99),
)
def test_a_gru_and_an_rnn_follow_their_formulas(sizes, direction, names, options, seed):
    steps, batch, depth, hidden = sizes
    has_bias, all_of_them = options
    x, initial = normal(steps, batch, depth, seed=seed), normal(batch, hidden, seed=seed)
    weight_ih = normal(3 * hidden, depth, seed=seed) / 4
    weight_hh = normal(3 * hidden, hidden, seed=seed) / 4
    bias = normal(3 * hidden, seed=seed) if has_bias else None
    arguments = {"direction": direction, "output_sequence": all_of_them, "initial_h": initial}
    gate, output = (ACTIVATIONS[name] for name in names)
    w, u = np.split(weight_ih.astype(np.float64), 3), np.split(weight_hh, 3)
    b = np.split(np.zeros(3 * hidden) if bias is None else bias, 3)
    read = x[::-1] if direction == "reverse" else x
    h, seen = initial, []
    for step in read:
        r = gate(step @ w[0].T + h @ u[0].T + b[0])
        z = gate(step @ w[2].T + h @ u[2].T + b[2])
        # As Core ML does, where the text could be read otherwise: the reset comes first.
        o = output(step @ w[1].T + (r * h) @ u[1].T + b[1])
        h = (1 - z) * o + z * h
        seen.append(h)
    given_bias = {} if bias is None else {"bias": bias}
    for opset in (IOS15, IOS18):
        ours = computed(
            "gru",
            opset=opset,
            x=x,
            weight_ih=weight_ih,
            weight_hh=weight_hh,
            recurrent_activation=names[0],
            activation=names[1],
            **given_bias,
            **arguments,
        )
        check(ours, (np.stack(seen if all_of_them else seen[-1:]), h), **RECURRENT)
    h, seen = initial, []
    for step in read:
        h = output(step @ w[0].T + h @ u[0].T + b[0])
        seen.append(h)
    ours = computed(
        "rnn",
        x=x,
        weight_ih=weight_ih[:hidden],
        weight_hh=weight_hh[:hidden],
        activation=names[1],
        **({} if bias is None else {"bias": bias[:hidden]}),
        **arguments,
    )
    check(ours, (np.stack(seen if all_of_them else seen[-1:]), h), **RECURRENT)


def test_what_a_recurrent_layer_lacks_is_named():
    x, h, weight = normal(1, 1, 1), normal(1, 1), normal(4, 1)
    lstm = {"x": x, "initial_h": h, "initial_c": h, "weight_ih": weight, "weight_hh": weight}
    with pytest.raises(ValueError, match="weight_ih_back and weight_hh_back must be given"):
        computed("lstm", direction="bidirectional", **lstm)
    with pytest.raises(ValueError, match="direction must be forward or reverse, got up"):
        computed("lstm", direction="up", **lstm)
    with pytest.raises(ValueError, match=r"activation must be one of .*, got swish"):
        computed("lstm", activation="swish", **lstm)


STATES = {"lstm": ("initial_h", "initial_c"), "gru": ("initial_h",), "rnn": ("initial_h",)}
GATES = {"lstm": 4, "gru": 3, "rnn": 1}


@pytest.mark.parametrize("n_rows", [1, 2, 7])
@pytest.mark.parametrize("opset", [IOS15, IOS18])
@pytest.mark.parametrize("name", STATES)
def test_an_initial_state_of_like_rows_is_that_of_every_sequence(name, opset, n_rows):
    n_sequences, hidden = 3, 2
    weights = {
        "x": normal(4, n_sequences, 5),
        "weight_ih": normal(GATES[name] * hidden, 5),
        "weight_hh": normal(GATES[name] * hidden, hidden),
    }
    row = normal(hidden)
    made, expected = (
        computed(name, opset=opset, **weights, **dict.fromkeys(STATES[name], np.tile(row, (n, 1))))
        for n in (n_rows, n_sequences)
    )
    check(made, expected)
    states = dict.fromkeys(STATES[name], normal(2, hidden))
    with pytest.raises(ValueError, match=r"initial_h must have a row for each of 3 .* got 2"):
        computed(name, opset=opset, **weights, **states)


# Resizing


def grid(size: int, count: int, mode: str) -> np.ndarray:
    """Return the grid points that the text of resize_bilinear gives."""
    i = np.arange(count)
    if mode == "ALIGN_CORNERS" and count == 1:
        return np.float64([(size - 1) / 2])
    if mode in ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS"):
        points = i * ((size - 1) / max(count - 1, 1))
    elif mode == "DEFAULT":
        points = i * ((size - size / count) / max(count - 1, 1))
    elif mode == "OFFSET_CORNERS":
        delta = max(1, size - 1) / count
        points = 0.5 * delta + i * delta
    else:
        spacing = size / count
        points = i * spacing + 0.5 * spacing - 0.5
    return np.minimum(size - 1, np.maximum(0, points))


SAMPLING = ("DEFAULT", "STRICT_ALIGN_CORNERS", "ALIGN_CORNERS", "OFFSET_CORNERS", "UNALIGN_CORNERS")


def interpolated(x: np.ndarray, axis: int, points: np.ndarray) -> np.ndarray:
    places = np.arange(x.shape[axis])
    return np.apply_along_axis(lambda line: np.interp(points, places, line), axis, x)


@pytest.mark.parametrize("mode", SAMPLING)
@few
@given(sizes=st.tuples(*[st.integers(1, 5)] * 2), target=st.tuples(*[st.integers(1, 7)] * 2))
def test_a_bilinear_resize_samples_the_grid_of_its_mode(mode, sizes, target):
    x = normal(1, 2, *sizes)
    expected = x.astype(np.float64)
    for axis in (2, 3):
        expected = interpolated(expected, axis, grid(x.shape[axis], target[axis - 2], mode))
    arguments = {"target_size_height": target[0], "target_size_width": target[1]}
    ours = computed("resize_bilinear", x=x, sampling_mode=mode, **arguments)
    check(ours, expected, ulps=8)
    shape = np.int32([9, *target])
    ours = computed("resize", x=x, shape=shape, resized_dims=2, sampling_mode=mode)
    check(ours, expected, ulps=8)


def test_resizes_are_what_core_ml_gave():
    # What coremltools' own tests and the definition's examples expect of Core ML.
    x = np.float32([[[0, 1]]])
    for mode, count, points in (
        ("UNALIGN_CORNERS", 5, [0, 0.1, 0.5, 0.9, 1]),
        ("STRICT_ALIGN_CORNERS", 5, [0, 0.25, 0.5, 0.75, 1]),
        ("DEFAULT", 5, [0, 0.4, 0.8, 1, 1]),
        ("OFFSET_CORNERS", 5, [0.1, 0.3, 0.5, 0.7, 0.9]),
        ("DEFAULT", 6, [0, 1 / 3, 2 / 3, 1, 1, 1]),
        ("OFFSET_CORNERS", 6, [1 / 12, 3 / 12, 5 / 12, 7 / 12, 9 / 12, 11 / 12]),
    ):
        arguments = {"target_size_width": count, "sampling_mode": mode}
        ours = computed("resize_bilinear", x=x, target_size_height=1, **arguments)
        check(ours, np.float64([[points]]), ulps=2)
    ours = computed("upsample_bilinear", x=x, scale_factor_width=2.6, align_corners=False)
    check(ours, np.float64([[[0, 0.1, 0.5, 0.9, 1]]]), ulps=2)
    tall = np.float32([-6.174, 9.371]).reshape(1, 1, 2, 1)
    ours = computed(
        "resize", x=tall, shape=[1, 1, 3, 2], resized_dims=2, interpolation_mode="NEAREST_NEIGHBOR"
    )
    check(ours, tall[:, :, [0, 1, 1]].repeat(2, -1))
    wide = np.float32([1.5, -2.5, 3.5]).reshape(1, 1, 1, 3)
    ours = computed(
        "upsample_nearest_neighbor", x=wide, scale_factor_height=3.17, scale_factor_width=0.67
    )
    check(ours, np.tile(wide[..., :2], (1, 1, 3, 1)))


def test_a_resize_takes_over_the_sizes_that_are_zero():
    x = normal(1, 2, 3, 4)
    ours = computed("resize", x=x, shape=[1, 0, 8], resized_dims=2)
    assert ours.shape == (1, 2, 3, 8)
    check(computed("resize", x=x, shape=[0, 0, 0], resized_dims=3), x)
    line = normal(5)
    check(computed("resize", x=line, shape=[10], resized_dims=1)[::2], line)


@few
@given(sizes=st.tuples(*[st.integers(1, 5)] * 2), target=st.tuples(*[st.integers(1, 9)] * 2))
def test_resizes_are_torchs_where_torch_has_them(sizes, target):
    x = normal(2, 1, *sizes)
    given_x = torch.from_numpy(x)
    names = {"target_size_height": target[0], "target_size_width": target[1]}
    for mode, align in (("STRICT_ALIGN_CORNERS", True), ("UNALIGN_CORNERS", False)):
        theirs = functional.interpolate(given_x, target, mode="bilinear", align_corners=align)
        ours = computed("resize_bilinear", x=x, sampling_mode=mode, **names)
        # torch's places are off by some ulps of their size.
        check(ours, theirs.numpy(), absolute=16 * 2**-23 * np.abs(x).max())
    theirs = functional.interpolate(given_x, target, mode="nearest-exact").numpy()
    check(computed("resize_nearest_neighbor", x=x, **names), theirs)


@few
@given(
    sizes=st.tuples(*[st.integers(1, 5)] * 2),
    factors=st.tuples(*[st.sampled_from([1, 2, 3, 1.5, 2.5, 0.75])] * 2),
)
def test_upsampling_is_torchs_with_its_factor_recomputed(sizes, factors):
    x = normal(1, 2, *sizes)
    assume(all(int(n * f) > 0 for n, f in zip(sizes, factors, strict=True)))
    arguments = {"scale_factor_height": factors[0], "scale_factor_width": factors[1]}
    given_x = torch.from_numpy(x)
    again = {"scale_factor": factors, "recompute_scale_factor": True}
    bound = 16 * 2**-23 * np.abs(x).max()
    for align in (False, True):
        theirs = functional.interpolate(given_x, mode="bilinear", align_corners=align, **again)
        for opset in (IOS15, IOS16):
            ours = computed("upsample_bilinear", opset=opset, x=x, align_corners=align, **arguments)
            check(ours, theirs.numpy(), absolute=bound)
    from_corners = computed(
        "upsample_bilinear", x=x, align_corners=False, half_pixel_centers=False, **arguments
    )
    target = dict(
        zip(("target_size_height", "target_size_width"), from_corners.shape[2:], strict=True)
    )
    check(from_corners, computed("resize_bilinear", x=x, **target))
    theirs = functional.interpolate(given_x, mode="nearest", **again).numpy()
    check(computed("upsample_nearest_neighbor", x=x, **arguments), theirs)


CROPPED = np.arange(1, 17, dtype=np.float32).reshape(1, 1, 4, 4)


@pytest.mark.parametrize(
    ("box", "size", "normalized", "expected"),
    [
        ([1, 1, 2, 2], 2, False, [6, 7, 10, 11]),
        ([1, 1, 2, 2], 1, False, [8.5]),
        ([0, 0, 0, 1 / 3, 1 / 3], 2, True, [1, 2, 5, 6]),
        ([2, 2, 1, 1], 2, False, [11, 10, 7, 6]),
    ],
)
def test_a_cropped_region_is_what_core_ml_gave(box, size, normalized, expected):
    # What coremltools' own tests expect of Core ML.
    arguments = {
        "x": CROPPED,
        "target_height": size,
        "target_width": size,
        "normalized_coordinates": normalized,
        "sampling_mode": "ALIGN_CORNERS",
    }
    roi = np.float32(box).reshape(1, 1, -1, 1, 1)
    for opset in (IOS15, IOS16):
        ours = computed("crop_resize", opset=opset, roi=roi, **arguments)
        check(ours, np.float32(expected).reshape(1, 1, 1, size, size), ulps=4)
    ours = computed("crop_resize", boxes=np.float32([box[-4:]]), **arguments)
    check(ours, np.float32(expected).reshape(1, 1, size, size), ulps=4)


def test_what_lies_outside_of_a_cropped_image_is_padding():
    boxes = np.float32([[0.1, 0.3, 1.3, 1.0], [0.5, 1.8, 1.0, 0.3], [0.0, 0.4, 0.6, 0.7]])
    ours = computed(
        "crop_resize",
        x=CROPPED,
        boxes=boxes,
        box_indices=np.int32([0, 0, 0]),
        target_height=2,
        target_width=2,
        normalized_coordinates=True,
        sampling_mode="ALIGN_CORNERS",
        pad_value=10.0,
    )
    # What coremltools' own tests expect of Core ML.
    expected = [3.1, 5.2, 10.0, 10.0, 10.0, 7.9, 10.0, 13.9, 2.2, 3.1, 9.4, 10.3]
    check(ours, np.float64(expected).reshape(3, 1, 2, 2), ulps=8)


@few
@given(
    mode=st.sampled_from(SAMPLING),
    corners=st.tuples(*[st.integers(0, 4)] * 4),
    target=st.tuples(small, small),
    scale=st.sampled_from([1.0, 0.5]),
)
def test_a_crop_samples_its_box_as_a_resize_samples_an_image(mode, corners, target, scale):
    top, left, bottom, right = (
        *np.minimum(corners[:2], corners[2:]),
        *np.maximum(corners[:2], corners[2:]),
    )
    x = normal(2, 3, 5, 5)
    expected = x[1, :, top : bottom + 1, left : right + 1].astype(np.float64)
    for axis, count in ((1, target[0]), (2, target[1])):
        points = grid(expected.shape[axis], count, mode)
        expected = interpolated(expected, axis, points)
    size = bottom - top, right - left
    center = top + size[0] / 2, left + size[1] / 2
    boxes = {
        "CORNERS_HEIGHT_FIRST": [top, left, bottom, right],
        "CORNERS_WIDTH_FIRST": [left, top, right, bottom],
        "CENTER_SIZE_HEIGHT_FIRST": [*center, *size],
        "CENTER_SIZE_WIDTH_FIRST": [*center[::-1], *size[::-1]],
    }
    for box_mode, box in boxes.items():
        ours = computed(
            "crop_resize",
            x=x,
            boxes=np.float32([box]) / scale,
            box_indices=np.int32([1]),
            target_height=target[0],
            target_width=target[1],
            spatial_scale=scale,
            box_coordinate_mode=box_mode,
            sampling_mode=mode,
        )
        check(ours[0], expected, ulps=8)


def test_regions_without_an_index_are_taken_from_each_image():
    x = normal(3, 2, 4, 4)
    roi = np.float32([[0, 0, 3, 3], [1, 1, 1, 1]]).reshape(2, 1, 4, 1, 1)
    arguments = {"target_height": 4, "target_width": 4, "sampling_mode": "ALIGN_CORNERS"}
    ours = computed("crop_resize", opset=IOS16, x=x, roi=roi, **arguments)
    assert ours.shape == inferred_types("crop_resize", opset=IOS16, x=x, roi=roi, **arguments)[0][0]
    check(ours[0], x, ulps=2)
    check(ours[1], np.broadcast_to(x[:, :, 1:2, 1:2], x.shape), ulps=2)


# Warping

COORDINATES = np.float32([-1, -2, -3.7, -1, 0, 0, 3.5, 1.2]).reshape(1, 2, 2, 2)
PIXELS = np.float32([11, 22, 33, 44]).reshape(1, 1, 2, 2)


@pytest.mark.parametrize(
    ("sampling", "padding", "value", "mode", "align", "expected"),
    [
        (
            "bilinear",
            "constant",
            6.17,
            "normalized_minus_one_to_one",
            True,
            [8.585, 6.17, 27.5, 6.17],
        ),
        ("nearest", "border", -1.0, "unnormalized", False, [11, 11, 11, 44]),
        ("bilinear", "reflection", -1.0, "normalized_zero_to_one", True, [22, 36.3, 11, 34.1]),
        ("nearest", "symmetric", -1.0, "normalized_zero_to_one", False, [22, 33, 11, 33]),
    ],
)
def test_a_resampled_image_is_what_core_ml_gave(sampling, padding, value, mode, align, expected):
    # What coremltools' own tests expect of Core ML.
    ours = computed(
        "resample",
        x=PIXELS,
        coordinates=COORDINATES,
        sampling_mode=sampling,
        padding_mode=padding,
        padding_value=value,
        coordinates_mode=mode,
        align_corners=align,
    )
    check(ours, np.float64(expected).reshape(1, 1, 2, 2), ulps=4)


PADDINGS = {
    ("constant", False): "zeros",
    ("constant", True): "zeros",
    ("border", False): "border",
    ("border", True): "border",
    ("reflection", True): "reflection",
    ("symmetric", False): "reflection",
}


@pytest.mark.parametrize(("padding", "align"), PADDINGS)
@pytest.mark.parametrize("sampling", ["bilinear", "nearest"])
@few
@given(sizes=st.tuples(st.integers(2, 5), st.integers(2, 5)), seed=st.integers(0, 99))
def test_a_resampled_image_is_torchs(padding, align, sampling, sizes, seed):
    x, places = normal(2, 3, *sizes), normal(2, 3, 4, 2, seed=seed)
    arguments = {
        "x": x,
        "sampling_mode": sampling,
        "padding_mode": padding,
        "padding_value": 0.0,
        "align_corners": align,
    }
    theirs = functional.grid_sample(
        torch.from_numpy(x).double(),
        torch.from_numpy(places).double(),
        sampling,
        PADDINGS[padding, align],
        align,
    )
    one_to_one = {"coordinates_mode": "normalized_minus_one_to_one"}
    ours = computed("resample", coordinates=places, **one_to_one, **arguments)
    check(ours, theirs.numpy(), ulps=16)
    zero_to_one = {"coordinates_mode": "normalized_zero_to_one"}
    if sampling == "bilinear":  # rounding moves a place, and so may change the nearest pixel
        ours = computed("resample", coordinates=(places + 1) / 2, **zero_to_one, **arguments)
        check(ours, theirs.numpy(), ulps=256)


def test_whole_coordinates_are_pixels():
    places = np.int32([0, 0, 1, 1, 0, 0, 1, 1]).reshape(1, 2, 2, 2)
    ours = computed(
        "resample",
        x=PIXELS,
        coordinates=places,
        sampling_mode="bilinear",
        padding_mode="constant",
        padding_value=0.0,
        coordinates_mode="unnormalized",
        align_corners=False,
    )
    check(ours, np.float32([11, 44, 11, 44]).reshape(1, 1, 2, 2))


@few
@given(seed=st.integers(0, 99), shared=st.booleans())
def test_an_affine_transform_is_torchs(seed, shared):
    x, matrix = normal(2, 2, 4, 5), normal(1 if shared else 2, 6, seed=seed)
    ours = computed(
        "affine",
        x=x,
        transform_matrix=matrix,
        output_height=3,
        output_width=4,
        sampling_mode="bilinear",
        padding_mode="constant",
        padding_value=0.0,
        coordinates_mode="normalized_minus_one_to_one",
        align_corners=True,
    )
    theta = torch.from_numpy(matrix).reshape(-1, 2, 3).expand(2, 2, 3)
    places = functional.affine_grid(theta, [2, 2, 3, 4], align_corners=True)
    theirs = functional.grid_sample(torch.from_numpy(x), places, align_corners=True)
    # Places up to 16 pixels away, times differences of pixels up to 8.
    check(ours, theirs.numpy(), absolute=16 * 8 * 2**-20)


def test_modes_that_mil_lacks_are_named():
    arguments = {
        "x": PIXELS,
        "coordinates": COORDINATES,
        "sampling_mode": "nearest",
        "padding_mode": "border",
        "padding_value": 0.0,
        "coordinates_mode": "unnormalized",
        "align_corners": True,
    }
    for name in ("sampling_mode", "padding_mode", "coordinates_mode"):
        with pytest.raises(ValueError, match=rf"{name} must be .*, got cubic"):
            computed("resample", **{**arguments, name: "cubic"})
    with pytest.raises(ValueError, match=r"sampling_mode must be one of .*, got CUBIC"):
        computed("resize_bilinear", x=PIXELS, sampling_mode="CUBIC")
    with pytest.raises(ValueError, match=r"interpolation_mode must be .*, got CUBIC"):
        computed("resize", x=PIXELS, shape=[1, 1], resized_dims=2, interpolation_mode="CUBIC")
    with pytest.raises(ValueError, match=r"box_coordinate_mode must be .*, got CORNERS"):
        computed("crop_resize", x=PIXELS, boxes=normal(1, 4), box_coordinate_mode="CORNERS")


# Quantization


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@few
@given(data=st.data(), axis=st.sampled_from([None, 1, -1]))
def test_quantized_values_are_what_coremltools_infers(dtype, data, axis):
    low, high = (-128, 127) if dtype == "int8" else (0, 255)
    kind = np.dtype(dtype).type
    # Eighths over powers of two have exact quotients, with ties and some out of range.
    eighth = st.integers(-600, 600).map(lambda n: n / 8)
    x = data.draw(npst.arrays(np.float32, (2, 3, 3), elements=eighth))
    if axis is None:
        scale, zero_point = np.float32(0.25), kind(data.draw(st.integers(low, high)))
    else:
        scale = np.float32(2.0) ** data.draw(npst.arrays(np.int8, 3, elements=st.integers(-3, 2)))
        scale = scale.astype(np.float32)
        zero_point = data.draw(npst.arrays(kind, 3, elements=st.integers(low, high)))
    arguments = {"scale": scale} | ({} if axis is None else {"axis": np.int32(axis)})
    for extra in ({}, {"zero_point": zero_point}):
        codes = inferred("quantize", input=x, output_dtype=dtype, **extra, **arguments)
        ours = computed("quantize", input=x, output_dtype=dtype, **extra, **arguments)
        check(ours, codes)
        assert ours.dtype == kind
        shape = {None: [], 1: [1, -1, 1], -1: [-1]}[axis]
        offset = np.int64(extra.get("zero_point", 0 * scale))
        expected = (codes - offset.reshape(shape)) * scale.reshape(shape)
        check(computed("dequantize", input=codes, **extra, **arguments), expected)


# Random numbers


RANDOM = {
    "random_bernoulli": {"prob": 0.25},
    "random_normal": {"mean": 2.0, "stddev": 0.5},
    "random_uniform": {"low": -1.0, "high": 3.0},
}
MOMENTS = {
    "random_bernoulli": (0.25, 0.25 * 0.75),
    "random_normal": (2.0, 0.25),
    "random_uniform": (1.0, 16 / 12),
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_numbers_have_the_moments_of_their_distribution(name):
    drawn = computed(name, shape=[100, 100], seed=5, **RANDOM[name]).astype(np.float64)
    mean, variance = MOMENTS[name]
    # Five standard errors of 10000 numbers; the normal distribution has the heaviest tails.
    assert abs(drawn.mean() - mean) < 5 * math.sqrt(variance / 1e4)
    assert abs(drawn.var() - variance) < 5 * variance * math.sqrt(2 / 1e4)
    if name == "random_uniform":
        assert drawn.min() >= -1
        assert drawn.max() < 3


@pytest.mark.parametrize("name", [*RANDOM, "random_categorical"])
def test_a_seed_repeats_its_numbers_and_the_programs_source_goes_on(name):
    arguments = {"shape": [50]} if name in RANDOM else {"x": np.zeros((50, 4), np.float32)}
    check(computed(name, seed=5, **arguments), computed(name, seed=5, **arguments))
    assert (computed(name, seed=5, **arguments) != computed(name, seed=6, **arguments)).any()
    source = torch.Generator().manual_seed(0)
    first, second = (computed(name, generator=source, **arguments) for _ in range(2))
    assert (first != second).any()
    source.manual_seed(0)
    check(computed(name, generator=source, **arguments), first)


def test_categories_are_drawn_as_often_as_their_odds_say():
    odds = np.float32([[0.5, 0.25, 0.25, 0.0], [0.0, 0.0, 0.0, 2.0]])
    with np.errstate(divide="ignore"):
        logits = np.log(odds)
    for arguments in ({"x": odds, "mode": "probs"}, {"x": logits}):
        drawn = computed("random_categorical", size=4000, seed=1, **arguments)
        assert drawn.shape == (2, 4000)
        counts = np.bincount(drawn[0].astype(int), minlength=4) / 4000
        # Five standard errors of 4000 draws.
        np.testing.assert_allclose(counts, odds[0], atol=5 * math.sqrt(0.25 / 4000))
        assert (drawn[1] == 3).all()
    with pytest.raises(ValueError, match="mode must be logits or probs, got odds"):
        computed("random_categorical", x=odds, mode="odds")


# Boxes


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    shared = 1.0
    for axis in (0, 1):
        low = max(a[axis] - a[2 + axis] / 2, b[axis] - b[2 + axis] / 2)
        high = min(a[axis] + a[2 + axis] / 2, b[axis] + b[2 + axis] / 2)
        shared *= max(0.0, high - low)
    whole = a[2] * a[3] + b[2] * b[3] - shared
    return shared / whole if whole else 0.0


@few
@given(
    n_boxes=st.integers(1, 8),
    n_classes=small,
    max_boxes=st.integers(1, 6),
    per_class=st.booleans(),
    threshold=st.sampled_from([-9.0, 0.3, 9.0]),
    seed=st.integers(0, 99),
)
def test_boxes_that_overlap_better_ones_are_suppressed(
    n_boxes, n_classes, max_boxes, per_class, threshold, seed
):
    rng = np.random.default_rng(seed)
    # Quarters of whole pixels, so that float32 finds the same overlaps.
    boxes = rng.integers(1, 8, (2, n_boxes, 4)).astype(np.float32) / 4
    scores = rng.permutation(2 * n_boxes * n_classes).reshape(2, n_boxes, n_classes)
    scores = (scores / scores.size).astype(np.float32)
    expected = (
        np.zeros((2, max_boxes, 4)),
        np.zeros((2, max_boxes, n_classes)),
        np.full((2, max_boxes), -1),
        np.zeros(2),
    )
    counts_without = []
    for image in range(2):
        for limit in (threshold, -np.inf):
            best, classes = scores[image].max(-1), scores[image].argmax(-1)
            kept = []
            for i in np.argsort(-best):
                hidden = any(
                    overlap(boxes[image, i].astype(float), boxes[image, j].astype(float)) > 0.3
                    and (not per_class or classes[i] == classes[j])
                    for j in kept
                )
                if best[i] >= limit and not hidden and len(kept) < max_boxes:
                    kept.append(i)
            kept = kept or [best.argmax()]  # Core ML gives one box at least
            if limit == threshold:
                expected[0][image, : len(kept)] = boxes[image, kept]
                expected[1][image, : len(kept)] = scores[image, kept]
                expected[2][image, : len(kept)] = kept
                expected[3][image] = len(kept)
            else:
                counts_without.append(kept)
    arguments = {
        "iou_threshold": np.float32(0.3),
        "max_boxes": max_boxes,
        "per_class_suppression": per_class,
    }
    ours = computed(
        "non_maximum_suppression",
        opset=IOS15,
        boxes=boxes,
        scores=scores,
        score_threshold=np.float32(threshold),
        **arguments,
    )
    check(ours, expected)
    columns = computed("non_maximum_suppression", boxes=boxes.mT, scores=scores.mT, **arguments)
    assert [
        shape
        for shape, _ in inferred_types(
            "non_maximum_suppression", boxes=boxes.mT, scores=scores.mT, **arguments
        )
    ] == [item.shape for item in columns]
    for image, kept in enumerate(counts_without):
        count = len(kept)
        np.testing.assert_array_equal(columns[2][image, :count], kept)
        assert (columns[2][image, count:] == -1).all()
        np.testing.assert_array_equal(columns[0][image, :, :count].T, boxes[image, kept])


def test_boxes_that_overlap_by_no_more_than_the_threshold_are_kept():
    boxes = np.float32([[[2, 2, 4, 4], [2, 1, 4, 2], [2, 2, 4, 3]]])
    ours = computed(
        "non_maximum_suppression",
        opset=IOS15,
        boxes=boxes,
        scores=np.float32([[[0.9], [0.8], [0.7]]]),
        iou_threshold=0.5,
        score_threshold=0.8,
        max_boxes=3,
    )
    # The second shares half of the first, the third more; its score is too low as well.
    np.testing.assert_array_equal(ours[2], [[0, 1, -1]])


def test_suppression_is_what_core_ml_gave():
    # What coremltools' own tests expect of Core ML.
    boxes = np.arange(4, dtype=np.float32)[None, :, None].repeat(4, -1)
    ours = computed(
        "non_maximum_suppression",
        opset=IOS15,
        boxes=boxes,
        scores=np.float32([[[-3.5], [9.4], [2.3], [0.7]]]),
        iou_threshold=0.2,
        score_threshold=0.4,
        max_boxes=2,
        per_class_suppression=True,
    )
    check(ours, (boxes[:, 1:3], np.float32([[[9.4], [2.3]]]), np.int32([[1, 2]]), np.int32([2])))


# Exporting


class Chain(torch.nn.Module):
    """Runs some of the ops whose shapes are known beforehand."""

    def forward(self, image: torch.Tensor, line: torch.Tensor) -> tuple[torch.Tensor, ...]:
        def run(name: str, **arguments):
            op = operator(name)
            return op.function(**op.bound(arguments))

        spread = run("pad", x=image, pad=[1, 1, 1, 1], mode="reflect")
        pooled = run("avg_pool", x=spread, kernel_sizes=[3, 2], pad_type="same", strides=[2, 2])
        highest = run("max_pool", x=image, kernel_sizes=[2, 2], pad_type="same")
        sized = run("resize_bilinear", x=pooled, target_size_height=6, target_size_width=5)
        near = run("upsample_nearest_neighbor", x=pooled, scale_factor_height=2)
        part = run(
            "slice_by_index", x=sized, begin=[0, 0, -1, 0], end=[1, 2, 0, 5], stride=[1, 1, -2, 2]
        )
        updated = run("slice_update", x=image, update=part, begin=[0] * 4, end=list(part.shape))
        rows = run("gather", x=line, indices=torch.tensor([1, 0], dtype=torch.int32), axis=0)
        placed = run(
            "scatter_nd", data=line, indices=torch.tensor([[0, 1]]), updates=torch.tensor([3.0])
        )
        shape = run("shape", x=line)
        best = run("topk", x=line, k=2)
        summed = run("cumsum", x=line, axis=1, exclusive=True)
        normed = run("layer_norm", x=line, axes=[0])
        kept = run("band_part", x=line, lower=0)
        packed = run("reshape", x=line, shape=[0, -1, 1])
        mean = run("reduce_mean", x=line, axes=[-1], keep_dims=True)
        codes = run("quantize", input=line, scale=torch.tensor(0.5), output_dtype="int8")
        return (highest, near, updated, rows, placed, shape, *best, summed, normed, kept, packed,
                mean, codes)  # fmt: skip


def test_ops_of_known_shapes_can_be_exported():
    inputs = (torch.from_numpy(normal(1, 2, 4, 5)), torch.from_numpy(normal(3, 4)))
    chain = Chain()
    exported = torch.export.export(chain, inputs)
    for ours, theirs in zip(exported.module()(*inputs), chain(*inputs), strict=True):
        assert torch.equal(ours, theirs)
