"""The model is on the rank's device before DeepSpeed has it, buffers too."""

from __future__ import annotations

import contextlib
import dataclasses
import types

import pytest
import torch

from framestream.trainer.distributed.process_group import DistributedContext, deepspeed
from framestream.trainer.training import engine
from tests.helpers.model.manifests import manifest
from tests.helpers.model.rows import SIZE, SMALL


@pytest.mark.parametrize("stage", [1, 3])
def test_buffers_are_on_the_device_with_their_dtypes(monkeypatch: pytest.MonkeyPatch, stage: int):
    """Under ZeRO-3 DeepSpeed moves the parameters only."""
    made = manifest(SIZE, SMALL)
    made = dataclasses.replace(made, train=dataclasses.replace(made.train, zero_stage=stage))
    expected = {name: buffer.dtype for name, buffer in engine.build_model(made).named_buffers()}
    monkeypatch.setattr(deepspeed.zero, "Init", lambda **_: contextlib.nullcontext())
    wrapped = types.SimpleNamespace(optimizer=types.SimpleNamespace(persistent_parameters=[]))
    monkeypatch.setattr(deepspeed, "initialize", lambda **_: (wrapped,))
    monkeypatch.setattr(engine, "initialize", lambda *_: None)
    monkeypatch.setattr(torch.optim, "AdamW", lambda *_, **__: None)
    _, model = engine.build_engine(made, DistributedContext(0, 1, torch.device("meta")))
    buffers = dict(model.named_buffers())
    assert {buffer.device.type for buffer in buffers.values()} == {"meta"}
    if stage == 3:
        assert expected == {name: buffer.dtype for name, buffer in buffers.items()}
