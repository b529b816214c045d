"""Shards for other trainers: PyTorch datasets, chat inputs of Hugging Face processors, Megatron-Energon.

    from framestream.pipeline.adapters import ShardDataset
    sample = ShardDataset("shards/stage3", frames=64)[0]

docs/reuse.md has an example for each. Names are imported when they are first used. Another package is imported only by
the module that needs it, and an ImportError says in one line which one is missing.
"""

from __future__ import annotations

import importlib

_HOMES = {
    "as_hf_dataset": "framestream.pipeline.adapters.hf_dataset",
    "ChatCollator": "framestream.pipeline.adapters.hf_processor",
    "chats": "framestream.pipeline.adapters.hf_processor",
    "Dialogue": "framestream.pipeline.adapters.types",
    "Media": "framestream.pipeline.adapters.types",
    "Sample": "framestream.pipeline.adapters.types",
    "SampleError": "framestream.pipeline.adapters.types",
    "ShardDataset": "framestream.pipeline.adapters.dataset",
    "ShardStream": "framestream.pipeline.adapters.stream",
    "StreamBatch": "framestream.pipeline.adapters.types",
    "read_members": "framestream.pipeline.adapters.sample_members",
    "stream_members": "framestream.pipeline.adapters.member_stream",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'framestream.pipeline.adapters' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package == "framestream":
            raise
        raise ImportError(f"{name} needs the package {package} ({error}); pip install {package}") from None
