"""SIGKILL of a rank, and of all processes, at any moment of a run; the same command, then another number of ranks."""

from __future__ import annotations

import random

from benchmarks.soak.train import TrainingCampaign


def test_killed_runs_go_on_with_the_same_batches_to_the_same_weights(tmp_path):
    """A short campaign of benchmarks/soak/train.py, which compares what comes out with a run without kills."""
    campaign = TrainingCampaign(tmp_path, steps=12, draw=random.Random(9), stages=(2,))
    campaign.run(kills=2)
    assert campaign.kills.total() == 2 and campaign.resumed
