"""Read the folders of runs, and render them as one self-contained HTML page.

Read from each RUN, if present: ``log.jsonl`` (one object per optimizer step), ``manifest.yaml`` (the resolved
manifest), ``ledger/`` (dialogues that were left out or cut), ``evaluation.json`` (scores of held-out questions) and
``haystack.json`` (needles in long videos).
"""

from __future__ import annotations

import collections
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from framestream.pipeline.config.schema import ManifestError
from framestream.pipeline.config.yaml_files import load_yaml
from framestream.pipeline.html.page import render_page
from framestream.pipeline.html.svg import COLORS, Line, format_duration, format_number, line_chart
from framestream.pipeline.shards.ledger import REASONS
from framestream.pipeline.utils.command_line import describe_os_error
from framestream.trainer.evaluation.haystack_html import haystack_values
from framestream.trainer.evaluation.metrics import IOU_THRESHOLDS
from framestream.trainer.evaluation.run_files import (
    BLIND_FIELDS,
    LARGEST,
    ReportError,
    read_log,
    read_run_rows,
    read_scores,
    score_fields,
)
from framestream.trainer.evaluation.scores_html import BAR_COLORS, SCORE_FILTERS, scores_values

PART_COLORS = {"vision_tower": COLORS[0], "connector": COLORS[1], "language_model": COLORS[2]}
FAMILY_COLORS = (*COLORS, "#c2255c", "#0b7285", "#846358", "#7b8a1d", "#495057", "#e8a100", "#4fa3d1", "#b07aa1")
SMOOTHING = 0.2  #: weight of the newest step in the loss's moving average
EDGE_STEPS = 10  #: steps averaged for a first and a last loss, at most half of them
EXAMPLES_PER_REASON = 5  #: dialogues of the ledger that are shown
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Run:
    """The content of one run's folder."""

    folder: Path
    steps: list[dict]
    manifest: dict
    ledger: list[dict]
    evaluation: dict | None
    haystack: dict | None
    faults: list[str]  #: what is damaged, one line each

    @property
    def name(self) -> str:
        """The manifest's name, else the folder's."""
        return str(self.manifest.get("name") or self.folder.name)


def read_run(folder: Path) -> Run:
    """Read a run's folder. What is damaged beside the log is left out, with a line in ``faults``.

    Raises:
        ReportError: there is no log, or it is damaged.
        OSError: it cannot be read.
    """
    log = folder / "log.jsonl"
    if not log.is_file():
        raise ReportError(f"{folder}: no log.jsonl here; train it first: python -m trainer --manifest M")
    steps, faults = read_log(log, list(PART_COLORS))
    ledger, damaged = read_run_rows(folder)
    faults += damaged
    found: dict[str, dict | None] = {}
    for name, read in (("manifest.yaml", _manifest), ("evaluation.json", _scores), ("haystack.json", _needles)):
        try:
            found[name] = read(folder / name) if (folder / name).exists() else None
        except (ReportError, ManifestError, OSError) as error:
            found[name] = None
            reason = describe_os_error(error) if isinstance(error, OSError) else " ".join(str(error).split())
            faults.append(f"{reason}; it is left out")
    return Run(
        folder, steps, found["manifest.yaml"] or {}, ledger, found["evaluation.json"], found["haystack.json"], faults
    )


def _manifest(path: Path) -> dict:
    """Read what the page shows of a resolved manifest."""
    fault = f"{path}: not a resolved manifest; copy it again from the run's checkpoint"
    try:
        manifest = load_yaml(path)
    except ManifestError:
        raise
    except (ValueError, TypeError, RecursionError):
        raise ReportError(fault) from None
    sections = ("train", "frames", "init_from", "evaluate")
    if not isinstance(manifest, dict) or not all(isinstance(manifest.get(name, {}), dict) for name in sections):
        raise ReportError(fault)
    parts = [manifest.get("train", {}).get(part, {}) for part in PART_COLORS]
    frames = manifest.get("frames", {})
    if not all(isinstance(part, dict) for part in parts) or (
        frames and not {"min", "max", "size", "sampler"} <= {*frames}
    ):
        raise ReportError(fault)
    return manifest


def _scores(path: Path) -> dict:
    grounding = score_fields("blind", "shuffled", name="miou") | {"unparsed": (0, LARGEST)}
    grounding |= {f"recall_{at}": (0, 100) for at in IOU_THRESHOLDS}
    fields = score_fields("blind", "shuffled")
    return read_scores(path, "evaluate", fields, (), {"grounding": grounding}, BLIND_FIELDS)


def _needles(path: Path) -> dict:
    fields = score_fields("blind") | {"frames": (1, LARGEST), "depth": (0, 100)}
    chains = score_fields("blind") | {"frames": (1, LARGEST), "chains": (1, LARGEST), "all_correct": (0, LARGEST)}
    costs: dict[str, tuple[float, float]] = dict.fromkeys(("frames", "seconds", "peak_memory"), (0, LARGEST))
    costs["prompts"] = (1, LARGEST)
    names, lists = ("trained", "deepest"), {"chains": chains, "costs": costs}
    return {"trained_frames": "", **read_scores(path, "haystack", fields, names, lists)}


def render(runs: list[Run]) -> str:
    """Render the page as HTML."""
    return render_page(
        Path(__file__).parent / "report.html.j2",
        {"compact": format_number, "duration": format_duration, **SCORE_FILTERS},
        runs=[(run, summary(run), charts(run)) for run in runs],
        scored=[{"name": run.name, **scores_values(run.evaluation)} for run in runs if run.evaluation],
        searched=[{"name": run.name, **haystack_values(run.haystack)} for run in runs if run.haystack],
        **BAR_COLORS,
    )


def summary(run: Run) -> dict:
    """Compute the figures of one run's row in the table of stages."""
    steps, manifest = run.steps, run.manifest
    train, frames = manifest.get("train", {}), manifest.get("frames", {})
    trained = [name.replace("_", " ") for name in PART_COLORS if train.get(name, {}).get("train")]
    losses = [record["loss"] for record in steps if record["loss"] is not None] or [math.nan]
    edge = min(EDGE_STEPS, max(1, len(losses) // 2))
    seconds = sum(record["seconds"] for record in steps)
    init = manifest.get("init_from", {})
    return {
        "stage": manifest.get("stage", ""),
        "trained": ", ".join(trained) or "unknown",
        "frames": _frames(frames) if frames else "unknown",
        "init": init.get("run") or ", ".join(sorted({str(value) for value in init.values() if value})) or "unknown",
        "zero_stage": steps[-1].get("zero_stage", "unknown"),
        "ranks": steps[-1].get("ranks", "unknown"),
        "done": steps[-1]["step"],
        "wanted": steps[-1].get("steps", steps[-1]["step"]),
        "dialogues": sum(record.get("dialogues", 0) for record in steps),
        "seconds": seconds,
        "first_loss": statistics.fmean(losses[:edge]),
        "last_loss": statistics.fmean(losses[-edge:]),
        "tokens_per_s": _time_mean(steps, "tokens_per_s", seconds),
        "frames_per_s": _time_mean(steps, "frames_per_s", seconds),
        "data_wait": 100 * _time_mean(steps, "data_wait", seconds),
        "mfu": 100 * _time_mean(steps, "mfu", seconds) if steps[-1].get("mfu") is not None else None,
        "peak_memory": max(record.get("peak_memory", 0) for record in steps) / GIB,
        "not_finite": steps[-1].get("not_finite", 0),
        "best": _best_validation(run),
        "noted": len(run.ledger),
        "ledger": ledger_rows(run.ledger),
    }


def ledger_rows(ledger: list[dict]) -> list[dict]:
    """Group the ledger by reason, most frequent first: meaning, number, and the first dialogues."""
    by_reason: dict[str, list[dict]] = collections.defaultdict(list)
    for row in ledger:
        by_reason[row["reason"]].append(row)
    return [
        {
            "reason": reason,
            "meaning": REASONS.get(reason, ""),
            "count": len(rows),
            "examples": rows[:EXAMPLES_PER_REASON],
        }
        for reason, rows in sorted(by_reason.items(), key=lambda item: -len(item[1]))
    ]


def charts(run: Run) -> list[Markup]:
    """Draw a run's curves: loss, validations, learning rates, throughput, waiting, MFU, memory and gradient norm."""
    finite = [(record["step"], record["loss"]) for record in run.steps if record["loss"] is not None]
    curves = []
    if finite:
        steps, losses = zip(*finite, strict=True)
        each = Line("each step", steps, losses, "#9db9ea", faint=True)
        smooth = Line("moving average", steps, _moving_average(list(losses)))
        held_out = _validation_lines(run, {"val_loss": "validation"})
        curves.append(line_chart("loss", [each, smooth, *held_out], low=0.0 if min(losses) >= 0 else None))
    if scores := _validation_lines(
        run, {"val_accuracy": "accuracy", "val_likelihood": "most likely option", "val_miou": "mIoU"}
    ):
        curves.append(line_chart("validation, %", scores, low=0.0))
    if families := _family_lines(run):
        curves.append(line_chart("validation by family, %", families, low=0.0))
    parts = sorted({part for record in run.steps for part in record.get("lr", {})}, key=list(PART_COLORS).index)
    if parts:
        curves.append(line_chart("learning rate", _rate_lines(run, parts), low=0.0))
    for key, title, factor in (
        ("tokens_per_s", "tokens a second", 1),
        ("frames_per_s", "frames a second", 1),
        ("data_wait", "waiting for data, % of a step", 100),
        ("tflops", "TFLOP/s of a rank", 1),
        ("mfu", "MFU, %", 100),
        ("peak_memory", "peak memory of a rank, GiB", 1 / GIB),
        ("grad_norm", "gradient norm before clipping", 1),
        ("not_finite", "steps not finite so far", 1),
    ):
        known = [(record["step"], factor * record[key]) for record in run.steps if record.get(key) is not None]
        if known and (key != "not_finite" or known[-1][1]):
            x, values = zip(*known, strict=True)
            curves.append(line_chart(title, [Line("", x, values)], low=0.0))
    return curves


def _frames(frames: dict) -> str:
    count = str(frames["min"]) if frames["min"] == frames["max"] else f"{frames['min']} to {frames['max']}"
    return f"{count} at {frames['size']} px, {frames['sampler']}"


def _validation_lines(run: Run, names: dict[str, str]) -> list[Line]:
    """Draw a line for each of ``names``, a field of validated steps and its name in the legend."""
    lines = []
    for (field, name), color in zip(names.items(), COLORS[1:], strict=False):
        known = [(record["step"], record[field]) for record in run.steps if record.get(field) is not None]
        if known:
            x, values = zip(*known, strict=True)
            lines.append(Line(name, x, values, color))
    return lines


def _family_lines(run: Run) -> list[Line]:
    """Draw a line for each family of validated questions."""
    validated = [record for record in run.steps if record.get("val_families")]
    lines = []
    for i, family in enumerate(sorted({name for record in validated for name in record["val_families"]})):
        known = [(r["step"], r["val_families"][family]) for r in validated if family in r["val_families"]]
        x, values = zip(*known, strict=True)
        lines.append(Line(family, x, values, FAMILY_COLORS[i % len(FAMILY_COLORS)]))
    return lines


def _best_validation(run: Run) -> str:
    """Say which step was the best of the last validation; empty if the run has none."""
    best = next((record for record in reversed(run.steps) if record.get("val_best_step") is not None), None)
    if best is None or best.get("val_best") is None:
        return ""
    name = run.manifest.get("evaluate", {}).get("best", "loss")
    return f"best validation after step {best['val_best_step']:,}: {name} {best['val_best']:.4g}"


def _rate_lines(run: Run, parts: list[str]) -> list[Line]:
    """Draw one line for each distinct schedule of the learning rate, named after the parts that follow it."""
    schedules: dict[tuple[float, ...], list[str]] = {}
    for part in parts:
        schedules.setdefault(tuple(record.get("lr", {}).get(part, 0.0) for record in run.steps), []).append(part)
    x = [record["step"] for record in run.steps]
    return [
        Line(", ".join(names).replace("_", " "), x, rates, PART_COLORS[names[0]]) for rates, names in schedules.items()
    ]


def _time_mean(steps: list[dict], key: str, seconds: float) -> float:
    """Compute the mean of a rate or share over time: steps are weighted by their duration."""
    return sum((record.get(key) or 0.0) * record["seconds"] for record in steps) / seconds if seconds else 0.0


def _moving_average(values: list[float]) -> list[float]:
    """Compute the exponential moving average, with the bias correction of Adam (arXiv 1412.6980, section 3)."""
    total, weight, smooth = 0.0, 0.0, []
    for value in values:
        total += SMOOTHING * (value - total)
        weight += SMOOTHING * (1 - weight)
        smooth.append(total / weight)
    return smooth


def write_images(folder: Path, runs: Sequence[Run]) -> None:
    """Write the loss of all runs, and heat maps and one answer of the last runs that have them, as image files."""
    from framestream.trainer.evaluation.report_images import write_report_images  # imports torch

    losses = {run.name: charts(run)[0] for run in runs if any(record["loss"] is not None for record in run.steps)}
    maps = [haystack_values(run.haystack)["maps"] for run in runs if run.haystack]
    examples = [run.evaluation["examples"] for run in runs if run.evaluation]
    write_report_images(folder, losses, *(found[-1] if found else [] for found in (maps, examples)))
