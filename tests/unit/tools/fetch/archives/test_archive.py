"""Archives as a source: every packer's files have the right bytes, and damage loses no more files than it must."""

from __future__ import annotations

import gzip
import io
import multiprocessing
import shutil
import subprocess
import tarfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from framestream.pipeline.media.frame_sequences import open_folder
from framestream.tools.fetch.archives import archive as archives_module
from framestream.tools.fetch.archives.archive import ArchiveSource, open_archives
from framestream.tools.fetch.archives.list_cache import process_path
from framestream.tools.fetch.archives.zip import list_zip
from framestream.tools.fetch.base import FetchError
from tests.helpers.media.memory_files import (
    KINDS,
    LIMIT,
    Memory,
    content,
    failure,
    folder,
    opened,
    pack,
    pack_tar,
    pack_zip,
    refused,
    tar_info,
)

FILES = {f"clips/{n % 3}/{n:03d}.mp4": np.random.default_rng(n).bytes(n * 97) for n in range(60)} | {"top.txt": b"top"}


# Whole archives -------------------------------------------------------------------------------------------------------

names = st.text(st.characters(codec="utf-8", exclude_characters="/\0\\"), min_size=1, max_size=8).filter(
    lambda text: text not in (".", "..")
)
trees = st.dictionaries(
    st.lists(names, min_size=1, max_size=3).map("/".join), st.binary(max_size=3000), min_size=1, max_size=12
).filter(lambda files: not any(f"{a}/" == b[: len(a) + 1] for a in files for b in files))


@settings(max_examples=80)
@given(trees, st.sampled_from(KINDS), st.lists(st.integers(0, 40_000), max_size=4), st.booleans())
def test_every_member_of_every_kind_in_parts_of_any_size(tmp_path_factory, files, kind, cuts, keep):
    tmp_path = tmp_path_factory.mktemp("archive")
    data = pack(files, kind)
    cuts = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    parts = [data[start:end] for start, end in zip(cuts, cuts[1:], strict=False)]
    source = opened(*parts, join=True, work=tmp_path if keep else None)
    assert source.notes == []
    for path, expected in files.items():
        assert source.find(path) == len(expected)
        assert content(source, path, tmp_path) == expected
        assert source.find(f"{path}.no") is None
    for parent in {path.rpartition("/")[0] for path in files if "/" in path}:
        inside = [data for path, data in files.items() if path.rpartition("/")[0] == parent]
        assert source.find(parent, tree=True) == sum(map(len, inside))
        assert sorted(folder(source, parent, tmp_path).values()) == sorted(inside)


PROGRAMS = {
    "zip": ["zip", "-q", "-r", "a.zip", "clips", "top.txt"],
    "zip -0": ["zip", "-q", "-0", "-r", "a.zip", "clips", "top.txt"],
    "zip -fz": ["zip", "-q", "-fz", "-r", "a.zip", "clips", "top.txt"],
    "zip streamed": ["zip", "-q", "-r", "-fd", "a.zip", "clips", "top.txt"],
    "7z": ["7z", "a", "a.zip", "clips", "top.txt"],
    "tar": ["tar", "-cf", "a.tar", "./clips", "top.txt"],
    "tar gnu": ["tar", "--format=gnu", "-cf", "a.tar", "clips", "top.txt"],
    "tar v7": ["tar", "--format=v7", "-cf", "a.tar", "clips", "top.txt"],
    "tar pax": ["tar", "--format=posix", "-cf", "a.tar", "clips", "top.txt"],
    "tar.gz": ["tar", "-czf", "a.tgz", "clips", "top.txt"],
    "bsdtar": ["bsdtar", "-cf", "a.tar", "clips", "top.txt"],
}


@pytest.mark.parametrize("program", [name for name, line in PROGRAMS.items() if shutil.which(line[0])])
def test_archives_that_other_programs_make(tmp_path, program):
    for path, data in FILES.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(data)
    subprocess.run(PROGRAMS[program], cwd=tmp_path, check=True, capture_output=True)
    source = opened(next(tmp_path.glob("a.*")).read_bytes())
    assert source.notes == []
    assert {path: content(source, path, tmp_path) for path in FILES} == FILES
    assert source.find("clips") is None and source.find("clips/0", tree=True) == sum(
        len(data) for path, data in FILES.items() if path.startswith("clips/0/")
    )


def test_the_first_of_many_archives_counts_and_the_last_of_one(tmp_path):
    first = pack({"a": b"first a", "b": b"first b"}, "ustar")
    second = pack({"a": b"second a", "c": b"second c"}, "deflate")
    double = pack_tar([(tar_info(name), data) for name, data in (("d", b"old"), ("e", b"e"), ("d", b"new"))])
    for work in (None, tmp_path):
        source = opened(first, second, gzip.compress(double), work=work)
        found = {path: content(source, path, tmp_path) for path in "abcde"}
        assert found == {"a": b"first a", "b": b"first b", "c": b"second c", "d": b"new", "e": b"e"}
    with pytest.warns(UserWarning, match="Duplicate name"):
        twice = pack_zip([("d", b"old"), ("d", b"new")])
    assert content(opened(twice), "d", tmp_path) == b"new"


def test_paths_begin_inside_a_folder_of_the_archives(tmp_path):
    for inside in ("clips/1", "/clips/1/", "./clips/./1"):
        source = opened(pack(FILES, "gnu"), inside=inside)
        assert content(source, "004.mp4", tmp_path) == FILES["clips/1/004.mp4"]
        assert source.find("clips/1/004.mp4") is None and source.find("top.txt") is None
    with pytest.raises(FetchError, match="'clips/../..' is not a folder in an archive"):
        opened(pack(FILES, "gnu"), inside="clips/../..")


def test_frames_keep_their_order_under_safe_names(tmp_path):
    images = {}
    for number, name in enumerate(["f 1.png", "f_02.png", "\\3.png", "-4.png", "\udcff 5.png", f"{'x' * 240}10.png"]):
        out = io.BytesIO()
        Image.new("RGB", (4, 4), (number * 40, 0, 0)).save(out, "png")
        images[name] = out.getvalue()
    shuffled = {f"frames/{name}": images[name] for name in sorted(images, reverse=True)}
    source = opened(pack_tar([(tar_info(name), data) for name, data in shuffled.items()]))
    frames = open_folder(source.fetch("frames", tmp_path, tree=True)).decode_frames(np.arange(len(images)))
    assert [frame[0, 0, 0] for frame in frames] == [0, 40, 80, 120, 160, 200]


def test_safe_names_are_distinct(tmp_path):
    names = ["0000001_a_.png", "a*.png", "a?.png", "0000002_a_.png"]
    source = opened(pack({f"v/{name}": name.encode() for name in names}, "ustar"))
    assert sorted(folder(source, "v", tmp_path).values()) == sorted(name.encode() for name in names)


# What is read ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["stored", "deflate"])
def test_a_zip_costs_its_directory_and_then_the_member(tmp_path, kind):
    files = {f"{n:04d}.mp4": np.random.default_rng(n).bytes(20_000) for n in range(1000)}
    data = pack(files, kind)
    directory = len(data) - data.index(b"PK\1\2")
    file = Memory(data)
    source = open_archives([file], False, "", tmp_path, LIMIT, "here")
    assert file.moved <= directory + 67_000 and len(file.reads) < 6
    file.reads.clear()
    assert content(source, "0500.mp4", tmp_path) == files["0500.mp4"]
    assert file.moved <= 20_000 + 1200 and len(file.reads) == 1


def test_a_tar_costs_its_headers_and_then_the_member(tmp_path):
    files = {f"{n}.mp4": bytes([n]) * (8 << 20) for n in range(6)} | {"small": b"x" * 1000}
    file = Memory(pack(files, "pax"))
    source = open_archives([file], False, "", tmp_path, LIMIT, "here")
    assert file.moved <= 8 * 65_536
    file.reads.clear()
    assert content(source, "small", tmp_path) == files["small"]
    assert file.moved == 1000


def test_the_frames_of_a_folder_take_few_reads(tmp_path):
    frames = {f"v/{n}/{m:03d}.jpg": bytes([n, m]) * 10_000 for n in range(4) for m in range(100)}
    for kind in ("stored", "gnu"):
        file = Memory(pack(frames, kind))
        source = open_archives([file], False, "", tmp_path, LIMIT, "here")
        file.reads.clear()
        assert folder(source, "v/2", tmp_path) == {Path(p).name: d for p, d in frames.items() if p.startswith("v/2/")}
        assert len(file.reads) < 10 and file.moved < 2_100_000


def test_lists_of_members_are_made_once(tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    for kind in ("deflate", "tar.gz"):
        files = [Memory(pack(FILES, kind)), Memory(pack({"more": b"more"}, kind), "second")]
        for _ in range(2):
            source = open_archives(files, False, "", work, LIMIT, "here")
            assert (source.find("top.txt"), source.find("more")) == (3, 4)
            first, files[0].reads, files[1].reads = sum(file.moved for file in files), [], []
        assert first == 0
        changed = Memory(pack({"more": b"other"}, kind), "second")
        source = open_archives([files[0], changed], False, "", work, LIMIT, "here")
        assert content(source, "more", tmp_path) == b"other" and content(source, "top.txt", tmp_path) == b"top"
    assert {path.suffix for path in work.iterdir()} == {".arrow", ".gzip", ".json", ".lock"}


@pytest.mark.parametrize("kind", ["deflate", "ustar", "tar.gz"])
def test_listing_that_breaks_off_leaves_nothing_behind(tmp_path, kind):
    class Broken(Memory):
        def read(self, offset: int, size: int) -> bytes:
            if len(self.reads) > 1:
                raise FetchError("unreachable", self.name, "the server broke off")
            return super().read(offset, size)

    data = pack({str(n): np.random.default_rng(n).bytes(1 << 20) for n in range(3)}, kind)
    with pytest.raises(FetchError, match="the server broke off"):
        open_archives([Broken(data)], False, "", tmp_path, LIMIT, "here")
    assert {path.suffix for path in tmp_path.iterdir()} == {".lock"}
    assert content(open_archives([Memory(data)], False, "", tmp_path, LIMIT, "here"), "1", tmp_path)[:1]


@pytest.mark.parametrize("kind", ["deflate", "tar.gz"])
def test_what_a_killed_process_has_left_of_its_list_goes(tmp_path, kind):
    data = pack({"a": b"A"}, kind)
    assert content(opened(data, work=tmp_path), "a", tmp_path)
    (table,) = tmp_path.glob("*.arrow")
    table.unlink()
    left = [process_path(table), process_path(table.with_suffix(".gzip"))]
    left = [path.with_name(path.name.rpartition(".")[0] + end) for path in left for end in (".999", ".999.tmp")]
    other = table.with_name(f"{table.name}.elsewhere.999")  # may still be at work
    for path in (*left, other):
        path.write_bytes(b"part")
    assert content(opened(data, work=tmp_path), "a", tmp_path)
    assert table.exists() and other.exists() and not [path for path in left if path.exists()]


def sums(source: ArchiveSource, paths: list[str], scratch: str) -> list[int]:
    """Return the sum of the bytes of each file, in another process."""
    return [sum(content(source, path, Path(scratch))) for path in paths]


def test_processes_and_threads_share_a_source(tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    source = opened(*(pack({p: d for p, d in FILES.items() if ord(p[-5]) % 3 == n}, kind)
                      for n, kind in enumerate(("deflate", "pax", "tar.gz"))), work=work)  # fmt: skip
    paths = list(FILES)

    def take(number: int) -> list[bytes]:
        scratch = tmp_path / str(number)
        scratch.mkdir()
        return [content(source, path, scratch) for path in paths[number:] + paths[:number]]

    with ThreadPoolExecutor(4) as pool:
        for number, found in enumerate(pool.map(take, range(4))):
            assert found == [FILES[path] for path in paths[number:] + paths[:number]]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(sums, source, paths, str(tmp_path)).result() == [sum(FILES[path]) for path in paths]


def test_identity_follows_the_contents():
    one, two = pack({"a": b"1", "b": b"2", "c/d": b"3"}, "ustar"), pack({"a": b"1", "b": b"3", "c/d": b"3"}, "ustar")
    first, same, other = opened(one), opened(one), opened(two)
    for path, tree in (("b", False), ("c", True)):
        assert first.identity(path, tree) == same.identity(path, tree) != other.identity(path, tree)
    assert first.identity("a") != first.identity("b")


# Damage ---------------------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(st.sampled_from(["ustar", "gnu", "pax"]), st.floats(0, 1))
def test_a_tar_that_was_cut_gives_what_stands_before_the_cut(tmp_path_factory, kind, share):
    tmp_path = tmp_path_factory.mktemp("cut")
    data = pack(FILES, kind)
    cut = data[: max(int(len(data) * share), 1200)]
    source = opened(cut)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        ends = {info.name: info.offset_data + info.size for info in archive}
    for path, expected in FILES.items():
        if ends[path] <= len(cut):
            assert content(source, path, tmp_path) == expected
        else:
            assert failure(source, path, tmp_path) in ("missing_file", "truncated")
    if len(cut) < max(ends.values()):
        assert "fetch it again" in source.notes[0]


@pytest.mark.parametrize("share", [0.02, 0.3, 0.5, 0.66, 0.9, 0.9999])
def test_a_tar_gz_that_was_cut_is_refused(share):
    data = pack({f"{number}": np.random.default_rng(number).bytes(1 << 20) for number in range(12)}, "tar.gz")
    reason, line = refused(data[: int(len(data) * share)])
    assert reason == "corrupt" and "damaged or cut" in line


@pytest.mark.parametrize("kind", ["stored", "deflate", "bzip2", "lzma"])
def test_a_zip_that_is_not_whole_is_told_when_it_is_opened(kind):
    data = pack({f"{n}.mp4": np.random.default_rng(n).bytes(4000) for n in range(20)}, kind)
    size = len(data) // 5 + 1
    parts = [data[start : start + size] for start in range(0, len(data), size)]
    opened(*parts, join=True)
    for missing in range(5):
        reason, line = refused(*parts[:missing], *parts[missing + 1 :], join=True)
        assert reason == "truncated" and ("are missing" in line or "no directory at its end" in line)
    for left, right in ((0, 1), (1, 2), (2, 3), (3, 4)):
        order = list(parts)
        order[left], order[right] = order[right], order[left]
        reason, line = refused(*order, join=True)
        assert reason in ("corrupt", "truncated") and "order" in line
    for cut in (1, 30, 5000, len(data) - 100):
        reason, line = refused(data[:-cut])
        assert reason == "truncated" and "fetch it again" in line


def test_parts_of_a_tar_in_another_order_do_not_give_other_bytes(tmp_path):
    files = {f"{n}.mp4": np.random.default_rng(n).bytes(4000) for n in range(20)}
    data = pack(files, "ustar")
    parts = [data[start : start + 17_000] for start in range(0, len(data), 17_000)]
    source = opened(parts[0], parts[2], parts[1], *parts[3:], join=True)
    assert "part0 to part6: breaks after byte" in source.notes[0]
    found = {}
    for path in files:
        try:
            found[path] = content(source, path, tmp_path)
        except FetchError as error:
            assert error.reason in ("missing_file", "truncated")
    assert 2 < len(found) < 5 and all(files[path] == data for path, data in found.items())
    reason, line = refused(*parts[1:], join=True)
    assert reason == "unsupported" and "its first part may be missing" in line


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_is_seen(tmp_path, kind):
    """Zip members have checksums, a gzip file has one of all its contents, tar archives have none."""
    files = {"a": b"a" * 5000, "b": bytes(range(256)) * 40, "c": b"c" * 5000}
    data = bytearray(pack(files, kind))
    if kind in ("ustar", "gnu", "pax"):
        data[data.index(b"b\0\0") + 148] ^= 4  # within the header of b
        source = opened(bytes(data))
        assert failure(source, "b", tmp_path) == "missing_file" and source.notes
    elif kind == "tar.gz":
        data[len(data) // 2] ^= 4
        assert refused(bytes(data))[0] in ("bad_checksum", "corrupt")
    else:
        data[dict(list_zip(Memory(bytes(data))))["b"].offset + 60] ^= 4
        source = opened(bytes(data))
        assert failure(source, "b", tmp_path) in ("corrupt", "bad_checksum")
        assert content(source, "a", tmp_path) == files["a"] and content(source, "c", tmp_path) == files["c"]


@pytest.mark.parametrize(
    "data, reason, words",
    [
        (b"", "empty_file", "no bytes"),
        (b"<!DOCTYPE html><html>login</html>", "not_media", "an HTML page"),
        (b"\n<html>", "not_media", "an HTML page"),
        (b"7z\xbc\xaf\x27\x1c" + bytes(600), "unsupported", "7z file"),
        (b"Rar!\x1a\x07" + bytes(600), "unsupported", "RAR file"),
        (b"\xfd7zXZ\0" + bytes(600), "unsupported", "xz file"),
        (b"\x28\xb5\x2f\xfd" + bytes(600), "unsupported", "Zstandard file"),
        (b"BZh9" + bytes(600), "unsupported", "bzip2 file"),
        (gzip.compress(b"no tar" * 200, mtime=0), "unsupported", "contains no tar archive"),
        (gzip.compress(b"", mtime=0), "unsupported", "contains no tar archive"),
        (b"\x1f\x8b" + b"junk" * 300, "corrupt", "damaged or cut"),
        (b"ftypmp42" * 200, "unsupported", "not a zip, tar, tar.gz or parquet"),
        (b"PK\3\4" + bytes(5000), "truncated", "no directory"),
    ],
)
def test_files_that_are_not_archives(data, reason, words):
    found, line = refused(data)
    assert found == reason and words in line


def test_an_archive_without_files_is_one():
    for data in (pack({}, "stored"), pack({}, "ustar"), pack({}, "tar.gz")):
        source = opened(data)
        assert source.find("a") is None and source.find("a", tree=True) is None and source.notes == []


# Limits and paths -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["deflate", "gnu", "tar.gz"])
def test_what_is_too_large_is_not_begun(tmp_path, kind):
    file = Memory(pack({"v/a": bytes(60_000), "v/b": bytes(60_000)}, kind))
    source = open_archives([file], False, "", None, 100_000, "here")
    file.reads.clear()
    assert failure(source, "v", tmp_path, tree=True) == "too_large" and not file.reads
    assert content(source, "v/a", tmp_path) == bytes(60_000)
    source = open_archives([file], False, "", None, 59_999, "here")
    assert failure(source, "v/a", tmp_path) == "too_large"


@pytest.mark.parametrize("path", ["/etc/passwd", "../a", "a/../b", "a//b", "./a", "", "a\0b", "a/"])
def test_paths_that_are_none(tmp_path, path):
    source = opened(pack({"a": b"a", "b": b"b"}, "ustar"))
    for act in (source.find, source.identity, lambda path: source.fetch(path, tmp_path)):
        with pytest.raises(FetchError) as error:
            act(path)
        assert error.value.reason == "outside_root"


def test_paths_that_no_archive_can_hold_are_missing(tmp_path):
    source = opened(pack({"a": b"a"}, "ustar"))
    assert source.find("\ud800") is None and source.find("\ud800", tree=True) is None


@pytest.mark.parametrize("kind", ["stored", "gnu", "pax", "tar.gz"])
def test_nothing_is_written_outside_the_scratch_folder(tmp_path, kind):
    bad = ["../../evil", "/abs/evil", "a/../../evil", "..", "x\\..\\evil", "C:\\evil", "./ok", "a//b", "/", "."]
    if kind == "stored":
        data = pack_zip([(name, b"evil") for name in bad])
    else:
        data = pack_tar([(tar_info(name), b"evil") for name in bad])
        data = gzip.compress(data) if kind == "tar.gz" else data
    deep = tmp_path / "one" / "two" / "three"
    deep.mkdir(parents=True)
    source = opened(data)
    for path in ("abs/evil", "ok", "a/b", "x\\..\\evil", "C:\\evil"):
        assert content(source, path, deep) == b"evil"
    for path in ("evil", "b"):
        assert failure(source, path, deep) == "missing_file"
    assert folder(source, "abs", deep) == {"evil": b"evil"}
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_the_extension_is_taken_over_only_if_it_is_one(tmp_path):
    source = opened(pack({"a.MP4": b"1", "b.x y": b"2", f"c.{'z' * 50}": b"3"}, "ustar"))
    for path, name in (("a.MP4", "media.MP4"), ("b.x y", "media"), (f"c.{'z' * 50}", "media")):
        scratch = tmp_path / name / path[0]
        scratch.mkdir(parents=True)
        assert source.fetch(path, scratch).name == name


def test_formats_are_detected_by_contents(monkeypatch):
    inner = pack({"inner": b"x"}, "stored")
    assert archives_module._detect_format(Memory(pack({"a.zip": inner}, "ustar"), "x.zip")) == "tar"
    assert archives_module._detect_format(Memory(pack({"a.tar": pack({"a": b"a"}, "gnu")}, "stored"), "x.tar")) == "zip"
    assert opened(b"#!/bin/sh\n" * 60 + inner).find("inner") == 1
