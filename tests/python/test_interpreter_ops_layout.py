from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from mil_ops import IOS15, IOS16, IOS17, IOS18, check, computed, inferred, inferred_types

few = settings(max_examples=20, deadline=None)
sizes = st.lists(st.integers(1, 4), min_size=1, max_size=4)


def counted(*shape: int, dtype: type = np.float32) -> np.ndarray:
    """Return an array in which every element is another, so that a wrong place shows."""
    return np.arange(1, math.prod(shape) + 1, dtype=dtype).reshape(shape)


def agrees(name: str, opset: int = IOS18, **arguments) -> None:
    check(computed(name, opset=opset, **arguments), inferred(name, opset=opset, **arguments))


def draw_axes(data, rank: int, least: int = 0) -> list[int]:
    """Return some axes, counted from either end."""
    axes = data.draw(st.lists(st.integers(0, rank - 1), min_size=least, unique=True))
    return [axis - rank if data.draw(st.booleans()) else axis for axis in axes]


# Shapes


@few
@given(shape=sizes, data=st.data())
def test_a_reshape_is_what_coremltools_infers(shape, data):
    x = counted(*shape)
    target = data.draw(st.permutations(shape))
    place = data.draw(st.integers(0, len(target) - 1))
    agrees("reshape", IOS15, x=x, shape=target)
    target[place] = -1
    agrees("reshape", x=x, shape=target)
    same = [size if data.draw(st.booleans()) else 0 for size in shape]
    for opset in (IOS15, IOS17):
        agrees("reshape", opset, x=x, shape=same)


def test_a_zero_in_a_shape_counts_from_the_right_since_ios17():
    x = counted(2, 50)
    agrees("reshape", IOS17, x=x, shape=[1, 0, -1, 0])
    assert computed("reshape", x=x, shape=[1, 0, -1, 0]).shape == (1, 1, 2, 50)
    with pytest.raises(ValueError, match=r"shape must have rank 2 .*, got"):
        computed("reshape", opset=IOS16, x=x, shape=[1, 0, -1, 0])


def test_an_empty_tensor_can_be_reshaped():
    x = np.zeros((0, 3), np.float32)
    assert computed("reshape", x=x, shape=[-1, 3]).shape == (0, 3)
    assert computed("reshape", x=x, shape=[3, -1]).shape == (3, 0)


def test_a_tensor_of_one_element_becomes_a_scalar():
    for opset in (IOS15, IOS17):
        assert computed("reshape", opset=opset, x=counted(1, 1), shape=[]).shape == ()


def test_reshape_like_joins_parts_of_shapes():
    x = counted(30, 6)
    arguments = {
        "x": x,
        "ref_tensors": (counted(2, 3, 4), counted(1, 5, 6)),
        "begins": (0, 1),
        "ends": (2, 0),
        "end_masks": (False, True),
    }
    assert inferred_types("reshape_like", **arguments)[0][0] == (2, 3, 5, 6)
    check(computed("reshape_like", **arguments), x.reshape(2, 3, 5, 6))


@few
@given(shape=sizes, data=st.data())
def test_axes_of_one_come_and_go_as_coremltools_infers(shape, data):
    rank = len(shape) + data.draw(st.integers(1, 2))
    count = rank - len(shape)
    axes = data.draw(st.permutations(range(rank)))[:count]
    axes = [axis - rank if data.draw(st.booleans()) else axis for axis in axes]
    agrees("expand_dims", x=counted(*shape), axes=axes)
    ones = counted(*shape, 1, 1)
    assume(max(shape) > 1)
    agrees("squeeze", x=ones)
    agrees("squeeze", x=ones, axes=[-1, len(shape)])
    x = counted(2, 3, 1)  # an axis that is not 1 stays, as the definition says
    assert computed("squeeze", x=x, axes=[0, 2]).shape == (2, 3)


@few
@given(shape=sizes, data=st.data())
def test_an_order_of_axes_is_what_coremltools_infers(shape, data):
    x = counted(*shape)
    perm = data.draw(st.permutations(range(len(shape))))
    agrees("transpose", x=x, perm=perm)
    agrees("reverse", x=x)
    agrees("reverse", x=x, axes=draw_axes(data, len(shape), 1))
    axis = data.draw(st.integers(-len(shape), len(shape)))
    # Whose value inference fails where no axis lies before.
    flat = x.reshape(math.prod(shape[:axis]), math.prod(shape[axis:]))
    check(computed("flatten2d", x=x, axis=axis), flat)
    agrees("shape", x=x)
    agrees("tile", x=x, reps=[data.draw(st.integers(1, 3)) for _ in shape])


@few
@given(shape=sizes, data=st.data())
def test_tensors_are_joined_and_split_as_coremltools_infers(shape, data):
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    others = [data.draw(st.integers(1, 3)) for _ in range(data.draw(st.integers(1, 3)))]
    values = []
    for size in others:
        part = list(shape)
        part[axis] = size
        values.append(counted(*part) + 100 * len(values))
    agrees("concat", values=values, axis=axis)
    whole = np.concatenate(values, axis)
    if len(others) > 1:
        agrees("split", x=whole, split_sizes=others, axis=axis)
    doubled = np.concatenate([whole, -whole], axis)
    agrees("split", x=doubled, num_splits=2, axis=axis)
    same = [counted(*shape), -counted(*shape)]
    agrees("stack", values=same, axis=data.draw(st.integers(-len(shape) - 1, len(shape))))


def test_a_split_into_one_part_gives_a_tensor():
    x = counted(2, 3)
    check(computed("split", x=x, num_splits=1, axis=0), x)
    with pytest.raises(ValueError, match="num_splits must divide 3, got 2"):
        computed("split", x=x, num_splits=2, axis=1)


def test_interleaved_tensors_take_turns():
    # coremltools' value inference leaves the interleaving out, so the definition's example decides.
    values = [np.int32([[1, 2], [3, 4], [5, 6]]), np.int32([[7, 8], [9, 10], [11, 12]])]
    ours = computed("concat", values=values, axis=0, interleave=True)
    check(ours, np.int32([[1, 2], [7, 8], [3, 4], [9, 10], [5, 6], [11, 12]]))
    ours = computed("concat", values=values, axis=-1, interleave=True)
    check(ours, np.int32([[1, 7, 2, 8], [3, 9, 4, 10], [5, 11, 6, 12]]))


def test_scalars_are_joined_to_a_vector():
    values = [np.int32(3), np.int32(5)]
    ours = computed("concat", values=[np.array(value) for value in values], axis=0)
    check(ours, inferred("concat", values=values, axis=0))


@few
@given(shape=st.tuples(*[st.integers(1, 4)] * 3), data=st.data())
def test_a_sequence_is_reversed_up_to_its_length(shape, data):
    seq_axis, batch_axis = data.draw(st.permutations(range(3)))[:2]
    x = counted(*shape)
    lengths = np.int32(
        [data.draw(st.integers(0, shape[seq_axis])) for _ in range(shape[batch_axis])]
    )
    expected = x.copy()
    for place in np.ndindex(shape):
        source = list(place)
        length = lengths[place[batch_axis]]
        if place[seq_axis] < length:
            source[seq_axis] = length - 1 - place[seq_axis]
        expected[place] = x[tuple(source)]
    back = data.draw(st.booleans())
    arguments = {"seq_axis": seq_axis - 3 * back, "batch_axis": batch_axis - 3 * back}
    check(computed("reverse_sequence", x=x, lengths=lengths, **arguments), expected)


# Blocks


@few
@given(sizes=st.tuples(*[st.integers(1, 3)] * 4), block=st.integers(2, 3))
def test_depth_and_space_are_exchanged_block_by_block(sizes, block):
    n, c, height, width = sizes
    x = counted(n, c, height * block, width * block)
    depth = np.zeros((n, c * block**2, height, width), np.float32)
    shuffled = np.zeros_like(depth)
    for i, j in itertools.product(range(block), repeat=2):
        part = x[:, :, i::block, j::block]
        for channel in range(c):
            depth[:, (i * block + j) * c + channel] = part[:, channel]
            shuffled[:, channel * block**2 + i * block + j] = part[:, channel]
    check(computed("space_to_depth", x=x, block_size=block), depth)
    check(computed("depth_to_space", x=depth, block_size=block), x)
    check(computed("pixel_unshuffle", x=x, downscale_factor=block), shuffled)
    check(computed("pixel_shuffle", x=shuffled, upscale_factor=block), x)


def test_depth_and_space_are_exchanged_as_core_ml_did():
    # What coremltools' own tests expect of Core ML.
    x = np.float32([9, 5, 1, 3])
    check(computed("depth_to_space", x=x.reshape(1, 4, 1, 1), block_size=2), x.reshape(1, 1, 2, 2))
    x = np.float32([7, 9, 4, 6])
    check(computed("space_to_depth", x=x.reshape(1, 1, 2, 2), block_size=2), x.reshape(1, 4, 1, 1))


@few
@given(
    sizes=st.tuples(*[st.integers(1, 3)] * 4),
    block=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    before=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    after=st.tuples(st.integers(0, 2), st.integers(0, 2)),
)
def test_space_goes_into_the_batch_and_back(sizes, block, before, after):
    n, c, height, width = sizes
    padded = np.float32(np.zeros((n, c, height * block[0], width * block[1])))
    padded[:] = counted(*padded.shape)
    rows = slice(before[0], padded.shape[2] - after[0])
    columns = slice(before[1], padded.shape[3] - after[1])
    x = padded[:, :, rows, columns]
    assume(x.size)
    edges = np.int32([[before[0], after[0]], [before[1], after[1]]])
    padded = np.pad(x, ((0, 0), (0, 0), *map(tuple, edges)))
    parts = [padded[:, :, i :: block[0], j :: block[1]] for i, j in np.ndindex(*block)]
    batch = np.concatenate(parts)
    shape = np.int32(block)
    check(computed("space_to_batch", x=x, block_shape=shape, paddings=edges), batch)
    check(computed("batch_to_space", x=batch, block_shape=shape, crops=edges), x)


@few
@given(shape=sizes, data=st.data())
def test_windows_slide_along_an_axis(shape, data):
    x = counted(*shape)
    axis = data.draw(st.integers(0, len(shape) - 1))
    size = data.draw(st.integers(1, shape[axis]))
    stride = data.draw(st.integers(1, 3))
    starts = range(0, shape[axis] - size + 1, stride)
    expected = np.stack([x.take(range(i, i + size), axis) for i in starts], axis)
    given_axis = axis - len(shape) * data.draw(st.booleans())
    arguments = {"x": x, "axis": given_axis, "size": size, "stride": stride}
    check(computed("sliding_windows", **arguments), expected)
    assert inferred_types("sliding_windows", **arguments)[0][0] == expected.shape


# Padding and filling


@few
@given(shape=sizes, data=st.data())
def test_a_padded_tensor_is_what_coremltools_infers(shape, data):
    x = counted(*shape)
    axes = data.draw(st.integers(1, len(shape)))
    padded = shape[len(shape) - axes :]
    for mode in ("constant", "reflect", "replicate"):
        most = {"constant": 3, "reflect": None, "replicate": 3}[mode]
        pad = []
        for size in padded:
            pad += [data.draw(st.integers(0, size - 1 if most is None else most)) for _ in "ab"]
        arguments = {"x": x, "pad": pad, "mode": mode}
        if mode == "constant":
            arguments["constant_val"] = np.float32(0.5)
        agrees("pad", **arguments)


def test_a_padding_of_an_unknown_mode_is_named():
    with pytest.raises(ValueError, match="mode must be constant, reflect or replicate, got wrap"):
        computed("pad", x=counted(3), pad=[1, 1], mode="wrap")


@few
@given(rows=st.integers(1, 4), columns=st.integers(1, 4), data=st.data())
def test_a_band_is_what_coremltools_infers(rows, columns, data):
    lower, upper = data.draw(st.integers(-1, 3)), data.draw(st.integers(-1, 3))
    agrees("band_part", x=counted(2, rows, columns), lower=lower, upper=upper)
    whole = counted(rows, columns, dtype=np.int32)
    agrees("band_part", x=whole, lower=lower, upper=upper)


@pytest.mark.parametrize("value", [np.float32(1.5), np.int32(-3), np.bool_(True)])
def test_a_filled_tensor_has_the_values_type(value):
    held_in = torch.from_numpy(np.array([value])).dtype
    for name, arguments in (
        ("fill", {"shape": np.int32([2, 3])}),
        ("fill_like", {"ref_tensor": counted(2, 3)}),
    ):
        ours = computed(name, held_in=held_in, value=value, **arguments)
        check(ours, inferred(name, value=value, **arguments))
        assert ours.dtype == value.dtype


@few
@given(start=st.integers(-5, 5), end=st.integers(-5, 5), step=st.sampled_from([-2, -1, 1, 2, 3]))
def test_a_range_is_what_coremltools_infers(start, end, step):
    assume((end - start) * step > 0)
    whole = {"start": np.int32(start), "end": np.int32(end), "step": np.int32(step)}
    check(computed("range_1d", held_in=torch.int32, **whole), inferred("range_1d", **whole))
    # A quarter is exact, so that both count the same steps.
    halves = {key: np.float32(value / 4) for key, value in whole.items()}
    check(computed("range_1d", **halves), inferred("range_1d", **halves))


@few
@given(
    indices=npst.arrays(
        np.int32, npst.array_shapes(max_dims=3, max_side=3), elements=st.integers(0, 3)
    ),
    data=st.data(),
)
def test_one_hot_has_the_on_value_where_the_index_says(indices, data):
    axis = data.draw(st.integers(-indices.ndim - 1, indices.ndim))
    expected = np.where(indices[..., None] == np.arange(4), np.float32(2.5), np.float32(-1))
    expected = np.moveaxis(expected, -1, axis)
    arguments = {
        "indices": indices,
        "one_hot_vector_size": np.int32(4),
        "axis": axis,
        "on_value": np.float32(2.5),
        "off_value": np.float32(-1),
    }
    check(computed("one_hot", **arguments), expected)
    assert inferred_types("one_hot", **arguments)[0][0] == expected.shape
    plain = computed("one_hot", held_in=torch.int32, indices=indices, one_hot_vector_size=4)
    check(plain, (indices[..., None] == np.arange(4)).astype(np.int32))


def test_cropping_leaves_the_middle():
    x = counted(1, 2, 4, 5)
    ours = computed("crop", x=x, crop_height=[0, 1], crop_width=[1, 2])
    check(ours, x[:, :, 0:3, 1:3])


# Slices


@st.composite
def slices(draw, size: int):
    """Draw begin, end, stride and masks that select something of an axis."""
    stride = draw(st.sampled_from([1, 1, 2, 3, -1, -2]))
    begin, end = draw(st.integers(-size, size - 1)), draw(st.integers(-size, size))
    masks = (draw(st.booleans()), draw(st.booleans()), draw(st.sampled_from([False, False, True])))
    whole = slice(None if masks[0] else begin, None if masks[1] else end, stride)
    if masks[2] and not masks[0]:
        whole = begin
        begin_only = True
    else:
        masks = (*masks[:2], False)
        begin_only = False
    assume(begin_only or len(range(size)[whole]) > 0)
    # coremltools refuses what might be empty where both bounds have one sign.
    if not begin_only and not masks[0] and not masks[1]:
        assume(not (begin >= 0 and end >= 0 and stride > 0 and end < begin))
        assume(not (begin < 0 and end < 0 and stride < 0 and begin < end))
    return begin, end, stride, masks, whole


@settings(max_examples=60, deadline=None)
@given(shape=st.lists(st.integers(1, 5), min_size=1, max_size=3), data=st.data())
def test_a_slice_with_any_masks_and_strides_is_numpys(shape, data):
    drawn = [data.draw(slices(size)) for size in shape]
    begin, end, stride, masks, key = (list(part) for part in zip(*drawn, strict=True))
    x = counted(*shape)
    arguments = {
        "begin": np.int32(begin),
        "end": np.int32(end),
        "stride": np.int32(stride),
        **{
            name: np.array([mask[i] for mask in masks])
            for i, name in enumerate(("begin_mask", "end_mask", "squeeze_mask"))
        },
    }
    expected = x[tuple(key)]
    check(computed("slice_by_index", x=x, **arguments), expected)
    check(expected, inferred("slice_by_index", x=x, **arguments))
    if expected.ndim:
        update = -counted(*expected.shape)
        changed = x.copy()
        changed[tuple(key)] = update
        check(computed("slice_update", x=x, update=update, **arguments), changed)
        check(changed, inferred("slice_update", x=x, update=update, **arguments))


def test_a_slice_without_masks_or_strides_takes_begin_to_end():
    x = counted(4, 5)
    arguments = {"x": x, "begin": [1, 0], "end": [3, -1]}
    agrees("slice_by_index", **arguments)
    check(computed("slice_by_index", **arguments), x[1:3, :-1])


def test_an_empty_slice_is_empty():
    ours = computed("slice_by_index", x=counted(4), begin=[3], end=[1], stride=[1])
    assert ours.shape == (0,)
    ours = computed("slice_by_index", x=counted(4), begin=[1], end=[3], stride=[-1])
    assert ours.shape == (0,)


def test_an_update_of_a_slice_leaves_the_tensor_it_is_given():
    x = counted(3)
    computed("slice_update", x=x, update=np.float32([0]), begin=[0], end=[1])
    check(x, counted(3))


@few
@given(shape=sizes, data=st.data())
def test_a_slice_of_a_size_is_what_coremltools_infers(shape, data):
    begin = [data.draw(st.integers(0, size - 1)) for size in shape]
    size = [
        data.draw(st.sampled_from([-1, *range(1, n - b + 1)]))
        for n, b in zip(shape, begin, strict=True)
    ]
    back = [b - n if data.draw(st.booleans()) else b for n, b in zip(shape, begin, strict=True)]
    agrees("slice_by_size", x=counted(*shape), begin=np.int32(back), size=np.int32(size))


# Gathering


@few
@given(shape=sizes, data=st.data())
def test_a_gather_is_what_coremltools_infers(shape, data):
    x = counted(*shape)
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    size = shape[axis]
    places = data.draw(npst.array_shapes(min_dims=1, max_dims=2, max_side=3))
    indices = data.draw(npst.arrays(np.int32, places, elements=st.integers(0, size - 1)))
    for opset in (IOS15, IOS16, IOS17):
        agrees("gather", opset, x=x, indices=indices, axis=axis)
    agrees("gather", IOS15, x=x, indices=indices - np.int32(size), axis=axis)
    scalar = np.int32(data.draw(st.integers(0, size - 1)))
    ours = computed("gather", x=x, indices=np.array(scalar), axis=axis)
    check(ours, inferred("gather", x=x, indices=scalar, axis=axis))


@few
@given(batch=st.lists(st.integers(1, 3), min_size=1, max_size=2), rest=sizes, data=st.data())
def test_a_gather_in_batches_takes_each_rows_own_places(batch, rest, data):
    x = counted(*batch, *rest)
    axis = len(batch) + data.draw(st.integers(0, len(rest) - 1))
    size = x.shape[axis]
    places = data.draw(st.sampled_from([(), (2,), (3, 2)]))
    indices = data.draw(npst.arrays(np.int32, (*batch, *places), elements=st.integers(0, size - 1)))
    expected = np.stack(
        [np.take(x[row], indices[row], axis - len(batch)) for row in np.ndindex(*batch)]
    )
    expected = expected.reshape(*batch, *expected.shape[1:])
    arguments = {"x": x, "indices": indices, "axis": axis, "batch_dims": len(batch)}
    check(computed("gather", **arguments), expected)
    if places:
        check(expected, inferred("gather", **arguments))


@few
@given(shape=sizes, data=st.data())
def test_a_gather_along_an_axis_is_what_coremltools_infers(shape, data):
    x = counted(*shape)
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    places = list(shape)
    places[axis] = data.draw(st.integers(1, 4))
    indices = data.draw(
        npst.arrays(np.int32, tuple(places), elements=st.integers(0, shape[axis] - 1))
    )
    for opset in (IOS15, IOS17):
        agrees("gather_along_axis", opset, x=x, indices=indices, axis=axis)
    back = indices - np.int32(shape[axis])
    agrees("gather_along_axis", IOS15, x=x, indices=back, axis=axis)


@few
@given(
    batch=st.lists(st.integers(1, 2), max_size=2),
    deep=sizes,
    rest=st.lists(st.integers(1, 3), max_size=2),
    data=st.data(),
)
def test_a_gather_of_places_takes_slices(batch, deep, rest, data):
    x = counted(*batch, *deep, *rest)
    places = data.draw(st.lists(st.integers(1, 3), max_size=2))
    columns = [
        data.draw(npst.arrays(np.int32, (*batch, *places), elements=st.integers(0, size - 1)))
        for size in deep
    ]
    indices = np.stack(columns, -1)
    expected = np.zeros((*batch, *places, *rest), np.float32)
    for place in np.ndindex(*batch, *places):
        expected[place] = x[(*place[: len(batch)], *indices[place])]
    arguments = {"x": x, "indices": indices, "batch_dims": len(batch)}
    check(computed("gather_nd", **arguments), expected)
    assert inferred_types("gather_nd", **arguments)[0][0] == expected.shape
    if not batch:
        check(computed("gather_nd", opset=IOS15, x=x, indices=indices), expected)


GATHERS = {
    "gather": {"x": counted(3, 2), "indices": np.int32([3])},
    "gather_along_axis": {"x": counted(3, 2), "indices": np.int32([[0, 3]])},
    "gather_nd": {"x": counted(3, 2), "indices": np.int32([[2, 2]])},
    "scatter": {"data": counted(3), "indices": np.int32([3]), "updates": counted(1)},
    "scatter_along_axis": {"data": counted(3), "indices": np.int32([3]), "updates": counted(1)},
    "scatter_nd": {"data": counted(3), "indices": np.int32([[3]]), "updates": counted(1)},
}


@pytest.mark.parametrize("name", GATHERS)
def test_an_index_outside_is_an_error_where_validation_is_asked_for(name):
    arguments = GATHERS[name]
    with pytest.raises(IndexError, match=r"indices must be in \[0, [23]\), got"):
        computed(name, **arguments, validate_indices=True)
    computed(name, **arguments)  # undefined, but safe
    with pytest.raises((IndexError, RuntimeError)):
        computed(name, opset=IOS15, **arguments)


def test_a_negative_index_lies_outside_since_ios17():
    with pytest.raises(IndexError, match="indices must be in"):
        computed("gather", x=counted(3), indices=np.int32([-1]), validate_indices=True)


def test_indices_of_small_types_are_places_and_no_masks():
    x = counted(3, 2)
    for dtype in (np.int8, np.uint8, np.int16, np.uint16):
        check(computed("gather", x=x, indices=np.array([2, 0], dtype)), x[[2, 0]])


# Scattering

MODES = {
    "update": lambda old, new: new,
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": lambda old, new: old / new if old.dtype.kind == "f" else np.trunc(old / new),
    "max": np.maximum,
    "min": np.minimum,
}


@st.composite
def scattered(draw, size: int, shape: tuple[int, ...], mode: str):
    """Draw places; in mode ``update``, no two are the same, since the last need not win."""
    elements = st.integers(0, size - 1)
    if mode == "update":
        count = math.prod(shape)
        assume(count <= size)
        return np.int32(draw(st.permutations(range(size)))[:count]).reshape(shape)
    return draw(npst.arrays(np.int32, shape, elements=elements))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [np.float32, np.int32])
@settings(max_examples=8, deadline=None)
@given(shape=sizes, data=st.data())
def test_a_scatter_changes_the_slices_at_its_places(mode, dtype, shape, data):
    axis = data.draw(st.integers(0, len(shape) - 1))
    x = counted(*shape, dtype=dtype) * 4
    count = data.draw(st.integers(1, shape[axis]))
    indices = data.draw(scattered(shape[axis], (count,), mode))
    part = list(shape)
    part[axis] = count
    # Powers of two, so that products and quotients are exact in any order.
    updates = data.draw(npst.arrays(dtype, tuple(part), elements=st.sampled_from([1, 2, 4])))
    expected = np.moveaxis(x.copy(), axis, 0)
    for i, update in zip(indices, np.moveaxis(updates, axis, 0), strict=True):
        expected[i] = MODES[mode](expected[i], update)
    expected = np.moveaxis(expected, 0, axis)
    arguments = {"data": x, "updates": updates, "mode": mode}
    for opset in (IOS15, IOS17):
        ours = computed("scatter", opset=opset, indices=indices, axis=axis, **arguments)
        check(ours, expected)
    back = indices - np.int32(shape[axis])
    ours = computed("scatter", opset=IOS15, indices=back, axis=axis - len(shape), **arguments)
    check(ours, expected)
    assert inferred_types("scatter", indices=indices, axis=axis, **arguments)[0][0] == x.shape


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [np.float32, np.int32])
@settings(max_examples=8, deadline=None)
@given(rows=st.integers(1, 3), size=st.integers(1, 4), data=st.data())
def test_a_scatter_along_an_axis_changes_elements(mode, dtype, rows, size, data):
    count = data.draw(st.integers(1, size))
    indices = np.stack([data.draw(scattered(size, (count,), mode)) for _ in range(rows)])
    updates = data.draw(npst.arrays(dtype, (rows, count), elements=st.sampled_from([1, 2, 4])))
    x = counted(rows, size, dtype=dtype) * 4
    expected = x.copy()
    for row, i in np.ndindex(rows, count):
        place = row, indices[row, i]
        expected[place] = MODES[mode](expected[place], updates[row, i])
    for opset in (IOS15, IOS17):
        ours = computed(
            "scatter_along_axis",
            opset=opset,
            data=x,
            indices=indices,
            updates=updates,
            axis=-1,
            mode=mode,
        )
        check(ours, expected)
    if mode == "update":  # whichever mode is asked for, coremltools infers an update
        arguments = {"data": x, "indices": indices, "updates": updates, "axis": 1, "mode": mode}
        check(expected, inferred("scatter_along_axis", **arguments))


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=8, deadline=None)
@given(
    deep=st.lists(st.integers(1, 3), min_size=1, max_size=2),
    rest=st.lists(st.integers(1, 2), max_size=1),
    data=st.data(),
)
def test_a_scatter_to_places_changes_slices(mode, deep, rest, data):
    x = counted(*deep, *rest) * 4
    total = math.prod(deep)
    count = data.draw(st.integers(1, total))
    flat = data.draw(scattered(total, (count,), mode))
    indices = np.stack(np.unravel_index(flat, deep), -1).astype(np.int32)
    updates = data.draw(
        npst.arrays(np.float32, (count, *rest), elements=st.sampled_from([1, 2, 4]))
    )
    expected = x.copy()
    for i in range(count):
        place = tuple(indices[i])
        expected[place] = MODES[mode](expected[place], updates[i])
    for opset in (IOS15, IOS17):
        arguments = {"data": x, "indices": indices, "updates": updates, "mode": mode}
        check(computed("scatter_nd", opset=opset, **arguments), expected)


def test_a_scatter_adds_where_no_mode_is_given():
    # The text says update for scatter, its default says add; the default is what gets stored.
    ours = computed("scatter", data=counted(2), indices=np.int32([0]), updates=np.float32([5]))
    check(ours, np.float32([6, 2]))


def test_a_scatter_of_an_unknown_mode_is_named():
    with pytest.raises(ValueError, match=r"mode must be update, div, .*, got xor"):
        computed("scatter", data=counted(1), indices=np.int32([0]), updates=counted(1), mode="xor")


# Order


@few
@given(
    x=npst.arrays(np.int32, npst.array_shapes(max_dims=3, max_side=5), elements=st.integers(-3, 3)),
    data=st.data(),
)
def test_the_order_of_values_is_a_stable_one(x, data):
    axis = data.draw(st.integers(-x.ndim, x.ndim - 1))
    ascending = data.draw(st.booleans())
    order = np.argsort(x if ascending else -x, axis, kind="stable")
    check(computed("argsort", x=x, axis=axis, ascending=ascending), order)
    k = data.draw(st.integers(1, x.shape[axis]))
    first = order.take(range(k), axis)
    values = np.take_along_axis(x, first, axis)
    arguments = {"x": x, "k": k, "axis": axis, "ascending": ascending}
    for opset in (IOS15, IOS16, IOS17):
        check(computed("topk", opset=opset, **arguments), (values, first))
        check(inferred("topk", opset=opset, **arguments)[0], values)
    check(computed("topk", opset=IOS16, return_indices=False, sort=False, **arguments), values)
    typed = computed("topk", output_indices_dtype="uint16", **arguments)
    check(typed, (values, first))
    assert typed[1].dtype == np.int32


def test_the_order_of_different_floats_is_what_coremltools_infers():
    x = np.random.default_rng(0).permutation(24).astype(np.float32).reshape(2, 3, 4)
    for axis, ascending in itertools.product(range(-3, 3), (False, True)):
        agrees("argsort", x=x, axis=axis, ascending=ascending)
        agrees("topk", x=x, k=2, axis=axis, ascending=ascending)


def test_a_k_of_minus_one_takes_all():
    x = np.float32([2, 9, 4])
    check(computed("topk", x=x, k=-1), (np.float32([9, 4, 2]), np.array([1, 2, 0])))


@few
@given(
    x=npst.arrays(np.int32, npst.array_shapes(max_dims=3, max_side=4), elements=st.integers(-9, 9)),
    data=st.data(),
)
def test_a_cumulative_sum_runs_along_an_axis(x, data):
    axis = data.draw(st.integers(-1, x.ndim - 1))
    for exclusive, reverse in itertools.product((False, True), repeat=2):
        arguments = {"x": x, "axis": axis, "exclusive": exclusive, "reverse": reverse}
        turned = np.flip(x, axis) if reverse else x
        sums = np.cumsum(turned, axis)
        sums = sums - turned if exclusive else sums
        expected = np.flip(sums, axis) if reverse else sums
        check(computed("cumsum", **arguments), expected)
        if not exclusive:  # for which coremltools' value inference fails
            check(expected, inferred("cumsum", **arguments))


@few
@given(
    x=npst.arrays(np.int32, npst.array_shapes(max_dims=3, max_side=4), elements=st.integers(0, 1))
)
def test_the_places_of_what_is_not_zero_are_what_coremltools_infers(x):
    assume(x.any())
    agrees("non_zero", x=x)
    check(computed("non_zero", x=x.astype(bool)), np.argwhere(x))
