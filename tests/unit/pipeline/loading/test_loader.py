"""Batches: their contents against a slow construction, their order whatever interrupts it, and faults."""

from __future__ import annotations

import functools
import gc
import io
import json
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from framestream.pipeline import build_loader
from framestream.pipeline.config.loading import ORDERS
from framestream.pipeline.config.manifest import Manifest, ManifestError
from framestream.pipeline.loading import pending_row as reading
from framestream.pipeline.loading.buffer_pool import MIN_BUFFER_BYTES, BufferPool
from framestream.pipeline.loading.loader import Loader, StateError, UnreadableError
from framestream.pipeline.loading.pending_row import PendingRow
from framestream.pipeline.media.sampling import sample_indices, time_message
from framestream.pipeline.media.tiling import best_grid, split_into_tiles
from framestream.pipeline.planning.dataset import open_dataset
from framestream.pipeline.planning.epoch_plan import EpochPlan
from framestream.pipeline.planning.summary import summarize_epoch
from framestream.pipeline.shards.index import Index, ShardsError
from framestream.pipeline.shards.media_view import MediaViews
from framestream.pipeline.tokenization.chat_template import ChatTemplate
from framestream.pipeline.tokenization.special_ids import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from tests.helpers.corpora.damage import same, spoil
from tests.helpers.corpora.small_root import SIZE, Root, colour, manifest, mixed_root, turns


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return mixed_root(tmp_path_factory.mktemp("loader"))


# Contents -------------------------------------------------------------------------------------------------------------


def slow_row(made: Manifest, keys: list[str]) -> dict[str, list]:
    """The row of some dialogues, built token by token with other means: PIL, tarfile and flat lists.

    Visual tokens are named (number of the media item in the row, kind, unit, position in the unit).
    """
    index = Index.open(made.shard_root)
    dialogues = {d["key"]: d for d in index.dialogues.to_pylist()}
    conversation = ChatTemplate(made.text)
    out = {name: [] for name in ("ids", "labels", "positions", "weights", "visual", "edges", "clips", "images")}
    out["edges"].append(0)
    for key in keys:
        dialogue = dialogues[key]
        media = [{name: index.media[name][row].as_py() for name in index.media.column_names} | {"row": row}
                 for row in dialogue["media"]]  # fmt: skip
        images = [item for item in media if item["kind"] == "image"]
        messages, expansions = [], []
        for item in media:
            if item["kind"] == "image":
                mode = made.images.mode
                expansions.append(slow_image(index, item, mode, len(images) > 1, out))
                messages.append("")
                continue
            wanted = sample_indices(made.frames, item["vlen"], item["fps"], item["duration"]).tolist()
            wanted += wanted[-1:] * (-len(wanted) % 4)
            numbers = [min(item["frame_index"], key=lambda f: (abs(f - w), f)) for w in wanted]  # noqa: B023
            messages.append(time_message("short", item["duration"], np.array(numbers), item["fps"]))
            first = len(out["clips"]) // 4
            out["clips"] += [colour(item["row"], number) for number in numbers]
            expansions.append([("clip", first + c, t) for c in range(len(numbers) // 4) for t in range(64)])
        turns = json.loads(dialogue["conversations"])
        ids, labels = conversation.encode(turns, [m["kind"] for m in media], messages)
        learned = sum(label != IGNORE_INDEX for label in labels.tolist()[1:])
        row_ids, row_labels = [], []
        for i, (token, label) in enumerate(zip(ids.tolist(), labels.tolist(), strict=True)):
            if token == IMAGE_TOKEN_INDEX:
                visual = expansions.pop(0)
                out["visual"] += visual
                row_ids += [IMAGE_TOKEN_INDEX] * len(visual)
                row_labels += [IGNORE_INDEX] * len(visual)
            else:
                row_ids.append(token)
                row_labels.append(label if i else IGNORE_INDEX)
        out["ids"] += row_ids
        out["labels"] += row_labels
        out["positions"] += range(len(row_ids))
        weight = 1.0 if made.batching.loss_weight == "token" else 1.0 / learned
        out["weights"] += [0.0 if label == IGNORE_INDEX else weight for label in row_labels]
        out["edges"].append(len(out["ids"]))
    return out


def slow_image(index: Index, item: dict, mode: str, several: bool, out: dict) -> list[tuple]:
    with tarfile.open(index.shard_path(item["shard"])) as tar:
        image = Image.open(io.BytesIO(tar.extractfile(f"{item['key']}.jpg").read()))
    cut, _ = split_into_tiles(image, mode, SIZE, 2, several)
    first = len(out["images"])
    out["images"] += list(cut)
    tokens = [("image", first, t) for t in range(64)]
    if len(cut) > 1:
        w, h = best_grid(item["width"], item["height"], SIZE, 2)
        for y in range(8 * h):
            for x in range(8 * w):
                tokens.append(("image", first + 1 + y // 8 * w + x // 8, y % 8 * 8 + x % 8))
    return tokens


@pytest.mark.parametrize(
    "over",
    [
        {},
        {"frames__max": 16, "frames__sampler": "dynamic_fps1", "frames__min": 4},
        {"images__mode": "square", "batching__loss_weight": "token"},
        {"frames__sampler": "fps1", "text__mask_prompt_markers": True},
    ],
)
def test_batches_hold_what_a_slow_construction_holds(root, over):
    made = manifest(root, **over)
    loader = build_loader(made)
    total, seen = 0.0, []
    for batch in loader:
        seen += batch.keys
        if batch.micro_step == 0:
            total = 0.0
        if not batch.keys:
            assert batch.input_ids.tolist() == [0] and batch.labels.tolist() == [IGNORE_INDEX]
            assert batch.cu_seqlens.tolist() == [0, 1] and batch.lengths == [1] and batch.tokens == 0
            assert len(batch.image_positions) == len(batch.label_positions) == 0
            continue
        want = slow_row(made, batch.keys)
        assert batch.input_ids.tolist() == want["ids"]
        assert batch.labels.tolist() == want["labels"]
        assert batch.position_ids.tolist() == want["positions"]
        assert batch.cu_seqlens.tolist() == want["edges"] and batch.lengths == np.diff(want["edges"]).tolist()
        images = [place for place, token in enumerate(want["ids"]) if token == IMAGE_TOKEN_INDEX]
        labeled = [place for place, label in enumerate(want["labels"][1:]) if label != IGNORE_INDEX]
        assert (batch.image_positions.tolist(), batch.label_positions.tolist()) == (images, labeled)
        np.testing.assert_allclose(batch.token_weight, want["weights"], rtol=1e-6)
        units = [("clip", i) for i in range(len(batch.clips))] + [("image", i) for i in range(len(batch.image_tiles))]
        assert [(*units[i // 64], i % 64) for i in batch.visual_index.tolist()] == want["visual"]
        frames = batch.clips.flatten(0, 1).numpy()
        assert len(frames) == len(want["clips"])
        for frame, expected in zip(frames, want["clips"], strict=True):
            assert np.abs(frame.reshape(-1, 3) - np.array(expected)).max() <= 3
        assert (
            np.abs(
                batch.image_tiles.numpy().astype(int) - np.array(want["images"]).reshape(batch.image_tiles.shape)
            ).max(initial=0)
            <= 2
        )
        assert batch.input_ids.dtype == batch.labels.dtype == batch.visual_index.dtype == torch.int64
        assert (batch.cu_seqlens.dtype, batch.token_weight.dtype) == (torch.int32, torch.float32)
        assert batch.clips.dtype == batch.image_tiles.dtype == torch.uint8
        assert batch.tokens == len(want["ids"]) and batch.frames == len(want["clips"]) + len(want["images"])
        total += float(batch.token_weight.sum())
        if batch.is_last:
            assert total == pytest.approx(batch.total_weight)
    assert len(seen) == len(set(seen)) == 21


def test_report_says_what_the_epoch_holds(root):
    loader = build_loader(manifest(root))
    report = loader.report()
    batches = list(loader)
    assert sum(e.tokens for e in report.entries) == sum(batch.tokens for batch in batches)
    assert sum(e.frames for e in report.entries) == sum(batch.frames for batch in batches)
    assert sum(e.num_label_tokens for e in report.entries) == sum(
        int((b.labels != IGNORE_INDEX).sum()) for b in batches
    )
    assert {e.entry: e.dialogues for e in report.entries} == {"stills": 9, "texts": 3, "videos": 9}
    assert str(report).splitlines()[4].split()[:2] == ["all", "21"]


def test_batches_move_as_one(root):
    batch = next(iter(build_loader(manifest(root))))
    moved = batch.to("meta")
    assert {t.device.type for t in moved.tensors().values()} == {"meta"}
    assert moved.keys == batch.keys and batch.input_ids.device.type == "cpu"


# Order ----------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def parts(root: Path, batch: int, multiple: int, limit: int, squared: bool, order: str = "shuffle") -> EpochPlan:
    cost = {"patch": 1.0, "token": 10.0, "pair": 0.1 if squared else 0.0}
    made = manifest(
        root,
        batching={"global_batch": batch, "row_multiple": multiple, "cost": cost, "order": order},
        text__max_tokens=limit,
    )
    return EpochPlan(open_dataset(made), made, "train")


class Fleet:
    """The ranks of one run, and the global batches they were given, as tuples of rows of keys."""

    def __init__(self, plan: EpochPlan, world: int, state: dict | None = None) -> None:
        self.ranks = [Loader(plan, rank, world) for rank in range(world)]
        for loader in self.ranks if state else ():
            loader.load_state_dict(json.loads(json.dumps(state)))

    def run(self, count: int) -> list[tuple]:
        """The next ``count`` global batches of all ranks (fewer at the end of the epoch)."""
        streams = [iter(loader) for loader in self.ranks]
        done: list[tuple] = []
        while len(done) < count:
            rows: list[tuple] = []
            while True:
                batches = [next(stream, None) for stream in streams]
                if batches[0] is None:
                    assert batches == [None] * len(batches) and not rows
                    return done
                assert (
                    len(
                        {(b.epoch, b.step, b.micro_step, b.num_micro_steps, b.is_last, b.total_weight) for b in batches}
                    )
                    == 1
                )
                assert max(b.tokens for b in batches) <= self.ranks[0]._plan.manifest.text.max_tokens
                rows += [tuple(b.keys) for b in batches]
                if batches[0].is_last:
                    break
            done.append((batches[0].epoch, batches[0].step, tuple(rows)))
        for stream in streams:
            stream.close()
        return done

    def state(self) -> dict:
        states = [loader.state_dict() for loader in self.ranks]
        assert all(state == states[0] for state in states)
        return states[0]


@settings(max_examples=25)
@given(
    batch=st.integers(1, 9),
    limit=st.sampled_from([500, 1024]),
    squared=st.booleans(),
    order=st.sampled_from(ORDERS),
    stops=st.lists(st.tuples(st.sampled_from([1, 2, 4]), st.integers(0, 4)), min_size=1, max_size=4),
)
def test_interruptions_and_world_sizes_change_no_global_batch(root, batch, limit, squared, order, stops):
    plan = parts(root, batch, 4, limit, squared, order)
    got, state = [], None
    for world, count in [*stops, (2, 10**6)]:
        fleet = Fleet(plan, world, state)
        got += fleet.run(count)
        state = fleet.state()
    straight = Fleet(plan, 1)
    whole = [done for _ in range(state["epoch"]) for done in straight.run(10**6)]
    assert got == whole
    assert straight.state() == state and state["step"] == 0
    size = straight.ranks[0].num_batches
    assert [position for *position, _ in whole] == [[e, k] for e in range(state["epoch"]) for k in range(size)]
    for epoch in range(state["epoch"]):
        keys = [key for e, _, rows in whole if e == epoch for row in rows for key in row]
        assert len(keys) == len(set(keys)) == 21 - plan.num_dropped


def test_a_row_within_a_global_batch_is_not_counted(root):
    loader = build_loader(manifest(root))
    stream = iter(loader)
    first = next(stream)
    assert not first.is_last and loader.state_dict()["step"] == 0
    again = next(iter(loader))
    assert same(first, again)
    while not next(stream).is_last:
        assert loader.state_dict()["step"] == 0
    assert loader.state_dict()["step"] == 1


def test_epochs_differ_and_sequential_has_the_order_of_the_index(root):
    loader = build_loader(manifest(root))
    first, second = ([b.keys for b in loader] for _ in range(2))
    assert first != second
    plain = build_loader(manifest(root, batching={"global_batch": 1, "row_multiple": 1, "order": "sequential"}))
    wanted = [d["key"] for d in Index.open(root / "stage2").dialogues.to_pylist() if d["split"] == "train"]
    assert [key for batch in plain for key in batch.keys] == wanted


def test_modality_makes_global_batches_of_one_kind(root):
    plan = parts(root, 4, 4, 1024, False, "modality")
    kinds = []
    for step in range(plan.num_batches):
        rows = np.concatenate(plan.global_batch(0, step).rows)
        kinds.append({plan.num_images(np.array([row]))[0] > 0 for row in rows})
    assert [len(kind) for kind in kinds] == [1, 1, 1, 1, 2, 1]  # 18 with media, 3 of text; left over: 2 and 3
    assert not plan.num_dropped


def test_modality_length_says_what_it_drops(root):
    plan = parts(root, 2, 4, 1024, False, "modality_length")
    assert plan.num_batches == 8 + 1 and plan.num_dropped == 2 + 1
    assert str(summarize_epoch(plan)).endswith("; batching.order drops 3 samples per epoch")
    with pytest.raises(ShardsError, match="split train has no others; use modality"):
        parts(root, 18, 4, 1024, False, "modality_length")


@pytest.mark.slow
def test_threads_and_prefetch_change_nothing(root):
    one = list(build_loader(manifest(root, loader__threads=1, loader__prefetch_mb=1)))
    many = list(build_loader(manifest(root, loader__threads=4, loader__prefetch_mb=64)))
    assert len(one) == len(many) and all(same(a, b) for a, b in zip(one, many, strict=True))


def test_val_is_a_split_of_its_own(root):
    keys = [key for batch in build_loader(manifest(root), split="val") for key in batch.keys]
    assert len(keys) == 4


def test_a_state_of_other_settings_is_refused_by_name(root):
    state = build_loader(manifest(root)).state_dict()
    other = build_loader(manifest(root, batching__global_batch=5, frames__max=16))
    with pytest.raises(StateError, match=r"batching.global_batch \(saved: 6, now: 5\), tokens"):
        other.load_state_dict(state)
    build_loader(manifest(root, loader__threads=7, output="elsewhere")).load_state_dict(state)


def test_ranks_have_to_divide_the_rows(root):
    with pytest.raises(ManifestError, match="row_multiple: 4 is not a multiple of 3 ranks"):
        build_loader(manifest(root), 0, 3)
    with pytest.raises(ValueError, match="rank 2"):
        build_loader(manifest(root), 2, 2)


def test_nothing_to_train_on_is_one_clear_line(tmp_path):
    with pytest.raises(ShardsError, match="build them with"):
        build_loader(manifest(tmp_path))
    made = Root(tmp_path)
    made.dialogue(turns("Hello", "word " * 300))
    folder = made.write()
    with pytest.raises(ShardsError, match="1 are excluded, the first because .* text.max_tokens"):
        build_loader(manifest(folder, text__max_tokens=64, text__over_length="refuse"))
    loader = build_loader(manifest(folder, text__max_tokens=64))
    assert [row.tokens for row in loader if row.keys] == [64]
    ((key, reason),) = loader.truncated()
    assert key == made.dialogues[0]["key"] and reason.endswith(
        "tokens are more than text.max_tokens (64), and are cut to it"
    )
    assert loader.report().num_truncated == 1 and not list(loader.excluded())


def test_left_out_dialogues_are_named(tmp_path):
    made = Root(tmp_path)
    made.dialogue(turns("Hello", "word " * 300))
    made.dialogue(turns("Hello", "Hi"))
    made.dialogue(turns("<image> <image>", "Hi"), [made.still(30, 30)])
    loader = build_loader(manifest(made.write(), text__max_tokens=128, text__over_length="refuse"))
    left = dict(loader.excluded())
    assert "max_tokens" in left[made.dialogues[0]["key"]]
    assert "2 <image> marks" in left[made.dialogues[2]["key"]]
    assert len(left) == loader.report().num_excluded == 2
    assert [key for batch in loader for key in batch.keys] == [made.dialogues[1]["key"]]


# Faults ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["video", "image"])
def test_unreadable_media_cost_their_dialogue_alone(tmp_path, kind):
    made = Root(tmp_path)
    video, other = made.video(8, 8), made.video(9, 9)
    wide, square = made.still(150, 60), made.still(60, 60)
    for media in ([video], [other], [wide], [square], []):
        made.dialogue(turns("<image>\nWhat?" if media else "What?", "This."), media)
    over = {"batching": {"global_batch": 5, "row_multiple": 1}}
    folder = made.write()
    good = list(build_loader(manifest(folder, **over)))[0]
    bad = {"video": 0, "image": 2}[kind]
    spoil(folder, made.media[made.dialogues[bad]["media"][0]])
    row = list(build_loader(manifest(folder, **over)))[0]
    key = made.dialogues[bad]["key"]
    assert [k for k, _ in row.skipped] == [key]
    assert "000000.tar" in row.skipped[0][1] and made.media[made.dialogues[bad]["media"][0]]["key"] in row.skipped[0][1]
    assert row.keys == [k for k in good.keys if k != key]
    assert (row.total_weight, row.is_last, row.num_micro_steps) == (5.0, True, 1)
    # what is left equals the row of the others alone, pixels and visual index included
    want = slow_row(manifest(folder), row.keys)
    assert row.input_ids.tolist() == want["ids"] and row.cu_seqlens.tolist() == want["edges"]
    units = [("clip", i) for i in range(len(row.clips))] + [("image", i) for i in range(len(row.image_tiles))]
    assert [(*units[i // 64], i % 64) for i in row.visual_index.tolist()] == want["visual"]
    frames = row.clips.flatten(0, 1).numpy()
    assert all(np.abs(f.reshape(-1, 3) - np.array(c)).max() <= 3 for f, c in zip(frames, want["clips"], strict=True))
    assert np.abs(row.image_tiles.numpy().astype(int) - np.array(want["images"])).max() <= 2
    assert float(row.token_weight.sum()) == pytest.approx(4.0)


def test_a_row_that_loses_everything_is_an_empty_row(tmp_path):
    made = Root(tmp_path)
    made.dialogue(turns("<image>\nWhat?", "This."), [made.video(8, 8)])
    folder = made.write()
    loader = build_loader(manifest(folder))
    Index.open(folder / "stage2").shard_path(0).unlink()
    rows = list(loader)
    assert [row.input_ids.tolist() for row in rows] == [[0]] * 4
    assert sum(len(row.skipped) for row in rows) == 1 and rows[0].total_weight == 1.0
    assert rows[0].clips.shape == (0, 4, SIZE, SIZE, 3) and "No such file" in rows[0].skipped[0][1]


def test_shards_that_are_not_all_there_are_refused(tmp_path):
    made = Root(tmp_path)
    made.dialogue(turns("<image>\nWhat?", "This."), [made.video(8, 8)])
    folder = made.write()
    path = Index.open(folder / "stage2").shard_path(0)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(ShardsError, match=rf"{path.name}: has [\d,]+ of [\d,]+ bytes"):
        build_loader(manifest(folder))
    path.unlink()
    with pytest.raises(ShardsError, match=f"{path.name}: is missing"):
        build_loader(manifest(folder))
    path.write_bytes(whole)
    assert build_loader(manifest(folder)).num_batches == 1


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(root):
    with pytest.raises(ManifestError, match=r"vocab_size: 100 is fewer than the \d+ ids of"):
        build_loader(manifest(root, model__language_model__vocab_size=100))


def test_too_many_unreadable_dialogues_stop_and_name_files(tmp_path):
    made = Root(tmp_path)
    for _ in range(5):
        made.dialogue(turns("<image>\nWhat?", "This."), [made.video(8, 8)])
    folder = made.write()
    for item in made.media[:3]:
        spoil(folder, item)
    with pytest.raises(UnreadableError, match=r"3 dialogues .* loader.max_unreadable \(2\).*train-00000\d.tar: v"):
        list(build_loader(manifest(folder)))
    assert sum(len(row.skipped) for row in build_loader(manifest(folder, loader__max_unreadable=3))) == 3


def decoding_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


def test_an_error_of_a_thread_reaches_the_consumer(root, monkeypatch):
    def fail(*_):
        raise RuntimeError("a fault of the program")

    monkeypatch.setattr(MediaViews, "read_frames", fail)
    with pytest.raises(RuntimeError, match="a fault of the program"):
        list(build_loader(manifest(root)))
    assert not decoding_threads()


def test_threads_end_with_the_iterator(root):
    stream = iter(build_loader(manifest(root)))
    next(stream)
    assert decoding_threads()
    stream.close()
    assert not decoding_threads()
    stream = iter(build_loader(manifest(root)))
    next(stream)
    assert decoding_threads()
    del stream
    gc.collect()
    assert not decoding_threads()


def test_rows_ahead_are_bounded(root, monkeypatch):
    started: list[int] = []
    begin = PendingRow.start

    def start(row: PendingRow, *rest, **needed) -> bool:
        size = max(MIN_BUFFER_BYTES, row.num_images * SIZE * SIZE * 3)  # a row of text alone counts too
        return begin(row, *rest, **needed) and not started.append(size)

    monkeypatch.setattr(PendingRow, "start", start)
    for bound in (1, 3):
        started.clear()
        used = 0
        for _ in build_loader(manifest(root, loader__prefetch_mb=bound, batching__row_multiple=1)):
            assert sum(started[used:]) <= bound << 20 or len(started) - used == 1
            used += 1
        assert used == len(started) > 4


def test_state_counts_what_was_returned_not_what_was_read(root, monkeypatch):
    """Wherever a run stops, and whatever was decoded by then, it resumes after the last complete global batch."""
    ahead: list[int] = []
    begin = PendingRow.start
    monkeypatch.setattr(
        PendingRow, "start", lambda row, *rest, **needed: begin(row, *rest, **needed) and not ahead.append(1)
    )
    first = build_loader(manifest(root, loader__prefetch_mb=64))
    whole = list(first)
    for stop in range(1, len(whole) + 1):
        ahead.clear()
        loader = Loader(first._plan, 0, 1)
        stream = iter(loader)
        for _ in range(stop):
            batch = next(stream)
        assert len(ahead) == len(whole)  # all were started with the first
        state = loader.state_dict()
        ended = batch.is_last and batch.step + 1 == loader.num_batches
        assert (state["epoch"], state["step"]) == ((1, 0) if ended else (0, batch.step + batch.is_last))
        stream.close()
        if not ended:
            again = Loader(first._plan, 0, 1)
            again.load_state_dict(state)
            rest = [row for row in whole if row.step >= batch.step + batch.is_last]
            for a, b in zip(again, rest, strict=True):
                assert a.keys == b.keys and torch.equal(a.input_ids, b.input_ids) and torch.equal(a.clips, b.clips)


def test_a_consumer_may_keep_every_batch(root, monkeypatch):
    """Also more of them than buffers may be in use."""
    monkeypatch.setattr(reading, "MAX_BUFFERS_IN_USE", 3)
    batches = list(build_loader(manifest(root, loader__prefetch_mb=1)))
    read = [row.clips.clone() for row in build_loader(manifest(root, loader__prefetch_mb=1))]
    assert all(torch.equal(a.clips, b) for a, b in zip(batches, read, strict=True))


def test_abandoned_and_parallel_passes_share_no_budget(root):
    loader = build_loader(manifest(root, loader__prefetch_mb=2))
    gc.disable()
    try:
        others = [iter(loader) for _ in range(3)]
        for stream in others:
            next(stream)
        others.pop().close()
        assert len(list(loader)) == len(list(loader)) > 8  # two whole epochs
        for stream in others:
            stream.close()
        assert loader._pool.in_use == 0
    finally:
        gc.enable()


def test_a_batch_that_is_let_go_gives_its_memory_to_later_ones(root, monkeypatch):
    made, make = [], BufferPool._allocate
    monkeypatch.setattr(BufferPool, "_allocate", lambda pool, size: made.append(size) or make(pool, size))
    over = {"batching": {"global_batch": 1, "row_multiple": 1}, "loader__prefetch_mb": 3}
    assert sum(1 for _ in build_loader(manifest(root, **over))) == 21
    assert made == [MIN_BUFFER_BYTES] * len(made) and len(made) <= 3 + 2  # ahead, the consumer's, and the one before it


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_length_is_the_number_of_rows_of_a_pass(root, ranks):
    made, lengths = manifest(root, loader__prefetch_mb=64, batching__global_batch=5, text__max_tokens=400), []
    for rank in range(ranks):
        loader, found = build_loader(made, rank, ranks), []
        for epoch in range(2):
            expected = len(loader)
            rows = [(row, len(loader)) for row in loader]
            assert [length for _, length in rows] == [expected] * len(rows) and len(rows) == expected
            assert {row.epoch for row, _ in rows} == {epoch}
            found.append(expected)
        lengths.append(found)
    assert all(found == lengths[0] for found in lengths)
    assert loader.num_batches == len({row.step for row, _ in rows}) < sum(lengths[0])


def test_the_length_of_a_resumed_or_left_pass_is_what_remains(root):
    made = manifest(root, loader__prefetch_mb=64, batching__global_batch=5)
    loader = build_loader(made)
    rows = iter(loader)
    while not next(rows).is_last:
        pass
    rows.close()
    state = loader.state_dict()
    assert (state["epoch"], state["step"]) == (0, 1)
    left = len(loader)
    again = Loader(loader._plan, 0, 1)
    again.load_state_dict(state)
    assert len(again) == left == sum(1 for _ in again) == sum(1 for _ in loader)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"step": 99}, "step 99: not a position"),
        ({"step": -1}, "step -1: not a position"),
        ({"epoch": None}, "epoch None"),
        ({"epoch": 1.5}, "epoch 1.5"),
        ({"fingerprint": None}, "not the state of a loader"),
        ({"fingerprint": {}}, "different data or settings"),
    ],
)
def test_a_state_that_is_no_position_is_refused(root, change, words):
    loader = build_loader(manifest(root))
    with pytest.raises(StateError, match=words):
        loader.load_state_dict(loader.state_dict() | change)
