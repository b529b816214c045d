"""Which files of a folder are frames, and in which order."""

from __future__ import annotations

import random
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from framestream.pipeline.media.errors import MediaError
from framestream.pipeline.media.frame_sequences import open_folder, sort_frames
from framestream.pipeline.media.reference_sampling import file_number

DAY = datetime(2023, 12, 31, 23, 59, 57)
SECONDS = [0.25, 0.5, 0.75, 1.0, 1.5, 2.25, 9.5, 10.0, 10.25, 100.125]
#: names in their right order
ORDERS = {
    "counted without zeros": [f"{n}.jpg" for n in range(1, 120)],
    "wider than its zeros": [f"frame_{n:02d}.jpg" for n in range(1, 120)],
    "some with zeros": ["frame1.jpg", "frame02.jpg", "frame3.jpg", "frame010.jpg", "frame11.jpg"],
    "seconds of Python": [f"frame_{second}s.jpg" for second in SECONDS],
    "seconds with digits": [f"{second:.3f}.jpg" for second in SECONDS],
    "seconds as time of day": [f"{s // 3600:02d}-{s // 60 % 60:02d}-{s % 60:02d}.png" for s in range(3000, 4000, 7)],
    "minutes and seconds": [f"t{s // 60}m{s % 60}s.jpg" for s in range(0, 300, 9)],
    "dates": [f"cam {(DAY + timedelta(seconds=s)):%Y.%m.%d %H.%M.%S}.jpg" for s in range(10)],
    "nanoseconds": [f"{n}.png" for n in range(999_999_999_000_000_000, 1_000_000_000_000_000_009, 500_000_001)],
    "a score behind": [f"frame_{n:03d}_score_{(n * 37) % 100 / 100}.jpg" for n in range(50)],
    "a total behind": [f"{n} of 100.jpg" for n in range(1, 101)],
    "a number in front": [f"clip2_{n}.jpg" for n in range(20)],
    "frames of a shot": [f"shot_01.{n}.png" for n in range(9_990, 10_011)],
    "frames of a version": [f"v1.{n}.jpg" for n in range(1, 13)],
    "frames of a file": [f"a.mp4.{n:04d}.jpg" for n in range(9_990, 10_011)],
    "chapters": [f"{chapter}.{n}.jpg" for chapter in (1, 2, 10) for n in range(1, 13)],
    "no numbers": ["a.jpg", "b.jpg", "c.png"],
    "other names": ["a_1.jpg", "b_1.jpg", "IMG (2).jpg", "a_03.jpg"],
}


@pytest.mark.parametrize("kind", ORDERS)
def test_frames_are_in_the_order_of_their_numbers(kind):
    names = ORDERS[kind].copy()
    random.Random(1).shuffle(names)
    assert sort_frames(names) == ORDERS[kind]


def test_images_without_a_number_are_no_frames():
    assert sort_frames(["poster.jpg", "2.jpg", "cover.png", "1.jpg"]) == ["1.jpg", "2.jpg"]


@pytest.mark.parametrize("order", [None, file_number])
def test_foreign_files_are_no_frames(tmp_path: Path, order):
    for number in range(4):
        Image.new("RGB", (8, 8), (60 * number, 0, 0)).save(tmp_path / f"a_{number}.png")
    for name in ("._a_0.png", ".a_4.png", "Thumbs.db", "desktop.ini", "a_5.txt", ".DS_Store", "a_6.mp4"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7 not a frame")
    for folder in ("@eaDir", "__MACOSX", "a_7.png"):
        (tmp_path / folder).mkdir()
    source = open_folder(tmp_path, order=order)
    frames = source.decode_frames(np.arange(len(source.seconds)))
    assert [int(frame[0, 0, 0]) for frame in frames] == [0, 60, 120, 180]


def test_a_frame_that_is_not_there_is_not_left_out(tmp_path: Path):
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    (tmp_path / "2.png").symlink_to(tmp_path / "absent.png")
    source = open_folder(tmp_path)
    with pytest.raises(MediaError, match="2.png: cannot be opened"):
        list(source.decode_frames(np.arange(len(source.seconds))))


def test_a_folder_of_foreign_files_is_empty(tmp_path: Path):
    (tmp_path / "._1.jpg").write_bytes(b"\0\5\x16\7")
    (tmp_path / "2.jpg").mkdir()
    with pytest.raises(MediaError, match="has no jpg, jpeg or png files") as caught:
        open_folder(tmp_path)
    assert caught.value.reason == "empty_file"
