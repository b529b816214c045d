"""Local folders: links never lead out of them."""

from __future__ import annotations

import pytest

from framestream.tools.fetch.base import FetchError
from framestream.tools.fetch.http.retry import FetchLimits
from framestream.tools.fetch.local import FolderSource, LocalFile
from framestream.tools.fetch.registry import open_source


@pytest.fixture
def root(tmp_path):
    """Create root/ with a file, frames, a link within it and links out of it; root is itself reached by a link."""
    root = tmp_path / "real"
    (root / "frames").mkdir(parents=True)
    (root / "mixed").mkdir()
    (root / "a.mp4").write_bytes(b"abcd")
    for number in (1, 2):
        (root / "frames" / f"{number}.jpg").write_bytes(b"x" * number)
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "s.jpg").write_bytes(b"secret")
    (root / "link.mp4").symlink_to("a.mp4")
    (root / "out.mp4").symlink_to("../secret/s.jpg")
    (root / "out").symlink_to("../secret")
    (root / "loop").symlink_to("loop")
    (root / "dead").symlink_to("nothing")
    (root / "mixed" / "1.jpg").symlink_to("../../secret/s.jpg")
    (tmp_path / "root").symlink_to("real")
    return FolderSource(tmp_path / "root")


def test_files_and_folders_where_they_are(root, tmp_path):
    assert root.find("a.mp4") == 4 and root.find("link.mp4") == 4 and root.find("frames", tree=True) == 3
    assert root.fetch("a.mp4", tmp_path) == tmp_path / "real" / "a.mp4"
    assert root.fetch("link.mp4", tmp_path).read_bytes() == b"abcd"
    assert sorted(item.name for item in root.fetch("frames", tmp_path, tree=True).iterdir()) == ["1.jpg", "2.jpg"]


@pytest.mark.parametrize("path", ["b.mp4", "a.mp4/b", "loop", "dead", "n" * 300, "x" * 5000, "a\udc80"])
def test_nothing_there(root, tmp_path, path):
    assert root.find(path) is None
    with pytest.raises(FetchError) as error:
        root.fetch(path, tmp_path)
    assert error.value.reason == "missing_file"


def test_a_folder_is_no_file(root):
    assert root.find("frames") is None and root.find("a.mp4", tree=True) is None


@pytest.mark.parametrize(
    ("path", "tree"),
    [("out.mp4", False), ("out/s.jpg", False), ("out", True), ("mixed", True), ("../secret", True), ("/x", False)],
)  # fmt: skip
def test_ways_out(root, tmp_path, path, tree):
    for ask in (lambda: root.find(path, tree), lambda: root.fetch(path, tmp_path, tree)):
        with pytest.raises(FetchError) as error:
            ask()
        assert error.value.reason == "outside_root"


def test_bytes_of_a_file(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"0123456789")
    file = LocalFile(path)
    assert (file.size, file.read(2, 3), file.read(8, 5), file.read(20, 1)) == (10, b"234", b"89", b"")
    path.write_bytes(b"012345678")
    assert LocalFile(path).identity != file.identity
    with pytest.raises(FetchError, match="changed"):
        file.read(0, 1)
    path.unlink()
    for ask, reason in ((lambda: LocalFile(path), "missing_file"), (lambda: file.read(0, 1), "unreachable")):
        with pytest.raises(FetchError) as error:
            ask()
        assert error.value.reason == reason


def test_a_missing_file_is_told_with_near_names(tmp_path):
    (tmp_path / "Videos").mkdir()
    for name in ("Clip 1.MP4", "b.mp4"):
        (tmp_path / "Videos" / name).write_bytes(b"x")
    source = FolderSource(tmp_path)
    for path, near in (
        ("Videos/clip_1.mp4", "; near it: `Clip 1.MP4`"),
        ("videos/b.mp4", "; near it: `Videos`"),
        ("Videos/c.mp4", "; here is `Clip 1.MP4`, `b.mp4`"),
    ):
        with pytest.raises(FetchError) as error:
            source.fetch(path, tmp_path)
        assert str(error.value) == f"{tmp_path}/{path}: cannot be opened (No such file or directory){near}"


def test_links_are_followed_on_purpose(root, tmp_path):
    """As the cache of huggingface_hub: snapshots/REVISION/a.mp4 is a link to ../../blobs/DIGEST."""
    followed = open_source(f"links:{tmp_path}/root", FetchLimits())
    assert followed.find("out.mp4") == 6 and followed.find("out/s.jpg") == 6 and followed.find("mixed", tree=True) == 6
    assert followed.fetch("out.mp4", tmp_path).read_bytes() == b"secret"
    assert (followed.fetch("mixed", tmp_path, tree=True) / "1.jpg").read_bytes() == b"secret"
    assert followed.find("dead") is None and followed.find("loop") is None
    with pytest.raises(FetchError):  # names of annotation files stay below the root
        followed.fetch("../secret/s.jpg", tmp_path)
    with pytest.raises(FetchError, match="out.mp4: a link .* map the root to links:FOLDER in a root map") as error:
        root.fetch("out.mp4", tmp_path)
    assert error.value.reason == "outside_root"
