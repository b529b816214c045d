"""Properties of the whole model: packing, groups, dummies, freezing, recomputation, dtypes."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2Config, Qwen2ForCausalLM

from framestream.pipeline.config.model import ModelConfig
from framestream.pipeline.config.training import Recomputation
from framestream.trainer.distributed.call_order import outer_modules
from framestream.trainer.model.attention import AttentionSegments, attend_sdpa
from framestream.trainer.model.umt import UMT
from framestream.trainer.model.video_llm import VideoLLM
from framestream.trainer.model.vision_tower import INDEX_LIMIT, split_groups
from framestream.trainer.training.drop_path_rng import drop_path_random
from tests.helpers.model.rows import INTERNVIDEO2, SIZE, SMALL, Dialogue, dialogue, pack, parameters, small_model

PATCHES = 4 * (SIZE // 16) ** 2  #: of a clip
KINDS = {
    "video": {"clips": 2},
    "stills": {"stills": 3},
    "both": {"clips": 1, "stills": 2},
    "text": {},
}


def some(*kinds: str) -> list[Dialogue]:
    return [dialogue(seed, **KINDS[kind], text=9 + 4 * seed) for seed, kind in enumerate(kinds)]


def gradients(model, *batches) -> dict[str, torch.Tensor]:
    model.zero_grad()
    for batch in batches:
        model(batch).backward()
    return {name: parameter.grad.clone() for name, parameter in parameters(model)}


def assert_same(first: dict, second: dict, tolerance: float = 1e-5) -> None:
    """The difference of each gradient is small beside the gradient."""
    for name, value in first.items():
        assert (value - second[name]).norm() <= tolerance * value.norm(), name


both_towers = pytest.mark.parametrize("cfg", [SMALL, INTERNVIDEO2], ids=["umt", "internvideo2"])


@both_towers
def test_packed_equals_alone(cfg):
    model, dialogues = small_model(cfg=cfg), some("video", "text", "stills", "both")
    alone = [pack([d]) for d in dialogues]
    assert model(pack(dialogues)).item() == pytest.approx(sum(model(row).item() for row in alone), rel=1e-5)
    assert_same(gradients(model, pack(dialogues)), gradients(model, *alone))


def grouped(cfg: ModelConfig, clips: float) -> ModelConfig:
    """The model with groups of as many patches as ``clips`` have."""
    tower = dataclasses.replace(cfg.vision_tower, group_tokens=int(clips * PATCHES))
    return dataclasses.replace(cfg, vision_tower=tower)


@both_towers
@pytest.mark.parametrize("clips", [0.25, 1, 2, 9])
def test_groups_and_recomputation_change_nothing(clips, cfg):
    batch = pack(some("both", "text", "video"))
    plain = gradients(small_model(cfg=cfg).train(), batch)
    assert_same(plain, gradients(small_model(recompute=True, cfg=grouped(cfg, clips)).train(), batch))


@pytest.mark.parametrize(("tower", "layers"), [(False, 0), (True, 0), (True, 1), (True, 2)])
def test_each_level_recomputes_its_modules_only(tower: bool, layers: int):
    """Gradients are equal to the last bit, whatever the backward pass computes again."""
    batch, plain = pack(some("both", "text")), small_model().train()
    model = VideoLLM(SMALL, SIZE, 4, Recomputation(tower, layers)).train()
    model.load_state_dict(plain.state_dict())
    calls: Counter[str] = Counter()
    watched = {"tower": model.vision_tower.blocks[0].mlp.fc1}
    watched |= {f"layer {number}": layer.mlp.up_proj for number, layer in enumerate(model.language_model.model.layers)}
    for name, module in watched.items():
        module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    found, expected = gradients(model, batch), gradients(plain, batch)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert calls == {"tower": 1 + tower, "layer 0": 1 + (layers > 0), "layer 1": 1 + (layers > 1)}


def test_recomputation_drops_the_same_paths():
    tower = dataclasses.replace(INTERNVIDEO2.vision_tower, drop_path=0.9)
    cfg, batch = dataclasses.replace(INTERNVIDEO2, vision_tower=tower), pack(some("both", "stills", "video"))
    found = []
    for seed, recompute in ((1, False), (1, True), (2, True)):
        model = small_model(recompute, cfg).train()
        batch.drop_path_rand = drop_path_random(batch, seed, model.vision_tower.num_drop_path_rands)
        found.append(gradients(model, batch))
    assert_same(found[0], found[1])
    name = "vision_tower.patch_embed.proj.weight"
    assert (found[0][name] - found[2][name]).norm() > 0.01 * found[0][name].norm()


def test_dialogues_drop_the_same_paths_in_any_row():
    """Packed in another order, so in other groups, or alone, each dialogue has the loss that it has."""
    tower = dataclasses.replace(INTERNVIDEO2.vision_tower, drop_path=0.9)
    cfg, dialogues = dataclasses.replace(INTERNVIDEO2, vision_tower=tower), some("both", "stills", "text", "video")
    model = small_model(cfg=cfg).train()

    def loss(numbers: list[int], seed: int = 1) -> float:
        batch = pack([dialogues[number] for number in numbers])
        batch.keys = [f"d{number}" for number in numbers]
        batch.drop_path_rand = drop_path_random(batch, seed, model.vision_tower.num_drop_path_rands)
        return model(batch).item()

    together = loss([0, 1, 2, 3])
    assert loss([3, 1, 2, 0]) == pytest.approx(together, rel=1e-5)
    assert loss([1, 3]) + loss([2, 0]) == pytest.approx(together, rel=1e-5)
    assert loss([0, 1, 2, 3], seed=2) != pytest.approx(together, rel=1e-3)


@given(clips=st.integers(0, 9), stills=st.integers(0, 9), limit=st.integers(1, 40))
@settings(max_examples=40)
def test_groups_cover_every_unit_once_in_order(clips, stills, limit):
    clip = torch.arange(clips, dtype=torch.uint8).view(-1, 1, 1, 1, 1).expand(-1, 4, 1, 1, 3)
    tile = 100 + torch.arange(stills, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 1, 3)
    parts = list(split_groups(clip, tile, 2, limit))  # a clip has 8 patches, a tile 2
    assert all(len(c) + len(s) for c, s in parts)
    assert torch.equal(torch.cat([c for c, _ in parts]), clip)
    assert torch.equal(torch.cat([s for _, s in parts])[:stills], tile)
    sizes = [8 * len(c) + 2 * len(s) for c, s in parts]
    assert all(size <= limit or len(c) + len(s) == 1 for size, (c, s) in zip(sizes, parts, strict=True))
    # the first unit of the next group would not have fitted
    nexts = [8 if len(c) else 2 for c, _ in parts[1:]]
    assert all(size + follows > limit for size, follows in zip(sizes, nexts, strict=False))


@pytest.mark.parametrize(("width", "expected"), [(16, 100_000_000), (1024, 2**21 - 1)])
def test_the_patches_of_a_group_can_be_indexed_in_32_bit(width, expected):
    tower = dataclasses.replace(SMALL.vision_tower, width=width, group_tokens=100_000_000)
    with torch.device("meta"):
        limit = UMT(tower, SIZE).group_limit
    assert limit == expected and limit * width < INDEX_LIMIT


@both_towers
@pytest.mark.parametrize("kinds", [["text"], []], ids=["text_only", "empty_row"])
def test_rows_without_media_have_zero_gradients_not_missing_ones(kinds, cfg):
    model = small_model(recompute=True, cfg=cfg).train()
    batch = pack(some(*kinds))
    found = gradients(model, batch)
    for name, gradient in found.items():
        if name.startswith(("vision_tower", "connector")) or not kinds:
            assert gradient.abs().max() == 0, name
    if kinds:
        assert found["language_model.lm_head.weight"].abs().max() > 0
    else:
        assert model(batch).item() == 0


def test_the_dummy_still_does_not_change_the_text():
    model, batch = small_model(), pack(some("text"))
    with torch.no_grad():
        embeddings = model.language_model.model.embed_tokens(batch.input_ids)
        assert torch.equal(model.embed(batch), embeddings)


@pytest.mark.filterwarnings("ignore:Full backward hook:UserWarning")
@pytest.mark.parametrize("frozen", [[], ["vision_tower", "language_model"], ["language_model"]])
@pytest.mark.parametrize("recompute", [True, False])
@both_towers
def test_leaf_modules_run_in_the_same_order_for_any_row(frozen, recompute, cfg):
    """ZeRO-3 gathers and releases in module calls, forward, backward and recomputed: ranks must agree on the order."""
    model = small_model(recompute, grouped(cfg, 1)).train()
    for part in frozen:
        model.parts()[part].requires_grad_(False)
    calls: list[str] = []
    for name, module in outer_modules(model, model.leaf_modules()).items():
        module.register_forward_pre_hook(lambda *_, name=name: calls.append(f"forward {name}"))
        module.register_forward_hook(lambda *_, name=name: calls.append(f"after {name}"))
        if any(parameter.requires_grad for parameter in module.parameters()):
            module.register_full_backward_pre_hook(lambda *_, name=name: calls.append(f"backward {name}"))
    reference: list[str] = []
    for kinds in (["both", "text"], ["text"], ["video"], ["stills"], []):
        calls.clear()
        model(pack(some(*kinds))).backward()
        reference = reference or list(calls)
        assert calls == reference, kinds


def test_a_frozen_tower_runs_without_gradient_and_is_not_recomputed():
    model = small_model(recompute=True).train()
    model.vision_tower.requires_grad_(False)
    runs = []
    model.vision_tower.vision_layernorm.register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    model(pack(some("video", "video"))).backward()
    assert runs == [False, False]
    assert model.connector.mlp[0].weight.grad.abs().max() > 0


def test_a_frozen_language_model_passes_gradients_on():
    model = small_model(recompute=True).train()
    whole = gradients(model, pack(some("video")))
    model.language_model.requires_grad_(False)
    model.zero_grad()
    model(pack(some("video"))).backward()
    assert_same({n: p.grad for n, p in parameters(model) if p.requires_grad}, whole)


def test_text_equals_transformers_own_model():
    cfg = SMALL.language_model
    ours = small_model().eval()
    fields = dataclasses.asdict(cfg)
    theta = fields.pop("rope_theta")
    config = Qwen2Config(
        **fields, rope_parameters={"rope_type": "default", "rope_theta": theta}, attn_implementation="eager"
    )
    theirs = Qwen2ForCausalLM(config).eval()
    theirs.load_state_dict(ours.language_model.state_dict())
    batch = pack(some("text"))
    with torch.no_grad():
        expected = theirs(batch.input_ids.unsqueeze(0)).logits[0]
        torch.testing.assert_close(ours.language_model.lm_head(ours.hidden(batch)), expected, atol=1e-4, rtol=1e-4)


def test_constants_stay_float32_when_the_model_is_cast():
    model = small_model().to(torch.bfloat16)
    kept = {name: buffer.dtype for name, buffer in model.named_buffers()}
    assert set(kept.values()) == {torch.float32} and len(kept) == 6
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.isfinite(model(pack(some("both"))))


@both_towers
def test_biases_are_added_inside_the_products_under_zero3(monkeypatch, cfg):
    """DeepSpeed's own ``F.linear`` adds the bias of inputs with three dimensions in a pass over the output."""
    model = small_model(cfg=cfg)
    shapes = []

    def watched(x, weight, bias=None):
        shapes.extend([x.ndim] if bias is not None else [])
        return zero3_linear_wrap(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    with torch.no_grad():
        model(pack(some("both", "text")))
    biased = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.bias is not None]
    assert set(shapes) == {2} and len(shapes) >= len(biased)


def test_pixels_are_normalised_as_published():
    frames = torch.randint(0, 256, (1, 4, 8, 8, 3), dtype=torch.uint8)
    expected = (frames.numpy() / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    pixels = small_model().vision_tower.normalize(frames)
    np.testing.assert_allclose(pixels, expected.transpose(0, 4, 1, 2, 3), atol=1e-5)


def answers_about_meta() -> bool:
    """Whether torch answers transformers' question about the meta device; torch 2.5 raises."""
    try:
        torch.is_autocast_enabled("meta")
    except RuntimeError:
        return False
    return True


@pytest.mark.skipif(not answers_about_meta(), reason="this torch has no autocast of the meta device")
@both_towers
@pytest.mark.parametrize("kinds", [["both", "text", "stills"], ["text"], []], ids=["media", "text_only", "empty_row"])
def test_a_row_runs_without_a_look_at_its_values(kinds, cfg):
    """On the meta device tensors have no values, so whatever made the host wait for the device would raise."""
    tower = dataclasses.replace(cfg.vision_tower, drop_path=0.5 if cfg is INTERNVIDEO2 else None)
    with torch.device("meta"):
        model = VideoLLM(dataclasses.replace(cfg, vision_tower=tower), SIZE, 4, Recomputation(True, 2)).train()
    batch = pack(some(*kinds))
    batch.drop_path_rand = drop_path_random(batch, 0, model.vision_tower.num_drop_path_rands)
    model.to("meta")(batch.to("meta")).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    causal=st.booleans(),
    shared=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 1000),
)
def test_attention_equals_softmax_within_each_segment(lengths, causal, shared, seed):
    torch.manual_seed(seed)
    total = sum(lengths)
    q, k, v = torch.randn(total, 4, 8), torch.randn(total, 4 // shared, 8), torch.randn(total, 4 // shared, 8)
    ends = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    out = attend_sdpa(q, k, v, AttentionSegments.of_lengths(lengths, ends), causal)
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    seen = segment[:, None] == segment[None]
    if causal:
        seen &= torch.ones(total, total, dtype=torch.bool).tril()
    for head in range(4):
        scores = (q[:, head] @ k[:, head // shared].T / 8**0.5).masked_fill(~seen, float("-inf"))
        torch.testing.assert_close(out[:, head], scores.softmax(-1) @ v[:, head // shared], atol=1e-5, rtol=1e-4)


def test_the_head_is_the_embedding_when_tied():
    language = dataclasses.replace(SMALL.language_model, tie_word_embeddings=True)
    model = small_model(cfg=ModelConfig(vision_tower=SMALL.vision_tower, language_model=language))
    assert model.language_model.lm_head.weight is model.language_model.model.embed_tokens.weight
    found = gradients(model, pack(some("video", "text")))
    assert "language_model.lm_head.weight" not in found
    assert found["language_model.model.embed_tokens.weight"].abs().sum(1).gt(0).all()  # every word is scored
