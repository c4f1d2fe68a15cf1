"""What a compressed weight keeps of its source, and whether that is what was promised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import milpress._core as _core
from milpress.compression.pruned import too_few_zeros, too_many_zeros, wrong_blocks, wrong_runs
from milpress.formats import Compressed, Masked, Palette, Quantized, Sparse
from milpress.formats.fidelity import fidelity
from milpress.formats.palette import reassigned
from milpress.formats.rows import Floats, packed_mask, spread, unpacked_mask
from milpress.formats.sparse import n_pruned
from milpress.mil.records import Promise, Step, is_tuned, promise_of


class Judgement(NamedTuple):
    """Sums of squares of source and error, and in words which promise is broken, if one is."""

    signal: float
    noise: float
    wrong: str = ""


def judge(
    source: Floats, value: Compressed, promise: Promise, steps: tuple[Step, ...]
) -> Judgement:
    """Compare a compressed weight with its source.

    Parameters
    ----------
    source
        The weight before the steps.
    value
        What they made of it.
    promise
        What they promise of every element.
    steps
        What was done, as recorded.
    """
    if _dtype(value) != source.dtype:
        return Judgement(0.0, 0.0, f"it must be decoded as {source.dtype}, got {_dtype(value)}")
    if promise == "none":
        signal, noise, _ = fidelity(source, value.dense())
        return Judgement(signal, noise, _wrong_zeros(source, value, steps))
    if promise == "pruned":
        return _judge_pruned(source, value, steps[-1]["prune"])
    if isinstance(value, Masked):
        return _judge_masked(source, value, promise, steps)
    if isinstance(value, Palette) and promise == "nearest":
        return _judge_palette(source, value)
    if isinstance(value, Quantized) and promise == "half_step":
        signal, noise, n_outside = fidelity(source, value)
        wrong = f"{n_outside} weights are more than half a step off"
        return Judgement(signal, noise, wrong if n_outside else "")
    return Judgement(0.0, 0.0, _another_kind(value))


def is_pruned(source: Floats, value: Compressed) -> bool:
    """Whether a weight is its source, but for what is zero."""
    return isinstance(value, Sparse) and not _judge_pruned(source, value, {}).wrong


def _dtype(value: Compressed) -> np.dtype[Any]:
    if isinstance(value, Sparse):
        return value.nonzeros.dtype
    inner = value.value if isinstance(value, Masked) else value
    return inner.scale.dtype if isinstance(inner, Quantized) else inner.entries.dtype


def _another_kind(value: Compressed) -> str:
    return f"the weight must be compressed as recorded, got {type(value).__name__}"


def _judge_palette(source: Floats, value: Palette) -> Judgement:
    is_scalar = value.vector_size == 1
    if is_scalar and (np.diff(value.rows()[1].astype(np.float32), axis=1) < 0).any():
        return Judgement(0.0, 0.0, "the entries of a table do not ascend")
    signal, noise, n_outside = fidelity(source, value)
    kind = "entry" if is_scalar else "vector"
    wrong = f"{n_outside} indices don't name the nearest {kind} of their table"
    return Judgement(signal, noise, wrong if n_outside else "")


def _judge_masked(
    source: Floats, value: Masked, promise: Promise, steps: tuple[Step, ...]
) -> Judgement:
    """Judge the mask as of a pruned weight, and the codes as if nothing had been pruned.

    Outside the mask the source is taken to be what the code there, 0, stands for.
    """
    kept, inner = value.mask(), value.value
    signal, noise, _ = fidelity(source, value.dense())
    wrong = _wrong_zeros(source, value, steps)
    if not wrong:
        judged = np.where(kept, source, inner.dense())
        wrong = judge(judged, inner, promise, steps).wrong
    return Judgement(signal, noise, wrong)


def _judge_pruned(source: Floats, value: Compressed, settings: Mapping[str, Any]) -> Judgement:
    """Judge what is zero, and that nothing else is changed.

    Whole vectors of a palette go, as blocks do.
    """
    if isinstance(value, Sparse):
        bitmask, nonzeros = value.bitmask, value.nonzeros
    elif isinstance(value, Masked):
        kept = value.mask()
        bitmask, nonzeros = packed_mask(kept), value.dense()[kept]
    else:
        return Judgement(0.0, 0.0, _another_kind(value))
    return _judge_zeros(source, bitmask, nonzeros, _by_vectors(value, settings))


def _by_vectors(value: Compressed, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = value.value if isinstance(value, Masked) else None
    if not isinstance(inner, Palette) or inner.vector_axis is None or "sparsity" not in settings:
        return settings
    return {**settings, "block_size": inner.vector_size, "axis": inner.vector_axis}


def _wrong_zeros(source: Floats, value: Compressed, steps: tuple[Step, ...]) -> str:
    """Judge what is zero in a weight of which more than that may have changed."""
    place = next((i for i, step in enumerate(steps) if "prune" in step), None)
    if place is None:
        if isinstance(value, Masked) and (source[~value.mask()] != 0).any():
            return "weights that were not zero are dropped"
        return ""
    settings = steps[place]["prune"]
    if "feedback" in settings:
        return too_few_zeros(value.dense() == 0, settings)
    if isinstance(value, Sparse) and is_tuned(steps):
        kept = value.mask()
        return _judge_zeros(source, value.bitmask, source[kept], settings).wrong
    if not isinstance(value, Masked):
        return _another_kind(value)
    if place > 0:
        return _wrong_zeros_of_codes(source, value, steps)
    kept = value.mask()
    if not isinstance(value.value, Palette) or value.value.vector_axis is None:
        return _judge_zeros(source, packed_mask(kept), source[kept], settings).wrong
    # A vector stays if one of its weights does.
    zero = source == 0
    if "threshold" in settings and (np.abs(source[~kept]) > _limit(source, settings)).any():
        return f"weights above {_limit(source, settings)} must not be zero"
    return too_many_zeros(zero | ~kept, zero, settings)


def _wrong_zeros_of_codes(source: Floats, value: Masked, steps: tuple[Step, ...]) -> str:
    """Judge what is zero where a weight was pruned after it got codes."""
    coding, inner = steps[0], value.value
    settings = next(step["prune"] for step in steps if "prune" in step)
    is_last = len(steps) == 2 and "feedback" not in next(iter(coding.values()))
    by_table = isinstance(inner, Palette) and not isinstance(inner.lut, Quantized)
    if is_last and (by_table or isinstance(inner, Quantized)):
        wrong = _wrong_codes(source, value, coding)
        if wrong:
            return wrong
        is_nearest = promise_of([coding]) == "nearest"
        if isinstance(inner, Palette) and inner.vector_size == 1 and is_nearest:
            # The codes that were dropped are known.
            return _judge_pruned(reassigned(inner, source).dense(), value, settings).wrong
    zero, shown = value.dense() == 0, _by_vectors(value, settings)
    if is_tuned(steps):
        # What the dropped codes stood for is not known any more.
        return too_few_zeros(zero, shown)
    return too_few_zeros(zero, shown) or too_many_zeros(
        zero, _may_be_zero(source, inner, coding), shown
    )


def _wrong_codes(source: Floats, value: Masked, coding: Step) -> str:
    """Judge the codes that are left, if more is promised of them than their number."""
    inner, promise = value.value, promise_of([coding])
    is_of_kind = isinstance(inner, Palette) == ("palettize" in coding)
    if promise == "none" or not is_of_kind:
        return ""
    judged = np.where(value.mask(), source, inner.dense())
    return judge(judged, inner, promise, (coding,)).wrong


def _may_be_zero(source: Floats, inner: Palette | Quantized, coding: Step) -> NDArray[np.bool_]:
    """Return which weights may have the code of zero, whatever is known of the others."""
    if isinstance(inner, Quantized):
        if next(iter(coding.values())).keys() & {"range", "feedback"}:
            return np.ones(source.shape, np.bool_)
        # Half a step, and what rounding adds to it, is less than a whole one.
        return np.abs(source) <= spread(np.abs(inner.scale), inner.shape)
    flags = spread((inner.entries == 0).any(axis=(-2, -1)), inner.codes.shape)
    if inner.vector_axis is not None:
        flags = np.repeat(flags, inner.vector_size, inner.vector_axis)
    return flags


def _limit(source: Floats, settings: Mapping[str, Any]) -> float:
    """Return a threshold in the weight's precision."""
    with np.errstate(over="ignore"):
        return float(source.dtype.type(settings["threshold"]))


def _judge_zeros(
    source: Floats, bitmask: NDArray[np.uint8], nonzeros: Floats, settings: Mapping[str, Any]
) -> Judgement:
    flat = source.reshape(-1)
    signal, noise, n_changed, n_zeros, n_zeros_before, greatest_pruned, least_kept = (
        _core.compare_sparse(flat, bitmask, np.ascontiguousarray(nonzeros))
    )
    wrong = ""
    if n_changed:
        wrong = f"{n_changed} weights that were not pruned are changed"
    elif settings.keys() & {"n_m", "block_size"}:
        kept = unpacked_mask(bitmask, source.shape)
        judge_choice = wrong_runs if "n_m" in settings else wrong_blocks
        wrong = judge_choice(source, kept, settings)
    elif "sparsity" in settings:
        expected = max(n_pruned(flat.size, settings["sparsity"]), n_zeros_before)
        if greatest_pruned > least_kept:
            wrong = f"{greatest_pruned} was pruned, {least_kept} was not"
        elif n_zeros != expected:
            wrong = f"{expected} weights must be zero, got {n_zeros}"
    elif "threshold" in settings:
        limit = _limit(source, settings)
        if greatest_pruned > limit or (nonzeros.size and least_kept <= limit):
            wrong = f"weights up to {limit} must be zero, and no others"
    return Judgement(signal, noise, wrong)
