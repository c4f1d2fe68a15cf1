"""The layer that makes of a weight, while it is trained, one that a palette can hold."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import nn

import milpress._core as _core
from milpress.errors import UnsupportedError
from milpress.formats import Palette, PalettizeConfig
from milpress.formats.joint import masked
from milpress.formats.order import ascending
from milpress.formats.palette import Bits
from milpress.formats.rows import Floats, as_float
from milpress.torch import _metadata
from milpress.torch._lifecycle import PALETTIZATION, Fake
from milpress.torch._metadata import Stored
from milpress.torch._module_weights import ModuleWeight, representable, whole
from milpress.torch._palettes import fitted, folded, with_integer_lut
from milpress.torch.palettization import _dkm
from milpress.torch.palettization.palettization_config import (
    DEFAULT_BITS,
    ModuleDKMPalettizerConfig,
)

__all__ = ["FakePalettize"]


class FakePalettize(Fake):
    """Replaces each weight by a mixture of the entries of its table, or in evaluation by one entry.

    Until it is enabled it returns weights as they are. The tables begin as the exact k-means tables
    of the first weights that it sees, and each pass of training moves them.

    Parameters
    ----------
    weight
        Which weight it is for; its shape and axes are taken, not the weight itself.
    config
        How.

    Raises
    ------
    UnsupportedError
        If groups or vectors don't fit the weight.
    """

    purpose = PALETTIZATION

    fake_palett_enabled: torch.Tensor
    per_channel_scaling_factor: torch.Tensor | None

    def __init__(self, weight: ModuleWeight, config: ModuleDKMPalettizerConfig) -> None:
        super().__init__()
        self.config = config
        bits = config.n_bits or DEFAULT_BITS.get(type(weight.module), 4)
        self.n_bits: int = bits
        self.n_clusters: int = 2**bits
        self.cluster_dim: int = config.cluster_dim or 1
        self.kmeans_max_iter: int = config.kmeans_max_iter
        self.group_size = config.group_size
        self.enable_per_channel_scale: bool = config.enable_per_channel_scale
        self.lut_dtype: str = config.lut_dtype
        self.output = weight.axes[0]
        matrix = weight.matrices()[0]
        self.treatment, self.notes = _treatment(matrix, config, bits)
        self.shape = weight.shape
        self.stack = self.shape[: len(matrix.index)]
        self.axis: int = len(self.stack) + (self.treatment.channel_axis or 0)
        n_channels = self.shape[self.axis]
        n_of_matrix = n_channels // (self.treatment.group_size or n_channels)
        self.n_groups = math.prod(self.stack) * n_of_matrix
        # Named as in coremltools' state.
        self.palett = nn.Module()
        blank = torch.full((self.n_groups, self.n_clusters, self.cluster_dim), torch.nan)
        self.palett.register_buffer("centroids", blank)
        scale = None
        if self.treatment.channel_scale:
            sizes = [*self.stack, *[1] * (len(self.shape) - len(self.stack))]
            sizes[self.output] = self.shape[self.output]
            scale = torch.full(sizes, torch.nan)
        self.register_buffer("per_channel_scaling_factor", scale)
        self.register_buffer("fake_palett_enabled", torch.zeros(1, dtype=torch.uint8))
        self._enabled = False
        self._begun = False
        self.register_load_state_dict_post_hook(_loaded)  # type: ignore[no-untyped-call]

    @property
    def centroids(self) -> torch.Tensor:
        """The tables, of shape ``(n_groups, n_clusters, cluster_dim)``; NaN before they begin."""
        return self.palett.get_buffer("centroids")

    @property
    def is_begun(self) -> bool:
        """Whether it has tables, and is enabled."""
        return self._enabled and self._begun

    @property
    def n_bytes(self) -> int:
        """Size of indices, tables and scales, where tables are of 16 bits."""
        n_bits = math.prod(self.shape) // self.cluster_dim * self.n_bits
        scale = self.per_channel_scaling_factor
        n_floats = self.centroids.numel() + (0 if scale is None else scale.numel())
        return math.ceil(n_bits / 8) + 2 * n_floats

    def enable_fake_palett(self, enabled: bool = True) -> None:
        """Let it palettize, or not."""
        self.fake_palett_enabled.fill_(int(enabled))
        self._enabled = bool(enabled)

    def disable_fake_palett(self) -> None:
        """Let it return weights as they are."""
        self.enable_fake_palett(False)

    def reset_parameters(self) -> None:
        """Do nothing: there are no parameters. Some of torch's wrappers call it."""

    def extra_repr(self) -> str:
        """Return what tells it from others."""
        return f"n_bits={self.n_bits}, cluster_dim={self.cluster_dim}, lut_dtype={self.lut_dtype}"

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, weights: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
        """Return the weights to compute with.

        Parameters
        ----------
        weights
            The weights.
        kept
            0 where a weight is pruned: it stays zero and has no influence on the tables.

        Raises
        ------
        UnsupportedError
            If single weights are pruned where an index stands for several, or are not finite.
        """
        if self.is_asleep or not self._enabled:
            return weights
        if kept is not None:
            if self.cluster_dim > 1:
                msg = "a pruned weight can't be palettized by vectors"
                raise UnsupportedError(msg)
            kept = kept.expand(weights.shape)
        with torch.no_grad():
            if not self._begun:
                self._begin(weights.detach(), kept)
        if not self.training:
            with torch.no_grad():
                dense = torch.from_numpy(self.stored(weights.detach(), kept).dense())
            return dense.to(weights)
        return self._attended(weights, kept)

    def _attended(self, weights: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
        config = self.config
        wide = torch.promote_types(weights.dtype, torch.float32)
        scale = self.per_channel_scaling_factor
        scaled = weights.to(wide) if scale is None else weights.to(wide) / scale.to(wide)
        rows = self._rows(scaled)
        kept_rows = None if kept is None else self._rows(kept.to(wide))[..., 0]
        table = self.centroids.to(wide, copy=True)
        _separate(table, config.palett_cluster_tol, config.enforce_zero)
        n_soft = max(1, int(config.percentage_palett_enable * self.n_groups))
        mixtures, tables = [], []
        for settings, part in (
            (config.settings, slice(0, n_soft)),
            (replace(config.settings, mode="hard"), slice(n_soft, None)),
        ):
            if not len(table[part]):
                continue
            rounding = None if config.lut_type is None else self._rounding
            mixture, moved = _dkm.attend(
                rows[part],
                table[part],
                settings,
                None if kept_rows is None else kept_rows[part],
                rounding,
            )
            mixtures.append(mixture)
            tables.append(moved)
        self.centroids.copy_(torch.cat(tables).detach())
        dense = self._unrows(torch.cat(mixtures))
        return (dense if scale is None else dense * scale.to(wide)).to(weights.dtype)

    def _begin(self, weights: torch.Tensor, kept: torch.Tensor | None) -> None:
        """Make the first tables, and scales."""
        wide = weights.to(torch.promote_types(weights.dtype, torch.float32))
        array = as_float(whole(weights))
        if _core.first_nonfinite(np.ascontiguousarray(array).reshape(-1)) < array.size:
            msg = "a weight that is not finite (NaN or infinity) can't be palettized"
            raise UnsupportedError(msg)
        if self.per_channel_scaling_factor is not None:
            axes = [axis for axis in range(len(self.stack), wide.ndim) if axis != self.output]
            if self.config.per_channel_scaling_factor_scheme == "abs":
                scale = wide.abs().amax(dim=axes, keepdim=True)
            else:
                scale = (wide.amax(dim=axes, keepdim=True) - wide.amin(dim=axes, keepdim=True)) / 2
            # Such a scale must not vanish in float16, either.
            tiny = torch.finfo(torch.float16).smallest_normal
            scale = torch.where(scale > tiny, scale, torch.ones_like(scale))
            self.per_channel_scaling_factor.copy_(scale)
            wide = wide / scale
        rows = self._rows(wide).float().cpu().contiguous().numpy()
        share = None
        if kept is not None:
            share = self._rows(kept.float())[..., 0].cpu().contiguous().numpy()
        table: Any
        if self.cluster_dim == 1:
            table = _core.kmeans1d(rows[..., 0], self.n_clusters, share)[..., None]
        else:
            flat = rows.reshape(len(rows), -1)
            table, _ = _core.kmeans_vector(flat, self.n_clusters, self.cluster_dim, 0, share)
            table = table.reshape(len(rows), self.n_clusters, self.cluster_dim)
        if self.config.enforce_zero:
            nearest = np.square(table).sum(axis=2).argmin(axis=1)
            groups = np.arange(len(table))
            table = table.copy()
            table[groups, nearest] = table[:, 0]
            table[:, 0] = 0
        self.centroids.copy_(torch.from_numpy(np.ascontiguousarray(table)))
        self._begun = True

    def stored(self, weights: torch.Tensor, kept: torch.Tensor | None = None) -> Stored:
        """Return the palette that holds weights, each by its nearest entry."""
        array = as_float(whole(weights))
        scale = None
        if self.per_channel_scaling_factor is not None:
            scale = self.per_channel_scaling_factor.cpu().numpy().astype(array.dtype)
        scaled = array if scale is None else (array / scale.astype(np.float32)).astype(array.dtype)
        tables = self.centroids.cpu().float().numpy().astype(array.dtype)
        if self.cluster_dim == 1:
            tables = ascending(tables, axis=1)
        grid = [*self.stack, *[1] * (array.ndim - len(self.stack))]
        grid[self.axis] = self.n_groups // math.prod(self.stack)
        lut = np.ascontiguousarray(tables.reshape(*grid, self.n_clusters, self.cluster_dim))
        code_shape = list(self.shape)
        code_shape[self.axis] //= self.cluster_dim
        palette = Palette(
            codes=np.zeros(code_shape, np.uint8),
            lut=lut,
            bits=self.n_bits,
            vector_axis=self.axis if self.cluster_dim > 1 else None,
        )
        if self.config.lut_type in (torch.int8, torch.uint8):
            palette = with_integer_lut(palette, self.config.lut_type)
        elif scale is None:
            palette = replace(palette, lut=representable(palette.entries, weights.dtype))
        palette = _metadata.nearest(palette, self._pulled_to_zero(scaled, palette))
        if scale is not None and self.config.lut_type in (torch.int8, torch.uint8):
            palette, scale = folded(palette, scale, self.output), None
        if kept is None:
            return Stored(palette, scale)
        return Stored(masked(palette, kept.cpu().numpy() != 0), scale)

    def _pulled_to_zero(self, array: Floats, palette: Palette) -> Floats:
        """Return weights for which the nearest entry is the one that attention prefers."""
        bonus = self.config.prune_threshold
        if not self.config.enforce_zero or self.cluster_dim > 1:
            return array
        if bonus == 0:
            # A weight that is not zero must not become zero: it looks at the other entries.
            lut = palette.entries
            distance = np.where(lut == 0, np.inf, np.abs(lut))
            least = np.take_along_axis(lut, distance.argmin(axis=-2)[..., None, :], axis=-2)
            others = ascending(np.where(lut == 0, least, lut), axis=-2)
            palette = replace(palette, lut=np.ascontiguousarray(others))
        entries = _metadata.nearest(palette, array).dense()
        if bonus == 0:
            return np.where(array == 0, array, entries)
        is_zero = np.square(array) - bonus <= np.square(array - entries)
        return np.where(is_zero, array.dtype.type(0), array)

    def _rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the elements as groups of vectors."""
        n_axes = len(self.stack)
        front = tensor.movedim(self.axis, n_axes)
        inner = math.prod(front.shape[n_axes + 1 :])
        parts = front.reshape(self.n_groups, -1, self.cluster_dim, inner)
        return parts.movedim(2, 3).reshape(self.n_groups, -1, self.cluster_dim)

    def _unrows(self, rows: torch.Tensor) -> torch.Tensor:
        """Undo `_rows`."""
        n_axes = len(self.stack)
        rest = [n for axis, n in enumerate(self.shape) if axis >= n_axes and axis != self.axis]
        parts = rows.reshape(self.n_groups, -1, math.prod(rest), self.cluster_dim).movedim(3, 2)
        return parts.reshape(*self.stack, -1, *rest).movedim(n_axes, self.axis)

    def _rounding(self, tables: torch.Tensor) -> torch.Tensor:
        """Return tables as they will be stored."""
        kind = self.config.lut_type
        if kind in (torch.float16, torch.bfloat16):
            return tables.to(kind).to(tables.dtype)
        array = tables.float().cpu().contiguous().numpy()
        codes = np.zeros((len(array),), np.uint8)
        palette = Palette(codes=codes, lut=array, bits=self.n_bits, vector_axis=0)
        entries = with_integer_lut(palette, cast("torch.dtype", kind)).entries
        return torch.from_numpy(np.ascontiguousarray(entries)).to(tables)


def _treatment(
    weight: ModuleWeight, config: ModuleDKMPalettizerConfig, bits: int
) -> tuple[PalettizeConfig, list[str]]:
    axis = None
    if config.cluster_permute is not None:
        if len(config.cluster_permute) != len(weight.shape):
            msg = (
                f"cluster_permute must have an axis for each of {len(weight.shape)}, "
                f"got {config.cluster_permute}"
            )
            raise UnsupportedError(msg)
        axis = config.cluster_permute[0]
    return fitted(weight, weight.shape, config, bits=cast("Bits", bits), axis=axis)


def _separate(table: torch.Tensor, tolerance: float, keep_zero: bool) -> None:
    """Move entries that are equal to others half-way to the next, in place."""
    n_entries = table.shape[1]
    column = table[..., 0].sort(dim=1).values
    suspects = (column[:, 1:] == column[:, :-1]).any(dim=1).nonzero().reshape(-1).tolist()
    for group in suspects:
        entries = table[group]
        distinct, place, counts = torch.unique(
            entries, dim=0, return_inverse=True, return_counts=True
        )
        if len(distinct) >= n_entries * (1 - tolerance) or len(distinct) < 2:
            continue
        for j in (counts > 1).nonzero().reshape(-1).tolist():
            moved = int((place == j).nonzero()[-1])
            if moved or not keep_zero:
                entries[moved] = (distinct[j] + distinct[(j + 1) % len(distinct)]) / 2


def _loaded(fake: FakePalettize, _keys: Any) -> None:
    fake._enabled = bool(fake.fake_palett_enabled.any())
    fake._begun = bool(torch.isfinite(fake.centroids).all())
