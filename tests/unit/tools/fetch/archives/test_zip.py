"""Zip archives: every feature of the format that occurs in practice, and hostile files."""

from __future__ import annotations

import base64
import os
import struct
import zipfile
import zlib
from pathlib import Path

import pytest

from framestream.tools.fetch.archives import archive as archives
from framestream.tools.fetch.archives import zip as zips
from framestream.tools.fetch.archives.archive import open_archives
from framestream.tools.fetch.archives.zip import CHUNK, list_zip, open_zip_stream, unpack_member
from framestream.tools.fetch.base import FetchError
from tests.helpers.media.memory_files import (
    Memory,
    content,
    entry,
    failure,
    opened,
    pack,
    pack_zip,
    patched,
    refused,
    zip_link,
)

#: s.z01, s.z02 and s.zip, as Info-ZIP 3.0 writes three files of 50,000 equal letters with -0 -X -s 64k
SPLIT = (
    "c-rmAu?>Pi7=Y0~0ivOE3>y}qxdkY=N*c-=!Gu*<gQ=vFTSMPVzUE8g?ViS_?V~#PGHuUKNk>GjyWTwHWt{;4000000000000000"
    "0000000000000000000000000000000000000000008(YX>8g)s&g;X>+#;w5mD=|mxsKp82|tP00000000000002^GhYNoIE(",
    "c-rmAu?;{#7=Y1B&=^K*2+b{^xxdmV4JEd)hDE5jHRQeIYrawd0000000000000000000000000000000000000000__sVYZJ(-V"
    "-{$c?u6(9c>%JF5S=Imm00000000000000000000000000000000000h<E{7k9!;",
    "c-rmDp$)=76oBDtOA$C0z+<rN0EPuBXbl)-(U>M30gobV!5U1!21U^Z5(4Q2<ojOk#J&5A0ssI2000000000000000004l$v06s)"
    "BpHRy<6LI-v?*8D5W16wkJDk$-s@Su-Tfw;aaH#x`}QU8OXkhx_MJrU<X(kPypnVnhd3nd9NSg4=sr9F(<tYs",
)


def test_directory_is_that_of_zipfile(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.comment = b"comment" * 50
        for number in range(300):
            with archive.open(f"d{number % 5}/{number}", "w", force_zip64=number % 2 == 0) as out:
                out.write(os.urandom(number))
    with zipfile.ZipFile(path) as archive:
        expected = {info.filename: info for info in archive.infolist()}
    found = dict(list_zip(Memory(path.read_bytes())))
    assert list(found) == list(expected)
    for name, info in expected.items():
        fields = (info.header_offset, info.file_size, info.compress_size, info.CRC, info.compress_type)
        assert found[name][1:6] == fields


def test_marks_of_the_end_in_a_comment_and_in_a_member(tmp_path):
    data = pack({"inner.zip": pack({"a": b"a"}, "stored")}, "stored")
    comment = data[-22:] + b"PK\5\6" * 50
    data = data[:-2] + struct.pack("<H", len(comment)) + comment
    source = opened(data)
    assert source.find("inner.zip") and source.find("a") is None


def test_more_members_than_16_bits_count(tmp_path):
    data = pack_zip([(f"{number:05d}", b"") for number in range(66_000)])
    assert data[-42:-38] == b"PK\6\7"
    source = opened(data)
    assert source.find("65999") == 0 and content(source, "00000", tmp_path) == b""


def test_members_behind_4_gib(tmp_path):
    class File:
        name, identity = "sparse.zip", "1"

        def __init__(self, path: Path) -> None:
            self.handle, self.size = os.open(path, os.O_RDONLY), path.stat().st_size

        def read(self, offset: int, size: int) -> bytes:
            return os.pread(self.handle, size, offset)

    path = tmp_path / "sparse.zip"
    path.write_bytes(b"#!/bin/sh\n")
    os.truncate(path, 5 << 30)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("far.txt", b"far away", zipfile.ZIP_DEFLATED)
    source = open_archives([File(path)], False, "", None, 100, "here")
    assert content(source, "far.txt", tmp_path) == b"far away"


def test_an_archive_written_in_parts(tmp_path):
    parts = [zlib.decompress(base64.b85decode(part)) for part in SPLIT]
    assert [len(part) for part in parts] == [65536, 65536, 19212]
    source = opened(*parts, join=True)
    assert {name: content(source, f"{name}.bin", tmp_path) for name in "abc"} == {
        name: name.encode() * 50_000 for name in "abc"
    }
    for some in ([parts[2]], parts[1:], [parts[0], parts[2]]):
        reason, line = refused(*some, join=len(some) > 1)
        assert reason == "truncated" and f"has 3 parts, here are {len(some)}" in line


def test_an_archive_behind_a_program(tmp_path):
    data = b"MZ" + b"program" * 500 + pack({"a/b.txt": b"text" * 50}, "deflate")
    assert content(opened(data), "a/b.txt", tmp_path) == b"text" * 50


def test_names_in_utf_8_and_in_the_code_page(tmp_path):
    latin = pack_zip([("a\u00e9.mp4", b"flagged")])
    position = latin.index(b"PK\1\2")
    for offset in (6, position + 8):  # drop the flag that says UTF-8
        assert latin[offset + 1] & 8
        latin = latin[: offset + 1] + bytes([latin[offset + 1] & ~8]) + latin[offset + 2 :]
    assert content(opened(latin), "a\u00e9.mp4", tmp_path) == b"flagged"
    page = latin.replace("\u00e9".encode(), b"\x82\x9b")
    assert content(opened(page), "a\u00e9\u00a2.mp4", tmp_path) == b"flagged"


def test_backslashes_separate_folders_in_archives_from_dos(tmp_path):
    info = zipfile.ZipInfo("b.mp4")
    info.create_system = 0
    data = pack_zip([(info, b"dos")]).replace(b"b.mp4", b"a\\b.m")
    assert content(opened(data), "a/b.m", tmp_path) == b"dos"
    info.create_system = 3
    data = pack_zip([(info, b"unix")]).replace(b"b.mp4", b"a\\b.m")
    assert content(opened(data), "a\\b.m", tmp_path) == b"unix"


def test_links_lead_within_the_archive(tmp_path):
    links = {"v/near": "a", "far": "v/a", "v/up": "../top", "chain": "v/near", "abs": "/etc/passwd", "out": "../x"}
    links |= {"v/out": "../../etc/passwd", "loop": "loop", "none": "nothing", "long": "y" * 5000, "empty": ""}
    files = [("v/a", b"A"), ("top", b"T"), *(zip_link(name, target) for name, target in links.items())]
    source = opened(pack_zip(files))
    found = {name: content(source, name, tmp_path) for name in ("v/near", "far", "v/up", "chain")}
    assert found == {"v/near": b"A", "far": b"A", "v/up": b"T", "chain": b"A"}
    assert {failure(source, name, tmp_path) for name in ("abs", "out", "v/out", "long", "empty")} == {"outside_root"}
    assert {failure(source, name, tmp_path) for name in ("loop", "none")} == {"missing_file"}
    assert (source.find("far"), source.find("none"), source.find("loop")) == (1, None, None)
    assert failure(source, "v", tmp_path, tree=True) == "outside_root"


def test_many_links_are_refused(monkeypatch):
    monkeypatch.setattr(zips, "MAX_LINKS", 3)
    reason, line = refused(pack_zip([zip_link(str(number), "a") for number in range(4)]))
    assert reason == "unsupported" and "over 3 symbolic links" in line


def test_a_broken_link_costs_itself(tmp_path):
    data = bytearray(pack_zip([("a", b"A"), zip_link("link", "a/target")]))
    data[data.index(b"a/target")] ^= 1
    source = opened(bytes(data))
    assert failure(source, "link", tmp_path) == "truncated" and content(source, "a", tmp_path) == b"A"


def test_encrypted_and_unknown_methods(tmp_path):
    data = pack_zip([("a", b"A"), ("b", b"B"), ("c", b"C")])
    data = patched(data, "a", "<H", 8, 1)
    data = patched(data, "b", "<H", 10, 9)
    source = opened(data)
    assert failure(source, "a", tmp_path) == failure(source, "b", tmp_path) == "unsupported"
    assert source.find("a") == 1 and content(source, "c", tmp_path) == b"C"


@pytest.mark.parametrize("kind", ["deflate", "bzip2", "lzma"])
def test_a_member_that_unpacks_to_more_than_it_says(tmp_path, kind):
    data = patched(pack({"bomb": bytes(20 << 20)}, kind), "bomb", "<L", 24, 1000)
    assert len(data) < 60_000
    member = dict(list_zip(Memory(data)))["bomb"]
    with pytest.raises(FetchError, match="unpacks to more bytes where the archive states 1000"):
        list(unpack_member(open_zip_stream(Memory(data), member), member, "bomb"))
    assert failure(opened(data), "bomb", tmp_path) == "corrupt"


@pytest.mark.parametrize("kind", ["deflate", "bzip2", "lzma"])
def test_a_bomb_is_handed_on_in_small_pieces(kind):
    data = pack({"bomb": bytes(20 << 20)}, kind)
    member = dict(list_zip(Memory(data)))["bomb"]
    sizes = [len(piece) for piece in unpack_member(open_zip_stream(Memory(data), member), member, "bomb")]
    assert sum(sizes) == 20 << 20 and max(sizes) <= CHUNK


@pytest.mark.parametrize("kind", ["stored", "deflate", "bzip2", "lzma"])
def test_wrong_sizes_checksums_and_offsets(tmp_path, kind):
    good = pack({"a": b"abc" * 1000, "b": b"b" * 50}, kind)
    assert failure(opened(patched(good, "a", "<L", 16, 0)), "a", tmp_path) == "bad_checksum"
    assert failure(opened(patched(good, "a", "<L", 24, 3001)), "a", tmp_path) == "corrupt"
    assert failure(opened(patched(good, "a", "<L", 42, 7)), "a", tmp_path) == "corrupt"
    assert failure(opened(patched(good, "a", "<L", 20, 4)), "a", tmp_path) == "corrupt"
    for offset, value in ((20, 1 << 30), (42, 1 << 31)):  # beyond the archive
        assert failure(opened(patched(good, "a", "<L", offset, value)), "a", tmp_path) == "truncated"
    assert content(opened(patched(good, "a", "<L", 42, 7)), "b", tmp_path) == b"b" * 50


def test_a_damaged_directory():
    data = bytearray(pack({"a": b"a", "b": b"b"}, "stored"))
    data[entry(bytes(data), "b")] = 0
    reason, line = refused(bytes(data))
    assert reason == "corrupt" and "directory is damaged at byte" in line


def test_numbers_beyond_what_a_table_holds(tmp_path):
    method = patched(pack_zip([("a", b"A"), ("b", b"B")]), "a", "<H", 10, 0xFFFF)
    assert failure(opened(method), "a", tmp_path) == "unsupported" and content(opened(method), "b", tmp_path) == b"B"


def test_members_that_unpack_to_far_more_than_the_archive_has(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "RATIO_SLACK", 1 << 10)
    bomb = opened(pack({"a": bytes(1 << 20), "v/1": bytes(1 << 20), "v/2": b"2", "b": bytes(1000)}, "deflate"))
    assert failure(bomb, "a", tmp_path) == failure(bomb, "v", tmp_path, tree=True) == "too_large"
    assert content(bomb, "b", tmp_path) == bytes(1000)
    overlapping = bytearray(pack_zip([(f"v/{number}", os.urandom(900)) for number in range(200)]))
    first = entry(bytes(overlapping), "v/0")
    for number in range(1, 200):
        place = entry(bytes(overlapping), f"v/{number}")
        overlapping[place + 42 : place + 46] = overlapping[first + 42 : first + 46]
        overlapping[place + 20 : place + 28] = struct.pack("<2L", 150_000, 150_000)
    assert failure(opened(bytes(overlapping)), "v", tmp_path, tree=True) == "too_large"
    lzma = bytearray(pack({"a": bytes(9000)}, "lzma"))
    lzma[entry(bytes(lzma), "a") + 24 : entry(bytes(lzma), "a") + 28] = struct.pack("<L", 1 << 30)
    assert failure(opened(bytes(lzma)), "a", tmp_path) == "too_large"
