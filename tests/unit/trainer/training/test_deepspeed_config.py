"""What the configuration of DeepSpeed takes from the manifest."""

from __future__ import annotations

import dataclasses

import pytest
from deepspeed.utils.config import get_timers_config

from framestream.pipeline.config.manifest import load_manifest
from framestream.trainer.training.deepspeed_config import deepspeed_config, offload_threads
from tests.helpers.model.manifests import manifest
from tests.helpers.paths import ROOT


def test_buckets_hold_the_largest_layer() -> None:
    """Qwen2-7B's layer has 233 million parameters: three matrices of 3584 x 18944, and attention."""
    config = deepspeed_config(load_manifest(ROOT / "manifests" / "stage3.yaml"), 8, True)["zero_optimization"]
    layer = 3 * 3584 * 18944 + 2 * 3584**2 + 2 * 3584 * 512
    assert config["reduce_bucket_size"] == config["stage3_prefetch_bucket_size"] == pytest.approx(layer, rel=1e-3)


def test_no_timer_makes_the_host_wait_for_the_device() -> None:
    assert not get_timers_config(deepspeed_config(manifest(), 8, True)).enabled


@pytest.mark.parametrize(
    ("offload", "environment", "threads"),
    [
        ("none", {"OMP_NUM_THREADS": "1"}, None),
        ("optimizer", {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "8"}, 12),
        ("optimizer", {"OMP_NUM_THREADS": "6", "LOCAL_WORLD_SIZE": "8"}, None),
        ("all", {"LOCAL_WORLD_SIZE": "200"}, 1),
    ],
)
def test_an_offloaded_optimizer_has_the_cores_of_its_rank(offload, environment, threads) -> None:
    settings = manifest()
    settings = dataclasses.replace(settings, train=dataclasses.replace(settings.train, offload=offload))
    assert offload_threads(settings, environment, 96) == threads
