"""The disk cache has the right contents, holds its limit, and removes what killed processes leave."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from framestream.tools.fetch.base import FetchError
from framestream.tools.fetch.disk_cache import ABANDONED_AFTER, CachedSource, DiskCache, DiskFullError
from tests.helpers.media.cached_files import Made, contents, read, wanted


def used(folder):
    return sum(item.stat().st_size for item in (folder / "files").rglob("*") if item.is_file())


def left(folder):
    return list((folder / "scratch").iterdir())


@given(
    max_bytes=st.integers(0, 4000),
    steps=st.lists(st.tuples(st.integers(0, 8), st.booleans(), st.integers(0, 1)), max_size=25),
)
def test_contents_are_right_and_the_limit_holds(tmp_path_factory, max_bytes, steps):
    folder = tmp_path_factory.mktemp("cache")
    sizes = {str(number): number * 300 for number in range(9)}
    caches = [DiskCache(folder, max_bytes), DiskCache(folder, max_bytes)]
    for number, tree, which in steps:
        source = CachedSource(Made(sizes), caches[which])
        assert read(source, caches[which], str(number), tree) == wanted(str(number), sizes[str(number)], tree)
        assert used(folder) <= max_bytes + max(sizes.values()), "one process is ahead by one file at most"
        assert caches[which].trim() == used(folder) <= max_bytes
    assert not left(folder)


def test_cached_files_are_not_fetched_again_unless_they_changed(tmp_path):
    made, cache = Made({"a": 10, "b": 30}), DiskCache(tmp_path, 1000)
    source = CachedSource(made, cache)
    for _ in range(3):
        assert read(source, cache, "a") == wanted("a", 10)
        assert read(source, cache, "b", tree=True) == wanted("b", 30, tree=True)
    assert made.fetched == ["a", "b"]
    assert read(CachedSource(Made({"a": 10}), DiskCache(tmp_path, 1000)), cache, "a") == wanted("a", 10)
    made.version = "two"
    read(source, cache, "a")
    assert made.fetched == ["a", "b", "a"]
    with pytest.raises(FetchError):
        read(source, cache, "c")
    assert not left(tmp_path)


def test_what_was_used_longest_ago_goes_first(tmp_path):
    made, cache = Made(dict.fromkeys("abcd", 300)), DiskCache(tmp_path, 1000)
    source = CachedSource(made, cache)
    for moment, path in enumerate("abcad"):
        read(source, cache, path)
        for shelf in (tmp_path / "files").iterdir():
            for item in shelf.iterdir():  # as if the last use were a second later than all before
                if item.stat().st_mtime > 1e9:
                    os.utime(item, (moment, moment))
    made.fetched.clear()
    for path in "da":
        read(source, cache, path)
    assert made.fetched == []
    read(source, cache, "b")
    assert made.fetched == ["b"]


def test_evicting_takes_nothing_away_from_a_reader(tmp_path):
    cache = DiskCache(tmp_path, 1000)
    source = CachedSource(Made({"a": 500, "b": 600}), cache)
    read(source, cache, "a")
    read(source, cache, "b", tree=True)
    with cache.scratch() as one, cache.scratch() as two:
        file, folder = source.fetch("a", one), source.fetch("b", two, tree=True)
        cache.clear()
        assert used(tmp_path) == 0
        assert file.read_bytes() == contents("a", 500) and len(list(folder.iterdir())) == 3


def test_too_large_for_the_cache_goes_past_it(tmp_path):
    made, cache = Made({"a": 1001, "b": 10}), DiskCache(tmp_path, 1000)
    source = CachedSource(made, cache)
    for path in "baa":
        read(source, cache, path)
    assert made.fetched == ["b", "a", "a"] and used(tmp_path) == 10


def test_a_file_system_without_links(tmp_path, monkeypatch):
    def no_link(*_, **__):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", no_link)
    made, cache = Made({"a": 1000}), DiskCache(tmp_path, 1000)
    for _ in range(2):
        assert read(CachedSource(made, cache), cache, "a") == contents("a", 1000)
    assert made.fetched == ["a"]


def test_a_full_disk_costs_the_cache_and_then_ends_in_one_line(tmp_path):
    class Full(Made):
        def fetch(self, path, scratch, tree=False):
            found = super().fetch(path, scratch, tree)
            if path == "b" and (used(tmp_path) or self.version):
                raise OSError(errno.ENOSPC, "No space left on device")
            return found

    made, cache = Full({"a": 100, "b": 100}), DiskCache(tmp_path, 1000)
    source = CachedSource(made, cache)
    read(source, cache, "a")
    assert read(source, cache, "b") == contents("b", 100)
    made.version = "full for ever"
    with pytest.raises(DiskFullError, match="no space left to fetch made: b; free some") as error:
        read(source, cache, "b")
    assert "\n" not in str(error.value) and not left(tmp_path)


def test_a_full_disk_caches_nothing(tmp_path, monkeypatch):
    cache = DiskCache(tmp_path, 1000)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    assert read(CachedSource(Made({"a": 100}), cache), cache, "a") == contents("a", 100)
    assert used(tmp_path) == 0 and not left(tmp_path)


PROCESS = """
import random, sys
from pathlib import Path
from tests.helpers.media.cached_files import Made, read, wanted
from framestream.tools.fetch.disk_cache import CachedSource, DiskCache

folder, seed, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
cache, draw = DiskCache(folder, 60_000), random.Random(seed)
sizes = {str(number): number * 1000 for number in range(20)}
source = CachedSource(Made(sizes), cache)
print("begun", flush=True)
for _ in range(count):
    path, tree = str(draw.randrange(20)), draw.random() < 0.5
    assert read(source, cache, path, tree) == wanted(path, sizes[path], tree)
"""


def start(folder, seed, count):
    return subprocess.Popen([sys.executable, "-c", PROCESS, str(folder), str(seed), str(count)], stdout=subprocess.PIPE)


def test_processes_share_a_cache(tmp_path):
    """Three processes check every file they read, in a cache that holds a third of their files."""
    processes = [start(tmp_path, seed, 70) for seed in range(3)]
    assert [process.wait() for process in processes] == [0] * 3
    for process in processes:
        process.stdout.close()
    assert DiskCache(tmp_path, 60_000).trim() == used(tmp_path) <= 60_000
    assert not left(tmp_path)


def test_killed_processes_leave_what_is_swept(tmp_path):
    swept = 0
    for seed in range(4):
        process = start(tmp_path, seed, 1_000_000)
        process.stdout.readline()
        time.sleep(random.Random(seed).random() / 5)
        process.kill()
        process.wait()
        process.stdout.close()
        swept += len(left(tmp_path))
        DiskCache(tmp_path, 60_000)
        assert not left(tmp_path)
    assert swept, "no process was killed on its way"
    made, cache = (
        Made({str(number): number * 1000 for number in range(20)}),
        DiskCache(tmp_path, 1_000_000),
    )  # room for all
    for number in range(20):
        for tree in (False, True):
            assert read(CachedSource(made, cache), cache, str(number), tree) == wanted(str(number), number * 1000, tree)
    assert len(made.fetched) < 40, "nothing was cached"


def test_scratch_folders_of_others_are_swept_when_they_are_old(tmp_path):
    cache = DiskCache(tmp_path, 1000)
    for name, age in (("elsewhere-1-a", 0), ("elsewhere-1-b", ABANDONED_AFTER + 60)):
        (tmp_path / "scratch" / name).mkdir()
        os.utime(tmp_path / "scratch" / name, (time.time() - age,) * 2)
    with cache.scratch() as mine:
        cache.remove_abandoned()
        assert {item.name for item in left(tmp_path)} == {"elsewhere-1-a", mine.name}


class Together(Made):
    """Block until ``count`` threads have asked for the identity; allow one fetch at a time."""

    def __init__(self, sizes, count):
        super().__init__(sizes)
        self._asked, self._alone = threading.Barrier(count), threading.Lock()

    def identity(self, path, tree=False):
        self._asked.wait(60)
        return super().identity(path, tree)

    def fetch(self, path, scratch, tree=False):
        assert self._alone.acquire(blocking=False), "two threads fetch at once"
        try:
            time.sleep(0.05)
            return super().fetch(path, scratch, tree)
        finally:
            self._alone.release()


def test_threads_that_want_one_file_fetch_it_once(tmp_path):
    cache = DiskCache(tmp_path, 10_000)
    made = Together({"a": 1000}, 4)
    source = CachedSource(made, cache)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: read(source, cache, "a"), range(4))) == [contents("a", 1000)] * 4
        assert made.fetched == ["a"] and not left(tmp_path)
        failed = [pool.submit(read, source, cache, "b") for _ in range(4)]
        assert [future.exception().reason for future in failed] == ["missing_file"] * 4
    assert made.fetched.count("b") < 4, "each has waited for another, and failed with it"


def test_keys_are_told_apart(tmp_path):
    cache = DiskCache(tmp_path, 1000)
    for key in ("a\0b", "a", "ä\ud800"):
        with cache.scratch() as scratch:
            (scratch / "x").write_bytes(hashlib.sha256(ascii(key).encode()).digest())
            cache.put(key, scratch / "x")
    for key in ("a\0b", "a", "ä\ud800"):
        with cache.scratch() as scratch:
            assert cache.get(key, scratch).read_bytes() == hashlib.sha256(ascii(key).encode()).digest()
    with cache.scratch() as scratch:
        assert cache.get("b", scratch) is None and not list(scratch.iterdir())


@pytest.mark.parametrize("tree", [False, True])
def test_damaged_files_are_fetched_again(tmp_path, caplog, tree):
    made, cache = Made({"a": 30}), DiskCache(tmp_path, 1000)
    source = CachedSource(made, cache)
    for damage in (lambda path: path.write_bytes(b"x" * path.stat().st_size), lambda path: path.write_bytes(b"")):
        assert read(source, cache, "a", tree) == wanted("a", 30, tree)
        file = next(path for path in (tmp_path / "files").rglob("*") if path.is_file() and path.stat().st_size)
        damage(file)
        caplog.clear()
        assert read(source, cache, "a", tree) == wanted("a", 30, tree)
        (line,) = caplog.messages
        assert "damaged (its digest differs); it is fetched again" in line
    assert len(made.fetched) == 3


def test_files_without_digests_are_fetched_again(tmp_path, caplog):
    made, cache = Made({"a": 30, "b": 30}), DiskCache(tmp_path, 1000)
    source = CachedSource(made, cache)
    for path in "ab":
        read(source, cache, path)
    for mark in (tmp_path / "files").rglob(".xxh3-*"):  # as older versions wrote them
        mark.unlink()
    for _ in range(2):
        assert [read(source, cache, path) for path in "ab"] == [wanted("a", 30), wanted("b", 30)]
    assert made.fetched == ["a", "b", "a", "b"]
    (line,) = caplog.messages
    assert "without digests, as in older versions, are fetched again" in line
