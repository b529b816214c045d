"""Steps of an upload, on a target in memory: order, what is sent again, what is refused, and what is compared."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from framestream.pipeline.upload.files import RefusedError, StoredFile, UploadError, UploadFile, split_files
from framestream.pipeline.upload.transfer import transfer

STAGES = {"a.tar": b"aa", "b.tar": b"bb"}, {"index": b"i"}, {"README.md": b"card"}, {"build.json": b"{}"}


class Memory:
    """A target that keeps ``files``. ``history`` has what was visible after each change."""

    display_url = "memory://here"

    def __init__(self, is_atomic: bool, files: dict[str, bytes] | None = None) -> None:
        self.is_atomic, self.files = is_atomic, dict(files or {})
        self.sent: list[str] = []
        self.history: list[set[str]] = []
        self.prepared = False
        self.before_file: Callable[[str], None] = lambda name: None

    def list_files(self, files):
        return {
            name: StoredFile(name, len(data), {"md5": UploadFile(name, data).digest("md5")})
            for name, data in self.files.items()
        }

    def read(self, name):
        return self.files[name]

    def prepare(self):
        self.prepared = True

    def send(self, files, deleted, progress):
        assert self.prepared
        for name in deleted:
            del self.files[name]
        for file in files:
            self.before_file(file.name)
            self.sent.append(file.name)
            self.files[file.name] = file.source
            progress(file.size)
            self.history.append(set(self.files))
        self.history.append(set(self.files))


def push(target: Memory, replace: bool = False, **changes: bytes):
    stages = [
        [UploadFile(name, changes.get(name.partition(".")[0], data)) for name, data in stage.items()]
        for stage in STAGES
    ]
    stored = target.list_files([])
    return transfer(stages, target, stored, lambda name: name in ("index", "build.json"), replace)


EVERYTHING = {name: data for stage in STAGES for name, data in stage.items()}


@pytest.mark.parametrize("is_atomic", [True, False])
def test_the_last_file_comes_last_and_nothing_is_sent_twice(is_atomic):
    target = Memory(is_atomic)
    result = push(target)
    assert (result.files, result.sent, result.bytes, result.sent_bytes) == (5, 5, 11, 11)
    assert target.files == EVERYTHING and target.sent[-2:] == ["README.md", "build.json"]
    again = push(target)
    assert (again.sent, again.sent_bytes, len(target.sent)) == (0, 0, 5)


@pytest.mark.parametrize("stopped_at", EVERYTHING)
@pytest.mark.parametrize("error", [UploadError, KeyboardInterrupt])
def test_a_stopped_upload_continues(stopped_at, error):
    target = Memory(is_atomic=False)

    def stop(name):
        if name == stopped_at:
            raise error

    target.before_file = stop
    with pytest.raises(error):
        push(target)
    assert "build.json" not in target.files
    target.before_file = lambda name: None
    push(target)
    assert target.files == EVERYTHING and len(target.sent) == len(EVERYTHING)


@pytest.mark.parametrize("is_atomic", [True, False])
def test_additions_are_sent_without_a_moment_of_mixture(is_atomic):
    target = Memory(is_atomic, {"a.tar": b"aa", "index": b"old", "build.json": b"old", "README.md": b"card"})
    push(target)
    assert target.files == EVERYTHING and "a.tar" not in target.sent
    mixed = [seen for seen in target.history[:-2] if "build.json" in seen]
    assert bool(mixed) == is_atomic, "readers of one commit see the old root until the last one"


@pytest.mark.parametrize("is_atomic", [True, False])
@pytest.mark.parametrize("other", [{"a.tar": b"xx"}, {"c.tar": b"cc"}, {"data.parquet": b"p"}])
def test_other_contents_are_refused_or_replaced(other, is_atomic):
    there = {**other, "build.json": b"theirs", "LICENSE": b"MIT", ".gitattributes": b"g"}
    target = Memory(is_atomic, there)
    with pytest.raises(
        RefusedError, match=rf"^memory://here: has other contents \('{next(iter(other))}'\); .*--replace"
    ):
        push(target)
    assert target.files == there and not target.prepared
    push(target, replace=True)
    assert target.files == {**EVERYTHING, "LICENSE": b"MIT", ".gitattributes": b"g"}
    assert "build.json" not in target.history[0], "nobody reads a mixture of two roots"


def test_a_users_file_is_not_replaced_by_another_one():
    target = Memory(False, {"README.md": b"theirs"})
    with pytest.raises(RefusedError, match="'README.md'"):
        push(target)
    assert target.files == {"README.md": b"theirs"}


def test_more_files_than_named_are_counted():
    with pytest.raises(RefusedError, match=r"\('c.tar' and 1 more files\)"):
        push(Memory(False, {"c.tar": b"", "d.tar": b""}))


def test_missing_data_are_sent_again_while_the_rest_cannot_be_read():
    target = Memory(False, {name: data for name, data in EVERYTHING.items() if name != "b.tar"})
    push(target)
    assert target.files == EVERYTHING and target.sent == ["b.tar", "build.json"]
    assert "build.json" not in target.history[0]


def test_what_arrives_with_other_bytes_is_found():
    target = Memory(False)
    target.before_file = lambda name: target.files.update({"a.tar": b"zz"}) if name == "index" else None
    with pytest.raises(UploadError, match="^memory://here: 'a.tar' is not as it was sent; .* again"):
        push(target)


def test_digests_are_those_of_git_and_the_known_one_is_taken(tmp_path):
    (tmp_path / "x").write_bytes(b"hello\n")
    for source in (tmp_path / "x", b"hello\n"):
        file = UploadFile("x", source)
        assert file.size == 6
        assert file.digest("git") == "ce013625030ba8dba906f756967f9e9ca394464a"
        assert file.digest("md5") == "b1946ac92492d2347c6235b4d2611184"
        assert file.digest("sha256") == "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"
    assert UploadFile("x", b"", sha256="known").digest("sha256") == "known"


@pytest.mark.parametrize(
    ("size", "digests", "expected"),
    [(1, {"md5": "0cc175b9c0f1b6a831c399e269772661"}, True), (1, {"md5": "0"}, False), (1, {}, False), (2, {}, False)],
)
def test_a_stored_file_without_digest_is_no_copy(size, digests, expected):
    assert StoredFile("a", size, digests).is_copy_of(UploadFile("a", b"a")) is expected


def test_files_are_split_by_bytes_and_number():
    files = [UploadFile(str(size), bytes(size)) for size in (3, 1, 1, 9, 1, 1, 1)]
    found = [[file.size for file in part] for part in split_files(files, 4, 2)]
    assert found == [[3, 1], [1], [9], [1, 1], [1]]
    assert list(split_files([], 4, 2)) == []
