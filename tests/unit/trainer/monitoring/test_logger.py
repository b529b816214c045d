"""The metrics of a run: strict JSON, TensorBoard curves, and one line for each step, also after a resume."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from framestream.trainer.monitoring.logger import MetricsLogger, progress


def record(step: int, **over: object) -> dict:
    made = {"step": step, "steps": 9, "lr": {"connector": 1e-3}, "loss": 2.5 / step, "tokens_per_s": 1234.4}
    made |= {"frames_per_s": 56.2, "data_wait": 0.031, "seconds": 1.5, "tflops": 123.4, "mfu": 0.413}
    made |= {"peak_memory": 3 * 2**29, "grad_norm": 0.75, "skipped": 2, "not_finite": 0, "zero_stage": 3, "ranks": 2}
    return made | over


def write(run: Path, start: int, records: list[dict]) -> None:
    metrics = MetricsLogger(run, "stage", start, 9)
    for record in records:
        metrics.write(record)
    metrics.close()


def lines(run: Path) -> list[dict]:
    return [json.loads(line, parse_constant=pytest.fail) for line in (run / "log.jsonl").open()]


def test_a_resumed_run_logs_each_step_once(tmp_path):
    write(tmp_path, 0, [record(step) for step in (1, 2, 3)])
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 4, "lo')
    time.sleep(1.01 - time.time() % 1)  # files of one second are read in the order of a number without leading zeros
    write(tmp_path, 2, [record(step, loss=9.0) for step in (3, 4)])
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(1, 2.5), (2, 1.25), (3, 9.0), (4, 9.0)]
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(point.step, point.value) for point in board.Scalars("loss")] == [(1, 2.5), (2, 1.25), (3, 9.0), (4, 9.0)]
    assert {"mfu", "peak_memory", "not_finite", "lr/connector"} <= set(board.Tags()["scalars"])


def test_validations_are_in_the_log_the_curves_and_the_trackers(tmp_path):
    got: list[tuple[dict, int]] = []
    tracker = SimpleNamespace(
        log=lambda figures, step: got.append((figures, step)), close=lambda end: got.append("end")
    )
    metrics = MetricsLogger(tmp_path, "stage", 0, 9, [tracker])
    metrics.write(record(1, val_loss=1.5, val_accuracy=50.0, val_families={"side": 25.0}, val_best_step=None))
    metrics.close()
    (line,) = lines(tmp_path)
    assert (line["val_loss"], line["val_best_step"]) == (1.5, None)
    (figures, step), end = got
    assert figures["val_accuracy/side"] == 25.0 and line["val_families"] == {"side": 25.0}
    assert step == 1 and end == "end" and figures["val_accuracy"] == 50.0 and figures["lr/connector"] == 1e-3
    assert not figures.keys() & {"step", "steps", "lr", "zero_stage", "ranks", "val_best_step", "batch"}
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert set(board.Tags()["scalars"]) == set(figures)
    assert "validation loss 1.500" in progress(record(1, val_loss=1.5))


def test_numbers_that_are_not_finite_are_null(tmp_path, caplog):
    caplog.set_level(logging.INFO, "framestream")
    write(tmp_path, 0, [record(1, loss=float("nan"), grad_norm=float("inf"), mfu=None, not_finite=1)])
    (line,) = lines(tmp_path)
    assert line["loss"] is line["grad_norm"] is line["mfu"] is None
    shown = caplog.text
    assert "loss nan" in shown and "MFU unknown" in shown and "1 steps not finite" in shown


def test_the_progress_line_has_all_figures():
    text = progress(record(2))
    for part in ("loss 1.250", "connector 1.0e-03", "1234 tokens/s", "56 frames/s", "waiting 3%", "MFU 41.3%"):
        assert part in text
    assert "memory 1.50 GiB" in text and "grad 0.75" in text and "skipped 2" in text and "finite" not in text


@pytest.mark.parametrize("damage", ["3", "null", "{}", '{"step": true}', '{"step": "2"}', '{"step": 1}', "{", "\x80"])
def test_damaged_lines_are_named_and_removed(tmp_path, caplog, damage):
    write(tmp_path, 0, [record(step) for step in (1, 2, 3)])
    path = tmp_path / "log.jsonl"
    first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([first, damage, *rest, ""]), encoding="latin-1")
    write(tmp_path, 2, [record(3, loss=9.0)])
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    assert f"{path}: line 2 is damaged and is removed" in caplog.text
