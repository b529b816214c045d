"""Peaks of devices by the names that drivers give them, and memory of a process."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch

from framestream.pipeline.config.training import PartConfig, TrainConfig
from framestream.trainer.monitoring.device import named_peak, peak_flops
from tests.helpers.corpora import training_corpus as corpus


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H20", 148.0),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA A100-SXM4-80GB", 311.9),
        ("NVIDIA A10G", 70.0),
        ("NVIDIA L40S", 362.1),
        ("NVIDIA L4", 121.0),
    ],
)
def test_dense_bf16_peak_of_published_names(name, tflops):
    assert named_peak(name) == pytest.approx(tflops * 1e12)


def test_an_unknown_peak_is_none_unless_the_manifest_has_one():
    train = TrainConfig(
        vision_tower=PartConfig(train=False),
        connector=PartConfig(train=True, lr=1e-3),
        language_model=PartConfig(train=False),
    )
    assert named_peak("Tesla T4") is None
    assert peak_flops(train, torch.device("cpu")) is None
    stated = dataclasses.replace(train, peak_tflops=0.25)
    assert peak_flops(stated, torch.device("cpu")) == 0.25e12


def test_peak_memory_excludes_the_parent_process():
    parent = np.ones(600 << 20, dtype=np.uint8)
    lines = [
        "from framestream.trainer.monitoring.device import process_peak",
        "before = process_peak()",
        "x = b'x' * (100 << 20)",
    ]
    code = "; ".join([*lines, "print(before, process_peak() - before)"])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=corpus.PROJECT, env=corpus.environment()
    )
    before, grown = map(int, done.stdout.split())
    assert before < parent.nbytes
    assert 60 << 20 <= grown <= 110 << 20
