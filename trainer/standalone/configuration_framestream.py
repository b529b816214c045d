"""The configuration of an exported model: that of Qwen2 with a section for vision, ``framestream``.

The section has ``model`` (the vision tower), ``frames`` (pixels of a frame, frames of a clip) and ``images``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import Qwen2Config


class FramestreamConfig(Qwen2Config):
    """Qwen2's fields, and those of config.json that it does not know as plain attributes."""

    model_type = "videochat_flash_qwen"

    if TYPE_CHECKING:  # at runtime an annotation would make it a field, which transformers requires
        framestream: dict[str, Any]
