"""A small byte-level BPE tokenizer in the layout of Qwen2's, trained on all texts of the demo.

Ids 0..255 are the bytes in the order of the GPT-2 alphabet (so 198 is the newline). The merges follow, then
``<|endoftext|>``, ``<|im_start|>`` and ``<|im_end|>``. Words of the demo become single tokens, both at the start of a
line and after a space. The vocabulary does not depend on the seed.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from framestream.tools.demo.dialogues import DESCRIBE, DESCRIBE_IMAGE, FILMS, QUESTIONS, REAL, SAME_COLOR, TEXT_ONLY
from framestream.tools.demo.worlds import COLORS, DIRECTIONS, NUMBERS, SHAPES, SIDES

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCABULARY = 768  #: upper bound of the vocabulary, and rows of the demo language model's embedding

#: How Qwen2 splits text before merging: contractions, words with one leading symbol, single digits, other symbols with
#: the newlines after them, newlines, and spaces (the last one belongs to the next word).
QWEN2_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def corpus() -> list[str]:
    """Return every fixed sentence of the demo, and the words of its answers many times."""
    words = [
        *COLORS,
        *SHAPES,
        *(f"{shape}s" for shape in SHAPES),
        "crosses",
        *SIDES,
        *NUMBERS,
        *DIRECTIONS,
        *FILMS,
        "yes",
        "no",
    ]
    words += ["system", "user", "assistant", "grey", "black", "flash"]
    lines = [f"{word}\n {word} {word}" for word in words] * 20
    lines += [question for wordings in QUESTIONS.values() for question in wordings] * 20
    lines += [DESCRIBE, DESCRIBE_IMAGE, SAME_COLOR.replace("<image>", ""), "You are a helpful assistant."] * 10
    lines += ["a red circle on the left, then an orange cross that moves up", "two blue crosses on the right"] * 10
    lines += ["\nThe video lasts for 8.00 seconds, and 8 frames are uniformly sampled from it. "] * 20
    lines += [text for pair in TEXT_ONLY for text in pair] * 2
    lines += [text for *_, pairs in REAL for pair in pairs for text in pair] * 2
    return lines


def train_tokenizer() -> Tokenizer:
    """Train the tokenizer. The result is deterministic."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL),
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer


def write_tokenizer(folder: Path) -> int:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` for ``AutoTokenizer``. Returns the number of ids."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(tokenizer.token_to_id(t)): {"content": t, **flags} for t in SPECIAL},
        "additional_special_tokens": list(SPECIAL[1:]),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": SPECIAL[2],
        "errors": "replace",
        "model_max_length": 16384,
        "pad_token": SPECIAL[0],
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return tokenizer.get_vocab_size()
