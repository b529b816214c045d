"""Tasks in threads: every image once, faults alone, stuck reads given up."""

from __future__ import annotations

import itertools
import queue
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from framestream.pipeline.loading import decode_threads as decoders
from framestream.pipeline.loading.decode_threads import (
    IMAGES_PER_TASK,
    DecodeItem,
    DecodeTask,
    ThreadDecoder,
    split_tasks,
)
from framestream.pipeline.shards.media_view import MediaView


class Numbers:
    """A source whose pixels are numbers. Some media are bad, and some block until they are let go."""

    def __init__(self, bad: tuple[int, ...] = (), stuck: tuple[int, ...] = (), room: int = 0) -> None:
        self.bad, self.stuck, self.go = bad, stuck, threading.Event()
        self.room, self.calls = room, []  # media that are taken ahead, and what was asked for in which order

    def prefetch(self, view: MediaView, start: int, count: int) -> bool:
        if self.room == 0:
            return False
        self.calls.append(("ahead", view.row, start, count))
        if view.row in self.bad:
            raise ValueError("is bad")
        self.room -= 1
        return True

    def read_frames(self, view: MediaView, start: int, out: np.ndarray) -> None:
        self.calls.append(("read", view.row, start, len(out)))
        self.room += ("ahead", *self.calls[-1][1:]) in self.calls
        if view.row in self.stuck:
            self.go.wait(60)
        if view.row in self.bad:
            raise ValueError("is\nbad")
        out[:] = view.frame_indices[start : start + len(out), None, None, None]

    def read_image(self, view: MediaView, out: np.ndarray) -> None:
        self.read_frames(view, 0, out)

    def describe(self, view: MediaView) -> str:
        return f"item {view.row}"


def items(*counts: int) -> list[DecodeItem]:
    """Videos of n frames, or an image of -n tiles; the pixels of frame or tile k are k."""
    made, at = [], 0
    for row, count in enumerate(counts):
        kind = "video" if count > 0 else "image"
        numbers = np.arange(at, at + abs(count))
        made.append(DecodeItem(MediaView(row, kind, numbers, "", 0, 0), 0, at, abs(count), row))
        at += abs(count)
    return made


def decoded(threads: ThreadDecoder, made: list[DecodeItem]) -> tuple[np.ndarray, list[DecodeTask]]:
    pixels = np.full((sum(item.count for item in made), 1, 1, 1), 255, dtype=np.uint8)
    done: queue.Queue[DecodeTask] = queue.Queue()
    tasks = split_tasks(made, pixels, None, done.put)
    for task in tasks:
        threads.submit(task)
    ended = 0
    while ended < len(tasks):
        threads.raise_if_failed()
        try:
            done.get(timeout=0.05)
            ended += 1
        except queue.Empty:
            pass
    assert done.empty()
    return pixels.ravel(), tasks


@given(st.lists(st.integers(1, 100) | st.integers(-80, -1), max_size=12))
def test_tasks_hold_every_image_once_and_small_media_together(counts):
    made = items(*counts)
    tasks = split_tasks(made, np.empty((0, 1, 1, 1)), None, print)
    parts = [item for task in tasks for item in task.items]
    assert [p for item in parts for p in range(item.offset, item.offset + item.count)] == list(
        range(sum(map(abs, counts)))
    )
    assert all(part.offset - part.start == made[part.dialogue].offset for part in parts)
    for task in tasks:
        assert sum(item.count for item in task.items) <= IMAGES_PER_TASK or len(task.items) == 1
        assert all(item.count <= IMAGES_PER_TASK for item in task.items if item.view.kind == "video")
    for one, two in itertools.pairwise(tasks):
        assert sum(item.count for item in one.items) + two.items[0].count > IMAGES_PER_TASK


@pytest.mark.parametrize("count", [1, 3])
def test_an_item_that_cannot_be_read_fails_alone(count):
    threads = ThreadDecoder(Numbers(bad=(1,)), count, 60)
    pixels, tasks = decoded(threads, items(40, 5, -2, 7))
    threads.close()
    wanted = np.arange(54)
    wanted[40:45] = 255
    assert pixels.tolist() == wanted.tolist()
    failed = [(task.items[item].dialogue, reason) for task in tasks for item, reason in task.failed.items()]
    assert failed == [(1, "item 1: is bad")]


def test_a_stuck_read_is_given_up_and_the_rest_is_read(monkeypatch):
    monkeypatch.setattr(decoders, "GRACE", 0.2)
    source = Numbers(stuck=(0, 2))
    threads = ThreadDecoder(source, 1, 0.2)
    pixels, tasks = decoded(threads, items(3, 4, -2, 7))
    assert pixels.tolist() == [255] * 3 + [3, 4, 5, 6] + [255] * 2 + list(range(9, 16))
    assert tasks[0].failed == {
        0: "item 0: took longer than loader.read_timeout (0.2 s)",
        2: "item 2: took longer than loader.read_timeout (0.2 s)",
    }
    assert tasks[0].stuck
    left = [thread for thread in threading.enumerate() if thread.name == "decode"]
    source.go.set()  # what they read in the end changes no result, and they end
    again, more = decoded(threads, items(5, 5))
    assert again.tolist() == list(range(10)) and not more[0].failed and not more[0].stuck
    threads.close()
    for thread in left:
        thread.join(60)
        assert not thread.is_alive()
    assert tasks[0].failed.keys() == {0, 2} and tasks[0].next_item == 4


def test_a_fault_of_the_program_is_kept(monkeypatch):
    source = Numbers()
    monkeypatch.setattr(source, "read_frames", lambda *_: 1 / 0)
    threads = ThreadDecoder(source, 2, 60)
    _, tasks = decoded(threads, items(3, 3))
    threads.close()
    assert isinstance(tasks[0].error, ZeroDivisionError)


def test_the_next_items_are_requested_before_one_is_read():
    """One thread keeps as many on their way as the source takes, in order, and asks for none twice."""
    source = Numbers(bad=(2,), stuck=(0,), room=3)
    threads = ThreadDecoder(source, 1, 60)
    made = items(40, 4, 4, -2, 4, 4)
    pixels, done = np.zeros((58, 1, 1, 1), dtype=np.uint8), queue.Queue()
    for task in split_tasks(made, pixels, None, done.put):
        threads.submit(task)
    source.go.set()
    failed = [done.get(timeout=30).failed for _ in range(2)]
    threads.close()
    ahead = [call[1:] for call in source.calls if call[0] == "ahead"]
    read = [call[1:] for call in source.calls if call[0] == "read"]
    assert read == [(0, 0, 32), (0, 32, 8), (1, 0, 4), (2, 0, 4), (3, 0, 2), (4, 0, 4), (5, 0, 4)]
    assert ahead[-5:] == read[-5:] and len(set(ahead)) == len(ahead)
    assert all(source.calls.index(("ahead", *call)) < source.calls.index(("read", *call)) for call in ahead)
    assert source.calls.index(("ahead", 3, 0, 2)) < source.calls.index(("read", 1, 0, 4)), "not ahead of the thread"
    assert sum(map(len, failed)) == 1, "a fault ahead is not the reader's"
