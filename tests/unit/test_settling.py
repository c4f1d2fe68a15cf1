"""Requests that meet on one weight: the one that keeps most of it wins, in whatever order."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest

from milpress import formats as f
from milpress.compression.settling import Asked, settle

WEIGHT: Any = SimpleNamespace(
    shape=(64, 32), size=2048, channel_axes=(0, 1), dtype=SimpleNamespace(bits=16)
)


def table(bits: Any, **settings: Any) -> f.PalettizeConfig:
    return f.PalettizeConfig(bits=bits, **settings)


def codes(dtype: Any, granularity: Any, **settings: Any) -> f.QuantizeConfig:
    return f.QuantizeConfig(dtype=dtype, granularity=granularity, **settings)


def custom(_: Any) -> Any:
    raise AssertionError


# Each keeps more of the weight than the next.
ORDERS: dict[str, list[Any]] = {
    "palettes": [
        table(None, table=f.Unique()),
        table(8),
        table(6),
        table(4, group_size=8, channel_scale=True),
        table(4, group_size=8),
        table(4, group_size=16),
        table(4),
        table(4, table=f.Uniform()),
        table(6, vector_size=2),
        table(4, vector_size=2),
        table(1),
    ],
    "codes": [
        codes("int8", f.PerBlock(16)),
        codes("int8", f.Blocks((1, 32)), offset=True),
        codes("int8", f.PerChannel(), range="mse"),
        codes("int8", f.PerChannel()),
        codes("uint8", f.PerTensor()),
        codes("int4", f.PerBlock(8)),
        codes("int4", f.PerBlock(16)),
        codes("int4", f.PerTensor()),
    ],
    "sparsities": [
        f.PruneConfig(sparsity=0.25),
        f.PruneConfig(n_m=(1, 2)),
        f.PruneConfig(sparsity=0.75),
        f.PruneConfig(sparsity=0.75, block_size=4),
        f.PruneConfig(n_m=(7, 8)),
    ],
    "thresholds": [
        f.PruneConfig(threshold=0.1),
        f.PruneConfig(threshold=0.2, min_sparsity=0.5),
        f.PruneConfig(threshold=0.2),
    ],
    "kinds": [codes("int8", f.PerChannel()), table(6), codes("int4", f.PerBlock(16))],
}


@pytest.mark.parametrize("order", ORDERS)
def test_the_request_that_keeps_more_wins(order):
    for more, less in itertools.combinations(ORDERS[order], 2):
        asked = [Asked("gather g", (less,)), Asked("linear l", (more,))]
        for each in (asked, asked[::-1]):
            found = settle(WEIGHT, each)
            assert found.treatments == (more,), (more, less)
            assert "as linear l asks; gather g asks for " in found.note
    for one in ORDERS[order]:
        found = settle(WEIGHT, [Asked("gather g", (one,)), Asked("linear l", ())])
        assert found.treatments == ()
        assert found.note.startswith("left, as linear l asks; gather g asks for ")


def test_what_all_ask_for_needs_no_word():
    for treatments in [(), (table(4),), (f.PruneConfig(sparsity=0.5), table(4))]:
        asked = [Asked("a", treatments), Asked("b", treatments)]
        assert settle(WEIGHT, asked) == (treatments, "")


@pytest.mark.parametrize(
    "others",
    [
        [f.PruneConfig(threshold=0.1), f.PruneConfig(sparsity=0.5)],
        [f.PruneConfig(threshold=0.1), table(4)],
        [table(None, table=f.Custom(custom)), table(4)],
    ],
)
def test_what_cannot_be_told_is_left(others):
    asked = [Asked(f"op {i}", (one,)) for i, one in enumerate(others)]
    found = settle(WEIGHT, asked)
    assert found.treatments == ()
    assert found.note.startswith("left, as it can't be told which of these keeps more of it: ")
    assert all(f"op {i} asks for " in found.note for i in range(2))


def test_of_several_steps_the_one_that_differs_counts():
    prune = f.PruneConfig(sparsity=0.5)
    asked = [Asked("a", (prune, table(4))), Asked("b", (prune, table(8)))]
    assert settle(WEIGHT, asked).treatments == (prune, table(8))
    assert settle(WEIGHT, [*asked, Asked("c", (prune,))]).treatments == (prune,)
    mixed = [Asked("a", (prune, table(4))), Asked("b", (table(8), prune))]
    assert settle(WEIGHT, mixed).treatments == ()


def test_of_requests_that_keep_alike_the_first_wins():
    one, other = codes("int8", f.PerChannel()), codes("uint8", f.PerChannel())
    assert settle(WEIGHT, [Asked("a", (one,)), Asked("b", (other,))]).treatments == (one,)
    assert settle(WEIGHT, [Asked("a", (other,)), Asked("b", (one,))]).treatments == (other,)
