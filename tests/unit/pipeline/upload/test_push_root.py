"""A root pushed by the command to the hub, to a bucket of the hub and to S3, and read there."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants

from framestream.pipeline.adapters import ShardDataset
from framestream.pipeline.shards.dataset_card import CARD_FILE, MAX_CARD_BYTES
from framestream.pipeline.upload import object_store
from framestream.pipeline.upload.files import UploadFile
from framestream.tools.push_shards import main
from tests.helpers.servers.cloud_server import cloud_server
from tests.helpers.servers.upload_hub import TOKEN, UploadHub

SECRETS = re.compile(rf"{TOKEN}|very-secret|xet-secret|secret-key|Signature=")
LEFT_OUT = {"index/tokens-1-2.arrow", "notes.txt"}


def files_of(root: Path) -> dict[str, bytes]:
    """The files of a root that the format names."""
    paths = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in paths.items() if name not in LEFT_OUT}


def push(root: Path, url: str, *options: str) -> int:
    return main([str(root), url, "--workers", "1", *options])


def stored(hub: UploadHub, url: str) -> dict[str, bytes]:
    """Files of the hub below an address, without those that the hub itself makes."""
    if url.startswith("hf://buckets/"):
        owner, name, *folder = url.removeprefix("hf://buckets/").split("/")
        found = {path: data for path, (data, _) in hub.buckets[f"{owner}/{name}"].items()}
    else:
        owner, name, *folder = url.removeprefix("hf://datasets/").split("/")
        name, _, revision = name.partition("@")
        repository = hub.repositories[f"datasets/{owner}/{name}"]
        found = dict(repository.commits[repository.branches[revision or "main"]])
        del found[".gitattributes"]
    prefix = "".join(f"{part}/" for part in folder)
    assert all(path.startswith(prefix) for path in found)
    return {path.removeprefix(prefix): data for path, data in found.items()}


@pytest.mark.parametrize(
    "url",
    [
        "hf://datasets/me/films",
        "hf://datasets/me/films@v2/sub/stage2",
        "hf://buckets/me/films",
        "hf://buckets/me/films/a",
    ],
)
def test_the_hub_has_the_root_and_gets_nothing_twice(hub, root, url, capsys):
    assert push(root, url) == 0
    assert stored(hub, url) == files_of(root)
    assert re.fullmatch(rf"{url}: has (\d+) files .*; \1 were sent now .*\n", capsys.readouterr().out)
    hub.asked.clear()
    assert push(root, url) == 0
    assert hub.sent("PUT") == [] and hub.sent("POST") == []
    assert "; 0 were sent now (0 B)" in capsys.readouterr().out


def test_files_of_a_repository_go_by_xet_where_the_hub_has_it(hub, root, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    for path in (path for path in root.rglob("*") if path.is_file()):
        file = UploadFile(path.name, path)
        hub.xet_hashes[file.digest("sha256")] = file.digest("xet")
    assert push(root, "hf://datasets/me/films") == 0
    assert hub.sent("PUT") == [] and any("/xet-write-token/" in path for path in hub.sent("GET"))
    assert stored(hub, "hf://datasets/me/films") == files_of(root)


def test_a_root_in_a_bucket_of_the_hub_is_read_by_the_loader(hub, root):
    assert push(root, "hf://buckets/me/films/a") == 0
    here, there = (ShardDataset(where, by="media") for where in (root, "hf://buckets/me/films/a"))
    for number in range(len(here)):
        for one, other in zip(here[number].media, there[number].media, strict=True):
            assert one.key == other.key and np.array_equal(one.frames, other.frames)


def test_a_root_in_s3_is_complete_and_nothing_is_sent_twice(bucket, root, capsys):
    assert push(root, "s3://films/roots/stage2") == 0
    found = {item.key.removeprefix("roots/stage2/"): item.get()["Body"].read() for item in bucket.objects.all()}
    assert found == files_of(root)
    changed = {item.key: item.last_modified for item in bucket.objects.all()}
    assert push(root, "s3://films/roots/stage2/") == 0
    assert "; 0 were sent now (0 B)" in capsys.readouterr().out
    assert {item.key: item.last_modified for item in bucket.objects.all()} == changed


@pytest.mark.parametrize("kind", ["gs", "az"])
def test_a_root_in_other_clouds_is_complete_and_nothing_is_sent_twice(kind, root, monkeypatch, capsys):
    with cloud_server(kind) as cloud:
        for name, value in cloud.environment().items():
            monkeypatch.setenv(name, value)
        url = f"{kind}://films/roots/stage2"
        assert push(root, url) == 0
        found = {name.removeprefix("films/roots/stage2/"): data for name, data in cloud.objects.items()}
        assert found == files_of(root)
        capsys.readouterr()
        assert push(root, url) == 0
        assert "; 0 were sent now (0 B)" in capsys.readouterr().out
        cloud.objects["films/roots/stage2/video/train-000000.tar"] = bytes(10240)
        assert push(root, url) == 2
        assert "has other contents ('video/train-000000.tar')" in capsys.readouterr().err


def test_a_stopped_push_to_the_hub_continues(hub, root, capsys):
    def stop(line: str) -> int | None:
        return 400 if line.startswith("PUT ") and len(hub.sent("PUT")) > 2 else None

    hub.fail = stop
    assert push(root, "hf://datasets/me/films") == 1
    message = capsys.readouterr().err
    assert "hf://datasets/me/films: the upload failed (" in message and not SECRETS.search(message)
    there = hub.repositories["datasets/me/films"].files
    assert CARD_FILE not in there and "build.json" not in there
    sent, hub.fail = set(hub.lfs), lambda line: None
    hub.asked.clear()
    assert push(root, "hf://datasets/me/films") == 0
    assert sent and not {path.partition("?")[0].rpartition("/")[2] for path in hub.sent("PUT")} & sent
    assert stored(hub, "hf://datasets/me/films") == files_of(root)


def test_a_stopped_push_to_s3_continues(bucket, root, monkeypatch, capsys):
    put, calls = object_store.obstore.put, []

    def stop(store, name, *arguments, **options):
        calls.append(name)
        if len(calls) == 4:
            raise object_store.obstore.exceptions.GenericError("Generic S3 error: http://x/?Signature=very-secret")
        return put(store, name, *arguments, **options)

    monkeypatch.setattr(object_store.obstore, "put", stop)
    assert push(root, "s3://films/a") == 1
    message = capsys.readouterr().err
    assert "s3://films/a: the upload failed (" in message and not SECRETS.search(message)
    there = {item.key for item in bucket.objects.all()}
    assert there and not there & {"a/build.json", f"a/{CARD_FILE}"}
    calls.clear()
    calls.extend(["-"] * 4)
    assert push(root, "s3://films/a") == 0
    assert not {f"a/{name}" for name in calls} & there
    assert {item.key.removeprefix("a/") for item in bucket.objects.all()} == files_of(root).keys()


def test_what_the_user_wrote_on_the_hub_stays(hub, root, capsys):
    assert push(root, "hf://datasets/me/films") == 0
    repository = hub.repositories["datasets/me/films"]
    card = repository.files[CARD_FILE].decode().replace("---\n", "---\nlicense: cc-by-4.0\n", 1)
    repository.files[CARD_FILE] = card.encode()
    repository.files["build.json"] = b"of a smaller root"
    assert push(root, "hf://datasets/me/films") == 0
    assert repository.files[CARD_FILE].decode() == card
    assert repository.files["build.json"] == (root / "build.json").read_bytes()
    (root / CARD_FILE).write_text((root / CARD_FILE).read_text().replace("---\n", "---\nlicense: mit\n", 1))
    capsys.readouterr()
    assert push(root, "hf://datasets/me/films") == 2
    assert "edited here and there" in capsys.readouterr().err
    assert push(root, "hf://datasets/me/films", "--replace") == 0
    assert b"license: mit" in repository.files[CARD_FILE]


def test_a_card_that_is_too_large_is_not_fetched(hub, root, capsys):
    assert push(root, "hf://datasets/me/films") == 0
    hub.repositories["datasets/me/films"].files[CARD_FILE] = bytes(MAX_CARD_BYTES + 1)
    hub.asked.clear()
    assert push(root, "hf://datasets/me/films") == 2
    assert f"{CARD_FILE}: the card there has over" in capsys.readouterr().err
    assert not any("/resolve/" in line for line in hub.asked)


def test_another_root_is_refused_or_replaced(hub, root, capsys):
    assert push(root, "hf://buckets/me/films") == 0
    files = hub.buckets["me/films"]
    files["video/train-000007.tar"] = files["video/train-000000.tar"]
    before = dict(files)
    assert push(root, "hf://buckets/me/films") == 2
    assert "has other contents ('video/train-000007.tar')" in capsys.readouterr().err
    assert files == before
    assert push(root, "hf://buckets/me/films", "--replace") == 0
    assert stored(hub, "hf://buckets/me/films") == files_of(root)


def test_a_root_without_a_card_gets_one_there(hub, root):
    card = (root / CARD_FILE).read_bytes()
    (root / CARD_FILE).unlink()
    assert push(root, "hf://datasets/me/films") == 0
    assert hub.repositories["datasets/me/films"].files[CARD_FILE] == card
    assert not (root / CARD_FILE).exists()


def test_only_sound_and_finished_roots_are_sent(hub, root, capsys):
    shard = root / "video" / "train-000000.tar"
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    assert push(root, "hf://datasets/me/films") == 1
    assert "video/train-000000.tar" in capsys.readouterr().err
    (root / "build.json").unlink()
    assert push(root, "hf://datasets/me/films") == 2
    assert "no finished shards here" in capsys.readouterr().err
    assert hub.asked == []


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("hf://models/me/films", "not hf://datasets/OWNER/NAME"),
        ("hf://datasets/films", "not hf://datasets/OWNER/NAME"),
        ("https://me:secret@host/path", "not hf://datasets/OWNER/NAME"),
        ("shards/there", "not hf://datasets/OWNER/NAME"),
        ("hf://datasets/me/films/../other", "no file can have"),
        ("s3://", "s3://: not s3://BUCKET/PATH"),
    ],
)
def test_bad_addresses_are_one_line(url, text, tmp_path, capsys):
    assert main([str(tmp_path), url]) == 2
    message = capsys.readouterr().err
    assert text in message and message.count("\n") == 1 and "secret" not in message


def test_a_login_that_may_not_write_is_one_line(hub, bucket, root, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_other-secret")
    assert push(root, "hf://datasets/me/films") == 2
    assert push(root, "hf://buckets/me/films") == 2
    assert push(root, "s3://no-such-bucket/a") == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(": the hub refuses")[0] for line in lines[:2]] == [
        "error: hf://datasets/me/films",
        "error: hf://buckets/me/films",
    ]
    assert all("set HF_TOKEN" in line and "hf_other" not in line for line in lines[:2])
    assert lines[2].startswith("error: s3://no-such-bucket/a: no such bucket") and len(lines) == 3
