"""framestream's data pipeline: manifests, shards, and batches of video dialogues.

    from pipeline import build_loader, load_manifest
    for batch in build_loader(load_manifest("manifests/stage2.yaml")): ...

Names are imported when first used, so that reading a manifest loads neither torch nor Arrow.
"""

from __future__ import annotations

import importlib

_HOMES = {
    "Manifest": "pipeline.config.manifest",
    "ManifestError": "pipeline.config.manifest",
    "load_manifest": "pipeline.config.manifest",
    "Index": "pipeline.shards.index",
    "ShardsError": "pipeline.shards.index",
    "Batch": "pipeline.loading.batch",
    "Loader": "pipeline.loading.loader",
    "LoaderError": "pipeline.loading.loader",
    "build_loader": "pipeline.loading.loader",
    "Questions": "pipeline.evaluation.questions",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
