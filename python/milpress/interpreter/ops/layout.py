"""Reshaping, transposing, tiling and other ops that move values."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from milpress.interpreter.operator import Call, operator
from milpress.interpreter.ops.torch_types import check_choice, padded, positive


def _filled(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Reshape, with the size that stands as -1 worked out, whether or not ``x`` is empty."""
    sizes = list(shape)
    if -1 in sizes:
        place = sizes.index(-1)
        known = math.prod(sizes[:place] + sizes[place + 1 :])
        sizes[place] = x.numel() // known if known else 0
    return x.reshape(sizes)


@operator("reshape")
def reshape(x: Tensor, shape: list[int]) -> Tensor:
    if 0 in shape and len(shape) != x.dim():
        msg = f"shape must have rank {x.dim()} to take sizes over from x, got {shape}"
        raise ValueError(msg)
    return _filled(x, [size or x.shape[axis] for axis, size in enumerate(shape)])


@operator("reshape", since=7)
def reshape_from_the_right(x: Tensor, shape: list[int]) -> Tensor:
    # A 0 takes over the size at the same place from the right, or 1 where x has none.
    sizes = [1] * len(shape) + list(x.shape)
    taken = sizes[len(sizes) - len(shape) :]
    return _filled(x, [size or old for size, old in zip(shape, taken, strict=True)])


@operator("reshape_like", since=6)
def reshape_like(
    x: Tensor,
    ref_tensors: list[Tensor],
    begins: list[int],
    ends: list[int],
    end_masks: list[bool],
) -> Tensor:
    shape: list[int] = []
    for like, begin, end, to_last in zip(ref_tensors, begins, ends, end_masks, strict=True):
        shape.extend(like.shape[int(begin) : None if to_last else int(end)])
    return x.reshape(shape)


@operator("expand_dims")
def expand_dims(x: Tensor, axes: list[int]) -> Tensor:
    rank = x.dim() + len(axes)
    for axis in sorted(positive(axis, rank) for axis in axes):
        x = x.unsqueeze(axis)
    return x


@operator("squeeze")
def squeeze(x: Tensor, axes: list[int] | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(tuple(axes))


@operator("transpose")
def transpose(x: Tensor, perm: list[int]) -> Tensor:
    return x.permute(perm)


@operator("flatten2d")
def flatten2d(x: Tensor, axis: int = 1) -> Tensor:
    sizes = list(x.shape)
    return x.reshape(math.prod(sizes[:axis]), math.prod(sizes[axis:]))


@operator("shape")
def shape_of(x: Tensor) -> Tensor:
    return torch.tensor(list(x.shape), dtype=torch.int32)


@operator("tile")
def tile(x: Tensor, reps: list[int]) -> Tensor:
    return x.repeat(reps)


@operator("concat")
def concat(values: list[Tensor], axis: int, interleave: bool = False) -> Tensor:
    if values[0].dim() == 0:
        return torch.stack(values)
    if interleave:
        place = positive(axis, values[0].dim())
        return torch.stack(values, place + 1).flatten(place, place + 1)
    return torch.cat(values, axis)


@operator("split")
def split(
    x: Tensor, axis: int, num_splits: int | None = None, split_sizes: list[int] | None = None
) -> Tensor | tuple[Tensor, ...]:
    if split_sizes is None:
        if not num_splits or x.shape[axis] % num_splits:
            msg = f"num_splits must divide {x.shape[axis]}, got {num_splits}"
            raise ValueError(msg)
        split_sizes = [x.shape[axis] // num_splits] * num_splits
    parts = torch.split(x, split_sizes, axis)
    return parts[0] if len(parts) == 1 else parts


@operator("stack")
def stack(values: list[Tensor], axis: int) -> Tensor:
    return torch.stack(values, axis)


@operator("reverse")
def reverse(x: Tensor, axes: list[int] | None = None) -> Tensor:
    return x.flip(list(range(x.dim())) if axes is None else axes)


@operator("reverse_sequence")
def reverse_sequence(x: Tensor, lengths: Tensor, seq_axis: int = 0, batch_axis: int = 0) -> Tensor:
    along = positive(seq_axis, x.dim())
    steps = torch.arange(x.shape[along]).reshape([-1] + [1] * (x.dim() - 1 - along))
    ends = lengths.long().reshape([-1] + [1] * (x.dim() - 1 - positive(batch_axis, x.dim())))
    taken = torch.where(steps < ends, ends - 1 - steps, steps)
    return torch.gather(x, along, taken.expand(x.shape))


def _apart(x: Tensor, block: Sequence[int]) -> Tensor:
    """Cut height and width into blocks: (n, c, h, rows, w, columns)."""
    n, c, height, width = x.shape
    rows, columns = block
    return x.reshape(n, c, height // rows, rows, width // columns, columns)


@operator("depth_to_space")
def depth_to_space(x: Tensor, block_size: int) -> Tensor:
    # A place in the block is the major part of the channel; in pixel_shuffle, it is the minor one.
    n, c, height, width = x.shape
    c //= block_size**2
    blocks = x.reshape(n, block_size, block_size, c, height, width).permute(0, 3, 4, 1, 5, 2)
    return blocks.reshape(n, c, height * block_size, width * block_size)


@operator("space_to_depth")
def space_to_depth(x: Tensor, block_size: int) -> Tensor:
    n, c, height, width = x.shape
    blocks = _apart(x, (block_size, block_size)).permute(0, 3, 5, 1, 2, 4)
    return blocks.reshape(n, c * block_size**2, height // block_size, width // block_size)


@operator("pixel_shuffle")
def pixel_shuffle(x: Tensor, upscale_factor: int) -> Tensor:
    return functional.pixel_shuffle(x, upscale_factor)


@operator("pixel_unshuffle", since=6)
def pixel_unshuffle(x: Tensor, downscale_factor: int) -> Tensor:
    return functional.pixel_unshuffle(x, downscale_factor)


@operator("space_to_batch")
def space_to_batch(x: Tensor, block_shape: list[int], paddings: list[int]) -> Tensor:
    top, bottom, left, right = paddings
    x = functional.pad(x, (left, right, top, bottom))
    blocks = _apart(x, block_shape).permute(3, 5, 0, 1, 2, 4)
    return blocks.flatten(0, 2)


@operator("batch_to_space")
def batch_to_space(x: Tensor, block_shape: list[int], crops: list[int]) -> Tensor:
    rows, columns = block_shape
    top, bottom, left, right = crops
    blocks = x.reshape(rows, columns, -1, *x.shape[1:]).permute(2, 3, 4, 0, 5, 1)
    whole = blocks.flatten(4, 5).flatten(2, 3)
    return whole[..., top : whole.shape[-2] - bottom, left : whole.shape[-1] - right]


@operator("sliding_windows")
def sliding_windows(x: Tensor, axis: int, size: int, stride: int = 1) -> Tensor:
    place = positive(axis, x.dim())
    return x.unfold(place, size, stride).movedim(-1, place + 1)


@operator("pad")
def pad(x: Tensor, pad: list[int], mode: str = "constant", constant_val: float = 0.0) -> Tensor:
    check_choice("mode", mode, "constant", "reflect", "replicate")
    pairs = [pad[i : i + 2] for i in range(0, len(pad), 2)]
    if mode == "constant":
        return padded(x, pairs, constant_val)
    for axis, (before, after) in enumerate(pairs, x.dim() - len(pairs)):
        if before or after:
            last = x.shape[axis] - 1
            places = torch.arange(-before, last + 1 + after)
            if mode == "reflect":
                places = last - (last - places.abs()).abs()
            x = x.index_select(axis, places.clamp(0, last))
    return x


@operator("band_part")
def band_part(x: Tensor, lower: int = -1, upper: int = -1) -> Tensor:
    if lower >= 0:
        x = x.triu(-lower)
    return x if upper < 0 else x.tril(upper)


@operator("fill")
def fill(shape: list[int], value: float = 0.0, *, call: Call) -> Tensor:
    return torch.full(shape, value, dtype=call.dtype)


@operator("fill_like", since=6)
def fill_like(ref_tensor: Tensor, value: float = 0.0, *, call: Call) -> Tensor:
    return torch.full(list(ref_tensor.shape), value, dtype=call.dtype)


@operator("range_1d")
def range_1d(end: float, start: float, step: float, *, call: Call) -> Tensor:
    return torch.arange(start, end, step, dtype=call.dtype)


@operator("one_hot")
def one_hot(
    indices: Tensor,
    one_hot_vector_size: int,
    axis: int = -1,
    on_value: float = 1,
    off_value: float = 0,
    *,
    call: Call,
) -> Tensor:
    place = positive(axis, indices.dim() + 1)
    classes = torch.arange(one_hot_vector_size).reshape([-1] + [1] * (indices.dim() - place))
    hot = indices.unsqueeze(place) == classes
    return torch.where(hot, on_value, off_value).to(call.dtype or torch.float32)


@operator("crop")
def crop(x: Tensor, crop_height: list[int], crop_width: list[int]) -> Tensor:
    (top, bottom), (left, right) = crop_height, crop_width
    return x[..., top : x.shape[-2] - bottom, left : x.shape[-1] - right]
