"""Compare the training speed of this checkout with an earlier commit, on stages 2 and 3 of the demo.

    python -m benchmarks.training.speed --before REV [--steps 60] [--rounds 2]

Needs the shards and the runs of ``make demo``. Both commits train the same manifests on the same shards, on two ranks
under ZeRO-3, from the weights of the stage before. Fields that the earlier commit does not know are left out there.
Both take the dialogues in the order ``shuffle``, so that they train on the same ones. With ``--steps 0`` they train the
whole stage, this checkout in the order of the manifest. The runs alternate, ``--rounds`` times. Prints the dialogues a
second of each run without its first steps, the ratio of the best ones, and, in the same order, the largest relative
difference of the losses of the first steps.
"""

from __future__ import annotations

import argparse
import copy
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from tests.helpers.corpora import training_corpus as corpus
from tests.helpers.paths import ROOT

LEFT_OUT = 5  #: first steps of a run, which read the shards for the first time
COMPARED = 5  #: steps whose losses are compared
#: fields that the earlier commit does not know
NEW_FIELDS = {
    "train": ("matmul_precision", "trackers", "tracker_project"),
    "evaluate": ("every", "questions", "best", "patience"),
}
NEW_FIELDS_OF_PARTS = ("lora",)


def main() -> int:
    """Run both commits in turn and print the table; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", required=True, help="the earlier commit")
    parser.add_argument("--steps", type=int, default=60, help="of each run; 0 for the whole stage (default: 60)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        before = Path(scratch) / "before"
        subprocess.run(["git", "worktree", "add", "--detach", before, options.before], cwd=ROOT, check=True)
        (before / "demo").symlink_to(ROOT / "demo")
        try:
            print("| stage | before, dialogues/s | now, dialogues/s | ratio | difference of losses |")
            print("| --- | --- | --- | --- | --- |")
            for stage in options.stages:
                print(_compare(stage, before, Path(scratch), options.steps, options.rounds), flush=True)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", before], cwd=ROOT, check=True)
    return 0


def _compare(stage: int, before: Path, scratch: Path, steps: int, rounds: int) -> str:
    """Train a stage with both commits in turn; return a row of the table."""
    manifest = yaml.safe_load((ROOT / "demo" / "runs" / f"stage{stage}" / "manifest.yaml").read_text())
    manifest["train"]["save_every"] = 10**6
    manifest["evaluate"]["every"] = 0
    earlier = copy.deepcopy(manifest)
    earlier["batching"]["order"] = "shuffle"
    if steps:
        earlier["train"]["max_steps"] = steps
        manifest = earlier
    settings = {before: _without_new_fields(earlier), ROOT: manifest}
    runs: dict[Path, list[list[dict]]] = {before: [], ROOT: []}
    for number in range(rounds):
        for code, records in runs.items():
            records.append(_train(settings[code], code, scratch / f"run-{stage}-{number}-{code.name}"))
    speeds = {code: [_dialogues_per_s(record) for record in records] for code, records in runs.items()}
    losses = zip(runs[before][0][:COMPARED], runs[ROOT][0][:COMPARED], strict=True)
    apart = max(abs(ours["loss"] - theirs["loss"]) / theirs["loss"] for theirs, ours in losses)
    difference = f"{apart:.1e}" if steps else "another order"
    shown = [", ".join(f"{speed:.1f}" for speed in speeds[code]) for code in (before, ROOT)]
    return f"| {stage} | {shown[0]} | {shown[1]} | {max(speeds[ROOT]) / max(speeds[before]):.2f} | {difference} |"


def _without_new_fields(manifest: dict) -> dict:
    known = copy.deepcopy(manifest)
    for section, names in NEW_FIELDS.items():
        known[section] = {name: value for name, value in known[section].items() if name not in names}
    for part in ("vision_tower", "connector", "language_model"):
        settings = known["train"][part]
        known["train"][part] = {name: value for name, value in settings.items() if name not in NEW_FIELDS_OF_PARTS}
    return known


def _train(manifest: dict, code: Path, output: Path) -> list[dict]:
    """Train with the code of ``code``; return the records of the log."""
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({**manifest, "output": str(output)}))
    command = corpus.train_command(path, 2)
    environment = {**corpus.environment(), "PYTHONPATH": str(code)}
    done = subprocess.run(command, cwd=code, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} in {code}: exit {done.returncode}\n{done.stderr[-2000:]}")
    return corpus.log(output)


def _dialogues_per_s(records: list[dict]) -> float:
    timed = records[LEFT_OUT:]
    return sum(record["dialogues"] for record in timed) / sum(record["seconds"] for record in timed)


if __name__ == "__main__":
    sys.exit(main())
