"""Serialize values as canonical JSON."""

from __future__ import annotations

import json
from typing import Any

_COMPACT = json.JSONEncoder(sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def canonical_json(value: Any) -> str:
    """Serialize ``value`` as compact JSON with sorted keys; equal values give equal text."""
    return _COMPACT.encode(value)
