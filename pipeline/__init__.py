"""framestream's data pipeline: manifests, shards, and batches of video dialogues.

    from framestream.pipeline import build_loader, load_manifest
    for batch in build_loader(load_manifest("manifests/stage2.yaml")): ...

Names are imported when first used, so that reading a manifest loads neither torch nor Arrow.
"""

from __future__ import annotations

import importlib

_HOMES = {
    "Manifest": "framestream.pipeline.config.manifest",
    "ManifestError": "framestream.pipeline.config.manifest",
    "load_manifest": "framestream.pipeline.config.manifest",
    "Index": "framestream.pipeline.shards.index",
    "ShardsError": "framestream.pipeline.shards.index",
    "Batch": "framestream.pipeline.loading.batch",
    "Loader": "framestream.pipeline.loading.loader",
    "LoaderError": "framestream.pipeline.loading.loader",
    "build_loader": "framestream.pipeline.loading.loader",
    "Questions": "framestream.pipeline.evaluation.questions",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
