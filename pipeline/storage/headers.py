"""Parse the headers of an HTTP response (RFC 9110), whichever client received it."""

from __future__ import annotations

import re
import time
from email.utils import parsedate_to_datetime
from typing import Protocol

UNKNOWN = -1  #: a number that the server does not state


class Headers(Protocol):
    """Header fields by lower-case name, as any client has them."""

    def get(self, name: str, default: str, /) -> str:
        """Return the value of a field, or ``default``."""


def parse_int(text: str) -> int:
    """Parse a number of bytes or seconds; UNKNOWN if it is not one."""
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text.strip()) else UNKNOWN


def content_total(headers: Headers) -> int:
    """Return the bytes of the complete file by Content-Range: 100 for ``bytes 0-9/100``."""
    return parse_int(headers.get("content-range", "").rpartition("/")[2])


def range_start(headers: Headers) -> int:
    """Return the offset of the first byte sent, by Content-Range."""
    found = re.match(r"bytes\s+([0-9]{1,18})-", headers.get("content-range", ""))
    return int(found[1]) if found else UNKNOWN


def retry_after(headers: Headers) -> float:
    """Return the seconds that the server asks to wait: Retry-After (seconds or a date), or the ``t`` of RateLimit."""
    text = headers.get("retry-after", "").strip()
    if (seconds := parse_int(text)) != UNKNOWN:
        return float(seconds)
    try:
        return max(parsedate_to_datetime(text).timestamp() - time.time(), 0.0)
    except (ValueError, TypeError, OverflowError):
        limit = re.search(r";\s*t=([0-9]{1,9})", headers.get("ratelimit", ""))
        return float(limit[1]) if limit else 0.0
