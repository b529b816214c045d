"""Compiled functions compute the same, and are compiled in the first rows only."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from framestream.pipeline.config.schema import ManifestError
from framestream.pipeline.config.training import LoraConfig, PartConfig
from framestream.trainer.model import leaf_functions
from framestream.trainer.model.leaf_functions import compile_leaves
from framestream.trainer.model.lora import add_adapters
from framestream.trainer.training.drop_path_rng import drop_path_random
from tests.helpers.model.manifests import manifest
from tests.helpers.model.rows import INTERNVIDEO2, SIZE, SMALL, dialogue, pack, parameters, small_model

DROPPING = dataclasses.replace(INTERNVIDEO2.vision_tower, drop_path=0.5)
TOWERS = {"umt": SMALL, "internvideo2": dataclasses.replace(INTERNVIDEO2, vision_tower=DROPPING)}
ROWS = [  # clips, stills and text of each dialogue; the first two are the first steps
    [(2, 0, 12), (0, 0, 30)],
    [(1, 2, 20)],
    [(0, 0, 9)],
    [],
    [(3, 0, 15), (0, 1, 8), (0, 0, 11)],
]


def gradients(model, batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(batch).backward()
    return {name: parameter.grad.clone() for name, parameter in parameters(model)}


@pytest.mark.parametrize("name", TOWERS)
def test_compiled_once_and_equal_for_rows_of_any_length(name):
    cfg = TOWERS[name]
    plain, compiled = (small_model(recompute=True, cfg=cfg, scale=2.0).train() for _ in range(2))
    torch._dynamo.reset()
    counter, graphs = CompileCounterWithBackend("aot_eager"), []
    compile_leaves(compiled, "cpu", counter)
    for dialogues in ROWS:
        sizes = [dict(zip(("clips", "stills", "text"), numbers, strict=True)) for numbers in dialogues]
        batch = pack([dialogue(seed, **size) for seed, size in enumerate(sizes)])
        batch.drop_path_rand = drop_path_random(batch, 0, plain.vision_tower.num_drop_path_rands)
        expected, found = gradients(plain, batch), gradients(compiled, batch)
        rounding = 1e-6 * sum(value.square().sum() for value in expected.values()).sqrt()
        for key, value in expected.items():
            assert (found[key] - value).norm() <= 1e-4 * value.norm() + rounding, key
        graphs.append(counter.frame_count)
    assert 0 < graphs[1] <= 12 and graphs[2:] == graphs[1:2] * 3, graphs


def test_compiled_towers_have_their_adapters():
    part = PartConfig(train=True, lr=1e-3, lora=LoraConfig(r=4))
    model, batch = small_model().train(), pack([dialogue(0, clips=1, stills=1)])
    plain = model(batch).item()
    add_adapters(model, manifest(SIZE, SMALL, vision_tower=part))
    for name, parameter in parameters(model):
        if ".lora_B." in name and ".fc1." in name:
            torch.nn.init.ones_(parameter)
    expected = model(batch).item()
    compile_leaves(model, "cpu", "eager")
    assert model(batch).item() == pytest.approx(expected, rel=1e-5)
    assert plain != pytest.approx(expected, rel=1e-3)


def test_ligers_kernels_run_on_gpus_where_they_are_installed(monkeypatch):
    """Its functions stand for kernels here; they check the shapes that Liger's take."""
    calls = []

    def rms_norm(x, weight, eps, offset=0.0, casting_mode="llama", in_place=True):
        calls.append("norm")
        return leaf_functions.qwen2_rms_norm(x, weight, eps)

    def rope(q, k, cos, sin, position_ids=None, unsqueeze_dim=1, rotary_dim=None):
        calls.append("rope")
        assert q.shape[0] == k.shape[0] == cos.shape[0] == 1 and q.shape[2:] == k.shape[2:] == cos.shape[1:]
        rotated = leaf_functions.rotary(q[0].transpose(0, 1), k[0].transpose(0, 1), cos[0], sin[0])
        return tuple(x.transpose(0, 1).unsqueeze(0) for x in rotated)

    def swiglu(a, b):
        calls.append("swiglu")
        return leaf_functions.swiglu(a, b)

    kernels = SimpleNamespace(liger_rms_norm=rms_norm, liger_rope=rope, liger_swiglu=swiglu)
    monkeypatch.setattr(leaf_functions, "liger", kernels)
    model, batch = small_model().train(), pack([dialogue(0, clips=1), dialogue(1)])
    expected = model(batch).item()
    assert "by Liger" in compile_leaves(model, "cuda", "eager")
    assert model(batch).item() == pytest.approx(expected, rel=1e-5)
    assert [calls.count(name) for name in ("norm", "rope", "swiglu")] == [5, 2, 2]
    calls.clear()
    assert "Liger" not in compile_leaves(model, "cpu", "eager")
    assert model(batch).item() == pytest.approx(expected, rel=1e-5) and not calls


def test_a_machine_without_a_compiler_is_one_line(monkeypatch):
    monkeypatch.setattr(leaf_functions.shutil, "which", lambda name: None)
    with pytest.raises(ManifestError, match=r"train\.compile: needs a compiler \(g\+\+"):
        compile_leaves(small_model(), "cpu")
