"""Load tokenizers from folders or the hub. Their files are input: any damage is one line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from framestream.pipeline.config.schema import ManifestError
from framestream.pipeline.utils.records import load_json

MAX_CONFIG_BYTES = 4 << 20  #: of a JSON file beside tokenizer.json and vocab.json
MAX_TOKENIZER_BYTES = 256 << 20  #: of all files of a tokenizer folder that are read
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
#: vocabularies of other kinds, which transformers may convert
OTHER_VOCABULARIES = ("vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json")
#: a Hugging Face fast tokenizer; it is not imported here because that takes seconds
Tokenizer = Any


def load_tokenizer(name: str) -> Tokenizer:
    """Load a Hugging Face fast tokenizer from a folder or by hub name; code that comes with it is never run.

    Raises:
        ManifestError: it cannot be loaded, or is not a fast tokenizer.
    """
    from transformers import AutoTokenizer

    path = Path(name)
    local = name.startswith((".", "/")) or len(path.parts) > 2 or (len(path.parts) == 2 and path.parent.is_dir())
    if local and not path.is_dir():  # it looks like a folder, so the hub is not asked
        raise ManifestError(f"text.tokenizer: {name} is not a folder here")
    if path.is_dir():
        _check_tokenizer_files(path)
    with tokenizer_errors(name):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **_config_option(path))
        tokenizer("probe", split_special_tokens=True)  # some damage shows at the first use
        is_fast = tokenizer.is_fast
        _check_special_tokens(tokenizer, path)
    if not is_fast:
        raise ManifestError(f"text.tokenizer: {name!r} has no tokenizer.json; convert it to a fast tokenizer first")
    return tokenizer


def _config_option(folder: Path) -> dict[str, Any]:
    """Return an empty configuration where config.json is of a model that transformers does not know, as exports are.

    Its name would decide nothing about the tokenizer, and transformers would warn about it and about its fields.
    """
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    try:
        with open(folder / "config.json", "rb") as file:
            found = load_json(file.read(MAX_CONFIG_BYTES))
    except (OSError, ValueError):
        return {}  # for transformers to judge
    kind = found.get("model_type") if isinstance(found, dict) else None
    return {"config": PreTrainedConfig()} if isinstance(kind, str) and kind not in CONFIG_MAPPING else {}


def _check_tokenizer_files(folder: Path) -> None:
    """Check the files of a tokenizer's folder before the tokenizer library reads them.

    Raises:
        ManifestError: the vocabulary is missing, they are too large, or one of them is not valid JSON.
    """
    files = [path for path in (folder / name for name in TOKENIZER_FILES) if path.is_file()]
    try:
        if missing := _missing_file(folder):
            raise ValueError(f"{missing} is missing")
        if sum(path.stat().st_size for path in files) > MAX_TOKENIZER_BYTES:
            raise ValueError(f"its files have over {MAX_TOKENIZER_BYTES >> 20} MiB")
        added: dict[int, str] = {}
        for path in files:
            data = path.read_bytes()
            if path.suffix == ".json":
                if len(data) > MAX_CONFIG_BYTES and path.name not in ("tokenizer.json", "vocab.json"):
                    raise ValueError(f"{path.name} has over {MAX_CONFIG_BYTES >> 20} MiB")
                try:
                    found = load_json(data)
                except ValueError as error:
                    raise ValueError(f"{path.name} is not JSON: {error}") from None
                if not isinstance(found, dict):
                    raise ValueError(f"{path.name} is not a JSON object")
                _check_added_tokens(path.name, found, added)
            else:
                data.decode()
    except (OSError, ValueError) as error:
        raise _tokenizer_error(str(folder), error) from None


def _missing_file(folder: Path) -> str:
    """Return the file of the vocabulary that a folder lacks; empty if it has one.

    transformers makes a tokenizer without it, which knows the control tokens alone.
    """
    if (folder / "tokenizer.json").is_file() or any((folder / name).is_file() for name in OTHER_VOCABULARIES):
        return ""
    pair = [name for name in ("vocab.json", "merges.txt") if not (folder / name).is_file()]
    return pair[0] if len(pair) == 1 else "tokenizer.json" if pair else ""


def _check_special_tokens(tokenizer: Tokenizer, folder: Path) -> None:
    """Raise ValueError if loading added special tokens that the folder's tokenizer.json lacks."""
    if (folder / "tokenizer.json").is_file():
        content = load_json((folder / "tokenizer.json").read_bytes())
        vocabulary = content["model"]["vocab"]  # a list of tokens and scores in unigram models
        tokens = vocabulary if isinstance(vocabulary, dict) else [token for token, _ in vocabulary]
        known = {*tokens, *(token["content"] for token in content.get("added_tokens", ()))}
        if unknown := sorted(set(tokenizer.get_vocab()) - known):
            raise ValueError(f"tokenizer.json lacks {', '.join(unknown)[:80]}, which another of its files names")


def _check_added_tokens(file: str, found: dict, added: dict[int, str]) -> None:
    """Check the added tokens that one file of a tokenizer lists; some damage would crash the tokenizer library.

    Args:
        file: its name.
        found: its content.
        added: the added tokens of the files before, by id; those of this file are put in.

    Raises:
        ValueError: they have another form, or contradict those of a file before.
    """
    listed, decoder = found.get("added_tokens", []), found.get("added_tokens_decoder", {})
    if not isinstance(listed, list) or not isinstance(decoder, dict):
        raise ValueError(f"{file}: added_tokens has another form")
    pairs = [(token.get("id") if isinstance(token, dict) else None, token) for token in listed]
    for number, token in [*pairs, *decoder.items()]:
        content = token.get("content") if isinstance(token, dict) else None
        if not isinstance(content, str) or not content or not str(number).isdigit():
            raise ValueError(f"{file}: an added token has no id or no content")
        others = {known for known, text in added.items() if text == content} - {int(number)}
        if added.setdefault(int(number), content) != content or others:
            raise ValueError(f"{file}: the added token {content!r:.40} contradicts tokenizer.json")


@contextlib.contextmanager
def tokenizer_errors(name: str) -> Iterator[None]:
    """Convert any failure of the tokenizer library, also a panic of its native code, into one line."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError, ManifestError):
        raise
    except BaseException as error:  # a panic is no Exception
        raise _tokenizer_error(name, error) from None


def _tokenizer_error(name: str, error: BaseException) -> ManifestError:
    is_folder = Path(name).is_dir()
    found, fix = (
        ("", "copy its files again") if is_folder else (" (no such folder here)", "fetch it, or name its folder")
    )
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return ManifestError(f"text.tokenizer: cannot load a tokenizer from {name!r}{found}: {reason}; {fix}")
