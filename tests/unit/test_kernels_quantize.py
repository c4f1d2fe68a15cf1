"""Laws of quantization with a searched range, with NumPy in float64 as oracle."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

import milpress._core as _core

ranges = st.sampled_from([(-7, 7), (-8, 7), (-127, 127), (-128, 127), (0, 15), (0, 254)])
shapes = st.tuples(st.integers(1, 4), st.integers(1, 70))


@st.composite
def finite(draw: st.DrawFn) -> np.ndarray:
    """Return rows of finite weights: any at all, or normal ones of one magnitude with ties."""
    dtype = draw(st.sampled_from([np.float16, np.float32]))
    shape = draw(shapes)
    if draw(st.booleans()):
        width = 8 * np.dtype(dtype).itemsize
        elements = st.floats(allow_nan=False, allow_infinity=False, width=width)
        return draw(npst.arrays(dtype, shape, elements=elements))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shift = draw(st.sampled_from([-1, 0, 0.5]))
    magnitude = 2.0 ** draw(st.integers(-14, 12))
    return (np.round((rng.standard_normal(shape) + shift) * 64) / 64 * magnitude).astype(dtype)


def squared_errors(weight: np.ndarray, decoded: np.ndarray) -> np.ndarray:
    return np.sum((weight.astype(np.float64) - decoded.astype(np.float64)) ** 2, axis=1)


def dense(codes, scales, offsets, code_range) -> np.ndarray:
    if offsets is None and code_range[0] == 0:
        offsets = np.full(scales.shape, code_range[1] // 2, codes.dtype)
    return _core.dequantize(codes, scales, offsets)


@given(weight=finite(), code_range=ranges, fit_offset=st.booleans())
def test_a_searched_range_is_never_worse_than_the_whole_and_decodes_finitely(
    weight, code_range, fit_offset
):
    whole = dense(*_core.quantize(weight, *code_range, fit_offset), code_range)
    codes, scales, offsets = _core.quantize_mse(weight, None, *code_range, fit_offset)
    decoded = dense(codes, scales, offsets, code_range)
    assert np.isfinite(decoded).all()
    assert codes.min() >= code_range[0]
    assert codes.max() <= code_range[1]
    assert (offsets is not None) == fit_offset
    # Sums of n doubles in two orders.
    slack = 1 + weight.shape[1] * 2.0**-52
    assert (squared_errors(weight, decoded) <= squared_errors(weight, whole) * slack).all()


def rounded(weight: np.ndarray, scale: float, offset: float, code_range) -> np.ndarray:
    codes = np.clip(np.rint(weight.astype(np.float64) / scale) + offset, *code_range)
    return (scale * (codes - offset)).astype(weight.dtype)


@given(weight=finite(), code_range=ranges)
def test_no_evenly_shrunk_symmetric_range_is_better(weight, code_range):
    offset = 0 if code_range[0] < 0 else code_range[1] // 2
    reach = max(code_range[1] - offset, offset - code_range[0])
    nearer = min(code_range[1] - offset, offset - code_range[0])
    signs = [1] if nearer == reach or code_range[0] == 0 else [1, -1]
    errors = squared_errors(
        weight, dense(*_core.quantize_mse(weight, None, *code_range, False), code_range)
    )
    for row, error in zip(weight, errors, strict=True):
        limit = float(np.abs(row.astype(np.float64)).max())
        if 0 < limit < np.finfo(row.dtype).max / 2:
            for share in np.linspace(limit / nearer, 0.4 * limit / reach, 16):
                for sign in signs:
                    scale = float(row.dtype.type(np.float32(sign * share)))
                    if scale != 0:
                        oracle = squared_errors(
                            row[None], rounded(row, scale, offset, code_range)[None]
                        )[0]
                        # The search adds up to 70 squares in float32, to five roundings each
                        # of half a last place; squares below 2^-149 of the limit's are lost.
                        slack = 2 * (row.size + 5) * 2.0**-24
                        assert error <= oracle * (1 + slack) + limit**2 * row.size * 2.0**-140


def test_a_searched_range_needs_the_exact_dtype_and_two_dimensions():
    weight = np.zeros((2, 3), np.float32)
    with pytest.raises(TypeError):
        _core.quantize_mse(weight.astype(np.float64), None, -7, 7, False)
    with pytest.raises(ValueError, match="2 dimensions"):
        _core.quantize_mse(weight[0], None, -7, 7, False)
    with pytest.raises(ValueError, match="code range must ascend within a byte, got 7 to 3"):
        _core.quantize_mse(weight, None, 7, 3, True)


@given(data=st.data(), weight=finite(), code_range=ranges, fit_offset=st.booleans())
def test_a_range_searched_with_importance_is_never_worse_by_it_than_the_whole(
    data, weight, code_range, fit_offset
):
    eighths = st.integers(0, 64).map(lambda n: n / 8)
    share = data.draw(npst.arrays(np.float32, weight.shape, elements=eighths))
    whole = dense(*_core.quantize(weight, *code_range, fit_offset), code_range)
    made = _core.quantize_mse(weight, share, *code_range, fit_offset)
    errors = [
        (share.astype(np.float64) * (weight.astype(np.float64) - each) ** 2).sum(1)
        for each in (dense(*made, code_range), whole)
    ]
    # Sums of n doubles in two orders.
    assert (errors[0] <= errors[1] * (1 + weight.shape[1] * 2.0**-52)).all()


@given(weight=finite(), code_range=ranges, fit_offset=st.booleans())
def test_equal_importance_is_no_importance(weight, code_range, fit_offset):
    ones = np.ones(weight.shape, np.float32)
    weighted = _core.quantize_mse(weight, ones, *code_range, fit_offset)
    plain = _core.quantize_mse(weight, None, *code_range, fit_offset)
    for one, other in zip(weighted, plain, strict=True):
        assert np.array_equal(one, other)
    with pytest.raises(ValueError, match="importance must have the shape"):
        _core.quantize_mse(weight, np.vstack([ones, ones]), *code_range, fit_offset)
