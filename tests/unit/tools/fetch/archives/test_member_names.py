"""Members are found by what an annotation file calls them, however the archive spells their names."""

from __future__ import annotations

import io
import struct
import tarfile
import unicodedata
import warnings
import zipfile
import zlib

import pytest

from framestream.tools.fetch.archives.member_names import plain_path
from framestream.tools.fetch.base import FetchError
from tests.helpers.media.memory_files import content, failure, folder, opened, pack_tar, tar_info

#: a name, and an encoding that an old program wrote it in
SPELLED = [
    ("视频一.mp4", "gbk"),
    ("视频/视频一.mp4", "gb18030"),
    ("表示.mp4", "cp932"),  # the second byte of the first letter is a backslash
    ("動画/表.mp4", "cp932"),
    ("功能.mp4", "big5"),
    ("동영상.mp4", "cp949"),
    ("видео.mp4", "cp866"),
    ("видео.mp4", "cp1251"),
    ("é–ö.mp4", "cp1252"),
    ("éÉ¢.mp4", "cp437"),
]


def raw_zip(files: dict[bytes, bytes], extra: bytes = b"", flags: int = 0) -> bytes:
    """Return a zip archive of stored members with these very bytes as names."""
    out, directory = io.BytesIO(), b""
    for name, data in files.items():
        common = struct.pack(
            "<5H3L2H", 20, flags, 0, 0, 33, zlib.crc32(data), len(data), len(data), len(name), len(extra)
        )
        directory += (
            b"PK\1\2" + struct.pack("<H", 20) + common + struct.pack("<3H2L", 0, 0, 0, 0, out.tell()) + name + extra
        )
        out.write(b"PK\3\4" + common + name + extra + data)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, len(files), len(files), len(directory), out.tell(), 0)
    return out.getvalue() + directory + end


def raw_tar(files: dict[bytes, bytes]) -> bytes:
    """Return a tar archive of members with these very bytes as names."""
    members = [(tar_info(name.decode("utf-8", "surrogateescape")), data) for name, data in files.items()]
    return pack_tar(members, tarfile.GNU_FORMAT)


@pytest.mark.parametrize("pack", [raw_zip, raw_tar])
@pytest.mark.parametrize("name, encoding", SPELLED)
def test_names_in_old_encodings(tmp_path, name, encoding, pack):
    data = pack({name.encode(encoding): b"wanted", b"other.mp4": b"other"})
    half = len(data) // 2
    for source in (opened(data), opened(data[:half], data[half:], join=True)):
        assert source.find(name) == 6 and content(source, name, tmp_path) == b"wanted"
        assert source.find("no" + name) is None


def test_zipfile_reads_the_same_names(tmp_path):
    """The archives above are sound: zipfile finds the same member, by the bytes of its name as code page 437."""
    for name, encoding in SPELLED:
        with zipfile.ZipFile(io.BytesIO(raw_zip({name.encode(encoding): b"wanted"}))) as archive:
            (info,) = archive.infolist()
            assert info.orig_filename.encode("cp437") == name.encode(encoding) and archive.read(info) == b"wanted"


@pytest.mark.parametrize("pack", [raw_zip, raw_tar])
def test_backslashes_and_both_unicode_forms(tmp_path, pack):
    names = {b"videos\\a.mp4": b"a", "café/été.mp4": b"e", b"./x/./y.mp4": b"y", b"x\\sub/z.mp4": b"z"}
    encoded = {
        name if isinstance(name, bytes) else unicodedata.normalize("NFD", name).encode(): data
        for name, data in names.items()
    }
    source = opened(pack(encoded))
    wanted = {"videos/a.mp4": b"a", "videos\\a.mp4": b"a", "café/été.mp4": b"e", "x/y.mp4": b"y", "x/sub/z.mp4": b"z"}
    assert {name: content(source, name, tmp_path) for name in wanted} == wanted
    nfd = unicodedata.normalize("NFD", "café/été.mp4")
    assert content(source, nfd, tmp_path) == b"e" and content(source, nfd.replace("/", "\\"), tmp_path) == b"e"
    composed = opened(pack({"café/été.mp4".encode(): b"composed"}))
    assert content(composed, nfd, tmp_path) == b"composed"


@pytest.mark.parametrize("pack", [raw_zip, raw_tar])
def test_folders_of_frames_in_other_spellings(tmp_path, pack):
    frames = {f"été\\{number}.jpg".encode(): bytes([number]) for number in range(3)}
    source = opened(pack(frames))
    assert source.find("été", tree=True) == 3 and len(folder(source, "été", tmp_path)) == 3
    nfd = {unicodedata.normalize("NFD", f"v/é{number}.jpg").encode(): bytes([number]) for number in range(3)}
    assert sorted(folder(opened(pack(nfd)), "v", tmp_path).values()) == [b"\0", b"\1", b"\2"], "each frame once"
    gbk = {f"帧/{number}.jpg".encode("gbk"): bytes([number]) for number in range(3)}
    assert sorted(folder(opened(pack(gbk)), "帧", tmp_path)) == ["0.jpg", "1.jpg", "2.jpg"]
    both = opened(pack({"é/1.jpg".encode("cp437"): b"1", "é/2.jpg".encode("cp1252"): b"2"}))
    assert failure(both, "é", tmp_path, tree=True) == "bad_media"


def test_the_unicode_path_field(tmp_path):
    def field(raw: bytes, name: str) -> bytes:
        data = b"\1" + struct.pack("<L", zlib.crc32(raw)) + name.encode()
        return struct.pack("<2H", 0x7075, len(data)) + data

    raw = b"_____.mp4"
    source = opened(raw_zip({raw: b"video"}, field(raw, "видео.mp4")))
    assert content(source, "видео.mp4", tmp_path) == b"video" and source.find("_____.mp4") is None
    assert content(opened(raw_zip({raw: b"video"}, field(b"before", "видео.mp4"))), "_____.mp4", tmp_path) == b"video"
    escaping = opened(raw_zip({raw: b"video"}, field(raw, "../evil.mp4")))
    assert escaping.find("evil.mp4") is None


@pytest.mark.parametrize("pack", [raw_zip, raw_tar])
def test_names_that_two_members_share_are_refused(tmp_path, pack):
    nfc, nfd = (unicodedata.normalize(form, "é.mp4").encode() for form in ("NFC", "NFD"))
    exact = opened(pack({nfc: b"nfc", nfd: b"nfd", b"a\\b": b"back", b"a/b": b"slash"}))
    assert content(exact, "é.mp4", tmp_path) == b"nfc" and content(exact, nfd.decode(), tmp_path) == b"nfd"
    assert content(exact, "a/b", tmp_path) == b"slash" and content(exact, "a\\b", tmp_path) == b"back"
    codes = opened(pack({"é.mp4".encode("cp437"): b"dos", "é.mp4".encode("cp1252"): b"windows"}))
    assert failure(codes, "é.mp4", tmp_path) == "bad_media"
    slashes = opened(pack({b"a\\b/c": b"1", b"a/b\\c": b"2", b"d\\e": b"d"}))
    assert failure(slashes, "a/b/c", tmp_path) == "bad_media" and content(slashes, "d/e", tmp_path) == b"d"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twice = opened(raw_tar({b"d\\e": b"old"})[:1024] + raw_tar({b"d\\e": b"new"}))
    assert content(twice, "d/e", tmp_path) == b"new", "of equal names the last one counts"


def test_no_spelling_leads_out_of_the_archive():
    assert [plain_path(path) for path in ("a\\..\\..\\b", "..\\a", "C:\\a", "c:/a", "\\\\host\\a")] == [None] * 4 + [
        "host/a"
    ]
    source = opened(raw_zip({b"..\\..\\etc\\passwd": b"1", b"C:\\evil": b"2", b"x\\..\\y": b"3"}))
    assert [source.find(path) for path in ("etc/passwd", "passwd", "evil", "y", "C:/evil")] == [None] * 5


def test_a_missing_member_is_told_with_near_names(tmp_path):
    source = opened(raw_zip({b"videos/Clip 01.MP4": b"1", b"videos/b.mp4": b"2", b"deep/down/c.mp4": b"3"}))

    def line(path: str) -> str:
        with pytest.raises(FetchError, match="no such file among the 3 of here") as error:
            source.fetch(path, tmp_path)
        return str(error.value).partition(" of here")[2]

    assert line("videos/clip_01.mp4") == "; near it: `Clip 01.MP4`"
    assert line("c.mp4") == "; near it: `deep/down/c.mp4`"
    assert line("videos/none.mp4") == "; here is `Clip 01.MP4`, `b.mp4`"
    assert line("none/none.mp4") == "; here is `deep/down/c.mp4`, `videos/Clip 01.MP4`, `videos/b.mp4`"
