"""Root maps: paths as people write them."""

from __future__ import annotations

import pytest

from framestream.pipeline.config.data import DataConfig, EntryConfig
from framestream.pipeline.config.manifest import ManifestError
from framestream.tools.fetch import root_map
from framestream.tools.fetch.http.retry import FetchLimits
from framestream.tools.fetch.root_map import RootMap, expand_location


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FS_DISK", str(tmp_path))


def open_map(folder, text: str) -> RootMap:
    (folder / "roots.yaml").write_text(text, encoding="utf-8")
    data = DataConfig(entries=(EntryConfig(annotation="a.json"),), roots=str(folder / "roots.yaml"))
    return RootMap(data, FetchLimits(), FetchLimits())


def test_locations_and_names_expand_their_variables(tmp_path):
    (tmp_path / "films").mkdir()
    roots = open_map(tmp_path, "films: dir:~/films\n010: dir:$FS_DISK/films\n~/shots: dir:${FS_DISK}/films\n")
    for name in ("films", "010", f"{tmp_path}/shots"):
        found = roots.media(EntryConfig(annotation="a.json", root=name))
        assert found.path == (tmp_path / "films").resolve(), "a name of the map is text, and is expanded as a root is"


def test_an_unset_variable_names_the_file_and_the_entry(tmp_path):
    with pytest.raises(ManifestError, match=r"roots\.yaml: films: \$FS_NONE/x: the variable FS_NONE is not set"):
        open_map(tmp_path, "films: dir:$FS_NONE/x\n")


def test_archives_expand_and_addresses_stay(tmp_path):
    value = {"archives": ["dir:~/a.tar", "hf:o/n:$X.tar", "url:https://h/~/{path}"], "inside": "$X"}
    expanded = {"archives": [f"dir:{tmp_path}/a.tar", "hf:o/n:$X.tar", "url:https://h/~/{path}"], "inside": "$X"}
    assert expand_location(value) == expanded
    assert expand_location("s3://bucket/$X") == "s3://bucket/$X"


def test_archives_of_many_entries_are_listed_once(tmp_path, monkeypatch):
    """The 38 entries of LLaVA-Video share 18 archives: 684 listings would exceed what the hub answers in a minute."""
    listed = []
    monkeypatch.setattr(root_map, "open_files", lambda files, limits: listed.extend(files))
    roots = open_map(tmp_path, "films: {archives: ['dir:a/*.tar.gz', 'dir:b/*.tar.gz']}\n")
    entries = [EntryConfig(annotation=f"{n}.json", root="films") for n in range(38)]
    with root_map.DaemonThreadPool(root_map.THREADS) as threads:
        found = list(threads.map(roots.media, entries))
    assert listed == ["dir:a/*.tar.gz", "dir:b/*.tar.gz"] and len(set(map(id, found))) == 1
