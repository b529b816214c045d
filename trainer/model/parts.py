"""Names of the parts of a model that a manifest freezes, trains and initializes."""

from __future__ import annotations

PARTS = ("vision_tower", "connector", "language_model")
