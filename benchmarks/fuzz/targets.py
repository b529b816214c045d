"""All targets of a campaign."""

from __future__ import annotations

from benchmarks.fuzz.build_targets import BUILD_TARGETS
from benchmarks.fuzz.input_targets import INPUT_TARGETS
from benchmarks.fuzz.old_targets import OLD_TARGETS
from benchmarks.fuzz.run_targets import RUN_TARGETS
from benchmarks.fuzz.shard_targets import SHARD_TARGETS

_ALL = (*SHARD_TARGETS, *BUILD_TARGETS, *INPUT_TARGETS, *RUN_TARGETS, *OLD_TARGETS)
TARGETS = {target.name: target for target in _ALL}
