"""framestream's data pipeline: manifests, shards, and batches of video dialogues.

    from pipeline import build_loader, load_manifest
    for batch in build_loader(load_manifest("manifests/stage2.yaml")): ...

Names are imported when first used, so that reading a manifest loads neither torch nor Arrow.
"""

from __future__ import annotations

import importlib

_HOMES = {
    "Manifest": "pipeline.manifest",
    "ManifestError": "pipeline.manifest",
    "load_manifest": "pipeline.manifest",
    "Index": "pipeline.index",
    "ShardsError": "pipeline.index",
    "Batch": "pipeline.batch",
    "Loader": "pipeline.loader",
    "LoaderError": "pipeline.loader",
    "build_loader": "pipeline.loader",
    "Questions": "pipeline.questions",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
