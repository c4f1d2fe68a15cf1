"""JSON that any reader takes."""

from __future__ import annotations

import ast
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import milpress
from milpress.compression.report import Report, WeightReport
from milpress.plain import json as strict

numbers = st.floats() | st.integers() | st.booleans() | st.none() | st.text()
trees = st.recursive(
    numbers,
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
)


@given(data=trees)
def test_what_is_written_has_finite_numbers_alone_and_is_read_again(data):
    text = strict.text(data)
    assert strict.read(text) == json.loads(text) == json.loads(json.dumps(strict.plain(data)))
    if "NaN" not in str(data) and "inf" not in str(data) and "nan" not in str(data):
        assert text == json.dumps(data)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, np.float64("-inf")])
def test_a_number_that_is_not_finite_is_in_words_that_python_reads(value):
    word = strict.number(value)
    assert isinstance(word, str)
    np.testing.assert_equal(float(word), float(value))


@pytest.mark.parametrize("text", ["NaN", '{"a": [Infinity]}', "-Infinity"])
def test_numbers_that_are_not_finite_are_refused(text):
    with pytest.raises(ValueError, match="must be finite, got"):
        strict.read(text)


@pytest.mark.parametrize("snr_db", [math.inf, -math.inf, 12.5, None])
def test_a_report_keeps_the_sign_of_an_infinite_ratio(snr_db):
    weight = WeightReport(
        name="w",
        op_types=("linear",),
        shape=(4, 4),
        status="compressed",
        treatment="",
        note="",
        bytes_before=32,
        bytes_after=16,
        snr_db=snr_db,
    )
    report = Report(
        source="a",
        destination="b",
        weights=(weight,),
        package_bytes_before=2,
        package_bytes_after=1,
        signal=0.0 if snr_db == -math.inf else 1.0,
        noise=0.0 if snr_db == math.inf else 1.0,
    )
    made = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    expected = str(snr_db) if snr_db is not None and math.isinf(snr_db) else snr_db
    assert made["weights"][0]["snr_db"] == expected
    if snr_db is not None and math.isinf(snr_db):
        assert made["snr_db"] == expected


# Both ends of a pipe to a driver's process are Python's.
PIPES = {"device/sessions.py", "device/worker.py"}


def test_nothing_writes_json_that_others_refuse():
    root = Path(milpress.__file__).parent
    found = []
    for path in root.rglob("*.py"):
        name = path.relative_to(root).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.dumps", "json.dump"):
                strict = any(
                    each.arg == "allow_nan" and not ast.literal_eval(each.value)
                    for each in node.keywords
                )
                found += [] if strict or name in PIPES else [f"{name}:{node.lineno}"]
    assert found == []
