"""The files of a run are input of a report: damage is one line that names the file."""

import json

import pytest

from framestream.pipeline.utils.records import write_record
from framestream.trainer.evaluation.run_files import (
    BLIND_FIELDS,
    ReportError,
    read_log,
    read_run_rows,
    read_scores,
    score_fields,
)

LINE = {"step": 1, "loss": 2.5, "seconds": 0.5, "lr": {"connector": 1e-3}, "not_finite": 0}
ROW = {"family": "count", "method": "exact", "questions": 4, "accuracy": 50.0, "low": 10.0, "high": 90.0}


def write_lines(path, *lines):
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def test_lines_come_back_and_gaps_are_named(tmp_path):
    lines = [LINE, {**LINE, "step": 2, "loss": None}, {**LINE, "step": 5}]
    path = write_lines(tmp_path / "log.jsonl", *lines)
    with path.open("a") as file:
        file.write('{"step": 6, "lo')  # a line that is being written
    read, gaps = read_log(path, ["connector"])
    assert read == lines
    [gap] = gaps
    assert "steps 3 to 4" in gap and str(path) in gap


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "[" * 100_000,
        {"step": 2},
        {**LINE, "step": 1},
        {**LINE, "step": 0},
        {**LINE, "step": True},
        {**LINE, "step": 2.5},
        {**LINE, "step": 2, "seconds": -1},
        {**LINE, "step": 2, "seconds": None},
        {**LINE, "step": 2, "loss": "2"},
        {**LINE, "step": 2, "loss": 1e300},
        {**LINE, "step": 2, "lr": {"connector": "x"}},
        {**LINE, "step": 2, "lr": {"another": 1}},
    ],
)
def test_a_damaged_line_is_named_by_its_number(tmp_path, line):
    path = write_lines(tmp_path / "log.jsonl", LINE, line, {**LINE, "step": 9})
    with pytest.raises(ReportError, match=r"log.jsonl: line 2 is damaged .*; remove it$") as raised:
        read_log(path, ["connector"])
    assert "\n" not in str(raised.value)


def test_a_log_without_lines_is_one_line(tmp_path):
    with pytest.raises(ReportError, match="no optimizer step is logged yet"):
        read_log(write_lines(tmp_path / "log.jsonl"), [])


def test_damaged_ledger_rows_are_left_out_by_number(tmp_path):
    good = {"key": "d1", "reason": "unreadable", "message": "gone"}
    (tmp_path / "ledger").mkdir()
    write_lines(tmp_path / "ledger" / "rank0.jsonl", good, {"key": 1}, "x", good)
    rows, faults = read_run_rows(tmp_path)
    assert rows == [good, good]
    assert ["line 2" in faults[0], "line 3" in faults[1], len(faults)] == [True, True, 2]


def test_scores_come_back(tmp_path):
    write_record(tmp_path / "evaluation.json", {"families": [{**ROW, **gains()}], "checkpoint": "runs/a"})
    found = read_scores(tmp_path / "evaluation.json", "evaluate", score_fields(), (), {})
    assert found["families"] == [{**ROW, **gains()}] and found["checkpoint"] == "runs/a"


@pytest.mark.parametrize("absent", [BLIND_FIELDS, BLIND_FIELDS[1:]])
def test_a_family_without_a_blind_control_is_read(tmp_path, absent):
    """All of its fields are null, or the row is damaged."""
    row = {**ROW, **dict.fromkeys(BLIND_FIELDS, 1.0), **dict.fromkeys(absent)}
    write_record(tmp_path / "evaluation.json", {"families": [row]})
    arguments = (tmp_path / "evaluation.json", "evaluate", score_fields("blind"), (), {})
    for nullable in (BLIND_FIELDS, ()):
        if nullable == absent:
            assert read_scores(*arguments, nullable)["families"] == [row]
        else:
            with pytest.raises(ReportError, match="blind(_low)? of 'count' is None"):
                read_scores(*arguments, nullable)


def gains():
    return {"gain": 1.0, "gain_low": -2.0, "gain_high": 3.0}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"families": {}}, "families is no list"),
        ({"families": [{**ROW, **gains(), "accuracy": 101}]}, "accuracy of 'count' is 101"),
        ({"families": [{**ROW, **gains(), "questions": 0}]}, "questions of 'count' is 0"),
        ({"families": [{"family": "count"}]}, "another version"),
        ({"families": [], "examples": [{}]}, "an example lacks a text"),
        ({"families": [], "checkpoint": 3}, "checkpoint or command is no text"),
        ({"families": [], "unreadable": [3]}, "unreadable is no list of lines"),
    ],
)
def test_scores_of_another_form_are_one_line(tmp_path, change, words):
    write_record(tmp_path / "evaluation.json", change)
    with pytest.raises(ReportError, match=r"run python -m trainer.evaluate again$") as raised:
        read_scores(tmp_path / "evaluation.json", "evaluate", score_fields(), (), {})
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_a_changed_number_is_found_by_the_digest(tmp_path):
    path = tmp_path / "evaluation.json"
    write_record(path, {"families": [{**ROW, **gains()}]})
    path.write_text(path.read_text().replace("50.0", "51.0"))
    with pytest.raises(ReportError, match="its digest differs.*run python -m trainer.evaluate again"):
        read_scores(path, "evaluate", score_fields(), (), {})
