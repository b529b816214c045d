"""Two ZeRO-3 ranks with rows of different kinds neither hang nor differ from one process.

The ranks compute on the stand-in device where there is a compiler.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from framestream.pipeline.config.manifest import Manifest
from framestream.pipeline.config.model import InitFromConfig
from framestream.trainer.model.lora import add_adapters, is_adapter
from framestream.trainer.model.video_llm import VideoLLM, build_model
from framestream.trainer.training.engine import freeze
from framestream.trainer.weights.adapters import merge_layer
from framestream.trainer.weights.load import initialize, load_pretrained, save_weights
from framestream.trainer.weights.tensor_files import INDEX, to_hf_name
from tests.helpers.corpora import training_corpus as corpus
from tests.helpers.model.rows import SMALL
from tests.helpers.model.zero3_cases import EPSILON, FILES, RATE, STARTS, cases, settings


def one_process(settings: Manifest, steps: list[tuple]) -> tuple[list[list[float]], dict[str, torch.Tensor]]:
    """Losses of every step and rank, and final weights, of plain AdamW on the mean over ranks."""
    model = build_model(settings)
    initialize(model, settings)
    add_adapters(model, settings)
    freeze(model.parts(), settings.train)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, eps=EPSILON, weight_decay=0.0)
    losses = []
    for rows in steps:
        optimizer.zero_grad()
        loss = [model(row) for row in rows]
        (sum(loss) / len(loss)).backward()
        optimizer.step()
        losses.append([value.item() for value in loss])
    return losses, merged(dict(model.named_parameters()))


def merged(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights with the adapters added that ``zero3_cases.ADAPTED`` describes."""
    found = {}
    for name, value in weights.items():
        layer, below, end = name.partition(".base_layer.")
        if below and end == "weight":
            value = merge_layer(value, *(weights[f"{layer}.lora_{side}.default.weight"] for side in "AB"), 8.0 / 4)
        if not is_adapter(name):
            found[name.replace(".base_layer.", ".")] = value
    return found


def write_files(model: VideoLLM, folder: Path) -> None:
    """The model's tensors as ``FILES`` names them: a released folder in shards, and the files of the three parts."""
    tensors = {to_hf_name(name): parameter.detach() for name, parameter in model.named_parameters()}
    (folder / "released").mkdir()
    (folder / "released" / "config.json").write_text("{}")
    located = {}
    for n in range(3):
        file = f"model-{n + 1:05d}-of-00003.safetensors"
        share = {name: tensors[name] for name in sorted(tensors)[n::3]}
        save_file(share, folder / "released" / file)
        located |= dict.fromkeys(share, file)
    (folder / "released" / INDEX).write_text(json.dumps({"weight_map": located}))
    tower = {n.removeprefix("model.vision_tower.vision_tower."): v for n, v in tensors.items() if "vision_tower" in n}
    torch.save({n.replace("vision_layernorm", "norm"): value for n, value in tower.items()}, folder / "encoder.pt")
    adapter = {name: value for name, value in tensors.items() if "mm_projector" in name}
    torch.save(adapter, folder / "mm_projector.bin")
    qwen = Qwen2ForCausalLM(Qwen2Config(**dataclasses.asdict(SMALL.language_model)))
    qwen.load_state_dict({n: v for n, v in tensors.items() if n not in adapter and "vision_tower" not in n})
    qwen.save_pretrained(folder / "qwen", max_shard_size="20KB")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Start weights, then one two-rank run of all cases."""
    folder = tmp_path_factory.mktemp("zero3")
    for start in STARTS:
        random = settings(InitFromConfig(vision_tower="random", language_model="random"), start)
        model = build_model(random)
        initialize(model, random)
        save_weights(model, folder / start / "final", random)
        if start == "start":
            write_files(model, folder)
    worker = ("-m", "tests.helpers.workers.zero3_worker", str(folder))
    corpus.run(*corpus.on_device(["torchrun", "--standalone", "--nproc_per_node", "2", *worker]))
    return folder


def test_groups_do_not_change_the_order_of_modules(folder):
    """Else nothing is gathered ahead, and each matrix and norm is gathered alone: thousands of calls a micro-step.

    A validation between two of the micro-steps does not change it either.
    """
    ranks = [json.loads((folder / f"groups-{rank}.json").read_text()) for rank in range(2)]
    assert [[found["groups"] for found in rank] for rank in ranks] == [[1, 3, 1, 2], [2, 1, 3, 1]]
    for found in (*ranks[0], *ranks[1]):
        assert found["is_complete"] and 0 < found["all_gathers"] <= 110


@pytest.mark.parametrize("name", list(cases()))
def test_two_sharded_ranks_equal_one_process(folder, name, monkeypatch):
    """For every layout of the initial weights. Rank 1 cannot see the files and gets all weights from rank 0."""
    monkeypatch.chdir(folder)
    made, steps = cases()[name]
    if name in FILES:
        made = dataclasses.replace(made, init_from=InitFromConfig(run="start"))
    losses, weights = one_process(made, steps)
    for rank in range(2):
        found = json.loads((folder / f"{name}-{rank}.json").read_text())
        assert found == pytest.approx([step[rank] for step in losses], rel=2e-4, abs=1e-6)
    for key, parameter in load_pretrained(folder / name).named_parameters():
        torch.testing.assert_close(parameter, weights[key], atol=2e-4, rtol=1e-3, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("stage", ["2", "3"])
def test_micro_steps_are_added_in_float32_under_bf16(folder: Path, stage: str):
    """Added in bf16, 64 micro-steps are 1e-2 away from their sum."""
    for rank in range(2):
        assert json.loads((folder / f"accumulation-{rank}.json").read_text())[stage] < 1e-6
