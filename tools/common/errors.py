"""Errors of the shard tools: bad input, and a build that stopped."""

from __future__ import annotations


class BuildError(ValueError):
    """The input cannot be built, or the output folder holds another build. The message names the fix in one line."""


class WorkerError(RuntimeError):
    """A build stopped although its input is valid. The message names the cause in one line."""
