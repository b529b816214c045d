"""The manifest: one typed YAML file that drives building, reading and training of a stage.

``load_manifest`` reads, validates and freezes it; ``python -m trainer --manifest M --dry-run`` prints it with every
default resolved. Relative paths in a manifest are relative to the current directory, except ``extends``, which is
relative to the manifest that names it.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path

from pipeline.schema import ManifestError, build, field, override, plain, read_yaml

__all__ = ["Manifest", "ManifestError", "load_manifest", "plain"]

TOKENS_PER_CLIP = 64  #: 16 tokens for each of a clip's 4 frames
TOKENS_PER_TILE = 64  #: tokens of one tile of a still
READERS = ("decord", "img", "frame", "gif", "av")  #: of a video
FOLDER_READERS = ("img", "frame")  #: of those, the ones that read a folder of frames
SAMPLING = re.compile(r"all|(first[234]?|end|random):([0-9]+)(%?)")  #: which samples an entry takes of its file
SAMPLING_HELP = "all, first:N, first2:N, first3:N, first4:N, end:N or random:N (N a count or P%)"
ORDERS = ("shuffle", "sequential", "modality", "modality_length", "length", "length_windows")  #: of an epoch


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One dataset entry: an annotation file, where its media lie and how to take samples of it."""

    annotation: str = field(doc="json, jsonl or parquet; a local path, hf:OWNER/NAME:PATH or a web address")
    root: str = field("", doc="folder that the annotation's media paths are relative to, or a name in the root map")
    sampling: str = field("all", doc=SAMPLING_HELP)
    reader: str = field("decord", choices=READERS)
    media_type: str = field("auto", choices=("auto", "image", "video", "text", "mix"))
    split: str = field("train", choices=("train", "val"), doc="val is held out of training and used for scoring")
    name: str = field("", doc="name in ledgers and reports; the annotation file's stem if empty")
    samples: int | None = field(None, low=0, doc="number of samples as published, where it is stated")

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", Path(self.annotation).name.split(".")[0])
        if not SAMPLING.fullmatch(self.sampling):
            raise ManifestError(f"sampling: {self.sampling!r} is not {SAMPLING_HELP}")


@dataclass(frozen=True, kw_only=True)
class Data:
    """What is read: the entries, and the user's root map that says where media really are."""

    entries: tuple[Entry, ...]
    roots: str = field("", doc="YAML file that maps an entry's root to a place that can be read")
    cache: str = field("", doc="folder of fetched annotation files; ~/.cache/framestream if empty")
    text_placeholder: str = field("convert", choices=("convert", "refuse"), doc="what to do with <video> in a turn")
    shard_mb: int = field(64, low=1, doc="estimated megabytes of one shard, which decide what goes into it")
    decode_timeout: int = field(600, low=1, doc="seconds that building one media item may take")
    fetch_timeout: int = field(1800, low=1, doc="seconds that fetching one media file may take, with all retries")
    fetch_mb: int = field(8192, low=1, doc="megabytes of the largest media file that is fetched")

    def __post_init__(self) -> None:
        if not self.entries:
            raise ManifestError("entries: the list is empty; name at least one annotation file")


@dataclass(frozen=True, kw_only=True)
class Frames:
    """How a video becomes frames, when building and when reading."""

    sampler: str = field(doc="middle, dynamic_fps1, rand, or fpsX with X frames a second")
    min: int = field(low=1)
    max: int = field(low=1)
    size: int = field(low=16, doc="pixels of a side of a frame as the model sees it")
    resize: str = field(
        "stretch",
        choices=("stretch", "short_side", "long_side"),
        doc="how frames are stored: size x size, or with the aspect kept and the short or long side of size pixels",
    )
    clip_frames: int = field(4, choices=(4,), doc="frames of one clip, the unit of the vision tower")
    time_message: str = field("short", choices=("short", "long", "none"))
    quality: int = field(90, low=1, doc="JPEG quality of stored frames")
    subsampling: str = field("420", choices=("420", "422", "444"))

    def __post_init__(self) -> None:
        named = self.sampler in ("middle", "dynamic_fps1", "rand")
        rate = self.sampler[3:] if self.sampler.startswith("fps") else ""
        if not named and not (rate.replace(".", "", 1).isdigit() and float(rate) > 0):
            raise ManifestError(f"sampler: {self.sampler!r} is not middle, dynamic_fps1, rand or fpsX such as fps2")
        if self.resize != "stretch" and self.size % 2:
            raise ManifestError(f"size: {self.size} is odd; {self.resize} needs an even one")
        if self.min > self.max:
            raise ManifestError(f"min: {self.min} is larger than max ({self.max})")
        if self.sampler == "dynamic_fps1" and self.min > self.clip_frames and self.min % self.clip_frames:
            raise ManifestError(f"min: {self.min} is not a multiple of clip_frames ({self.clip_frames})")
        if self.max % self.clip_frames:
            raise ManifestError(f"max: {self.max} is not a multiple of clip_frames ({self.clip_frames})")


@dataclass(frozen=True, kw_only=True)
class MixEntry:
    """What is taken of one entry of a shard root that is mixed."""

    entry: str = field(doc="name of the entry as the shards were built")
    sampling: str = field("all", doc=f"of its dialogues in the order of the index: {SAMPLING_HELP}")
    repeat: float | None = field(None, low=0, doc="times an epoch, in place of the root's; 0 leaves it out")
    cap: int | None = field(None, low=1, doc="dialogues of it in an epoch at most; the others come in the next ones")
    min: int | None = field(None, low=1, doc="frames.min of its videos")
    max: int | None = field(None, low=1, doc="frames.max of its videos")

    def __post_init__(self) -> None:
        if not SAMPLING.fullmatch(self.sampling):
            raise ManifestError(f"sampling: {self.sampling!r} is not {SAMPLING_HELP}")

    def frames(self, frames: Frames) -> Frames:
        """``frames`` within the bounds of the entry."""
        bounds = {name: getattr(self, name) for name in ("min", "max") if getattr(self, name) is not None}
        return dataclasses.replace(frames, **bounds)


@dataclass(frozen=True, kw_only=True)
class MixRoot:
    """One shard root of a mix; entries that it does not name are taken whole, as often as the root says."""

    root: str = field(doc="folder or address of finished shards, such as shards/stage2")
    repeat: float = field(1.0, low=0, doc="how often an epoch has each dialogue")
    weight: float | None = field(None, low=0, doc="share of an epoch; every root has one, or none has")
    entries: tuple[MixEntry, ...] = ()

    def __post_init__(self) -> None:
        names = [entry.entry for entry in self.entries]
        for number, name in enumerate(names):
            if name in names[:number]:
                raise ManifestError(f"entries[{number}].entry: {name} stands twice; give one entry its settings once")
        if not self.repeat and not any(entry.repeat for entry in self.entries):
            raise ManifestError("repeat: is 0, and no entry has its own; nothing would be read, leave the root out")


@dataclass(frozen=True, kw_only=True)
class Images:
    """How a still becomes tiles of ``frames.size`` pixels."""

    mode: str = field("anyres_nopad", choices=("square", "anyres_nopad"))
    max_grid: int = field(6, low=1, doc="largest number of tiles along one side")
    quality: int = field(95, low=1, doc="JPEG quality of stills that have to be re-encoded")
    max_side: int = field(4096, low=16, doc="stills with a longer side are stored reduced to it")


@dataclass(frozen=True, kw_only=True)
class Text:
    """How a conversation becomes token ids and labels."""

    tokenizer: str = field(doc="folder of a Hugging Face tokenizer, or a hub name")
    template: str = field("qwen_2", choices=("plain", "qwen_2"))
    system: str = "You are a helpful assistant."
    mask_prompt_markers: bool = field(False, doc="true: do not learn <|im_start|>, <|im_end|> and newline in prompts")
    max_tokens: int = field(32768, low=1, doc="longest dialogue and longest row, visual tokens included")
    over_length: str = field("cut", choices=("cut", "refuse"))


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Estimated FLOPs of a dialogue: patch * patch tokens + token * tokens + pair * sum of squared lengths."""

    patch: float
    token: float
    pair: float


@dataclass(frozen=True, kw_only=True)
class Batching:
    """Global batches and rows (packed sequences)."""

    global_batch: int = field(low=1, doc="dialogues in one optimiser step")
    row_multiple: int = field(low=1, doc="a global batch has a multiple of this many rows; world size divides it")
    loss_weight: str = field("dialogue", choices=("dialogue", "token"))
    order: str = field("shuffle", choices=ORDERS, doc="of an epoch, slice k of which is global batch k")
    cost: Cost | None = field(None, doc="balances rows; the trainer computes it from the model where it is missing")


@dataclass(frozen=True, kw_only=True)
class Loader:
    """How batches are read; nothing here changes what they contain."""

    threads: int = field(2, low=1, doc="decoding threads of one rank, or of each of its workers")
    workers: int = field(0, low=0, doc="decoding processes of one rank; 0: its threads decode in the rank's process")
    prefetch_mb: int = field(512, low=1, doc="bound on decoded rows waiting for the training step, of one rank")
    max_unreadable: int = field(100, low=0, doc="a run stops when more dialogues than this could not be read")
    cache: str = field("~/.cache/framestream", doc="folder of copies of remote roots: their indexes, and ranges")
    cache_gb: float = field(0.0, low=0, doc="gigabytes of ranges of remote shards kept there at most; 0 keeps none")
    read_timeout: float = field(60.0, low=1, doc="seconds that reading one medium may take, all tries together")
    retries: int = field(5, low=0, doc="tries of a request to a remote root after the first")


@dataclass(frozen=True, kw_only=True)
class VisionTower:
    """Video transformer; the dimensions' defaults are UMT-L's."""

    type: str = field("umt", choices=("umt", "internvideo2"))
    width: int = field(1024, low=1)
    depth: int = field(24, low=2, doc="blocks of the published encoder; the last one is not run")
    heads: int = field(16, low=1)
    patch: int = field(16, low=1)
    mlp_ratio: float = 4.0
    table_side: int = field(14, low=1, doc="umt: patches along a side of the position table before interpolation")
    drop_path: float | None = field(None, low=0, doc="internvideo2: drop path of the last block; 0.25 if not given")
    group_clips: int = field(8, low=1, doc="clips or tiles that go through the tower, and are recomputed, at once")

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ManifestError(f"heads: {self.heads} does not divide width ({self.width})")
        if self.type == "umt":
            if self.drop_path:
                raise ManifestError("drop_path: umt has none; leave it out or set type to internvideo2")
            return
        if self.width % 16:
            raise ManifestError(f"width: {self.width} is not a multiple of 16, as internvideo2's positions need")
        if self.drop_path is None:
            object.__setattr__(self, "drop_path", 0.25)
        if self.drop_path >= 1:
            raise ManifestError(f"drop_path: {self.drop_path} is a probability; it must be below 1")


@dataclass(frozen=True, kw_only=True)
class Connector:
    """ToMe16 MLP: token merging to 16 tokens a frame, then two linear layers."""

    type: str = field("tome16_mlp", choices=("tome16_mlp",))


@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """Qwen2 family; the defaults are Qwen2-7B."""

    hidden_size: int = field(3584, low=1)
    intermediate_size: int = field(18944, low=1)
    num_hidden_layers: int = field(28, low=1)
    num_attention_heads: int = field(28, low=1)
    num_key_value_heads: int = field(4, low=1)
    vocab_size: int = field(152064, low=1)
    max_position_embeddings: int = field(32768, low=1)
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        for name, count in (
            ("num_attention_heads", self.hidden_size),
            ("num_key_value_heads", self.num_attention_heads),
        ):
            if count % getattr(self, name):
                raise ManifestError(f"{name}: {getattr(self, name)} does not divide {count}")


@dataclass(frozen=True, kw_only=True)
class Model:
    """The architecture; it stands in the manifest so that nothing needs weights to be planned."""

    vision_tower: VisionTower = VisionTower()
    connector: Connector = Connector()
    language_model: LanguageModel = LanguageModel()


@dataclass(frozen=True, kw_only=True)
class InitFrom:
    """Where weights come from. ``run`` is an earlier stage; a part named beside it wins.

    Files and folders may lie on the hub: ``hf:OWNER/NAME[@REVISION]:FILE``, ``hf:OWNER/NAME[@REVISION]``.
    """

    run: str = field("", doc="the stage that this one continues, by name or folder, or a published checkpoint")
    vision_tower: str = field("", doc="encoder file or folder; `random` starts from the seed")
    connector: str = field("", doc="mm_projector.bin, folder, or `random`")
    language_model: str = field("", doc="Qwen2 folder, hub name, or `random`")


@dataclass(frozen=True, kw_only=True)
class Part:
    """Training of one of the three parts; ``lr`` and ``weight_decay`` do nothing where ``train`` is false."""

    train: bool
    lr: float = field(0.0, low=0)
    weight_decay: float = field(0.0, low=0)

    def __post_init__(self) -> None:
        if self.train and not self.lr:
            raise ManifestError("lr: a trained part needs a learning rate above 0")


@dataclass(frozen=True, kw_only=True)
class Train:
    """The optimisation; the defaults are the published ones."""

    vision_tower: Part
    connector: Part
    language_model: Part
    epochs: int = field(1, low=1)
    max_steps: int | None = field(None, low=1, doc="end after this many optimiser steps")
    warmup: float = field(0.03, low=0, doc="share of all steps")
    beta1: float = field(0.9, low=0)
    beta2: float = field(0.999, low=0)
    epsilon: float = field(1e-8, low=0)
    clip_norm: float = field(1.0, low=0)
    dtype: str = field("bf16", choices=("bf16", "fp32"))
    zero_stage: int = field(3, choices=(1, 2, 3))
    persistence_threshold: int = field(
        100_000, low=0, doc="ZeRO-3: parameters with fewer elements stay whole on every rank"
    )
    offload: str = field("none", choices=("none", "optimizer", "all"))
    gradient_checkpointing: bool = True
    save_every: int = field(500, low=1, doc="optimiser steps between checkpoints")
    keep_last: int = field(2, low=1, doc="checkpoints kept")
    log_every: int = field(1, low=1)
    max_not_finite: int = field(20, low=0, doc="a run stops when more global batches than this were not finite")
    peak_tflops: float | None = field(None, low=0.001, doc="of a rank's device, for MFU; known for common GPUs in bf16")
    profile_step: int | None = field(None, low=1, doc="the first optimiser step that torch's profiler records")
    profile_steps: int = field(2, low=1, doc="how many it records")
    timeout_minutes: float = field(30.0, low=0.1, doc="ranks that wait for each other longer than this end the run")
    check_calls: bool = field(False, doc="compare the model calls of all ranks after each global batch (debugging)")

    def __post_init__(self) -> None:
        if self.offload == "all" and self.zero_stage < 3:
            raise ManifestError("offload: all needs zero_stage 3; set that, or offload: optimizer")


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Scoring of held-out (``split: val``) dialogues by greedy generation."""

    batch: int = field(32, low=1)
    max_new_tokens: int = field(16, low=1)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """One stage, whole."""

    stage: int = field(choices=(1, 2, 3, 4))
    output: str = field(doc="folder of the run: checkpoints, logs, final weights")
    data: Data
    frames: Frames
    text: Text
    batching: Batching
    train: Train
    init_from: InitFrom
    name: str = ""
    seed: int = field(0, low=0)
    shards: str = field("shards", doc="stage N is read from SHARDS/stageN; a folder or an address")
    compat: str = field("none", choices=("none", "published"), doc="published: with the published readers' faults")
    images: Images = Images()
    mix: tuple[MixRoot, ...] = ()
    loader: Loader = Loader()
    model: Model = Model()
    evaluate: Evaluate = Evaluate()

    def __post_init__(self) -> None:
        patch, size = self.model.vision_tower.patch, self.frames.size
        if size % patch:
            raise ManifestError(f"frames.size: {size} is not a multiple of model.vision_tower.patch ({patch})")
        if (size // patch) ** 2 < TOKENS_PER_TILE:
            raise ManifestError(f"frames.size: {size} gives {(size // patch) ** 2} patches; a tile needs at least 64")
        longest, positions = self.text.max_tokens, self.model.language_model.max_position_embeddings
        if longest > positions:
            limit = f"model.language_model.max_position_embeddings ({positions})"
            raise ManifestError(f"text.max_tokens: {longest} is more than {limit}; lower it or raise that")
        if self.mix and self.batching.order == "modality_length":
            raise ManifestError(
                "batching.order: modality_length drops another number of dialogues of a mix in each epoch; use modality"
            )
        named = self.init_from
        if not named.run and not (named.vision_tower and named.language_model):
            raise ManifestError("init_from: name a run, or vision_tower and language_model")
        if named.run and Path(named.run) == Path(self.output):
            raise ManifestError(f"init_from.run: {named.run} is this run's own output; name the stage before it")
        self._check_mix()

    def _check_mix(self) -> None:
        roots, weights = [root.root.rstrip("/") for root in self.mix], [root.weight for root in self.mix]
        for number, root in enumerate(self.mix):
            if roots[number] in roots[:number]:
                raise ManifestError(f"mix[{number}].root: {root.root} stands twice; name each root once")
            if (root.weight is None) != (weights[0] is None):
                raise ManifestError(f"mix[{number}].weight: all roots have one, or none has; give or remove them all")
            for place, entry in enumerate(root.entries):
                try:
                    entry.frames(self.frames)
                except ManifestError as error:
                    raise ManifestError(f"mix[{number}].entries[{place}].{error}") from None
        if self.mix and not any(weight is None or weight > 0 for weight in weights):
            raise ManifestError("mix[0].weight: all are 0; give at least one root a weight above 0")

    @property
    def shard_root(self) -> Path:
        """Folder that this stage's shards are built in.

        Raises:
            ManifestError: ``shards`` is an address.
        """
        if "://" in self.shards:
            raise ManifestError(f"shards: {self.shards} is an address; build in a folder and copy it there")
        return Path(self.shards) / f"stage{self.stage}"

    @property
    def shard_place(self) -> str:
        """Folder or address that this stage's shards are read from."""
        return f"{self.shards.rstrip('/')}/stage{self.stage}" if "://" in self.shards else str(self.shard_root)


def load_manifest(path: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> Manifest:
    """Read, validate and freeze a manifest; ``overrides`` are ``a.b.c=VALUE`` assignments.

    A stage that ``init_from.run`` names, as ``stage2`` for the ``stage2.yaml`` beside ``path``, becomes its ``output``.

    Raises:
        ManifestError: one line naming the file, the field and the fix.
    """
    value = read_yaml(path)
    for assignment in overrides:
        value = override(value, assignment)
    value = _chained(value, Path(path))
    manifest = build(Manifest, value, f"{path}: ")
    return manifest if manifest.name else dataclasses.replace(manifest, name=Path(path).stem)


def _chained(value: dict, path: Path) -> dict:
    """``value`` with the output folder in place of the name of a manifest beside ``path`` in ``init_from.run``."""
    named = value.get("init_from")
    run = named.get("run") if isinstance(named, dict) else None
    if not isinstance(run, str) or not re.fullmatch(r"[\w-]+", run):
        return value
    before = path.with_name(f"{run}.yaml")
    if not before.is_file():
        return value
    output = read_yaml(before).get("output")
    if not isinstance(output, str):
        raise ManifestError(f"{path}: init_from.run: {before} has no output; give it one, or name a folder")
    return {**value, "init_from": {**named, "run": output}}
