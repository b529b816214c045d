"""Memory before a run, of its first steps, and when it does not suffice."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from framestream.pipeline.config.manifest import Manifest, load_manifest
from framestream.trainer.distributed.process_group import DistributedContext
from framestream.trainer.model.memory_estimate import GIB, estimate_memory, fullest_row
from framestream.trainer.training import memory_plan
from framestream.trainer.training.memory_plan import (
    DeviceMemoryError,
    MemoryComparison,
    check_memory,
    choose_level,
    host_bytes,
    name_memory_errors,
    resolve_recomputation,
)
from tests.helpers.model.manifests import manifest
from tests.helpers.model.rows import SIZE, SMALL, dialogue, pack
from tests.helpers.paths import ROOT

STAGE3 = load_manifest(ROOT / "manifests" / "stage3.yaml")
MANY = DistributedContext(0, 32, torch.device("cpu"))
ALONE = DistributedContext(0, 1, torch.device("cpu"))


def trained(settings: Manifest, **train: str) -> Manifest:
    """The manifest with other fields of ``train``."""
    return dataclasses.replace(settings, train=dataclasses.replace(settings.train, **train))


@pytest.mark.parametrize(
    ("world", "local_world", "offload", "device", "host", "message"),
    [  # 7.92 billion weights in bf16, float32 gradients, and 12 bytes each of the optimizer: 133 GiB
        (1, 1, "none", 80, 999, "need 132.8 GiB a rank, the GPU has 80.0 GiB"),
        (1, 1, "none", 140, 999, None),
        (8, 8, "none", 80, 999, None),
        (1, 1, "optimizer", 80, 64, "train.offload puts 118.1 GiB into this machine's memory, which is 64.0 GiB"),
        (1, 1, "optimizer", 80, 128, None),
        (16, 8, "optimizer", 80, 40, "train.offload puts 59.0 GiB"),
        (4, 4, "none", None, 64, "need 33.2 GiB a rank, a rank's share of this machine has 16.0 GiB"),
    ],
)
def test_what_cannot_fit_is_refused(world, local_world, offload, device, host, message) -> None:
    settings = trained(STAGE3, offload=offload)
    faults = check_memory(settings, world, local_world, device and device * GIB, host * GIB)
    assert len(faults) == (message is not None)
    if message:
        assert message in faults[0] and "\n" not in faults[0]


def test_what_may_not_fit_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert check_memory(STAGE3, 8, 8, 24 * GIB, 999 * GIB) == []
    (record,) = caplog.records
    message = record.getMessage()
    assert record.levelno == logging.WARNING and message.startswith("memory: about ")
    assert "for the fullest row, the GPU has 24.0 GiB" in message


def test_the_machines_memory_is_at_most_what_it_has() -> None:
    total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    assert 2**28 < host_bytes() <= int(total.split()[1]) * 1024


def test_auto_recomputes_as_little_as_fits() -> None:
    """Every level that was passed over needs too much, and more memory never means more recomputation."""
    layers, chosen = STAGE3.model.language_model.num_hidden_layers, []
    for limit in range(20, 320, 20):
        level = choose_level(STAGE3, 32, limit * GIB, gpu=True)
        chosen.append(trained(STAGE3, gradient_checkpointing=level).train.recomputation(layers))
        need = estimate_memory(trained(STAGE3, gradient_checkpointing=level), fullest_row(STAGE3), 32).total
        assert level == "all" or need <= limit * GIB
        if level.startswith("layers:") and chosen[-1].layers > 1:
            less = trained(STAGE3, gradient_checkpointing=f"layers:{chosen[-1].layers - 1}")
            assert estimate_memory(less, fullest_row(STAGE3), 32).total > limit * GIB
    assert chosen == sorted(chosen, reverse=True) and chosen[0] == (True, layers)
    assert len({recomputed.layers for recomputed in chosen}) > 5


def test_auto_is_what_fits_into_the_smallest_gpu(monkeypatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, memory_plan.__name__)
    auto = trained(STAGE3, gradient_checkpointing="auto")
    levels = []
    for sizes in ([140], [140, 80], [80, 140]):
        monkeypatch.setattr(memory_plan, "device_bytes", lambda context, sizes=sizes: sizes[0] * GIB)
        monkeypatch.setattr(
            memory_plan, "gather_objects", lambda own, context, sizes=sizes: [size * GIB for size in sizes]
        )
        levels.append(resolve_recomputation(auto, MANY, 1).train.gradient_checkpointing)
    assert levels[0] != levels[1] == levels[2]
    assert f"train.gradient_checkpointing: auto is {levels[0]}; the fullest row needs about " in caplog.text
    assert resolve_recomputation(STAGE3, ALONE, 1) is STAGE3


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
        RuntimeError("NCCL Error 1: unhandled cuda error, Cuda failure 2 'out of memory'"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
@pytest.mark.parametrize(
    ("level", "fix"),
    [
        ("layers:1", "set train.gradient_checkpointing: all (now layers:1), or fewer text.max_tokens (now 32,768)"),
        ("all", "set train.offload: optimizer (now none), or fewer text.max_tokens (now 32,768)"),
    ],
)
def test_a_row_that_does_not_fit_is_named(error: RuntimeError, level: str, fix: str) -> None:
    row = pack([dialogue(number, clips=1) for number in range(5)])
    settings = trained(manifest(SIZE, SMALL), gradient_checkpointing=level)
    settings = dataclasses.replace(settings, text=dataclasses.replace(settings.text, max_tokens=32_768))
    with pytest.raises(DeviceMemoryError) as caught, name_memory_errors(row, "forward pass of it", settings, ALONE):
        raise error
    message = str(caught.value)
    assert message.startswith("rank 0 has not enough memory in the forward pass of it: 380 tokens and 20 frames of 5 ")
    group = "lower model.vision_tower.group_tokens (now 512), "
    assert f"dialogues (d0, d1, d2, ...), 0.0 GiB estimated; {group}set" in message and message.endswith(fix)
    with pytest.raises(RuntimeError, match="^another$"), name_memory_errors(row, "x", settings, ALONE):
        raise RuntimeError("another")


def test_first_steps_are_compared_with_the_estimate(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, memory_plan.__name__)
    settings, rows = manifest(SIZE, SMALL), [pack([dialogue(0, clips=clips)]) for clips in (1, 4, 2, 9)]
    comparison = MemoryComparison(settings, SimpleNamespace(world=1, device=torch.device("meta")))
    counted = comparison.count_rows(iter(rows))
    for peak in (5 * GIB, 3 * GIB, 4 * GIB, 9 * GIB):
        next(counted)
        comparison.end_step(peak)
    (record,) = caplog.records
    assert "memory of the first 3 steps: 5.0 GiB allocated, 0.0 GiB estimated; the fullest row" in record.getMessage()
