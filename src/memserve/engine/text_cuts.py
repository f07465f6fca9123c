"""Where a text may be cut so that its parts, each encoded by itself, have the tokens of the whole.

Before BPE a tokenizer cuts its text into words by a regular expression. Between a letter and a blank with a letter behind it
the expressions here always cut: what takes the first letter takes no blank, and none looks back; what looks ahead looks
for blanks, of which the part before has none at its end.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import msgspec
import tokenizers

PART_CHARACTERS = 256
"""A text that grows by less than that is looked up but for its last part."""
_CUT = re.compile("[A-Za-z](?= [A-Za-z])")
CL100K = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""The rule of cl100k and its heirs, which differ in how many digits stay together."""
_KNOWN_RULES = frozenset(CL100K % digits for digits in (r"\p{N}", r"\p{N}{1,3}"))


def parts(text: str) -> Iterator[str]:
    """The text in parts. Where one ends depends on what is before it alone: texts that begin alike have like parts."""
    start = 0
    while (found := _CUT.search(text, start + PART_CHARACTERS)) is not None:
        yield text[start : found.end()]
        start = found.end()
    yield text[start:]


def may_be_cut(built: tokenizers.Tokenizer) -> bool:
    """Whether :func:`parts` holds for this tokenizer; false where it is not known to."""
    added = built.get_added_tokens_decoder().values()
    if built.pre_tokenizer is None or any(not token.special for token in added):
        return False
    if built.normalizer is not None and _told(built.normalizer)["type"] != "NFC":
        return False
    told = _told(built.pre_tokenizer)
    steps = told["pretokenizers"] if told["type"] == "Sequence" else [told]
    return all(map(_leaves_cuts, steps)) and any(map(_cuts, steps))


def _told(step: Any) -> dict[str, Any]:
    told: dict[str, Any] = msgspec.json.decode(step.__getstate__())
    return told


def _cuts(step: dict[str, Any]) -> bool:
    """Whether it cuts between words, and does the same to the parts as to the whole."""
    if step["type"] == "ByteLevel":
        return step["use_regex"] and not step["add_prefix_space"]
    return (
        step["type"] == "Split"
        and step["pattern"].get("Regex") in _KNOWN_RULES
        and step["behavior"] == "Isolated"
        and not step["invert"]
    )


def _leaves_cuts(step: dict[str, Any]) -> bool:
    """Whether it does the same to the parts as to the whole."""
    plain = step["type"] == "ByteLevel" and not step["add_prefix_space"]
    return plain or step["type"] == "Digits" or _cuts(step)
