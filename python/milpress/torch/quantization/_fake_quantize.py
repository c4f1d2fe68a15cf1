"""Layers that round values to integers and back while a model is trained."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import distributed, nn

from milpress.torch._lifecycle import QUANTIZATION, Fake, Final
from milpress.torch.quantization.quantization_config import (
    ModuleLinearQuantizerConfig,
    ObserverType,
    QuantizationScheme,
)

# How far a range follows one pass: `torch.ao` and coremltools have these.
_PACE = {ObserverType.moving_average_min_max: 0.01, ObserverType.ema_min_max: 0.1}
_EPS = float(torch.finfo(torch.float32).eps)


class RangeObserver(nn.Module):
    """Follows the least and greatest values of what passes.

    The shape of the range has ones for the axes that share one; it is ``()`` for one range.
    """

    min_val: torch.Tensor
    max_val: torch.Tensor
    eps: torch.Tensor

    def __init__(self, kind: ObserverType, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.kind = kind
        self.synchronize = True
        self.register_buffer("eps", torch.tensor([_EPS]))
        self.register_buffer("min_val", torch.full(shape, torch.inf))
        self.register_buffer("max_val", torch.full(shape, -torch.inf))

    @property
    def is_empty(self) -> bool:
        """Whether nothing has passed yet."""
        return bool((self.min_val > self.max_val).any())

    @torch.no_grad()
    def forward(self, values: torch.Tensor) -> None:
        """Follow values whose shape beyond that of the range is at odd axes of `blocked`."""
        if values.numel() == 0:
            return
        shape = self.min_val.shape
        axes = [axis for axis, size in enumerate(shape) if size == 1]  # none means all
        low = values.amin(dim=axes).reshape(shape).to(self.min_val)
        high = values.amax(dim=axes).reshape(shape).to(self.max_val)
        if self.synchronize and distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(low, distributed.ReduceOp.MIN)
            distributed.all_reduce(high, distributed.ReduceOp.MAX)
        if self.kind is ObserverType.min_max:
            self.min_val.copy_(torch.minimum(self.min_val, low))
            self.max_val.copy_(torch.maximum(self.max_val, high))
            return
        pace = _PACE[self.kind]
        for range_end, now in ((self.min_val, low), (self.max_val, high)):
            range_end.copy_(
                torch.where(range_end.isinf(), now, range_end + pace * (now - range_end))
            )


class FakeQuantize(Fake):
    """Rounds values to integers and back; gradients pass where nothing is clipped.

    Parameters
    ----------
    observer
        How its range follows the values.
    bits, signed
        The integers.
    scheme
        Whether the range is symmetric.
    shape
        Shape of the scale, broadcast to that of the values as `blocked` sees them.
    block_shape
        Elements along each axis that share a scale; ``None`` where ``shape`` broadcasts by itself.
    is_learnable
        Whether scales, and offsets if the range has them, are parameters to train.
    """

    purpose = QUANTIZATION

    fake_quant_enabled: torch.Tensor
    observer_enabled: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor

    def __init__(
        self,
        observer: ObserverType,
        *,
        bits: int,
        signed: bool,
        scheme: QuantizationScheme,
        shape: tuple[int, ...] = (),
        block_shape: tuple[int, ...] | None = None,
        is_learnable: bool = False,
    ) -> None:
        super().__init__()
        self.bits, self.signed = bits, signed
        self.quant_min = -(2 ** (bits - 1)) if signed else 0
        self.quant_max = self.quant_min + 2**bits - 1
        self.dtype = torch.qint8 if signed else torch.quint8
        self.scheme = scheme
        self.block_shape = block_shape
        self.is_learnable = is_learnable
        seen = shape if block_shape is None else tuple(n for size in shape for n in (size, 1))
        self.activation_post_process = RangeObserver(observer, seen)
        ones = torch.ones(shape or 1)
        middle = 0 if signed else 128 if bits == 8 else (self.quant_min + self.quant_max) // 2
        self.middle = middle
        self.register_buffer("fake_quant_enabled", torch.ones(1, dtype=torch.uint8))
        self.register_buffer("observer_enabled", torch.ones(1, dtype=torch.uint8))
        if is_learnable:
            self.scale = nn.Parameter(ones)
            offset = torch.full_like(ones, float(middle))
            self.zero_point = nn.Parameter(
                offset, requires_grad=scheme is QuantizationScheme.affine
            )
        else:
            self.register_buffer("scale", ones)
            self.register_buffer("zero_point", torch.full_like(ones, middle, dtype=torch.int32))
        # What the buffers say, for code that is compiled.
        self._rounds, self._follows = True, True
        # Whether it has a scale.
        self.is_begun = False
        # Whether the range is to be left to training after it was found once.
        self.follows_once = False
        self.register_load_state_dict_post_hook(_loaded)  # type: ignore[no-untyped-call]

    def enable_fake_quant(self, enabled: bool = True) -> None:
        """Let it round, or not."""
        self.fake_quant_enabled.fill_(int(enabled))
        self._rounds = bool(enabled)

    def enable_observer(self, enabled: bool = True) -> None:
        """Let its range follow, or not."""
        self.observer_enabled.fill_(int(enabled))
        self._follows = bool(enabled)

    def extra_repr(self) -> str:
        """Return what tells it from others."""
        kind = f"{'' if self.signed else 'u'}int{self.bits}, {self.scheme.value}"
        return f"{kind}, {'learnable' if self.is_learnable else 'vanilla'}"

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Return values rounded to what the integers stand for."""
        if not isinstance(values, torch.Tensor) or not values.is_floating_point():
            return values
        if self.is_asleep:
            return values
        # In evaluation nothing changes, except that a scale is needed to begin with.
        if self._follows and (self.training or not self.is_begun):
            self._follow(values.detach())
        if not self._rounds or not self.is_begun:
            # DistributedDataParallel waits for the gradient of each parameter.
            if not self.is_learnable:
                return values
            return values + 0 * (self.scale.sum() + self.zero_point.sum())
        return self._rounded(values)

    def _rounded(self, values: torch.Tensor) -> torch.Tensor:
        parted = self.blocked(values)
        scale, offset = self._parameters_for(values)
        steps = parted * (1 / scale)  # as torch's ops do it
        steps = steps + (steps.round() - steps).detach() + offset
        steps = steps.clamp(self.quant_min, self.quant_max)
        rounded: torch.Tensor = (steps - offset) * scale
        return rounded.reshape(values.shape).to(values.dtype)

    def _parameters_for(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_learnable:
            # Copies, as the next pass may change them before this one's gradient is taken.
            offset = self.zero_point.to(self.scale.dtype, copy=True)
            return self._spread(self.scale.clone()), self._spread(offset)
        whole = self.zero_point.round().clamp(self.quant_min, self.quant_max)
        offset = self.zero_point + (whole - self.zero_point).detach()
        # Steps of a scale count as much as those of a weight, relatively.
        share = 1 / math.sqrt(values.numel() / self.scale.numel() * max(self.quant_max, 1))
        scale, offset = (
            tensor.detach() + share * (tensor - tensor.detach())
            for tensor in (self.scale.clone().clamp(min=_EPS), offset)
        )
        return self._spread(scale), self._spread(offset)

    def _spread(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.block_shape is None:
            return tensor
        return tensor.reshape([n for size in tensor.shape for n in (size, 1)])

    def blocked(self, values: torch.Tensor) -> torch.Tensor:
        """Return values with two axes for each, one for the blocks and one for what is in them."""
        if self.block_shape is None:
            return values
        sizes = zip(values.shape, self.block_shape, strict=True)
        return values.reshape([n for size, block in sizes for n in (size // block, block)])

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _follow(self, values: torch.Tensor) -> None:
        if self.follows_once and self.is_begun:
            return
        self.activation_post_process(self.blocked(values))
        self.take_range()

    @torch.no_grad()
    def take_range(self) -> None:
        """Take scale and offset from the range."""
        observer = self.activation_post_process
        if observer.is_empty:
            return
        low = observer.min_val.clamp(max=0).reshape(self.scale.shape)
        high = observer.max_val.clamp(min=0).reshape(self.scale.shape)
        n_steps = self.quant_max - self.quant_min
        if self.scheme is QuantizationScheme.symmetric:
            scale = torch.maximum(-low, high) * 2 / n_steps
            offset = torch.full_like(scale, self.middle)
        else:
            scale = (high - low) / n_steps
            offset = self.quant_min - (low / scale.clamp(min=_EPS)).round()
        self.scale.copy_(scale.clamp(min=_EPS))
        self.zero_point.copy_(offset.clamp(self.quant_min, self.quant_max))
        self.is_begun = True

    @torch.no_grad()
    def integers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scales, and offsets as integers, as they are now."""
        offset = self.zero_point.round().clamp(self.quant_min, self.quant_max)
        return self.scale.detach().clamp(min=_EPS), offset.to(torch.int32)


class FixedQuantize(FakeQuantize):
    """Rounds values of a known range, given by its scale and offset."""

    def __init__(self, scale: float, zero_point: int) -> None:
        super().__init__(
            ObserverType.min_max, bits=8, signed=False, scheme=QuantizationScheme.affine
        )
        self.scale.fill_(scale)
        self.zero_point.fill_(zero_point)
        self.is_begun = True

    def _follow(self, values: torch.Tensor) -> None:
        """Do nothing: the range is known."""


def activation_layer(
    config: ModuleLinearQuantizerConfig, known: tuple[float, int] | None, is_nonnegative: bool
) -> FakeQuantize:
    """Return a layer for an activation, of a known scale and offset or never negative perhaps."""
    if known is not None:
        return FixedQuantize(*known)
    return FakeQuantize(
        config.activation_observer,
        bits=8,
        signed=False,
        scheme=QuantizationScheme.affine if is_nonnegative else config.quantization_scheme,
        is_learnable=config.algorithm == "learnable",
    )


class QuantizeDequantize(Final):
    """Rounds values to integers and back as another layer does, by ops that a Core ML model has."""

    def __init__(self, fake: FakeQuantize) -> None:
        super().__init__()
        scale, offset = fake.integers()
        self.scale, self.zero_point = float(scale.reshape(-1)[0]), int(offset.reshape(-1)[0])
        self.signed = fake.signed
        self.quant_min, self.quant_max = fake.quant_min, fake.quant_max

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Return values rounded to what the integers stand for."""
        if torch._C._is_tracing():
            return self._traced(values)
        if torch.compiler.is_exporting():
            return self._exported(values)
        steps = (values * (1.0 / self.scale)).round() + self.zero_point
        return (steps.clamp(self.quant_min, self.quant_max) - self.zero_point) * self.scale

    def _traced(self, values: torch.Tensor) -> torch.Tensor:
        kind = torch.qint8 if self.signed else torch.quint8
        with warnings.catch_warnings():
            # It goes away with torch.jit.trace, which knows no other ops for this.
            warnings.simplefilter("ignore")
            quantized = torch.quantize_per_tensor(values, self.scale, self.zero_point, kind)
        traced: torch.Tensor = quantized.dequantize()
        return traced

    def _exported(self, values: torch.Tensor) -> torch.Tensor:
        ops: Any = _ops()
        kind = torch.int8 if self.signed else torch.uint8
        settings = (self.scale, self.zero_point, self.quant_min, self.quant_max, kind)
        exported: torch.Tensor = ops.dequantize_per_tensor(
            ops.quantize_per_tensor(values, *settings), *settings
        )
        return exported

    def extra_repr(self) -> str:
        """Return what tells it from others."""
        return f"scale={self.scale:.6g}, zero_point={self.zero_point}"


def _ops() -> Any:
    """Return the ops by which ``torch.export`` and converters know quantization."""
    try:
        import torch.ao.quantization.fx._decomposed
    except ImportError:
        _define_ops()
    return torch.ops.quantized_decomposed


def _define_ops() -> None:
    """Define the ops where torch no longer comes with them."""
    if hasattr(torch.ops.quantized_decomposed, "quantize_per_tensor"):
        return
    rest = "float scale, int zero_point, int quant_min, int quant_max, ScalarType dtype) -> Tensor"
    torch.library.define("quantized_decomposed::quantize_per_tensor", f"(Tensor input, {rest}")
    torch.library.define("quantized_decomposed::dequantize_per_tensor", f"(Tensor input, {rest}")

    @torch.library.impl("quantized_decomposed::quantize_per_tensor", "CompositeExplicitAutograd")
    def quantize(
        values: torch.Tensor, scale: float, zero_point: int, low: int, high: int, kind: Any
    ) -> torch.Tensor:
        return ((values * (1.0 / scale)).round() + zero_point).clamp(low, high).to(kind)

    @torch.library.impl("quantized_decomposed::dequantize_per_tensor", "CompositeExplicitAutograd")
    def dequantize(
        values: torch.Tensor, scale: float, zero_point: int, _low: int, _high: int, _kind: Any
    ) -> torch.Tensor:
        return (values.to(torch.float32) - zero_point) * scale


def _loaded(fake: FakeQuantize, _keys: Any) -> None:
    fake._rounds = bool(fake.fake_quant_enabled.any())
    fake._follows = bool(fake.observer_enabled.any())
    empty = fake.activation_post_process.is_empty
    fake.is_begun = isinstance(fake, FixedQuantize) or not empty
