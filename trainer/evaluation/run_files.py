"""Read the files of a run that a report shows. They are input: each value is checked, and damage is one line."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from framestream.pipeline.utils.records import RecordError, read_json_lines, read_record

LARGEST = 1e18  #: of a number that is shown
#: of a row of scores, what is null where a family has no blind control
BLIND_FIELDS = ("blind", "blind_low", "blind_high", "gain", "gain_low", "gain_high")
#: fields of a line of log.jsonl that are shown: whether the value is a whole number
LOG_FIELDS = {
    **dict.fromkeys(("step", "steps", "ranks", "zero_stage", "dialogues", "not_finite", "peak_memory"), True),
    **dict.fromkeys(("val_dialogues", "val_best_step"), True),
    **dict.fromkeys(("val_loss", "val_accuracy", "val_likelihood", "val_miou", "val_best"), False),
    **dict.fromkeys(
        ("loss", "seconds", "tokens_per_s", "frames_per_s", "data_wait", "tflops", "mfu", "grad_norm"), False
    ),
}
UNKNOWN_FIELDS = (
    "loss",
    "mfu",
    "grad_norm",
    "tflops",
    "val_loss",
    "val_best",
    "val_best_step",
)  #: of these, null is a number that is not finite or not known


class ReportError(ValueError):
    """A file that a report needs is missing or broken; one line that names the file and the fix."""


def read_log(path: Path, parts: Sequence[str]) -> tuple[list[dict], list[str]]:
    """Read the log of a run.

    Args:
        path: of log.jsonl. An incomplete last line, of a run that is being written, is left out.
        parts: the names of parts that have learning rates.

    Returns:
        its lines, and a message for each gap between their steps.

    Raises:
        ReportError: the log is empty, or a line is damaged; the message has the number of the line.
        OSError: the file cannot be read.
    """
    steps: list[dict] = []
    gaps: list[str] = []
    before = 0
    for number, line in read_lines(path):
        fault = _log_fault(line, parts)
        if not fault and line["step"] <= before:
            fault = f"step {line['step']} comes after step {before}"
        if fault:
            raise ReportError(f"{path}: line {number} is damaged ({fault}); remove it")
        if steps and line["step"] > before + 1:
            gaps.append(f"{path}: has no line for steps {before + 1:,} to {line['step'] - 1:,}, before line {number}")
        before = line["step"]
        steps.append(line)
    if not steps:
        raise ReportError(f"{path}: no optimizer step is logged yet; wait for the first one")
    return steps, gaps


def read_lines(path: Path) -> list[tuple[int, Any]]:
    """Read a file of JSON lines: number and value of each, without an incomplete last line.

    A line that is not JSON has the value None.
    """
    try:
        return [(number, value) for number, _, value in read_json_lines(path)]
    except RecordError as error:
        raise ReportError(str(error)) from None


def _log_fault(line: Any, parts: Sequence[str]) -> str:
    """Say what is wrong with the value of a line of log.jsonl; empty if nothing is."""
    if not isinstance(line, dict):
        return "it is not a JSON object"
    if missing := [name for name in ("step", "loss", "seconds") if name not in line]:
        return f"it lacks {', '.join(missing)}"
    for name, whole in LOG_FIELDS.items():
        if name in line and not (line[name] is None and name in UNKNOWN_FIELDS):
            low = -LARGEST if name == "loss" else 1 if name == "step" else 0
            if not _is_number(line[name], low) or (whole and not isinstance(line[name], int)):
                return f"{name} is {line[name]!r:.40}"
    rates = line.get("lr", {})
    if not isinstance(rates, dict) or not all(name in parts and _is_number(rates[name], 0) for name in rates):
        return f"lr is {rates!r:.60}"
    families = line.get("val_families", {})
    if not isinstance(families, dict) or not all(_is_number(value, 0, 100) for value in families.values()):
        return f"val_families is {families!r:.60}"
    return ""


def _is_number(value: Any, low: float = -LARGEST, high: float = LARGEST) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def read_run_rows(run: Path) -> tuple[list[dict], list[str]]:
    """Read the ledger of a run: its rows, and a message for each line that is damaged and left out."""
    rows: list[dict] = []
    faults: list[str] = []
    for path in sorted((run / "ledger").glob("rank*.jsonl")):
        for number, row in read_lines(path):
            if isinstance(row, dict) and all(isinstance(row.get(name), str) for name in ("key", "reason", "message")):
                rows.append(row)
            else:
                faults.append(f"{path}: line {number} is no row of a ledger and is left out; remove it")
    return rows, faults


def read_scores(
    path: Path,
    program: str,
    fields: Mapping[str, tuple[float, float]],
    names: Sequence[str],
    lists: Mapping[str, Mapping[str, tuple[float, float]]],
    nullable: Sequence[str] = (),
) -> dict:
    """Read the results of ``python -m trainer.PROGRAM``.

    Args:
        path: of the file.
        program: that wrote it.
        fields: the numbers of each row of ``families``, with their bounds.
        names: further fields that are rows of the same form, or null.
        lists: the numbers of each row of further lists, with their bounds; results of older versions lack them.
        nullable: of these numbers, those that are all null where there is no blind control.

    Raises:
        ReportError: it is damaged, or was written by another version.
        OSError: the file cannot be read.
    """
    fix = f"run python -m trainer.{program} again"
    try:
        result = read_record(path, f"result of trainer.{program}", fix)
    except RecordError as error:
        raise ReportError(str(error)) from None
    families, examples = result.get("families"), result.get("examples", [])
    if isinstance(families, list) and not all(isinstance(row, dict) and "method" in row for row in families):
        raise ReportError(f"{path}: written by another version; {fix}")
    extra = [result.get(name) for name in names if result.get(name) is not None]
    fault = (
        _rows_fault(families, fields, "families", nullable)
        or _rows_fault(extra, score_fields("blind"), "trained")
        or _examples_fault(examples)
        or next(filter(None, (_rows_fault(result.get(name, []), lists[name], name, nullable) for name in lists)), "")
    )
    texts = result.get("unreadable", [])
    if not fault and not (isinstance(texts, list) and all(isinstance(text, str) for text in texts)):
        fault = "unreadable is no list of lines"
    if not fault and not all(isinstance(result.get(name, ""), str) for name in ("checkpoint", "command")):
        fault = "checkpoint or command is no text"
    if fault:
        raise ReportError(f"{path}: not a result of trainer.{program} ({fault}); {fix}")
    return {"examples": [], "unreadable": [], "checkpoint": "", "command": "", **{name: [] for name in lists}, **result}


def score_fields(*controls: str, name: str = "accuracy") -> dict[str, tuple[float, float]]:
    """Return the numbers of a row of ``families`` and their bounds, for these controls and the score ``name``."""
    share, gain = (0.0, 100.0), (-100.0, 100.0)
    fields: dict[str, tuple[float, float]] = {"questions": (1, LARGEST), name: share, "low": share, "high": share}
    for control in controls:
        fields |= dict.fromkeys((control, f"{control}_low", f"{control}_high"), share)
    return fields | dict.fromkeys(("gain", "gain_low", "gain_high"), gain)


def _rows_fault(rows: Any, fields: Mapping[str, tuple[float, float]], where: str, nullable: Sequence[str] = ()) -> str:
    if not isinstance(rows, list):
        return f"{where} is no list"
    for row in rows:
        if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in ("family", "method")):
            return f"a row of {where} has no family or method"
        is_compared = not nullable or any(row.get(name, 0) is not None for name in nullable)
        for name, (low, high) in fields.items():
            if name in nullable and not is_compared:
                continue
            if not _is_number(row.get(name), low, high):
                return f"{name} of {row['family'][:40]!r} is {row.get(name)!r:.40}"
        kinds = row.get("kinds", {})
        if not isinstance(kinds, dict) or not all(_is_number(share, 0, 100) for share in kinds.values()):
            return f"kinds of {row['family'][:40]!r} are no shares by name"
    return ""


def _examples_fault(examples: Any) -> str:
    texts = ("family", "question", "expected", "given")
    if not isinstance(examples, list):
        return "examples is no list"
    for example in examples:
        if not isinstance(example, dict) or not all(isinstance(example.get(name), str) for name in texts):
            return "an example lacks a text"
        if not isinstance(example.get("blind_given", 0), str | None):
            return "the blind answer of an example is no text"
        jpegs = example.get("frames_jpeg")
        if "iou" in example and not _is_number(example["iou"], 0, 1):
            return "the iou of an example is no number from 0 to 1"
        if not isinstance(jpegs, list) or not all(_is_jpeg(jpeg) for jpeg in jpegs):
            return "the frames of an example are no JPEG images"
    return ""


def _is_jpeg(text: Any) -> bool:
    try:
        return isinstance(text, str) and base64.b64decode(text, validate=True).startswith(b"\xff\xd8\xff")
    except (binascii.Error, ValueError):
        return False
