"""The choice of an attention kernel, and calls of kernels that check what those of GPUs check."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch

from framestream.pipeline.config.model import LanguageModelConfig, ModelConfig, VisionTowerConfig
from framestream.trainer.model import attention
from framestream.trainer.model.attention import (
    AttentionKernel,
    AttentionSegments,
    attend_sdpa,
    describe_kernels,
    flash_kernel,
    select_kernel,
    varlen_kernel,
)
from tests.helpers.model.rows import INTERNVIDEO2, dialogue, pack, small_model

BF16 = torch.bfloat16


def checked(q, k, v, ends, longest: int, causal: bool, gqa: bool = True) -> torch.Tensor:
    """Compute attention segment by segment, after the checks of the CUDA kernels (flash_api.cpp)."""
    assert q.dtype in (torch.float16, BF16) and q.dtype == k.dtype == v.dtype
    assert q.ndim == k.ndim == v.ndim == 3 and all(x.stride(-1) == 1 for x in (q, k, v))
    assert q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    assert k.shape == v.shape and q.shape[1] % k.shape[1] == 0 and (gqa or q.shape[1] == k.shape[1])
    assert ends.dtype == torch.int32 and ends.is_contiguous() and ends.device == q.device
    lengths = ends.diff().tolist()
    assert lengths and min(lengths) > 0 and ends[0] == 0 and ends[-1] == len(q) == len(k)
    assert type(longest) is int and longest == max(lengths)
    return attend_sdpa(q, k, v, AttentionSegments.of_lengths(lengths, ends), causal)


def torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    assert cu_seq_q is cu_seq_k and max_q == max_k
    return checked(query, key, value, cu_seq_q, max_q, is_causal, gqa=False)


def torch_2_12(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    assert cu_seq_q is cu_seq_k and max_q == max_k and window_size in ((-1, -1), (-1, 0))
    return checked(query, key, value, cu_seq_q, max_q, window_size == (-1, 0), gqa=enable_gqa)


def flash_2(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, causal=False):
    assert cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k
    return checked(q, k, v, cu_seqlens_q, max_seqlen_q, causal)


KERNELS = {
    "torch_2_10": varlen_kernel(torch_2_10),
    "torch_2_12": varlen_kernel(torch_2_12),
    "flash_attn": flash_kernel(flash_2),
}
kernels = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)


@kernels
@pytest.mark.parametrize("head", [64, 88, 128])
@pytest.mark.parametrize("shared", [1, 2])
@pytest.mark.parametrize("causal", [True, False])
def test_calls_pass_the_checks_of_the_kernels(kernel, head, shared, causal):
    torch.manual_seed(0)
    qkv = torch.randn(17, 3, 4, head, dtype=BF16)
    q, k, v = qkv[:, 0], qkv[:, 1, ::shared], qkv[:, 2, ::shared]  # views with gaps, as the towers pass
    segments = AttentionSegments.of_runs([(3, 4), (0, 9), (1, 5)], q.device)
    assert segments.cu_seqlens.tolist() == [0, 4, 8, 12, 17] and segments.cu_seqlens.dtype == torch.int32
    torch.testing.assert_close(kernel(q, k, v, segments, causal), attend_sdpa(q, k, v, segments, causal))


@kernels
@pytest.mark.parametrize("kinds", [[{"clips": 2, "stills": 1}, {}], []], ids=["media", "empty_row"])
@pytest.mark.parametrize("tower", ["umt", "internvideo2"])
def test_models_call_the_kernels_as_they_must(monkeypatch, kernel, kinds, tower):
    language = LanguageModelConfig(
        hidden_size=256, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=96,
    )  # fmt: skip
    umt = VisionTowerConfig(width=128, depth=2, heads=2, patch=16, table_side=8)
    towers = {"umt": umt, "internvideo2": dataclasses.replace(INTERNVIDEO2.vision_tower, width=176, depth=2, heads=2)}
    model = small_model(cfg=ModelConfig(vision_tower=towers[tower], language_model=language), scale=1).to(BF16)
    batch, sizes = pack([dialogue(n, **kind) for n, kind in enumerate(kinds)]), set()

    def select(device: str, dtype: torch.dtype, head_size: int) -> AttentionKernel:
        sizes.add(head_size)
        return AttentionKernel("checked", kernel)

    expected = model(batch)
    monkeypatch.setattr(attention, "select_kernel", select)
    loss = model(batch)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=0.01)
    assert sizes == {128, 64 if tower == "umt" else 88}


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that has every kernel, and no choice yet."""
    monkeypatch.setattr(attention, "varlen_attn", torch_2_12)
    monkeypatch.setattr(attention, "flash_attn_varlen_func", flash_2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    select_kernel.cache_clear()
    yield monkeypatch
    select_kernel.cache_clear()


def test_torch_is_chosen_before_flash_attn_and_sdpa(gpu):
    assert select_kernel("cuda", BF16, 88).name == "torch.nn.attention.varlen"
    gpu.setattr(attention, "varlen_attn", None)
    select_kernel.cache_clear()
    assert select_kernel("cuda", BF16, 88).name == "flash-attn"
    gpu.setattr(attention, "flash_attn_varlen_func", None)
    select_kernel.cache_clear()
    chosen = select_kernel("cuda", BF16, 88)
    assert chosen.attend is attend_sdpa
    assert f"torch {torch.__version__} has no" in chosen.name and "install torch 2.10 or newer" in chosen.name


@pytest.mark.parametrize(
    ("device", "dtype", "head", "reason"),
    [
        ("cpu", BF16, 64, "the device is cpu"),
        ("cuda", torch.float32, 64, "no torch.float32"),
        ("cuda", BF16, 12, "no heads of 12 channels"),
        ("cuda", BF16, 264, "no heads of 264 channels"),
    ],
)
def test_what_the_kernels_lack_is_sdpa_with_a_reason(gpu, device, dtype, head, reason):
    chosen = select_kernel(device, dtype, head)
    assert chosen.attend is attend_sdpa and reason in chosen.name


def test_older_gpus_have_sdpa(gpu):
    gpu.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "need an A100" in select_kernel("cuda", BF16, 64).name


def test_one_line_names_the_kernels(gpu):
    assert describe_kernels("cuda", BF16, {"tower": 64, "model": 128}) == "attention by torch.nn.attention.varlen"
    mixed = describe_kernels("cuda", BF16, {"tower": 12, "model": 128})
    assert mixed.startswith("attention: tower by SDPA") and mixed.endswith("; model by torch.nn.attention.varlen")


@pytest.mark.skipif(attention.varlen_attn is None, reason="torch 2.10 and newer have it")
def test_the_installed_torch_takes_the_keywords():
    known = inspect.signature(attention.varlen_attn).parameters
    assert list(known)[:7] == list(inspect.signature(torch_2_10).parameters)[:7]
    assert known.keys() & {"window_size", "is_causal"}
