"""The error of soak tests."""

from __future__ import annotations


class SoakError(Exception):
    """A build, row or stage differs from what it must be."""
