"""Attention of packed rows, and the last layer at the positions that are read, against the layer everywhere."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AttentionInterface

from framestream.pipeline.tokenization.special_ids import IGNORE_INDEX
from framestream.trainer.model import language_model
from framestream.trainer.model.attention import AttentionSegments
from framestream.trainer.model.language_model import PACKED, attend_needed, language_model_attention
from tests.helpers.model.rows import dialogue, pack, small_model


def masked(q, k, v, lengths: list[int]) -> torch.Tensor:
    """Softmax attention with one mask over the whole row, written out in float64."""
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.arange(len(q))
    seen = (segment[:, None] == segment) & (place[:, None] >= place)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    shared=st.sampled_from([1, 2]),
    chosen=st.floats(0, 1),
    seed=st.integers(0, 10**6),
)
def test_needed_outputs_and_all_gradients_are_those_of_a_mask(lengths, shared, chosen, seed):
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    q, k, v = (torch.randn(total, heads, 8, dtype=torch.float64, generator=generator) for heads in (4, 4, 4))
    k, v = k[:, ::shared], v[:, ::shared]
    needed = (torch.rand(total, generator=generator) < chosen).nonzero().squeeze(1)
    segments = AttentionSegments.of_lengths(lengths, torch.tensor([0, *lengths]).cumsum(0).int())
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    with pytest.MonkeyPatch.context() as patch:  # segments of this test count as long ones
        patch.setattr(language_model, "MIN_SELECTED_LENGTH", 16)
        found = attend_needed(*inputs, segments, needed)[needed]
    expected = masked(*inputs, lengths)[needed]
    torch.testing.assert_close(found, expected)
    weight = torch.randn(found.shape, dtype=torch.float64, generator=generator)
    ours, theirs = (torch.autograd.grad((out * weight).sum(), inputs) for out in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_no_mask_is_built_and_attention_is_called_per_run():
    lengths = []

    def watch(module, query, key, value, attention_mask, segments=None, **settings):
        assert attention_mask is None
        lengths.append(segments.runs)
        return language_model_attention(module, query, key, value, attention_mask, segments, **settings)

    AttentionInterface.register(PACKED, watch)
    try:
        small_model()(pack([dialogue(n, text=length) for n, length in enumerate((9, 9, 20))]))
    finally:
        AttentionInterface.register(PACKED, language_model_attention)
    assert lengths == [((2, 9), (1, 20))] * 2


def test_few_queries_of_a_long_segment_are_computed_and_no_others(monkeypatch):
    """The flash kernel would otherwise run over all pairs: its queries are counted."""
    real, sizes = torch.nn.functional.scaled_dot_product_attention, []

    def counted(query, key, value, **settings):
        sizes.append((query.shape[-2], key.shape[-2]))
        return real(query, key, value, **settings)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    q = torch.randn(4100, 2, 8)
    segments = AttentionSegments.of_runs([(2, 2000), (1, 100)], q.device)
    attend_needed(q, q, q, segments, torch.tensor([7, 1990, 3999, 4099]))
    assert sizes == [(2, 2000), (1, 2000), (100, 100)]


@pytest.mark.parametrize("long", [16, 10**9], ids=["selected", "whole"])
def test_states_of_a_row_are_those_of_all_positions(monkeypatch, long):
    monkeypatch.setattr(language_model, "MIN_SELECTED_LENGTH", long)
    model = small_model(scale=15.0)
    row = pack([dialogue(0, clips=2, text=40), dialogue(1, text=9), dialogue(2, stills=1, text=30)])
    whole = model.hidden(row)
    for needed in (row.label_positions, torch.tensor([0]), torch.arange(len(row.input_ids))):
        torch.testing.assert_close(model.hidden(row, needed), whole[needed], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_loss_and_its_gradients_are_those_of_all_positions(monkeypatch, recompute):
    monkeypatch.setattr(language_model, "MIN_SELECTED_LENGTH", 16)
    row = pack([dialogue(0, clips=2, text=40), dialogue(1, text=50)])
    model = small_model(recompute, scale=15.0)
    model(row).backward()
    found = {name: weight.grad for name, weight in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    logits = model.language_model.lm_head(model.hidden(row))[:-1].float()
    losses = torch.nn.functional.cross_entropy(logits, row.labels[1:], reduction="none", ignore_index=IGNORE_INDEX)
    (losses * row.token_weight[1:]).sum().backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(found[name], weight.grad, atol=1e-5, rtol=1e-3, msg=name)


def test_a_row_without_labels_gives_every_parameter_a_zero_gradient(monkeypatch):
    """ZeRO-3 waits for the gradients of all parameters on all ranks."""
    monkeypatch.setattr(language_model, "MIN_SELECTED_LENGTH", 16)
    unlabelled = dialogue(0, clips=1, text=40)
    unlabelled.labels = [IGNORE_INDEX] * len(unlabelled.ids)
    for row in (pack([unlabelled]), pack([])):
        model = small_model()
        loss = model(row)
        loss.backward()
        assert loss == 0 and all(weight.grad.abs().max() == 0 for weight in model.parameters())
