"""Count the kernels of one layer at full width, and the memory that they move.

A layer takes a few tokens through the calls of the CPU, on tensors that have shapes and dtypes only. Matrix products
and attention are left out of the bytes, because their FLOPs decide their time. Every other kernel reads its inputs and
writes its outputs once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from framestream.pipeline.config.model import LanguageModelConfig, VisionTowerConfig
from framestream.trainer.model.attention import AttentionSegments
from framestream.trainer.model.language_model import build_language_model
from framestream.trainer.model.umt import UMTBlock

TOKENS = 32  #: of the counted row
PRODUCTS = {"mm", "addmm", "bmm", "linear"}  #: matrix products
#: kernels that only make another view, or no kernel at all
VIEWS = {"view", "reshape", "transpose", "permute", "expand", "slice", "select", "detach", "split", "squeeze", "t"}
VIEWS |= {"_unsafe_view", "_reshape_alias", "alias", "as_strided", "unbind", "unflatten", "unsqueeze", "empty"}
VIEWS |= {"empty_like", "empty_strided", "split_with_sizes", "lift_fresh"}


@dataclasses.dataclass
class KernelCount:
    """Kernels of one pass, those of them that are products, and the bytes that the others move for each token."""

    kernels: int = 0
    products: int = 0
    bytes: float = 0.0


class _Counter(TorchDispatchMode):
    """Count every kernel that runs inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.count = KernelCount()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        output, name = function(*args, **(kwargs or {})), function.overloadpacket.__name__
        if function.namespace != "prim" and name not in VIEWS:  # prim: questions about a tensor's device
            self.count.kernels += 1
            if name in PRODUCTS or "attention" in name:
                self.count.products += 1
            else:
                tensors = (leaf for leaf in tree_leaves((args, output)) if isinstance(leaf, torch.Tensor))
                self.count.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors) / TOKENS
        return output


def count_passes(run: Callable[[], torch.Tensor]) -> tuple[KernelCount, KernelCount]:
    """Count the forward pass that ``run`` makes, and the backward pass from its output."""
    with _Counter() as forward:
        output = run()
    gradient = torch.ones_like(output)
    with _Counter() as backward:
        output.backward(gradient)
    return forward.count, backward.count


@contextmanager
def _shapes_only() -> Iterator[None]:
    """Make bf16 tensors that have no values, and compute none."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with FakeTensorMode():
            yield
    finally:
        torch.set_default_dtype(before)


def count_language_layer(cfg: LanguageModelConfig) -> tuple[KernelCount, KernelCount]:
    """Count one layer of the language model, forward and backward, in bf16."""
    cfg = dataclasses.replace(cfg, num_hidden_layers=1, vocab_size=16)
    with _shapes_only():
        layer, head_size = build_language_model(cfg).model.layers[0], cfg.hidden_size // cfg.num_attention_heads
        x = torch.zeros(1, TOKENS, cfg.hidden_size, requires_grad=True)
        angles = tuple(torch.ones(1, TOKENS, head_size) for _ in range(2))
        segments = AttentionSegments.of_runs([(1, TOKENS)], x.device)
        return count_passes(
            lambda: layer(x, position_embeddings=angles, attention_mask=None, segments=segments, use_cache=False)
        )


def count_tower_block(cfg: VisionTowerConfig) -> tuple[KernelCount, KernelCount]:
    """Count one block of UMT that learns, forward and backward, in bf16."""
    with _shapes_only():
        block = UMTBlock(cfg.width, cfg.heads, round(cfg.width * cfg.mlp_ratio))
        x = torch.zeros(TOKENS, cfg.width, requires_grad=True)
        segments = AttentionSegments.of_runs([(1, TOKENS)], x.device)
        return count_passes(lambda: block(x, segments))
