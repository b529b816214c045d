"""Batches for ranks and workers: the same samples in the same order however a run is cut up."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from framestream.pipeline.adapters import ShardDataset, ShardStream
from framestream.pipeline.adapters import stream as module
from framestream.pipeline.adapters.types import Dialogue, Sample, SampleError
from framestream.pipeline.loading.loader import StateError, UnreadableError
from tests.helpers.corpora.small_root import Root, turns

pytestmark = pytest.mark.slow


class Numbers:
    """Stands for a data set: sample k says k."""

    by, split, index = "dialogue", "train", SimpleNamespace(fingerprint="f")

    def __init__(self, count: int, bad: set[int] = frozenset()) -> None:
        self._count, self._bad = count, bad

    def __len__(self) -> int:
        return self._count

    def key(self, number: int) -> str:
        return f"d{number}"

    def __getitem__(self, number: int) -> Sample:
        if number in self._bad:
            raise SampleError(f"train-000000.tar: d{number}: no JPEG")
        return Sample([], [Dialogue([], str(number), "", "")])


def one_pass(dataset, batch, world, workers, state=None, **settings) -> tuple[list[list[int]], list[dict]]:
    """Samples of each step over all ranks, and the states, as a DataLoader with workers would put them in order."""
    steps, states = [], []
    ranks = []
    for rank in range(world):
        made = ShardStream(dataset, batch, rank=rank, world_size=world, **settings)
        if state:
            made.load_state_dict(state)
        shares = []
        for worker in range(workers):
            with pytest.MonkeyPatch.context() as patch:
                info = SimpleNamespace(id=worker, num_workers=workers)
                patch.setattr(module, "get_worker_info", lambda info=info: info if workers > 1 else None)
                shares.append(list(made))
        longest = max(map(len, shares))
        batches = [share[k] for k in range(longest) for share in shares if k < len(share)]
        assert len(batches) == len(made)
        ranks.append(batches)
    assert len({len(batches) for batches in ranks}) == 1, "all ranks have equally many steps"
    for together in zip(*ranks, strict=True):
        steps.append([int(sample.dialogues[0].key) for batch in together for sample in batch.samples])
        assert len({batch.state["position"] for batch in together}) == 1
        states.append(together[0].state)
    return steps, states


@given(
    count=st.integers(1, 40),
    batch=st.integers(1, 5),
    worlds=st.tuples(*[st.sampled_from([1, 2, 3, 4, 8])] * 2),
    workers=st.tuples(*[st.integers(1, 3)] * 2),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 3),
    stop=st.integers(0, 50),
)
def test_an_interrupted_pass_gives_what_a_whole_one_gives(count, batch, worlds, workers, epochs, seed, stop):
    dataset, settings = Numbers(count), {"epochs": epochs, "seed": seed}
    whole = sum(one_pass(dataset, 1, 1, 1, **settings)[0], [])
    assert Counter(whole) == dict.fromkeys(range(count), epochs)
    steps, states = one_pass(dataset, batch, worlds[0], workers[0], **settings)
    given = sum(steps, [])
    assert given[: len(whole)] == whole and len(given) - len(whole) < batch * worlds[0]
    stop %= len(steps)
    rest, _ = one_pass(dataset, batch, worlds[1], workers[1], state=states[stop], **settings)
    resumed = sum(steps[: stop + 1], []) + sum(rest, [])
    assert resumed[: len(whole)] == whole
    again, _ = one_pass(dataset, batch, worlds[1], workers[0], state=states[stop], **settings)
    assert again == rest


def test_epochs_and_seeds_differ_and_shuffling_can_be_left_out():
    first, second, other = (sum(one_pass(Numbers(50), 5, 1, 1, epochs=2, seed=seed)[0], []) for seed in (0, 0, 1))
    assert first == second != other
    assert first[:50] != first[50:] and sorted(first[:50]) == sorted(first[50:])
    assert sum(one_pass(Numbers(7), 2, 1, 1, shuffle=False)[0], [])[:7] == list(range(7))


def test_dataloader_workers_keep_order_and_state(tmp_path):
    made = Root(tmp_path)
    for number in range(11):
        made.dialogue(turns("<image>\nWhat?", f"{number}."), [made.video(6 + number, 6)])
    dataset = ShardDataset(made.write() / "stage2", frames=4)

    def keys(batches) -> list[list[str]]:
        return [[sample.dialogues[0].key for sample in batch.samples] for batch in batches]

    stream = ShardStream(dataset, 2, epochs=2, seed=3)
    whole = list(stream)
    assert len(whole) == len(stream) == 11
    loader = iter(DataLoader(stream, batch_size=None, num_workers=2, prefetch_factor=3))
    begun = [next(loader) for _ in range(4)]
    del loader
    assert keys(begun) == keys(whole[:4])
    other = ShardStream(dataset, 2, epochs=2, seed=3)
    other.load_state_dict(begun[-1].state)
    spawned = DataLoader(other, batch_size=None, num_workers=2, multiprocessing_context="spawn")
    assert keys(spawned) == keys(whole[4:])


@pytest.mark.parametrize("change", [{"seed": 1}, {"shuffle": False}, {"index": "g"}])
def test_a_state_of_another_order_is_refused(change):
    settings = {name: value for name, value in change.items() if name != "index"}
    dataset = Numbers(9)
    _, states = one_pass(dataset, 2, 1, 1)
    dataset.index = SimpleNamespace(fingerprint=change.get("index", "f"))
    with pytest.raises(StateError, match=next(iter(change))):
        ShardStream(dataset, 2, **settings).load_state_dict(states[0])


def test_what_cannot_be_read_is_skipped_up_to_a_limit():
    dataset = Numbers(10, bad={3, 7})
    batches = list(ShardStream(dataset, 4, shuffle=False, max_unreadable=4))
    assert [[sample.dialogues[0].key for sample in batch.samples] for batch in batches] == [
        ["0", "1", "2"],
        ["4", "5", "6"],
        ["8", "9", "0", "1"],
    ]
    assert [key for batch in batches for key, _ in batch.skipped] == ["d3", "d7"]
    with pytest.raises(UnreadableError, match="2 samples could not be read.*d7: no JPEG"):
        list(ShardStream(dataset, 4, shuffle=False, max_unreadable=1))


@pytest.mark.parametrize("settings", [{"batch_size": 0}, {"rank": 2, "world_size": 2}, {"epochs": 0}])
def test_wrong_settings_are_refused(settings):
    with pytest.raises(ValueError, match="out of range"):
        ShardStream(Numbers(3), **{"batch_size": 1, **settings})
