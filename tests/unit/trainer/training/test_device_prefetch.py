"""Rows are fetched and copied ahead, and a row ahead changes neither the state nor the order of errors."""

from __future__ import annotations

import contextlib
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch

from framestream.pipeline import build_loader
from framestream.pipeline.loading.batch import Batch
from framestream.trainer.training import device_prefetch
from framestream.trainer.training.device_prefetch import DevicePrefetcher
from tests.helpers.corpora.small_root import Root, manifest, turns
from tests.helpers.model.rows import dialogue, pack

CPU = torch.device("cpu")


def test_a_run_resumed_at_any_row_goes_on_with_the_next_one(tmp_path):
    """The row ahead may be the last of its global batch, which the loader then counts as returned."""
    made = Root(tmp_path)
    for number in range(7):
        made.dialogue(turns("<image>\nWhich?", f"Number {number}."), [made.still(20, 20)])
    settings = manifest(made.write(), batching={"global_batch": 2, "row_multiple": 1})
    whole = [batch.keys for batch in build_loader(settings)]
    steps = [batch.step for batch in build_loader(settings) if batch.is_last]
    assert len(steps) == 4
    for stop in steps:
        loader = build_loader(settings)
        rows, seen = DevicePrefetcher(iter(loader), loader.state_dict, CPU), []
        for row, _ in rows:
            seen.append(row.keys)
            if row.is_last and row.step == stop:
                break
        if rows._ahead is not None:
            rows._ahead.exception()  # the row ahead was taken from the loader
        again = build_loader(settings)
        again.load_state_dict(rows.state_dict())
        rows.close()
        rest = [] if stop == steps[-1] else [batch.keys for batch in again]
        assert seen + rest == whole


def test_an_error_ahead_waits_for_the_rows_before_it():
    def fail():
        yield pack([dialogue(0)])
        yield pack([dialogue(1)])
        raise RuntimeError("no more")

    rows = DevicePrefetcher(fail(), dict, CPU)
    for _ in range(2):
        row, on_device = next(rows)
        rows._ahead.exception()  # the thread is done
        assert row.input_ids is on_device.input_ids  # no copy on the CPU
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no more"):
            next(rows)


def test_rows_end_and_are_closed():
    closed = []

    def two():
        try:
            yield from (pack([dialogue(0)]), pack([dialogue(1)]))
        finally:
            closed.append(True)

    assert len(list(DevicePrefetcher(two(), dict, CPU))) == 2 and closed
    closed.clear()
    rows = DevicePrefetcher(two(), dict, CPU)
    next(rows)
    rows.close()
    assert closed


class Accelerator:
    """A device whose copies take until :attr:`done`; notes what happens on which stream."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.done = False
        self.active = "compute"
        outer = self

        class Event:
            def record(self, stream) -> None:
                outer.notes.append(f"event on {stream}")

            def query(self) -> bool:
                return outer.done

        self.Event = Event

    def is_synchronized_device(self) -> bool:
        return False

    def set_device(self, index: int) -> None: ...

    def Stream(self) -> str:  # noqa: N802
        return "copies"

    @contextlib.contextmanager
    def stream(self, stream: str):
        self.active = stream
        yield
        self.active = "compute"

    def current_stream(self):
        return SimpleNamespace(wait_event=lambda event: self.notes.append("compute waits"))


def test_a_copy_has_a_stream_of_its_own_and_keeps_its_source(monkeypatch):
    device, pinned = Accelerator(), []

    def pin(row: Batch) -> Batch:
        copy = row._mapped(torch.clone)
        pinned.append(weakref.ref(copy.clips))
        device.notes.append("pinned")
        return copy

    def to(row: Batch, where, non_blocking=True) -> Batch:
        assert non_blocking and row.clips is pinned[-1]()
        device.notes.append(f"copy on {device.active}")
        return row._mapped(torch.clone)

    recorded = []
    monkeypatch.setattr(device_prefetch, "get_accelerator", lambda: device)
    monkeypatch.setattr(Batch, "pin_memory", pin)
    monkeypatch.setattr(Batch, "to", to)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: recorded.append(tensor), raising=False)
    rows = DevicePrefetcher(iter(pack([dialogue(n, clips=1)]) for n in range(3)), dict, torch.device("cuda:0"))
    row, on_device = next(rows)
    rows._ahead.exception()  # wait for the second row
    copy = ["pinned", "copy on copies", "event on copies"]
    assert sorted(device.notes) == sorted([*copy, "compute waits", *copy]) and device.notes[:3] == copy
    assert {id(tensor) for tensor in recorded} == {id(tensor) for tensor in on_device.tensors().values()}
    del row, on_device
    recorded.clear()
    gc.collect()
    assert [source() is not None for source in pinned] == [True, True]  # neither copy has ended
    device.done = True
    next(rows)
    rows._ahead.exception()
    gc.collect()
    assert [source() is not None for source in pinned] == [False, False, True]
    rows.close()
