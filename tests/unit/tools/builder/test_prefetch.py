"""Prefetched files come in order, a limited number at once, each in a folder that is removed."""

from __future__ import annotations

import threading

import pytest

from framestream.tools.builder.prefetch import PREFETCH_FILES, prefetch


class Fetcher:
    """Writes the number of the item into a file; counts how many are under way at once."""

    def __init__(self) -> None:
        self.begun, self.now, self.most, self._lock = [], 0, 0, threading.Lock()
        self.full = threading.Event()  # so many are under way as there may be

    def __call__(self, item, folder):
        with self._lock:
            self.begun.append(item)
            self.now += 1
            self.most = max(self.most, self.now)
            if self.now == PREFETCH_FILES:
                self.full.set()
        self.full.wait(1)
        assert list(folder.iterdir()) == []
        (folder / "file").write_text(str(item))
        with self._lock:
            self.now -= 1
        if item == 5:
            raise ValueError("five")
        return folder / "file"


def test_files_come_in_order_and_go(tmp_path):
    fetch, before = Fetcher(), None
    for number, (item, file) in enumerate(prefetch(range(12), fetch, tmp_path / "scratch")):
        assert item == number and (before is None or not before.exists())
        if item == 5:
            with pytest.raises(ValueError, match="five"):
                file.result()
            continue
        before = file.result()
        assert before.read_text() == str(item)
        assert len(list((tmp_path / "scratch").iterdir())) <= PREFETCH_FILES + 1
    assert fetch.most == PREFETCH_FILES and sorted(fetch.begun) == list(range(12))
    assert list(tmp_path.iterdir()) == []


def test_one_at_a_time(tmp_path):
    fetch = Fetcher()
    fetch.full.set()
    for item, file in prefetch(range(5), fetch, tmp_path / "scratch", ahead=1):
        file.result()
        assert fetch.begun == list(range(item + 1)) and fetch.now == 0, "nothing is under way while an item is at work"


def test_nothing_is_left_of_what_is_not_taken(tmp_path):
    fetch = Fetcher()
    files = prefetch(range(50), fetch, tmp_path / "scratch")
    next(files)
    files.close()
    assert list(tmp_path.iterdir()) == [] and len(fetch.begun) <= PREFETCH_FILES + 1
