"""Epoch orders grouped by modality and length: equal to the published sampler, and properties of global batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from framestream.pipeline.planning import length_grouping as grouping
from framestream.pipeline.planning.packing import pack
from tests.helpers.golden_data import json_file

TABLE = json_file("length_grouping/cases.json") or {}
INPUTS = {"kind", "lengths", "batch_size", "world_size", "seed", "kept_every_sample_once", "error"}


def groupings(refused: bool) -> list:
    rows = [row for row in TABLE.get("groupings", []) if ("error" in row) == refused]
    return [pytest.param(row, id=f"{i}-{row['kind']}") for i, row in enumerate(rows)]


def order(name: str, row: dict) -> np.ndarray:
    """Our order for a key of a golden row; torch's global generator is seeded first, as there."""
    signed, shares = np.array(row["lengths"]), row["world_size"]
    lengths, size, drawn = np.abs(signed), row["batch_size"] * shares, torch.default_generator
    torch.manual_seed(row["seed"])
    own = torch.Generator().manual_seed(row["seed"] + 1)
    makers = {
        "global_seed": lambda: grouping.modality_grouped(signed, size, shares, drawn),
        "global_seed_and_generator": lambda: grouping.modality_grouped(signed, size, shares, own, within=drawn),
        "plain_length_grouping": lambda: grouping.random_batches(lengths, size, shares, drawn),
        "by_variable_length": lambda: grouping.length_grouped_windows(lengths, size, drawn),
        "auto_single": lambda: grouping.length_grouped(lengths, size, shares, drawn),
        "modality_auto": lambda: grouping.modality_length_grouped(signed, size, shares, drawn),
    }
    return makers[name]()


@pytest.mark.parametrize("row", groupings(refused=False))
def test_golden_length_grouping(row):
    for name in row.keys() - INPUTS:
        assert order(name, row).tolist() == row[name], name
    once = all(sorted(order(name, row)) == list(range(len(row["lengths"]))) for name in ("global_seed", "auto_single"))
    assert once == row["kept_every_sample_once"]


@pytest.mark.parametrize("row", groupings(refused=True))
def test_golden_length_grouping_refused(row):
    for grouped in (grouping.modality_grouped, grouping.modality_length_grouped):
        with pytest.raises(ValueError, match=f"index {row['lengths'].index(0)} is 0"):
            grouped(np.array(row["lengths"]), 2, 1, torch.Generator())


@pytest.mark.parametrize("row", [pytest.param(row, id=str(i)) for i, row in enumerate(TABLE.get("even_chunks", []))])
def test_golden_even_chunks(row):
    chunks = grouping.split_by_length(np.array(row["indices"]), np.array(row["lengths"]), row["chunks"])
    assert [chunk.tolist() for chunk in chunks] == row["out"]


@st.composite
def epochs(draw) -> tuple[np.ndarray, int, int, torch.Generator]:
    """Signed lengths, size of a global batch, shares and a seeded generator."""
    magnitudes = st.integers(1, 10**6) if draw(st.booleans()) else st.integers(1, 3)
    signs = draw(st.sampled_from([(1, -1), (1, 1, 1, -1), (1,), (-1,)]))
    lengths = draw(st.lists(st.builds(int.__mul__, magnitudes, st.sampled_from(signs)), min_size=1, max_size=200))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    return np.array(lengths), draw(st.integers(1, 30)), draw(st.integers(1, 8)), generator


def slices(indices: np.ndarray, size: int) -> list[np.ndarray]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def kinds(lengths: np.ndarray, batch: np.ndarray) -> int:
    return len(np.unique(np.sign(lengths[batch])))


@given(epochs())
def test_modality_batches_hold_one_kind_and_every_dialogue_once(epoch):
    lengths, size, shares, generator = epoch
    indices = grouping.modality_grouped(lengths, size, shares, generator)
    assert sorted(indices) == list(range(len(lengths)))
    counts = [int((lengths > 0).sum()), int((lengths < 0).sum())]
    whole = sum(-(-count // size) - 1 for count in counts) if all(counts) else -(-len(lengths) // size)
    batches = slices(indices, size)
    assert all(kinds(lengths, batch) == 1 for batch in batches[:whole])
    assert len(batches) - whole <= 2  # what is left of both kinds, up to a global batch of each
    assert indices[whole * size :].tolist() == sorted(indices[whole * size :])


@given(epochs())
def test_modality_length_has_whole_batches_of_one_kind(epoch):
    lengths, size, shares, generator = epoch
    indices = grouping.modality_length_grouped(lengths, size, shares, generator)
    counts = [int((lengths > 0).sum()), int((lengths < 0).sum())]
    if not all(counts):
        assert sorted(indices) == list(range(len(lengths)))
        return
    assert len(set(indices.tolist())) == len(indices) == sum((-(-count // size) - 1) * size for count in counts)
    assert all(kinds(lengths, batch) == 1 for batch in slices(indices, size))


@given(epochs())
def test_long_dialogues_meet_and_every_dialogue_comes_once(epoch):
    lengths, size, shares, generator = epoch
    lengths = np.abs(lengths)
    indices = grouping.long_together(lengths, size, shares, generator)
    assert sorted(indices) == list(range(len(lengths)))
    width, limit = min(shares, size), int(lengths.sum()) * size  # of a length times shares times dialogues
    whole = slices(indices, size)[: len(lengths) // size]
    counts = [int((lengths[batch] * shares * len(lengths) > limit).sum()) for batch in whole]
    assert sum(0 < count < width for count in counts) <= 1
    if size >= shares:
        assert all(count in (0, width) for count in counts if count >= width)


def test_ranks_wait_less_for_long_dialogues_that_meet():
    """Two ranks, 16 dialogues a batch, one in a hundred a hundred times as long as the others."""
    rng = np.random.default_rng(0)
    lengths, size, ranks = np.where(rng.random(16_000) < 0.01, 8_000, 80) + rng.integers(0, 20, 16_000), 16, 2

    def balance(indices: np.ndarray) -> float:
        packed = [pack(lengths[b], lengths[b].astype(float), 16_384, ranks) for b in slices(indices, size)]
        rows = zip(slices(indices, size), packed, strict=True)
        totals = np.array([[lengths[batch[row]].sum() for row in split] for batch, split in rows])
        return float(totals.sum() / (totals.max(axis=1).sum() * ranks))

    together = grouping.long_together(lengths, size, ranks, torch.Generator().manual_seed(1))
    apart = grouping.random_batches(lengths, size, ranks, torch.Generator().manual_seed(1))
    assert balance(together) > 0.98 and balance(apart) < 0.75
    long = np.array([(lengths[batch] > 1000).sum() for batch in slices(together, size)])
    assert set(long) == {0, ranks}
    hosts = np.flatnonzero(long)
    assert abs(np.corrcoef(hosts, np.arange(len(hosts)))[0, 1]) > 0.9  # over the whole epoch


def spread(lengths: np.ndarray, indices: np.ndarray, size: int) -> float:
    """Mean over global batches of the longest length over the mean."""
    return float(np.mean([lengths[batch].max() / lengths[batch].mean() for batch in slices(indices, size)]))


def test_batches_of_like_lengths_are_alike_and_come_in_random_order():
    lengths, size = np.random.default_rng(0).integers(1, 10_000, 8192), 32
    indices = {
        name: made(lengths, size, *shares, torch.Generator().manual_seed(1))
        for name, made, shares in (
            ("plain", grouping.random_batches, [4]),
            ("length", grouping.length_grouped, [4]),
            ("windows", grouping.length_grouped_windows, []),
        )
    }
    for order in indices.values():
        assert sorted(order) == list(range(len(lengths)))
        means = [lengths[batch].mean() for batch in slices(order, size)]
        assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.25  # 256 batches: standard deviation 0.06
    assert spread(lengths, indices["plain"], size) > 1.8
    assert max(spread(lengths, indices[name], size) for name in ("length", "windows")) < 1.2


@given(epochs())
def test_a_batch_is_split_completely_and_evenly(epoch):
    lengths, size, shares, _ = epoch
    lengths = np.abs(lengths)
    batch = np.argsort(-lengths, kind="stable")[:size]
    chunks = grouping.split_by_length(batch, lengths, shares)
    assert sorted(np.concatenate(chunks)) == sorted(batch)
    assert max(map(len, chunks)) - min(map(len, chunks)) == (len(batch) % shares > 0)
