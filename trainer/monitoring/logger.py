"""Watching a run: one JSON line and one TensorBoard point for each optimiser step, and a progress line.

``RUN/log.jsonl`` holds one object per optimiser step, with null for numbers that are not finite or not known; a run
that goes on from a checkpoint first drops the lines of steps that will be done again, so that the file always tells one
straight story.
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


class MetricsLogger:
    """Writes a run's log; only rank 0 has one.

    Args:
        run: the run's folder.
        name: shown before the progress bar.
        start: optimiser steps already done.
        steps: optimiser steps in all.
    """

    def __init__(self, run: Path, name: str, start: int, steps: int) -> None:
        self.path = run / "log.jsonl"
        _keep_until(self.path, start)
        self.board = SummaryWriter(run / "tensorboard", purge_step=start + 1)
        self.name = name
        self.bar = tqdm(total=steps, initial=start, desc=name, unit="step", dynamic_ncols=True, disable=None)

    def write(self, record: dict) -> None:
        """Log one optimiser step; ``record`` holds plain numbers, None where one is unknown, and ``lr`` by part."""
        with open(self.path, "a", encoding="utf-8") as log:
            log.write(json.dumps({name: _finite(value) for name, value in record.items()}, allow_nan=False) + "\n")
        step = record["step"]
        for name, value in record.items():
            if name == "lr":
                for part, rate in value.items():
                    self.board.add_scalar(f"lr/{part}", rate, step)
            elif isinstance(_finite(value), (int, float)) and name not in ("step", "steps", "zero_stage", "ranks"):
                self.board.add_scalar(name, value, step)
        text = progress(record)
        if self.bar.disable:  # a file or a pipe: one line for each step instead of a bar
            print(f"{self.name}: step {step}/{record['steps']}, {record['seconds']:.2f} s, {text}", file=sys.stderr)
        else:
            self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()

    def close(self) -> None:
        """Flush and close everything."""
        self.bar.close()
        self.board.close()


def progress(record: dict) -> str:
    """The figures of one step, as the progress line shows them."""
    rates = " ".join(f"{part.split('_')[0]} {rate:.1e}" for part, rate in record["lr"].items())
    mfu = "MFU unknown" if record["mfu"] is None else f"MFU {record['mfu']:.1%}"
    text = (
        f"loss {record['loss']:.3f}, lr {rates}, {record['tokens_per_s']:.0f} tokens/s, "
        f"{record['frames_per_s']:.0f} frames/s, waiting {record['data_wait']:.0%}, {record['tflops']:.3g} TFLOP/s, "
        f"{mfu}, memory {record['peak_memory'] / 2**30:.2f} GiB, grad {record['grad_norm']:.2f}, "
        f"skipped {record['skipped']}"
    )
    return f"{text}, {record['not_finite']} steps not finite" if record["not_finite"] else text


def _finite(value: object) -> object:
    """JSON knows no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _keep_until(path: Path, step: int) -> None:
    """Drop the lines after ``step`` (and a torn last line) from a log, atomically."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            break
        if record["step"] > step:
            break
        kept.append(line + "\n")
    part = path.with_suffix(".part")
    part.write_text("".join(kept), encoding="utf-8")
    os.replace(part, path)
