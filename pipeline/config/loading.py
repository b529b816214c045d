"""TODO."""

from __future__ import annotations

from dataclasses import dataclass

from framestream.pipeline.config.schema import config_field

ORDERS = ("shuffle", "sequential", "modality", "modality_length", "length", "length_windows")  #: of an epoch


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """Estimated FLOPs of a dialogue: patch * patch tokens + token * tokens + pair * sum of squared lengths."""

    patch: float
    token: float
    pair: float


@dataclass(frozen=True, kw_only=True)
class BatchingConfig:
    """Global batches and rows (packed sequences)."""

    global_batch: int = config_field(low=1, doc="dialogues in one optimiser step")
    row_multiple: int = config_field(
        low=1, doc="a global batch has a multiple of this many rows; world size divides it"
    )
    loss_weight: str = config_field("dialogue", choices=("dialogue", "token"))
    order: str = config_field("shuffle", choices=ORDERS, doc="of an epoch, slice k of which is global batch k")
    cost: CostModel | None = config_field(
        None, doc="balances rows; the trainer computes it from the model where it is missing"
    )


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How batches are read; nothing here changes what they contain."""

    threads: int = config_field(2, low=1, doc="decoding threads of one rank, or of each of its workers")
    workers: int = config_field(
        0, low=0, doc="decoding processes of one rank; 0: its threads decode in the rank's process"
    )
    prefetch_mb: int = config_field(512, low=1, doc="bound on decoded rows waiting for the training step, of one rank")
    max_unreadable: int = config_field(100, low=0, doc="a run stops when more dialogues than this could not be read")
    cache: str = config_field("~/.cache/framestream", doc="folder of copies of remote roots: their indexes, and ranges")
    cache_gb: float = config_field(
        0.0, low=0, doc="gigabytes of ranges of remote shards kept there at most; 0 keeps none"
    )
    read_timeout: float = config_field(60.0, low=1, doc="seconds that reading one medium may take, all tries together")
    retries: int = config_field(5, low=0, doc="tries of a request to a remote root after the first")
