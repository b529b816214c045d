"""TODO."""

from __future__ import annotations

PARTS = ("vision_tower", "connector", "language_model")
