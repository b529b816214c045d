"""Availability checks: each file is checked once, in the right thread, and failures are reported."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from framestream.tools.builder.availability import THREADS, AvailabilityChecker
from framestream.tools.fetch import root_map as roots
from framestream.tools.fetch.base import UNKNOWN, FetchError
from framestream.tools.fetch.root_map import ResolvedLocation


class Far:
    """Files of somewhere else, by path; counts what is asked, and how many are asked at once."""

    origin = "url:https://a.org/{path}"

    def __init__(self, files: dict[str, int | FetchError]) -> None:
        self.files, self.asked = files, []
        self.most, self._now, self._lock = 0, 0, threading.Lock()

    def find(self, path: str, tree: bool = False) -> int | None:
        with self._lock:
            self.asked.append((path, tree))
            self._now += 1
            self.most = max(self.most, self._now)
        time.sleep(0.002)
        with self._lock:
            self._now -= 1
        size = self.files.get(path)
        if isinstance(size, FetchError):
            raise size
        return size


@pytest.fixture
def far(monkeypatch):
    source = Far({"a.mp4": 7, "b.mp4": UNKNOWN, "c.mp4": FetchError("denied", "c.mp4", "not for you")})
    monkeypatch.setattr(roots, "open_source", lambda given, limits, work: source)
    return source


PLACE = ResolvedLocation(None, Far.origin, "", "far", Far.origin)


def test_each_file_is_asked_for_once_and_each_answer_remembered(far):
    names = ["a.mp4", "b.mp4", "c.mp4", "d.mp4", "a.mp4"]
    with AvailabilityChecker() as checker:
        found = checker.check([(PLACE, name, False) for name in names])
        again = checker.check([(PLACE, name, False) for name in names])
    assert sorted(far.asked) == [(name, False) for name in names[:4]]
    assert [(item.size, item.is_new, item.reason) for item in found] == [
        (7, True, ""),
        (UNKNOWN, True, ""),
        (UNKNOWN, True, "denied"),
        (UNKNOWN, True, "missing_file"),
        (7, False, ""),
    ]
    assert "not for you" in found[2].message and "{path} d.mp4" in found[3].message
    assert [(item.size, item.reason) for item in again] == [(item.size, item.reason) for item in found]
    assert not any(item.is_new for item in again) and "c.mp4" in again[2].message


def test_a_folder_of_frames_is_not_the_file_of_its_name(far):
    with AvailabilityChecker() as checker:
        checker.check([(PLACE, "a.mp4", False), (PLACE, "a.mp4", True)])
    assert sorted(far.asked) == [("a.mp4", False), ("a.mp4", True)]


def test_places_are_opened_before_many_threads_ask(far):
    far.files = {str(number): number for number in range(200)}
    with AvailabilityChecker() as checker:
        found = checker.check([(PLACE, name, False) for name in far.files])
    assert far.asked[0] == ("0", False) and [item.size for item in found] == list(range(200))
    assert 1 < far.most <= THREADS


def test_a_silent_host_costs_a_bounded_number_of_requests(far):
    far.files = {str(number): FetchError("unreachable", number, "no route") for number in range(500)}
    with AvailabilityChecker() as checker:
        found = checker.check([(PLACE, name, False) for name in far.files])
    assert {item.reason for item in found} == {"unreachable"} and len(far.asked) <= 2 * THREADS


def test_local_folders(tmp_path: Path):
    (tmp_path / "frames").mkdir()
    for number in range(3):
        (tmp_path / "frames" / f"{number}.jpg").write_bytes(b"1234")
    (tmp_path / "a.mp4").write_bytes(b"12345")
    (tmp_path / "out.mp4").symlink_to("/etc/hostname")
    place = ResolvedLocation(tmp_path, f"dir:{tmp_path}", "", "root", f"dir:{tmp_path}")
    with AvailabilityChecker() as checker:
        wanted = [("a.mp4", False), ("frames", True), ("frames", False), ("out.mp4", False), ("b.mp4", False)]
        found = checker.check([(place, *item) for item in wanted])
    assert [item.size for item in found] == [5, 12, UNKNOWN, UNKNOWN, UNKNOWN]
    assert [item.reason for item in found] == ["", "", "missing_file", "outside_root", "missing_file"]


def test_a_place_that_is_not_known_is_not_asked():
    with AvailabilityChecker() as checker:
        found = checker.check([(ResolvedLocation(None, "https://a.org", "map it"), "a.mp4", False)])
    assert (found[0].reason, "map it" in found[0].message) == ("unresolved", True)


def test_a_map_that_cannot_be_read_is_told():
    with AvailabilityChecker() as checker:
        found = checker.check([(ResolvedLocation(None, "ftp", "", "ftp", "ftp://a.org"), "a.mp4", False)])
    assert found[0].reason == "unresolved" and "not a known kind of location" in found[0].message
