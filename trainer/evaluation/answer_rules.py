"""Normalize answers, and find the option that a reply chooses, as multiple-choice and exact-match scoring do.

The rules follow those of lmms-eval and VLMEvalKit (``can_infer_option``): a reply may lead to a letter in words
("The answer is B"), put it in brackets or in bold, and continue after it. docs/evaluation.md has them as a table.
"""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal

MAX_CHARACTERS = 2000  #: of a reply that are compared; longer ones are cut

_PAIRS = {
    "(": ")",
    "[": "]",
    "{": "}",
    "<": ">",
    '"': '"',
    "'": "'",
    "“": "”",
    "‘": "’",
    "«": "»",
    "「": "」",
    "【": "】",
}
_MARKUP = re.compile(
    r"[*`]+|\$|</?(?:answer|b|strong)>|\\(?:boxed|text|mathrm|textbf)(?=\{)|^#+\s"
)  # Markdown and LaTeX around an answer
_ENDS = ".,;:!?。、,"
_FILLER = (
    r"(?:(?:so|thus|therefore|hence|sure|ok|okay|well)[,.!:]?\s+)?(?:i\s+(?:think|believe|guess)\s+(?:that\s+)?)?"
    r"(?:my\s+|the\s+)?(?:(?:best|correct|right|most likely|final)\s+)?"
)
#: what may lead to any answer
_LEAD = re.compile(
    rf"{_FILLER}(?:answer|choice)(?:\s+(?:is|would be|should be|must be))?(?:\s*[:=]|\s+[-–—]\s|(?<=is)|(?<=be))\s*"
    r"|[【\[]?(?:正确|最终)?(?:答案|回答)(?:应该)?(?:是|为)?[】\]]?\s*:?\s*|(?:正解|答え)は?\s*:?\s*|정답은?\s*:?\s*",
    re.IGNORECASE,
)
#: what may lead to a letter, also after the above
_LETTER_LEAD = re.compile(
    rf"{_FILLER}(?:(?:option|choice|answer|letter)(?:\s+is)?\s*:?|it(?:\s+is|['’]s)|(?:choose|select|pick)(?:\s+option)?)\s+"
    r"|i\s+(?:would\s+)?(?:choose|select|pick|go with)\s+(?:option\s+)?"
    r"|(?:正确)?(?:选项|选择|应选|选)(?:是|为)?\s*:?\s*",
    re.IGNORECASE,
)
_OPENING, _CLOSING = r"[(\[{<\"'“‘「【]*", r"[)\]}>\"'”’」】]*"
_LETTER = re.compile(rf"({_OPENING})\s*([A-Za-z])(?![\w+#]|['’]\w)((?:\s*[)\]}}>\"'”’」】])*)(?![+#\-–_/&]\w|[+#])")
#: a second letter after the first makes the reply ambiguous: "A and B", "A, B", "A/B", "(A) (B)"
_SECOND = re.compile(
    rf"[\s,./&;|+]*(?:\b(?:and|or|und|nor)\b|和|或|与|及)?[\s,./&;|]*{_OPENING}([A-Za-z]){_CLOSING}(?![\w'’])(?!\s+\w)"
)
_JOINED = re.compile(rf"\s*(?:[&/|]|,?\s*\b(?:and|or|nor)\b|和|或|与|及)\s*{_OPENING}[A-Za-z]{_CLOSING}(?![\w'’])")
#: words after a bare letter that make no sentence with an article: "A is correct", "A because ..."
_AFTER = re.compile(
    r"\s+(?:is\s+(?:the\s+)?(?:correct|right|true|best|answer)\b|because\b|since\b|[-–—=]\s|\()", re.IGNORECASE
)
_NUMBER = re.compile(r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[+-]?\.\d+")


def normalize_answer(text: str) -> str:
    """Normalize a text: Unicode NFKC, case, space, Markdown, outer brackets and quotes, final punctuation, an article.

    A number gets one form: ``1,000`` and ``1000.0`` are equal.
    """
    plain = _plain(text[:MAX_CHARACTERS])
    lead = _LEAD.match(plain)
    plain = _compose(_strip(plain[lead.end() :] if lead else plain).casefold())
    short = re.sub(r"^(?:a|an|the)\s+(?=\S)", "", plain)
    if _NUMBER.fullmatch(short) and len(short) < 40:
        number = Decimal(short.replace(",", "")).normalize()
        return f"{number if number else Decimal(0):f}"
    return short


def reply_letter(reply: str) -> str:
    """Return the letter of the option that a reply chooses, in upper case; empty if it chooses none or several."""
    text = _plain(reply[:MAX_CHARACTERS])
    lead = _LEAD.match(text)
    text = text[lead.end() :] if lead else text
    lead_to_letter = _LETTER_LEAD.match(text)
    text = text[lead_to_letter.end() :] if lead_to_letter else text
    found = _LETTER.match(text)
    if not found:
        return ""
    opening, letter, closing = found.groups()
    rest = text[found.end() :]
    second = _SECOND.match(rest)
    if _JOINED.match(rest) or (second and (second[1].isupper() or letter.islower())):
        return ""
    if not rest.strip() or opening or closing or rest[0] in ".:;)]}!?,。、" or rest[0] == "\n" or _AFTER.match(rest):
        return letter.upper()
    # a sentence may begin with "A" or "I", which are words; other capitals are letters of options
    return letter if letter.isupper() and letter not in "AI" and rest[0].isspace() else ""


def parse_option(answer: str) -> tuple[str, str] | None:
    """Return letter and text of an expected answer that is an option: ``B``, ``(B)``, ``B. red``; else None."""
    text = _plain(answer[:MAX_CHARACTERS])
    lead = _LEAD.match(text)
    text = text[lead.end() :] if lead else text
    found = re.fullmatch(r"[(\[<\"'“]?([A-Za-z])(?:[)\]>\"'”]+[.:]?|[.:)])?|", _strip_space(text))
    if found and found[1]:
        return found[1].upper(), ""
    found = re.fullmatch(r"(?:[(\[]([A-Za-z])[)\]]\s*[.:]?|([A-Z])[.:)]\s)\s*(.+)", text, re.DOTALL)
    return ((found[1] or found[2]).upper(), found[3]) if found and not _SECOND.match(found[3]) else None


def _plain(text: str) -> str:
    """Return a text in Unicode NFKC (full-width letters become ASCII) without Markdown and outer space."""
    text = _compose(text).replace("\u2212", "-").replace("。", ".").replace("、", ",")
    return _MARKUP.sub("", text.strip()).strip()


def _compose(text: str) -> str:
    return unicodedata.normalize("NFKC", text)


def _strip_space(text: str) -> str:
    return " ".join(text.split())


def _strip(text: str) -> str:
    """Remove outer brackets, quotes and final punctuation, as long as there are any, and repeated space."""
    text = _strip_space(text)
    while True:
        shorter = text.rstrip(_ENDS + " ")
        inner = shorter[1:-1]
        if len(shorter) > 1 and _PAIRS.get(shorter[0]) == shorter[-1] and not {shorter[0], shorter[-1]} & {*inner}:
            shorter = inner.strip()
        if shorter == text:
            return text
        text = shorter
