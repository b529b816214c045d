"""The ledger of a run: each row appears once, also after a kill and a resume."""

from __future__ import annotations

from pathlib import Path

from framestream.pipeline.shards.ledger import REASONS, SCHEMA
from framestream.trainer.monitoring.run_ledger import RunLedger, not_finite_before, read_run_ledger


def entries(run: Path) -> list[tuple]:
    return [(row["key"], row["reason"], row["epoch"], row["step"]) for row in read_run_ledger(run)]


def test_a_resumed_run_has_each_row_once(tmp_path):
    first, second = RunLedger(tmp_path, 0, 2), RunLedger(tmp_path, 1, 2)
    first.start([("d0", "too long")], [("d8", "long")])
    second.start()
    assert not (tmp_path / "ledger" / "rank001.jsonl").exists()  # no rows
    for step in range(4):
        first.record([], 0, step)
        second.record([(f"d{step + 1}", "gone")], 0, step)
    second.record([("d9", "gone")], 1, 0)
    with open(tmp_path / "ledger" / "rank001.jsonl", "a") as file:
        file.write('{"key": "torn')
    for ledger in (first, second):
        ledger.resume({"epoch": 0, "step": 2})
    expected = [
        ("d0", "unusable", None, None),
        ("d8", "cut", None, None),
        ("d1", "unreadable", 0, 0),
        ("d2", "unreadable", 0, 1),
    ]
    assert entries(tmp_path) == expected
    second.record([("d3", "gone")], 0, 2)
    assert entries(tmp_path) == [*expected, ("d3", "unreadable", 0, 2)]
    rows = list(read_run_ledger(tmp_path))
    assert all(set(row) == {*SCHEMA.names, "epoch", "step"} and row["reason"] in REASONS for row in rows)
    second.start()
    assert entries(tmp_path) == expected[:2]


def test_files_of_missing_ranks_are_maintained(tmp_path):
    """Two ranks, then one from global batch 1 on, then three from the start."""
    for rank in range(2):
        ledger = RunLedger(tmp_path, rank, 2)
        ledger.start()
        for step in range(2):
            ledger.record([(f"{rank}-{step}", "gone")], 0, step)
    alone = RunLedger(tmp_path, 0, 1)
    alone.resume({"epoch": 0, "step": 1})
    assert [key for key, *_ in entries(tmp_path)] == ["0-0", "1-0"]
    alone.record([("0-1", "gone"), ("1-1", "gone")], 0, 1)
    assert sorted(key for key, *_ in entries(tmp_path)) == ["0-0", "0-1", "1-0", "1-1"]
    for rank in range(3):
        RunLedger(tmp_path, rank, 3).start()
    assert entries(tmp_path) == []


DAMAGED = [
    "3",
    "null",
    "[]",
    "{}",
    '{"key": 1}',
    "\\xff",
    '{"key":"a","reason":"cut","message":"","epoch":true,"step":0}',
    "",
]


def test_damaged_rows_are_named_and_left_out(tmp_path, caplog):
    ledger = RunLedger(tmp_path, 0, 1)
    ledger.start([("d0", "too long")])
    ledger.not_finite([("d1", "nan")], 0, 1)
    path = tmp_path / "ledger" / "rank000.jsonl"
    sound = path.read_text().splitlines()
    path.write_text("\n".join([sound[0], *DAMAGED, sound[1], ""]))
    (tmp_path / "ledger" / "rankx.jsonl").write_text("other\n")
    assert not_finite_before(tmp_path, {"epoch": 0, "step": 2}) == 1
    ledger.resume({"epoch": 0, "step": 2})
    assert path.read_text().splitlines() == sound
    assert f"{path}: line 2 is damaged and is left out" in caplog.text
