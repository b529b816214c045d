"""Dialogues as chat messages, and frame times as video metadata."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.video_utils import VideoMetadata

from framestream.pipeline.adapters import ChatCollator, ShardDataset, chats
from framestream.pipeline.adapters.hf_processor import video_metadata
from framestream.pipeline.adapters.types import Dialogue, Media, Sample
from tests.helpers.corpora.small_root import turns

pytestmark = pytest.mark.slow


def video(seconds: list[float], start: float = 0.0, duration: float = 10.0) -> Media:
    frames = torch.zeros(len(seconds), 32, 48, 3, dtype=torch.uint8)
    return Media(frames, torch.tensor(seconds, dtype=torch.float64), "v", "video", start, duration, "s")


def image(level: int = 0) -> Media:
    frames = torch.full((1, 20, 30, 3), level, dtype=torch.uint8)
    return Media(frames, torch.zeros(1, dtype=torch.float64), "i", "image", 0.0, 0.0, "s")


def messages(media: list[Media], *texts: str, first: list[dict] = (), **settings: str) -> list[tuple[str, list[str]]]:
    """Role and parts of each message; a part is a text, or <kind> of a media item."""
    (chat,) = chats(Sample(media, [Dialogue([*first, *turns(*texts)], "d", "0", "a")]), **settings)
    return [
        (message["role"], [part.get("text", f"<{part['type']}>") for part in message["content"]])
        for message in chat["messages"]
    ]


SYSTEM, HELLO = {"from": "system", "value": "Be brief."}, {"from": "gpt", "value": "Yes?"}
SAID = "The video lasts for 10.00 seconds, and 2 frames are uniformly sampled"
V, S = "<video>", "<image>"
U, A = "user", "assistant"


@pytest.mark.parametrize(
    ("media", "texts", "settings", "wanted"),
    [
        ([], ["Hi", "Ho"], {}, [(U, ["Hi"]), (A, ["Ho"])]),
        ([video([1, 2])], [f"{S}\nHi", "Ho"], {}, [(U, [V, "Hi"]), (A, ["Ho"])]),
        ([video([1, 2])], [f"Hi\n{S}", "Ho"], {}, [(U, [V, "Hi"]), (A, ["Ho"])]),
        ([image()], [S], {}, [(U, [S])]),
        ([image(), image()], [f"A {S} or {S}?", "B"], {}, [(U, ["A ", S, " or ", S, "?"]), (A, ["B"])]),
        ([image()], ["Hi", "Ho", f"{S}\nHe", "B"], {}, [(U, ["Hi"]), (A, ["Ho"]), (U, [S, "He"]), (A, ["B"])]),
        ([image()], [f"{S}\nHi"], {"first": [SYSTEM]}, [("system", ["Be brief."]), (U, [S, "Hi"])]),
        ([], ["Hi"], {"first": [HELLO]}, [(U, ["Hi"])]),
        ([], ["Hi"], {"first": [SYSTEM, HELLO]}, [("system", ["Be brief."]), (U, ["Hi"])]),
        ([video([1, 2])], [f"{S}\nHi"], {"time_message": "short"}, [(U, [V, f"{SAID} from it. \nHi"])]),
        (
            [video([4.25, 6], 3.0)],
            [f"{S}\nHi"],
            {"time_message": "long"},
            [(U, [V, f"{SAID} at 1.2, 3.0 seconds. \nHi"])],
        ),
        ([image()], [f"{S}\nHi"], {"time_message": "long"}, [(U, [S, "Hi"])]),
    ],
)
def test_marks_become_media_where_they_stand(media, texts, settings, wanted):
    assert messages(media, *texts, **settings) == wanted


@pytest.mark.parametrize(("marks", "media"), [(1, 2), (2, 1), (3, 2), (1, 0)])
def test_marks_that_do_not_fit_the_media_are_refused(marks, media):
    with pytest.raises(ValueError, match=rf"^d: (more|fewer) <image> marks than media \({media}\)"):
        messages([image()] * media, "<image>" * marks + "Hi", "Ho")


def test_media_are_listed_in_order_of_use():
    sample = Sample([video([1]), image(9), video([2]), image(200)], [Dialogue(turns("<image>" * 4), "d", "0", "a")])
    (chat,) = chats(sample)
    assert [item["frames_indices"] for item in chat["video_metadata"]] == [[1000], [2000]]
    assert [pixels.getpixel((0, 0)) for pixels in chat["images"]] == [(9, 9, 9), (200, 200, 200)]
    assert [part["type"] for part in chat["messages"][0]["content"]] == ["video", "image", "video", "image"]


@given(
    seconds=st.lists(st.floats(0, 36_000), min_size=1, max_size=64).map(sorted),
    start=st.floats(0, 1000),
    rest=st.floats(0.01, 100),
)
def test_transformers_reads_the_true_seconds(seconds, start, rest):
    duration = seconds[-1] + rest
    item = video([start + second for second in seconds], start, duration)
    read = VideoMetadata(**video_metadata(item))
    assert np.abs(np.array(read.timestamps) - seconds).max() <= 0.00051
    assert (read.height, read.width, read.duration) == (32, 48, duration)
    assert read.sampled_fps == pytest.approx(len(seconds) / duration, rel=0.06)
    assert all(type(index) is int for index in read.frames_indices)


def test_every_dialogue_of_a_medium_is_a_row(footage_root):
    sample = ShardDataset(footage_root, by="media", frames=4)[0]
    rows = chats(sample)
    assert len(rows) == 2 and rows[0]["videos"][0].shape == (4, 112, 112, 3)
    assert [row["messages"][0]["content"][1]["text"] for row in rows] == ["What is seen?", "Who rides?"]


def joined(*dialogues: list[dict], **settings: str) -> list[list[tuple[str, str]]]:
    """Role and text of each message of each chat of one video with these dialogues."""
    item = video([1, 2])
    sample = Sample([item], [Dialogue(list(some), str(n), "0", "a") for n, some in enumerate(dialogues)])
    made = chats(sample, joined=True, **settings)
    assert all(len(chat["videos"]) == 1 for chat in made)
    return [
        [(m["role"], "".join(p.get("text", f"<{p['type']}>") for p in m["content"])) for m in chat["messages"]]
        for chat in made
    ]


@pytest.mark.parametrize(
    ("dialogues", "wanted"),
    [
        (
            [turns(f"{S}\nHi", "Ho"), turns("Well", "So", f"And {S}?", "He"), turns(S, "Hu")],
            [[(U, "<video>Hi"), (A, "Ho"), (U, "Well"), (A, "So"), (U, "And ?"), (A, "He"), (U, ""), (A, "Hu")]],
        ),
        (
            [turns(f"{S}\nHi"), turns(f"{S}\nHe", "Ho"), turns(f"{S}\nHa", "Hu")],
            [[(U, "<video>Hi")], [(U, "<video>He"), (A, "Ho"), (U, "Ha"), (A, "Hu")]],
        ),
        (
            [turns(S, "A"), [SYSTEM, *turns(S, "B")], turns(S, "C"), [SYSTEM, *turns(S, "D")]],
            [
                [(U, "<video>"), (A, "A"), (U, ""), (A, "C")],
                [("system", "Be brief."), (U, "<video>"), (A, "B"), (U, ""), (A, "D")],
            ],
        ),
    ],
)
def test_dialogues_about_one_item_are_joined_in_their_order(dialogues, wanted):
    assert joined(*dialogues) == wanted


def test_joined_dialogues_say_the_times_once():
    (messages,) = joined(turns(f"{S}\nHi", "Ho"), turns(f"{S}\nHe", "Hu"), time_message="short")
    assert [SAID in text for _, text in messages] == [True, False, False, False]
    assert messages[2] == (U, "He")


def test_every_message_has_a_part():
    (chat,) = chats(Sample([], [Dialogue(turns("", "Ho"), "d", "0", "a")]))
    assert chat["messages"][0]["content"] == [{"type": "text", "text": ""}]


def test_samples_without_dialogues_make_no_batch():
    with pytest.raises(ValueError, match="no dialogue among these samples"):
        ChatCollator(None)([Sample([image()], [])])
