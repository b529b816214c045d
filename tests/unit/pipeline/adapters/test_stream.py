"""Batches for ranks and workers: the same samples in the same order however a run is cut up."""

from __future__ import annotations

import pickle
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from framestream.pipeline.adapters import ShardDataset, ShardStream, passes, stream
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
        shares, steps_of_pass = [], len(made)
        for worker in range(workers):
            with pytest.MonkeyPatch.context() as patch:
                info = SimpleNamespace(id=worker, num_workers=workers, seed=5 + worker)
                for module in (stream, passes):
                    patch.setattr(module, "get_worker_info", lambda info=info: info if workers > 1 else None)
                shares.append(list(made))
        longest = max(map(len, shares))
        batches = [share[k] for k in range(longest) for share in shares if k < len(share)]
        assert len(batches) == steps_of_pass
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

    whole = list(ShardStream(dataset, 2, epochs=2, seed=3))
    made = ShardStream(dataset, 2, epochs=2, seed=3)
    assert len(whole) == len(made) == 11
    loader = iter(DataLoader(made, batch_size=None, num_workers=2, prefetch_factor=3))
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


def orders(passes_of, count: int = 3) -> list[list[int]]:
    """Return the samples of successive passes over an iterable of stream batches."""
    return [[int(s.dialogues[0].key) for batch in passes_of for s in batch.samples] for _ in range(count)]


@pytest.mark.parametrize(
    ("workers", "persistent", "context"),
    [
        (0, False, None),
        (1, True, "fork"),
        (2, True, "fork"),
        (2, False, "fork"),
        (2, True, "spawn"),
    ],
)
def test_each_pass_is_the_next_epoch_with_any_workers(workers, persistent, context):
    made = ShardStream(Numbers(20), 3, seed=2)
    loader = DataLoader(
        made, batch_size=None, num_workers=workers, persistent_workers=persistent, multiprocessing_context=context
    )
    expected = sum(one_pass(Numbers(20), 1, 1, 1, epochs=6, seed=2)[0], [])
    epochs = [expected[20 * k : 20 * k + 20] for k in range(6)]
    assert [order[:20] for order in orders(loader, 2)] == epochs[:2]
    made.set_epoch(4)
    assert [order[:20] for order in orders(loader, 2)] == epochs[4:]
    made.set_epoch(0)
    batches = list(loader)
    assert len(batches) == len(made) == 7
    made.load_state_dict(batches[2].state)
    assert len(made) == 4
    assert [order[:20] for order in orders(loader, 2)] == [epochs[0][9:] + epochs[1][:1], epochs[1]]
    made.load_state_dict(batches[-1].state)
    assert orders(loader, 1)[0][:20] == epochs[1]


def test_a_left_pass_counts_and_equal_seeds_do_not_matter():
    made = ShardStream(Numbers(20), 3)
    loader = DataLoader(made, batch_size=None, num_workers=2)
    expected = sum(one_pass(Numbers(20), 1, 1, 1, epochs=3)[0], [])
    found = []
    for _ in range(3):
        torch.manual_seed(0)
        found.append(
            [int(s.dialogues[0].key) for batch, _ in zip(loader, range(4), strict=False) for s in batch.samples]
        )
    assert found == [expected[20 * k : 20 * k + 12] for k in range(3)]


def test_positions_that_cannot_take_effect_are_refused(monkeypatch):
    made = ShardStream(Numbers(20), 4)
    state = list(made)[2].state
    later = ShardStream(Numbers(20), 4)
    later.load_state_dict(state | {"position": 52, "end": 60})
    later.set_epoch(2)
    assert len(later) == 2
    with pytest.raises(StateError, match="set_epoch.0. would discard the loaded state, which is in pass 2"):
        later.set_epoch(0)
    for change in ({"position": "3"}, {"position": -1}, {"position": None}, {"end": 2.5}):
        with pytest.raises(StateError, match="not a state of a stream"):
            later.load_state_dict(state | change)
    for epoch in (-1, 1.5, True):
        with pytest.raises(ValueError, match="is not a whole number"):
            made.set_epoch(epoch)
    monkeypatch.setattr(stream, "get_worker_info", lambda: SimpleNamespace(id=0))
    with pytest.raises(StateError, match="in a DataLoader worker has no effect"):
        made.load_state_dict(state)
    monkeypatch.undo()
    monkeypatch.setattr(passes.os, "getpid", lambda: 1)
    with pytest.raises(RuntimeError, match="create it in the process that reads it"):
        iter(made)


def test_a_state_of_before_passes_goes_to_the_end_of_its_epochs():
    states = one_pass(Numbers(20), 4, 1, 1, epochs=2)[1]
    old = {name: value for name, value in states[3].items() if name != "end"}
    made = ShardStream(Numbers(20), 4, epochs=2)
    made.load_state_dict(old)
    assert len(made) == 6 == len(list(made))


def test_copies_count_their_own_passes():
    made = ShardStream(Numbers(20), 4)
    other = pickle.loads(pickle.dumps(made))
    first = orders(made, 2)
    assert orders(other, 2) == first and first[0] != first[1]


def test_ranks_come_from_the_process_group(monkeypatch):
    monkeypatch.setattr(stream.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(stream.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(stream.distributed, "get_world_size", lambda: 2)
    made = ShardStream(Numbers(20), 5)
    assert (made.rank, made.world_size, len(made)) == (1, 2, 2)
    assert len(ShardStream(Numbers(20), 5, rank=0, world_size=1)) == 4


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_loader_that_accelerate_divides_is_refused(monkeypatch, wrapped):
    made, count = ShardStream(Numbers(20), 5), [2]
    loader = SimpleNamespace(dataset=SimpleNamespace(dataset=made) if wrapped else made)
    state = SimpleNamespace(
        GradientState=lambda: SimpleNamespace(active_dataloader=loader),
        PartialState=lambda: SimpleNamespace(num_processes=count[0]),
    )
    monkeypatch.setitem(sys.modules, "accelerate.state", state)
    with pytest.raises(ValueError, match="do not pass the DataLoader to accelerator.prepare, or use ShardDataset"):
        made.set_epoch(0)
    count[0] = 1
    made.set_epoch(0)


def test_default_collate_gives_lists_of_samples_and_refuses_streams():
    dataset = Numbers(5)
    assert [len(batch) for batch in DataLoader(dataset, batch_size=2)] == [2, 2, 1]
    assert isinstance(next(iter(DataLoader(dataset, batch_size=2)))[0], Sample)
    with pytest.raises(ValueError, match="pass batch_size=None to its DataLoader"):
        next(iter(DataLoader(ShardStream(dataset, 2))))


def test_unknown_arguments_are_refused_with_the_nearest_name():
    with pytest.raises(TypeError, match="^ShardStream: unknown argument epoch; did you mean epochs"):
        ShardStream(Numbers(5), 2, epoch=2)
    with pytest.raises(TypeError, match="^ShardDataset: unknown argument frame; did you mean frames"):
        ShardDataset("x", frame=2)
