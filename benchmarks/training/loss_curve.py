"""Compare the loss curve of the trainer under ZeRO-3 with plain PyTorch: same data, same initial weights.

    python -m benchmarks.training.loss_curve --manifest manifests/demo/stage2.yaml --steps 100

Runs the loop of ``python -m trainer`` on ``--ranks`` processes. Then one process runs the same global batches through
the same model with torch's AdamW and gradient clipping, without DeepSpeed. Both use float32 and weights from the seed,
and both record which token every patch is merged into. Prints the losses, their largest relative difference, and the
first global batch in which a patch was merged into another token. From there on, rounding has changed a discrete
choice, and the curves belong to different runs.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from framestream.pipeline import build_loader
from framestream.pipeline.config.manifest import Manifest, load_manifest
from framestream.pipeline.config.model import InitFromConfig
from framestream.trainer.model import tome
from framestream.trainer.model.video_llm import VideoLLM, build_model
from framestream.trainer.training.drop_path_rng import drop_path_random, unit_sample_ids
from framestream.trainer.training.loop import resolve_cost, total_steps, train
from framestream.trainer.training.optim import freeze, parameter_groups, set_learning_rates
from framestream.trainer.weights.load import initialize

TOLERANCE = 1e-4  #: relative difference of a loss, up to the first choice that differs
SHOWN = 10  #: number of printed losses

#: (epoch, global batch, dialogue) -> digests of the choices of its clips and tiles
Choices = dict[tuple[int, int, str], list[str]]


def curve_manifest(manifest: Path, overrides: list[str], steps: int, output: Path) -> Manifest:
    """Load the manifest in float32 under ZeRO-3, with initial weights from the seed."""
    fixed = [
        f"output={output}",
        f"train.max_steps={steps}",
        "train.dtype=fp32",
        "train.zero_stage=3",
        "evaluate.every=0",
    ]
    random = InitFromConfig(vision_tower="random", connector="random", language_model="random")
    return dataclasses.replace(load_manifest(manifest, [*overrides, *fixed]), init_from=random)


@contextlib.contextmanager
def record_choices(choices: Choices) -> Iterator[None]:
    """Record the merging choices of every row that a model computes: 8 bytes of a digest for each clip and tile."""
    assign, forward, rows = tome.assign_tokens, VideoLLM.forward, []

    def recording_assign(patches: torch.Tensor, wanted: int, heads: int) -> torch.Tensor:
        token = assign(patches, wanted, heads)
        rows.extend(hashlib.sha256(unit.numpy().tobytes()).hexdigest()[:16] for unit in token.cpu())
        return token

    def recording_forward(model: VideoLLM, batch) -> torch.Tensor:
        rows.clear()
        loss = forward(model, batch)
        for dialogue, choice in zip(unit_sample_ids(batch).tolist(), rows, strict=False):  # dummies come last
            choices.setdefault((batch.epoch, batch.step, batch.keys[dialogue]), []).append(choice)
        return loss

    tome.assign_tokens, VideoLLM.forward = recording_assign, recording_forward
    try:
        yield
    finally:
        tome.assign_tokens, VideoLLM.forward = assign, forward


def one_rank(manifest: Manifest, folder: Path) -> None:
    """Run one rank of the trainer and write its choices to FOLDER/rank*.json."""
    choices: Choices = {}
    with record_choices(choices):
        train(manifest)
    rows = [[*key, chosen] for key, chosen in choices.items()]
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(rows))


def train_plain(manifest: Manifest) -> tuple[list[float], Choices]:
    """Run the same training in plain PyTorch; return losses and choices."""
    manifest = resolve_cost(manifest)
    torch.set_float32_matmul_precision(manifest.train.matmul_precision)
    loader = build_loader(manifest)
    model = build_model(manifest)
    initialize(model, manifest)
    freeze(model.parts(), manifest.train)
    model.train()
    options = manifest.train
    optimizer = torch.optim.AdamW(
        parameter_groups(model.parts(), options), lr=0.0, betas=(options.beta1, options.beta2), eps=options.epsilon
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    losses, choices, steps, loss = [], {}, total_steps(manifest, loader.num_batches), 0.0
    with record_choices(choices):
        for row in (row for _ in range(options.epochs) for row in loader):
            row.drop_path_rand = drop_path_random(row, manifest.seed, model.vision_tower.num_drop_path_rands)
            part = model(row) / row.total_weight
            part.backward()
            loss += part.item()
            if not row.is_last:
                continue
            set_learning_rates(optimizer, len(losses), steps, manifest)
            if options.clip_norm:
                torch.nn.utils.clip_grad_norm_(trained, options.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss)
            loss = 0.0
            if len(losses) == steps:
                break
    return losses, choices


def first_difference(ours: Choices, theirs: Choices) -> tuple[int, int, str] | None:
    """Return epoch, global batch and dialogue of the first choice that differs."""
    return min((key for key in ours if ours[key] != theirs[key]), default=None)


def report(ours: list[float], theirs: list[float], flip: tuple[int, int, str] | None, batches: int) -> bool:
    """Print the comparison; return whether the curves agree up to the first choice that differs."""
    diffs = [abs(mine - other) / abs(other) for mine, other in zip(ours, theirs, strict=True)]
    print("| step | trainer | plain PyTorch | relative difference |\n| --- | --- | --- | --- |")
    for step in sorted({round(i * (len(ours) - 1) / (SHOWN - 1)) for i in range(SHOWN)}):
        print(f"| {step + 1} | {ours[step]:.6f} | {theirs[step]:.6f} | {diffs[step]:.1e} |")
    same = len(ours)
    if flip is not None:
        epoch, step, key = flip
        same = epoch * batches + step
        print(
            f"first choice that differs: step {same + 1}, dialogue {key}; relative difference there {diffs[same]:.1e}"
        )
    else:
        print("no patch was merged into another token")
    before = max(diffs[:same], default=0.0)
    print(f"largest relative difference: {before:.1e} in the {same} steps before, {max(diffs):.1e} in all {len(ours)}")
    return before <= TOLERANCE


def main() -> int:
    """Run both and print the comparison; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest", type=Path, default=Path("manifests/demo/stage2.yaml"))
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="override a manifest field")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="new folder in which to keep the trainer's run")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)  # folder of the run of this rank
    options = parser.parse_args()
    if options.rank_of:
        one_rank(curve_manifest(options.manifest, options.set, options.steps, options.rank_of / "run"), options.rank_of)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        manifest = curve_manifest(options.manifest, options.set, options.steps, run)
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(options.ranks)]
        subprocess.run(
            [*launch, "-m", "benchmarks.training.loss_curve", *sys.argv[1:], "--rank-of", folder], check=True
        )
        records = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        chosen: Choices = {}
        for path in Path(folder).glob("rank*.json"):
            chosen |= {(epoch, step, key): found for epoch, step, key, found in json.loads(path.read_text())}
        print(f"{options.ranks} ranks, ZeRO-{records[0]['zero_stage']}, {len(records)} steps of {options.manifest}")
        if options.keep:
            shutil.move(run, options.keep)
    losses, choices = train_plain(manifest)
    batches = build_loader(resolve_cost(manifest)).num_batches
    flip = first_difference(chosen, choices)
    return 0 if report([record["loss"] for record in records], losses, flip, batches) else 1


if __name__ == "__main__":
    sys.exit(main())
