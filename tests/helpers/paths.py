"""Paths of the repository that tests use."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]  #: of the repository
TOKENIZER = ROOT / "tests" / "golden" / "tokens_labels" / "tokenizer"
BUILD_SHARDS = ROOT / "tools" / "build_shards.py"
VERIFY_SHARDS = ROOT / "tools" / "verify_shards.py"
