"""Tar archives, also hostile or broken ones: members are found by a pass over the headers."""

from __future__ import annotations

import gzip
import tarfile

import numpy as np
import pytest

from framestream.tools.fetch.archives import tar as tars
from framestream.tools.fetch.archives.archive import open_archives
from framestream.tools.fetch.archives.tar import BLOCK, is_tar, list_tar
from framestream.tools.fetch.base import FetchError
from tests.helpers.media.memory_files import Memory, content, failure, opened, pack, pack_tar, refused, tar_info


def with_field(data: bytes, header_start: int, offset: int, value: bytes) -> bytes:
    """Replace a field of the header at ``header_start`` and correct the checksum."""
    header = bytearray(data[header_start : header_start + BLOCK])
    header[offset : offset + len(value)] = value
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:header_start] + bytes(header) + data[header_start + BLOCK :]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_links_lead_within_the_archive(tmp_path, form):
    soft, hard = tarfile.SYMTYPE, tarfile.LNKTYPE
    links = {"v/near": (soft, "a"), "far": (soft, "v/a"), "v/up": (soft, "../top"), "chain": (hard, "v/near")}
    links |= {"hard": (hard, "./v/a"), "forward": (soft, "z"), "tree/link": (soft, "../v/a")}
    links |= {"abs": (soft, "/etc/passwd"), "out": (soft, "../x"), "v/out": (hard, "../etc/passwd")}
    links |= {"loop": (soft, "loop"), "none": (hard, "nothing")}
    members = [(tar_info("v/a"), b"A"), (tar_info("top"), b"T")]
    members += [(tar_info(name, kind, target), b"") for name, (kind, target) in links.items()]
    source = opened(pack_tar([*members, (tar_info("z"), b"Z")], form))
    good = {"v/near": b"A", "far": b"A", "v/up": b"T", "chain": b"A", "hard": b"A", "forward": b"Z", "tree/link": b"A"}
    assert {name: content(source, name, tmp_path) for name in good} == good
    assert {failure(source, name, tmp_path) for name in ("abs", "out", "v/out")} == {"outside_root"}
    assert {failure(source, name, tmp_path) for name in ("loop", "none")} == {"missing_file"}
    assert (source.find("tree", tree=True), source.find("hard"), source.find("loop")) == (1, 1, None)
    assert failure(source, "v", tmp_path, tree=True) == "outside_root"


def test_devices_pipes_and_sparse_files(tmp_path):
    kinds = {"pipe": tarfile.FIFOTYPE, "disk": tarfile.BLKTYPE, "tty": tarfile.CHRTYPE, "odd": b"Z"}
    data = pack_tar([(tar_info(name, kind), b"") for name, kind in kinds.items()] + [(tar_info("a"), b"A")])
    source = opened(data)
    assert {failure(source, name, tmp_path) for name in kinds} == {"unsupported"}
    assert content(source, "a", tmp_path) == b"A"
    sparse = tar_info("sparse")
    sparse.pax_headers = {"GNU.sparse.size": "100", "GNU.sparse.numblocks": "0"}
    assert failure(opened(pack_tar([(sparse, b"x")])), "sparse", tmp_path) == "unsupported"


def test_a_broken_header_costs_the_rest_and_the_member_before(tmp_path):
    data = bytearray(pack({name: name.encode() * 600 for name in "abcde"}, "ustar"))
    data[data.index(b"c\0\0\0") + 148] ^= 1  # the checksum
    source = opened(bytes(data))
    assert source.notes == [
        "part0: breaks after byte 2048 (bad header); members from there on are lost; fetch it again"
    ]
    assert content(source, "a", tmp_path) == b"a" * 600
    assert [failure(source, name, tmp_path) for name in "bcde"] == ["truncated"] + ["missing_file"] * 3


def test_an_archive_without_its_mark_at_the_end(tmp_path):
    data = pack({"a": b"a" * 512, "b": b"b" * 512}, "ustar")[: 4 * BLOCK]
    source = opened(data)
    assert content(source, "a", tmp_path) + content(source, "b", tmp_path) == b"a" * 512 + b"b" * 512
    assert "(the end is missing)" in source.notes[0]


@pytest.mark.parametrize("size", [b"\xff" * 12, b"\x80" + b"\xff" * 11, b"\xff" + b"\xff" * 9 + b"\xfc\0"])
def test_sizes_that_lead_nowhere(tmp_path, size):
    data = pack({"a": b"a" * 512, "b": b"b" * 512}, "ustar")
    source = opened(with_field(data, 2 * BLOCK, 124, size))
    assert (failure(source, "a", tmp_path), failure(source, "b", tmp_path)) == ("truncated", "missing_file")
    assert "leads nowhere" in source.notes[0]


@pytest.mark.parametrize("kind", [b"L", b"K", b"x", b"g"])
def test_a_header_that_claims_gigabytes_is_not_read(tmp_path, kind):
    data = with_field(pack({"a": b"a" * 512, "b": b"b"}, "ustar"), 2 * BLOCK, 156, kind)
    file = Memory(with_field(data, 2 * BLOCK, 124, b"77777777777\0"))
    notes = []
    assert [path for path, _ in list_tar(file, notes)] == ["a"]
    assert "(headers of over 1048576 bytes)" in notes[0] and file.moved < 200_000


def test_the_names_of_members_cost_little_of_their_bytes():
    """Also of members far below a MiB, whose headers lie close to each other."""
    file = Memory(pack({str(number): bytes(300_000) for number in range(40)}, "ustar"))
    assert len(list(list_tar(file, []))) == 40 and file.moved <= 0.25 * file.size


def test_pax_headers_with_nonsense(tmp_path):
    for headers in ({"size": "-5"}, {"size": "x"}, {"path": "\0"}, {"GNU.sparse.map": "1,2,x"}, {"mtime": "9" * 999}):
        bad = tar_info("bad")
        bad.pax_headers = headers
        source = opened(pack_tar([(tar_info("a"), b"A" * 600), (bad, b"x")]))
        assert source.find("a") == 600
        if source.notes:
            assert "breaks after byte" in source.notes[0]


def test_a_gzip_bomb_is_refused(monkeypatch):
    monkeypatch.setattr(tars, "RATIO_SLACK", 1 << 20)
    for data in (
        pack({"bomb": bytes(30 << 20)}, "ustar"),
        pack({"a": b"a"}, "ustar") + bytes(30 << 20),
    ):
        reason, line = refused(gzip.compress(data))
        assert reason == "too_large" and "20 times its size" in line


def test_gzip_files_in_several_streams(tmp_path):
    data = pack({str(number): bytes([number]) * 5000 for number in range(30)}, "pax")
    streams = b"".join(gzip.compress(data[start : start + 7000]) for start in range(0, len(data), 7000))
    source = opened(streams, work=tmp_path)
    assert [content(source, str(number), tmp_path) for number in range(30)] == [bytes([n]) * 5000 for n in range(30)]


@pytest.mark.parametrize("extra", [b"", b"junk" * 100])
def test_a_gzip_file_with_a_bad_end(extra):
    data = gzip.compress(pack({"a": b"a" * 5000, "b": b"b"}, "gnu"))
    reason, line = refused(data + extra if extra else data[:-5])
    assert reason == "corrupt" and "fetch it again" in line


def test_what_starts_like_a_tar():
    assert is_tar(pack({"a": b""}, "ustar")) and is_tar(bytes(1024))
    assert not is_tar(bytes(100)) and not is_tar(b"") and not is_tar(b"x" * 512)


def test_a_tar_gz_is_read_once_and_then_near_its_members(tmp_path):
    words = np.random.default_rng(0).integers(0, 10**6, (24, 150_000))
    files = {str(number): " ".join(map(str, row)).encode() for number, row in enumerate(words)}
    file = Memory(pack(files, "tar.gz"))
    source = open_archives([file], False, "", tmp_path, 1 << 30, "here")
    assert file.size > 10 << 20 and file.moved < 1.1 * file.size
    file.reads.clear()
    assert content(source, "20", tmp_path) == files["20"]
    assert file.moved < 0.8 * file.size


def gzipped(*chunks: bytes) -> bytes:
    return gzip.compress(b"".join(chunks), 1)


def test_headers_cannot_take_time_or_memory(monkeypatch):
    """Sparse maps, global records and chains of headers that unpack to far more than the archive has."""
    sparse = tar_info("s")
    sparse.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "5"}
    sparse.size = 2 << 20
    globals_ = tarfile.TarInfo.create_pax_global_header({f"k{number}": "v" for number in range(2000)})
    record = tarfile.TarInfo._create_pax_generic_header({"a": "b"}, b"x", "utf-8")
    for chunks, words in (
        ((sparse.tobuf(tarfile.PAX_FORMAT), b"9999999\n", b"1\n" * (1 << 20)), "headers of over 1048576 bytes"),
        ((globals_, tar_info("a").tobuf(tarfile.PAX_FORMAT)), "over 1000 global records"),
        ((record * 1200,), "maximum recursion depth exceeded"),
    ):
        source = opened(gzipped(*chunks))
        assert words in source.notes[0] and source.find("a") is None
    monkeypatch.setattr(tars, "HEADER_SLACK", 1 << 20)
    with pytest.raises(FetchError, match="its headers unpack to over 20 times its size") as error:
        opened(gzipped(tar_info("a").tobuf(tarfile.PAX_FORMAT) * 4_000))
    assert error.value.reason == "too_large"


def test_an_error_of_reading_a_gzip_file_is_told_as_it_is(tmp_path):
    class Broken(Memory):
        broken = False

        def read(self, offset, size):
            if self.broken:
                raise FetchError("unreachable", self.name, "the server broke off")
            return super().read(offset, size)

    file = Broken(pack({"a": bytes(5000)}, "tar.gz"))
    source = open_archives([file], False, "", None, 1 << 20, "here")
    file.broken = True
    with pytest.raises(FetchError, match="the server broke off"):
        source.fetch("a", tmp_path)
