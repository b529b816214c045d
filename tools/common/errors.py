"""TODO."""

from __future__ import annotations


class BuildError(ValueError):
    """Input that cannot be built, or another build in its place: one line that says why, with the fix."""


class WorkerError(RuntimeError):
    """A build that stopped on its way, whatever the input: one line that says why."""
