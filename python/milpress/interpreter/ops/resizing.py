"""Resizing, cropping and warping of images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from milpress.interpreter.operator import operator
from milpress.interpreter.ops.torch_types import check_choice, real

_SAMPLING_MODES = (
    "DEFAULT",
    "STRICT_ALIGN_CORNERS",
    "ALIGN_CORNERS",
    "OFFSET_CORNERS",
    "UNALIGN_CORNERS",
)


def _grid(first: Tensor, last: Tensor, count: int, mode: str) -> Tensor:
    """Return ``count`` places from the first to the last pixel of each interval, as a new axis."""
    if mode not in _SAMPLING_MODES:
        msg = f"sampling_mode must be one of {', '.join(_SAMPLING_MODES)}, got {mode}"
        raise ValueError(msg)
    first, last = first.double().unsqueeze(-1), last.double().unsqueeze(-1)
    steps = torch.arange(count, dtype=torch.float64)
    if mode in ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS"):
        if count == 1:
            return (first + last) / 2 if mode == "ALIGN_CORNERS" else first
        share = steps / (count - 1)
        return first * (1 - share) + last * share
    length = last - first
    if mode == "DEFAULT":
        grid = first + steps * (length + 1) / count
    elif mode == "OFFSET_CORNERS":
        grid = first + (steps + 0.5) * length.clamp(min=1) / count
    else:
        grid = first + (steps + 0.5) * (length + 1) / count - 0.5
    return grid.clamp(torch.minimum(first, last), torch.maximum(first, last))


def _places(size: int, count: int, mode: str) -> Tensor:
    return _grid(torch.tensor(0), torch.tensor(size - 1), count, mode)


def _linear(x: Tensor, axis: int, places: Tensor) -> Tensor:
    low = places.long()
    high = (low + 1).clamp(max=x.shape[axis] - 1)
    share = (places - low).to(x.dtype).reshape([-1] + [1] * (x.dim() - axis - 1))
    return torch.lerp(x.index_select(axis, low), x.index_select(axis, high), share)


def _resized(x: Tensor, sizes: list[int], mode: str) -> Tensor:
    """Return ``x`` with its last axes resized, each by linear interpolation."""
    x = real(x)
    for axis, size in enumerate(sizes, x.dim() - len(sizes)):
        if size != x.shape[axis] or mode == "OFFSET_CORNERS":
            x = _linear(x, axis, _places(x.shape[axis], size, mode))
    return x


def _nearest(x: Tensor, sizes: list[int], mode: str) -> Tensor:
    # Core ML takes the pixel in whose area the new one's center lies where the mode is DEFAULT.
    mode = "UNALIGN_CORNERS" if mode == "DEFAULT" else mode
    for axis, size in enumerate(sizes, x.dim() - len(sizes)):
        places = _places(x.shape[axis], size, mode) + 0.5
        x = x.index_select(axis, places.long())
    return x


def _grown(x: Tensor, height_factor: float, width_factor: float) -> list[int]:
    # In float32, in which the factors are stored: 2.6 of 5 pixels are 13, not 12.
    factors = (height_factor, width_factor)
    sizes = zip(x.shape[-2:], factors, strict=True)
    return [int(np.float32(size) * np.float32(factor)) for size, factor in sizes]


@operator("resize_bilinear")
def resize_bilinear(
    x: Tensor,
    target_size_height: int = 1,
    target_size_width: int = 1,
    sampling_mode: str = "DEFAULT",
) -> Tensor:
    return _resized(x, [target_size_height, target_size_width], sampling_mode)


@operator("resize_nearest_neighbor")
def resize_nearest_neighbor(x: Tensor, target_size_height: int, target_size_width: int) -> Tensor:
    return _nearest(x, [target_size_height, target_size_width], "DEFAULT")


@operator("resize", since=7)
def resize(
    x: Tensor,
    shape: list[int],
    resized_dims: int,
    interpolation_mode: str = "LINEAR",
    sampling_mode: str = "DEFAULT",
) -> Tensor:
    check_choice("interpolation_mode", interpolation_mode, "LINEAR", "NEAREST_NEIGHBOR")
    first = x.dim() - resized_dims
    wanted = shape[len(shape) - resized_dims :]
    sizes = [size or x.shape[first + i] for i, size in enumerate(wanted)]
    return (_resized if interpolation_mode == "LINEAR" else _nearest)(x, sizes, sampling_mode)


@operator("upsample_nearest_neighbor")
def upsample_nearest_neighbor(
    x: Tensor, scale_factor_height: float = 1, scale_factor_width: float = 1
) -> Tensor:
    for axis, count in enumerate(_grown(x, scale_factor_height, scale_factor_width), -2):
        x = x.index_select(axis, torch.arange(count) * x.shape[axis] // count)
    return x


@operator("upsample_bilinear", added={6: ("half_pixel_centers",)})
def upsample_bilinear(
    x: Tensor,
    scale_factor_height: float = 1,
    scale_factor_width: float = 1,
    align_corners: bool = True,
    half_pixel_centers: bool | None = None,
) -> Tensor:
    if align_corners:
        mode = "STRICT_ALIGN_CORNERS"
    else:
        mode = "DEFAULT" if half_pixel_centers is False else "UNALIGN_CORNERS"
    return _resized(x, _grown(x, scale_factor_height, scale_factor_width), mode)


def _bilinear(x: Tensor, y_places: Tensor, x_places: Tensor, outside: float | None) -> Tensor:
    """Return images at places between pixels; ``outside`` is what surrounds the images."""
    top, left = y_places.floor(), x_places.floor()
    total = torch.zeros(())
    for row, y_share in ((top, 1 - (y_places - top)), (top + 1, y_places - top)):
        for column, x_share in ((left, 1 - (x_places - left)), (left + 1, x_places - left)):
            pixels = _pixels(x, row, column, outside)
            total = total + pixels * (y_share * x_share).unsqueeze(1).to(x.dtype)
    return total


def _pixels(x: Tensor, rows: Tensor, columns: Tensor, outside: float | None) -> Tensor:
    """Return the pixels of images (n, c, h, w) at whole places (n, rows, columns)."""
    n, c, height, width = x.shape
    near_rows, near_columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    flat = near_rows.long() * width + near_columns.long()
    pixels = x.flatten(2).gather(2, flat.reshape(n, 1, -1).expand(n, c, -1))
    pixels = pixels.reshape(n, c, *rows.shape[1:])
    if outside is None:
        return pixels
    inside = (near_rows == rows) & (near_columns == columns)
    return torch.where(inside.unsqueeze(1), pixels, outside)


def _reflected(places: Tensor, least: float, greatest: float) -> Tensor:
    span = greatest - least
    if span <= 0:
        return torch.zeros_like(places)
    return greatest - (torch.remainder(places - least, 2 * span) - span).abs()


def _in_pixels(x: Tensor, coordinates: Tensor, mode: str, align_corners: bool) -> Sequence[Tensor]:
    """Return coordinates, of which that along the width comes first, as rows and columns."""
    mode = mode.lower()
    modes = ("unnormalized", "normalized_minus_one_to_one", "normalized_zero_to_one")
    check_choice("coordinates_mode", mode, *modes)
    if mode == "normalized_minus_one_to_one":
        coordinates = (coordinates + 1) / 2
    places = coordinates.flip(-1).unbind(-1)
    if mode == "unnormalized":
        return places
    return [
        each * (size - 1) if align_corners else each * size - 0.5
        for each, size in zip(places, x.shape[-2:], strict=True)
    ]


def _brought_inside(places: Tensor, size: int, padding_mode: str) -> Tensor:
    """Return places along an axis for those that padding looks up; a constant looks up none."""
    if padding_mode == "border":
        return places.clamp(0, size - 1)
    if padding_mode == "reflection":
        return _reflected(places, 0, size - 1)
    if padding_mode == "symmetric":
        return _reflected(places, -0.5, size - 0.5).clamp(0, size - 1)
    return places


def _resampled(
    x: Tensor, places: Sequence[Tensor], sampling_mode: str, padding_mode: str, padding_value: float
) -> Tensor:
    sampling_mode, padding_mode = sampling_mode.lower(), padding_mode.lower()
    check_choice("padding_mode", padding_mode, "constant", "border", "reflection", "symmetric")
    check_choice("sampling_mode", sampling_mode, "bilinear", "nearest")
    rows, columns = (
        _brought_inside(each, size, padding_mode)
        for each, size in zip(places, x.shape[-2:], strict=True)
    )
    outside = padding_value if padding_mode == "constant" else None
    if sampling_mode == "bilinear":
        return _bilinear(x, rows, columns, outside)
    return _pixels(x, rows.round(), columns.round(), outside)


@operator("resample")
def resample(
    x: Tensor,
    coordinates: Tensor,
    sampling_mode: str,
    padding_mode: str,
    padding_value: float,
    coordinates_mode: str,
    align_corners: bool,
) -> Tensor:
    places = _in_pixels(x, coordinates.double(), coordinates_mode, align_corners)
    return _resampled(x, places, sampling_mode, padding_mode, padding_value)


@operator("affine")
def affine(
    x: Tensor,
    transform_matrix: Tensor,
    output_height: int,
    output_width: int,
    sampling_mode: str,
    padding_mode: str,
    padding_value: float,
    coordinates_mode: str,
    align_corners: bool,
) -> Tensor:
    n, c = x.shape[:2]
    matrices = transform_matrix.reshape(-1, 2, 3).expand(n, 2, 3)
    shape = [n, c, output_height, output_width]
    grid = functional.affine_grid(matrices, shape, align_corners)
    places = _in_pixels(x, grid, coordinates_mode, align_corners)
    return _resampled(x, places, sampling_mode, padding_mode, padding_value)


def _edges(
    x: Tensor, boxes: Tensor, mode: str, normalized: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the first and last row, and the first and last column of boxes (n, 4) in images."""
    first, second, third, fourth = (boxes.double() * scale).unbind(-1)
    if mode.startswith("CENTER_SIZE"):
        first, third = first - third / 2, first + third / 2
        second, fourth = second - fourth / 2, second + fourth / 2
    if mode in ("CORNERS_HEIGHT_FIRST", "CENTER_SIZE_HEIGHT_FIRST"):
        top, left, bottom, right = first, second, third, fourth
    elif mode in ("CORNERS_WIDTH_FIRST", "CENTER_SIZE_WIDTH_FIRST"):
        left, top, right, bottom = first, second, third, fourth
    else:
        msg = f"box_coordinate_mode must be one of CORNERS or CENTER_SIZE modes, got {mode}"
        raise ValueError(msg)
    if normalized:
        height, width = x.shape[-2:]
        top, bottom = top * (height - 1), bottom * (height - 1)
        left, right = left * (width - 1), right * (width - 1)
    return top, bottom, left, right


@operator("crop_resize", since=7)
def crop_resize_boxes(
    x: Tensor,
    boxes: Tensor,
    box_indices: Tensor | None = None,
    target_height: int = 1,
    target_width: int = 1,
    normalized_coordinates: bool = False,
    spatial_scale: float = 1.0,
    box_coordinate_mode: str = "CORNERS_HEIGHT_FIRST",
    sampling_mode: str = "DEFAULT",
    pad_value: float = 0.0,
) -> Tensor:
    height, width = x.shape[-2:]
    places = torch.arange(boxes.shape[0]) if box_indices is None else box_indices.long()
    images = x.index_select(0, places)
    top, bottom, left, right = _edges(
        x, boxes, box_coordinate_mode, normalized_coordinates, spatial_scale
    )
    rows = _grid(top, bottom, target_height, sampling_mode).unsqueeze(-1)
    columns = _grid(left, right, target_width, sampling_mode).unsqueeze(-2)
    shape = (len(images), target_height, target_width)
    rows, columns = rows.expand(shape), columns.expand(shape)
    near_rows, near_columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    # A pixel whose place lies outside of the image is padding.
    inside = (near_rows == rows) & (near_columns == columns)
    pixels = _bilinear(images, near_rows, near_columns, None)
    return torch.where(inside.unsqueeze(1), pixels, pad_value)


@operator("crop_resize", added={6: ("pad_value",)})
def crop_resize(
    x: Tensor,
    roi: Tensor,
    target_height: int = 1,
    target_width: int = 1,
    normalized_coordinates: bool = False,
    spatial_scale: float = 1.0,
    box_coordinate_mode: str = "CORNERS_HEIGHT_FIRST",
    sampling_mode: str = "DEFAULT",
    pad_value: float = 0.0,
) -> Tensor:
    n = roi.shape[0]
    regions = roi.reshape(n, -1)
    if regions.shape[1] == 5:  # the first is which image
        images, per_box = regions[:, 0], 1
    else:
        images, per_box = torch.arange(x.shape[0]).repeat(n), x.shape[0]
    crops: Tensor = crop_resize_boxes.function(
        x,
        regions[:, -4:].repeat_interleave(per_box, 0),
        images,
        target_height,
        target_width,
        normalized_coordinates,
        spatial_scale,
        box_coordinate_mode,
        sampling_mode,
        pad_value,
    )
    return crops.reshape(n, per_box, *crops.shape[1:])
