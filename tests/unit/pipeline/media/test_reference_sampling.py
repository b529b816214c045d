"""``compat: published``: the golden rows of the readers, stepping through files with PyAV, and builds that are read."""

from __future__ import annotations

import json
import re
import tarfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from framestream.pipeline.config.manifest import Manifest, ManifestError
from framestream.pipeline.config.preprocessing import FramesConfig
from framestream.pipeline.evaluation.questions import Questions
from framestream.pipeline.loading.loader import StateError, build_loader
from framestream.pipeline.media.decode import MediaError, VideoRequest, decode_video
from framestream.pipeline.media.reference_sampling import (
    FrameSelection,
    SamplingRequest,
    eval_clip,
    file_number,
    folder_frames,
    full_video,
    gif_frames,
    spread_evenly,
    train_clip,
)
from framestream.pipeline.media.sampling import time_message
from framestream.pipeline.media.video import FrameTimes, open_sequential, open_video
from framestream.pipeline.shards.index import Index, ShardsError
from framestream.pipeline.shards.ledger import read_ledger
from framestream.pipeline.shards.media_view import MediaViews
from framestream.pipeline.tokenization.chat_template import load_tokenizer
from framestream.pipeline.tokenization.special_ids import IMAGE_TOKEN_INDEX
from framestream.tools.builder.build import BuildOptions, build
from framestream.tools.builder.executors import local
from tests.helpers.corpora.small_root import manifest, turns
from tests.helpers.golden_data import json_lines
from tests.helpers.media.footage import BIKES, all_frames, number_of, write_video

# Golden rows ----------------------------------------------------------------------------------------------------------


def rows(name: str) -> list:
    """The rows of a golden file in one case, or no case where the file is absent."""
    found = json_lines(f"frame_indices/{name}.jsonl")
    return [pytest.param(found, id=name)] if found else []


def wanted(row: dict) -> SamplingRequest:
    return SamplingRequest(row["sample"], row["min"], row["max"], row["local"])


def compare(row: dict, choice: FrameSelection) -> None:
    """A choice against all that a row says of it."""
    nominal = row.get("indices", row.get("nominal_indices"))
    duration = row["duration"] if "duration" in row else row["end"] - row["start"]
    assert choice.indices.dtype == choice.nominal.dtype == np.int64
    assert choice.nominal.tolist() == nominal, row
    assert (choice.fps, choice.duration) == (row["fps"], duration), row
    if row.get("frames_read") is not None:
        assert choice.indices.tolist() == row["frames_read"], row
    elif row["reader"] in ("decord", "img"):
        assert choice.indices.tolist() == nominal, row
    assert len(choice.indices) == row.get("n_frames", len(choice.indices)), row
    assert len(choice.nominal) == row.get("asked", len(choice.nominal)), row
    for style in ("short", "long", "none"):
        if f"msg_{style}" in row:
            assert time_message(style, choice.duration, choice.nominal, choice.fps) == row[f"msg_{style}"], row
    if any(name.startswith("msg_") for name in row) and row["sample"] == "dynamic_fps1" and len(choice.indices):
        try:
            choice.check_clips(row["local"])
            assert "msg_short_error" not in row and "msg_long_error" not in row, row
        except ValueError:
            assert "msg_short_error" in row and "msg_long_error" in row, row
    else:
        assert "msg_short_error" not in row, row


def check(found: list[dict], rule) -> None:
    """Every row: what the reader gives, or that it fails."""
    for row in found:
        if "indices" in row or "nominal_indices" in row:
            compare(row, rule(row))
        else:
            assert "error" in row or "msg_short_error" in row, row
            with pytest.raises(ValueError):
                rule(row)


@pytest.mark.parametrize("found", rows("decord"))
def test_golden_decord(found):
    def rule(row: dict) -> FrameSelection:
        if row["clip"] is None:
            return full_video(wanted(row), row["vlen"], row["avg_fps"])
        return eval_clip(wanted(row), row["vlen"], row["avg_fps"], row["clip"])

    check(found, rule)


@pytest.mark.parametrize("found", rows("folder"))
def test_golden_folder(found):
    check(
        found, lambda row: folder_frames(wanted(row), row["files"], 3.0 if row["kind"] == "tvqa" else 1.0, row["clip"])
    )


@pytest.mark.parametrize("found", rows("gif"))
def test_golden_gif(found):
    """The row of a clip fails whatever the file and the sampler; it names neither."""
    any_row = {"sample": "middle", "min": 4, "max": 8, "local": 4, "frames_in_file": 40}
    check(found, lambda row: gif_frames(wanted({**any_row, **row}), {**any_row, **row}["frames_in_file"], row["clip"]))


@pytest.mark.slow
@pytest.mark.parametrize("found", rows("lazy"))
def test_golden_lazy(found):
    """All rows but one, which says that the reader fails without its storage client: this one needs no client."""
    for row in found:
        if "fn" in row:
            assert spread_evenly(row["num_frames"], row["num_segments"]).tolist() == row["out"], row
        elif "note" in row:
            assert "client" in row["note"] and row["reader"] == "lazy" and "error" in row, "a row of another kind"
            local = decode_video(BIKES, VideoRequest("decord", EIGHT, 4.0, 9.5, compat="published", split="train"))
            assert local.sample.tolist() == list(range(8))
        else:
            check([row], lambda row: train_clip(wanted(row), clock(row), (row["start"], row["end"])))


def clock(row: dict) -> FrameTimes:
    """Times of a file of constant frame rate."""
    rate, base = Fraction(*row["rate"]), Fraction(*row["time_base"])
    ticks = [round(number / rate / base) for number in range(row["frames_in_file"])]
    return FrameTimes(np.array(ticks), base, rate)


# Files ----------------------------------------------------------------------------------------------------------------

EIGHT = FramesConfig(sampler="middle", min=8, max=8, size=64)


def stepped(path: Path, nominal: list[int], start: float) -> list[int]:
    """Presentation times of the frames that a reader gets by seeking to ``start`` and stepping to whole seconds."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        base, rate = stream.time_base, stream.average_rate
        begin, targets, got = int(start / base), [int(n / rate) / base for n in nominal], []
        container.seek(begin, stream=stream)
        for frame in container.decode(stream):
            if frame.pts >= begin and len(got) < len(targets) and frame.pts >= targets[len(got)]:
                got.append(frame.pts)
    return got


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """60 s of numbered frames at uneven times."""
    seconds = np.cumsum(np.random.default_rng(0).choice([0.1, 0.3, 0.5], 200))
    return write_video(tmp_path_factory.mktemp("uneven") / "v.mp4", 200, options={"g": "20"}, seconds=seconds, fps=4)


@pytest.mark.parametrize("clip", [(0.0, 9.0), (2.5, 9.9), (5.0, 8.0), (0.04, 4.6), (7.7, 9.9)])
@pytest.mark.parametrize("opened", [open_video, open_sequential])
def test_a_training_clip_is_what_stepping_through_the_file_gives(uneven, clip, opened):
    for path in (BIKES, uneven):
        source = opened(path)
        choice = train_clip(SamplingRequest("middle", 8, 8, 4), source.frame_times, clip)
        assert source.frame_times.ticks[choice.indices].tolist() == stepped(path, choice.nominal.tolist(), clip[0])


def test_frames_of_a_training_clip_are_decoded_in_order(uneven):
    decoded = decode_video(uneven, VideoRequest("av", EIGHT, 3.0, 40.0, compat="published"))
    choice = train_clip(SamplingRequest("middle", 8, 8, 4), open_video(uneven).frame_times, (3.0, 40.0))
    shown = [number_of(frame) for frame in decoded.frames[decoded.sample]]
    assert shown == choice.indices.tolist() == decoded.frame_index[decoded.sample].tolist()
    assert decoded.nominal.tolist() == choice.nominal.tolist() != shown
    assert (decoded.vlen, decoded.start, decoded.duration) == (200, 3.0, 37.0)


def test_one_bound_alone_is_no_clip():
    both, one = (
        decode_video(BIKES, VideoRequest("decord", EIGHT, *clip, compat="published"))
        for clip in ((None, None), (4.0, None))
    )
    assert one.frame_index.tolist() == both.frame_index.tolist() and (one.start, one.duration) == (0.0, 10.0)


@pytest.mark.parametrize(
    ("name", "number"), [("a_1_20.jpg", 20), ("x_003.png", 3), ("00001.jpg", -1), ("a_1x.jpg", -1), ("a_2.jpeg", 2)]
)
def test_folder_files_are_ordered_by_their_trailing_number(name, number):
    assert file_number(name) == number


@pytest.mark.parametrize(
    ("name", "clip", "reason"),
    [
        ("bikes.mp4", (50.0, 60.0), "bad_clip"),
        ("timeless.h264", (1.0, 3.0), "bad_clip"),
        ("five.gif", (0.0, 2.0), "bad_clip"),
        ("five.gif", (None, None), "too_few_frames"),
    ],
)
def test_what_fails_there_is_an_error_of_one_line(tmp_path, name, clip, reason):
    path, reader = BIKES, "decord"
    if name == "five.gif":
        path, reader = animation(tmp_path / name, 5), "gif"
    elif name == "timeless.h264":
        path = write_video(tmp_path / name, 100)
    with pytest.raises(MediaError, match="compat: published") as caught:
        decode_video(path, VideoRequest(reader, EIGHT, *clip, compat="published"))
    assert caught.value.reason == reason and "\n" not in str(caught.value)


# From the builder to the loader ---------------------------------------------------------------------------------------


def gray(number: int) -> tuple[int, int, int]:
    return (16 * number,) * 3


def animation(path: Path, count: int) -> Path:
    images = [Image.new("RGB", (64, 64), gray(number)) for number in range(count)]
    images[0].save(path, save_all=True, append_images=images[1:], duration=100)
    return path


TRAIN = {  # id -> media fields
    "clip": {"video": "bikes.mp4", "start": 4, "end": 9.5},
    "tvqa": {"video": "tvqa/s01", "video_read_type": "img", "start": 0, "end": 4},
    "gif": {"video": "four.gif", "video_read_type": "gif"},
    "short gif": {"video": "five.gif", "video_read_type": "gif"},
    "late": {"video": "bikes.mp4", "start": 50, "end": 60},
    "text": {},
}
#: Numbers of the frames shown, and the message, worked out by hand from the golden README.
EXPECTED = {
    "clip": (range(100, 108), "5.50 seconds, and 8 frames", "0.3, 0.9, 1.5, 2.1, 2.8, 3.4, 4.0, 4.6"),
    "tvqa": ((1, 3, 4, 6, 7, 9, 10, 12), "4.00 seconds, and 8 frames", "0.3, 1.0, 1.3, 2.0, 2.3, 3.0, 3.3, 4.0"),
    "gif": (range(4), "4.00 seconds, and 8 frames", "0.0, 1.0, 2.0, 3.0, 3.0, 3.0, 3.0, 3.0"),
}
HELD_OUT = [107, 122, 138, 153, 169, 185, 200, 216]  #: of seconds 4 to 9 outside of training: 125 frames from 100 on


def made(root: Path, **over) -> Manifest:
    entries = [
        {"annotation": str(root / f"{name}.json"), "root": str(root), "split": name} for name in ("train", "val")
    ]
    fields = {"data__entries": entries, "frames__time_message": "long", "compat": "published", "train__epochs": 2}
    return manifest(root, **{**fields, **over})


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    (folder / "bikes.mp4").write_bytes(BIKES.read_bytes())
    (folder / "tvqa" / "s01").mkdir(parents=True)
    for number in range(14):
        name = f"9_{number}.png" if number % 2 else f"10_{number}.png"
        Image.new("RGB", (64, 64), gray(number)).save(folder / "tvqa" / "s01" / name)
    animation(folder / "four.gif", 4)
    animation(folder / "five.gif", 5)

    def sample(id: str, media: dict) -> dict:
        mark = "<image>\n" if media else ""
        return {"id": id, **media, "conversations": turns(f"{mark}What about {id}?", "It is so.")}

    train = [sample(id, media) for id, media in TRAIN.items()]
    train.append({"id": "system", "conversations": [{"from": "system", "value": "Be brief."}, *turns("Hi", "Hi.")]})
    (folder / "train.json").write_text(json.dumps(train))
    (folder / "val.json").write_text(json.dumps([sample("held out", {"video": "bikes.mp4", "start": 4, "end": 9})]))
    build(made(folder), local(1), BuildOptions())
    return folder


def number_shown(frame: np.ndarray, bikes: list[np.ndarray]) -> int:
    """Which frame this is: of the footage the nearest one, of flat images the gray."""
    if frame.std() < 4:
        return round(float(frame.mean()) / 16)
    return int(np.argmin([np.abs(frame.astype(int) - other).mean() for other in bikes]))


def bikes() -> list[np.ndarray]:
    frames, _ = all_frames(BIKES)
    size = (64, 64)
    return [np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC)).astype(int) for frame in frames]


def dialogues(manifest: Manifest) -> dict[int, dict[str, tuple[str, np.ndarray]]]:
    """For each epoch, the text and the frames (n, S, S, 3) that the loader gives of every dialogue, by id."""
    tokenizer = load_tokenizer(manifest.text.tokenizer)
    ids = {row["key"]: row["id"] for row in Index.open(manifest.shard_root).dialogues.to_pylist()}
    loader, epochs = build_loader(manifest), {}
    for epoch in range(manifest.train.epochs):
        epochs[epoch] = {}
        for batch in loader:
            edges, clip = batch.cu_seqlens.tolist(), 0
            for key, start, end in zip(batch.keys, edges, edges[1:], strict=False):
                part = batch.input_ids[start:end]
                clips = int((part == IMAGE_TOKEN_INDEX).sum()) // 64
                frames = batch.clips[clip : clip + clips].numpy().reshape(-1, *batch.clips.shape[2:])
                epochs[epoch][ids[key]] = tokenizer.decode(part[part != IMAGE_TOKEN_INDEX]), frames
                clip += clips
    return epochs


@pytest.mark.slow
def test_the_loader_shows_what_the_published_readers_read(root):
    footage, epochs = bikes(), dialogues(made(root))
    for epoch, shown in epochs.items():
        assert shown.keys() == {*EXPECTED, "text"}
        for id, (numbers, head, seconds) in EXPECTED.items():
            text, frames = shown[id]
            assert [number_shown(frame, footage) for frame in frames] == list(numbers)
            message = f"\nThe video lasts for {head} are uniformly sampled at {seconds} seconds. "
            assert f"user\n{message * (epoch + 1)}\nWhat about {id}?" in text
        assert shown["text"][0].endswith("assistant\nIt is so.<|im_end|>\n")


def test_what_fails_there_is_in_the_ledger(root):
    ledger = read_ledger(root / "stage2").to_pylist()
    media = {row["source"].rpartition("/")[2]: row["reason"] for row in ledger if row["kind"] == "media"}
    assert media == {"five.gif": "too_few_frames", "bikes.mp4": "bad_clip"}
    assert {row["dialogue"] for row in ledger if row["kind"] == "dialogue"} >= {"short gif", "late"}


def test_a_first_system_turn_is_left_out_with_its_reason(root):
    ids = {row["key"]: row["id"] for row in Index.open(root / "stage2").dialogues.to_pylist()}
    left = [(ids[key], reason) for key, reason in build_loader(made(root)).excluded()]
    left += [
        (r["dialogue"], r["message"]) for r in read_ledger(root / "stage2").to_pylist() if r["reason"] == "bad_turn"
    ]
    assert [id for id, _ in left] == ["system"] and "human or gpt" in left[0][1]


def test_held_out_clips_are_read_as_outside_of_training(root):
    questions, footage = Questions(made(root)), bikes()
    batch = questions.prompt(0)
    frames = batch.clips.numpy().reshape(-1, 64, 64, 3)
    assert [number_shown(frame, footage) for frame in frames] == HELD_OUT
    tokenizer = load_tokenizer(made(root).text.tokenizer)
    text = tokenizer.decode(batch.input_ids[batch.input_ids != IMAGE_TOKEN_INDEX])
    assert len(re.findall("lasts for 5.00 seconds, and 8 frames are uniformly sampled at 4.3, ", text)) == 1


@pytest.mark.slow
def test_members_of_the_shards_have_the_fields_of_any_build(root, tmp_path):
    entries = [{"annotation": str(root / "train.json"), "root": str(root)}]
    build(made(tmp_path, compat="none", data__entries=entries), local(1), BuildOptions())
    fields, columns = [], []
    for place in (root, tmp_path):
        with tarfile.open(place / "stage2" / "video" / "train-000000.tar") as tar:
            fields.append(json.load(tar.extractfile(tar.getnames()[1])).keys())
        columns.append(Index.open(place / "stage2").media.column_names)
    assert fields[0] == fields[1]
    assert columns[0] == [*columns[1], "nominal"]
    record = json.loads((tmp_path / "stage2" / "build.json").read_text())
    assert "compat" not in record["specification"]  # so that roots of before the switch stay what they are
    with pytest.raises(ShardsError, match="compat: is published, the shards have none"):
        build_loader(made(tmp_path, data__entries=entries))


@pytest.mark.parametrize(
    ("over", "field"),
    [
        ({"compat": "none"}, "compat: is none, the shards have published"),
        ({"frames__max": 4, "frames__min": 4}, "frames.min: is 4"),
        ({"frames__max": 12}, "frames.max: is 12"),
        ({"frames__sampler": "rand"}, "frames.sampler: is rand"),
    ],
)
def test_the_shards_serve_no_other_settings(root, over, field):
    with pytest.raises(ShardsError, match=field):
        build_loader(made(root, **over))


def test_smaller_frames_and_other_messages_can_be_had(root):
    small = made(root, frames__size=32, model__vision_tower__patch=4, frames__time_message="short")
    text, frames = dialogues(small)[0]["gif"]
    assert frames.shape == (4, 32, 32, 3) and "4.00 seconds, and 8 frames are uniformly sampled from it. \n" in text


def test_every_epoch_has_the_dialogues_that_fit_in_the_last(root):
    first, last = (build_loader(made(root, train__epochs=epochs)) for epochs in (1, 2))
    lengths = {number: loader._plan.dataset.length for number, loader in ((1, first), (2, last))}
    assert (lengths[2] >= lengths[1]).all() and (lengths[2] > lengths[1]).sum() >= 3
    assert (last._plan.dataset.for_epoch(0).length == lengths[1]).all()
    train = np.array(last._plan.dataset.parts[0].index.dialogues["split"].to_pylist()) == "train"
    limit = int(lengths[2][train].max()) - 1
    assert limit >= int(lengths[1][train].max())  # all fit when their message is said once
    tight = {"text__max_tokens": limit, "text__over_length": "refuse"}
    one, two = (dialogues(made(root, **tight, train__epochs=epochs)) for epochs in (1, 2))
    assert one[0].keys() == {*EXPECTED, "text"}
    assert two[0].keys() == two[1].keys() < one[0].keys()


def test_epochs_are_part_of_the_state(root):
    state = build_loader(made(root)).state_dict()
    build_loader(made(root)).load_state_dict(json.loads(json.dumps(state)))
    with pytest.raises(StateError, match="tokens"):
        build_loader(made(root, train__epochs=3)).load_state_dict(state)
    with pytest.raises(ManifestError, match="train.epochs: is 2"):
        build_loader(made(root))._plan.dataset.for_epoch(2)


def test_visuals_take_the_stored_sample_whatever_the_seed(root):
    index = Index.open(root / "stage2")
    views = [MediaViews(index, made(root, seed=seed)).views([0])[0].frame_indices.tolist() for seed in (0, 1)]
    assert views[0] == views[1] == index.media["sample"][0].as_py()
