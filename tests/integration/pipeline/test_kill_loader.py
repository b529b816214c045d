"""SIGKILL of ranks and their workers at any moment, then other numbers of ranks: the same global batches."""

from __future__ import annotations

from benchmarks.soak.loader import ReadingCampaign


def test_killed_ranks_and_other_numbers_of_them_read_the_same_batches(tmp_path):
    campaign = ReadingCampaign(tmp_path, workers=2, copies=6)
    assert len(campaign.expected) > 40
    campaign.run(seed=1, kills=2)
    assert campaign.kills.total() == 2 and campaign.worlds.total() > 2
