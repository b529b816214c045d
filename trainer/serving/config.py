"""What a server allows: its limits on requests, media, memory and time."""

from __future__ import annotations

from dataclasses import dataclass, field

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class ServingConfig:
    """Limits of one server. Whatever exceeds them is refused with a status of its own."""

    model_name: str = "framestream"  #: name in ``/v1/models``, which requests have to give
    api_key: str = field(default="", repr=False)  #: of ``/v1`` and ``/metrics``; empty for none
    hosts: tuple[str, ...] = ()  #: names that a ``Host`` header may have; empty for any
    max_batch: int = 8  #: answers that grow at the same time
    max_batch_tokens: int = 1 << 17  #: keys and values of all of them, in tokens
    max_queue: int = 64  #: requests that wait for a place among them
    max_tokens: int = 1024  #: longest answer
    max_request_bytes: int = 64 * MIB  #: of a JSON body
    max_upload_bytes: int = 512 * MIB  #: of an uploaded file, and of a fetched one
    store_bytes: int = 4096 * MIB  #: of all files on the disk
    cache_bytes: int = 1024 * MIB  #: of kept visual tokens
    max_images: int = 64  #: of a request
    max_videos: int = 8  #: of a request
    max_pixels: int = 1 << 25  #: of an image, and of a video's frame
    max_frames: int = 1024  #: sampled frames and tiles of a request
    max_seconds: float = 7200.0  #: of a video, or of the part of it that a request names
    decode_processes: int = 2  #: files that are decoded at the same time
    decode_seconds: float = 120.0  #: for decoding one file
    decode_bytes: int = 3072 * MIB  #: memory that a decoding process may take for its files
    request_seconds: float = 600.0  #: from a request to the end of its answer
    body_seconds: float = 30.0  #: without a byte of a body
    allow_urls: bool = False  #: whether media are fetched from http and https addresses
    fetch_seconds: float = 30.0  #: for fetching one file

    @property
    def max_bodies_bytes(self) -> int:
        """Bytes of all JSON bodies that are read at the same time."""
        return 4 * self.max_request_bytes
