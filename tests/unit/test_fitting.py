"""Groups and blocks made to fit the channels that there are."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from milpress.formats.rows import divisor_of

numbers = st.integers(1, 150)


@example(asked=16, n=130, multiple=1)  # 13
@example(asked=16, n=130, multiple=2)  # 10
@example(asked=16, n=97, multiple=1)  # all of them
@example(asked=16, n=1009, multiple=1)
@example(asked=200, n=97, multiple=1)
@example(asked=32, n=1, multiple=1)
@given(asked=numbers, n=numbers, multiple=st.sampled_from([1, 2, 4]))
def test_the_largest_size_that_divides_is_taken_and_all_channels_where_there_is_none(
    asked, n, multiple
):
    size, note = divisor_of("group", asked, (n, 3), 0, 0, "divisor", multiple_of=multiple)
    if n % asked == 0:
        assert (size, note) == (asked, "")
        return
    fitting = [k for k in range(2, asked + 1) if n % k == 0 and k % multiple == 0]
    assert size == (max(fitting) if fitting else n)
    assert note.endswith(f"{n} output channel{'s' * (n > 1)}")
    assert note.startswith("one table, as no group size" if size > asked else f"group size {size},")


@given(asked=numbers, n=numbers)
def test_where_nothing_else_is_to_be_taken_only_what_divides_is(asked, n):
    size, note = divisor_of("block", asked, (3, n), 1, 0, "leave")
    assert (size is None) == (n % asked != 0)
    assert bool(note) == (size is None)


@pytest.mark.parametrize(
    ("asked", "n", "multiple", "note"),
    [
        (16, 97, 1, "one table, as no group size from 2 to 16 divides 97 output channels"),
        (2, 97, 1, "one table, as no group size of 2 divides 97 output channels"),
        (16, 94, 4, "one table, as no group size from 4 to 16 divides 94 output channels"),
        (16, 130, 1, "group size 13, as 16 does not divide 130 output channels"),
        (128, 97, 1, "group size 97, as 128 does not divide 97 output channels"),
    ],
)
def test_a_note_says_what_was_taken_and_why(asked, n, multiple, note):
    made = divisor_of("group", asked, (n, 8), 0, 0, "divisor", multiple_of=multiple)
    assert made[1] == note
