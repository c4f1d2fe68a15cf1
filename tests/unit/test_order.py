"""Halves in order: by integers, as NumPy's own sort of them is wrong on some processors."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from command_line import failed
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

import milpress
from milpress import formats as f
from milpress.compression import treating, writer
from milpress.errors import WeightError
from milpress.formats import order

PACKAGE = Path(milpress.__file__).parent
SEED = Path(__file__).parents[1] / "fuzz" / "corpus" / "packages" / "branches-iOS17.mlpackage"
ALL_HALVES = np.arange(1 << 16, dtype=np.uint16).view(np.float16)


def naive(halves: np.ndarray) -> list[float]:
    """Sort by comparing Python's numbers, NaN last."""
    return sorted(map(float, halves.reshape(-1)), key=lambda x: (x != x, x))


def test_every_half_is_put_in_its_place():
    shuffled = np.random.default_rng(0).permutation(ALL_HALVES)
    found = order.ascending(shuffled)
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found.astype(np.float64), naive(ALL_HALVES))
    # The two zeros are one value, and so are all that are no numbers.
    found = order.distinct(shuffled)
    n_nan = int(np.isnan(ALL_HALVES).sum())
    assert len(found) == (1 << 16) - (n_nan - 1) - 1
    assert not np.signbit(found[found == 0]).any()
    np.testing.assert_array_equal(found, order.ascending(found))


arrays = npst.arrays(
    st.sampled_from([np.float16, np.float32]),
    npst.array_shapes(min_dims=2, max_dims=3, max_side=12),
    elements=st.sampled_from([-np.inf, -2.5, -0.0, 0.0, 2.0**-24, 1.0, 65504.0, np.inf]),
)


@settings(deadline=None)
@given(arrays, st.integers(-2, 1))
def test_sorting_is_along_the_axis(array, axis):
    found = order.ascending(array, axis)
    oracle = np.apply_along_axis(lambda row: np.array(naive(row), array.dtype), axis, array)
    np.testing.assert_array_equal(found, oracle)


@settings(deadline=None)
@given(arrays)
def test_distinct_values_and_rows_are_those_of_sets(array):
    np.testing.assert_array_equal(order.distinct(array), sorted({float(x) for x in array.flat}))
    rows = array.reshape(len(array), -1)
    found, inverse = order.distinct_rows(rows)
    assert [tuple(row) for row in found.tolist()] == sorted({tuple(row) for row in rows.tolist()})
    np.testing.assert_array_equal(found[inverse], rows)


SORTS = ("sort", "unique", "argsort", "partition", "argpartition", "lexsort", "searchsorted")


class Faulty:
    """A function of NumPy's that does not take halves, as it can't be relied on for them."""

    def __init__(self, function):
        self.function = function

    def __call__(self, array, *args, **kwargs):
        assert np.asarray(array).dtype != np.float16, "halves must not get here"
        return self.function(array, *args, **kwargs)


@pytest.mark.parametrize("vector_size", [1, 2])
def test_unique_tables_of_halves_are_exact_whatever_the_processor(vector_size, monkeypatch):
    for name in SORTS:
        monkeypatch.setattr(np, name, Faulty(getattr(np, name)))
    weight = (np.random.default_rng(0).integers(-2, 2, (64, 128)) / 4).astype(np.float16)
    config = f.PalettizeConfig(bits=None, table=f.Unique(), vector_size=vector_size)
    made = f.palettize(weight, config)
    np.testing.assert_array_equal(made.dense(), weight)
    assert made.bits == 2 * vector_size


# Functions of NumPy, and methods of arrays, that put values in order or look for them so.
NAMES = Counter(
    """sort sort_complex argsort lexsort partition argpartition searchsorted digitize unique
    unique_all unique_counts unique_inverse unique_values union1d intersect1d setdiff1d setxor1d
    isin in1d median nanmedian percentile nanpercentile quantile nanquantile histogram_bin_edges
    trim_zeros""".split()
)
# What these sort are float32 and float64 by construction.
ALLOWED = {
    "formats/order.py": {"sort", "unique"},
    "formats/factor.py": {"argsort"},
    "formats/_rounding.py": {"argpartition"},
    "planner/parts.py": {"argsort"},
    "device/stats.py": {"median", "percentile"},
    "formats/ranges.py": {"searchsorted"},
}
METHODS = {"argsort", "searchsorted", "argpartition"}  # sort and partition are of lists and texts


def sorts_of(tree: ast.AST) -> set[tuple[str, int]]:
    """Return the calls that may sort an array, with their lines."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in ("numpy", "numpy.ma"):
            found |= {(alias.name, node.lineno) for alias in node.names if alias.name in NAMES}
        if isinstance(node, ast.Attribute) and node.attr in NAMES:
            is_numpy = isinstance(node.value, ast.Name) and node.value.id in ("np", "numpy")
            is_torch = isinstance(node.value, ast.Name) and node.value.id == "torch"
            if is_numpy or (node.attr in METHODS and not is_torch):
                found.add((node.attr, node.lineno))
    return found


def test_the_search_for_sorts_finds_them():
    code = "np.unique(a)\na.argsort()\nmap(np.sort, a)\ntorch.argsort(a)\n[].sort()"
    assert sorts_of(ast.parse(code)) == {("unique", 1), ("argsort", 2), ("sort", 3)}
    assert sorts_of(ast.parse("from numpy import median")) == {("median", 1)}


def test_nothing_else_sorts_with_numpy():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        found = sorts_of(ast.parse(path.read_text(encoding="utf-8")))
        others = {each for each in found if each[0] not in ALLOWED.get(name, ())}
        assert not others, f"{name}: take formats/order.py, or say why halves can't get there"


@pytest.mark.parametrize(
    "error", [ValueError("odd"), KeyError("x"), IndexError(), AssertionError()]
)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_fault_at_one_weight_names_it(error, threads, tmp_path):
    options = ("--palettize", 4, "--weight-threshold", 10, "--threads", threads)
    with mock.patch.object(treating, "_treat", side_effect=error):
        line = failed("compress", SEED, tmp_path / "out.mlpackage", *options)
    assert line.startswith("error: both: this weight met a fault of milpress that was not known, ")
    assert type(error).__name__ in line
    assert list(tmp_path.iterdir()) == []


def test_a_fault_while_a_weight_is_written_or_decoded_names_it(tmp_path):
    small, out = tmp_path / "small.mlpackage", tmp_path / "out.mlpackage"
    recipe = milpress.Recipe.of(f.PalettizeConfig(bits=2), min_size=10)
    with (
        mock.patch.object(writer.WeightWriter, "store", side_effect=ValueError("odd")),
        pytest.raises(WeightError, match=r"^both[a-z_]*: .*ValueError: odd"),
    ):
        milpress.compress(SEED, small, recipe)
    milpress.compress(SEED, small, recipe)
    with (
        mock.patch.object(writer.WeightWriter, "decompress", side_effect=ValueError("odd")),
        pytest.raises(WeightError, match=r"^both[a-z_]*: .*ValueError: odd"),
    ):
        milpress.decompress(small, out)
    with (
        mock.patch("milpress.mil.decode.Decoder.stored_values", side_effect=ValueError("odd")),
        pytest.raises(WeightError, match=r"^both[a-z_]*: .*ValueError: odd"),
    ):
        milpress.inspect(small)
    # What can't be helped by leaving a weight out stays what it is.
    with (
        mock.patch.object(treating, "_treat", side_effect=MemoryError),
        pytest.raises(MemoryError),
    ):
        milpress.compress(SEED, out, recipe)
