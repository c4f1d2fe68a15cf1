"""Linear quantization: integer codes with a scale, and perhaps an offset, for each block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

import milpress._core as _core
from milpress.errors import ConfigError
from milpress.formats.rows import (
    Floats,
    as_float,
    block_grid,
    check_finite,
    checked_importance,
    from_rows,
    frozen,
    normalized_axis,
    to_rows,
)
from milpress.kernels.device import Placement, kernels_for

IntDType = Literal["int8", "uint8", "int4", "uint4"]


@dataclass(frozen=True, slots=True)
class PerTensor:
    """One scale for the whole weight."""


@dataclass(frozen=True, slots=True)
class PerChannel:
    """One scale for each output channel."""


@dataclass(frozen=True, slots=True)
class PerBlock:
    """One scale for each run of ``size`` input channels of an output channel."""

    size: int

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or self.size < 1:
            msg = f"block_size must be at least 1, got {self.size}"
            raise ConfigError(msg)


@dataclass(frozen=True, slots=True)
class Blocks:
    """One scale for each block of this shape, one number an axis; 0 takes the whole axis."""

    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if any(isinstance(size, bool) or size < 0 for size in self.shape):
            msg = f"a block's shape must hold no negative numbers, got {self.shape}"
            raise ConfigError(msg)


Granularity: TypeAlias = PerTensor | PerChannel | PerBlock | Blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeConfig:
    """How to replace a weight by integer codes.

    Parameters
    ----------
    dtype
        Type of a code.
    granularity
        Which weights share a scale.
    offset
        Whether a block's range runs from its least to its greatest weight, with the code of zero as
        offset, instead of being symmetric about zero.
    range
        ``"minmax"`` holds every weight of a block; ``"mse"`` clips it where that lowers the squared
        error, and lets a symmetric scale be negative so that the least code is used too.
    """

    dtype: IntDType = "int8"
    granularity: Granularity = PerChannel()
    offset: bool = False
    range: Literal["minmax", "mse"] = "minmax"

    def __post_init__(self) -> None:
        if self.dtype not in get_args(IntDType):
            msg = f"dtype must be one of {get_args(IntDType)}, got {self.dtype!r}"
            raise ConfigError(msg)
        if not isinstance(self.granularity, get_args(Granularity)):
            msg = (
                "granularity must be PerTensor, PerChannel, PerBlock or Blocks, "
                f"got {self.granularity!r}"
            )
            raise ConfigError(msg)
        if self.offset not in (True, False):
            msg = f"offset must be true or false, got {self.offset!r}"
            raise ConfigError(msg)
        if self.range not in ("minmax", "mse"):
            msg = f"range must be 'minmax' or 'mse', got {self.range!r}"
            raise ConfigError(msg)

    @property
    def bits(self) -> int:
        """Width of a code."""
        return 4 if self.dtype.endswith("4") else 8

    @property
    def signed(self) -> bool:
        """Whether codes are signed."""
        return not self.dtype.startswith("u")

    @property
    def code_range(self) -> tuple[int, int]:
        """Least and greatest code; those of a block's whole range are as coremltools chooses."""
        n_codes = 2**self.bits
        least = -n_codes // 2 if self.signed else 0
        if self.offset or (self.signed and self.range == "mse"):
            return least, least + n_codes - 1
        return (least + 1, -least - 1) if self.signed else (0, n_codes - 2)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Quantized:
    """A weight as integer codes: ``scale * (code - offset)``.

    Parameters
    ----------
    codes
        int8 or uint8, of the weight's shape, also for codes of 4 bits.
    scale
        float16 or float32, of the weight's rank: the number of blocks along each axis.
    offset
        Like ``scale``, of the type of ``codes``; ``None`` for zero.
    bits
        Width of a code, 4 or 8.
    """

    codes: NDArray[Any]
    scale: Floats
    offset: NDArray[Any] | None
    bits: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense weight."""
        return self.codes.shape

    @property
    def dtype(self) -> str:
        """Type of a code."""
        return f"{'int' if self.codes.dtype == np.int8 else 'uint'}{self.bits}"

    @property
    def block_shape(self) -> tuple[int, ...]:
        """Weights along each axis that share a scale."""
        return tuple(n // m for n, m in zip(self.codes.shape, self.scale.shape, strict=True))

    @property
    def n_payload_bits(self) -> int:
        """Bits that codes, scales and offsets take when stored."""
        n_offsets = 0 if self.offset is None else self.offset.size
        scale_bits = self.scale.size * self.scale.itemsize * 8
        return (self.codes.size + n_offsets) * self.bits + scale_bits

    def rows(self) -> tuple[NDArray[Any], Floats, NDArray[Any] | None]:
        """Return codes, scales and offsets as the rows that kernels take, one a block."""
        offsets = None if self.offset is None else self.offset.reshape(-1)
        return to_rows(self.codes, self.block_shape), self.scale.reshape(-1), offsets

    def dense(self) -> Floats:
        """Return the weight, rounded once to the type of ``scale``."""
        return from_rows(_core.dequantize(*self.rows()), self.shape, self.block_shape)


def quantize(
    weight: Any,
    config: QuantizeConfig | None = None,
    *,
    channel_axis: int = 0,
    input_axis: int = 1,
    importance: Any = None,
    device: Placement = None,
) -> Quantized:
    """Replace a weight by integer codes with a scale for each block.

    Rounds as coremltools 9.0 does, in the weight's own precision, wherever that keeps every weight
    within half a step; elsewhere (values beyond half the largest float16, scales below its
    smallest) in float32.

    Parameters
    ----------
    weight
        float16, bfloat16 or float32 array or torch CPU tensor.
    config
        How; by default int8 with a scale for each output channel.
    channel_axis, input_axis
        Axes of the output and input channels.
    importance
        Weight of each element in the squared error that ``range="mse"`` makes least, of the same
        shape; ``None`` for equal weight. The whole range of a block does not depend on it.
    device
        Where the kernels run: ``"cpu"``, ``"metal"`` or ``"auto"``; ``None`` for that of the
        workflow around, else the CPU. The result is the same.

    Raises
    ------
    ConfigError
        If a block does not divide the weight, or the importance does not suit it.
    UnsupportedError
        If the weight is of another type, or not finite.

    Examples
    --------
    >>> value = quantize(np.float32([[-127, 1], [254, 2]]))
    >>> value.codes
    array([[-127,    1],
           [ 127,    1]], dtype=int8)
    >>> value.scale
    array([[1.],
           [2.]], dtype=float32)
    """
    config = config or QuantizeConfig()
    array = as_float(weight)
    block_shape = _block_shape(array.shape, config.granularity, channel_axis, input_axis)
    grid = block_grid(array.shape, block_shape)
    rows = to_rows(array, block_shape)
    dispatch = kernels_for(device).dispatch
    share = None if importance is None else checked_importance(importance, array.shape)
    settings = (*config.code_range, config.offset)
    if config.range == "minmax":
        codes, scales, offsets = dispatch(_core.quantize)(rows, *settings)
    else:
        shares = None if share is None else to_rows(share, block_shape)
        codes, scales, offsets = dispatch(_core.quantize_mse)(rows, shares, *settings)
    if not np.isfinite(scales).all():
        check_finite(array)
    if offsets is None and not config.signed:
        # The middle of the range stands for zero.
        offsets = np.full(scales.size, config.code_range[1] // 2, np.uint8)
    return Quantized(
        codes=frozen(from_rows(codes, array.shape, block_shape)),
        scale=frozen(scales.reshape(grid)),
        offset=None if offsets is None else frozen(offsets.reshape(grid)),
        bits=config.bits,
    )


def _block_shape(
    shape: tuple[int, ...], granularity: Granularity, channel_axis: int, input_axis: int
) -> tuple[int, ...]:
    blocks = list(shape)
    if isinstance(granularity, PerTensor):
        return tuple(blocks)
    if isinstance(granularity, Blocks):
        if len(granularity.shape) != len(shape):
            msg = f"a block must have {len(shape)} axes like the weight, got {granularity.shape}"
            raise ConfigError(msg)
        return tuple(size or whole for size, whole in zip(granularity.shape, shape, strict=True))
    blocks[normalized_axis(channel_axis, len(shape))] = 1
    if isinstance(granularity, PerBlock):
        axis = normalized_axis(input_axis, len(shape))
        if shape[axis] % granularity.size != 0:
            msg = f"block_size must divide the {shape[axis]} input channels, got {granularity.size}"
            raise ConfigError(msg)
        blocks[axis] = granularity.size
    return tuple(blocks)
