"""Ranks share units of work through a store, wait for each other without a limit, and one says why they end."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.distributed import HashStore, PrefixStore

from framestream.pipeline.shards.index import ShardsError
from framestream.trainer.evaluation import rank_pool as module
from framestream.trainer.evaluation.cli import _run_on
from framestream.trainer.evaluation.rank_pool import RankFailedError, RankPool


@pytest.fixture
def pools(monkeypatch) -> list[RankPool]:
    monkeypatch.setattr(module, "POLL_SECONDS", 0.01)
    store = PrefixStore("start", HashStore())
    return [RankPool(rank, 3, torch.device("cpu"), store) for rank in range(3)]


def together(pools, run) -> list:
    with ThreadPoolExecutor(len(pools)) as threads:
        return list(threads.map(run, pools))


def test_every_unit_is_taken_once_and_rank_0_has_all(pools):
    shown = []

    def work(pool: RankPool) -> list | None:
        taken = []
        for number in pool.take(20):
            taken.append(number)
            time.sleep(0.005 * pool.rank)  # a slow rank takes fewer
            pool.add_done(2)
        return pool.collect(taken, shown.append)

    (parts, *others) = together(pools, work)
    assert others == [None, None] and sorted(sum(parts, [])) == list(range(20))
    assert len(parts[0]) > len(parts[2]) and pools[0].add_done(0) == 40


def test_a_request_to_the_store_is_for_many_units():
    """The store answers when a core is free, and ranks compute on all of them."""

    class Counting:
        asked = 0

        def add(self, key: str, amount: int) -> int:
            self.asked += 1
            return store.add(key, amount)

        def check(self, keys: list[str]) -> bool:
            self.asked += 1
            return store.check(keys)

    store, counting = HashStore(), Counting()
    first, second = (RankPool(rank, 2, torch.device("cpu"), counting) for rank in range(2))
    taken = []
    for number in first.take(1000):
        taken.append(number)
        first.add_done(1)
        if number == 500:
            taken += second.take(1000)
    assert sorted(taken) == list(range(1000)) and counting.asked < 200


def test_a_process_alone_takes_all():
    pool = RankPool(0, 1, torch.device("cpu"))
    assert list(pool.take(3)) == [0, 1, 2] and pool.collect({"a": (1,)}, print) == [{"a": [1]}]
    assert pool.add_done(2) == 2 and pool.add_done(3) == 5 and pool.is_first_failure()


@pytest.mark.parametrize("when", ["working", "waiting"])
def test_one_rank_fails_and_all_end_with_its_line(pools, capsys, when):
    def run(pool: RankPool) -> int:
        if pool.rank == 1:
            if when == "waiting":
                time.sleep(0.1)
            raise ShardsError("stage2: damaged")
        for number in pool.take(10**6 if when == "working" else 0):
            time.sleep(0.001 * (number > 0))
        pool.collect([], lambda done: None)
        return 0

    assert together(pools, lambda pool: _run_on(pool, run)) == [1, 2, 1]
    assert capsys.readouterr().err == "error: stage2: damaged\n"


def test_a_fault_of_all_ranks_is_said_once(pools, capsys):
    def run(pool: RankPool) -> int:
        raise ShardsError("stage2: damaged")

    assert together(pools, lambda pool: _run_on(pool, run)) == [2, 2, 2]
    assert capsys.readouterr().err == "error: stage2: damaged\n"


def test_a_fault_of_the_program_keeps_its_traceback_once(pools):
    def run(pool: RankPool) -> int:
        raise KeyError("bug")

    def outcome(pool: RankPool) -> object:
        try:
            return _run_on(pool, run)
        except KeyError as error:
            return str(error)

    assert sorted(map(str, together(pools, outcome))) == ["'bug'", "1", "1"]


def test_a_rank_that_is_told_of_a_failure_ends(pools):
    assert pools[0].is_first_failure() and not pools[1].is_first_failure()
    with pytest.raises(RankFailedError):
        list(pools[2].take(5))
