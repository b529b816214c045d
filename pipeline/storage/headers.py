"""What the headers of an HTTP answer say (RFC 9110), whichever client received it."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

UNKNOWN = -1  #: a number that the server does not tell


def parse_int(text: str) -> int:
    """A number of bytes or seconds, or UNKNOWN."""
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text.strip()) else UNKNOWN


def content_total(headers: Mapping[str, str]) -> int:
    """Bytes of the whole file by Content-Range: 100 of ``bytes 0-9/100``."""
    return parse_int(headers.get("content-range", "").rpartition("/")[2])


def range_start(headers: Mapping[str, str]) -> int:
    """Where the part that is sent begins, by Content-Range."""
    found = re.match(r"bytes\s+([0-9]{1,18})-", headers.get("content-range", ""))
    return int(found[1]) if found else UNKNOWN


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that the server asks to wait: Retry-After (seconds or a date), or the ``t`` of RateLimit."""
    text = headers.get("retry-after", "").strip()
    if (seconds := parse_int(text)) != UNKNOWN:
        return float(seconds)
    try:
        return max(parsedate_to_datetime(text).timestamp() - time.time(), 0.0)
    except (ValueError, TypeError, OverflowError):
        limit = re.search(r";\s*t=([0-9]{1,9})", headers.get("ratelimit", ""))
        return float(limit[1]) if limit else 0.0
