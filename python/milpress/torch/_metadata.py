"""What a module says of its compressed weights: buffers that ``ct.convert`` reads.

The buffers of a parameter are named ``_COREML_/<parameter>/<key>``. They hold tables and scales;
the codes are in the weight itself, each element of which is just what its code stands for. `read`
looks them up again, and checks that nothing is lost.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from milpress.errors import UnsupportedError
from milpress.formats import (
    Compressed,
    Masked,
    Palette,
    PruneConfig,
    Quantized,
    Sparse,
    sparsify,
)
from milpress.formats.joint import masked
from milpress.formats.order import ascending
from milpress.formats.palette import Bits, fold, reassigned
from milpress.formats.rows import Floats, as_float, from_rows, normalized_axis, to_rows
from milpress.torch._module_weights import ModuleWeight, representable, whole
from milpress.torch.registration import RECURRENT

PREFIX = "_COREML_"
# ``ct.convert`` fails on compressed weights of recurrent layers; it does not look at these buffers.
OWN_PREFIX = "_MILPRESS_"

PRUNING, PALETTIZATION, QUANTIZATION = 1, 2, 3

_CHUNK = 4096  # vectors compared with a table at a time


@dataclass(frozen=True, slots=True)
class Stored:
    """What Core ML is to hold for a weight.

    Parameters
    ----------
    value
        The weight, or the weight divided by ``scale``.
    scale
        A scale for each output channel, of the weight's rank.
    """

    value: Compressed
    scale: Floats | None = None

    def dense(self) -> Floats:
        """Return the weight."""
        dense = self.value.dense()
        return dense if self.scale is None else dense * self.scale

    def folded(self) -> Compressed:
        """Return the value with its channel scales in its tables, as milpress stores them."""
        value, scale = self.value, self.scale
        if scale is None:
            return value
        output = next((i for i, n in enumerate(scale.shape) if n > 1), 0)
        if isinstance(value, Masked):
            return replace(value, value=fold(cast("Palette", value.value), scale, output))
        return fold(cast("Palette", value), scale, output)

    @property
    def n_bytes(self) -> int:
        """Size of what is stored, in the weight's own precision."""
        value = self.value
        if isinstance(value, Masked):
            n_dropped = value.value.codes.size - int(value.code_mask().sum())
            n_bits = value.value.n_payload_bits - n_dropped * value.value.bits
            n_bits += value.value.codes.size
        else:
            n_bits = value.n_payload_bits
        return math.ceil(n_bits / 8) + (0 if self.scale is None else self.scale.nbytes)


def register(weight: ModuleWeight, stored: Stored) -> None:
    """Put what was done to a weight into buffers of its module, after what they say already."""
    value = stored.value.value if isinstance(stored.value, Masked) else stored.value
    quantized = value.lut if isinstance(value, Palette) else value
    entries: dict[str, Any] = {}
    types = _types(weight)
    if isinstance(stored.value, (Masked, Sparse)) and PRUNING not in types:
        types = [PRUNING, *types]
    if isinstance(value, Palette):
        types = [*types, PALETTIZATION]
        entries["lut"] = value.entries
        if value.vector_axis is not None:
            entries["vector_axis"] = value.vector_axis
        if stored.scale is not None:
            entries["palettization_scale"] = stored.scale
    if isinstance(quantized, Quantized):
        types = [*types, QUANTIZATION]
        entries["quantization_n_bits"] = quantized.bits
        entries["quantization_scale"] = quantized.scale
        if quantized.offset is not None:
            entries["zero_point"] = quantized.offset
    entries["compression_type"] = types
    for key, content in entries.items():
        name = f"{prefix_of(weight.module)}/{weight.parameter_name}/{key}"
        weight.module.register_buffer(name, torch.tensor(content, device=_device_of(weight)))


def register_pruning(weight: ModuleWeight) -> None:
    """Say that a weight was pruned, before whatever else its buffers say."""
    types = [PRUNING, *(kind for kind in _types(weight) if kind != PRUNING)]
    name = f"{prefix_of(weight.module)}/{weight.parameter_name}/compression_type"
    weight.module.register_buffer(name, torch.tensor(types, device=_device_of(weight)))


def _device_of(weight: ModuleWeight) -> torch.device | None:
    """Return where the buffers of a weight belong: where it is."""
    return None if weight.tensor is None else weight.tensor.device


def register_version(model: nn.Module) -> None:
    """Say which version of the protocol the buffers of a model follow."""
    model.register_buffer(f"{PREFIX}/metadata_version", torch.tensor(1))


def prefix_of(module: nn.Module) -> str:
    """Return what the names of a module's buffers begin with."""
    return OWN_PREFIX if isinstance(module, RECURRENT) else PREFIX


def is_pruned(weight: ModuleWeight) -> bool:
    """Whether a weight was pruned, so that its zeros have to stay."""
    return PRUNING in _types(weight)


def is_coded(weight: ModuleWeight) -> bool:
    """Whether a weight was palettized or quantized."""
    return bool({PALETTIZATION, QUANTIZATION} & set(_types(weight)))


def compressed_parameters(module: nn.Module) -> list[str]:
    """Return the names of the parameters of a module that its buffers speak of."""
    names: dict[str, None] = {}
    for name, _ in module.named_buffers(recurse=False):
        prefix, _, rest = name.partition("/")
        if prefix in (PREFIX, OWN_PREFIX) and "/" in rest:
            names[rest.rpartition("/")[0]] = None
    return list(names)


def _buffers(weight: ModuleWeight) -> dict[str, NDArray[Any]]:
    buffers: dict[str, NDArray[Any]] = {}
    for prefix in (PREFIX, OWN_PREFIX):
        start = f"{prefix}/{weight.parameter_name}/"
        for name, buffer in weight.module.named_buffers(recurse=False):
            if name.startswith(start):
                tensor = buffer.detach().cpu()
                tensor = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
                buffers[name.removeprefix(start)] = tensor.numpy()
    return buffers


def _types(weight: ModuleWeight) -> list[int]:
    types = _buffers(weight).get("compression_type")
    return [] if types is None else [int(item) for item in types.reshape(-1)]


def read(weight: ModuleWeight) -> Stored:
    """Return what the buffers of a module say of a weight.

    Raises
    ------
    UnsupportedError
        If they say nothing that Core ML can hold, or the weight is another than they describe.
    """
    if weight.tensor is None:
        msg = "the module computes its weight, a parameter is expected"
        raise UnsupportedError(msg)
    array = as_float(whole(weight.tensor))
    buffers = _buffers(weight)
    types = _types(weight)
    value: Compressed
    scale = None
    if PALETTIZATION in types:
        value, scale = _palette(array, buffers, weight)
    elif QUANTIZATION in types:
        value = _quantized(array, buffers)
    elif PRUNING in types:
        return Stored(sparsify(array, PruneConfig(threshold=0.0)))
    else:
        msg = f"a compression type must be 1, 2 or 3, got {types}"
        raise UnsupportedError(msg)
    if PRUNING in types and not (isinstance(value, Palette) and value.vector_size > 1):
        value = masked(value, array != 0)
    stored = Stored(value, scale)
    decoded = torch.from_numpy(stored.dense()).to(weight.tensor.dtype)
    n_changed = int((decoded != whole(weight.tensor)).sum())
    if n_changed:
        msg = (
            "a compressed weight must be as it was when it was compressed, "
            f"got {n_changed} other elements"
        )
        raise UnsupportedError(msg)
    return stored


def _palette(
    array: Floats, buffers: dict[str, NDArray[Any]], weight: ModuleWeight
) -> tuple[Palette, Floats | None]:
    lut = buffers["lut"].astype(array.dtype)
    if lut.ndim == array.ndim + 1:
        lut = lut[..., None]
    if lut.shape[-1] == 1:
        lut = ascending(lut, axis=-2)
    bits = next((b for b in get_args(Bits) if 2**b >= lut.shape[-2]), None)
    if lut.ndim != array.ndim + 2 or bits is None:
        msg = (
            f"a lut must have {array.ndim + 2} dimensions and at most 256 entries, got {lut.shape}"
        )
        raise UnsupportedError(msg)
    missing = 2**bits - lut.shape[-2]
    lut = np.pad(lut, [(0, 0)] * array.ndim + [(0, missing), (0, 0)], "edge")
    size = lut.shape[-1]
    axis = None
    if size > 1:
        axis = normalized_axis(int(buffers.get("vector_axis", np.int64(0))), array.ndim)
    shape = tuple(n // size if i == axis else n for i, n in enumerate(array.shape))
    palette = Palette(codes=np.zeros(shape, np.uint8), lut=lut, bits=bits, vector_axis=axis)
    scale = buffers.get("palettization_scale")
    searched = palette
    if scale is not None:
        scale = scale.reshape(*scale.shape, *[1] * (array.ndim - scale.ndim)).astype(array.dtype)
        output = next((i for i, n in enumerate(scale.shape) if n > 1), weight.axes[0])
        searched = fold(palette, scale, output)
    searched = replace(searched, lut=representable(searched.entries, weight.dtype))
    stored_lut = _quantized(lut, buffers) if "quantization_scale" in buffers else lut
    return replace(palette, codes=nearest(searched, array).codes, lut=stored_lut), scale


def nearest(palette: Palette, array: Floats) -> Palette:
    """Return a palette whose indices name the entries that weights, or vectors, are nearest to."""
    size = palette.vector_size
    if size == 1:
        return reassigned(palette, array)
    vectors = palette.vector_rows(array)
    vectors = vectors.reshape(len(vectors), -1, size)
    tables = palette.entries.reshape(len(vectors), -1, size)
    codes = np.empty(vectors.shape[:2], np.uint8)
    for group, (rows, table) in enumerate(zip(vectors, tables, strict=True)):
        for start in range(0, len(rows), _CHUNK):
            part = rows[start : start + _CHUNK, None, :].astype(np.float32) - table
            codes[group, start : start + _CHUNK] = np.square(part).sum(axis=-1).argmin(axis=-1)
    return replace(palette, codes=from_rows(codes, palette.codes.shape, palette.group_shape))


def _quantized(array: Floats, buffers: dict[str, NDArray[Any]]) -> Quantized:
    bits = int(buffers["quantization_n_bits"])
    if bits not in (4, 8):
        msg = f"quantized weights must have 4 or 8 bits, got {bits}"
        raise UnsupportedError(msg)
    rank = array.ndim
    scale = buffers["quantization_scale"].astype(array.dtype)
    scale = scale.reshape(*scale.shape, *[1] * (rank - scale.ndim))
    offset = buffers.get("zero_point")
    unsigned = offset is not None and offset.dtype == np.uint8
    kind: Any = np.uint8 if unsigned else np.int8
    if offset is not None:
        offset = offset.reshape(scale.shape).astype(kind)
    blank = np.zeros(array.shape, kind)
    value = Quantized(codes=blank, scale=scale, offset=offset, bits=bits)
    block_shape = value.block_shape
    rows = to_rows(array, block_shape).astype(np.float32)
    divisor = scale.reshape(-1, 1).astype(np.float32)
    divisor = np.where(divisor == 0, np.float32(1), divisor)
    steps = np.rint(rows / divisor)
    if offset is not None:
        steps += offset.reshape(-1, 1)
    lowest = 0 if unsigned else -(2 ** (bits - 1))
    codes = steps.clip(lowest, lowest + 2**bits - 1).astype(kind)
    return replace(value, codes=from_rows(codes, array.shape, block_shape))
