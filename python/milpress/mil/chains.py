"""The ``constexpr_*`` ops of a compressed value: their kinds, parameters and outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import milpress._core as _core
from milpress.formats import Compressed, Masked, Palette, Quantized, Sparse
from milpress.mil import dtypes, values
from milpress.mil.dtypes import DType
from milpress.mil.values import Tensor


@dataclass(frozen=True, slots=True)
class Output:
    """What an op makes for the next one: its place among the op's outputs, and its type."""

    index: int
    dtype: DType
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Stage:
    """An op of a chain: its parameters are stored, or outputs of the stage of that name."""

    kind: str
    role: str
    parameters: dict[str, Any]  # Tensor or (role, Output)
    outputs: tuple[Output, ...] = ()


def stages(value: Compressed, *, early: bool) -> list[Stage]:
    """Return the ops that decode a value, those that others build on first.

    Below CoreML8 (``early``) it is one op.
    """
    if isinstance(value, Masked):
        return _masked_stages(value)
    if isinstance(value, Quantized):
        if early:
            parameters = _early_parameters(value)
            return [Stage("constexpr_affine_dequantize", "", parameters)]
        return [Stage("constexpr_blockwise_shift_scale", "", _quantized_parameters(value))]
    if isinstance(value, Palette):
        if early:
            return [Stage("constexpr_lut_to_dense", "", _early_parameters(value))]
        before, lut = _lut(value)
        parameters = {"indices": _codes(value, value.codes), "lut": lut, **_vector_axis(value)}
        return [*before, Stage("constexpr_lut_to_dense", "", parameters)]
    if early:
        return [Stage("constexpr_sparse_to_dense", "", _early_parameters(value))]
    mask = Tensor(dtypes.by_name("uint1"), value.mask().view(np.uint8))
    parameters = {"mask": mask, "nonzero_data": values.of_array(value.nonzeros)}
    return [Stage("constexpr_sparse_to_dense", "", parameters)]


def _masked_stages(value: Masked) -> list[Stage]:
    inner = value.value
    uint1 = dtypes.by_name("uint1")
    mask = Tensor(uint1, value.code_mask().view(np.uint8))
    codes = _codes(inner, value.nonzero_codes())
    scale = inner.scale if isinstance(inner, Quantized) else inner.entries
    size = inner.vector_size if isinstance(inner, Palette) else 1
    kept = Output(0, uint1, inner.shape)
    nonzeros = Output(1, dtypes.of_array(scale), (codes.values.size * size,))
    if isinstance(inner, Palette):
        role = "nonzero_data_0_palettized"
        before, lut = _lut(inner, f"{role}_")
        parameters = {
            "indices_mask": mask,
            "indices_nonzero_data": codes,
            "lut": lut,
            **_vector_axis(inner),
        }
        stage = Stage("constexpr_lut_to_sparse", role, parameters, (kept, nonzeros))
        last: dict[str, Any] = {"mask": (role, kept), "nonzero_data": (role, nonzeros)}
        return [*before, stage, Stage("constexpr_sparse_to_dense", "", last)]
    role = "nonzero_data_0_quantized"
    quantized = _quantized_parameters(inner)
    del quantized["data"]
    parameters = {"data_mask": mask, "nonzero_data": codes, **quantized}
    stage = Stage("constexpr_sparse_blockwise_shift_scale", role, parameters, (kept, nonzeros))
    last = {"mask": mask, "nonzero_data": (role, nonzeros)}
    return [stage, Stage("constexpr_sparse_to_dense", "", last)]


def _codes(value: Palette | Quantized, codes: NDArray[Any]) -> Tensor:
    name = f"uint{value.bits}" if isinstance(value, Palette) else value.dtype
    return Tensor(dtypes.by_name(name), codes)


def _lut(value: Palette, prefix: str = "") -> tuple[list[Stage], Tensor | tuple[str, Output]]:
    """Return the stage that decodes a quantized table, if it is one, and the parameter."""
    lut = value.lut
    if not isinstance(lut, Quantized):
        return [], values.of_array(lut)
    role = f"{prefix}lut_0_quantized"
    output = Output(0, dtypes.of_array(lut.scale), lut.shape)
    parameters = _quantized_parameters(lut)
    stage = Stage("constexpr_blockwise_shift_scale", role, parameters, (output,))
    return [stage], (role, output)


def _vector_axis(value: Palette) -> dict[str, Tensor]:
    return (
        {}
        if value.vector_axis is None
        else {"vector_axis": values.of_array(np.int32(value.vector_axis))}
    )


def _quantized_parameters(value: Quantized) -> dict[str, Any]:
    parameters = {"data": _codes(value, value.codes), "scale": values.of_array(value.scale)}
    if value.offset is not None:
        parameters["offset"] = _codes(value, value.offset)
    return parameters


def _early_parameters(value: Palette | Quantized | Sparse) -> dict[str, Any]:
    if isinstance(value, Quantized):
        axes = [axis for axis, n in enumerate(value.scale.shape) if n > 1]
        axis = axes[0] if axes else 0
        zero_point = np.zeros(value.scale.shape, value.codes.dtype)
        if value.offset is not None:
            zero_point = value.offset
        return {
            "axis": values.of_array(np.int32(axis)),
            "quantized_data": values.of_array(value.codes),
            "scale": values.of_array(value.scale.squeeze()),
            "zero_point": values.of_array(zero_point.squeeze()),
        }
    shape = values.of_array(np.array(value.shape, np.uint32))
    if isinstance(value, Palette):
        # iOS16 has no indices of 3 bits.
        bits = 4 if value.bits == 3 else value.bits
        lut = value.entries.reshape(-1)
        lut = np.pad(lut, (0, 2**bits - lut.size), "edge")
        return {"indices": _packed(value.codes, bits), "lut": values.of_array(lut), "shape": shape}
    return {
        "mask": values.of_array(value.bitmask),
        "nonzero_data": values.of_array(value.nonzeros),
        "shape": shape,
    }


def _packed(codes: NDArray[np.uint8], bits: int) -> Tensor:
    return values.of_array(_core.pack(codes.reshape(-1), bits))
