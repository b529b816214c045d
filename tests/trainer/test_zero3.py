"""Two ZeRO-3 ranks with rows of different kinds neither hang nor differ from one process."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.manifest import InitFrom, Manifest
from tests.trainer.model.rows import INTERNVIDEO2, SIZE, SMALL, dialogue, pack
from tests.trainer.model.test_cost import FROZEN, manifest
from trainer.engine import freeze
from trainer.model.video_llm import build_model
from trainer.weights import initialise, load_pretrained, save

RATE = 1e-2
ROOT = Path(__file__).parents[2]


STARTS = {  #: folder of the start weights -> architecture
    "start": SMALL,
    "tied": dataclasses.replace(
        SMALL, language_model=dataclasses.replace(SMALL.language_model, tie_word_embeddings=True)
    ),
    "internvideo2": INTERNVIDEO2,
}


def settings(folder: Path, start: str = "start", **train) -> Manifest:
    base = manifest(SIZE, STARTS[start], **train)
    return dataclasses.replace(
        base,
        train=dataclasses.replace(base.train, dtype="fp32", clip_norm=0.0),
        init_from=InitFrom(run=str(folder / start)),
    )


def cases(folder: Path) -> dict[str, tuple[Manifest, list[tuple]]]:
    """Name -> manifest and, for every step, the row of each rank."""
    text, video = dialogue(0, text=20), dialogue(1, clips=2, text=11)
    stills, both, long = dialogue(2, stills=3), dialogue(3, clips=1, stills=1, text=9), dialogue(4, clips=9, text=60)
    steps = [
        (pack([text]), pack([video])),
        (pack([long, text], groups=9), pack([text], groups=9)),  # nine groups with clips beside nine dummies
        (pack([]), pack([both, text, stills])),
        (pack([stills]), pack([], groups=1)),
    ]
    return {
        "all_trained": (settings(folder), steps),
        "stage_1": (settings(folder, vision_tower=FROZEN, language_model=FROZEN), steps),
        "stage_4": (settings(folder, language_model=FROZEN), steps),
        "tied_head": (settings(folder, "tied"), steps),
        "internvideo2_trained": (settings(folder, "internvideo2"), steps),
    }


def one_process(settings: Manifest, steps: list[tuple]) -> tuple[list[list[float]], dict, dict]:
    """Losses of every step and rank, final weights, and which of them are clear, of plain AdamW on the mean over ranks.

    AdamW divides a gradient by its own size, so where one is but rounding beside those of the same weight, so is the
    step it leads to: such elements are not clear.
    """
    model = build_model(settings)
    initialise(model, settings)
    freeze(model.parts(), settings.train)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    losses, clear = [], {}
    for rows in steps:
        optimizer.zero_grad()
        loss = [model(row) for row in rows]
        (sum(loss) / len(loss)).backward()
        optimizer.step()
        losses.append([value.item() for value in loss])
        for key, parameter in model.named_parameters():
            size = torch.zeros(()) if parameter.grad is None else parameter.grad.abs()
            sure = (size == 0) | (size > 1e-4 * size.square().mean().sqrt())
            clear[key] = clear.get(key, torch.ones_like(parameter, dtype=torch.bool)) & sure
    return losses, dict(model.named_parameters()), clear


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Start weights, then one two-rank run of all cases."""
    folder = tmp_path_factory.mktemp("zero3")
    for start in STARTS:
        random = dataclasses.replace(
            settings(folder, start), init_from=InitFrom(vision_tower="random", language_model="random")
        )
        model = build_model(random)
        initialise(model, random)
        save(model, folder / start / "final", random)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    worker = str(Path(__file__).with_name("zero3_worker.py"))
    done = subprocess.run(
        [*launch, worker, str(folder)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", list(cases(Path())))
def test_two_sharded_ranks_equal_one_process(folder, name):
    losses, weights, clear = one_process(*cases(folder)[name])
    for rank in range(2):
        found = json.loads((folder / f"{name}-{rank}.json").read_text())
        assert found == pytest.approx([step[rank] for step in losses], rel=2e-4, abs=1e-6)
    for key, parameter in load_pretrained(folder / name).named_parameters():
        found, expected = parameter[clear[key]], weights[key][clear[key]]
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3, msg=lambda m, k=key: f"{k}: {m}")
    assert sum(int(c.sum()) for c in clear.values()) > 0.99 * sum(c.numel() for c in clear.values())
