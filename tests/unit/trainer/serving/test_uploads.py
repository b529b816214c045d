"""Uploads within their bound on the disk."""

from __future__ import annotations

import io

import pytest

from framestream.trainer.serving.errors import RequestError
from framestream.trainer.serving.uploads import UploadStore


@pytest.fixture
def store():
    store = UploadStore(100)
    yield store
    store.close()


def put(store: UploadStore, data: bytes, name: str = "a.mp4"):
    return store.add(store.copy(io.BytesIO(data), "file"), name, "user_data")


def on_disk(store: UploadStore) -> int:
    return sum(path.stat().st_size for path in store._folder.iterdir())


def test_an_upload_is_found_until_it_is_removed(store):
    file = put(store, b"x" * 40)
    assert store.get(file.id) == file and store.files() == [file] and store.nbytes == on_disk(store) == 40
    assert file.to_dict()["bytes"] == 40 and file.to_dict()["filename"] == "a.mp4"
    store.remove(file.id)
    assert store.nbytes == on_disk(store) == 0
    with pytest.raises(RequestError, match="no file") as refused:
        store.get(file.id)
    assert refused.value.status == 404


def test_a_request_keeps_its_file_when_the_upload_goes(store):
    file = put(store, b"x" * 40)
    link = store.link(file.id)
    store.remove(file.id)
    assert link.path.read_bytes() == b"x" * 40 and link.digest == file.digest
    store.release(link)
    assert not on_disk(store) and store.nbytes == 0


def test_the_least_recently_used_make_room(store):
    first, second = put(store, b"1" * 40), put(store, b"2" * 40)
    store.get(first.id)
    third = put(store, b"3" * 40)
    assert {file.id for file in store.files()} == {first.id, third.id}
    with pytest.raises(RequestError):
        store.get(second.id)
    assert store.nbytes == on_disk(store) == 80


def test_files_of_requests_are_not_removed_for_room(store):
    private = store.copy(io.BytesIO(b"x" * 90), "file")
    with pytest.raises(RequestError, match="no room") as refused:
        put(store, b"y" * 20)
    assert refused.value.status == 503 and refused.value.retry_after
    assert store.nbytes == on_disk(store) == 90
    store.release(private)
    assert put(store, b"y" * 20).size == 20


@pytest.mark.parametrize("data", [b"", b"z" * 101])
def test_nothing_of_a_refused_file_stays(store, data):
    with pytest.raises(RequestError):
        put(store, data)
    assert store.nbytes == on_disk(store) == 0 and not store.files()


def test_names_of_clients_name_no_path(store):
    file = put(store, b"x", "../../etc/passwd")
    assert file.path.parent == store._folder and "passwd" not in file.path.name
