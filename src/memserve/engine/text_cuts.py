"""Where a text may be cut so that its parts, encoded separately, have the tokens of the whole.

Before BPE, a tokenizer splits its text into words with a regular expression. The expressions supported here
always split between a letter and a space that precedes a letter. No alternative that matches the first letter
also matches the space, and none looks behind. The only lookahead comes after whitespace, and the part before
the cut ends with a letter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import msgspec
import tokenizers

PART_CHARACTERS = 256
"""Least length of every part but the last. A text that grows by less is cached except for its end."""
_CUT = re.compile("[A-Za-z](?= [A-Za-z])")
CL100K = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""The split rule of cl100k and its descendants, which differ in how many digits stay together."""
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The split rule of Mistral's Tekken: it also splits where a lower-case letter precedes an upper-case one."""
_KNOWN_RULES = frozenset((CL100K % r"\p{N}", CL100K % r"\p{N}{1,3}", TEKKEN))


def parts(text: str) -> Iterator[str]:
    """The text in parts.

    A cut depends only on the text up to two characters after it, so texts that share a prefix share its
    parts.
    """
    start = 0
    while (found := _CUT.search(text, start + PART_CHARACTERS)) is not None:
        yield text[start : found.end()]
        start = found.end()
    yield text[start:]


def may_be_cut(built: tokenizers.Tokenizer) -> bool:
    """Whether texts may be cut by :func:`parts` for this tokenizer; false where that is not known."""
    added = built.get_added_tokens_decoder().values()
    if built.pre_tokenizer is None or any(not token.special for token in added):
        return False
    if built.normalizer is not None and _settings(built.normalizer)["type"] != "NFC":
        return False
    outer = _settings(built.pre_tokenizer)
    steps = outer["pretokenizers"] if outer["type"] == "Sequence" else [outer]
    return all(map(_leaves_cuts, steps)) and any(map(_cuts, steps))


def _settings(step: Any) -> dict[str, Any]:
    settings: dict[str, Any] = msgspec.json.decode(step.__getstate__())
    return settings


def _cuts(step: dict[str, Any]) -> bool:
    """Whether a step splits between words, and treats the parts as it treats the whole."""
    if step["type"] == "ByteLevel":
        return step["use_regex"] and not step["add_prefix_space"]
    return (
        step["type"] == "Split"
        and step["pattern"].get("Regex") in _KNOWN_RULES
        and step["behavior"] == "Isolated"
        and not step["invert"]
    )


def _leaves_cuts(step: dict[str, Any]) -> bool:
    """Whether a step treats the parts as it treats the whole."""
    plain = step["type"] == "ByteLevel" and not step["add_prefix_space"]
    return plain or step["type"] == "Digits" or _cuts(step)
