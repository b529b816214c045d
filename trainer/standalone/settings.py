"""Stands in for the settings of :mod:`framestream.pipeline.config` in an exported folder.

Modules that are copied into an export import these names from there. In the folder they are plain objects whose fields
come from config.json and processor_config.json, without bounds or checks.
"""

from __future__ import annotations

from types import SimpleNamespace

TOKENS_PER_CLIP = 64  #: as in :mod:`framestream.pipeline.config.model`
TOKENS_PER_TILE = 64

FramesConfig = ImagesConfig = VisionTowerConfig = SimpleNamespace
