"""Small exports that load by themselves, loaded by transformers as a user loads them."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoProcessor, dynamic_module_utils

from framestream.pipeline.config.manifest import Manifest
from framestream.pipeline.config.model import InitFromConfig, ModelConfig
from framestream.pipeline.evaluation.prompts import PromptBuilder
from framestream.pipeline.loading.batch import Batch
from framestream.pipeline.shards.memory_index import MediaFile, MediaFileCache
from framestream.pipeline.tokenization.chat_template import build_chat_template
from framestream.trainer.model.video_llm import build_model
from framestream.trainer.weights.load import initialize, save_weights
from tests.helpers.model.manifests import manifest
from tests.helpers.model.rows import SIZE, SMALL
from tests.helpers.paths import ROOT

TOKENIZER = ROOT / "tests" / "golden" / "tokens_labels" / "tokenizer"


def small_manifest(cfg: ModelConfig = SMALL, tied: bool = False, **frames: Any) -> Manifest:
    """Return the manifest of a small random model with the golden tokenizer; ``frames`` replace fields of it."""
    language = dataclasses.replace(cfg.language_model, vocab_size=1024, tie_word_embeddings=tied)
    made = manifest(SIZE, dataclasses.replace(cfg, language_model=language))
    return dataclasses.replace(
        made,
        frames=dataclasses.replace(made.frames, **{"min": 4, "max": 8, **frames}),
        images=dataclasses.replace(made.images, max_grid=2),
        text=dataclasses.replace(made.text, tokenizer=str(TOKENIZER)),
        init_from=InitFromConfig(vision_tower="random", language_model="random"),
        seed=5,
    )


def finished_run(folder: Path, made: Manifest, dtype: torch.dtype = torch.float32) -> Path:
    """Write a run with random final weights whose answers differ; return its folder."""
    model = build_model(made)
    initialize(model, made)
    with torch.no_grad():
        if not made.model.language_model.tie_word_embeddings:  # it is the head, too
            model.language_model.model.embed_tokens.weight.mul_(30)
        model.connector.mlp[2].weight.mul_(30)
    save_weights(model.to(dtype), folder / "final", made)
    return folder


def load_export(folder: Path, **settings: Any) -> tuple[Any, Any]:
    """Load model and processor as a user does; the code is cached in a folder of this process."""
    _own_module_cache()
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **settings)
    return model.eval(), AutoProcessor.from_pretrained(folder, trust_remote_code=True)


def chat_prompt(made: Manifest, question: str, files: Sequence[MediaFile]) -> tuple[Batch, list[str]]:
    """Return the prompt of the chat about files, and the time messages of these."""
    views = MediaFileCache(made).media_views(files)
    turns = [{"from": "human", "value": "<image>\n" * len(files) + question}]
    batch = PromptBuilder(made, views, build_chat_template(made)).build(turns, range(len(files)))
    return batch, [view.message for view in views.views(list(range(len(files))))]


@functools.cache
def _own_module_cache() -> None:
    folder = tempfile.mkdtemp(prefix="modules-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    dynamic_module_utils.HF_MODULES_CACHE = folder
