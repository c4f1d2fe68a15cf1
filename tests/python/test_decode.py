"""Decoding one ``constexpr`` op at a time, with coremltools' arithmetic as the oracle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from coremltools.converters.mil.mil.ops.defs.iOS16 import constexpr_ops as early_ops
from coremltools.converters.mil.mil.ops.defs.iOS18 import compression as ops
from coremltools.optimize import _utils as coremltools_utils
from hypothesis import given, settings
from hypothesis import strategies as st

from milpress.errors import PackageError
from milpress.mil import dtypes, proto, values
from milpress.mil.decode import Decoder
from milpress.mil.graph import Node
from milpress.mil.program import ProgramGraph
from milpress.mil.values import Tensor


def tensor(array: Any, dtype: str = "") -> Tensor:
    array = np.asarray(array)
    return Tensor(dtypes.by_name(dtype or array.dtype.name), array)


def op_of(
    kind: str,
    parameters: Mapping[str, Tensor | str],
    *outputs: Tensor,
    name: str = "w",
    early: bool = False,
) -> Any:
    """Return an op whose parameters are stored with it, or outputs of another of that name."""
    op = proto.Operation(type=f"constexpr_{kind}")
    op.attributes["name"].CopyFrom(values.string(name))
    for parameter, given_value in parameters.items():
        if isinstance(given_value, str):
            op.inputs[parameter].arguments.add().name = given_value
            continue
        place = op.attributes[parameter] if early else op.inputs[parameter].arguments.add().value
        values.write(place, given_value, file_name=None, sink=None)
    for i, output in enumerate(outputs):
        item = op.outputs.add(name=f"{name}_{i}" if len(outputs) > 1 else name)
        values.set_type(item.type, output.dtype, output.values.shape)
    return op


def last_of(*ops: Any) -> tuple[Decoder, Node]:
    """Return a decoder of a block of ops, and the last of them."""
    function = proto.Model().mlProgram.functions["main"]
    block = function.block_specializations["CoreML8"]
    block.operations.extend(ops)
    graph = ProgramGraph(function, block, None)
    return graph.decoder, graph.nodes[-1]


def decode(
    kind: str, parameters: Mapping[str, Tensor | str], output: Tensor, *, early: bool = False
) -> Tensor:
    """Decode one op, which declares to make what ``output`` is."""
    decoder, node = last_of(op_of(kind, parameters, output, early=early))
    return decoder.dense(node)


def assert_same(ours: Tensor, theirs: np.ndarray) -> None:
    assert ours.values.dtype == theirs.dtype
    assert ours.values.shape == theirs.shape
    assert np.ascontiguousarray(ours.values).tobytes() == np.ascontiguousarray(theirs).tobytes()


def numbers(seed: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Return random numbers of a type; of floats some are integers, one is negative."""
    rng = np.random.default_rng(seed)
    if dtype.startswith("float"):
        return (rng.integers(-64, 64, shape) / rng.choice([1, 3], shape)).astype(dtype)
    info = np.iinfo(dtype)
    return rng.integers(info.min, info.max, shape, dtype, endpoint=True)


shapes = st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple)
floats = st.sampled_from(["float16", "float32"])


@st.composite
def shapes_with_axis(draw: Any) -> tuple[tuple[int, ...], int]:
    shape = draw(shapes)
    return shape, draw(st.integers(-len(shape), len(shape) - 1))


@settings(max_examples=300)
@given(
    place=shapes_with_axis(),
    data=st.sampled_from(["int8", "uint8"]),
    zero_point=st.sampled_from(["int8", "uint8", "float32", "same"]),
    scale=floats,
    are_vectors=st.tuples(st.booleans(), st.booleans()),
    is_whole=st.booleans(),
    seed=st.integers(0, 99),
)
def test_affine_codes_of_ios16_decode_whatever_zero_point_and_scale_are(
    place, data, zero_point, scale, are_vectors, is_whole, seed
):
    shape, axis = place
    codes = numbers(seed, shape, data)
    grids = [(shape[axis],) if is_vector else () for is_vector in are_vectors]
    zeros = numbers(seed + 1, grids[0], data if zero_point == "same" else zero_point)
    if is_whole:
        zeros = np.rint(zeros).astype(zeros.dtype)
    scales = numbers(seed + 2, grids[1], scale)
    theirs = early_ops.constexpr_affine_dequantize.decompress(codes, zeros, scales, axis)
    ours = decode(
        "affine_dequantize",
        {
            "quantized_data": tensor(codes),
            "zero_point": tensor(zeros),
            "scale": tensor(scales),
            "axis": tensor(np.int32(axis)),
        },
        tensor(theirs),
        early=True,
    )
    assert_same(ours, theirs)


BITS = st.sampled_from([1, 2, 3, 4, 6, 8])
TABLES = st.sampled_from(["float16", "float32", "int8", "uint8"])


@st.composite
def grids(draw: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Draw how many blocks there are along each axis."""
    return tuple(draw(st.sampled_from([n for n in range(1, s + 1) if s % n == 0])) for s in shape)


@st.composite
def tables(draw: Any) -> dict[str, Any]:
    """Draw indices and tables, of vectors along an axis that may count from the end."""
    shape, axis = draw(shapes_with_axis())
    bits, size = draw(BITS), draw(st.integers(1, 3))
    seed = draw(st.integers(0, 99))
    codes = np.random.default_rng(seed).integers(0, 2**bits, shape, np.uint8)
    lut = numbers(seed + 1, (*draw(grids(shape)), 2**bits, size), draw(TABLES))
    return {"codes": codes, "lut": lut, "bits": bits, "axis": axis if size > 1 else None}


def vector_axis(axis: int | None) -> dict[str, Tensor]:
    return {} if axis is None else {"vector_axis": tensor(np.int32(axis))}


@settings(max_examples=300)
@given(drawn=tables())
def test_indices_decode_along_any_axis(drawn):
    codes, lut, axis = drawn["codes"], drawn["lut"], drawn["axis"]
    theirs = coremltools_utils.lut_to_dense(codes, lut, axis)
    parameters = {"indices": tensor(codes, f"uint{drawn['bits']}"), "lut": tensor(lut)}
    ours = decode("lut_to_dense", parameters | vector_axis(axis), tensor(theirs))
    assert_same(ours, theirs)


@settings(max_examples=200)
@given(drawn=tables(), seed=st.integers(0, 99))
def test_indices_of_pruned_weights_decode_along_any_axis(drawn, seed):
    codes, lut, axis = drawn["codes"], drawn["lut"], drawn["axis"]
    mask = np.random.default_rng(seed).integers(0, 2, codes.shape, np.uint8)
    kept = codes[mask != 0]
    _, theirs = ops.constexpr_lut_to_sparse.decompress(mask, kept, lut, axis)
    parameters = {
        "indices_mask": tensor(mask, "uint1"),
        "indices_nonzero_data": tensor(kept, f"uint{drawn['bits']}"),
        "lut": tensor(lut),
    }
    ours = decode("lut_to_sparse", parameters | vector_axis(axis), tensor(theirs))
    assert_same(ours, theirs)


@given(shape=shapes, bits=st.sampled_from([1, 2, 4, 6, 8]), kind=TABLES, seed=st.integers(0, 99))
def test_indices_of_ios16_decode(shape, bits, kind, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, shape, np.uint8)
    lut = numbers(seed, (2**bits,), kind)
    packed = coremltools_utils.pack_elements_into_bits(codes, bits)
    sizes = np.array(shape, np.uint32)
    theirs = early_ops.constexpr_lut_to_dense.decompress(lut, packed, sizes)
    parameters = {"indices": tensor(packed), "lut": tensor(lut), "shape": tensor(sizes)}
    assert_same(decode("lut_to_dense", parameters, tensor(theirs), early=True), theirs)


@given(shape=shapes, kind=TABLES, early=st.booleans(), seed=st.integers(0, 99))
def test_values_beside_a_mask_decode(shape, kind, early, seed):
    mask = np.random.default_rng(seed).integers(0, 2, shape, np.uint8)
    kept = numbers(seed, (np.count_nonzero(mask),), kind)
    theirs = ops.constexpr_sparse_to_dense.decompress(kept, mask)
    stored = tensor(mask, "uint1")
    parameters = {"nonzero_data": tensor(kept), "mask": stored}
    if early:
        packed = np.packbits(mask.reshape(-1), bitorder="little")
        parameters |= {"mask": tensor(packed), "shape": tensor(np.array(shape, np.uint32))}
    assert_same(decode("sparse_to_dense", parameters, tensor(theirs), early=early), theirs)


@settings(max_examples=300)
@given(
    drawn=shapes.flatmap(lambda shape: st.tuples(st.just(shape), grids(shape))),
    data=st.sampled_from(["int4", "uint4", "int8", "uint8", "float16", "float32"]),
    offset=st.sampled_from(["none", "same", "float16", "float32"]),
    scale=floats,
    is_pruned=st.booleans(),
    seed=st.integers(0, 99),
)
def test_codes_in_blocks_decode(drawn, data, offset, scale, is_pruned, seed):
    shape, grid = drawn
    dtype = dtypes.by_name(data)
    codes = numbers(seed, shape, dtype.storage.name)
    shifts = numbers(seed + 1, grid, dtype.storage.name if offset in ("same", "none") else offset)
    if dtype.bits == 4:
        codes = codes // 16
        shifts = shifts // 16 if offset == "same" else shifts
    scales = numbers(seed + 2, grid, scale)
    mask = np.random.default_rng(seed).integers(0, 2, shape, np.uint8)
    stored, given_offset = tensor(codes, data), None if offset == "none" else shifts
    kind, parameters = "blockwise_shift_scale", {"data": stored}
    if is_pruned:
        kept = tensor(codes[mask != 0], data)
        kind = "sparse_blockwise_shift_scale"
        parameters = {"data_mask": tensor(mask, "uint1"), "nonzero_data": kept}
        _, theirs = ops.constexpr_sparse_blockwise_shift_scale.decompress(
            mask, kept.values, scales, given_offset
        )
    else:
        theirs = ops.constexpr_blockwise_shift_scale.decompress(codes, scales, given_offset)
    # Where an offset is of a wider type than the scale, theirs is not what the op declares.
    theirs = theirs.astype(scale)
    parameters["scale"] = tensor(scales)
    if given_offset is not None:
        parameters["offset"] = tensor(shifts, data if offset == "same" else offset)
    assert_same(decode(kind, parameters, tensor(theirs)), theirs)


CODES = tensor(np.zeros((2, 4), np.uint8), "uint1")
PAIRS = tensor(np.zeros((1, 1, 2, 2), np.float32))
AFFINE = {"quantized_data": tensor(np.zeros((2, 4), np.int8)), "zero_point": tensor(np.int8(0))}


@pytest.mark.parametrize(
    ("kind", "parameters", "early", "message"),
    [
        (
            "lut_to_dense",
            {"indices": CODES, "lut": PAIRS, **vector_axis(2)},
            False,
            "w: the parameters .* an axis must be from -2 to 1, got 2",
        ),
        (
            "lut_to_dense",
            {"indices": CODES, "lut": PAIRS, **vector_axis(-3)},
            False,
            "an axis must be from -2 to 1, got -3",
        ),
        (
            "lut_to_dense",
            {"indices": CODES, "lut": PAIRS},
            False,
            "vectors of 2 need a vector_axis",
        ),
        (
            "lut_to_sparse",
            {
                "indices_mask": CODES,
                "indices_nonzero_data": tensor(np.zeros(0, np.uint8), "uint1"),
                "lut": PAIRS,
                **vector_axis(-3),
            },
            False,
            "an axis must be from -2 to 1, got -3",
        ),
        (
            "lut_to_dense",
            {
                "indices": tensor(np.zeros(3, np.uint8)),
                "lut": tensor(np.zeros(8, np.float32)),
                "shape": tensor(np.array([2, 4], np.uint32)),
            },
            True,
            r"lut must be a vector of 2, 4, 16, 64 or 256, got the shape \(8,\)",
        ),
        (
            "affine_dequantize",
            AFFINE | {"scale": tensor(np.float32(1)), "axis": tensor(np.int32(2))},
            True,
            "w: the parameters .* an axis must be from -2 to 1, got 2",
        ),
        (
            "affine_dequantize",
            AFFINE | {"scale": tensor(np.ones(2, np.float32)), "axis": tensor(np.int32(-1))},
            True,
            r"scale must be a scalar or a vector of the 4 elements of axis 1, got the shape \(2,\)",
        ),
        (
            "affine_dequantize",
            AFFINE
            | {
                "scale": tensor(np.float32(1)),
                "zero_point": tensor(np.zeros(2, np.int32)),
                "axis": tensor(np.int32(0)),
            },
            True,
            "zero_point must be int8, uint8 or float32, got int32",
        ),
    ],
)
def test_parameters_that_do_not_fit_are_refused_with_the_op(kind, parameters, early, message):
    with pytest.raises(PackageError, match=message):
        decode(kind, parameters, tensor(np.zeros((2, 4), np.float32)), early=early)


def test_an_op_that_declares_another_type_or_shape_is_refused():
    parameters = {"indices": CODES, "lut": tensor(np.zeros((1, 1, 2, 1), np.float32))}
    with pytest.raises(PackageError, match=r"w: .* must make the declared float16, got float32"):
        decode("lut_to_dense", parameters, tensor(np.zeros((2, 4), np.float16)))
    shapes = r"the declared shape \(4, 2\), got \(2, 4\)"
    with pytest.raises(PackageError, match=shapes):
        decode("lut_to_dense", parameters, tensor(np.zeros((4, 2), np.float32)))


@pytest.mark.parametrize("are_same", [True, False])
def test_codes_pruned_by_one_mask_and_spread_by_another_decode_by_the_second(are_same):
    inner_mask = np.array([[1, 0, 1, 0], [0, 1, 0, 1]], np.uint8)
    outer_mask = inner_mask if are_same else 1 - inner_mask
    codes = np.array([1, 2, 3, 4], np.int8)
    scale = np.array([[2], [3]], np.float32)
    _, kept = ops.constexpr_sparse_blockwise_shift_scale.decompress(inner_mask, codes, scale, None)
    expected = ops.constexpr_sparse_to_dense.decompress(kept, outer_mask)
    inner = op_of(
        "sparse_blockwise_shift_scale",
        {
            "data_mask": tensor(inner_mask, "uint1"),
            "nonzero_data": tensor(codes),
            "scale": tensor(scale),
        },
        tensor(inner_mask, "uint1"),
        tensor(kept),
        name="inner",
    )
    outer = op_of(
        "sparse_to_dense",
        {"mask": tensor(outer_mask, "uint1"), "nonzero_data": "inner_1"},
        tensor(expected),
    )
    decoder, node = last_of(inner, outer)
    assert_same(decoder.dense(node), expected)
    # What a mask and codes alone can't say is not taken for it.
    assert (decoder.value(node) is not None) == are_same
