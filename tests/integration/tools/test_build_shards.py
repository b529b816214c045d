"""The build command: its results for good and bad input, and that other readers can read them."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from pathlib import Path

import decord
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from huggingface_hub import constants

from framestream.pipeline.shards.index import Index, row_values
from framestream.pipeline.shards.ledger import read_ledger
from framestream.tools.build_shards import main
from tests.helpers.corpora import media_corpus as corpus
from tests.helpers.corpora.media_corpus import TEXT, TURNS
from tests.helpers.corpora.snapshot import members, snapshot
from tests.helpers.paths import BUILD_SHARDS, ROOT

#: Samples that cannot be built, by id, and the reason that the ledger must give.
BAD = {
    "missing": ({"video": "missing.mp4"}, "missing_file"),
    "truncated": ({"video": "truncated.mp4"}, "truncated"),
    "sound": ({"video": "sound.mp4"}, "no_video_stream"),
    "empty": ({"video": "empty.mp4"}, "empty_file"),
    "page": ({"video": "page.mp4"}, "not_media"),
    "page-still": ({"image": "page.jpg"}, "not_media"),
    "late-clip": ({"video": "a.mp4", "start": 50, "end": 60}, "bad_clip"),
    "link": ({"video": "link.mp4"}, "outside_root"),
    "link-folder": ({"video": "outside/secret.mp4"}, "outside_root"),
    "climbs": ({"video": "../secret.mp4"}, "outside_root"),
    "absolute": ({"video": "/secret.mp4"}, "outside_root"),
    "one-of-two": (
        {"image": ["1.png", "page.jpg"], "conversations": [{"from": "human", "value": "<image><image>"}, TURNS[1]]},
        "not_media",
    ),
    "no-conversations": ({"video": "a.mp4", "conversations": None}, "no_conversations"),
    "bad-mark": ({"image": ["1.png", "1.png"]}, "placeholder_mismatch"),
}


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "media"
    for seed, name in enumerate("abcdefgh"):
        corpus.video(folder / f"{name}.mp4", seed=seed)
    corpus.video(folder / "sub" / "deep.mp4", seconds=1, seed=9)
    corpus.gif(folder / "wave.gif")
    for number in range(1, 6):
        corpus.still(folder / "frames" / f"{number:05d}.jpg", seed=number)
        corpus.still(folder / f"{number}.png", seed=number)
    secret = corpus.video(folder.parent / "elsewhere" / "secret.mp4")
    (folder / "link.mp4").symlink_to(secret)
    (folder / "outside").symlink_to(secret.parent)
    (folder / "truncated.mp4").write_bytes((folder / "a.mp4").read_bytes()[:1500])
    cut = corpus.video(folder / "cut.mp4", seconds=6, seed=20, faststart=True)
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size * 4 // 5])
    corpus.sound(folder / "sound.mp4")
    (folder / "empty.mp4").touch()
    for name in ("page.mp4", "page.jpg"):
        (folder / name).write_text("<!DOCTYPE html><html><body>404</body></html>")
    return folder


@pytest.fixture(scope="module")
def made(media):
    """A build by the command, started by path in another folder: its manifest, root, output and the samples."""
    base = media.parent
    two = [{"from": "human", "value": "<image> or <image>?"}, TURNS[1]]
    samples = {
        "films.jsonl": [{"id": f"f-{name}", "video": f"{name}.mp4", "conversations": TURNS} for name in "abcdefgh"],
        "again.json": [
            {"id": 1, "video": "./a.mp4", "conversations": TURNS, "note": "same as f-a"},
            {"id": 2, "video": "a.mp4", "start": "0.5", "end": 2.5, "conversations": TURNS},
            {"id": 3, "video": "cut.mp4", "conversations": TURNS},
            {"id": 4, "video": "wave.gif", "video_read_type": "gif", "conversations": TURNS},
            {"id": 5, "video": "frames", "video_read_type": "img", "conversations": TURNS},
            {"id": 6, "image": "1.png", "conversations": TURNS},
            {"id": 7, "image": ["2.png", "1.png"], "conversations": two},
            {"id": 8, "conversations": TEXT},
        ],
        "deep.json": [{"id": "d", "video": "deep.mp4", "conversations": TURNS}],
        "bad.json": [{"id": name, "conversations": TURNS, **fields} for name, (fields, _) in BAD.items()],
        "held.jsonl": [
            {"id": "h1", "video": "a.mp4", "conversations": TURNS},
            {"id": "h2", "video": "sub/deep.mp4", "conversations": TURNS},
            {"id": "h3", "image": "5.png", "conversations": TURNS},
        ],
        "nothing.json": [],
    }
    for name, values in samples.items():
        corpus.annotations(base / name, values)
    root = str(media)
    entries = [{"annotation": str(base / name), "root": root} for name in samples]
    entries[2]["root"] = f"{root}/sub"
    entries[4]["split"] = "val"
    path = corpus.manifest(base / "stage2.yaml", entries)
    command = [sys.executable, str(BUILD_SHARDS), "--stage", "2", "--manifest", str(path), "--workers", "2"]
    ran = subprocess.run(command, cwd=base, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert ran.returncode == 3, ran.stderr  # nothing of bad.json can be built
    return {"manifest": path, "root": base / "shards" / "stage2", "ran": ran, "samples": samples}


def test_every_dialogue_is_in_a_shard_or_in_the_ledger(made):
    written = [json.loads(sample["json"]) for sample in members(made["root"], "dialogue").values()]
    rows = [row for row in read_ledger(made["root"]).to_pylist() if row["kind"] == "dialogue"]
    found = Counter((item["entry"], item["id"]) for item in written)
    found += Counter((row["entry"], row["dialogue"]) for row in rows)
    planned = {(name.split(".")[0], str(item["id"])) for name, items in made["samples"].items() for item in items}
    assert found == Counter(planned)
    assert len({item["key"] for item in [*written, *rows]}) == len(planned)


@pytest.mark.parametrize("name", BAD)
def test_bad_input_has_its_reason(made, name):
    ledger = [row for row in read_ledger(made["root"]).to_pylist() if row["dialogue"] == name]
    assert [row["reason"] for row in ledger] == [BAD[name][1]]
    assert ledger[0]["entry"] == "bad" and ledger[0]["source"].endswith(f"bad.json#{list(BAD).index(name)}")


def test_bad_media_are_in_the_ledger_and_recovered_are_marked(made):
    rows = read_ledger(made["root"]).to_pylist()
    lost = {row["source"].rpartition("/")[2]: row["reason"] for row in rows if row["kind"] == "media"}
    assert lost["missing.mp4"] == "missing_file" and lost["page.jpg"] == "not_media" and lost["a.mp4"] == "bad_clip"
    assert [row["source"].rpartition("/")[2] for row in rows if row["kind"] == "salvaged"] == ["cut.mp4"]
    assert all(row["message"] and "\n" not in row["message"] for row in rows)


def test_an_empty_annotation_file_is_a_row_and_a_warning(made):
    rows = [row for row in read_ledger(made["root"]).to_pylist() if row["kind"] == "entry"]
    assert [(row["entry"], row["reason"]) for row in rows] == [("nothing", "empty_annotation")]
    assert "nothing" in made["ran"].stderr


def test_media_are_built_once_in_the_split_that_names_them_first(made):
    index = Index.open(made["root"])
    found = Counter(zip(index.media["source"].to_pylist(), index.media["start"].to_pylist(), strict=True))
    folder = made["manifest"].parent / "media"
    assert set(found.values()) == {1}
    assert found[f"{folder}/a.mp4", 0.0] == 1 and found[f"{folder}/a.mp4", 0.5] == 1
    assert f"{folder}/sub/deep.mp4" in {name for name, _ in found}, "named through the nested root first"
    splits = dict(zip(index.media["source"].to_pylist(), index.media["split"].to_pylist(), strict=True))
    assert splits[f"{folder}/a.mp4"] == splits[f"{folder}/sub/deep.mp4"] == "train"
    assert splits[f"{folder}/5.png"] == "val"
    assert {path.name for path in (made["root"] / "image").glob("*.tar")} == {"train-000000.tar", "val-000000.tar"}
    assert len(list((made["root"] / "video").glob("train-*.tar"))) > 1


def test_dialogues_name_their_media(made):
    index = Index.open(made["root"])
    dialogues = {(row["entry"], row["id"]): row for row in index.dialogues.to_pylist()}
    source = index.media["source"].to_pylist()

    def names(entry, id):
        return [source[row].rpartition("/")[2] for row in dialogues[entry, id]["media"]]

    assert names("again", "7") == ["2.png", "1.png"] and names("again", "8") == []
    assert dialogues["again", "1"]["media"] == dialogues["films", "f-a"]["media"] == dialogues["held", "h1"]["media"]
    assert dialogues["again", "2"]["media"] != dialogues["again", "1"]["media"]
    assert json.loads(dialogues["again", "1"]["meta"]) == {"note": "same as f-a"}
    assert json.loads(dialogues["films", "f-b"]["conversations"]) == TURNS
    keys = index.media["key"].to_pylist()
    for sample in members(made["root"], "dialogue").values():
        value = json.loads(sample["json"])
        row = dialogues[value["entry"], value["id"]]
        assert json.loads(value["media"]) == [keys[place] for place in row["media"]]


def test_index_points_at_the_bytes_that_webdataset_and_decord_read(made):
    index = Index.open(made["root"])
    samples = members(made["root"], "video") | members(made["root"], "image")
    assert set(samples) == set(index.media["key"].to_pylist())
    for place, row in enumerate(index.media.to_pylist()):
        data = samples[row["key"]]["mp4" if row["kind"] == "video" else "jpg"]
        with open(index.shard_path(row["shard"]), "rb") as file:
            file.seek(row["offset"])
            assert file.read(row["size"]) == data
            file.seek(row["frame_offset"][0])
            assert file.read(2) == b"\xff\xd8"
        assert hashlib.sha256(data).hexdigest() == row["sha256"]
        if row["kind"] == "video":
            assert len(decord.VideoReader(io.BytesIO(data))) == len(row["timestamps"])
            assert row["width"] == 224 and len(row["sample"]) in (4, 8)
            assert np.all(np.diff(row_values(index.media["timestamps"], place)) > 0)


def test_media_show_the_dialogues_about_them_alone(made):
    index = Index.open(made["root"])
    videos = {name: json.loads(sample["json"]) for name, sample in members(made["root"], "video").items()}
    source = dict(zip(index.media["source"].to_pylist(), index.media["key"].to_pylist(), strict=True))
    about = json.loads(videos[source[f"{made['manifest'].parent}/media/b.mp4"]]["dialogues"])
    assert [(item["entry"], item["id"], item["conversations"]) for item in about] == [("films", "f-b", TURNS)]


def test_tars_are_plain_and_the_summary_counts(made):
    for path in made["root"].rglob("*.tar"):
        with tarfile.open(path, "r:") as tar:
            assert all(item.isreg() and item.mtime == 0 and item.uid == 0 for item in tar)
    record = json.loads((made["root"] / "build.json").read_text())
    total = Counter()
    for entry in record["entries"]:
        total.update({name: entry[name] for name in ("planned", "dialogues", "media", "frames")})
    index = Index.open(made["root"])
    assert total["dialogues"] == len(index.dialogues) and total["media"] == len(index.media)
    assert total["frames"] == sum(len(row) for row in index.media["timestamps"].to_pylist())
    assert total["planned"] == sum(map(len, made["samples"].values()))
    assert not (made["root"] / "work").exists()
    printed = made["ran"].stdout
    assert "outside_root" in printed and printed.count("shards") == printed.count("shards:") + printed.count("shards/")
    counts = [f"{len(list((made['root'] / name).glob('*.tar')))} {name}" for name in ("video", "image", "dialogue")]
    assert f"\nshards: {made['root']} ({', '.join(counts)})\n" in printed
    assert f"left out, with reasons: {made['root'] / 'ledger' / 'ledger.parquet'}\n" in printed
    assert "entry empty_annotation 1" in next(line for line in printed.splitlines() if line.startswith("total"))


def run(made, *options):
    return main(["--stage", "2", "--manifest", str(made["manifest"]), "--workers", "1", *options])


def test_a_finished_root_is_left_alone(made, capsys):
    before = snapshot(made["root"])
    assert run(made) == 3
    assert "nothing to do" in capsys.readouterr().out
    assert snapshot(made["root"]) == before


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--set", "frames.max=12"), "frames.max was 8 and is now 12"),
        (("--set", "frames.quality=80"), "frames.quality"),
        (("--set", "seed=3"), "seed"),
        (("--limit", "1"), "limit"),
    ],
)
def test_another_build_is_refused_where_one_is_finished(made, capsys, options, named):
    before = snapshot(made["root"])
    assert run(made, *options) == 2
    error = capsys.readouterr().err
    assert named in error and "--out" in error and error.count("\n") == 1
    assert snapshot(made["root"]) == before


def test_other_library_versions_are_refused(made, capsys, monkeypatch):
    monkeypatch.setattr(
        "framestream.tools.builder.build_spec.LIBRARIES", ("av", "numpy", "pillow", "pyarrow", "simplejpeg", "pyyaml")
    )
    assert run(made) == 2
    assert "libraries." in capsys.readouterr().err


def test_settings_of_reading_alone_do_not_matter(made, capsys):
    assert run(made, "--set", "frames.time_message=long", "--set", "text.max_tokens=99") == 3
    assert "nothing to do" in capsys.readouterr().out


def test_dry_run_writes_nothing_and_counts(made, tmp_path, capsys):
    assert run(made, "--dry-run", "--out", str(tmp_path / "new")) == 0
    assert list(tmp_path.iterdir()) == []
    printed = capsys.readouterr().out
    table = {line.split()[0]: line.split() for line in printed.partition("\n\n")[0].splitlines()}
    assert table["films"][1:4] == ["8", "8", "8"] and table["again"][1:3] == ["8", "6"]
    assert table["bad"][1] == str(len(BAD)) and int(table["bad"][3]) == int(table["bad"][2]) - 3
    place = made["manifest"].parent / "media"
    assert f"1 of {table['bad'][2]} media are not available (missing_file); first {place}/missing.mp4: " in printed
    assert f"2 of {table['bad'][2]} media are not available (outside_root); first {place}/link.mp4: " in printed
    assert "outside_root: " in printed and "\n  bad (2)\n" in printed
    assert table["nothing"][6] == "yes" and "1 entry: left out, empty_annotation: " in printed


def published_dry_run(capsys, *options):
    path = ROOT / "manifests" / "stage3.yaml"
    assert main(["--stage", "3", "--manifest", str(path), "--dry-run", *options]) == 0
    return capsys.readouterr().out.splitlines()


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """The hub is not asked, and nothing was fetched before."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_offline_dry_run_of_the_published_recipe_fits_a_terminal(offline, capsys):
    head, _, *lines = published_dry_run(capsys)
    entries = lines[: lines.index("")]
    assert len({line.split()[0] for line in entries}) == len(entries) == 104
    assert max(map(len, [head, *entries])) <= 144
    assert sum("fetch it and map hf:OpenGVLab/VideoChat-Flash-Training-Data to" in line for line in lines) == 1
    assert sum("HF_HUB_OFFLINE is set" in line for line in lines) == 2, "one cause for each hub repository"
    assert lines[-1] == "104 entries, 0 resolved, 104 unresolved"


def test_offline_dry_run_with_the_example_of_a_root_map(offline, capsys):
    lines = published_dry_run(capsys, "--set", f"data.roots={ROOT / 'manifests' / 'roots.example.yaml'}")
    assert lines[-1] == "104 entries, 0 resolved, 104 unresolved"


def test_a_hub_that_does_not_answer_is_not_asked_for_every_entry(capsys, monkeypatch, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        asked = []

        def hang_up():
            with contextlib.suppress(OSError):
                while True:
                    asked.append(listener.accept()[0].close())

        thread = threading.Thread(target=hang_up)
        thread.start()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        lines = published_dry_run(capsys)
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert lines[-1] == "104 entries, 0 resolved, 104 unresolved"
    assert 0 < len(asked) <= 20


def test_a_report_of_a_dry_run(made, tmp_path, capsys):
    folder = tmp_path / "report"
    assert run(made, "--dry-run", "--report", str(folder)) == 0
    assert capsys.readouterr().out.endswith(f"report: {folder}/plan.html, {folder}/plan.parquet\n")
    assert {path.name for path in folder.iterdir()} == {"plan.html", "plan.parquet"}
    rows = {row["entry"]: row for row in pq.read_table(folder / "plan.parquet").to_pylist()}
    media = made["manifest"].parent / "media"
    films = rows["films"]
    assert (films["dialogues"], films["usable"], films["media"], films["found"]) == (8, 8, 8, 8)
    assert films["bytes"] == sum((media / f"{name}.mp4").stat().st_size for name in "abcdefgh")
    assert films["place"] == str(media) and films["resolved"] and films["problems"] == []
    problems = {(item["about"], item["reason"]): item["count"] for item in rows["bad"]["problems"]}
    expected = Counter(reason for _, reason in BAD.values())
    assert problems["dialogue", "outside_root"] == 2 and problems["media", "missing_file"] == 1
    assert problems["dialogue", "placeholder_mismatch"] == expected["placeholder_mismatch"]
    page = (folder / "plan.html").read_text()
    assert all(f"<td>{name}</td>" in page for name in rows) and "missing.mp4" in page


def test_a_report_goes_with_a_dry_run(made, tmp_path):
    with pytest.raises(SystemExit) as caught:
        run(made, "--report", str(tmp_path))
    assert caught.value.code == 2


def test_limit_takes_the_first_dialogues_of_each_entry(made, tmp_path):
    assert run(made, "--limit", "2", "--out", str(tmp_path)) == 3
    index = Index.open(tmp_path / "stage2")
    found = Counter(index.dialogues["entry"].to_pylist())
    assert found == {"films": 2, "again": 2, "deep": 1, "held": 2}


@pytest.fixture
def plain_text(tmp_path):
    """A manifest of one entry, and its annotation file of one dialogue."""
    path = corpus.annotations(tmp_path / "mine.json", [{"id": 1, "conversations": TEXT}])
    entries = [{"annotation": str(path)}]
    return {"annotation": path, "manifest": corpus.manifest(tmp_path / "stage2.yaml", entries), "folder": tmp_path}


def test_a_build_that_leaves_nothing_out_names_no_ledger(plain_text, capsys):
    assert run(plain_text) == 0
    printed = capsys.readouterr().out
    assert printed.endswith(f"shards: {plain_text['folder'] / 'shards' / 'stage2'} (1 dialogue)\n")
    assert "ledger" not in printed


def test_shards_do_not_depend_on_what_training_needs(plain_text):
    assert run(plain_text) == 0
    root = plain_text["folder"] / "shards" / "stage2"
    before = snapshot(root)
    shutil.rmtree(root)
    value = yaml.safe_load(plain_text["manifest"].read_text())
    kept = {name: value[name] for name in ("stage", "data", "frames", "shards", "seed", "images") if name in value}
    plain_text["manifest"].write_text(yaml.safe_dump(kept))
    assert run(plain_text) == 0
    assert snapshot(root) == before


def test_files_have_the_mode_that_the_umask_gives(plain_text):
    before = os.umask(0o027)
    try:
        assert run(plain_text) == 0
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (plain_text["folder"] / "shards").rglob("*") if path.is_file()}
    assert modes == {0o640}


def test_a_changed_annotation_file_is_named(plain_text, capsys):
    assert run(plain_text) == 0
    corpus.annotations(plain_text["annotation"], [{"id": 2, "conversations": TEXT}])
    assert run(plain_text) == 2
    assert f"{plain_text['annotation']} has changed since the build; " in capsys.readouterr().err
    plain_text["annotation"].unlink()
    assert run(plain_text, "--skip-unresolved") == 2
    assert f"{plain_text['annotation']} was available for the build and is missing now; " in capsys.readouterr().err


def test_an_entry_that_is_gone_is_named(plain_text, capsys):
    assert run(plain_text) == 0
    other = corpus.annotations(plain_text["folder"] / "other.json", [{"id": 1, "conversations": TEXT}])
    corpus.manifest(plain_text["manifest"], [{"annotation": str(other)}])
    assert run(plain_text) == 2
    assert "entry mine is missing from the manifest; " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "named"), [("", "no samples"), ("[]", "no samples"), ('[{"id": 1}]', "list of turns")]
)
def test_a_build_without_dialogues_is_refused_before_writing(plain_text, capsys, content, named):
    plain_text["annotation"].write_text(content)
    assert run(plain_text) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "no dialogue can be used: entry mine: " in error and named in error
    assert not (plain_text["folder"] / "shards").exists()
    corpus.annotations(plain_text["annotation"], [{"id": 1, "conversations": TEXT}])
    assert run(plain_text) == 0, "the folder is free for the corrected file"


@pytest.mark.parametrize("module", ["pyarrow", "framestream.tools.builder.build"])
def test_stopped_while_it_is_imported(plain_text, module):
    """SIGINT from within the import of a module, as by Ctrl-C in the first half second."""
    code = f"""
import os, runpy, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
sys.argv[1:] = ["--stage", "2", "--manifest", {str(plain_text["manifest"])!r}]
runpy.run_path({str(BUILD_SHARDS)!r}, run_name="__main__")
"""
    root = ROOT
    ran = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert ran.returncode == 130 and ran.stderr == "Stopped. Run the same command to continue.\n"


@pytest.mark.parametrize("seconds", [0.0, 0.2])
def test_stopped_while_workers_start(made, tmp_path, seconds):
    """SIGINT to all processes of the terminal: workers say nothing, wherever in their imports they are."""
    command = [
        sys.executable,
        str(BUILD_SHARDS),
        "--stage",
        "2",
        "--manifest",
        str(made["manifest"]),
        "--out",
        str(tmp_path),
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not (tmp_path / "stage2" / "work" / "tasks").is_dir():
        assert process.poll() is None
        time.sleep(0.005)
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=60)[1] == "Stopped. Run the same command to continue.\n"
    assert process.returncode == 130


def test_trying_again_touches_only_the_rows_of_what_failed(plain_text, capsys):
    """An entry without failures gets no row, and an annotation file without samples keeps its own."""
    nothing = corpus.annotations(plain_text["folder"] / "nothing.json", [])
    lost = corpus.annotations(plain_text["folder"] / "lost.json", [{"image": "no.png", "conversations": TURNS}])
    entries = [{"annotation": str(path)} for path in (nothing, plain_text["annotation"], lost)]
    entries[2]["root"] = str(plain_text["folder"])
    corpus.manifest(plain_text["manifest"], entries)
    root = plain_text["folder"] / "shards" / "stage2"
    found = {}
    for attempts, options in ((1, ()), (2, ("--retry-failed",))):
        assert run(plain_text, *options) == 3
        found[attempts] = [tuple(row.values()) for row in read_ledger(root).to_pylist()]
        captured = capsys.readouterr()
        line = captured.err.splitlines()[-1]
        assert line.startswith("error: none of the 1 dialogues of entry lost was built, 1 because of missing_file: ")
        assert (
            f"{root.parents[1]}/no.png: cannot be opened" in line
            and "; correct the files and add --retry-failed, or " in line
        )
        printed = captured.out.splitlines()
        assert [line.split(", ")[0] for line in printed if line.startswith("  ")] == [
            "  empty_annotation: 1 entry",
            "  missing_file: 1 media",
        ]
    kinds = {("nothing", "entry", "empty_annotation"), ("lost", "media", "missing_file")}
    for attempts, rows in found.items():
        assert {(row[0], row[4], row[5]) for row in rows} == kinds | {("lost", "dialogue", "missing_file")}
        assert [row[7] for row in rows if row[4] == "media"] == [attempts] and len(rows) == 3


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--cache-gb", "lots"), "--cache-gb: must be a number from 0 to 100,000, not 'lots'"),
        (("--cache-gb", "-1"), "--cache-gb: must be a number from 0 to 100,000, not '-1'"),
        (("--cache-gb", "nan"), "--cache-gb: must be a number from 0 to 100,000, not 'nan'"),
        (("--workers", "0"), "--workers: must be a whole number from 1 to 4,096, not '0'"),
        (("--limit", "1.5"), "--limit: must be a whole number from 1 to 2,147,483,647, not '1.5'"),
        (("--rank", "1"), "--rank and --of must be given together"),
        (("--of", "4"), "--rank and --of must be given together"),
        (("--rank", "5", "--of", "2"), "--rank 5: must be from 0 to 1, because --of is 2"),
        (("--rank", "-1", "--of", "2"), "--rank: must be a whole number from 0 to 2,147,483,647, not '-1'"),
        (("--address", "host:1"), "--address needs --executor ray"),
        (("--report", "plan"), "--report needs --dry-run"),
        (("--retry-failed", "--rank", "0", "--of", "2"), "--retry-failed works on one machine"),
    ],
)
def test_options_that_make_no_sense_are_refused(plain_text, capsys, options, named):
    with pytest.raises(SystemExit) as stopped:
        run(plain_text, *options)
    assert stopped.value.code == 2 and named in capsys.readouterr().err
    assert not (plain_text["folder"] / "shards").exists()


# Entries that cannot be resolved, and manifests that cannot be used --------------------------------------------------


@pytest.fixture
def unresolved(media, tmp_path, offline):
    films = corpus.annotations(tmp_path / "films.jsonl", [{"id": 1, "video": "a.mp4", "conversations": TURNS}] * 3)
    text = corpus.annotations(tmp_path / "text.jsonl", [{"id": 1, "conversations": TEXT}])
    entries = [
        {"annotation": str(text)},
        {"annotation": str(films), "root": "https://example.org/films"},
        {"annotation": "hf:some/set:annotations/x.json", "root": "https://example.org/x"},
        {"annotation": str(tmp_path / "absent.json"), "root": str(media)},
    ]
    return {"entries": entries, "manifest": corpus.manifest(tmp_path / "stage2.yaml", entries), "folder": tmp_path}


def test_dry_run_lists_what_is_not_here(unresolved, capsys):
    assert run(unresolved, "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    films, hub, absent = (next(line for line in lines if line.startswith(name)) for name in ("films", "x ", "absent"))
    assert " 3 " in films and "https://example.org/films" in films
    assert [films.split()[6], hub.split()[5], absent.split()[5]] == ["no", "no", "no"]
    assert films.split()[1:4] == ["3", "1", "0"]
    assert hub.split()[1:5] == absent.split()[1:5] == ["?", "?", "?", "?"]
    causes = dict(zip(lines, lines[1:], strict=False))
    mapped = next(names for cause, names in causes.items() if cause.startswith("2 entries: the root is not a folder"))
    assert mapped.split() == ["films,", "x"], "one cause of two entries is told once"
    assert any("hf:some/set" in cause and names == "  x" for cause, names in causes.items())
    assert any(
        "absent.json: no such annotation file" in cause and names == "  absent" for cause, names in causes.items()
    )
    assert lines[-1] == "4 entries, 1 resolved, 3 unresolved"
    assert sorted(path.name for path in unresolved["folder"].iterdir()) == ["films.jsonl", "stage2.yaml", "text.jsonl"]


@pytest.mark.parametrize(("left", "named"), [(3, "absent.json"), (2, "hf:some/set"), (1, "roots.example.yaml")])
def test_a_build_refuses_what_is_not_here_before_writing(unresolved, capsys, left, named):
    entries = [unresolved["entries"][0], unresolved["entries"][left]]
    corpus.manifest(unresolved["manifest"], entries)
    assert run(unresolved) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and any(part in error for part in named.split("|")) and "entry " in error
    assert not (unresolved["folder"] / "shards").exists()


def test_what_is_not_here_is_left_out_when_asked(unresolved):
    assert run(unresolved, "--skip-unresolved") == 0
    root = unresolved["folder"] / "shards" / "stage2"
    ledger = Counter((row["entry"], row["kind"], row["reason"]) for row in read_ledger(root).to_pylist())
    assert ledger == {
        ("films", "dialogue", "unresolved"): 3,
        ("x", "entry", "unresolved"): 1,
        ("absent", "entry", "unresolved"): 1,
    }
    assert Index.open(root).dialogues["entry"].to_pylist() == ["text"]


def test_a_root_map_says_where_things_are(unresolved, media):
    folder = unresolved["folder"]
    corpus.annotations(folder / "hub" / "annotations" / "x.json", [{"id": 9, "image": "1.png", "conversations": TURNS}])
    places = {"https://example.org/films": f"dir:{media}", "x": f"dir:{media}", "hf:some/set": f"dir:{folder / 'hub'}"}
    (folder / "roots.yaml").write_text(json.dumps(places))
    data = {"entries": unresolved["entries"][:3], "roots": str(folder / "roots.yaml")}
    corpus.manifest(unresolved["manifest"], [], data=data)
    assert run(unresolved) == 0
    index = Index.open(folder / "shards" / "stage2")
    assert index.dialogues["entry"].to_pylist() == ["text", "films", "films", "films", "x"]
    assert index.media["source"].to_pylist() == ["https://example.org/films/a.mp4", "https://example.org/x/1.png"]


@pytest.mark.parametrize(
    ("places", "named"),
    [
        ({"HTTPS://example.org/films/": "dir:."}, "; it has `HTTPS://example.org/films/`"),
        ({"films": "dir:absent"}, "roots.yaml: films: absent is not a folder"),
        ({"films": {"archives": "dir:absent/a.zip"}}, "films: dir:absent/a.zip: absent is not a folder"),
        ({"films": {"archives": ["dir:*.zip"]}}, "roots.yaml: films: dir:*.zip: no file matches"),
        ({"films": {"archives": "dir:*/a.zip"}}, "data.roots: "),
        ({"films": {"archives": "url:ftp://a"}}, "films: "),
        ({}, "map the root to a location in "),
    ],
)
def test_a_root_map_that_leads_nowhere_is_refused(unresolved, capsys, places, named):
    (unresolved["folder"] / "roots.yaml").write_text(json.dumps(places))
    data = {"roots": str(unresolved["folder"] / "roots.yaml"), "cache": str(unresolved["folder"] / "cache")}
    corpus.manifest(unresolved["manifest"], [], data={**data, "entries": unresolved["entries"][1:2]})
    assert run(unresolved) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and named in error
    assert not (unresolved["folder"] / "shards").exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"frames": {"sampler": "middle", "min": "four", "max": 8, "size": 224}}, "frames.min"),
        ({"data": {"entries": [{"annotation": "a.json", "sampling": "frist:10"}]}}, "sampling"),
        ({"data": {"entries": [{"annotation": "a.json"}], "roots": "absent.yaml"}}, "data.roots: absent.yaml: "),
        ({"data": {"entries": "a.json"}}, "data.entries"),
        ({"stage": 3}, "stage"),
    ],
)
def test_a_bad_manifest_is_one_clear_line(tmp_path, capsys, change, named):
    path = corpus.manifest(tmp_path / "stage2.yaml", [{"annotation": "a.json"}], **change)
    assert main(["--stage", "2", "--manifest", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and named in error
    assert [item.name for item in tmp_path.iterdir()] == ["stage2.yaml"]


def test_a_broken_annotation_file_is_one_clear_line(tmp_path, capsys):
    (tmp_path / "a.json").write_text('[{"id": 1,')
    path = corpus.manifest(tmp_path / "stage2.yaml", [{"annotation": str(tmp_path / "a.json")}])
    assert main(["--stage", "2", "--manifest", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "a.json" in error
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a.json", "stage2.yaml"]


def test_a_folder_with_other_things_is_refused(made, tmp_path, capsys):
    (tmp_path / "stage2").mkdir()
    (tmp_path / "stage2" / "thesis.txt").write_text("mine")
    assert run(made, "--out", str(tmp_path)) == 2
    assert "thesis.txt" in capsys.readouterr().err
    assert (tmp_path / "stage2" / "thesis.txt").read_text() == "mine"


def test_two_builds_of_one_folder_do_not_meet(made, tmp_path, capsys):
    (tmp_path / "stage2").mkdir()
    handle = os.open(tmp_path / "stage2" / "build.lock", os.O_WRONLY | os.O_CREAT)
    fcntl.flock(handle, fcntl.LOCK_EX)
    assert run(made, "--out", str(tmp_path)) == 2
    os.close(handle)
    assert "another build is running here" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "stage2").iterdir()] == ["build.lock"]


def test_held_out_dialogues_are_not_told_with_media_to_train_on(made):
    told = {}
    for folder in ("video", "image"):
        for sample in members(made["root"], folder).values():
            item = json.loads(sample["json"])
            about = told.setdefault(Path(item["source"]).name, set())
            about |= {dialogue["id"] for dialogue in json.loads(item["dialogues"])}
    assert told["a.mp4"] == {"f-a", "1", "2"}, "h1 of the held-out entry asks about it, too"
    assert told["5.png"] == {"h3"}
