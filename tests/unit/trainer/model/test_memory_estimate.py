"""The estimate of memory: what is divided among ranks, and what each level of recomputation keeps."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from framestream.pipeline.config.manifest import Manifest
from framestream.pipeline.config.model import LanguageModelConfig, ModelConfig, VisionTowerConfig
from framestream.pipeline.config.training import PartConfig
from framestream.trainer.model import cost
from framestream.trainer.model.memory_estimate import RowShape, estimate_memory, fullest_row
from framestream.trainer.model.video_llm import VideoLLM
from framestream.trainer.training.memory_plan import row_shape
from tests.helpers.model.manifests import FROZEN, TRAINED, manifest
from tests.helpers.model.rows import SIZE, Dialogue, dialogue, pack, small_model

VIDEO = RowShape(clips=128, tiles=0, tokens=8448, labeled=256)  #: of 512 frames


def trained(settings: Manifest, **train: object) -> Manifest:
    """The manifest with other fields of ``train``."""
    return dataclasses.replace(settings, train=dataclasses.replace(settings.train, **train))


def test_states_are_divided_as_the_stage_says() -> None:
    settings = manifest()
    total = sum(cost.count_parameters(settings).values())
    expected = {1: 4 + 12 / 8, 2: 2 + (4 + 12) / 8, 3: (2 + 4 + 12) / 8}
    for stage, each in expected.items():
        states = estimate_memory(trained(settings, zero_stage=stage), VIDEO, 8).states
        assert states == pytest.approx(each * total, rel=1e-6)
    assert estimate_memory(trained(settings, offload="all"), VIDEO, 8).states == 0


def kept(level: str, **parts: PartConfig) -> int:
    """Bytes that a row of the published model keeps."""
    return estimate_memory(trained(manifest(**parts), gradient_checkpointing=level), VIDEO, 32).kept


def test_what_is_recomputed_is_not_kept() -> None:
    """The published width: a layer of Qwen2-7B keeps 218 KiB a token, and its input is 7 KiB."""
    least = kept("all", vision_tower=FROZEN)
    eight, all_layers = (kept(level, vision_tower=FROZEN) - least for level in ("layers:20", "tower"))
    assert eight / 8 / VIDEO.tokens == pytest.approx((218 - 7) * 1024, rel=0.01)
    assert all_layers == pytest.approx(28 / 8 * eight, rel=1e-6)
    assert kept("none") - kept("tower") == pytest.approx(23 * 16 * 1024 * 2 * 128 * 784, rel=1e-6)


def test_the_fullest_row_needs_more_than_any_sample() -> None:
    settings = manifest()
    fullest = fullest_row(settings)
    assert fullest == RowShape(clips=512, tiles=0, tokens=32_768, labeled=32_768)
    for level in ("all", "none"):
        settings = trained(settings, gradient_checkpointing=level)
        most = estimate_memory(settings, fullest, 32).total
        for row in (VIDEO, RowShape(0, 0, 32_768, 32_768), RowShape(0, 512, 32_768, 10)):
            assert estimate_memory(settings, row, 32).total <= most


def test_freezing_and_more_ranks_never_need_more() -> None:
    most = estimate_memory(manifest(), VIDEO, 8).total
    for name in ("vision_tower", "connector", "language_model"):
        assert estimate_memory(manifest(**{name: FROZEN}), VIDEO, 8).total < most
    assert estimate_memory(manifest(), VIDEO, 16).total < most


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Add up the storages that autograd keeps for the backward pass, without the weights'."""

    def __init__(self, model: VideoLLM) -> None:
        super().__init__(self._pack, lambda tensor: tensor)
        self._weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self._storages: dict[int, torch.UntypedStorage] = {}  # kept, so that no address is used twice

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._weights:
            self._storages[storage.data_ptr()] = storage
        return tensor

    @property
    def total(self) -> int:
        return sum(storage.nbytes() for storage in self._storages.values())


@pytest.mark.parametrize(
    ("dialogues", "tower"),
    [([dialogue(0, clips=8, text=20)], TRAINED), ([dialogue(0, text=700), dialogue(1, clips=1, text=300)], FROZEN)],
    ids=["video", "text"],
)
def test_kept_bytes_are_those_that_autograd_saves(dialogues: list[Dialogue], tower: PartConfig) -> None:
    language = LanguageModelConfig(
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
    )
    cfg = ModelConfig(
        vision_tower=VisionTowerConfig(width=512, depth=4, heads=8, table_side=8), language_model=language
    )
    settings = trained(manifest(SIZE, cfg, vision_tower=tower), gradient_checkpointing="none")
    model, row = small_model(cfg=cfg).bfloat16().train(), pack(dialogues)
    model.vision_tower.requires_grad_(tower.train)
    saved = SavedBytes(model)
    with saved:
        model(row)
    assert estimate_memory(settings, row_shape(row), 1).kept == pytest.approx(saved.total, rel=0.15)
