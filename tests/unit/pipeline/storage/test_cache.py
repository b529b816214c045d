"""The cache of ranges: its bound, what goes first, and processes that are killed while they write it."""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest

from framestream.pipeline.storage.cache import RangeCache

BOUND = 200_000


def content(key: int) -> bytes:
    """What belongs to a key; 1 to 30 kB."""
    return random.Random(key).randbytes(1000 * (1 + key % 30))


def stored(folder: Path) -> int:
    """Bytes of all kept files."""
    total = 0
    for path in folder.glob("*/*"):
        with contextlib.suppress(FileNotFoundError):  # it has gone meanwhile
            total += path.stat().st_size
    return total


def test_cached_ranges_return_and_the_oldest_are_evicted(tmp_path):
    cache = RangeCache(tmp_path / "ranges", BOUND)
    for key in range(40):
        assert cache.get(str(key)) is None
        cache.put(str(key), [content(key)[:500], memoryview(content(key))[500:]])
        assert cache.get(str(key)) == content(key)
        if cache.get("0") is not None:  # in use
            assert cache.get("0") == content(0)
        assert stored(tmp_path / "ranges") <= BOUND
    there = [key for key in range(40) if cache.get(str(key)) is not None]
    assert 0 in there and there[1:] == list(range(there[1], 40)), "others than the least recently used have gone"
    assert stored(tmp_path / "ranges") > BOUND / 2


def test_what_is_larger_than_the_bound_is_not_kept(tmp_path):
    cache = RangeCache(tmp_path / "ranges", BOUND)
    cache.put("large", [bytes(BOUND)])
    assert cache.get("large") is None
    cache.put("exact", [bytes(BOUND - 4)])
    assert cache.get("exact") == bytes(BOUND - 4) and stored(tmp_path / "ranges") == BOUND


def test_the_file_of_another_key_is_a_miss(tmp_path):
    cache = RangeCache(tmp_path / "ranges", BOUND)
    cache.put("a", [content(7)])
    [path] = (tmp_path / "ranges").glob("*/*")
    other = path.read_bytes()
    cache.put("b", [content(8)])
    [second] = set((tmp_path / "ranges").glob("*/*")) - {path}
    second.write_bytes(other)
    assert cache.get("b") is None and not second.exists()
    assert cache.get("a") == content(7)


def test_damage_is_a_miss(tmp_path):
    cache = RangeCache(tmp_path / "ranges", BOUND)
    for damage in (lambda data: data[:-1], lambda data: data[:9] + b"?" + data[10:], lambda data: b""):
        cache.put("a", [content(7)])
        [path] = (tmp_path / "ranges").glob("*/*")
        path.write_bytes(damage(path.read_bytes()))
        assert cache.get("a") is None
        assert not path.exists()


@pytest.mark.parametrize("count", [b"", b"x", b"99999999999"])
def test_a_count_that_is_lost_or_wrong_is_made_anew(tmp_path, count):
    folder = tmp_path / "ranges"
    cache = RangeCache(folder, BOUND)
    for key in range(20):
        cache.put(str(key), [content(key)])
    (folder / "total").write_bytes(count)
    for key in range(20, 60):
        cache.put(str(key), [content(key)])
        assert stored(folder) <= BOUND
    assert int((folder / "total").read_bytes()) == stored(folder)


def test_a_folder_that_cannot_be_written_costs_one_warning(tmp_path):
    (tmp_path / "file").touch()
    cache = RangeCache(tmp_path / "file" / "ranges", BOUND)
    with pytest.warns(UserWarning, match="loader.cache.*Not a directory") as found:
        for key in ("a", "b"):
            cache.put(key, [b"data"])
            assert cache.get(key) is None
    assert len(found) == 1


def write(folder: Path, seed: int) -> None:
    cache, rng = RangeCache(folder, BOUND), random.Random(seed)
    while True:
        key = rng.randrange(200)
        found = cache.get(str(key))
        if found is not None and found != content(key):
            os._exit(3)
        if found is None:
            cache.put(str(key), [content(key)])


def test_killed_writers_leave_a_sound_cache_within_its_bound(tmp_path):
    folder, rng, context = tmp_path / "ranges", random.Random(0), multiprocessing.get_context("fork")
    running = [context.Process(target=write, args=(folder, seed), daemon=True) for seed in range(3)]
    for process in running:
        process.start()
    for seed in range(3, 18):
        time.sleep(rng.uniform(0.02, 0.15))
        victim = running.pop(0)
        os.kill(victim.pid, signal.SIGKILL)
        victim.join()
        assert victim.exitcode == -signal.SIGKILL, "a reader was given other bytes than were put"
        with open(folder / "lock", "rb") as lock:  # else files come and go while they are counted
            fcntl.flock(lock, fcntl.LOCK_EX)
            assert stored(folder) <= BOUND
        running.append(context.Process(target=write, args=(folder, seed), daemon=True))
        running[-1].start()
    for process in running:
        process.kill()
        process.join()
    cache = RangeCache(folder, BOUND)
    assert sum(cache.get(str(key)) == content(key) for key in range(200)) > 3
    cache.put("last", [b"data"])
    assert cache.get("last") == b"data" and stored(folder) <= BOUND
    assert not list(folder.glob("*/*.tmp")) and len(list(folder.glob("writing*"))) <= 1
