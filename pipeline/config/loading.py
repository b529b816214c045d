"""Settings of batching and loading."""

from __future__ import annotations

from dataclasses import dataclass, field

from framestream.pipeline.config.schema import ManifestError, spec

#: orders of an epoch
ORDERS = ("shuffle", "long_together", "sequential", "modality", "modality_length", "length", "length_windows")

NO_ROOM_FOR_COPIES = (
    "sequential needs room for copies; set loader.cache_gb to the size of the root, or loader.access: ranges"
)


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """Estimated FLOPs of a dialogue: patch * patch tokens + token * tokens + pair * sum of squared lengths."""

    patch: float = field(metadata=spec(low=0, high=1e18))
    token: float = field(metadata=spec(low=0, high=1e18))
    pair: float = field(metadata=spec(low=0, high=1e18))


@dataclass(frozen=True, kw_only=True)
class BatchingConfig:
    """How dialogues form global batches, and rows (packed sequences)."""

    global_batch: int = field(metadata=spec(low=1, high=1_000_000, doc="dialogues in one optimizer step"))
    row_multiple: int = field(
        metadata=spec(
            low=1, high=100_000, doc="the rows of a global batch are a multiple of this; the world size must divide it"
        )
    )
    loss_weight: str = field(default="dialogue", metadata=spec(choices=("dialogue", "token")))
    order: str = field(
        default="shuffle", metadata=spec(choices=ORDERS, doc="order of an epoch; its slice k is global batch k")
    )
    cost: CostModel | None = field(
        default=None, metadata=spec(doc="cost used to balance rows; the trainer computes it from the model if missing")
    )


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How batches are read. These settings do not change what batches contain."""

    threads: int = field(
        default=2, metadata=spec(low=1, high=1024, doc="decoding threads per rank, or per worker of a rank")
    )
    workers: int = field(
        default=0,
        metadata=spec(
            low=0, high=1024, doc="decoding processes per rank; 0: threads decode in the process of the rank"
        ),
    )
    prefetch_mb: int = field(
        default=512,
        metadata=spec(
            low=1, high=1_000_000, doc="most megabytes of decoded rows that wait for the training step, per rank"
        ),
    )
    max_unreadable: int = field(
        default=100, metadata=spec(low=0, high=10**9, doc="the run stops when more dialogues than this cannot be read")
    )
    access: str = field(
        default="ranges",
        metadata=spec(
            choices=("ranges", "sequential"),
            doc="ranges: the frames that are shown; sequential: whole shards, copied once to the folder loader.cache",
        ),
    )
    cache: str = field(
        default="~/.cache/framestream",
        metadata=spec(
            path="local", doc="folder for copies of remote roots, and for token caches of roots that cannot be written"
        ),
    )
    cache_gb: float = field(
        default=0.0,
        metadata=spec(
            low=0,
            high=1_000_000,
            doc="most gigabytes of ranges, or of whole shards, in that folder; 0 stores none",
        ),
    )
    read_timeout: float = field(
        default=60.0,
        metadata=spec(low=1, high=86_400, doc="seconds that reading one media item may take, with all retries"),
    )
    retries: int = field(default=5, metadata=spec(low=0, high=100, doc="retries of a request to a remote root"))

    def __post_init__(self) -> None:
        if self.access == "sequential" and not self.cache_gb:
            raise ManifestError(f"access: {NO_ROOM_FOR_COPIES}")
