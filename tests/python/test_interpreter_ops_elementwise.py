from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from mil_ops import IOS15, IOS17, IOS18, check, computed, inferred, operator

# NumPy's, of drawn values at the edges of what an op takes.
pytestmark = pytest.mark.filterwarnings("ignore:[a-z ]+ encountered in:RuntimeWarning")
few = settings(max_examples=12, deadline=None)

# Two libraries' float32 functions, each within 2 ulps of the true value.
ULPS = 4


def floats(least: float, greatest: float, shape=None) -> st.SearchStrategy:
    least, greatest = float(np.float32(least)), float(np.float32(greatest))
    elements = st.floats(least, greatest, width=32, allow_subnormal=False)
    return npst.arrays(
        np.float32, shape or npst.array_shapes(max_dims=4, max_side=4), elements=elements
    )


def integers(least: int, greatest: int, shape=None, dtype=np.int32) -> st.SearchStrategy:
    elements = st.integers(least, greatest)
    return npst.arrays(dtype, shape or npst.array_shapes(max_dims=4, max_side=4), elements=elements)


ANY = (-8, 8)
DOMAINS = {
    "abs": ANY,
    "acos": (-1, 1),
    "asin": (-1, 1),
    "atan": ANY,
    "atanh": (-0.9, 0.9),
    "ceil": ANY,
    "cos": ANY,
    "cosh": ANY,
    "erf": ANY,
    "exp": ANY,
    "exp2": ANY,
    "floor": ANY,
    "identity": ANY,
    "inverse": (0.1, 8),
    "log": (0, 8),
    "relu": ANY,
    "relu6": ANY,
    "round": ANY,
    "rsqrt": (0.1, 8),
    "sigmoid": ANY,
    "sign": ANY,
    "sin": ANY,
    "sinh": ANY,
    "softplus": ANY,
    "softsign": ANY,
    "sqrt": (0, 8),
    "square": ANY,
    "tan": (-1.5, 1.5),
    "tanh": ANY,
}
EXACT = {"abs", "ceil", "floor", "identity", "relu", "relu6", "round", "sign", "square"}
# coremltools adds 1 to e^x before it takes the logarithm.
ROUGH = {"softplus": 2**-23}


@pytest.mark.parametrize("name", DOMAINS)
@few
@given(data=st.data())
def test_a_function_of_one_tensor_is_what_coremltools_infers(name, data):
    x = data.draw(floats(*DOMAINS[name]))
    ulps = 0 if name in EXACT else ULPS
    check(computed(name, x=x), inferred(name, x=x), ulps=ulps, absolute=ROUGH.get(name, 0))


@pytest.mark.parametrize("name", ["abs", "sign", "square", "exp2"])
def test_integers_stay_exact(name):
    x = np.arange(-9, 30, dtype=np.int32)
    check(computed(name, x=x).astype(np.int32), inferred(name, x=x))


def test_identity_gives_what_it_is_given_even_if_it_is_no_tensor():
    x, identity = object(), operator("identity")
    assert identity.function(**identity.bound({"x": x})) is x


def test_half_rounds_to_even():
    halves = np.float32([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    np.testing.assert_array_equal(computed("round", x=halves), [-2, -2, 0, 0, 2, 2])


@few
@given(x=floats(*ANY), epsilon=st.floats(2**-20, 0.5, width=32))
def test_epsilon_is_added_before_the_function(x, epsilon):
    x, epsilon = np.abs(x), np.float32(epsilon)
    for name in ("inverse", "log", "rsqrt"):
        ours = computed(name, x=x, epsilon=epsilon)
        check(ours, inferred(name, x=x, epsilon=epsilon), ulps=ULPS)


def test_the_logarithm_of_zero_is_finite_by_default():
    zero = np.zeros(1, np.float32)
    check(computed("log", x=zero), inferred("log", x=zero), ulps=ULPS)
    assert np.isfinite(computed("log", x=zero)).all()


ARITHMETIC = ("add", "sub", "mul", "maximum", "minimum", "floor_div", "mod", "real_div")
COMPARISONS = ("equal", "not_equal", "less", "less_equal", "greater", "greater_equal")


@pytest.mark.parametrize("name", ARITHMETIC + COMPARISONS)
@few
@given(data=st.data())
def test_a_function_of_two_tensors_broadcasts_as_coremltools_infers(name, data):
    pair = data.draw(npst.mutually_broadcastable_shapes(num_shapes=2, min_dims=1, max_side=3))
    whole = data.draw(st.booleans())
    draw = (lambda shape: integers(-9, 9, shape)) if whole else (lambda shape: floats(-9, 9, shape))
    x, y = (data.draw(draw(shape)) for shape in pair.input_shapes)
    if name in ("floor_div", "mod", "real_div"):
        y = np.where(y == 0, y.dtype.type(-3), y)
    theirs = inferred(name, x=x, y=y)
    check(computed(name, x=x, y=y).astype(theirs.dtype), theirs)


@pytest.mark.parametrize("name", ["logical_and", "logical_or", "logical_xor"])
def test_a_logical_function_is_what_coremltools_infers(name):
    x, y = np.array([[True], [False]]), np.array([True, False])
    check(computed(name, x=x, y=y), inferred(name, x=x, y=y))
    check(computed("logical_not", x=x), inferred("logical_not", x=x))


@few
@given(x=floats(0.1, 3, (3, 1)), y=floats(-3, 3, (2,)))
def test_a_power_is_what_coremltools_infers(x, y):
    check(computed("pow", x=x, y=y), inferred("pow", x=x, y=y), ulps=ULPS)
    bases, exponents = np.int32([-3, 0, 2]), np.int32([3, 0, 5])
    check(computed("pow", x=bases, y=exponents), inferred("pow", x=bases, y=exponents))


def test_whole_numbers_divide_downwards_and_the_rest_has_the_divisors_sign():
    x, y = np.int32([7, -7, 7, -7]), np.int32([2, 2, -2, -2])
    np.testing.assert_array_equal(computed("floor_div", x=x, y=y), [3, -4, -4, 3])
    np.testing.assert_array_equal(computed("mod", x=x, y=y), [1, 1, -1, -1])


def test_the_quotient_of_large_whole_numbers_is_exact():
    large = np.int32([2**31 - 1])
    assert computed("real_div", x=large, y=np.int32([1]))[0] == 2**31 - 1


@few
@given(
    pair=npst.mutually_broadcastable_shapes(num_shapes=3, min_dims=1, max_side=3), data=st.data()
)
def test_select_takes_each_element_from_one_of_two(pair, data):
    cond = data.draw(npst.arrays(np.bool_, pair.input_shapes[0]))
    a, b = (data.draw(floats(-9, 9, shape)) for shape in pair.input_shapes[1:])
    check(computed("select", cond=cond, a=a, b=b), np.where(cond, a, b))


@few
@given(x=floats(-9, 9), bounds=st.tuples(st.floats(-5, 0, width=32), st.floats(0.5, 5, width=32)))
def test_clip_and_threshold_bound_values(x, bounds):
    alpha, beta = np.float32(bounds)
    ours = computed("clip", x=x, alpha=alpha, beta=beta)
    check(ours, inferred("clip", x=x, alpha=alpha, beta=beta))
    check(computed("threshold", x=x, alpha=alpha), inferred("threshold", x=x, alpha=alpha))
    whole = np.int32([-3, 0, 3])
    ours = computed("threshold", x=whole, alpha=np.int32(-1))
    check(ours, inferred("threshold", x=whole, alpha=np.int32(-1)))


TYPES = {
    "fp16": np.float16,
    "fp32": np.float32,
    "int8": np.int8,
    "uint8": np.uint8,
    "int16": np.int16,
    "uint16": np.uint16,
    "int32": np.int32,
    "bool": np.bool_,
}


@pytest.mark.parametrize(("source", "target"), list(itertools.product(TYPES, TYPES)))
def test_a_cast_between_any_two_types_is_what_coremltools_infers(source, target):
    values = np.array([0, 1, 2, 100, 127])
    if source not in ("bool", "uint8", "uint16") and target not in ("uint8", "uint16"):
        values = np.concatenate([values, -values])
    x = values.astype(TYPES[source])
    if source in ("fp16", "fp32"):
        x = x * TYPES[source](0.75)
    theirs = inferred("cast", opset=IOS17, x=x, dtype=target)
    check(computed("cast", x=x, dtype=target).astype(TYPES[target]), theirs)


@pytest.mark.parametrize("target", ["int8", "uint8", "int16", "uint16", "int32"])
def test_a_cast_of_floats_saturates_and_one_of_integers_wraps(target):
    info = np.iinfo(TYPES[target])
    wide = np.float32([-3e9, -1.5, 3e9, np.inf, -np.inf])
    nearest = np.trunc(wide.astype(np.float64).clip(info.min, info.max))
    np.testing.assert_array_equal(computed("cast", x=wide, dtype=target), nearest)
    whole = np.int32([-1, 255, 256, 65535, 65537, 2**31 - 1])
    wrapped = whole.astype(TYPES[target])
    np.testing.assert_array_equal(computed("cast", x=whole, dtype=target), wrapped)


def test_a_cast_to_a_type_that_mil_lacks_is_named():
    with pytest.raises(ValueError, match=r"dtype must be one of .*, got fp8"):
        computed("cast", x=np.zeros(1, np.float32), dtype="fp8")


# Activations


@few
@given(
    x=floats(-8, 8),
    alpha=st.floats(0.125, 3, width=32).map(np.float32),
    beta=st.floats(0.125, 3, width=32).map(np.float32),
)
def test_an_activation_with_parameters_is_what_coremltools_infers(x, alpha, beta):
    for name in ("elu", "leaky_relu", "thresholded_relu"):
        theirs = inferred(name, x=x.copy(), alpha=alpha)  # which may write over its input
        # coremltools takes 1 from e^x, which leaves few digits near 0.
        rough = 2**-23 * alpha if name == "elu" else 0
        ours = computed(name, x=x, alpha=alpha)
        check(ours, theirs, ulps=ULPS, absolute=rough, label=name)
    for name in ("clamped_relu", "linear_activation", "scaled_tanh", "sigmoid_hard"):
        theirs = inferred(name, x=x, alpha=alpha, beta=beta)
        check(computed(name, x=x, alpha=alpha, beta=beta), theirs, ulps=ULPS, label=name)


def test_a_clamped_relu_follows_its_formula_where_parameters_are_negative():
    # coremltools' value inference bounds the two branches and adds them, which gives -10 here.
    x = np.float32([-2, 3])
    np.testing.assert_array_equal(computed("clamped_relu", x=x, alpha=-1.0, beta=-5.0), [-5, -5])
    np.testing.assert_array_equal(computed("clamped_relu", x=x, alpha=-1.0, beta=9.0), [2, 3])


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 3, 4, 2), (1, 3, 2, 2, 2)])
def test_parameters_of_channels_lie_along_the_second_axis(shape):
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape).astype(np.float32)
    # coremltools takes slopes that differ only for rank 4.
    alpha = rng.random(3).astype(np.float32) if len(shape) == 4 else np.full(3, 0.3, np.float32)
    check(computed("prelu", x=x, alpha=alpha), inferred("prelu", x=x, alpha=alpha), ulps=ULPS)
    beta = rng.random(3).astype(np.float32)
    name = "softplus_parametric"
    theirs = inferred(name, x=x, alpha=alpha, beta=beta)
    check(computed(name, x=x, alpha=alpha, beta=beta), theirs, ulps=ULPS)


def test_a_softplus_of_large_values_does_not_overflow():
    x, one = np.full((1, 1, 1, 1), 200, np.float32), np.ones(1, np.float32)
    assert computed("softplus", x=x) == 200
    assert computed("softplus_parametric", x=x, alpha=one, beta=one) == 200


@few
@given(x=floats(-8, 8))
def test_a_gelu_follows_the_formula_of_its_mode(x):
    for mode in ("EXACT", "TANH_APPROXIMATION", "SIGMOID_APPROXIMATION"):
        # tanh and erf near -1 leave few digits: half an ulp of 1, times x.
        theirs = inferred("gelu", x=x, mode=mode)
        check(computed("gelu", x=x, mode=mode), theirs, ulps=ULPS, absolute=8 * 2**-23)


def test_a_gelu_of_an_unknown_mode_is_named():
    with pytest.raises(ValueError, match=r"mode must be EXACT.*, got FAST"):
        computed("gelu", x=np.zeros(1, np.float32), mode="FAST")


@few
@given(x=floats(-8, 8))
def test_silu_is_x_times_its_sigmoid(x):
    wide = x.astype(np.float64)
    check(computed("silu", x=x), wide / (1 + np.exp(-wide)), ulps=ULPS)


@few
@given(x=floats(-8, 8), data=st.data())
def test_a_softmax_along_any_axis_is_what_coremltools_infers(x, data):
    axis = data.draw(st.integers(-x.ndim, x.ndim - 1))
    check(computed("softmax", x=x, axis=axis), inferred("softmax", x=x, axis=axis), ulps=8)


# Reductions

FLOATING = ("reduce_l2_norm", "reduce_log_sum", "reduce_log_sum_exp", "reduce_mean")
REDUCTIONS = (
    "reduce_l1_norm",
    "reduce_max",
    "reduce_min",
    "reduce_prod",
    "reduce_sum",
    "reduce_sum_square",
    *FLOATING,
)


@pytest.mark.parametrize("name", REDUCTIONS)
@few
@given(data=st.data())
def test_a_reduction_over_any_axes_is_what_coremltools_infers(name, data):
    whole = data.draw(st.booleans())
    draw = integers if whole else floats
    x = data.draw(draw(1 if name == "reduce_log_sum" else -4, 4))
    if name == "reduce_log_sum":
        x = np.abs(x) + 1
    arguments = {"keep_dims": data.draw(st.booleans())}
    axes = data.draw(st.none() | st.lists(st.integers(0, x.ndim - 1), min_size=1, unique=True))
    if axes is not None:
        back = data.draw(st.booleans())
        arguments["axes"] = [axis - x.ndim if back else axis for axis in axes]
    theirs = inferred(name, x=x, **arguments)
    ours = computed(name, x=x, **arguments)
    if whole:
        check(ours.astype(np.int32), theirs)
    else:
        # Up to 256 sums of values up to 16, in another order.
        check(ours, theirs, ulps=8, absolute=256 * 16 * 2**-24)


@few
@given(x=integers(-3, 3), data=st.data())
def test_an_argument_of_the_extremum_is_what_coremltools_infers(x, data):
    axis = data.draw(st.integers(-x.ndim, x.ndim - 1))
    keep = data.draw(st.booleans())
    for name in ("reduce_argmax", "reduce_argmin"):
        for opset, extra in ((IOS15, {}), (IOS18, {"output_dtype": "uint16"})):
            arguments = {"x": x, "axis": axis, "keep_dims": keep, **extra}
            check(
                computed(name, opset=opset, **arguments), inferred(name, opset=opset, **arguments)
            )


def test_a_log_sum_exp_of_large_values_does_not_overflow():
    x = np.full((2, 2), 500, np.float32)
    assert math.isclose(computed("reduce_log_sum_exp", x=x), 500 + math.log(4), rel_tol=2**-22)


def test_a_reduction_over_no_axes_leaves_each_element_to_itself():
    x = np.float32([[-3, 4]])
    np.testing.assert_array_equal(computed("reduce_l2_norm", x=x, axes=[]), [[3, 4]])
    np.testing.assert_array_equal(computed("reduce_sum", x=x, axes=[]), x)


# Products of matrices

# Multiples of 1/8 up to 1 multiply and add up exactly in float32.
eighths = st.integers(-8, 8).map(lambda n: n / 8)


def exact(shape) -> st.SearchStrategy:
    return npst.arrays(np.float32, shape, elements=eighths)


@few
@given(data=st.data(), sizes=st.tuples(*[st.integers(1, 4)] * 5))
def test_a_product_of_matrices_is_what_coremltools_infers(data, sizes):
    a, b, m, k, n = sizes
    flip_x, flip_y = data.draw(st.booleans()), data.draw(st.booleans())
    x = data.draw(exact((b, k, m) if flip_x else (b, m, k)))
    y = data.draw(exact((a, 1, n, k) if flip_y else (a, 1, k, n)))
    arguments = {"x": x, "y": y, "transpose_x": flip_x, "transpose_y": flip_y}
    check(computed("matmul", **arguments), inferred("matmul", **arguments))
    weight, bias = data.draw(exact((n, k))), data.draw(exact((n,)))
    x = data.draw(exact((b, m, k)))
    ours = computed("linear", x=x, weight=weight, bias=bias)
    check(ours, inferred("linear", x=x, weight=weight, bias=bias))
    check(computed("linear", x=x, weight=weight), inferred("linear", x=x, weight=weight))


def test_a_vector_multiplies_as_in_numpy():
    x, y = np.float32([1, 2, 3]), np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    np.testing.assert_array_equal(computed("matmul", x=x, y=y), x @ y)
    np.testing.assert_array_equal(computed("matmul", x=x, y=x), 14)
    np.testing.assert_array_equal(computed("matmul", x=y, y=x, transpose_x=True), y.mT @ x)


def test_whole_numbers_multiply_exactly():
    x, y = np.int32([[2**20, 1]]), np.int32([[2**10], [3]])
    np.testing.assert_array_equal(computed("matmul", x=x, y=y), [[2**30 + 3]])
    np.testing.assert_array_equal(computed("linear", x=x, weight=y.T), [[2**30 + 3]])


KINDS = (np.float32, np.int32)


@pytest.mark.parametrize("kind_of_x", KINDS)
@pytest.mark.parametrize("kind", KINDS)
def test_whole_numbers_and_floats_multiply(kind_of_x, kind):
    rng = np.random.default_rng(0)
    x = rng.integers(-9, 9, (2, 3, 4)).astype(kind_of_x)
    weight, bias = rng.integers(-9, 9, (5, 4)).astype(kind), rng.integers(-9, 9, 5).astype(kind)
    expected = x.astype(np.float64) @ weight.T
    check(computed("matmul", x=x, y=weight, transpose_y=True), expected)
    check(computed("matmul", x=weight, y=x, transpose_y=True), expected.mT)
    check(computed("linear", x=x, weight=weight), expected)
    check(computed("linear", x=x, weight=weight, bias=bias), expected + bias)


@few
@given(data=st.data(), sizes=st.tuples(*[st.integers(1, 3)] * 5))
def test_an_einsum_is_what_coremltools_infers(data, sizes):
    n, c, h, w, u = sizes
    x = data.draw(exact((1, c, h, w)))
    y = data.draw(exact((n, w, data.draw(st.sampled_from([1, h])), u)))
    for equation, values in (
        ("nchw,nwhu->nchu", [x, y]),
        ("abcd,adce->abce", [x, y]),
        ("chw,whr->chr", [x[0], y[0]]),
    ):
        ours = computed("einsum", values=values, equation=equation)
        check(ours, inferred("einsum", values=values, equation=equation))


@few
@given(data=st.data(), mask=st.sampled_from([None, "bool", "float", "row"]), rank=st.integers(1, 2))
def test_attention_is_what_coremltools_infers(data, mask, rank):
    batch = tuple(data.draw(st.integers(1, 2)) for _ in range(rank))
    length, seen, depth, out = (data.draw(st.integers(1, 4)) for _ in range(4))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    arguments = {
        "query": draw(*batch, length, depth),
        "key": draw(*batch, seen, depth),
        "value": draw(*batch, seen, out),
    }
    if mask == "bool":
        attended = rng.random((length, seen)) < 0.5
        attended[:, 0] = True  # a row without any has no softmax
        arguments["attn_mask"] = attended
    elif mask is not None:
        arguments["attn_mask"] = draw(*((length, seen) if mask == "float" else (1, seen)))
    name = "scaled_dot_product_attention"
    largest = np.abs(arguments["value"]).max()
    # Weights of a softmax add up to 1; each is off by some ulps of scores up to about 10.
    check(computed(name, **arguments), inferred(name, **arguments), absolute=64 * 2**-23 * largest)


def test_attention_gives_torchs_result():
    rng = np.random.default_rng(3)
    query, key, value = (rng.normal(size=(2, 2, 5, 4)).astype(np.float32) for _ in range(3))
    mask = np.tril(np.ones((5, 5), bool))
    ours = computed(
        "scaled_dot_product_attention", query=query, key=key, value=value, attn_mask=mask
    )
    weights = torch.softmax(
        (torch.from_numpy(query).double() @ torch.from_numpy(key).double().mT / 2).masked_fill(
            ~torch.from_numpy(mask), -math.inf
        ),
        -1,
    )
    check(ours, (weights @ torch.from_numpy(value).double()).numpy(), ulps=32)
