"""Single objects of buckets: parts, sums, and files that change while they are read."""

from __future__ import annotations

import os

import pytest

from framestream.pipeline.upload import object_store
from framestream.pipeline.upload.files import UploadError, UploadFile
from framestream.pipeline.upload.object_store import MAX_PARTS, PART_BYTES, ObjectTarget, part_size


def send(file: UploadFile) -> list[int]:
    sizes: list[int] = []
    ObjectTarget("s3://films/a").send([file], [], sizes.append)
    return sizes


def test_a_large_file_goes_in_parts_and_is_known_again(bucket, tmp_path):
    data = os.urandom(2 * PART_BYTES + 5)
    (tmp_path / "large").write_bytes(data)
    file = UploadFile("large", tmp_path / "large")
    assert sorted(send(file)) == [5, PART_BYTES, PART_BYTES]
    found = bucket.Object("a/large").get()
    assert found["Body"].read() == data and found["ETag"].strip('"').endswith("-3")
    assert ObjectTarget("s3://films/a").list_files([file])["large"].is_copy_of(file)
    other = UploadFile("large", bytes(len(data)))
    assert not ObjectTarget("s3://films/a").list_files([other])["large"].is_copy_of(other)


def test_objects_of_other_programs_are_known_by_their_etag(bucket):
    bucket.put_object(Key="a/small", Body=b"hello")
    listed = ObjectTarget("s3://films/a").list_files([UploadFile("small", b"hello")])
    assert listed["small"].is_copy_of(UploadFile("small", b"hello"))
    assert not listed["small"].is_copy_of(UploadFile("small", b"hallo"))


@pytest.mark.parametrize("size", [10, PART_BYTES + 10])
def test_a_file_that_changes_meanwhile_does_not_arrive(bucket, tmp_path, size):
    (tmp_path / "x").write_bytes(bytes(size))
    file = UploadFile("x", tmp_path / "x", sha256=UploadFile("x", b"1" * size).digest("sha256"))
    with pytest.raises(UploadError, match="^x: has changed while it was read"):
        send(file)
    assert not list(bucket.objects.all())


def test_another_sum_of_the_store_is_settled_by_reading_back(bucket, monkeypatch):
    put = object_store.obstore.put
    monkeypatch.setattr(object_store.obstore, "put", lambda *a, **o: {**put(*a, **o), "e_tag": '"' + "0" * 32 + '"'})
    send(UploadFile("x", b"hello"))  # as encrypted objects have it
    monkeypatch.setattr(
        object_store.obstore, "put", lambda store, name, data, **o: {**put(store, name, b"hallo"), "e_tag": "0" * 32}
    )
    with pytest.raises(UploadError, match="^s3://films/a/x: has arrived with other bytes"):
        send(UploadFile("x", b"hello"))


@pytest.mark.parametrize("size", [0, 1, PART_BYTES, PART_BYTES * MAX_PARTS + 1, 5 << 40])
def test_parts_are_few_and_large_enough(size):
    part = part_size(size)
    assert part >= PART_BYTES and -(-size // part) <= MAX_PARTS and part % (1 << 20) == 0
