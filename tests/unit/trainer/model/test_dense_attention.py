"""Attention as products of matrices, beside torch's own attention of every segment."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from framestream.trainer.model import dense_attention
from framestream.trainer.model.dense_attention import attend_dense, group_segments, is_faster

RUNS = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 40)), min_size=1, max_size=5)


def by_torch(q, k, v, runs, causal: bool) -> torch.Tensor:
    """Every segment in a call of its own."""
    outputs, start = [], 0
    for length in (length for count, length in runs for _ in range(count)):
        parts = (x[start : start + length].transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        out = F.scaled_dot_product_attention(*parts, is_causal=causal, enable_gqa=True)
        outputs.append(out.squeeze(0).transpose(0, 1))
        start += length
    return torch.cat(outputs)


@settings(max_examples=40, deadline=None)
@given(
    runs=RUNS,
    heads=st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    causal=st.booleans(),
    saved=st.booleans(),
    seed=st.integers(0, 9),
)
def test_values_and_gradients_are_those_of_torch(runs, heads, causal, saved, seed):
    torch.manual_seed(seed)
    total = sum(count * length for count, length in runs)
    inputs = [torch.randn(total, n, 8, dtype=torch.float64).requires_grad_() for n in (heads[0], heads[1], heads[1])]
    gradient = torch.randn(total, heads[0], 8, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense_attention, "SAVED", 2**24 if saved else 0)
        patch.setattr(dense_attention, "CHUNK", 900)  # several chunks
        ours = attend_dense(*inputs, runs, causal)
        our_gradients = torch.autograd.grad(ours, inputs, gradient)
    theirs = by_torch(*inputs, runs, causal)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    for found, wanted in zip(our_gradients, torch.autograd.grad(theirs, inputs, gradient), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


@given(runs=RUNS, causal=st.booleans())
def test_groups_hold_every_segment_once_with_little_padding(runs, causal):
    starts, segments = 0, []
    for count, length in runs:
        segments += [(starts + i * length, length) for i in range(count)]
        starts += count * length
    groups = list(group_segments(runs, causal))
    assert sorted(pair for group in groups for pair in zip(*group, strict=True)) == segments
    assert all(max(lengths) <= min(lengths) * (dense_attention.PADDED if causal else 1) for _, lengths in groups)


def test_it_is_chosen_where_onednn_computes_the_products_with_avx_512(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    x, before = torch.zeros(2, 1, 8), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert (
            is_faster(x, 1024)
            and not is_faster(x, 1025)
            and not is_faster(x.to("meta"), 8)
            and not is_faster(x.bfloat16(), 8)
        )
        torch.set_float32_matmul_precision("highest")
        assert not is_faster(x, 8)
        torch.set_float32_matmul_precision("medium")
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
        assert not is_faster(x, 8)
    finally:
        torch.set_float32_matmul_precision(before)
