"""Ids of unique texts, compared with a dictionary."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from framestream.tools.builder.unique_ids import UniqueIds


@given(batches=st.lists(st.lists(st.integers(0, 60), max_size=40), max_size=12))
def test_numbers_follow_the_first_naming(batches):
    distinct, known = UniqueIds(), {}
    for batch in batches:
        numbers, first = (column.tolist() for column in distinct.assign([f"text {value}" for value in batch]))
        for value, number, new in zip(batch, numbers, first, strict=True):
            assert new == (value not in known)
            assert number == known.setdefault(value, len(known))
    assert distinct.count == len(known)
