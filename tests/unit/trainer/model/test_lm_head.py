"""The chunked head against the plain formula."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from framestream.trainer.model import lm_head as loss_module
from framestream.trainer.model.lm_head import ChunkedLMHead


def plain(weight, hidden, targets, weights):
    """sum over places of weight x -log softmax, written out in float64."""
    logprobs = (hidden.double() @ weight.double().T).log_softmax(-1)
    return -sum(
        weight * logprobs[place, target]
        for place, (target, weight) in enumerate(zip(targets.tolist(), weights.double(), strict=True))
    )


@given(length=st.integers(1, 40), chunk=st.sampled_from([1, 50, 200, 2**27]), seed=st.integers(0, 10**6))
def test_loss_and_gradients_equal_the_plain_formula(length, chunk, seed):
    torch.manual_seed(seed)
    head = ChunkedLMHead(nn.Linear(16, 25, bias=False))
    hidden = torch.randn(length, 16, requires_grad=True)
    targets, weights = torch.randint(0, 25, (length,)), torch.rand(length)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_module, "CHUNK_LOGITS", chunk)
        out = head(hidden, targets, weights)
    found = torch.autograd.grad(out, (head.weight, hidden))
    expected = plain(head.weight, hidden, targets, weights)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(found, torch.autograd.grad(expected, (head.weight, hidden)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_no_tensor_holds_the_logits_of_all_places(monkeypatch):
    """Peak number of logits: count the elements of everything that autograd saves."""
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 4 * 500)
    head, saved = ChunkedLMHead(nn.Linear(8, 500, bias=False)), []
    targets, hidden = torch.randint(0, 500, (300,)), torch.randn(300, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        head(hidden, targets, torch.ones(300))
    assert max(saved) <= max(head.weight.numel(), hidden.numel()) < 300 * 500


def test_a_loss_needs_weights_and_targets():
    head = ChunkedLMHead(nn.Linear(8, 20, bias=False))
    for targets, weights in (
        (torch.zeros(3, dtype=torch.int64), None),
        (torch.zeros(0, dtype=torch.int64), torch.ones(0)),
    ):
        with pytest.raises(ValueError, match="needs the weights of its targets, and at least one target"):
            head(torch.randn(len(targets), 8), targets, weights)


def test_logits_without_labels():
    linear = nn.Linear(8, 20, bias=False)
    hidden = torch.randn(2, 3, 8)
    torch.testing.assert_close(ChunkedLMHead(linear)(hidden), linear(hidden))


def test_the_weight_is_shared_not_copied():
    embedding = nn.Embedding(20, 8)
    assert ChunkedLMHead(embedding).weight is embedding.weight


def test_bfloat16_loss_is_computed_in_float32():
    head = ChunkedLMHead(nn.Linear(16, 50, bias=False).bfloat16())
    out = head(torch.randn(9, 16, dtype=torch.bfloat16), torch.randint(0, 50, (9,)), torch.ones(9))
    assert out.dtype == torch.float32
