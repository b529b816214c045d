"""Open the tensors of files and folders of weights without loading them. All of these are input.

Files are read with safetensors or ``torch.load(weights_only=True)``; nothing in a file is ever executed. A name that
two files of a folder have is ambiguous, unless the folder's index says which file counts. A folder that a run wrote
has the digests of its files in config.json, which are checked before the first use.
"""

from __future__ import annotations

import functools
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open

from framestream.pipeline.utils.command_line import printable_line
from framestream.pipeline.utils.digests import bytes_digest, file_digest
from framestream.pipeline.utils.records import RecordError, load_json, parse_record
from framestream.trainer.weights.hf_config import NATIVE_MODEL_TYPE
from framestream.trainer.weights.tensor_files import INDEX, LazyTensor, WeightsError

MAX_TENSORS = 200_000  #: of a folder
MAX_INDEX_BYTES = 64 << 20  #: of an index of files of weights
MAX_CONFIG_BYTES = 16 << 20  #: of a config.json
SAMPLES, SAMPLE_BYTES = 64, 16_384  #: blocks of a file of weights that its digest as the base of adapters reads
INDEXES = (INDEX, "pytorch_model.bin.index.json")
FLOATS = ("F64", "F32", "F16", "BF16")  #: dtypes of weights, as safetensors names them
#: what torch, safetensors and DeepSpeed raise about damaged files of tensors
READ_ERRORS = (
    OSError,
    RuntimeError,
    EOFError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    AssertionError,
    OverflowError,
    MemoryError,
    ImportError,
    UnpicklingError,
    SafetensorError,
    struct.error,
    zipfile.BadZipFile,
)


def open_tensors(path: Path) -> dict[str, LazyTensor]:
    """Open every tensor of a file or folder, by the name in the file.

    A folder contains an index and the files it names, safetensors files, or one torch file (.bin, .pt, .pth).

    Raises:
        WeightsError: no such file, a file of another format, a damaged one, or a name that two files have.
    """
    tensors: dict[str, LazyTensor] = {}
    files: dict[str, Path] = {}
    located, digests = read_index(path), _read_digests(path)
    for file in _weight_files(path, located):
        check_digest(file, digests.get(file.name))
        try:
            found = _safetensors(file) if file.suffix == ".safetensors" else _torch_file(file)
        except READ_ERRORS as error:
            reason = printable_line(str(error).strip().split("\n")[0] or type(error).__name__, 200)
            raise WeightsError(f"{file}: not a file of tensors that can be read ({reason}); fetch it again") from None
        for name, tensor in found.items():
            if located and located.get(name) != file.name:
                continue
            if name in files:
                fix = f"name one of the files, or add the {INDEX} that says which one counts"
                raise WeightsError(f"{path}: {printable_line(name)} is in {files[name].name} and in {file.name}; {fix}")
            tensors[name], files[name] = tensor, file
        if len(tensors) > MAX_TENSORS:
            raise WeightsError(f"{path}: has over {MAX_TENSORS:,} tensors; is it another model?")
    if absent := sorted(located.keys() - tensors.keys()):
        where = f"{located[absent[0]]}, which lacks it"
        raise WeightsError(f"{path}: the index says that {printable_line(absent[0])} is in {where}; fetch both again")
    return tensors


def read_index(path: Path) -> dict[str, str]:
    """Read the index of a folder: name of a tensor -> name of its file; empty if there is no index.

    Raises:
        WeightsError: it is damaged, or names a file outside of the folder or one that is missing.
    """
    index = next((path / name for name in INDEXES if (path / name).is_file()), None)
    if index is None:
        return {}
    try:
        content = load_json(_read_bounded(index, MAX_INDEX_BYTES))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{index}: not JSON ({_reason(error)}); fetch it again") from None
    located = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(located, dict) or not located:
        raise WeightsError(f"{index}: has no weight_map; fetch it again")
    names = {name for name in located.values() if isinstance(name, str)}
    odd = [name for name in names if "/" in name or "\0" in name or name in ("", ".", "..")]
    if odd or len(names) < len(set(map(repr, located.values()))):
        raise WeightsError(f"{index}: weight_map has a value that is no name of a file in its folder; fetch it again")
    if absent := sorted(name for name in names if not (path / name).is_file()):
        raise WeightsError(
            f"{path}: {index.name} names files that are missing: {printable_line(', '.join(absent), 200)}"
        )
    return located


def _weight_files(path: Path, located: Mapping[str, str]) -> list[Path]:
    """List the files of weights at ``path``; ``located`` is its index."""
    if path.is_file():
        return [path]
    if located:
        return [path / name for name in sorted(set(located.values()))]
    files = sorted(file for file in path.glob("*.safetensors") if file.is_file())
    if not files:
        torch_files = (file for suffix in ("bin", "pt", "pth") for file in path.glob(f"*.{suffix}"))
        files = sorted(file for file in torch_files if file.is_file())
        if len(files) > 1:
            names = printable_line(", ".join(file.name for file in files), 200)
            raise WeightsError(f"{path}: several weights files and no index; name one of {names}")
    if not files:
        raise WeightsError(f"{path}: no weights here (*.safetensors, *.bin, *.pt, *.pth)")
    return files


def _safetensors(file: Path) -> dict[str, LazyTensor]:
    opened = safe_open(file, framework="pt")
    found = {}
    for key in opened.keys():  # noqa: SIM118 (not a mapping)
        view = opened.get_slice(key)
        read = functools.partial(opened.get_tensor, key)
        found[key] = LazyTensor(tuple(view.get_shape()), read, view.get_dtype() in FLOATS)
        if len(found) > MAX_TENSORS:
            break
    return found


def _torch_file(file: Path) -> dict[str, LazyTensor]:
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            if any(member.file_size > file.stat().st_size for member in archive.infolist()):
                raise ValueError("it is compressed, which torch.save never does")
    values = torch.load(file, map_location="cpu", weights_only=True)
    for wrapper in ("module", "model", "state_dict"):
        if isinstance(values, dict) and isinstance(values.get(wrapper), dict):
            values = values[wrapper]
    if not isinstance(values, dict):
        raise ValueError(f"a {type(values).__name__} instead of named tensors")
    tensors = {key: value for key, value in values.items() if isinstance(key, str) and isinstance(value, torch.Tensor)}
    return {
        key: LazyTensor(tuple(value.shape), functools.partial(torch.Tensor.detach, value), value.is_floating_point())
        for key, value in tensors.items()
    }


# -------------------------------------------------------------------------------------------- config.json and digests


def read_config(folder: Path) -> dict:
    """Read config.json of a folder of weights. That of a run is a record with a digest.

    Raises:
        WeightsError: it is missing, damaged, or not a JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise WeightsError(f"{folder}: no config.json; name the `final` folder of a finished run")
    try:
        config = load_json(data := _read_bounded(path, MAX_CONFIG_BYTES))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: not JSON ({_reason(error)}); fetch it again") from None
    if not isinstance(config, dict):
        raise WeightsError(f"{path}: a {type(config).__name__} instead of an object; fetch it again")
    if config.get("model_type") != NATIVE_MODEL_TYPE:
        return config
    try:
        return parse_record(data, str(path), "config.json of a run", "copy it again, or train the stage again")
    except RecordError as error:
        raise WeightsError(str(error)) from None


def native_config(path: Path) -> dict:
    """Return config.json of the final weights of a run; empty for other folders and for files."""
    if not (path / "config.json").is_file():
        return {}
    config = read_config(path)
    return config if config.get("model_type") == NATIVE_MODEL_TYPE else {}


def weights_digest(path: Path) -> str:
    """Return a digest of a file or folder of weights: of its config.json, and of sizes and samples of its files.

    A folder with adapters has digests of all its files in config.json.

    Raises:
        WeightsError: there are no weights, or they cannot be read.
    """
    files = [] if native_config(path).get("base") else _weight_files(path, read_index(path))
    try:
        facts = [(file.name, *_sample(file)) for file in files]
        config = file_digest(path / "config.json") if (path / "config.json").is_file() else ""
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({_reason(error)})") from None
    return bytes_digest(repr((facts, config)).encode())


def _sample(file: Path) -> tuple[int, str]:
    """Return the size of a file, and a digest of blocks that are spread over it."""
    size, blocks = file.stat().st_size, []
    with open(file, "rb") as opened:
        for offset in range(0, size, max(SAMPLE_BYTES, size // SAMPLES)):
            opened.seek(offset)
            blocks.append(opened.read(SAMPLE_BYTES))
    return size, bytes_digest(b"".join(blocks))


def _read_digests(path: Path) -> dict[str, str]:
    """Return the digests of the files of a run's final weights, by name; empty for other folders and older versions."""
    digests = native_config(path).get("digests")
    return digests if isinstance(digests, dict) else {}


def check_digest(file: Path, digest: str | None) -> None:
    """Compare a file with its digest, if it has one.

    Raises:
        WeightsError: they differ, or the file cannot be read.
    """
    try:
        if digest is not None:
            facts = file.stat()
            if _digest_of(file, facts.st_size, facts.st_mtime_ns) != digest:
                raise WeightsError(f"{file}: damaged (its digest differs); copy it again, or train the stage again")
    except OSError as error:
        raise WeightsError(f"{file}: cannot be read ({_reason(error)})") from None


@functools.lru_cache(maxsize=4096)
def _digest_of(file: Path, size: int, modified: int) -> str:
    """Return the digest of a file, which is read once as long as its size and its time in nanoseconds stay."""
    return file_digest(file)


def _read_bounded(path: Path, limit: int) -> bytes:
    with open(path, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"has over {limit:,} bytes")
    return data


def _reason(error: Exception) -> str:
    return printable_line(" ".join(str(getattr(error, "strerror", None) or error).split()), 200)
