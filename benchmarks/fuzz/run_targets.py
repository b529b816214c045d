"""Targets of training: checkpoints, settings, logs and scores of a run, and weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from benchmarks.fuzz.commands import call_main, printed
from benchmarks.fuzz.corpus import ADAPTED, MANIFEST, RUN, SHARDS, TOKENIZER, copy_parts
from benchmarks.fuzz.target import CommandError, Reading, Target, digest_of
from framestream.pipeline.utils.records import DIGEST
from framestream.trainer import __main__ as trainer
from framestream.trainer import chat, report
from framestream.trainer import export as export_command
from framestream.trainer.checkpoint.export import export

WEIGHTS = "fuzz-weights"
STEP = "step-000001"


def stop_run(corpus: Path) -> None:
    """Copy a run and take back its last step."""
    copy_parts(SHARDS, TOKENIZER, MANIFEST, RUN)(corpus)
    run = Path(RUN)
    shutil.rmtree(run / "final")
    for folder in (run / "checkpoints").iterdir():
        if folder.is_dir() and folder.name != STEP:
            shutil.rmtree(folder)
    (run / "checkpoints" / "latest").write_text(STEP, encoding="utf-8")


def resume_run(file: str) -> Reading:
    """Continue the run to its end."""
    call_main(trainer.main, "--manifest", MANIFEST)
    weights = Path(RUN, "final", "model.safetensors").read_bytes()
    losses = [json.loads(line)["loss"] for line in Path(RUN, "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return Reading({"weights": digest_of(weights), "losses": str(losses)})


def export_checkpoint(file: str) -> Reading:
    """Export the weights of a checkpoint."""
    call_main(export_command.main, "--checkpoint", f"{RUN}/checkpoints/{STEP}", "--out", "exported")
    return Reading({path.name: digest_of(path.read_bytes()) for path in sorted(Path("exported").iterdir())})


def repeat_run(file: str) -> Reading:
    """Train a finished run again, which only compares its settings."""
    call_main(trainer.main, "--manifest", MANIFEST)
    return Reading({"final": digest_of(Path(RUN, "final", "model.safetensors").read_bytes())})


def report_run(file: str) -> Reading:
    """Write the report of the run. What is damaged is named, and left out of the page."""
    try:
        call_main(report.main, RUN, "--out", "report.html")
    except CommandError as error:
        if not str(error).startswith("status 1:") or not Path("report.html").is_file():
            raise
        return Reading({}, {"page": printed()})
    return Reading({"page": digest_of(Path("report.html").read_bytes())})


def export_weights(corpus: Path) -> None:
    """Export the final weights of the run in several files."""
    copy_parts(TOKENIZER, MANIFEST)(corpus)
    shutil.copytree(corpus / TOKENIZER, TOKENIZER, dirs_exist_ok=True)
    export(corpus / RUN / "final", Path(WEIGHTS), shard_bytes=20_000)


def drop_digests(corpus: Path) -> None:
    """Copy the run with adapters without the digests of its final weights, so that damage reaches what reads them."""
    _ADAPTER_RUN(corpus)
    path = Path(ADAPTED, "final", "config.json")
    config = json.loads(path.read_text(encoding="utf-8"))
    for name in ("digests", DIGEST):
        del config[name]
    path.write_text(json.dumps(config), encoding="utf-8")


def export_merged(file: str) -> Reading:
    """Export the weights of the run with its adapters merged into them."""
    call_main(export_command.main, "--checkpoint", ADAPTED, "--merge", "--out", "exported")
    return Reading({path.name: digest_of(path.read_bytes()) for path in sorted(Path("exported").iterdir())})


def ask_adapted(file: str) -> Reading:
    """Ask the final weights, with their adapters, a question."""
    return _ask(f"{ADAPTED}/final")


def ask_exported(file: str) -> Reading:
    """Ask the exported weights a question."""
    return _ask(WEIGHTS)


def ask_final(file: str) -> Reading:
    """Ask the final weights of the run a question."""
    return _ask(f"{RUN}/final")


def _ask(weights: str) -> Reading:
    options = ("--checkpoint", weights, "--manifest", MANIFEST, "--question", "Hello?", "--max-new-tokens", "4")
    call_main(chat.main, *options)
    return Reading({"answer": digest_of(printed())})


_FINISHED = copy_parts(SHARDS, TOKENIZER, MANIFEST, RUN)
_ADAPTER_RUN = copy_parts(TOKENIZER, MANIFEST, f"{RUN}/final", ADAPTED)
#: the adapters, and the file that names the weights that they belong to
_ADAPTERS = (f"{ADAPTED}/final/adapters/*/*", f"{ADAPTED}/final/config.json")

RUN_TARGETS = (
    Target("checkpoints", stop_run, (f"{RUN}/checkpoints/**/*",), resume_run, share=0.4),
    Target("checkpoint-export", stop_run, (f"{RUN}/checkpoints/{STEP}/*", f"{RUN}/manifest.yaml"), export_checkpoint),
    Target("run-settings", _FINISHED, (f"{RUN}/settings.json",), repeat_run, share=0.5),
    Target("run-log", _FINISHED, (f"{RUN}/log.jsonl", f"{RUN}/manifest.yaml", f"{RUN}/ledger/*"), report_run, True),
    Target("scores", _FINISHED, (f"{RUN}/evaluation.json",), report_run, may_lack=True, share=0.5),
    Target("weights", _FINISHED, (f"{RUN}/final/*",), ask_final, is_truth=True),
    Target("exported-weights", export_weights, (f"{WEIGHTS}/*",), ask_exported, is_truth=True),
    Target("adapters", _ADAPTER_RUN, _ADAPTERS, ask_adapted, share=0.2),
    Target("adapters-no-digests", drop_digests, _ADAPTERS, ask_adapted, is_truth=True, share=0.5),
    Target("adapter-export", drop_digests, _ADAPTERS, export_merged, is_truth=True, share=0.5),
)
