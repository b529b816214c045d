"""Metrics of a run, for each optimizer step: a JSON line, points in TensorBoard and trackers, and a progress line.

``RUN/log.jsonl`` holds one object per optimizer step, with null for numbers that are not finite or not known. A resumed
run first drops the lines of the steps it will repeat, so that each step appears once.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from framestream.pipeline.utils.atomic_io import write_atomic
from framestream.pipeline.utils.records import read_json_lines
from framestream.trainer.monitoring.trackers import TrackerProcess, close_trackers

logger = logging.getLogger(__name__)


class MetricsLogger:
    """Writes the metrics of a run. Only rank 0 has one.

    Args:
        run: the run's folder.
        name: shown before the progress bar.
        start: optimizer steps already done.
        steps: optimizer steps of the run.
        trackers: get the points of TensorBoard, too.
    """

    def __init__(self, run: Path, name: str, start: int, steps: int, trackers: Sequence[TrackerProcess] = ()) -> None:
        self.path = run / "log.jsonl"
        _drop_after(self.path, start)
        self.board = SummaryWriter(run / "tensorboard", purge_step=start + 1)
        self.name, self.trackers = name, trackers
        self.bar = tqdm(total=steps, initial=start, desc=name, unit="step", dynamic_ncols=True, disable=None)

    def write(self, record: dict) -> None:
        """Log one optimizer step. ``record`` holds plain numbers, None for unknown ones, and ``lr`` by part."""
        with open(self.path, "a", encoding="utf-8") as log:
            finite = {name: finite_or_none(value) for name, value in record.items()}
            log.write(json.dumps(finite, allow_nan=False) + "\n")
        step, points = record["step"], _points(record)
        for name, value in points.items():
            self.board.add_scalar(name, value, step)
        for tracker in self.trackers:
            tracker.log(points, step)
        text = progress(record)
        if self.bar.disable:  # stderr is a file or a pipe: one line for each step instead of a bar
            logger.info("%s: step %d/%d, %.2f s, %s", self.name, step, record["steps"], record["seconds"], text)
        else:
            self.bar.set_postfix_str(text, refresh=False)
        self.advance()

    def advance(self) -> None:
        """Move the progress bar by one step."""
        self.bar.update()

    def close(self) -> None:
        """Flush and close the progress bar, TensorBoard and the trackers."""
        self.bar.close()
        self.board.close()
        close_trackers(self.trackers)


def progress(record: dict) -> str:
    """Format the figures of one step for the progress line."""
    rates = " ".join(f"{part.split('_')[0]} {rate:.1e}" for part, rate in record["lr"].items())
    mfu = "MFU unknown" if record["mfu"] is None else f"MFU {record['mfu']:.1%}"
    text = (
        f"loss {record['loss']:.3f}, lr {rates}, {record['tokens_per_s']:.0f} tokens/s, "
        f"{record['frames_per_s']:.0f} frames/s, waiting {record['data_wait']:.0%}, {record['tflops']:.3g} TFLOP/s, "
        f"{mfu}, memory {record['peak_memory'] / 2**30:.2f} GiB, grad {record['grad_norm']:.2f}, "
        f"skipped {record['skipped']}"
    )
    if "val_loss" in record:
        text += f", validation loss {record['val_loss']:.3f}"
    return f"{text}, {record['not_finite']} steps not finite" if record["not_finite"] else text


def _points(record: dict) -> dict[str, float]:
    """Return the numbers of a step that are curves, by name: ``lr/PART`` and ``val_accuracy/FAMILY`` too."""
    rates = {f"lr/{part}": rate for part, rate in record["lr"].items()}
    rates |= {f"val_accuracy/{family}": value for family, value in record.get("val_families", {}).items()}
    values = {name: value for name, value in record.items() if name not in ("step", "steps", "zero_stage", "ranks")}
    return rates | {name: value for name, value in values.items() if isinstance(finite_or_none(value), (int, float))}


def finite_or_none(value: object) -> object:
    """Replace NaN and infinity, which JSON does not have, by None."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _drop_after(path: Path, step: int) -> None:
    """Drop the lines after ``step`` and those that are damaged from a log. Replaces the file atomically."""
    if not path.exists():
        return
    lines: list[bytes] = []
    last = 0
    for number, line, record in read_json_lines(path):
        found = record.get("step") if isinstance(record, dict) else None
        if type(found) is not int or found <= last:
            logger.warning("%s: line %d is damaged and is removed", path, number)
        elif found <= step:
            lines.append(line + b"\n")
            last = found
    write_atomic(path, b"".join(lines))
