"""Shards for other trainers: PyTorch data sets, chat inputs of Hugging Face processors, Megatron-Energon.

    from pipeline.adapters import ShardDataset
    sample = ShardDataset("shards/stage3", frames=64)[0]

docs/reuse.md has an example for each. Names are imported when first used; what belongs to another package is imported
by the file that needs it alone.
"""

from __future__ import annotations

import importlib

_HOMES = {
    "ChatCollator": "pipeline.adapters.hf_processor",
    "chats": "pipeline.adapters.hf_processor",
    "Dialogue": "pipeline.adapters.types",
    "Media": "pipeline.adapters.types",
    "Sample": "pipeline.adapters.types",
    "SampleError": "pipeline.adapters.types",
    "ShardDataset": "pipeline.adapters.dataset",
    "ShardStream": "pipeline.adapters.stream",
    "StreamBatch": "pipeline.adapters.stream",
    "read_members": "pipeline.adapters.sample_members",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'pipeline.adapters' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
