"""An export on a hub of this machine: a stopped upload, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from framestream.trainer.export import main
from tests.helpers.servers.upload_hub import upload_hub

EXPORT = {
    "config.json": b"{}",
    "generation_config.json": b"{}",
    "model-00001-of-00002.safetensors": b"1" * 2000,
    "model-00002-of-00002.safetensors": b"2" * 2000,
    "README.md": b"# A model\n",
}


@pytest.fixture
def out(tmp_path) -> Path:
    (tmp_path / "out").mkdir()
    for name, data in EXPORT.items():
        (tmp_path / "out" / name).write_bytes(data)
    return tmp_path / "out"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with upload_hub(tmp_path / "xet") as running:
        running.point_at(monkeypatch)
        yield running


def push(out: Path) -> int:
    return main(["--out", str(out), "--push", "me/model"])


def test_a_stopped_push_continues_and_config_json_comes_last(hub, out, capsys):
    hub.fail = lambda line: 400 if line.startswith("PUT ") and len(hub.sent("PUT")) > 1 else None
    assert push(out) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: hf://models/me/model: the upload failed (") and "very-secret" not in message
    assert "config.json" not in hub.repositories["models/me/model"].files
    hub.fail = lambda line: None
    hub.asked.clear()
    assert push(out) == 0
    assert len(hub.sent("PUT")) == 1
    files = dict(hub.repositories["models/me/model"].files)
    del files[".gitattributes"]
    assert files == EXPORT
    hub.asked.clear()
    assert push(out) == 0
    assert hub.sent("PUT") == [] and hub.sent("POST") == []
    assert capsys.readouterr().out.endswith("5 files, compared by size and digest; 0 were sent now\n")


@pytest.mark.parametrize(
    ("name", "data", "text"),
    [
        ("config.json", b"[]", "has other contents ('config.json'); name another address, or empty it"),
        ("model.gguf", b"x", "has other contents ('model.gguf')"),
        ("README.md", b"mine", "has another README.md; save it as"),
    ],
)
def test_a_repository_with_something_else_is_refused(hub, out, capsys, name, data, text):
    assert push(out) == 0
    files = hub.repositories["models/me/model"].files
    files[name] = data
    before = dict(files)
    capsys.readouterr()
    assert push(out) == 2
    assert text in capsys.readouterr().err and hub.repositories["models/me/model"].files == before


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--push", "model"], "not OWNER/NAME"),
        (["--push", "me/model"], "no export there (no config.json)"),
        ([], "name --checkpoint, or an export with --out and --push"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, arguments, text):
    try:
        status = main(["--out", str(tmp_path), *arguments])
    except SystemExit as stop:
        status = stop.code
    assert status == 2 and text in capsys.readouterr().err
