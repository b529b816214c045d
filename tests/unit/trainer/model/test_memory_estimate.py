"""The estimate of memory: what is divided among ranks, and what each level of recomputation keeps."""

from __future__ import annotations

import dataclasses

import pytest

from framestream.pipeline.config.manifest import Manifest
from framestream.pipeline.config.training import LoraConfig, PartConfig
from framestream.trainer.model import cost
from framestream.trainer.model.memory_estimate import (
    RowShape,
    estimate_memory,
    fullest_row,
)
from framestream.trainer.training.deepspeed_config import deepspeed_config
from tests.helpers.model.manifests import FROZEN, manifest

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


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_buffers_are_those_of_deepspeeds_configuration(stage: int) -> None:
    """Buckets are counted in parameters, of 2 bytes. ZeRO-1 adds gradients in place."""
    settings = trained(manifest(), zero_stage=stage)
    bucket = deepspeed_config(settings, 8, True)["zero_optimization"]["reduce_bucket_size"]
    on_cpu, on_gpu = (estimate_memory(settings, VIDEO, 8, gpu).buffers for gpu in (False, True))
    assert on_cpu == (2 * bucket if stage > 1 else 0)
    assert on_gpu == on_cpu + 2 * 1024**3  # CUDA and NCCL


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


def test_adapters_with_dropout_keep_copies_of_their_inputs() -> None:
    """7 linear layers take 40,448 values; a layer without adapters keeps 29,696 of them once."""
    without, dropped = (
        kept(
            "tower",
            vision_tower=FROZEN,
            language_model=PartConfig(train=True, lr=1e-4, lora=LoraConfig(r=8, dropout=p)),
        )
        for p in (0.0, 0.1)
    )
    assert dropped - without == VIDEO.tokens * 28 * (40_448 * 3 - 29_696 * 2)
    assert without - kept("tower", vision_tower=FROZEN) == VIDEO.tokens * 28 * 7 * 8 * 2


def test_the_fullest_row_needs_more_than_any_sample() -> None:
    settings = manifest()
    fullest = fullest_row(settings)
    assert fullest == RowShape(clips=512, tiles=0, tokens=32_768, labeled=32_768)
    for level in ("all", "none"):
        settings = trained(settings, gradient_checkpointing=level)
        most = estimate_memory(settings, fullest, 32).total
        for row in (
            VIDEO,
            RowShape(0, 0, 32_768, 32_768),
            RowShape(0, 512, 32_768, 10),
        ):
            assert estimate_memory(settings, row, 32).total <= most


def test_freezing_and_more_ranks_never_need_more() -> None:
    most = estimate_memory(manifest(), VIDEO, 8).total
    for name in ("vision_tower", "connector", "language_model"):
        assert estimate_memory(manifest(**{name: FROZEN}), VIDEO, 8).total < most
    assert estimate_memory(manifest(), VIDEO, 16).total < most
