"""The error of a campaign."""

from __future__ import annotations


class SoakError(Exception):
    """A build, row or stage that did not come out as it must."""
