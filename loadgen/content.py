"""Generated content: random tokens that depend only on a seed, a salt and a key, as ids or as words."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from loadgen.workload import Piece, Ruler

CACHED_TOKENS_MAX = 4_000_000
"""Maximum number of tokens in cached pieces, 4 bytes each: prefixes are asked for repeatedly."""

WORDS = (
    "time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school",
    "state", "family", "student", "group", "country", "problem", "hand", "part", "place", "case", "week",
    "company", "system", "program", "question", "work", "government", "number", "night", "point", "home",
    "water", "room", "mother", "area", "money", "story", "fact", "month", "lot", "right", "study", "book",
    "eye", "job", "word", "business", "issue", "side", "kind", "head", "house", "service", "friend",
    "father", "power", "hour", "game", "line", "end", "member", "law", "car", "city", "community", "name",
    "president", "team", "minute", "idea", "kid", "body", "information", "back", "parent", "face", "others",
    "level", "office", "door", "health", "person", "art", "war", "history", "party", "result", "change",
    "morning", "reason", "research", "girl", "guy", "moment", "air", "teacher", "force", "education",
    "foot", "boy", "age", "policy", "process", "music", "market", "sense", "nation", "plan", "college",
    "interest", "death", "experience", "effect", "use", "class", "control", "field", "development", "role",
    "effort", "rate", "heart", "drug", "show", "leader", "light", "voice", "wife", "police", "mind",
)  # fmt: skip
"""Words that, with the space before them, are one token each in most vocabularies."""


@attrs.define
class Filler:
    """Makes pieces: the same seed, salt and key give the same tokens.

    A shorter piece is a prefix of a longer one.

    ``low`` and ``high`` bound the token ids (``high`` excluded). The defaults avoid special tokens at the
    start of a vocabulary and fit vocabularies of 32,000 and more. Every token is drawn by itself: a block
    that repeats one value could match a block of another prompt in a cache.
    """

    seed: int = 0
    salt: str = ""
    low: int = 1000
    high: int = 30_000
    corpus: Sequence[str] = ()
    """Words of a real text; if given, pieces are stretches of it instead of random words."""
    _kept: OrderedDict[Piece, NDArray[np.int32]] = attrs.field(factory=OrderedDict, init=False)
    _kept_tokens: int = attrs.field(default=0, init=False)

    def ids(self, piece: Piece) -> NDArray[np.int32]:
        """The piece as token ids, int32 [tokens]; the array is shared and must not be changed."""
        found = self._kept.get(piece)
        if found is not None:
            self._kept.move_to_end(piece)
            return found
        made = self._draw(piece.key).integers(self.low, self.high, piece.tokens, dtype=np.int32)
        self._keep(piece, made)
        return made

    def text(self, piece: Piece) -> str:
        """The piece as words, each with a space before it and about one token long."""
        if self.corpus:
            # The text goes round: its end is followed by its beginning.
            start = int(self._draw(piece.key).integers(0, len(self.corpus)))
            words = [self.corpus[i % len(self.corpus)] for i in range(start, start + piece.tokens)]
        else:
            words = [WORDS[one % len(WORDS)] for one in self.ids(piece).tolist()]
        return "".join(f" {word}" for word in words)

    def _draw(self, key: str) -> np.random.Generator:
        digest = hashlib.sha256(f"{self.seed}:{self.salt}:{key}".encode()).digest()
        return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))

    def _keep(self, piece: Piece, made: NDArray[np.int32]) -> None:
        self._kept[piece] = made
        self._kept_tokens += piece.tokens
        while self._kept_tokens > CACHED_TOKENS_MAX and len(self._kept) > 1:
            dropped, _ = self._kept.popitem(last=False)
            self._kept_tokens -= dropped.tokens


class TokenizerRuler(Ruler):
    """Measures exact lengths with a Hugging Face ``tokenizer.json``."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def tokens(self, text: str) -> int:
        """The length of a text, without special tokens around it."""
        return len(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def cut(self, text: str, tokens: int) -> str:
        """The beginning of a text, of at most ``tokens`` tokens, cut between characters."""
        encoded = self.tokenizer.encode(text, add_special_tokens=False)
        return text if len(encoded.ids) <= tokens else text[: encoded.offsets[tokens][0]]
