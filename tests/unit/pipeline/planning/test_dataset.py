"""Several roots as one dataset: contents of epochs against a plain count, interruptions, and what is refused."""

from __future__ import annotations

import functools
import json
import shutil
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from framestream.pipeline import build_loader
from framestream.pipeline.config.loading import ORDERS
from framestream.pipeline.config.manifest import Manifest, ManifestError
from framestream.pipeline.loading.loader import Loader, StateError
from framestream.pipeline.planning.dataset import ConcatDataset, open_dataset
from framestream.pipeline.planning.epoch_plan import EpochPlan
from framestream.pipeline.shards.index import ShardsError
from framestream.pipeline.shards.samples import dialogue_key
from tests.helpers.corpora.small_root import Root, manifest, turns

SIZES = {"one": {"a": 7, "b": 5, "c": 1}, "two": {"a": 6, "d": 11}}  #: usable dialogues by root and entry


def make_root(folder: Path, sizes: dict[str, int]) -> Path:
    """A root of ``sizes`` by entry, entries in turn, a val dialogue and an unusable one; return its stage folder."""
    root = Root(folder)
    video = root.video(40, 16)
    left = dict(sizes)
    while any(left.values()):
        for entry in [name for name, count in left.items() if count]:
            media = [video] if left[entry] % 3 == 0 else []
            root.dialogue(turns("<image>\nSay it." if media else "Say it.", "word " * left[entry]), media, entry=entry)
            left[entry] -= 1
    root.dialogue(turns("<image> <image>", "Yes."), [video], entry="a")  # two marks for one medium
    root.dialogue(turns("Say it.", "No."), split="val", entry="held out")
    for number, dialogue in enumerate(root.dialogues):
        dialogue["key"] = dialogue_key(f"{folder.name} {number}")
    root.write()
    path = folder / "stage2" / "build.json"
    frames = {"sampler": "middle", "min": 8, "max": 16, "size": 64}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"specification": {"frames": frames}}))
    return folder / "stage2"


@pytest.fixture(scope="module")
def roots(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mix")
    for name in SIZES:
        make_root(folder / name, SIZES[name])
    return folder


@pytest.fixture(scope="module")
def entry_of(roots) -> dict[str, tuple[str, str]]:
    """Root and entry of every usable dialogue, by key."""
    dataset, found = both(roots), {}
    for name, part in zip(SIZES, dataset.parts, strict=True):
        for row, dialogue in enumerate(part.index.dialogues.to_pylist()):
            if dialogue["split"] == "train" and part.tokens.num_label_tokens[row]:
                found[dialogue["key"]] = name, dialogue["entry"]
    assert Counter(found.values()) == {(name, e): n for name, sizes in SIZES.items() for e, n in sizes.items()}
    return found


def mixed(roots: Path, mix: list[dict], **over) -> Manifest:
    """A manifest that mixes roots, named by their folder in ``roots``."""
    mix = [{**root, "root": str(roots / root["root"] / "stage2")} for root in mix]
    over = {"batching": {"global_batch": 9, "row_multiple": 24}, **over}
    return manifest(roots / "one", mix=mix, **over)


@functools.cache
def both(roots: Path) -> ConcatDataset:
    """Both roots, opened once: their views and texts depend on nothing that these mixes change."""
    return open_dataset(mixed(roots, [{"root": name} for name in SIZES]))


def count_of(size: int, repeat: float, cap: int | None) -> int:
    """Samples of an entry, computed directly: half a sample is rounded up."""
    wanted = (2 * Fraction(str(repeat)) * size + 1) // 2
    return int(wanted if cap is None else min(wanted, cap))


def epoch_keys(plan: EpochPlan, epoch: int) -> list[str]:
    """The keys of all rows of an epoch, in order of global batches."""
    steps = range(plan.num_batches)
    return [plan.dataset.key(int(n)) for step in steps for row in plan.global_batch(epoch, step).rows for n in row]


repeats = st.sampled_from([0.5, 1.0, 1.4, 2.0, 2.5, 3.0])
caps = st.one_of(st.none(), st.integers(1, 12))


@settings(max_examples=40, deadline=None)
@given(
    st.fixed_dictionaries({name: repeats for name in SIZES}),
    st.dictionaries(st.sampled_from([(r, e) for r in SIZES for e in SIZES[r]]), st.tuples(repeats, caps)),
    st.sampled_from(("shuffle", "long_together", "length", "sequential")),
)
def test_epochs_repeat_every_dialogue_as_often_as_the_manifest_says(roots, entry_of, root_repeats, named, order):
    mix = [
        {
            "root": name,
            "repeat": root_repeats[name],
            "entries": [{"entry": e, "repeat": r, "cap": c} for (n, e), (r, c) in named.items() if n == name],
        }
        for name in SIZES
    ]
    batching = {"global_batch": 9, "row_multiple": 2, "order": order}
    plan = EpochPlan(both(roots), mixed(roots, mix, batching=batching), "train")
    # Entries that are not named are one pool: their samples are counted together.
    pools = {(name, e): (name, e) if (name, e) in named else (name, "") for name in SIZES for e in SIZES[name]}
    size = Counter(pools[origin] for origin in entry_of.values())
    wanted = {pool: count_of(n, *named.get(pool, (root_repeats[pool[0]], None))) for pool, n in size.items()}
    over_epochs: Counter[str] = Counter()
    for epoch in range(4):
        times = Counter(epoch_keys(plan, epoch))
        assert Counter(pools[entry_of[key]] for key in times.elements()) == {p: n for p, n in wanted.items() if n}
        for key, origin in entry_of.items():
            least, more = divmod(wanted[pools[origin]], size[pools[origin]])
            assert least <= times[key] <= least + bool(more)
        over_epochs += times
        for pool in size:
            seen = [over_epochs[key] for key, origin in entry_of.items() if pools[origin] == pool]
            assert max(seen) - min(seen) <= 1, "over epochs, all dialogues appear equally often"


@settings(max_examples=30, deadline=None)
@given(st.fractions(0, 5, max_denominator=8), st.fractions(0, 5, max_denominator=8))
def test_weights_share_out_the_epoch_exactly(roots, entry_of, one, two):
    mix = [{"root": "one", "weight": float(one), "repeat": 2}, {"root": "two", "weight": float(two)}]
    if not one + two:
        with pytest.raises(ManifestError, match=r"mix\[0\].weight: all are 0"):
            mixed(roots, mix)
        return
    plan = EpochPlan(both(roots), mixed(roots, mix), "train")
    total = 2 * 13 + 17
    exact = [total * weight / (one + two) for weight in (one, two)]
    for epoch in range(2):
        found = Counter(entry_of[key][0] for key in epoch_keys(plan, epoch))
        assert sum(found.values()) == total
        assert all(abs(found[name] - share) <= Fraction(1, 2) for name, share in zip(SIZES, exact, strict=True))


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(
    repeat=repeats,
    weighted=st.booleans(),
    batch=st.integers(1, 30),
    seed=st.integers(0, 5),
    stops=st.lists(st.tuples(st.sampled_from([1, 2, 3, 4, 8]), st.integers(0, 4)), min_size=1, max_size=4),
)
def test_interruptions_and_world_sizes_change_no_global_batch(roots, repeat, weighted, batch, seed, stops):
    mix = [{"root": "one", "repeat": repeat}, {"root": "two", "entries": [{"entry": "d", "cap": 4}]}]
    for number, root in enumerate(mix if weighted else []):
        root["weight"] = [0.3, 0.2][number]
    made = mixed(roots, mix, seed=seed, batching={"global_batch": batch, "row_multiple": 24})
    interrupted(both(roots), made, stops)


sizes = st.dictionaries(st.sampled_from("abcd"), st.integers(1, 12), min_size=1, max_size=3)


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(
    sizes=st.tuples(sizes, sizes),
    repeats=st.tuples(repeats, repeats),
    weights=st.one_of(st.just((None, None)), st.tuples(st.integers(1, 5), st.integers(0, 5))),
    batch=st.integers(1, 30),
    threads=st.integers(1, 4),
    order=st.sampled_from([order for order in ORDERS if order != "modality_length"]),
    stops=st.lists(st.tuples(st.sampled_from([1, 2, 3, 4, 8]), st.integers(0, 4)), min_size=1, max_size=3),
)
def test_interruptions_of_random_indexes(tmp_path_factory, sizes, repeats, weights, batch, threads, order, stops):
    folder = tmp_path_factory.mktemp("random")
    mix = []
    for name, entries, repeat, weight in zip(SIZES, sizes, repeats, weights, strict=True):
        make_root(folder / name, entries)
        mix.append({"root": name, "repeat": repeat, "weight": weight})
    batching = {"global_batch": batch, "row_multiple": 24, "order": order}
    made = mixed(folder, mix, batching=batching, loader__threads=threads)
    interrupted(open_dataset(made), made, stops)


def interrupted(dataset: ConcatDataset, made: Manifest, stops: list[tuple[int, int]]) -> None:
    """A run that stops after so many global batches on so many ranks has those of one that does not stop."""
    got, state = [], None
    for world, count in [*stops, (2, 10**6)]:
        done, state = run(EpochPlan(dataset, made, "train"), world, count, state)
        got += done
    straight, rest = [], None
    while rest is None or rest["epoch"] < state["epoch"]:
        done, rest = run(EpochPlan(dataset, made, "train"), 1, 10**6, rest)
        straight += done
    assert got == straight and rest == state


def run(plan: EpochPlan, world: int, count: int, state: dict | None) -> tuple[list, dict]:
    """The next ``count`` global batches of all ranks, as rows of keys and ids, and the state after them."""
    ranks = [Loader(plan, rank, world) for rank in range(world)]
    for loader in ranks if state else ():
        loader.load_state_dict(json.loads(json.dumps(state)))
    streams, done = [iter(loader) for loader in ranks], []
    while len(done) < count:
        rows, last = [], False
        while not last:
            batches = [next(stream, None) for stream in streams]
            if batches[0] is None:
                assert batches == [None] * world and not rows, "ranks have different numbers of steps"
                return done, states(ranks)
            assert len({(b.epoch, b.step, b.micro_step, b.num_micro_steps, b.is_last) for b in batches}) == 1
            rows += [(tuple(b.keys), tuple(b.input_ids.tolist())) for b in batches]
            last = batches[0].is_last
        done.append((batches[0].epoch, batches[0].step, rows))
    for stream in streams:
        stream.close()
    return done, states(ranks)


def states(ranks: list[Loader]) -> dict:
    assert all(loader.state_dict() == ranks[0].state_dict() for loader in ranks)
    return ranks[0].state_dict()


def test_resuming_a_hundred_times_changes_nothing(roots):
    mix = [{"root": "one", "repeat": 2.5}, {"root": "two"}]
    made = mixed(roots, mix, batching={"global_batch": 3, "row_multiple": 24})
    plan = EpochPlan(open_dataset(made), made, "train")
    state = run(plan, 2, 4, None)[1]
    again = state
    for world in (1, 2, 3, 4, 8) * 20:
        again = run(plan, world, 0, again)[1]
    assert again == state and run(plan, 3, 2, again) == run(plan, 3, 2, state)


def test_a_root_alone_is_read_as_without_a_mix(roots):
    alone = mixed(roots, [], shards=str(roots / "one"))
    same = mixed(roots, [{"root": "one"}])
    plans = [EpochPlan(open_dataset(made), made, "train") for made in (alone, same)]
    assert [epoch_keys(plans[0], e) for e in range(2)] == [epoch_keys(plans[1], e) for e in range(2)]


@pytest.mark.parametrize(
    ("sampling", "positions"), [("first:2", [0, 1]), ("first2:3", [3, 4, 5]), ("end:50%", [4, 5, 6, 7])]
)
def test_sampling_counts_the_dialogues_of_the_entry_in_the_index(roots, sampling, positions):
    """Entry a of the first root has eight; the last cannot be used, and is left out only where it is taken."""
    made = mixed(roots, [{"root": "one", "repeat": 0, "entries": [{"entry": "a", "sampling": sampling, "repeat": 1}]}])
    dataset = open_dataset(made)
    plan = EpochPlan(dataset, made, "train")
    rows = dataset.parts[0].index.dialogues.to_pylist()
    keys = [row["key"] for row in rows if row["entry"] == "a"]
    assert sorted(epoch_keys(plan, 0)) == sorted(keys[position] for position in positions if position < 7)
    assert [dataset.key(n) for n in plan.excluded.tolist()] == [keys[7]] * (7 in positions)


def test_entries_have_frames_of_their_own(roots):
    entries = [{"entry": "a", "min": 12, "max": 12}, {"entry": "d", "max": 8}]
    made = mixed(roots, [{"root": "two", "entries": entries}], frames__max=16, frames__min=8)
    dataset = open_dataset(made)
    frames = {"a": 12, "d": 8}
    seen = Counter()
    for row in build_loader(made):
        numbers = [n for n in range(len(dataset)) if dataset.key(n) in row.keys]
        entries = [dataset.parts[0].index.dialogues["entry"][n].as_py() for n in numbers if dataset.clips[n]]
        assert len(row.clips) * 4 == sum(frames[entry] for entry in entries)
        seen += Counter(entries)
    assert seen == {"a": 2, "d": 3}
    assert (
        dataset.parts[0].tokens.fingerprint != open_dataset(mixed(roots, [{"root": "two"}])).parts[0].tokens.fingerprint
    )


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ([{"root": "one", "repeat": -1}], r"mix\[0\].repeat: must be at least 0"),
        ([{"root": "one", "repeat": 0}], r"mix\[0\].repeat: is 0 and no entry has its own"),
        ([{"root": "one"}, {"root": "one"}], r"mix\[1\].root: .* is listed twice"),
        ([{"root": "one", "weight": 1}, {"root": "two"}], r"mix\[1\].weight: all roots have one, or none"),
        ([{"root": "one", "weight": -0.5}], r"mix\[0\].weight: must be at least 0"),
        ([{"root": "one", "entries": [{"entry": "a"}, {"entry": "a"}]}], r"mix\[0\].entries\[1\].entry: a is listed"),
        ([{"root": "one", "entries": [{"entry": "a", "cap": 0}]}], r"mix\[0\].entries\[0\].cap: must be at least 1"),
        ([{"root": "one", "entries": [{"entry": "a", "min": 9, "max": 8}]}], r"mix\[0\].entries\[0\].min: 9 is larger"),
        ([{"root": "one", "entries": [{"entry": "a", "max": 10}]}], r"mix\[0\].entries\[0\].max: 10 is not a multiple"),
        ([{"root": "one", "entries": [{"entry": "a", "sampling": "half"}]}], r"mix\[0\].entries\[0\].sampling: 'half'"),
        ([{"root": "one", "entries": [{"entry": "held in"}]}], r"mix\[0\].entries\[0\].entry: .*mean `held out`"),
        (
            [{"root": "one", "weight": 9, "entries": [{"entry": "a", "cap": 1}, {"entry": "b", "cap": 1},
              {"entry": "c", "cap": 1}, {"entry": "held out", "repeat": 0}]}, {"root": "two", "weight": 1}],
            r"mix\[0\].weight: is 18 of 20 dialogues .* \(18 requested, 3 available\)",
        ),
    ],
)  # fmt: skip
def test_impossible_mixes_are_refused_in_one_line(roots, mix, message):
    with pytest.raises(ManifestError, match=message) as caught:
        build_loader(mixed(roots, mix))
    assert "\n" not in str(caught.value)


def test_frames_that_the_shards_do_not_have_are_refused(roots):
    mix = [{"root": "one"}, {"root": "two", "entries": [{"entry": "a"}, {"entry": "d", "max": 32}]}]
    with pytest.raises(ShardsError, match=r"mix\[1\].entries\[1\].max: is 32, the shards have 16"):
        build_loader(mixed(roots, mix))


def test_a_state_of_another_mix_is_refused_and_a_root_may_move(roots, tmp_path):
    mix = [{"root": "one"}, {"root": "two", "entries": [{"entry": "d", "cap": 4}]}]
    state = build_loader(mixed(roots, mix)).state_dict()
    other = [{"root": "one", "repeat": 2}, {"root": "two", "entries": [{"entry": "d", "cap": 5}]}]
    with pytest.raises(StateError, match=r"mix\[0\].repeat \(saved: 1.0, now: 2.0\), mix\[1\].entries"):
        build_loader(mixed(roots, other)).load_state_dict(state)
    with pytest.raises(StateError, match=r"mix\[0\].index"):
        build_loader(mixed(roots, mix[::-1])).load_state_dict(state)
    for name in SIZES:
        shutil.copytree(roots / name, tmp_path / name)
    build_loader(mixed(tmp_path, mix)).load_state_dict(state)


def test_summary_equals_the_contents_of_the_first_epoch(roots, entry_of):
    mix = [{"root": "one", "repeat": 2.5}, {"root": "two", "entries": [{"entry": "d", "cap": 4}]}]
    made = mixed(roots, mix, batching={"global_batch": 9, "row_multiple": 2})
    loader = build_loader(made)
    report = loader.report()
    rows = list(loader)
    keys = Counter(key for row in rows for key in row.keys)
    shares = {(Path(share.root).parent.name, share.entry): share for share in report.entries}
    for origin, share in shares.items():
        mine = {key: count for key, count in keys.items() if entry_of[key] == origin}
        assert (share.dialogues, share.num_samples) == (len(mine), sum(mine.values()))
    assert sum(share.num_samples for share in report.entries) == sum(keys.values()) == 33 + 6 + 4
    assert sum(share.tokens for share in report.entries) == sum(row.tokens for row in rows)
    assert sum(share.frames for share in report.entries) == sum(row.frames for row in rows)
    assert sum(share.num_label_tokens for share in report.entries) == sum(
        int((row.labels != -100).sum()) for row in rows
    )
    assert report.fill == pytest.approx(sum(row.tokens for row in rows) / (1024 * len(rows)))
    assert 0 < report.balance <= 1 and report.num_excluded == 2 and report.num_batches == loader.num_batches
    lines = str(report).splitlines()
    assert lines[0].split() == ["entry", "dialogues", "samples", "frames", "tokens", "labels", "root"]
    assert lines[-3].split()[:3] == ["all", str(len(keys)), "43"] and "balance" in lines[-2]


def test_numbers_say_root_and_row(roots):
    dataset = both(roots)
    assert len(dataset) == 15 + 19
    assert [dataset.locate(n) for n in (0, 14, 15, 33)] == [(0, 0), (0, 14), (1, 0), (1, 18)]
    for number in range(len(dataset)):
        root, row = dataset.locate(number)
        assert dataset.key(number) == dataset.parts[root].index.dialogues["key"][row].as_py()
        assert all(view.root == root for view in dataset.views(number))
    before = [dataset.ids_and_labels(n)[0].tolist() for n in range(len(dataset))]
    dataset.release()
    assert [dataset.ids_and_labels(n)[0].tolist() for n in range(len(dataset))] == before
    assert np.array_equal(dataset.length[15:], dataset.parts[1].tokens.length)
