"""One corpus in many locations: folders, archives, web servers, the hub and buckets."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import imageio_ffmpeg
import yaml

from tests.helpers.corpora import media_corpus as corpus
from tests.helpers.corpora.media_corpus import TEXT, TURNS
from tests.helpers.media.footage import BIKES
from tests.helpers.media.memory_files import pack
from tests.helpers.paths import BUILD_SHARDS
from tests.helpers.servers.fetch_hub import serve_hub
from tests.helpers.servers.s3_server import put_objects
from tests.helpers.servers.web_server import Server

FILMS, FRAMES, NOTES = "https://example.org/films", "https://example.org/tvqa", "hf:me/notes"  #: names in the manifest
BUCKET = "corpus"


class Corpus:
    """Media and annotation files as ``{path: bytes}``, and a manifest with roots that exist on no machine."""

    def __init__(self, folder: Path) -> None:
        films, frames, notes = folder / "films", folder / "frames", folder / "notes"
        for seed, name in enumerate(("a", "b", "sub dir/d é", "sub dir/e#1")):
            corpus.video(films / f"{name}.mp4", seed=seed)
        turned = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-display_rotation", "90", "-i", str(BIKES)]
        subprocess.run([*turned, "-t", "1", "-c", "copy", str(films / "turned.mp4")], check=True)
        corpus.gif(films / "wave.gif")
        for seed, name in enumerate(("1.png", "2.png", "photo.jpg")):
            corpus.still(films / name, seed=seed)
        (films / "page.mp4").write_text("<!DOCTYPE html><html><body>Sign in</body></html>")
        for number in range(1, 16):
            corpus.still(frames / "s01" / f"{number:05d}.jpg", seed=number)
        for number in (1, 2, 9, 10, 11):
            corpus.still(frames / "s02" / f"shot_{number}.png", seed=20 + number)
        two = [{"from": "human", "value": "<image> or <image>?"}, TURNS[1]]
        clips = [(None, 1), (0.5, 2), (1, None), (1.5, 2.5), (2, 3)]
        samples = [{"id": "a", "video": "a.mp4", "conversations": TURNS}]
        samples += [
            {"id": f"a{n}", "video": "a.mp4", "start": start, "end": end, "conversations": TURNS}
            for n, (start, end) in enumerate(clips)
        ]
        for name in ("b", "sub dir/d é", "sub dir/e#1", "turned", "missing", "page"):
            samples.append({"id": name, "video": f"{name}.mp4", "conversations": TURNS})
        samples += [
            {"id": "gif", "video": "wave.gif", "video_read_type": "gif", "conversations": TURNS},
            {"id": "still", "image": "photo.jpg", "conversations": TURNS},
            {"id": "two", "image": ["2.png", "1.png"], "conversations": two},
            {"id": "text", "conversations": TEXT},
        ]
        scenes = [
            {"id": "whole", "video": "s01", "conversations": TURNS},
            {"id": "scene", "video": "s01", "start": 1, "end": 4, "conversations": TURNS},
            {"id": "gaps", "video": "s02", "conversations": TURNS},
            {"id": "none", "video": "s03", "conversations": TURNS},
        ]
        held = [{"id": "h", "video": "b.mp4", "start": 1, "conversations": TURNS}]
        corpus.annotations(notes / "films.jsonl", samples)
        corpus.annotations(notes / "frames.json", scenes)
        (notes / "more").mkdir()
        (notes / "more" / "held.jsonl.gz").write_bytes(
            gzip.compress("".join(json.dumps(sample) + "\n" for sample in held).encode(), mtime=0)
        )
        self.dialogues = len(samples) + len(scenes) + len(held)
        self.folder, self.films, self.frames, self.notes = folder, read(films), read(frames), read(notes)
        self.entries = [
            {"annotation": f"{NOTES}:films.jsonl", "root": FILMS},
            {"annotation": f"{NOTES}:frames.json", "root": FRAMES, "reader": "img"},
            {"annotation": f"{NOTES}:more/held.jsonl.gz", "root": FILMS, "split": "val"},
        ]

    def command(self, folder: Path, roots: Mapping[str, Any], *options: str, **data: Any) -> list[str]:
        """Return the command that builds ``roots`` to FOLDER/out/stage2; ``data`` is added to the manifest."""
        folder.mkdir(exist_ok=True)
        (folder / "roots.yaml").write_text(yaml.safe_dump(dict(roots)))
        given = {"entries": self.entries, "shard_mb": 1, "fetch_timeout": 60, **data}
        given |= {"roots": str(folder / "roots.yaml"), "cache": str(folder / "cache")}
        frames = {"sampler": "dynamic_fps1", "min": 4, "max": 8, "size": 64}
        model = {"vision_tower": {"patch": 8}}
        manifest = corpus.manifest(folder / "stage2.yaml", self.entries, data=given, frames=frames, model=model)
        command = [sys.executable, str(BUILD_SHARDS), "--stage", "2", "--manifest", str(manifest)]
        return [*command, "--out", str(folder / "out"), "--workers", "2", *options]


def read(folder: Path) -> dict[str, bytes]:
    """Return all files below a folder as ``{path: bytes}``."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def write(folder: Path, files: Mapping[str, bytes]) -> Path:
    """Write files into a folder."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def serve(server: Server, folder: str, files: Mapping[str, bytes]) -> str:
    """Serve files on a web server; return the address of their folder."""
    for name, data in files.items():
        server.routes[f"/{folder}/{quote(name)}"] = lambda request, data=data: request.serve(data)
    return f"{server.url}/{folder}"


def below(folder: str, files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return files with a folder prepended to their paths."""
    return {f"{folder}/{name}": data for name, data in files.items()}


def parts(data: bytes, name: str, count: int = 12) -> dict[str, bytes]:
    """Cut a file into ``name.format(1)`` to ``name.format(count)``."""
    size = -(-len(data) // count)
    return {name.format(n + 1): data[n * size : (n + 1) * size] for n in range(count)}


class Places:
    """Servers of all kinds, and the layouts. Each layout writes the corpus to a location and returns a root map."""

    def __init__(self, corpus: Corpus, server: Server, endpoint: str) -> None:
        self.corpus, self.server, self.endpoint = corpus, server, endpoint

    def environment(self) -> dict[str, str]:
        """Return the environment of a process that can reach only the local hub and buckets."""
        kept = {name: text for name, text in os.environ.items() if not name.lower().endswith("_proxy")}
        kept.pop("HF_HUB_OFFLINE", None)
        return kept | {
            "HF_ENDPOINT": self.server.url,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "me",
            "AWS_SECRET_ACCESS_KEY": "secret-key",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def folders(self, folder: Path) -> dict[str, Any]:
        """Write the frames to a folder with an unrelated name."""
        files = self.corpus.films, self.corpus.frames, self.corpus.notes
        films, frames, notes = (write(folder / name, data) for name, data in zip("xyz", files, strict=True))
        return {FILMS: f"dir:{films}", FRAMES: f"dir:{frames}", NOTES: f"dir:{notes}"}

    def _archives(self, folder: Path, films: Mapping[str, bytes], frames: bytes, **how: Any) -> dict[str, Any]:
        write(folder / "x", {**films, "frames": frames})
        write(folder / "z", self.corpus.notes)
        return {
            FILMS: {"archives": f"dir:{folder}/x/films*", **how},
            FRAMES: {"archives": f"dir:{folder}/x/frames", "inside": "all/shots"},
            NOTES: f"dir:{folder}/z",
        }

    def zips(self, folder: Path) -> dict[str, Any]:
        films = pack(self.corpus.films, "deflate")
        return self._archives(folder, {"films.zip": films}, pack(below("all/shots", self.corpus.frames), "stored"))

    def split_zip(self, folder: Path) -> dict[str, Any]:
        films = parts(pack(self.corpus.films, "stored"), "films_part_{}.zip")
        frames = pack(below("all/shots", self.corpus.frames), "lzma")
        return self._archives(folder, films, frames, join=True)

    def tars(self, folder: Path) -> dict[str, Any]:
        """Write the films to two archives that share one file; the copy in the first archive is used."""
        halves = [{}, {"a.mp4": b"another"}]
        for number, (name, data) in enumerate(self.corpus.films.items()):
            halves[number % 2].setdefault(name, data)
        films = {f"films-{number}.tar": pack(half, "pax") for number, half in enumerate(halves)}
        return self._archives(folder, films, pack(below("all/shots", self.corpus.frames), "gnu"))

    def tars_gz(self, folder: Path) -> dict[str, Any]:
        films = pack(self.corpus.films, "tar.gz")
        return self._archives(folder, {"films.tgz": films}, pack(below("all/shots", self.corpus.frames), "tar.gz"))

    def web(self, folder: Path) -> dict[str, Any]:
        """Serve the corpus from a web server, with folders of frames in an archive because it cannot list folders."""
        films, notes = serve(self.server, "films", self.corpus.films), serve(self.server, "notes", self.corpus.notes)
        packed = pack(below("all/shots", self.corpus.frames), "deflate")
        archive = f"url:{serve(self.server, 'packed', {'frames.zip': packed})}/frames.zip"
        return {
            FILMS: f"url:{films}/{{path}}",
            FRAMES: {"archives": archive, "inside": "all/shots"},
            NOTES: f"url:{notes}/{{path}}",
        }

    def web_archives(self, folder: Path) -> dict[str, Any]:
        files = {"films.tar.gz": pack(self.corpus.films, "tar.gz"), "frames.tar": pack(self.corpus.frames, "ustar")}
        address = serve(self.server, "archives", files)
        notes = serve(self.server, "notes", self.corpus.notes)
        archives = {name: {"archives": f"url:{address}/{name}"} for name in files}
        return {FILMS: archives["films.tar.gz"], FRAMES: archives["frames.tar"], NOTES: f"url:{notes}/{{path}}"}

    def hub(self, folder: Path) -> dict[str, Any]:
        """Serve the annotation files from the hub itself, without an entry in the root map."""
        files = {**below("video", self.corpus.films), **below("shots", self.corpus.frames)}
        serve_hub(self.server, files, "me/media", page=5)
        serve_hub(self.server, self.corpus.notes, "me/notes")
        return {FILMS: "hf:me/media@main:video", FRAMES: "hf:me/media:shots"}

    def hub_archives(self, folder: Path) -> dict[str, Any]:
        files = below("zip", parts(pack(self.corpus.films, "deflate"), "films_part_{}.zip"))
        files["frames.tar.gz"] = pack(self.corpus.frames, "tar.gz")
        serve_hub(self.server, files, "me/packed", page=5)
        serve_hub(self.server, self.corpus.notes, "me/notes")
        films = {"archives": "hf:me/packed:zip/films_part_*.zip", "join": True}
        return {FILMS: films, FRAMES: {"archives": "hf:me/packed:frames.tar.gz"}}

    def bucket(self, folder: Path) -> dict[str, Any]:
        for name, files in (("x", self.corpus.films), ("y", self.corpus.frames), ("z", self.corpus.notes)):
            put_objects(self.endpoint, BUCKET, {f"{name}/{path}": data for path, data in files.items()})
        return {FILMS: f"s3://{BUCKET}/x", FRAMES: f"s3://{BUCKET}/y", NOTES: f"s3://{BUCKET}/z"}

    def bucket_archives(self, folder: Path) -> dict[str, Any]:
        packed = {"films.tar": pack(self.corpus.films, "gnu"), "frames.zip": pack(self.corpus.frames, "bzip2")}
        put_objects(self.endpoint, f"{BUCKET}-packed", packed)
        files = {name: {"archives": f"s3://{BUCKET}-packed/{name}"} for name in ("films.tar", "frames.zip")}
        notes = write(folder / "z", self.corpus.notes)
        return {FILMS: files["films.tar"], FRAMES: files["frames.zip"], NOTES: f"dir:{notes}"}
