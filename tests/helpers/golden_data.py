"""Paths of the golden reference data. A missing file gives no test rather than a skipped one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tests.helpers.paths import ROOT

COMMITTED = ROOT / "tests" / "golden"
GOLDEN = Path(os.environ.get("GOLDEN_DIR") or COMMITTED)
TOKENIZER = COMMITTED / "tokens_labels" / "tokenizer"  #: for tests that compare with no golden file


def files(pattern: str) -> list[Path]:
    """Return the golden files that match a glob relative to the folder, sorted by name."""
    return sorted(GOLDEN.glob(pattern))


def present(*names: str) -> bool:
    """Return whether all these files exist, for tests that need several."""
    return all((GOLDEN / name).is_file() for name in names)


def json_lines(pattern: str) -> list[dict]:
    """Return all rows of the matching JSON Lines files, in order."""
    return [json.loads(line) for path in files(pattern) for line in path.read_text(encoding="utf-8").splitlines()]


def json_file(name: str) -> Any:
    """Return the contents of one JSON file, or None if it is missing."""
    path = GOLDEN / name
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
