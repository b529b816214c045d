"""Where the golden reference data lie and how tests discover them: an absent file makes no test, never a skip."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

GOLDEN = Path(os.environ.get("GOLDEN_DIR") or Path(__file__).parent / "golden")


def files(pattern: str) -> list[Path]:
    """Golden files that match a glob relative to the folder, in order of name."""
    return sorted(GOLDEN.glob(pattern))


def json_lines(pattern: str) -> list[dict]:
    """All rows of the JSON-lines files that match, in order."""
    return [json.loads(line) for path in files(pattern) for line in path.read_text(encoding="utf-8").splitlines()]


def json_file(name: str) -> Any:
    """One JSON file, or None where it is absent."""
    path = GOLDEN / name
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
