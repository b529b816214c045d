"""Read-ahead makes few reads and transfers little that is not needed."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from framestream.tools.fetch.archives import readahead
from framestream.tools.fetch.archives.readahead import FIRST_BLOCK, MAX_READ, ReadAheadFile
from tests.helpers.media.memory_files import Memory

DATA = bytes(range(256)) * 8


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(-300, 2200), st.integers(0, 400))), st.integers(0, len(DATA) + 9)
)
def test_it_reads_like_a_file(steps, stop):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readahead, "FIRST_BLOCK", 16)
        patch.setattr(readahead, "MAX_GAP", 40)
        stream, plain = ReadAheadFile(Memory(DATA), stop), io.BytesIO(DATA)
        for whence, offset, size in steps:
            if offset + (0, plain.tell(), len(DATA))[whence] >= 0:
                assert stream.seek(offset, whence) == plain.seek(offset, whence)
            else:
                with pytest.raises(ValueError):
                    stream.seek(offset, whence)
            assert stream.read(size) == plain.read(size)
            assert stream.tell() == plain.tell()


def test_reading_on_end_takes_few_reads_and_jumping_moves_little():
    file = Memory(bytes(40 << 20))
    stream = ReadAheadFile(file)
    for offset in range(0, file.size, 100_000):
        stream.seek(offset)
        stream.read(512)
    assert len(file.reads) < 20 and max(size for _, size in file.reads) <= MAX_READ
    file.reads.clear()
    for offset in range(0, file.size, 4 << 20):
        stream.seek(offset)
        stream.read(512)
    assert file.moved == 10 * FIRST_BLOCK


def test_nothing_is_read_behind_the_stop_and_nothing_huge():
    file = Memory(bytes(1 << 20))
    ReadAheadFile(file, stop=1000).read(10)
    assert file.reads == [(0, 1000)]
    with pytest.raises(ValueError, match="8388609 bytes"):
        ReadAheadFile(file).read(MAX_READ + 1)
