"""The whole model against the published one: embeddings, labels, loss, logits and gradients, alone and packed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from framestream.pipeline.config.model import LanguageModelConfig, ModelConfig, VisionTowerConfig
from framestream.pipeline.config.training import Recomputation
from framestream.pipeline.tokenization.special_ids import IGNORE_INDEX
from framestream.trainer.model.video_llm import VideoLLM
from framestream.trainer.weights.load import copy_tensors, open_part_tensors
from framestream.trainer.weights.tensor_files import to_hf_name
from tests.helpers.model.golden_sequence import CASES, CONFIG, FILES, dialogues
from tests.helpers.model.rows import Dialogue, pack


@pytest.fixture(scope="module")
def model() -> VideoLLM:
    """The golden model; its pixels are normalised already, so the model's own normalisation is left out."""
    tower, language = CONFIG["vision_tower"], dict(CONFIG["language_model"])
    assert language.pop("hidden_act") == "silu"
    cfg = ModelConfig(
        vision_tower=VisionTowerConfig(width=tower["width"], depth=tower["depth"], heads=tower["heads"]),
        language_model=LanguageModelConfig(**language),
    )
    model = VideoLLM(cfg, tower["size"], 4, Recomputation(True, cfg.language_model.num_hidden_layers))
    weights, tensors = FILES / "weights.safetensors", {}
    for part in model.parts():
        tensors |= open_part_tensors(model, part, weights, cfg)
    copy_tensors(model, tensors)
    model.vision_tower.normalize = lambda frames: frames.movedim(-1, 1)
    return model.train()


def labelled(row: Dialogue) -> int:
    return sum(label != IGNORE_INDEX for label in row.labels[1:])


def padding_term(model: VideoLLM, case: dict, rows: list[Dialogue]) -> tuple[float, int]:
    """Cross entropy and count of the first tokens that the published model predicts from left padding before them.

    Padding is a zero vector that may see nothing; the published mask then lets it see every place alike.
    """
    longest, loss, count = max(len(row.ids) for row in rows), 0.0, 0
    for row in rows:
        missing = longest - len(row.ids)
        if case["padding"] != "left" or not missing or row.labels[0] == IGNORE_INDEX:
            continue
        with torch.no_grad():
            embeddings = model.embed(pack([row], CONFIG["vision_tower"]["size"]))
            embeddings = torch.cat([embeddings.new_zeros(missing, embeddings.shape[1]), embeddings]).unsqueeze(0)
            seen = torch.ones(longest, longest, dtype=torch.bool).tril()
            seen[:, :missing] = False
            mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
            hidden = model.language_model.model(
                inputs_embeds=embeddings, attention_mask={"full_attention": mask[None, None]}, use_cache=False
            ).last_hidden_state
            logits = model.language_model.lm_head(hidden[0, missing - 1])
        loss -= logits.log_softmax(-1)[row.labels[0]].item()
        count += 1
    return loss, count


@pytest.mark.parametrize("limit", [10**6, 1], ids=["one_group", "a_group_for_each"])
@pytest.mark.parametrize("case", [pytest.param(c, id=c["case"]) for c in CASES])
def test_golden_multimodal_sequence_packed(model, case, limit):
    """All rows of the case packed into one: embeddings, labels, loss, tail logits and gradients."""
    rows, outputs = dialogues(case), np.load(FILES / "outputs.npz")
    padding, first_tokens = padding_term(model, case, rows)
    places = sum(map(labelled, rows)) + first_tokens
    for row in rows:
        row.weight = 1 / places
    batch = pack(rows, CONFIG["vision_tower"]["size"])
    model.vision_tower.group_limit = limit
    model.zero_grad()
    loss = model(batch)
    loss.backward()
    assert loss.item() + padding / places == pytest.approx(case["loss"], abs=1e-4)
    with torch.no_grad():
        embeddings, hidden = model.embed(batch), model.hidden(batch)
        logits = model.language_model.lm_head(hidden)
    mask = torch.from_numpy(outputs[f"{case['case']}.attention_mask"])
    expected = torch.from_numpy(outputs[f"{case['case']}.inputs_embeds"])[mask]
    torch.testing.assert_close(embeddings, expected, atol=1e-4, rtol=0)
    assert [len(rows), max(len(row.ids) for row in rows), embeddings.shape[-1]] == case["out_shape"]
    assert mask.sum(1).tolist() == [len(row.ids) for row in rows]
    labels = torch.from_numpy(outputs[f"{case['case']}.labels"])
    assert [label for row in rows for label in row.labels] == labels[mask].tolist()
    places_of = torch.full(mask.shape, -1).masked_scatter(mask, torch.arange(int(mask.sum())))[:, -6:]
    tail = torch.from_numpy(outputs[f"{case['case']}.logits_tail"])[places_of >= 0]
    torch.testing.assert_close(logits[places_of[places_of >= 0]], tail, atol=5e-4, rtol=0)
    if case["padding"] == "right":
        compare_gradients(model, case)


def compare_gradients(model: VideoLLM, case: dict) -> None:
    gradients = {to_hf_name(name): parameter.grad for name, parameter in model.named_parameters()}
    assert set(gradients) == set(case["gradient_norms_of_all_parameters"])
    for name, norm in case["gradient_norms_of_all_parameters"].items():
        assert gradients[name].norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-7), name
    for name, values in case["gradients"].items():
        assert gradients[name].norm().item() == pytest.approx(values["norm"], rel=1e-3, abs=1e-7), name
        first = gradients[name].flatten()[:8]
        np.testing.assert_allclose(first, values["first8"], atol=1e-3, rtol=1e-3, err_msg=name)


@pytest.mark.parametrize("case", [pytest.param(c, id=c["case"]) for c in CASES if len(c["input_ids"]) > 1])
def test_golden_multimodal_sequence_rows_alone(model, case):
    """Every row of a batch by itself has the published embeddings, and the losses add up to the batch's."""
    rows, outputs = dialogues(case), np.load(FILES / "outputs.npz")
    padding, first_tokens = padding_term(model, case, rows)
    places, losses = sum(map(labelled, rows)) + first_tokens, padding
    for n, row in enumerate(rows):
        row.weight = 1.0
        batch = pack([row], CONFIG["vision_tower"]["size"])
        with torch.no_grad():
            losses += model(batch).item()
            embeddings = model.embed(batch)
        mask = torch.from_numpy(outputs[f"{case['case']}.attention_mask"])[n]
        expected = torch.from_numpy(outputs[f"{case['case']}.inputs_embeds"])[n][mask]
        torch.testing.assert_close(embeddings, expected, atol=1e-4, rtol=0)
    assert losses / places == pytest.approx(case["loss"], abs=1e-4)
