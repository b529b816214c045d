"""Parts are read as one file."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from framestream.tools.fetch.archives.multipart import MultipartFile
from tests.helpers.media.memory_files import Memory


@given(st.lists(st.binary(max_size=20), min_size=1, max_size=6), st.integers(0, 130), st.integers(0, 130))
def test_any_range_is_that_of_the_whole(parts, offset, size):
    data = b"".join(parts)
    joined = MultipartFile([Memory(part) for part in parts])
    assert joined.size == len(data)
    assert joined.read(offset, size) == data[offset : offset + size]


def test_only_the_parts_that_are_needed_are_read():
    parts = [Memory(bytes(100), str(number)) for number in range(5)]
    assert len(MultipartFile(parts).read(250, 100)) == 100
    assert [part.reads for part in parts] == [[], [], [(50, 50)], [(0, 50)], []]


def test_a_part_that_is_shorter_than_it_says_ends_the_file():
    short = Memory(bytes(10))
    short.size = 20
    assert len(MultipartFile([short, Memory(bytes(10))]).read(0, 30)) == 10


def test_identity_and_order():
    one, two = Memory(b"one", "a"), Memory(b"two", "b")
    assert MultipartFile([one, two]).identity == MultipartFile([Memory(b"one", "a"), Memory(b"two", "b")]).identity
    assert (
        len({MultipartFile(parts).identity for parts in ([one, two], [two, one], [one], [one, Memory(b"2wo", "b")])})
        == 4
    )
    assert MultipartFile([one, two]).name == "a to b"
    with pytest.raises(ValueError, match="no parts"):
        MultipartFile([])
