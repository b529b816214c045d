"""Norms, rotary positions and activations of a model, fused by torch.compile (``train.compile``).

Between matrix products a layer runs many small operators, and each of them reads and writes all tokens. Compiled, each
function of this module is one or two kernels. A model keeps its modules, names and order of calls: only the ``forward``
of single modules is replaced, for rows of training. Matrix products and attention stay as they are.

Shapes: T tokens, C channels, H heads, D channels of a head. T changes from row to row and is never a constant.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2MLP, Qwen2RMSNorm

from framestream.pipeline.config.schema import ManifestError
from framestream.trainer.model.attention import AttentionSegments, attend
from framestream.trainer.model.internvideo2 import InternVideo2Block, drop_path
from framestream.trainer.model.umt import Mlp

try:
    from liger_kernel.transformers import functional as liger
except ImportError:
    liger = None

COMPILERS = ("g++", "c++", "clang++", "gcc")  #: one of them builds the kernels on a CPU, or starts them on a GPU


def qwen2_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalize (T, C) in float32, then scale in the dtype of ``x``, as Qwen2 does."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def tower_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalize and scale (T, C) as ``nn.RMSNorm`` does."""
    return F.rms_norm(x, weight.shape, weight, eps)


def rotary(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries (T, H, D) and keys (T, K, D) by ``cos`` and ``sin`` (T, D)."""

    def rotate(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(1)

    return rotate(q), rotate(k)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Compute SiLU(gate) x up of (T, C) tensors."""
    return F.silu(gate) * up


def bias_gelu(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Compute GELU(x + bias) of (T, C)."""
    return F.gelu(x + bias)


def add_branch(
    branch: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, factors: torch.Tensor | None
) -> torch.Tensor:
    """Add a branch (T, C) to ``x``, scaled by channel (C,) and by token, ``factors`` (T, 1) of drop path."""
    scaled = branch * scale
    return x + (scaled if factors is None else scaled * factors)


def compile_leaves(model: nn.Module, device: str, backend: str = "inductor") -> str:
    """Let the modules of ``model`` call compiled functions; return a line for the log.

    On GPUs, Liger's kernels run in place of the language model's three functions if they are installed.

    Args:
        model: a model whose rows have segments, as in training; it can no longer generate with a cache.
        device: type of the device, such as ``cuda``.
        backend: of torch.compile.

    Raises:
        ManifestError: nothing here can compile.
    """
    if not any(map(shutil.which, COMPILERS)):
        raise ManifestError(
            f"train.compile: needs a compiler ({', '.join(COMPILERS)}); install one, or set it to false"
        )
    functions = (qwen2_rms_norm, tower_rms_norm, rotary, swiglu, bias_gelu, add_branch)
    leaves = SimpleNamespace(**{function.__name__: _compile(function, backend) for function in functions})
    uses_liger = liger is not None and device == "cuda"
    if uses_liger:
        leaves.qwen2_rms_norm, leaves.swiglu = liger.liger_rms_norm, liger.liger_swiglu
        leaves.rotary = _liger_rotary
    for module in model.modules():
        if replacement := REPLACEMENTS.get(type(module)):
            module.forward = functools.partial(replacement, module, leaves)
    if uses_liger:
        return "norms, rotary positions and SwiGLU of the language model by Liger; compiled: those of the tower"
    return "compiled: norms, rotary positions and activations"


def _compile(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    """Compile for any number of tokens but one, which torch would take for a constant and compile again."""
    compiled = torch.compile(function, dynamic=True, fullgraph=True, backend=backend)

    @functools.wraps(function)
    def call(x: torch.Tensor, *others: Any) -> Any:
        return (compiled if len(x) > 1 else function)(x, *others)

    return call


def _liger_rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Call Liger's kernel, which takes (1, H, T, D) and (1, T, D)."""
    q, k = (x.transpose(0, 1).unsqueeze(0) for x in (q, k))
    q, k = liger.liger_rope(q, k, cos.unsqueeze(0), sin.unsqueeze(0))
    return q.squeeze(0).transpose(0, 1), k.squeeze(0).transpose(0, 1)


# Replacements of forward methods --------------------------------------------------------------------------------------


def _qwen2_norm(norm: Qwen2RMSNorm, leaves: SimpleNamespace, x: torch.Tensor) -> torch.Tensor:
    return leaves.qwen2_rms_norm(x.flatten(0, -2), norm.weight, norm.variance_epsilon).view_as(x)


def _qwen2_mlp(mlp: Qwen2MLP, leaves: SimpleNamespace, x: torch.Tensor) -> torch.Tensor:
    rows = x.flatten(0, -2)
    return mlp.down_proj(leaves.swiglu(mlp.gate_proj(rows), mlp.up_proj(rows))).view_as(x)


def _qwen2_attention(
    attention: Qwen2Attention,
    leaves: SimpleNamespace,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    segments: AttentionSegments,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """Run a packed row (1, T, C) without a cache."""
    rows = hidden_states.squeeze(0)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    q, k, v = (projection(rows).unflatten(-1, (-1, attention.head_dim)) for projection in projections)
    cos, sin = position_embeddings
    q, k = leaves.rotary(q, k, cos.squeeze(0), sin.squeeze(0))
    return attention.o_proj(attend(q, k, v, segments, causal=True).flatten(1)).unsqueeze(0), None


def _tower_norm(norm: nn.RMSNorm, leaves: SimpleNamespace, x: torch.Tensor) -> torch.Tensor:
    return leaves.tower_rms_norm(x, norm.weight, norm.eps)


def _tower_mlp(mlp: Mlp, leaves: SimpleNamespace, x: torch.Tensor) -> torch.Tensor:
    if type(mlp.fc1) is not nn.Linear:  # adapters, or weights in 4 or 8 bits: only the layer itself can apply them
        return mlp.fc2(F.gelu(mlp.fc1(x)))
    return mlp.fc2(leaves.bias_gelu(F.linear(x, mlp.fc1.weight), mlp.fc1.bias))


def _internvideo2_block(
    block: InternVideo2Block,
    leaves: SimpleNamespace,
    x: torch.Tensor,
    segments: AttentionSegments,
    rand: torch.Tensor | None,
) -> torch.Tensor:
    factors: list[torch.Tensor | None] = [None, None]
    if rand is not None and block.drop:
        factors = [drop_path(x.new_ones(len(x), 1), segments, block.drop, numbers) for numbers in rand.unbind(1)]
    x = leaves.add_branch(block.attn(block.norm1(x), segments), x, block.ls1.weight, factors[0])
    return leaves.add_branch(block.mlp(block.norm2(x)), x, block.ls2.weight, factors[1])


#: class of modules -> its compiled forward, called with the module and the functions first
REPLACEMENTS: dict[type[nn.Module], Callable[..., Any]] = {
    Qwen2RMSNorm: _qwen2_norm,
    Qwen2MLP: _qwen2_mlp,
    Qwen2Attention: _qwen2_attention,
    nn.RMSNorm: _tower_norm,
    Mlp: _tower_mlp,
    InternVideo2Block: _internvideo2_block,
}
