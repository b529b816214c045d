"""The training step of ``benchmarks.model.gpu_step`` in plain PyTorch and transformers, one dialogue at a time.

    python -m benchmarks.model.plain_step MANIFEST --steps 6

Dialogues, weights and loss are the trainer's, without packing, DeepSpeed or chunks. Each dialogue runs alone through
the tower (a batch of its clips), the connector and transformers' own Qwen2 with all its logits. AdamW steps at the end
of the global batch. Weights, gradients and moments are float32 under bf16 autocast, as in transformers' Trainer with
``bf16``. Tower blocks and layers are recomputed if the manifest says so. Rows are read before anything is timed. Prints
one JSON object for each step.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.model.plain_parts import PlainTower, plain_merge
from framestream.pipeline import build_loader
from framestream.pipeline.config.manifest import Manifest, load_manifest
from framestream.pipeline.config.model import TOKENS_PER_CLIP
from framestream.pipeline.config.schema import to_dict
from framestream.pipeline.loading.batch import Batch
from framestream.pipeline.tokenization.special_ids import IMAGE_TOKEN_INDEX
from framestream.trainer.model.parts import PARTS
from framestream.trainer.model.video_llm import VideoLLM, build_model
from framestream.trainer.monitoring.device import peak_memory
from framestream.trainer.training.loop import resolve_cost
from framestream.trainer.weights.load import initialize


@dataclass(frozen=True)
class PlainDialogue:
    """One dialogue with videos: ids and labels int64 (L,), clips uint8 (N, T, S, S, 3), its share of the loss."""

    ids: torch.Tensor
    labels: torch.Tensor
    clips: torch.Tensor
    weight: float


def dialogues(rows: list[Batch]) -> Iterator[PlainDialogue]:
    """Yield the dialogues of a global batch; each has the same weight, the mean over its label tokens."""
    total = sum(len(row.keys) for row in rows)
    for row in rows:
        clip, ends = 0, row.cu_seqlens.tolist()
        for start, end in zip(ends, ends[1:], strict=False):
            ids = row.input_ids[start:end]
            clips = int((ids == IMAGE_TOKEN_INDEX).sum()) // TOKENS_PER_CLIP
            yield PlainDialogue(ids, row.labels[start:end], row.clips[clip : clip + clips], 1 / total)
            clip += clips


class PlainModel(nn.Module):
    """The three parts with the weights of ``model``."""

    def __init__(self, manifest: Manifest, model: VideoLLM, flash: bool):
        super().__init__()
        self.cfg, self.recompute = manifest.model.vision_tower, manifest.train.gradient_checkpointing != "none"
        fields = to_dict(manifest.model.language_model)
        rope = {"rope_type": "default", "rope_theta": fields.pop("rope_theta")}
        attention = "flash_attention_2" if flash else "sdpa"
        qwen2 = Qwen2ForCausalLM(Qwen2Config(**fields, rope_parameters=rope, attn_implementation=attention))
        qwen2.load_state_dict(model.language_model.state_dict())
        if self.recompute:  # transformers renamed the method in 5.23
            enable = getattr(qwen2, "activation_checkpointing_enable", None) or qwen2.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        self.language_model = qwen2
        self.vision_tower, self.connector = PlainTower(self.cfg, model.vision_tower), model.connector.mlp
        tower = model.vision_tower
        constants = {"mean": tower.mean, "std": tower.std, "positions": tower.clip_positions}
        for name, values in constants.items():
            self.register_buffer(name, values, persistent=False)
        for name in PARTS:
            getattr(self, name).requires_grad_(getattr(manifest.train, name).train)

    def forward(self, dialogue: PlainDialogue) -> torch.Tensor:
        """Return the mean cross entropy of a dialogue's label tokens."""
        visual = self.connector(plain_merge(self.encode(dialogue.clips), TOKENS_PER_CLIP, self.cfg.heads)).flatten(0, 1)
        image = dialogue.ids == IMAGE_TOKEN_INDEX
        text = self.language_model.get_input_embeddings()(dialogue.ids.masked_fill(image, 0))
        merged = text.index_put((image.nonzero().squeeze(1),), visual.to(text.dtype))
        labels = dialogue.labels[None]
        return self.language_model(inputs_embeds=merged[None], labels=labels, use_cache=False).loss

    def encode(self, clips: torch.Tensor) -> torch.Tensor:
        """Encode a dialogue's clips in one batch to patches (N, t, C)."""
        pixels = (clips.movedim(-1, 1).float() / 255 - self.mean) / self.std
        tower = self.vision_tower
        x = tower.patch_embed["proj"](pixels).flatten(2).transpose(1, 2) + self.positions
        for block in tower.blocks:
            recompute = self.recompute and self.training and torch.is_grad_enabled()
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        return tower.vision_layernorm(x)


def move_to(dialogue: PlainDialogue, device: torch.device) -> PlainDialogue:
    """Copy a dialogue to ``device``."""
    return PlainDialogue(
        *(part.to(device) for part in (dialogue.ids, dialogue.labels, dialogue.clips)), dialogue.weight
    )


def step(model: PlainModel, optimizer: torch.optim.Optimizer, rows: list[Batch], manifest: Manifest) -> dict:
    """Run one optimizer step; return its loss, seconds and peak memory."""
    device, started, losses = next(model.parameters()).device, time.perf_counter(), []
    for dialogue in dialogues(rows):
        with torch.autocast(device.type, torch.bfloat16, enabled=manifest.train.dtype == "bf16"):
            loss = model(move_to(dialogue, device)) * dialogue.weight
        loss.backward()
        losses.append(loss.detach())
    trained = [p for p in model.parameters() if p.requires_grad]
    nn.utils.clip_grad_norm_(trained, manifest.train.clip_norm)
    optimizer.step()
    optimizer.zero_grad()
    loss = float(torch.stack(losses).sum())
    return {"loss": loss, "seconds": time.perf_counter() - started, "peak_memory": peak_memory(device)}


def main() -> None:
    """Print loss, seconds and peak memory of every step, one JSON line each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("manifest")
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    manifest = resolve_cost(load_manifest(options.manifest))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        from flash_attn import flash_attn_func
    except ImportError:
        flash_attn_func = None
    source = build_model(manifest)
    initialize(source, manifest)
    model = PlainModel(manifest, source, flash=flash_attn_func is not None and device.type == "cuda").to(device).train()
    del source
    groups = [
        {"params": list(getattr(model, name).parameters())} for name in PARTS if getattr(manifest.train, name).train
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-5, weight_decay=0, fused=device.type == "cuda")
    batches: list[list[Batch]] = [[]]
    for row in build_loader(manifest):
        batches[-1].append(dataclasses.replace(row, clips=row.clips.clone()))
        if row.is_last:
            batches.append([])
    for number in range(options.steps):
        print(json.dumps(step(model, optimizer, batches[number % (len(batches) - 1)], manifest)), flush=True)


if __name__ == "__main__":
    main()
