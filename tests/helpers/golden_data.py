"""Where the golden reference data lie and how tests discover them: an absent file makes no test, never a skip."""

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
    """Golden files that match a glob relative to the folder, in order of name."""
    return sorted(GOLDEN.glob(pattern))


def present(*names: str) -> bool:
    """Whether all these files are there, for tests that need several."""
    return all((GOLDEN / name).is_file() for name in names)


def json_lines(pattern: str) -> list[dict]:
    """All rows of the JSON-lines files that match, in order."""
    return [json.loads(line) for path in files(pattern) for line in path.read_text(encoding="utf-8").splitlines()]


def json_file(name: str) -> Any:
    """One JSON file, or None where it is absent."""
    path = GOLDEN / name
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
