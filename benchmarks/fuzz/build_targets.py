"""Targets of builds: the work folder of a stopped build, an addition to a root, archives and their cached lists."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from benchmarks.fuzz.commands import call_main, read_root, run_until, use_this_process
from benchmarks.fuzz.corpus import (
    BUILD,
    CACHE,
    MANIFEST,
    ROOT,
    SHARDS,
    TOKENIZER,
    copy_parts,
    dialogue,
    write_clip,
    write_image,
    write_small_manifest,
)
from benchmarks.fuzz.shard_targets import verify_root
from benchmarks.fuzz.target import Reading, Target
from framestream.pipeline import load_manifest
from framestream.tools import build_shards
from framestream.tools.builder.build import BuildOptions, build
from framestream.tools.common.errors import WorkerError

NOTHING_BUILT = 3  #: status of a build that is finished, without any dialogue of some entry
EXTRA = "[{annotation: samples.json, root: media}, {annotation: held.jsonl, root: media, split: val}, EXTRA]"
VIDEOS = {
    "h264.mp4": "libx264",
    "mpeg4.avi": "mpeg4",
    "h264.mkv": "libx264",
    "vp8.webm": "libvpx",
    "mjpeg.mov": "mjpeg",
}
VIDEOS |= {"mpeg2.mpg": "mpeg2video", "h264.ts": "libx264", "flv.flv": "flv", "wmv.wmv": "wmv2"}
IMAGES = ("a.jpg", "b.png", "c.webp", "d.bmp", "e.tiff", "f.gif", "g.ppm")


def build_root(file: str) -> Reading:
    """Build the root, or finish it, and read what it contains."""
    use_this_process()
    call_main(build_shards.main, *BUILD, accepted=NOTHING_BUILT)
    return read_root(ROOT)


def grow_root(file: str) -> Reading:
    """Add an entry to the root and read the result."""
    use_this_process()
    entries = EXTRA.replace("EXTRA", "{annotation: extra.json, root: media}")
    call_main(build_shards.main, *BUILD, "--set", f"data.entries={entries}")
    return read_root(ROOT)


def stop_build(corpus: Path) -> None:
    """Copy the input of the corpus, and leave a build of it that was stopped after one task."""
    copy_parts("media", "samples.json", "held.jsonl", TOKENIZER, MANIFEST)(corpus)
    try:
        build(load_manifest(MANIFEST), run_until(1), BuildOptions())
    except WorkerError:
        return
    raise AssertionError("the build has one task and was not stopped")


def stop_archives(corpus: Path) -> None:
    """Leave a stopped build from archives, whose work folder has fetched files."""
    prepare_archives(corpus)
    try:
        build(load_manifest(MANIFEST), run_until(1), BuildOptions(cache_bytes=1 << 30))
    except WorkerError:
        return
    raise AssertionError("the build has one task and was not stopped")


def prepare_growth(corpus: Path) -> None:
    """Copy a finished root, and write another annotation file."""
    copy_parts("media", "samples.json", "held.jsonl", TOKENIZER, MANIFEST, SHARDS)(corpus)
    extra = [dialogue("new", video="1.mp4", start=0.5, end=1.0), dialogue("again", image="1.jpg")]
    Path("extra.json").write_text(json.dumps(extra), encoding="utf-8")


def prepare_media(corpus: Path) -> None:
    """Write videos of several containers, images and animations, and samples with their names as ids."""
    samples = []
    for seed, (name, codec) in enumerate(VIDEOS.items()):
        write_clip(Path("media", name), seed, codec)
        samples.append(dialogue(name, video=name))
    for seed, name in enumerate(IMAGES):
        write_image(Path("media", name), seed)
        samples.append(dialogue(name, image=name))
    _write_animations(samples)
    Path("samples.json").write_text(json.dumps(samples), encoding="utf-8")
    write_small_manifest([{"annotation": "samples.json", "root": "media"}])


def _write_animations(samples: list[dict[str, Any]]) -> None:
    from PIL import Image

    from benchmarks.fuzz.corpus import draw_smooth

    frames = [Image.fromarray(draw_smooth(seed)) for seed in range(4)]
    frames[0].save("media/moving.gif", save_all=True, append_images=frames[1:], duration=250)
    samples.append(dialogue("moving.gif", video="moving.gif", video_read_type="gif"))
    Path("media/frames").mkdir()
    for number, frame in enumerate(frames):
        frame.save(f"media/frames/{number:03d}.jpg")
    samples.append(dialogue("frames", video="frames", video_read_type="img"))


def prepare_archives(corpus: Path) -> None:
    """Pack the media of the corpus in each kind of archive, and map a root to it."""
    media = {f"media/{path.name}": path.read_bytes() for path in sorted((corpus / "media").iterdir())}
    Path("packed").mkdir()
    for method, number in (("stored", zipfile.ZIP_STORED), ("deflated", zipfile.ZIP_DEFLATED)):
        with zipfile.ZipFile(f"packed/{method}.zip", "w", number) as archive:
            for name, data in media.items():
                archive.writestr(name, data)
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as tar:
        for name, data in media.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    Path("packed/plain.tar").write_bytes(plain.getvalue())
    Path("packed/packed.tar.gz").write_bytes(gzip.compress(plain.getvalue(), mtime=0))
    files = ("stored.zip", "deflated.zip", "plain.tar", "packed.tar.gz")
    _map_archives({name: (name, "media") for name in files}, ["0.mp4", "1.jpg"])


def prepare_parquet(corpus: Path) -> None:
    """Store images in parquet files with several layouts, and map a root to each."""
    images = [path.read_bytes() for path in sorted((corpus / "media").glob("*.jpg"))]
    values = [{"bytes": data, "path": f"{number}.jpg"} for number, data in enumerate(images)]
    table = pa.table({"id": [f"{number}" for number in range(len(images))], "image": values})
    Path("packed").mkdir()
    pq.write_table(table, "packed/plain.parquet", compression="none", use_dictionary=False)
    pq.write_table(table, "packed/snappy.parquet", row_group_size=1)
    pq.write_table(table, "packed/zstd.parquet", compression="zstd", data_page_version="2.0")
    _map_archives(
        {name: (name, "") for name in ("plain.parquet", "snappy.parquet", "zstd.parquet")}, ["0.jpg", "2.jpg"]
    )


def _map_archives(archives: dict[str, tuple[str, str]], names: list[str]) -> None:
    """Write a root map of archives, and one entry for each with a sample of each of ``names``."""
    roots = {}
    entries = []
    for name, (file, inside) in archives.items():
        roots[f"https://{name}"] = {"archives": f"dir:packed/{file}", **({"inside": inside} if inside else {})}
        samples = [dialogue(path, **{"video" if path.endswith("mp4") else "image": path}) for path in names]
        Path(f"{name}.json").write_text(json.dumps(samples), encoding="utf-8")
        entries.append({"annotation": f"{name}.json", "root": f"https://{name}"})
    Path("fuzz-roots.yaml").write_text(yaml.safe_dump(roots), encoding="utf-8")
    write_small_manifest(entries, {"roots": "fuzz-roots.yaml"})


def prepare_lists(corpus: Path) -> None:
    """Build once from archives, so that their lists are cached, and remove the root."""
    prepare_archives(corpus)
    use_this_process()
    call_main(build_shards.main, *BUILD)
    shutil.rmtree(SHARDS)


_SIDECARS = (f"{ROOT}/*/shardindex.json", f"{ROOT}/*/*.idx", f"{ROOT}/*/.nv-meta/*")

BUILD_TARGETS = (
    Target("work-folder", stop_build, (f"{ROOT}/work/**/*",), build_root),
    Target("work-cache", stop_archives, (f"{ROOT}/work/cache/**/*",), build_root, share=0.5),
    Target("growth", prepare_growth, (*_SIDECARS, f"{ROOT}/index/[dms]*.arrow", f"{ROOT}/ledger/*"), grow_root),
    Target("reader-files", copy_parts(SHARDS), _SIDECARS, verify_root),
    Target("archive-lists", prepare_lists, (f"{CACHE}/**/*",), build_root),
    Target("archives", prepare_archives, ("packed/*",), build_root, is_truth=True),
    Target("parquet-images", prepare_parquet, ("packed/*",), build_root, is_truth=True),
    Target("media", prepare_media, ("media/**/*",), build_root, is_truth=True, own_items=True, share=2),
)
