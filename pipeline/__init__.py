"""framestream's data pipeline: manifests, shards, and batches of video dialogues.

    from framestream.pipeline import build_loader, load_manifest
    for batch in build_loader(load_manifest("manifests/stage2.yaml")): ...

Names are imported when first used, so that reading a manifest imports neither torch nor Arrow.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from framestream.pipeline.config.manifest import Manifest, ManifestError, load_manifest
    from framestream.pipeline.evaluation.questions import Questions
    from framestream.pipeline.loading.batch import Batch
    from framestream.pipeline.loading.loader import Loader, LoaderError, build_loader
    from framestream.pipeline.shards.index import Index, ShardsError

#: public name -> module that defines it
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

__all__ = [
    "Batch",
    "Index",
    "Loader",
    "LoaderError",
    "Manifest",
    "ManifestError",
    "Questions",
    "ShardsError",
    "build_loader",
    "load_manifest",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
