"""SIGKILL of a rank or of all processes at any moment of a run, then a resume on the same or other ranks."""

from __future__ import annotations

import random

from benchmarks.soak.train import TrainingCampaign


def test_killed_runs_have_the_same_batches_and_weights(tmp_path):
    """A short campaign of benchmarks/soak/train.py, which compares the results with a run without kills."""
    campaign = TrainingCampaign(tmp_path, steps=12, rng=random.Random(9), stages=(2,))
    campaign.run(kills=2)
    assert campaign.kills.total() == 2 and campaign.resumed
