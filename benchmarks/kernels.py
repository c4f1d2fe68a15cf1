"""Kernels beside `memcpy` of their input, NumPy, scikit-learn and coremltools, one thread."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
from coremltools.optimize import _utils as ct_packing
from coremltools.optimize.coreml import _quantization_passes as ct_passes
from numpy.typing import NDArray
from sklearn.cluster import KMeans

import milpress._core as _core
from benchmarks.measure import (
    CLOCKS,
    Case,
    Contender,
    Effort,
    Figure,
    Line,
    alternate,
    speed_beside,
    two_threads,
)

Array = NDArray[Any]
WIDTHS = (1, 2, 3, 4, 6, 8)
_CHANNELS = 4096


@dataclass(frozen=True, kw_only=True)
class Data:
    """Normal float16 weights, made once.

    Parameters
    ----------
    n_weights
        Weights that kernels get; a multiple of 16 times 4,096.
    n_slow
        Weights that slow peers get, from the same array.
    n_vectors
        Vectors of them that k-means of vectors gets.
    """

    n_weights: int = 32 << 20
    n_slow: int = 4 << 20
    n_vectors: int = 768 * 768 // 4

    @cached_property
    def weights(self) -> Array:
        """All weights, flat."""
        rng = np.random.default_rng(0)
        weights = np.empty(self.n_weights, np.float16)
        for part in np.array_split(weights, 16):
            part[:] = rng.standard_normal(part.size, np.float32) * np.float32(0.03)
        return weights

    @property
    def slow(self) -> Array:
        """The first of them, for slow peers."""
        return self.weights[: self.n_slow]

    @cached_property
    def spare(self) -> Array:
        """Memory of the size of the weights, touched before."""
        return np.ones_like(self.weights)

    @cached_property
    def codes(self) -> Array:
        """A byte for each weight, the bits of which are random."""
        return np.random.default_rng(1).integers(0, 256, self.n_weights, np.uint8)

    def memcpy(self, source: Array) -> Contender:
        """Copy an array into memory that was touched before."""
        copy = ctypes.CDLL(None).memcpy
        copy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
        target = self.spare.ctypes.data
        return Contender(
            "memcpy", lambda: copy(target, source.ctypes.data, source.nbytes), source.size
        )


def on_threads(n_threads: int, work: Callable[[], object]) -> object:
    """Do the work on at most so many threads."""
    before = _core.set_thread_limit(n_threads)
    try:
        return work()
    finally:
        _core.set_thread_limit(before)


def cases(data: Data, effort: Effort) -> dict[str, Case]:
    """Return what measures each line, by its name."""
    found: dict[str, Case] = {
        "int4, blocks of 32, exact": lambda: _linear(data, effort, 32, 7, 4, 0.40),
        "int8, a scale for 4,096 weights, exact": lambda: _linear(
            data, effort, _CHANNELS, 127, 8, 0.75
        ),
        "int4, blocks of 32, clipping searched": lambda: _clipping(data, effort),
        "sparse: mask and compaction": lambda: _mask_and_compaction(data, effort),
        "sparse: 2 of 4, mask and compaction": lambda: _two_of_four(data, effort),
        "magnitude percentile, with its mask": lambda: _magnitude(data, effort),
        "histogram of distinct values": lambda: _histogram(data, effort),
        "assignment to 16 entries": lambda: _assign(data, effort, 16, 0.70),
        "assignment to 256 entries": lambda: _assign(data, effort, 256, 0.60),
    }
    for bits in WIDTHS:
        found[f"packing, {_bits(bits)}"] = partial(_pack, data, effort, bits)
    for bits in WIDTHS:
        found[f"unpacking, {_bits(bits)}"] = partial(_unpack, data, effort, bits)
    # Not every build offers the conversion by itself.
    if hasattr(_core, "widen"):
        found["float16 to float32"] = lambda: _widen(data, effort)
    found |= {
        "k-means, 4 bits, exact": lambda: _palette(data, effort),
        "k-means, 4 bits, exact, groups of 16 x 768": lambda: _grouped_palette(data, effort),
        "k-means of vectors of 2, 256 entries": lambda: _vectors(data, effort, 2),
        "k-means of vectors of 4, 256 entries": lambda: _vectors(data, effort, 4),
    }
    for name, (work, n_items) in _threaded_work(data).items():
        found[f"two threads: {name}"] = partial(
            two_threads, partial(on_threads, work=work), n_items, effort
        )
    return found


def _bits(bits: int) -> str:
    return "1 bit" if bits == 1 else f"{bits} bits"


def _ours(work: Callable[[], object], n_items: int) -> Contender:
    return Contender("milpress", lambda: on_threads(1, work), n_items)


def _line(
    contenders: list[Contender], effort: Effort, target: float | None = None, **more: Any
) -> Line:
    """Return the line of milpress beside all others; the target is of `memcpy`."""
    times = alternate(contenders, effort, CLOCKS["cpu"])
    figures = [
        speed_beside(times, peer, target if peer == "memcpy" else None)
        for peer in times
        if peer != "milpress"
    ]
    return Line(times=times, figures=tuple(figures), **more)


def numpy_quantize(rows: Array, code_max: int) -> tuple[Array, Array]:
    """Quantize each row as a NumPy user would."""
    scale = np.abs(rows).max(axis=1, keepdims=True) / np.float16(code_max)
    return np.rint(rows / scale).astype(np.int8), scale


def numpy_clip_search(rows: Array) -> Array:
    """Return the best of 16 clipped scales of each row."""
    wide = rows.astype(np.float32)
    full = np.abs(wide).max(axis=1, keepdims=True) / 7
    best = np.full(len(rows), np.inf, np.float32)
    chosen = np.ones_like(best)
    for share in np.linspace(0.4, 1.0, 16, dtype=np.float32):
        scale = full * share
        error = np.square(np.clip(np.rint(wide / scale), -8, 7) * scale - wide).sum(axis=1)
        chosen = np.where(error < best, share, chosen)
        best = np.minimum(error, best)
    return chosen


def numpy_sparsify(weights: Array, threshold: float) -> tuple[Array, Array]:
    """Return the bitmask and what is left above a magnitude."""
    kept = np.abs(weights) > threshold
    return np.packbits(kept, bitorder="little"), weights[kept]


def numpy_keep_largest(weights: Array, n_zeros: int) -> Array:
    """Return the bitmask of all but the least."""
    magnitude = np.abs(weights)
    threshold = np.partition(magnitude, n_zeros)[n_zeros]
    return np.packbits(magnitude >= threshold, bitorder="little")


def numpy_two_of_four(weights: Array) -> tuple[Array, Array]:
    """Return the bitmask and what is left of the two largest of four neighbours."""
    runs = weights.reshape(-1, 4)
    kept = np.ones(runs.shape, np.bool_)
    np.put_along_axis(kept, np.argsort(np.abs(runs), axis=1)[:, :2], False, axis=1)
    return np.packbits(kept, bitorder="little"), runs[kept]


def numpy_pack(codes: Array, bits: int) -> Array:
    """Pack the low bits of codes into a stream."""
    low = np.unpackbits(codes.reshape(-1, 1), bitorder="little", axis=1)[:, :bits]
    return np.packbits(low.reshape(-1), bitorder="little")


def numpy_unpack(packed: Array, bits: int, n_codes: int) -> Array:
    """Undo `numpy_pack`."""
    low = np.unpackbits(packed, bitorder="little", count=n_codes * bits).reshape(-1, bits)
    return np.packbits(low, bitorder="little", axis=1).reshape(-1)


def squared_error(weights: Array, luts: Array, codes: Array) -> float:
    """Return the squared error of rows against the entries that their codes name."""
    entries = np.take_along_axis(luts.astype(np.float64), codes.astype(np.intp), axis=1)
    return float(np.square(weights - entries).sum())


def _linear(data: Data, effort: Effort, row: int, code_max: int, bits: int, target: float) -> Line:
    weights, few = data.weights.reshape(-1, row), data.slow.reshape(-1, row)
    channels = data.slow.reshape(-1, _CHANNELS)
    return _line(
        [
            _ours(lambda: _core.quantize(weights, -code_max, code_max, False), weights.size),
            data.memcpy(weights),
            Contender("NumPy", lambda: numpy_quantize(few, code_max), few.size),
            Contender(
                "coremltools",
                lambda: ct_passes.linear_quantize_weights.blockwise_compress(
                    channels, bits, "LINEAR_SYMMETRIC", True, [1, row]
                ),
                channels.size,
            ),
        ],
        effort,
        target,
    )


def _clipping(data: Data, effort: Effort) -> Line:
    rows, few = data.weights.reshape(-1, 32), data.slow.reshape(-1, 32)
    return _line(
        [
            _ours(lambda: _core.quantize_mse(rows, None, -8, 7, False), rows.size),
            data.memcpy(rows),
            Contender("NumPy", lambda: numpy_clip_search(few), few.size),
        ],
        effort,
        note="NumPy tries 16 ranges, milpress at least as many and negative scales.",
    )


def _mask_and_compaction(data: Data, effort: Effort) -> Line:
    weights, slow = data.weights, data.slow
    threshold = float(np.float16(0.02))

    def work() -> Array:
        return _core.compact(weights, _core.keep_above(weights, threshold))

    return _line(
        [
            _ours(work, weights.size),
            data.memcpy(weights),
            Contender("NumPy", lambda: numpy_sparsify(slow, threshold), slow.size),
            Contender(
                "coremltools",
                lambda: ct_passes.prune_weights.compress_by_threshold(slow, threshold, 0.0),
                slow.size,
            ),
        ],
        effort,
        0.85,
        note="Half of the weights stay.",
    )


def _two_of_four(data: Data, effort: Effort) -> Line:
    weights, slow = data.weights, data.slow.reshape(-1, _CHANNELS)

    def work() -> Array:
        shape = (weights.size // _CHANNELS, _CHANNELS, 1)
        return _core.compact(weights, _core.keep_n_m(weights, *shape, 2, 4))

    return _line(
        [
            _ours(work, weights.size),
            data.memcpy(weights),
            Contender("NumPy", lambda: numpy_two_of_four(slow), slow.size),
            Contender(
                "coremltools",
                lambda: ct_passes.prune_weights.compress_by_nm_sparsity(slow, (2, 4), 1),
                slow.size,
            ),
        ],
        effort,
        0.75,
    )


def _magnitude(data: Data, effort: Effort) -> Line:
    weights, slow = data.weights, data.slow
    return _line(
        [
            _ours(lambda: _core.keep_largest(weights, weights.size // 2), weights.size),
            data.memcpy(weights),
            Contender("NumPy", lambda: numpy_keep_largest(slow, slow.size // 2), slow.size),
            Contender(
                "coremltools",
                lambda: ct_passes.prune_weights.compress_by_magnitude(slow, 0.5),
                slow.size,
            ),
        ],
        effort,
        0.60,
        note="coremltools' time includes the compaction.",
    )


def _histogram(data: Data, effort: Effort) -> Line:
    rows = data.weights.reshape(1, -1)
    bits = data.slow.view(np.uint16)
    return _line(
        [
            _ours(lambda: _core.kmeans1d(rows, 1, None), rows.size),
            data.memcpy(rows),
            Contender("NumPy", lambda: np.bincount(bits, minlength=65_536), bits.size),
        ],
        effort,
        0.55,
        note="As k-means with one entry: counting is all there is to do.",
    )


def _assign(data: Data, effort: Effort, n_entries: int, target: float) -> Line:
    rows = data.weights.reshape(1, -1)
    lut = np.quantile(data.slow.astype(np.float32), (np.arange(n_entries) + 0.5) / n_entries)
    luts = np.sort(lut).astype(np.float16).reshape(1, -1)
    middles = (luts[0, 1:] + luts[0, :-1]) / 2
    return _line(
        [
            _ours(lambda: _core.lut_assign(rows, luts), rows.size),
            data.memcpy(rows),
            Contender("NumPy", lambda: np.searchsorted(middles, data.slow), data.slow.size),
        ],
        effort,
        target,
    )


def _pack(data: Data, effort: Effort, bits: int) -> Line:
    codes, slow = data.codes & (2**bits - 1), data.codes[: data.n_slow] & (2**bits - 1)
    return _line(
        [
            _ours(lambda: _core.pack(codes, bits), codes.size),
            data.memcpy(codes),
            Contender("NumPy", lambda: numpy_pack(slow, bits), slow.size),
            Contender(
                "coremltools",
                lambda: ct_packing.pack_elements_into_bits(slow, bits),
                slow.size,
            ),
        ],
        effort,
        0.80 if bits == 4 else None,
        item="code",
    )


def _unpack(data: Data, effort: Effort, bits: int) -> Line:
    n_codes, n_slow = data.n_weights, data.n_slow
    packed = data.codes[: n_codes * bits // 8]
    slow = packed[: n_slow * bits // 8]
    copied = data.memcpy(data.codes)
    return _line(
        [
            _ours(lambda: _core.unpack(packed, bits, n_codes), n_codes),
            copied,
            Contender("NumPy", lambda: numpy_unpack(slow, bits, n_slow), n_slow),
            Contender(
                "coremltools",
                lambda: ct_packing.restore_elements_from_packed_bits(slow, bits, n_slow),
                n_slow,
            ),
        ],
        effort,
        item="code",
    )


def _widen(data: Data, effort: Effort) -> Line:
    weights = data.weights
    return _line(
        [
            _ours(lambda: _core.widen(weights), weights.size),
            data.memcpy(weights),
            Contender("NumPy", lambda: data.slow.astype(np.float32), data.n_slow),
        ],
        effort,
    )


def _palette(data: Data, effort: Effort) -> Line:
    rows = data.slow.reshape(1, -1)

    def work() -> tuple[Array, Array]:
        luts = _core.kmeans1d(rows, 16, None)
        return luts, _core.lut_assign(rows, luts)

    return _palettes(rows, rows, work, 0, 80.0, effort)


def _grouped_palette(data: Data, effort: Effort) -> Line:
    weight = data.weights[: 768 * 768].reshape(768, 768)
    rows = weight.reshape(48, -1)

    def work() -> tuple[Array, Array]:
        luts = _core.kmeans1d(rows, 16, None)
        return luts, _core.lut_assign(rows, luts)

    return _palettes(rows, weight, work, 16, 30.0, effort)


def _palettes(
    rows: Array,
    weight: Array,
    work: Callable[[], tuple[Array, Array]],
    group_size: int,
    target: float,
    effort: Effort,
) -> Line:
    latest: dict[str, Any] = {}

    def theirs() -> None:
        latest["palette"] = ct_passes.palettize_weights.blockwise_compress(
            weight, "KMEANS", 4, [group_size, 0]
        )

    contenders = [_ours(work, rows.size), Contender("coremltools", theirs, rows.size)]
    times = alternate(contenders, effort, CLOCKS["cpu"])
    palette = latest["palette"]
    luts = palette.lut.reshape(len(rows), 16)
    peer = squared_error(rows, luts, palette.indices.reshape(rows.shape))
    error = squared_error(rows, *work())
    return Line(
        times=times,
        figures=(
            speed_beside(times, "coremltools", target),
            Figure(
                label="squared error beside coremltools' exact one",
                unit="error",
                measured=error / peer,
                target=1 + 1e-6,
                sense="at most",
            ),
        ),
        note=f"{rows.size:,} weights, tables and indices.",
    )


def _vectors(data: Data, effort: Effort, dim: int) -> Line:
    rows = data.weights[: dim * data.n_vectors].reshape(1, -1)
    vectors = rows.reshape(-1, dim).astype(np.float32)

    latest: dict[str, KMeans] = {}

    def theirs() -> None:
        latest["peer"] = KMeans(256, n_init=1, random_state=0).fit(vectors)

    def work() -> tuple[Array, Array]:
        return _core.kmeans_vector(rows, 256, dim, 0, None)

    contenders = [
        _ours(work, len(vectors)),
        Contender("scikit-learn", theirs, len(vectors)),
    ]
    times = alternate(contenders, effort, CLOCKS["cpu"])
    luts, codes = work()
    chosen = luts.reshape(256, dim)[codes.reshape(-1)].astype(np.float64)
    peer = latest["peer"]
    return Line(
        item="vector",
        times=times,
        figures=(
            speed_beside(times, "scikit-learn", 8.0),
            Figure(
                label="squared error beside scikit-learn's",
                unit="error",
                measured=float(np.square(vectors - chosen).sum()) / float(peer.inertia_),
                target=1.02,
                sense="at most",
            ),
        ),
        note=f"{len(vectors):,} vectors; scikit-learn took {peer.n_iter_} iterations.",
    )


def _threaded_work(data: Data) -> dict[str, tuple[Callable[[], object], int]]:
    blocks, whole = data.weights.reshape(-1, 32), data.weights.reshape(1, -1)
    groups = data.weights[: 768 * 768].reshape(48, -1)
    luts = np.linspace(-0.1, 0.1, 16, dtype=np.float16).reshape(1, -1)
    return {
        "int4, blocks of 32": (lambda: _core.quantize(blocks, -7, 7, False), blocks.size),
        "magnitude percentile": (
            lambda: _core.keep_largest(data.weights, data.n_weights // 2),
            data.n_weights,
        ),
        "assignment to 16 entries": (lambda: _core.lut_assign(whole, luts), whole.size),
        "k-means, groups of 16 x 768": (lambda: _core.kmeans1d(groups, 16, None), groups.size),
    }
