"""The ledger of a run: one straight story, whatever was killed and done again."""

from __future__ import annotations

from pathlib import Path

from framestream.pipeline.shards.ledger import REASONS, SCHEMA
from framestream.trainer.monitoring.run_ledger import RunLedger, read_run_ledger


def told(run: Path) -> list[tuple]:
    return [(row["key"], row["reason"], row["epoch"], row["step"]) for row in read_run_ledger(run)]


def test_a_resumed_run_tells_one_straight_story(tmp_path):
    first, second = RunLedger(tmp_path, 0, 2), RunLedger(tmp_path, 1, 2)
    first.start([("d0", "too long")], [("d8", "long")])
    second.start()
    assert not (tmp_path / "ledger" / "rank001.jsonl").exists()  # nothing to say
    for step in range(4):
        first.record([], 0, step)
        second.record([(f"d{step + 1}", "gone")], 0, step)
    second.record([("d9", "gone")], 1, 0)
    with open(tmp_path / "ledger" / "rank001.jsonl", "a") as file:
        file.write('{"key": "torn')
    for ledger in (first, second):
        ledger.resume({"epoch": 0, "step": 2})
    kept = [
        ("d0", "unusable", None, None),
        ("d8", "cut", None, None),
        ("d1", "unreadable", 0, 0),
        ("d2", "unreadable", 0, 1),
    ]
    assert told(tmp_path) == kept
    second.record([("d3", "gone")], 0, 2)
    assert told(tmp_path) == [*kept, ("d3", "unreadable", 0, 2)]
    rows = list(read_run_ledger(tmp_path))
    assert all(set(row) == {*SCHEMA.names, "epoch", "step"} and row["reason"] in REASONS for row in rows)
    second.start()
    assert told(tmp_path) == kept[:2]


def test_ranks_that_are_no_more_leave_no_second_story(tmp_path):
    """Two ranks, then one from global batch 1 on, then three from the start."""
    for rank in range(2):
        ledger = RunLedger(tmp_path, rank, 2)
        ledger.start()
        for step in range(2):
            ledger.record([(f"{rank}-{step}", "gone")], 0, step)
    alone = RunLedger(tmp_path, 0, 1)
    alone.resume({"epoch": 0, "step": 1})
    assert [key for key, *_ in told(tmp_path)] == ["0-0", "1-0"]
    alone.record([("0-1", "gone"), ("1-1", "gone")], 0, 1)
    assert sorted(key for key, *_ in told(tmp_path)) == ["0-0", "0-1", "1-0", "1-1"]
    for rank in range(3):
        RunLedger(tmp_path, rank, 3).start()
    assert told(tmp_path) == []
