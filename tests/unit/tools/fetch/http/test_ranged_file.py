"""A remote file is read at any offset with the right bytes, few requests and bounded memory."""

from __future__ import annotations

import io
import random
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from framestream.tools.fetch.base import FetchError
from framestream.tools.fetch.http.client import HttpClient
from framestream.tools.fetch.http.ranged_file import BLOCK, CACHED, READ_AHEAD, HttpFile
from framestream.tools.fetch.http.response import RemoteFileInfo
from tests.helpers.servers.web_server import QUICK, turns

DATA = random.Random(0).randbytes(20 << 20)


@pytest.fixture
def remote(server):
    server.routes["/file"] = lambda request: request.serve(DATA)
    return HttpFile.open(HttpClient(QUICK), server.url + "/file", "file")


class Memory:
    """Replace the client and count its requests."""

    def __init__(self, data):
        self.data, self.asked = data, []

    def read(self, url, location, offset, size, expected):
        assert offset >= 0 and offset + size <= len(self.data) and size > 0
        self.asked.append((offset, size))
        return self.data[offset : offset + size], RemoteFileInfo(len(self.data), '"1"', "", True)


@given(
    size=st.integers(0, 3 * BLOCK + 5),
    reads=st.lists(st.tuples(st.integers(0, 3 * BLOCK + 9), st.integers(0, 2 * BLOCK)), max_size=12),
)
def test_reads_are_slices_and_nothing_is_asked_for_twice(size, reads):
    data = DATA[:size]
    memory = Memory(data)
    remote = HttpFile(memory, lambda: "", "x", size, "")
    for offset, count in reads:
        assert remote.read(offset, count) == data[offset : offset + count]
    blocks = [
        number for start, length in memory.asked for number in range(start // BLOCK, -(-(start + length) // BLOCK))
    ]
    assert len(blocks) == len(set(blocks))


def test_threads_share_a_file():
    """Eight threads read more than the cache holds at random offsets; one reads from start to end."""
    remote = HttpFile(Memory(DATA), lambda: "", "x", len(DATA), "")

    def read(seed):
        offsets = random.Random(seed)
        for step in range(400):
            offset = step * 50_000 if seed == 0 else offsets.randrange(len(DATA))
            size = offsets.randrange(BLOCK)
            assert remote.read(offset, size) == DATA[offset : offset + size]

    switching = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(read, range(8)))
    finally:
        sys.setswitchinterval(switching)
    assert len(remote._blocks) <= CACHED // BLOCK


def test_reading_forwards_asks_for_more_and_more():
    memory = Memory(DATA)
    remote = HttpFile(memory, lambda: "", "x", len(DATA), "")
    got = b"".join(remote.read(offset, 10_000) for offset in range(0, len(DATA), 10_000))
    assert got == DATA
    sizes = [size for _, size in memory.asked]
    assert len(sizes) < 40 and READ_AHEAD <= max(sizes) <= READ_AHEAD + 2 * BLOCK
    assert sum(sizes) == len(DATA)


def test_reading_here_and_there_asks_for_little():
    memory = Memory(DATA)
    remote = HttpFile(memory, lambda: "", "x", len(DATA), "")
    offsets = random.Random(1).sample(range(0, len(DATA) - 1000, 5 * BLOCK), 40)
    for offset in offsets:
        assert remote.read(offset, 1000) == DATA[offset : offset + 1000]
    assert all(size <= 2 * BLOCK for _, size in memory.asked)


def test_what_is_kept_is_bounded_and_large_reads_go_past_it():
    memory = Memory(DATA)
    remote = HttpFile(memory, lambda: "", "x", len(DATA), "")
    assert remote.read(5, len(DATA)) == DATA[5:] and memory.asked == [(5, len(DATA) - 5)]
    for offset in range(0, len(DATA), BLOCK):
        remote.read(offset, 1)
        assert sum(map(len, remote._blocks.values())) <= CACHED
    assert remote.read(0, CACHED // 2) == DATA[: CACHED // 2]


def test_a_zip_on_a_server_is_read_by_a_few_requests(server):
    text = {f"{number}.txt": DATA[number * 1000 :][:3000] for number in range(200)}
    stored = io.BytesIO()
    with zipfile.ZipFile(stored, "w") as made:
        for name, body in text.items():
            made.writestr(name, body)
    server.routes["/file"] = lambda request: request.serve(stored.getvalue())
    remote = HttpFile.open(HttpClient(QUICK), server.url + "/file", "file")

    class File(io.RawIOBase):
        position = 0
        seekable = readable = lambda self: True

        def seek(self, offset, whence=0):
            self.position = offset + (0, self.position, remote.size)[whence]
            return self.position

        def tell(self):
            return self.position

        def readinto(self, buffer):
            data = remote.read(self.position, len(buffer))
            buffer[: len(data)] = data
            self.position += len(data)
            return len(data)

    with zipfile.ZipFile(File()) as opened:
        assert {name: opened.read(name) for name in opened.namelist()} == text
    assert len(server.asked) < 20


def test_servers_without_ranges_and_files_that_change(server, remote):
    assert remote.size == len(DATA) and remote.read(len(DATA) - 3, 10) == DATA[-3:]
    server.routes["/file"] = lambda request: request.serve(DATA[::-1], ETag='"two"')
    with pytest.raises(FetchError, match="changed") as error:
        remote.read(0, 10)
    assert error.value.reason == "bad_checksum"
    server.routes["/file"] = turns(lambda request: request.answer(503), lambda request: request.answer(body=DATA))
    with pytest.raises(FetchError, match="dir:PATH") as error:
        HttpFile.open(HttpClient(QUICK), server.url + "/file", "file")
    assert error.value.reason == "unsupported"
    server.routes["/file"] = lambda request: request.serve(b"")
    assert HttpFile.open(HttpClient(QUICK), server.url + "/file", "file").read(0, 5) == b""
    with pytest.raises(FetchError) as error:
        HttpFile.open(HttpClient(QUICK), server.url + "/none", "file")
    assert error.value.reason == "missing_file"


def test_identity_follows_the_contents(server, remote):
    assert HttpFile.open(HttpClient(QUICK), server.url + "/file", "file").identity == remote.identity
    server.routes["/file"] = lambda request: request.serve(DATA, ETag='"two"')
    assert HttpFile.open(HttpClient(QUICK), server.url + "/file", "file").identity != remote.identity
