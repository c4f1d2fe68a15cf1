"""What verification says of single weights: right ones pass, each wrong one is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from judged_weights import (
    INT8,
    LUT8,
    NORMAL,
    PALETTE,
    PRUNINGS,
    sparse,
    steps_of,
    with_tables,
)

from milpress import formats as f
from milpress.compression import pruned
from milpress.compression.judging import is_pruned, judge
from milpress.errors import ConfigError, PackageError
from milpress.mil import proto
from milpress.mil.records import TREATMENTS, WeightRecords, promise_of


def wrong(source: np.ndarray, kept: np.ndarray, **settings: Any) -> str:
    steps = steps_of(f.PruneConfig(**settings))
    return judge(source, sparse(source, kept), "pruned", steps).wrong


# Few magnitudes, so that runs and blocks tie, and zeros before anything is pruned.
eighths = st.integers(-4, 4).map(lambda n: n / 8)


@st.composite
def weights_and_settings(draw: Any) -> tuple[np.ndarray, dict[str, Any]]:
    shape = draw(st.sampled_from([(6, 8), (7, 5), (5, 7, 3), (4, 6, 1, 2), (9, 4)]))
    dtype = draw(st.sampled_from([np.float16, np.float32]))
    n = int(np.prod(shape))
    source = np.array(draw(st.lists(eighths, min_size=n, max_size=n)), dtype).reshape(shape)
    axis = draw(st.sampled_from([None, 0, 1]))
    kind = draw(st.sampled_from(["n_m", "block_size", "sparsity", "threshold"]))
    sparsity = draw(st.sampled_from([0.0, 0.25, 0.4, 0.5, 0.9, 1.0]))
    if kind == "n_m":
        m = draw(st.integers(1, shape[1 if axis is None else axis] // 2))
        return source, {"n_m": (draw(st.integers(0, m)), m), "axis": axis}
    if kind == "block_size":
        return source, {"sparsity": sparsity, "block_size": 2, "axis": axis}
    if kind == "threshold":
        return source, {"threshold": draw(st.sampled_from([0.0, 0.125, 0.3]))}
    return source, {"sparsity": sparsity}


def runs_of(array: np.ndarray, axis: int, size: int) -> list[np.ndarray]:
    """Return the runs along an axis, one after the other."""
    lines = np.moveaxis(array, axis, -1).reshape(-1, array.shape[axis])
    return [line[i : i + size] for line in lines for i in range(0, len(line), size)]


def is_as_promised(source: np.ndarray, kept: np.ndarray, settings: dict[str, Any]) -> bool:
    """Read the promise the naive way; of ties, any may be pruned."""
    magnitudes = np.abs(source.astype(np.float64))
    n_before = np.count_nonzero(source == 0)
    least = magnitudes[kept].min(initial=np.inf)
    if "threshold" in settings:
        limit = float(source.dtype.type(settings["threshold"]))
        return bool((kept == (magnitudes > limit)).all())
    if "n_m" in settings:
        n, m = settings["n_m"]
        axis = 1 if settings["axis"] is None else settings["axis"]
        return all(
            np.count_nonzero(~stays) == max(n - (m - run.size), np.count_nonzero(run == 0))
            and run[~stays].max(initial=0) <= run[stays].min(initial=np.inf)
            for run, stays in zip(runs_of(magnitudes, axis, m), runs_of(kept, axis, m), strict=True)
        )
    budget = int(source.size * settings["sparsity"])
    if "block_size" not in settings:
        n_zeros = np.count_nonzero(~kept)
        return n_zeros == max(budget, n_before) and magnitudes[~kept].max(initial=0) <= least
    axis, size = settings["axis"] or 0, settings["block_size"]
    blocks = list(zip(runs_of(magnitudes, axis, size), runs_of(kept, axis, size), strict=True))
    left = [block for block, stays in blocks if stays.any()]
    gone = [block for block, stays in blocks if not stays.any()]
    norms = [(block**2).sum() for block in left]
    n_gone = sum(block.size for block in gone)
    return (
        all((stays == (block != 0)).all() for block, stays in blocks if stays.any())
        and (n_gone <= budget or not any(block.any() for block in gone))
        and max(((block**2).sum() for block in gone), default=0) <= min(norms, default=np.inf)
        and (
            not left
            or n_gone + max(b.size for b, n in zip(left, norms, strict=True) if n == min(norms))
            > budget
        )
    )


@given(case=weights_and_settings(), seed=st.integers(0, 10**6))
def test_a_mask_is_judged_as_the_naive_reading_of_the_promise_judges_it(case, seed):
    source, settings = case
    right = f.sparsify(source, f.PruneConfig(**settings)).mask()
    assert is_as_promised(source, right, settings)
    assert wrong(source, right, **settings) == ""
    rng = np.random.default_rng(seed)
    flips = rng.random(source.shape) < rng.choice([0.02, 0.1])
    kept = (right ^ flips) & (source != 0)
    assert (wrong(source, kept, **settings) == "") == is_as_promised(source, kept, settings)


def test_all_pieces_of_a_large_weight_are_judged(monkeypatch):
    source = np.random.default_rng(0).standard_normal((10, 22, 3)).astype(np.float16)
    for settings in (
        {"n_m": (2, 4)},
        {"n_m": (1, 3), "axis": 0},
        {"sparsity": 0.5, "block_size": 4},
        {"sparsity": 0.5, "block_size": 3, "axis": 1},
    ):
        kept = f.sparsify(source, f.PruneConfig(**settings)).mask()
        for piece in (1, 7, 60, 200):
            monkeypatch.setattr(pruned, "_PIECE", piece)
            assert wrong(source, kept, **settings) == ""
            for place in [(0, 0, 0), (9, 21, 2), (4, 10, 1)]:
                changed = kept.copy()
                changed[place] = not kept[place]
                assert wrong(source, changed, **settings)


RUNS = np.float16([[1, 2, 3, 4, 5, 6, 0, 8], [4, 3, 2, 1, 0, 0, 0, 8]])
BLOCKS = np.float32([[1, 9], [1, 9], [2, 3], [2, 3], [8, 0], [8, 0]])
BY_TWO = {"sparsity": 0.5, "block_size": 2}


@pytest.mark.parametrize(
    ("source", "settings", "kept", "message"),
    [
        (RUNS, {"n_m": (2, 4)}, RUNS > 9, "2 weights of a run of 4 along axis 1 must be zero"),
        (RUNS, {"n_m": (2, 4)}, RUNS != 0, "2 weights of a run of 4 along axis 1 .*, got 0"),
        (
            RUNS,
            {"n_m": (2, 4)},
            [[1, 1, 0, 0, 1, 0, 0, 1], [1, 1, 0, 0, 0, 0, 0, 1]],
            "4.0 was pruned, 1.0 of the same run along axis 1 was not",
        ),
        (
            RUNS,
            {"n_m": (1, 2), "axis": 0},
            [[1, 1, 1, 1, 1, 1, 0, 1], [1, 1, 1, 0, 0, 0, 0, 0]],
            "1 weights of a run of 2 along axis 0 must be zero, got 0",
        ),
        (BLOCKS, BY_TWO, BLOCKS > 9, "at most 6 weights must be zero in blocks, got 12"),
        (
            BLOCKS,
            BY_TWO,
            [[0, 1], [1, 1], [0, 0], [0, 0], [1, 0], [1, 0]],
            "a block of 2 along axis 0 is pruned in part",
        ),
        (
            BLOCKS,
            BY_TWO,
            [[0, 1], [0, 1], [1, 1], [1, 1], [0, 0], [0, 0]],
            "a block of norm 11.3.* was pruned, one of 2.8.* was not",
        ),
        (
            BLOCKS,
            BY_TWO,
            [[0, 1], [0, 1], [1, 1], [1, 1], [1, 0], [1, 0]],
            "as many blocks as fit into 6 weights must be zero, got 4 weights",
        ),
        (BLOCKS, {"sparsity": 0.5}, BLOCKS > 9, "6 weights must be zero, got 12"),
        (BLOCKS, {"sparsity": 0.5}, BLOCKS > 0, "6 weights must be zero, got 2"),
        (BLOCKS, {"sparsity": 0.5}, BLOCKS < 8, "9.0 was pruned, 0.0 was not"),
        (BLOCKS, {"threshold": 1}, BLOCKS > 2, "weights up to 1.0 must be zero, and no others"),
        (BLOCKS, {"threshold": 1}, BLOCKS > 0, "weights up to 1.0 must be zero, and no others"),
        (BLOCKS[0], {"n_m": (1, 2)}, BLOCKS[0] > 2, "must have an axis 1 .*, got 1 axes"),
        (BLOCKS[0], {**BY_TWO, "axis": 1}, BLOCKS[0] > 2, "must have an axis 1 .*, got 1 axes"),
    ],
)
def test_what_was_pruned_otherwise_is_refused_in_words(source, settings, kept, message):
    found = wrong(source, np.array(kept, bool), **settings)
    assert re.search(message, found), found


def test_ties_may_be_pruned_either_way():
    source = np.float32([[1, 1, 1, 1], [1, 1, 1, 1]])
    first, last = source > np.float32([2, 2, 0, 0]), source > np.float32([0, 0, 2, 2])
    for settings in ({"n_m": (1, 2)}, {"sparsity": 0.5}, {**BY_TWO, "axis": 1}):
        either = np.tile([[True, False]], (2, 2)) if "n_m" in settings else first
        other = ~either if "n_m" in settings else last
        assert wrong(source, either, **settings) == wrong(source, other, **settings) == ""


def test_a_threshold_beyond_float16_prunes_everything():
    source = np.float16([[1, 2], [3, 60000]])
    value = f.sparsify(source, f.PruneConfig(threshold=1e30))
    assert not value.dense().any()
    assert wrong(source, value.mask(), threshold=1e30) == ""


# Codes


def with_code(value: f.Palette | f.Quantized, change: int) -> Any:
    codes = value.codes.copy()
    codes[0, 0] = codes[0, 0] - change if codes[0, 0] >= change else codes[0, 0] + change
    return replace(value, codes=codes)


VECTORS = f.PalettizeConfig(bits=3, vector_size=2)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (PALETTE, lambda v: with_code(v, 1), "1 indices don't name the nearest entry of their"),
        (
            PALETTE,
            lambda v: replace(with_tables(v, slice(None, None, -1)), codes=7 - v.codes),
            "the entries of a table do not ascend",
        ),
        (VECTORS, lambda v: with_code(v, 1), "1 indices don't name the nearest vector of their"),
        (VECTORS, lambda v: with_tables(v, slice(None, None, -1)), "nearest vector of their table"),
        (INT8, lambda v: with_code(v, 1), "1 weights are more than half a step off"),
        (
            f.QuantizeConfig(dtype="uint4", offset=True),
            lambda v: replace(v, offset=v.offset + np.uint8(1)),
            "256 weights are more than half a step off",
        ),
    ],
)
def test_codes_that_are_not_the_best_are_refused(config, change, message):
    value, steps = f.compress(NORMAL, config), steps_of(config)
    promise = promise_of(steps)
    assert judge(NORMAL, value, promise, steps).wrong == ""
    found = judge(NORMAL, change(value), promise, steps).wrong
    assert re.search(message, found), found


# Kinds and types


@pytest.mark.parametrize(
    ("value", "steps", "got"),
    [
        (f.palettize(NORMAL, PALETTE), steps_of(INT8), "Palette"),
        (f.quantize(NORMAL, INT8), steps_of(PALETTE), "Quantized"),
        (f.sparsify(NORMAL, PRUNINGS["sparsity"]), steps_of(INT8), "Sparse"),
        (f.palettize(NORMAL, PALETTE), steps_of(PRUNINGS["sparsity"]), "Palette"),
        (
            f.palettize(NORMAL, PALETTE),
            steps_of(PRUNINGS["sparsity"], f.PalettizeConfig(bits=4), LUT8),
            "Palette",
        ),
    ],
)
def test_a_weight_of_another_kind_than_recorded_is_refused(value, steps, got):
    found = judge(NORMAL, value, promise_of(steps), steps).wrong
    assert found == f"the weight must be compressed as recorded, got {got}"


@pytest.mark.parametrize("config", [PALETTE, INT8, PRUNINGS["sparsity"]])
def test_a_weight_that_decodes_to_another_type_is_refused(config):
    value, steps = f.compress(NORMAL.astype(np.float32), config), steps_of(config)
    promise = promise_of(steps)
    found = judge(NORMAL, value, promise, steps).wrong
    assert found == "it must be decoded as float16, got float32"


def test_of_an_unrecorded_weight_is_known_whether_it_is_its_source_but_for_zeros():
    value = f.sparsify(NORMAL, PRUNINGS["n_m"])
    assert is_pruned(NORMAL, value)
    assert not is_pruned(NORMAL, replace(value, nonzeros=value.nonzeros + np.float16(1)))
    assert not is_pruned(NORMAL, f.palettize(NORMAL, PALETTE))


# The record


@pytest.mark.parametrize(
    "settings",
    [
        {"sparsity": "half"},
        {"sparsity": True},
        {"sparsity": float("nan")},
        {"sparsity": 2},
        {"threshold": [1]},
        {"threshold": float("inf")},
        {"n_m": 4},
        {"n_m": [2]},
        {"n_m": [0, 0]},
        {"n_m": [3, 2]},
        {"n_m": [1.5, 2]},
        {"n_m": [True, 2]},
        {"n_m": {"n": 1}},
        {"sparsity": 0.5, "block_size": 2.0},
        {"sparsity": 0.5, "block_size": 1},
        {"block_size": 2},
        {"n_m": [1, 2], "axis": 2},
        {"n_m": [1, 2], "axis": "0"},
        {"sparsity": 0.5, "threshold": 0.5},
        [],
    ],
)
def test_a_record_that_pruning_can_not_be_judged_by_is_refused(settings):
    model = proto.Model()
    record = {"version": 1, "treatments": [{"steps": [{"prune": settings}], "weights": {}}]}
    model.description.metadata.userDefined[TREATMENTS] = json.dumps(record)
    with pytest.raises(PackageError, match="is not a record of version 1"):
        WeightRecords.of(model)


def test_a_record_from_before_structures_were_judged_is_read():
    model = proto.Model()
    old = [{"prune": {"n_m": [2, 4]}}, {"prune": {"sparsity": 0.5, "block_size": 4}}]
    record = {
        "version": 1,
        "treatments": [
            {"steps": [step], "weights": {f"w{i}": f"w{i}_sparsified"}}
            for i, step in enumerate(old)
        ],
    }
    model.description.metadata.userDefined[TREATMENTS] = json.dumps(record)
    found = WeightRecords.of(model)
    assert [found.by_source[f"w{i}"].steps for i in range(2)] == [(step,) for step in old]


def test_runs_of_no_weights_are_no_runs():
    with pytest.raises(ConfigError, match=r"which is at least 1, got \(0, 0\)"):
        f.PruneConfig(n_m=(0, 0))
