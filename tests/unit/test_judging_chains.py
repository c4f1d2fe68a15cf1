"""What verification says of weights that were pruned and coded: of each order, and in each run."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from judged_weights import (
    INT8,
    LUT8,
    NORMAL,
    PALETTE,
    PRUNINGS,
    chained,
    sparse,
    steps_of,
    with_mask,
    with_tables,
)

from milpress import formats as f
from milpress.compression.judging import judge
from milpress.formats import error_feedback
from milpress.mil.records import promise_of
from milpress.recipe import treatment_dict


@pytest.mark.parametrize("pruning", PRUNINGS)
@pytest.mark.parametrize("codings", [(INT8,), (PALETTE,), (f.PalettizeConfig(bits=4), LUT8)])
def test_a_mask_under_codes_is_judged_as_one_of_weights(pruning, codings):
    configs = (PRUNINGS[pruning], *codings)
    value, steps = chained(NORMAL, *configs), steps_of(*configs)
    promise = promise_of(steps)
    assert judge(NORMAL, value, promise, steps).wrong == ""
    none = np.zeros_like(value.mask())
    assert "zero" in judge(NORMAL, with_mask(value, none), promise, steps).wrong
    for more in (True, False):
        mask = value.mask().copy()
        mask[tuple(np.argwhere(mask != more)[0])] = more
        assert judge(NORMAL, with_mask(value, mask), promise, steps).wrong


@pytest.mark.parametrize("pruning", PRUNINGS)
@pytest.mark.parametrize("coding", [INT8, PALETTE])
def test_a_coded_weight_that_is_pruned_later_is_judged_as_a_dense_one(pruning, coding):
    before = chained(NORMAL, coding)
    value = f.compress(before, PRUNINGS[pruning])
    source, steps = before.dense(), steps_of(PRUNINGS[pruning])
    assert judge(source, value, "pruned", steps).wrong == ""
    mask = value.mask()
    mask[tuple(np.argwhere(mask)[0])] = False
    assert judge(source, with_mask(value, mask), "pruned", steps).wrong
    codes = value.value.codes.copy()
    codes[tuple(np.argwhere(value.mask())[0])] ^= 1
    changed = replace(value, value=replace(value.value, codes=codes))
    assert "not pruned are changed" in judge(source, changed, "pruned", steps).wrong


@pytest.mark.parametrize("sparsity", [0.5, 0.51])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_palette_of_vectors_that_is_pruned_later_loses_the_least_vectors(sparsity, axis):
    config = f.PalettizeConfig(bits=4, vector_size=2, channel_axis=axis)
    before, pruning = chained(NORMAL, config), f.PruneConfig(sparsity=sparsity)
    value, steps = f.compress(before, pruning), steps_of(pruning)
    source = before.dense()
    assert judge(source, value, "pruned", steps).wrong == ""
    mask = value.code_mask()
    first, last = np.argwhere(mask)[0], np.argwhere(~mask)[0]
    mask[tuple(first)] = False
    assert "blocks, got" in judge(source, with_mask(value, mask), "pruned", steps).wrong
    mask[tuple(last)] = True
    assert judge(source, with_mask(value, mask), "pruned", steps).wrong


CODINGS = {
    "int8": INT8,
    "int4 in blocks": f.QuantizeConfig(dtype="int4", granularity=f.PerBlock(4), offset=True),
    "clipped": f.QuantizeConfig(dtype="int4", range="mse"),
    "palette": f.PalettizeConfig(bits=4),
    "groups": f.PalettizeConfig(bits=3, group_size=4, channel_axis=1),
    "scaled": f.PalettizeConfig(bits=3, channel_scale=True),
    "uniform": f.PalettizeConfig(bits=3, table=f.Uniform()),
}


@pytest.mark.parametrize("pruning", PRUNINGS)
@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_chain_that_is_pruned_last_passes_and_one_of_zeros_does_not(pruning, coding, dtype):
    source = np.random.default_rng(5).standard_normal((12, 20)).astype(dtype)
    source[:, ::5] = 0
    configs = CODINGS[coding], PRUNINGS[pruning]
    value, steps = chained(source, *configs), steps_of(*configs)
    assert judge(source, value, "none", steps).wrong == ""
    is_known = coding != "clipped" and (
        pruning != "threshold" or isinstance(value.value, f.Palette)
    )
    none = with_mask(value, np.zeros_like(value.mask()))
    assert bool(judge(source, none, "none", steps).wrong) == is_known


def test_codes_with_errors_fed_back_may_have_been_zero():
    configs = INT8, PRUNINGS["sparsity"]
    value, (coding, pruning) = chained(NORMAL, *configs), steps_of(*configs)
    coding["quantize"]["feedback"] = True
    none = with_mask(value, np.zeros_like(value.mask()))
    assert judge(NORMAL, none, "none", (coding, pruning)).wrong == ""


@pytest.mark.parametrize("later", [(), (LUT8,)])
def test_a_palette_of_vectors_that_is_pruned_in_the_same_run_keeps_the_rest(later):
    configs = f.PalettizeConfig(bits=4, vector_size=2), f.PruneConfig(sparsity=0.5), *later
    value, steps = chained(NORMAL, *configs), steps_of(*configs)
    assert judge(NORMAL, value, "none", steps).wrong == ""
    if not later:  # where tables are rounded, entries may be zero
        none = with_mask(value, np.zeros_like(value.code_mask()))
        found = judge(NORMAL, none, "none", steps).wrong
        assert found == "at most 128 weights must be zero, got 256"
        changed = replace(value, value=with_tables(value.value, slice(None, None, -1)))
        assert "nearest vector" in judge(NORMAL, changed, "none", steps).wrong


@pytest.mark.parametrize("coding", ["int8", "palette"])
def test_codes_that_are_left_of_a_weight_pruned_last_are_judged_as_without(coding):
    configs = CODINGS[coding], PRUNINGS["sparsity"]
    value, steps = chained(NORMAL, *configs), steps_of(*configs)
    place = tuple(np.argwhere(value.mask())[0])
    codes = value.value.codes.copy()
    codes[place] ^= 1
    changed = replace(value, value=replace(value.value, codes=codes))
    assert "1 " in judge(NORMAL, changed, "none", steps).wrong


@pytest.mark.parametrize("pruning", PRUNINGS)
def test_of_a_pruned_weight_no_more_vectors_are_dropped_than_were_pruned(pruning):
    configs = PRUNINGS[pruning], f.PalettizeConfig(bits=4, vector_size=2)
    value, steps = chained(NORMAL, *configs), steps_of(*configs)
    assert judge(NORMAL, value, "none", steps).wrong == ""
    none = with_mask(value, np.zeros_like(value.code_mask()))
    found = judge(NORMAL, none, "none", steps).wrong
    assert "must not be zero" in found if pruning == "threshold" else "must be zero, got" in found


@pytest.mark.parametrize(
    ("pruning", "message"),
    [
        ("n_m", "2 weights of a run of 4 along axis 1 must be zero, got 1"),
        ("n_m axis 0", "1 weights of a run of 3 along axis 0 must be zero, got 0"),
        ("blocks", "as many blocks as fit into 128 weights must be zero, got 126 weights"),
        ("sparsity", "128 weights must be zero, got 127"),
    ],
)
@pytest.mark.parametrize("coding", ["int8", "int4 in blocks", "clipped"])
def test_a_chain_that_is_pruned_last_has_the_zeros_that_were_promised(pruning, message, coding):
    configs = CODINGS[coding], PRUNINGS[pruning]
    source = NORMAL + np.float16(4)  # so that nothing decodes to zero by itself
    before, value, steps = (
        chained(source, configs[0]),
        chained(source, *configs),
        steps_of(*configs),
    )
    assert judge(source, value, "none", steps).wrong == ""
    mask = value.mask()
    mask[tuple(np.argwhere(~mask)[0])] = True
    codes = np.where(mask, before.codes, before.codes.dtype.type(0))
    changed = replace(with_mask(value, mask), value=replace(before, codes=codes))
    assert judge(source, changed, "none", steps).wrong == message


def test_a_palette_of_vectors_that_is_pruned_last_has_the_zeros_that_were_promised():
    configs = f.PalettizeConfig(bits=4, vector_size=2), f.PruneConfig(sparsity=0.5)
    source = NORMAL + np.float16(4)
    value, steps = chained(source, *configs), steps_of(*configs)
    assert judge(source, value, "none", steps).wrong == ""
    mask = value.code_mask()
    mask[tuple(np.argwhere(~mask)[0])] = True
    found = judge(source, with_mask(value, mask), "none", steps).wrong
    assert found == "as many blocks as fit into 128 weights must be zero, got 126 weights"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_m": [2, 4]}, "2 weights of a run of 4 along axis 1 must be zero, got 0"),
        ({"sparsity": 0.5}, "128 weights must be zero, got 127"),
    ],
)
def test_a_weight_whose_errors_were_fed_back_has_the_zeros_that_were_promised(settings, message):
    source = NORMAL.reshape(16, 2, 2, 4)
    steps = ({"prune": {**settings, "feedback": True}},)
    kept = np.ones(source.shape, bool)
    kept[..., :2] = False
    assert judge(source, sparse(source, kept, -source[kept]), "none", steps).wrong == ""
    kept[0, 0, 0, 0] = True
    kept[0, 0, 0, 1] = "n_m" in settings
    assert judge(source, sparse(source, kept, -source[kept]), "none", steps).wrong == message


@pytest.mark.parametrize("n_groups", [1, 2, 8])
@pytest.mark.parametrize("pruning", [f.PruneConfig(sparsity=0.29), f.PruneConfig(n_m=(2, 4))])
def test_what_is_pruned_with_feedback_has_the_zeros_that_are_promised(pruning, n_groups):
    source = np.random.default_rng(1).standard_normal((8, 5, 3)).astype(np.float32)
    inputs = np.random.default_rng(2).standard_normal((n_groups, 40, 15))
    moments = np.matmul(inputs.transpose(0, 2, 1), inputs).astype(np.float32)
    factor = error_feedback.factorize(moments, error_feedback.FeedbackConfig())
    value = error_feedback.prune(source, pruning, factor)
    ((kind, settings),) = treatment_dict(pruning).items()
    steps = ({kind: {**settings, "feedback": True}},)
    assert judge(source, value, "none", steps).wrong == ""


@pytest.mark.parametrize(
    ("first", "second"), [(PRUNINGS["n_m"], INT8), (PRUNINGS["sparsity"], PALETTE)]
)
def test_codes_of_a_pruned_weight_leave_out_zeros_only(first, second):
    before = f.sparsify(NORMAL, first)
    value, source, steps = f.compress(before, second), before.dense(), steps_of(second)
    promise = promise_of(steps)
    assert judge(source, value, promise, steps).wrong == ""
    mask = value.mask()
    mask[tuple(np.argwhere(mask)[0])] = False
    for word in (promise, "none"):
        found = judge(source, with_mask(value, mask), word, steps).wrong
        assert found == "weights that were not zero are dropped"


@pytest.mark.parametrize(
    "settings", [{"n_m": [1, 2]}, {"sparsity": 0.5, "block_size": 2, "axis": 1}]
)
def test_a_chain_of_a_vector_has_no_second_axis(settings):
    source = NORMAL.reshape(-1)
    value = chained(source, LUT8, PRUNINGS["sparsity"])
    steps = (*steps_of(LUT8), {"prune": settings})
    assert "must have an axis 1" in judge(source, value, "none", steps).wrong
    vectors = f.PalettizeConfig(bits=4, vector_size=2)
    value, steps = chained(source, PRUNINGS["sparsity"], vectors), steps_of(vectors)
    found = judge(source, value, "none", ({"prune": settings}, *steps)).wrong
    assert "n_m" not in settings or "must have an axis 1" in found
