"""Rows of four kinds in every order over the ranks, and the results of one process, for test and worker."""

from __future__ import annotations

import dataclasses
import itertools

import torch

from framestream.pipeline.config.manifest import Manifest
from framestream.pipeline.config.model import InitFromConfig
from framestream.pipeline.loading.batch import Batch
from framestream.trainer.model.video_llm import VideoLLM, build_model
from framestream.trainer.weights.load import initialize
from tests.helpers.model.manifests import manifest
from tests.helpers.model.rows import SMALL, dialogue, pack

SIDE = 160  #: pixels: a still of 100 patches is merged too
KINDS = ("text", "still", "video", "mixed")
ORDERS = list(itertools.permutations(KINDS))
ON_FOUR = [KINDS[n:] + KINDS[:n] for n in range(len(KINDS))]  #: orders for four ranks: each kind is on each rank once
SEEDS = (65, 19, 41)  #: of the noise of still, video and mixed
SOME = ORDERS[::11]  #: for settings that are no different from others but in one thing
SETTINGS = {  #: name -> fields of ``train``, orders
    "zero3": ({"zero_stage": 3}, ORDERS),
    "zero1": ({"zero_stage": 1}, SOME),
    "zero2_offload": ({"zero_stage": 2, "offload": "optimizer"}, SOME),
    "zero3_offload": ({"zero_stage": 3, "offload": "all"}, SOME),
}


def row(kind: str) -> Batch:
    """Return a row of one dialogue of noise; its seed has a margin for all merging choices, which the test checks."""
    made = {
        "text": lambda: dialogue(0, text=30, size=SIDE),
        "still": lambda: dialogue(SEEDS[0], stills=2, text=14, size=SIDE),
        "video": lambda: dialogue(SEEDS[1], clips=3, text=11, size=SIDE),
        "mixed": lambda: dialogue(SEEDS[2], clips=1, stills=1, text=9, size=SIDE),
    }
    return pack([made[kind]()], SIDE)


def side_by_side(order: tuple[str, ...], world: int) -> list[list[Batch]]:
    """Return the rows of each micro-step, one for each rank; they have one to three groups."""
    return [[row(kind) for kind in order[start : start + world]] for start in range(0, len(order), world)]


def settings(**train) -> Manifest:
    """Return the manifest of a small float32 model of which the tests use only the gradient."""
    base = manifest(SIDE, SMALL)
    plain = dataclasses.replace(base.train, dtype="fp32", clip_norm=0.0, persistence_threshold=0, **train)
    return dataclasses.replace(base, train=plain, init_from=InitFromConfig(run="start"))


def one_process() -> tuple[float, dict[str, torch.Tensor], VideoLLM]:
    """Return loss and gradients of the four rows as one global batch without DeepSpeed, and the model."""
    made = settings()
    model = build_model(made)
    initialize(model, made)
    model.train()
    loss = sum(model(row(kind)) for kind in KINDS) / len(KINDS)
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}, model
