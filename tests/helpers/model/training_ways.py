"""Different ways to run the same training through the real command line, and the differences of their results.

Used by test_equivalence.py and by ``python -m benchmarks.training.equivalence``. The training is stage 2 of the demo:
videos of 4 to 8 frames, tiled images, pairs of images, and text. All three parts learn in float32 from random weights.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors import safe_open

from framestream.pipeline.config.manifest import load_manifest
from framestream.tools import demo_data
from framestream.trainer.model.video_llm import build_model
from framestream.trainer.weights.load import initialize
from framestream.trainer.weights.tensor_files import to_hf_name
from tests.helpers.corpora import training_corpus as corpus

MANIFEST = corpus.PROJECT / "manifests" / "demo" / "stage2.yaml"
SETTINGS = (
    "init_from={run: '', vision_tower: random, connector: random, language_model: random}",
    "train.warmup=0",
    "batching.row_multiple=4",
    "evaluate.every=0",
    "train.matmul_precision=highest",  # the tolerances are those of float32
)
#: relative: largest of a loss, largest of a gradient norm, what training added to the weights (norms of all of them)
TOLERANCES = {"loss": 1e-6, "grad_norm": 1e-5, "update": 1e-4}
ALONE = "batching.row_multiple=16"  #: every dialogue of a global batch is a row of its own
Way = tuple[int, tuple[str, ...]]  #: ranks, and what is assigned beside SETTINGS
WAYS: dict[str, Way] = {  #: the first is what the others are compared with
    "2 ranks, ZeRO-3, packed in 4 rows": (2, ()),
    "1 rank": (1, ()),
    "4 ranks": (4, ()),
    "dialogues alone, 8 micro-steps": (2, (ALONE,)),
    "1 rank, one row": (1, ("batching.row_multiple=1",)),
    "1 rank, 16 micro-steps": (1, (ALONE,)),
    "ZeRO-1": (2, ("train.zero_stage=1",)),
    "ZeRO-2": (2, ("train.zero_stage=2",)),
    "optimiser offloaded": (2, ("train.offload=optimizer",)),
    "all offloaded": (2, ("train.offload=all",)),
    "recomputed": (2, ("train.gradient_checkpointing=all",)),
}


def prepare(folder: Path, share: float) -> None:
    """Write the demo's data (``share`` of it) and the shards of stage 2 below ``folder``."""
    demo_data.generate_demo(folder / "demo" / "data", workers=1, share=share)
    build = (sys.executable, str(corpus.PROJECT / "tools" / "build_shards.py"), "--stage", "2", "--workers", "1")
    corpus.run(*build, "--manifest", str(MANIFEST), cwd=folder)


def command(output: str, way: Way, *more: str) -> list[str]:
    """Return the command of one variant; a single rank is started without a launcher."""
    ranks, assignments = way
    words = corpus.train_command(MANIFEST, ranks, f"output={output}", *SETTINGS, *assignments, *more)
    return words if ranks > 1 else [sys.executable, *words[words.index("-m") :]]


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Return the final weights of a run, by their published names."""
    found = {}
    for path in sorted((run / "final").glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def first_weights() -> dict[str, torch.Tensor]:
    """Return the initial weights of every variant, by their published names."""
    manifest = load_manifest(MANIFEST, list(SETTINGS))
    model = build_model(manifest)
    initialize(model, manifest)
    return {to_hf_name(name): parameter.detach() for name, parameter in model.named_parameters()}


def apart(ours: Path, theirs: Path) -> dict[str, float]:
    """Return the differences of the run ``ours`` from ``theirs``, by the names of ``TOLERANCES``.

    Raises:
        AssertionError: they have different global batches, or weights of different names.
    """
    mine, other = corpus.log(ours), corpus.log(theirs)
    assert [record["batch"] for record in mine] == [record["batch"] for record in other]
    away = {
        name: max(abs(a[name] - b[name]) / b[name] for a, b in zip(mine, other, strict=True))
        for name in ("loss", "grad_norm")
    }
    ended, reference, start = weights(ours), weights(theirs), first_weights()
    assert ended.keys() == reference.keys() == start.keys()
    distance = sum((ended[name] - value).square().sum() for name, value in reference.items()).sqrt()
    update = sum((value - start[name]).square().sum() for name, value in reference.items()).sqrt()
    return {**away, "update": (distance / update).item()}
