"""The readers that benchmarks/loading/loader.py compares: each hands out the same frames of the same media.

A reader is opened once and then called with a number of frames: it yields arrays (n, H, W, 3) uint8, those of one
medium or of one row, in order of the media. An array may be overwritten when the next one is asked for.
"""

from __future__ import annotations

import importlib
import io
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import decord
import numpy as np
import simplejpeg
from PIL import Image

from benchmarks.loading.media import BenchmarkMedia
from framestream.pipeline import build_loader
from framestream.pipeline.shards.frame_reader import FrameReader
from framestream.pipeline.shards.index import Index, row_values
from framestream.pipeline.storage import ReadOptions
from tests.helpers.model.torchvision_import import import_torchvision

Reader = Callable[[int], Iterator[np.ndarray]]
Decoder = Callable[[bytes, list[int], np.ndarray], np.ndarray]  #: of an MP4, frame numbers and an array to fill
PEERS = ("webdataset", "energon", "mosaic", "litdata")


class _Arrays:
    """One array for each number of frames, used again and again."""

    def __init__(self, size: int) -> None:
        self._size, self._made = size, {}

    def of(self, frames: int) -> np.ndarray:
        """Uint8 (frames, S, S, 3)."""
        if frames not in self._made:
            self._made[frames] = np.zeros((frames, self._size, self._size, 3), dtype=np.uint8)
        return self._made[frames]


def limit(media: BenchmarkMedia) -> Reader:
    """libjpeg-turbo on JPEGs that lie in memory: what no reader of JPEGs can beat on one core."""
    index, arrays, read = Index.open(media.root), _Arrays(media.size), {}

    def jpegs(count: int) -> Iterator[list[bytes]]:
        for row in range(media.count):
            with open(index.shard_path(index.media["shard"][row].as_py()), "rb") as file:
                found = []
                for place in media.places(count):
                    file.seek(row_values(index.media["frame_offset"], row)[place])
                    found.append(file.read(row_values(index.media["frame_size"], row)[place]))
                yield found

    def frames(count: int) -> Iterator[np.ndarray]:
        if count not in read:
            read[count] = list(jpegs(count))
        out = arrays.of(count)
        for medium in read[count]:
            for jpeg, frame in zip(medium, out, strict=True):
                simplejpeg.decode_jpeg(jpeg, "RGB", buffer=frame)
            yield out

    return frames


def pixels(media: BenchmarkMedia, threads: int = 0, address: str | None = None, least: int = 0) -> Reader:
    """This project's frames alone, by byte offset; ``threads`` read media side by side, 0 in the caller's thread.

    A pass of threads goes over the media again until it has ``least`` frames: they start with it and end with it.

    ``address`` is of the media's folder, where that is read from a server; nothing is cached but the index.
    """
    root = media.root if address is None else f"{address}/{media.root.relative_to(media.folder)}"
    reading = None if address is None else ReadOptions(cache=tempfile.mkdtemp())
    read = FrameReader(Index.open(root, reading)).read_frames
    ahead = 2 * threads
    arrays = [_Arrays(media.size) for _ in range(ahead + 1)]

    def one(turn: int, places: list[int]) -> np.ndarray:
        out = arrays[turn % len(arrays)].of(len(places))
        read(turn % media.count, places, out)
        return out

    def frames(count: int) -> Iterator[np.ndarray]:
        places = media.places(count)
        if not threads:
            yield from (one(row, places) for row in range(media.count))
            return
        turns = media.count * max(1, -(-least // (media.count * count)))
        with ThreadPoolExecutor(threads) as pool:
            tasks = deque(pool.submit(one, turn, places) for turn in range(min(ahead, turns)))
            for turn in range(turns):
                yield tasks.popleft().result()
                if turn + ahead < turns:
                    tasks.append(pool.submit(one, turn + ahead, places))

    return frames


def rows(media: BenchmarkMedia, threads: int = 1) -> Reader:
    """This project's whole loader: frames, tokens, labels, packed rows."""
    made: dict[int, Any] = {}

    def frames(count: int) -> Iterator[np.ndarray]:
        if count not in made:
            made[count] = build_loader(media.manifest(count, threads))
        for batch in made[count]:
            yield batch.clips.numpy().reshape(-1, media.size, media.size, 3)

    return frames


def reference(source: Path, size: int) -> Reader:
    """The published way on one source video: decord, then picture by picture Pillow's resize to normalised floats."""
    mean, deviation = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)

    def frames(count: int) -> Iterator[np.ndarray]:
        video = decord.VideoReader(str(source), num_threads=1)
        edges = np.linspace(0, len(video), count + 1).astype(int)
        pictures = video.get_batch((edges[:-1] + edges[1:]) // 2).asnumpy()
        resized = [Image.fromarray(p).resize((size, size), Image.Resampling.BICUBIC) for p in pictures]
        yield np.stack([(np.asarray(p) * np.float32(1 / 255) - mean) / deviation for p in resized])

    return frames


def by_offset(mp4: bytes, places: list[int], out: np.ndarray) -> np.ndarray:
    """Lent to peers: where the JPEGs lie by the MP4's own table, and libjpeg-turbo."""
    view = memoryview(mp4)
    with av.open(io.BytesIO(mp4)) as container:
        entries = container.streams.video[0].index_entries
        for place, frame in zip(places, out, strict=True):
            entry = entries[place]
            simplejpeg.decode_jpeg(view[entry.pos : entry.pos + entry.size], "RGB", buffer=frame)
    return out


def by_decord(mp4: bytes, places: list[int], out: np.ndarray) -> np.ndarray:
    """For peers that decode no video themselves, or not with what is installed."""
    return decord.VideoReader(io.BytesIO(mp4), num_threads=1).get_batch(places).asnumpy()


def peer(name: str, media: BenchmarkMedia, decoder: Decoder | None = None, address: str | None = None) -> Reader:
    """A peer, with its own decoder where ``decoder`` is None; of local files, or of those at ``address``."""
    module = peer_module(name)
    folder = media.folder / name
    if not folder.exists():
        folder.mkdir()
        if hasattr(module, "write_samples"):
            module.write_samples(media, folder)
    samples, arrays = module.open_samples(media, folder, address), _Arrays(media.size)
    decode = decoder or getattr(module, "decode_frames", by_decord)

    def frames(count: int) -> Iterator[np.ndarray]:
        places = media.places(count)
        for mp4 in samples():
            yield decode(mp4, places, arrays.of(count))

    return frames


def peer_module(name: str) -> Any:
    """The module of a peer, which needs the extra ``peers``."""
    import_torchvision()
    return importlib.import_module(f"benchmarks.peers.{name}")
