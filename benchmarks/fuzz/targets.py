"""All targets of a campaign."""

from __future__ import annotations

from benchmarks.fuzz.shard_targets import SHARD_TARGETS

TARGETS = {target.name: target for target in SHARD_TARGETS}
