"""The readers that benchmarks/loading/loader.py compares: each returns the same frames of the same media.

A reader is opened once and then called with a number of frames. It yields uint8 arrays (n, H, W, 3), one for each
medium or row, in order of the media. An array may be overwritten when the next one is read.
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
Decoder = Callable[[Any, list[int], np.ndarray], np.ndarray]  #: called with an MP4, frame numbers and an output array
PEERS = ("webdataset", "energon", "mosaic", "litdata", "lance", "datasets")


class _Arrays:
    """A reused array for each number of frames."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._arrays: dict[int, np.ndarray] = {}

    def get(self, frames: int) -> np.ndarray:
        """Return a uint8 array (frames, S, S, 3)."""
        if frames not in self._arrays:
            self._arrays[frames] = np.zeros((frames, self._size, self._size, 3), dtype=np.uint8)
        return self._arrays[frames]


def limit(media: BenchmarkMedia) -> Reader:
    """Return a reader by libjpeg-turbo from JPEGs in memory: the upper limit of a JPEG reader on one core."""
    index, arrays, read = Index.open(media.root), _Arrays(media.size), {}

    def jpegs(count: int) -> Iterator[list[bytes]]:
        for row in range(media.count):
            with open(index.shard_path(index.media["shard"][row].as_py()), "rb") as file:
                found = []
                for number in media.frame_numbers(count):
                    file.seek(row_values(index.media["frame_offset"], row)[number])
                    found.append(file.read(row_values(index.media["frame_size"], row)[number]))
                yield found

    def frames(count: int) -> Iterator[np.ndarray]:
        if count not in read:
            read[count] = list(jpegs(count))
        out = arrays.get(count)
        for medium in read[count]:
            for jpeg, frame in zip(medium, out, strict=True):
                simplejpeg.decode_jpeg(jpeg, "RGB", buffer=frame)
            yield out

    return frames


def pixels(media: BenchmarkMedia, threads: int = 0, address: str | None = None, least: int = 0) -> Reader:
    """Return this project's reader of frames alone, by byte offset.

    Args:
        media: media to read.
        threads: threads that read media in parallel; 0 reads in the caller's thread.
        address: of the media's folder on a server; None reads local files. Only the index is cached. As in the loader,
            media are requested before a thread is free for them.
        least: frames that a pass with threads reads at least, over the media several times. Threads live for one pass.
    """
    root = media.root if address is None else f"{address}/{media.root.relative_to(media.folder)}"
    reading = None if address is None else ReadOptions(cache=tempfile.mkdtemp())
    reader = FrameReader(Index.open(root, reading))
    ahead = 2 * threads
    arrays = [_Arrays(media.size) for _ in range(ahead + 1)]

    def one(turn: int, numbers: list[int]) -> np.ndarray:
        out = arrays[turn % len(arrays)].get(len(numbers))
        reader.read_frames(turn % media.count, numbers, out)
        return out

    def frames(count: int) -> Iterator[np.ndarray]:
        numbers = media.frame_numbers(count)
        if not threads:
            yield from (one(row, numbers) for row in range(media.count))
            return
        turns = media.count * max(1, -(-least // (media.count * count)))
        tasks: deque[Any] = deque()
        with ThreadPoolExecutor(threads) as pool:

            def submit(turn: int) -> None:
                if address is not None:
                    reader.prefetch(turn % media.count, numbers)
                tasks.append(pool.submit(one, turn, numbers))

            for turn in range(min(ahead, turns)):
                submit(turn)
            for turn in range(turns):
                yield tasks.popleft().result()
                if turn + ahead < turns:
                    submit(turn + ahead)

    return frames


def rows(media: BenchmarkMedia, threads: int = 1) -> Reader:
    """Return this project's complete loader as a reader: frames, tokens, labels, packed rows."""
    loaders: dict[int, Any] = {}

    def frames(count: int) -> Iterator[np.ndarray]:
        if count not in loaders:
            loaders[count] = build_loader(media.manifest(count, threads))
        for batch in loaders[count]:
            yield batch.clips.numpy().reshape(-1, media.size, media.size, 3)

    return frames


def reference(source: Path, size: int) -> Reader:
    """Return the published reader of one source video: decord, then Pillow's resize to normalized floats by frame."""
    mean, deviation = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)

    def frames(count: int) -> Iterator[np.ndarray]:
        video = decord.VideoReader(str(source), num_threads=1)
        edges = np.linspace(0, len(video), count + 1).astype(int)
        images = video.get_batch((edges[:-1] + edges[1:]) // 2).asnumpy()
        resized = [Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC) for image in images]
        yield np.stack([(np.asarray(image) * np.float32(1 / 255) - mean) / deviation for image in resized])

    return frames


def by_offset(mp4: Any, numbers: list[int], out: np.ndarray) -> np.ndarray:
    """Decode with libjpeg-turbo at the offsets of the MP4's own table; a faster decoder for peers.

    Args:
        mp4: bytes, or an open file, whose table and frames alone are read. Ranges are read together where the
            file can do that (``read_ranges``).
        numbers: T frame numbers.
        out: uint8 (T, H, W, 3).
    """
    with av.open(io.BytesIO(mp4) if isinstance(mp4, bytes) else mp4) as container:
        entries = container.streams.video[0].index_entries
        ranges = [(entries[number].pos, entries[number].size) for number in numbers]
    for jpeg, frame in zip(_read_ranges(mp4, ranges), out, strict=True):
        simplejpeg.decode_jpeg(jpeg, "RGB", buffer=frame)
    return out


def _read_ranges(mp4: Any, ranges: list[tuple[int, int]]) -> Iterator[bytes | memoryview]:
    if isinstance(mp4, bytes):
        view = memoryview(mp4)
        yield from (view[start : start + size] for start, size in ranges)
    elif hasattr(mp4, "read_ranges"):
        yield from mp4.read_ranges(ranges)
    else:
        for start, size in ranges:
            mp4.seek(start)
            yield mp4.read(size)


def by_decord(mp4: bytes, numbers: list[int], out: np.ndarray) -> np.ndarray:
    """Decode with decord, for peers without a video decoder or without the packages it needs."""
    return decord.VideoReader(io.BytesIO(mp4), num_threads=1).get_batch(numbers).asnumpy()


def peer(
    name: str, media: BenchmarkMedia, decoder: Decoder | None = None, address: str | None = None, threads: int = 0
) -> Reader:
    """Return a peer's reader of local files or of those at ``address``.

    Args:
        name: of a module in ``benchmarks/peers``.
        media: media to read.
        decoder: None is the peer's own decoder.
        address: of the media's folder on a server.
        threads: threads that read media in parallel, for peers that open single media (``RANDOM_ACCESS``).
    """
    module, folder = peer_module(name), write_peer(name, media)
    # such peers hand out open files to `by_offset`, and to their own decoder what they decode
    settings = {"lazily": decoder is not None} if hasattr(module, "RANDOM_ACCESS") else {}
    samples, decode = module.open_samples(media, folder, address, **settings), decoder or _own_decoder(module)
    ahead = 2 * threads if settings else 0
    arrays = [_Arrays(media.size) for _ in range(ahead + 1)]

    def frames(count: int) -> Iterator[np.ndarray]:
        numbers = media.frame_numbers(count)
        if not ahead:
            yield from (decode(mp4, numbers, arrays[0].get(count)) for mp4 in samples())
            return
        tasks: deque[Any] = deque()
        with ThreadPoolExecutor(threads) as pool:
            for turn, mp4 in enumerate(samples()):
                if len(tasks) == ahead:
                    yield tasks.popleft().result()
                tasks.append(pool.submit(decode, mp4, numbers, arrays[turn % len(arrays)].get(count)))
            while tasks:
                yield tasks.popleft().result()

    return frames


def write_peer(name: str, media: BenchmarkMedia) -> Path:
    """Write the media in a peer's own format, if it has one and they are not written yet; return their folder."""
    module, folder = peer_module(name), media.folder / name
    if not folder.exists():
        folder.mkdir()
        if hasattr(module, "write_samples"):
            module.write_samples(media, folder)
    return folder


def _own_decoder(module: Any) -> Decoder:
    return getattr(module, "decode_frames", by_decord)


def peer_module(name: str) -> Any:
    """Import the module of a peer, which needs the extra ``peers``."""
    import_torchvision()
    return importlib.import_module(f"benchmarks.peers.{name}")
