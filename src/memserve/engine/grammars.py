"""Which tokens may come next in an answer that has to follow a grammar: a JSON schema, a regular expression, a choice.

The library llguidance reads grammars and follows them. What may come after some tokens depends on the grammar and these
tokens alone, so that a stream which another worker resumes goes on with the very tokens it would have had.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import TypeVar

import structlog
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from memserve.engine.tokenizer import Tokenizer
from memserve.panics import Panic, panics_told
from memserve.tokens import count, pack, span, unpack

FOLLOWED_MAX = 1024
"""Answers whose place in their grammar is remembered. One that was forgotten is read again from its first token."""
BACK = 65
"""So many tokens an answer may have grown by since its place was remembered: a step's draft, and one more."""
READ_MAX = 64
"""Grammars that are remembered."""

log = structlog.get_logger()
Key = TypeVar("Key")


class Grammars:
    """Follows grammars in one model's tokens. One thread uses it."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, ends: tuple[int, ...]) -> None:
        """``vocabulary``: of the model, at least the tokenizer's. ``ends``: tokens that end an answer, at least one."""
        wrapped = TokenizerWrapper(_Pieces(tokenizer, vocabulary, ends[0]))
        self._tokenizer = LLTokenizer(wrapped, n_vocab=vocabulary, eos_token=list(ends))
        self._bytes = -(-vocabulary // 8)
        self._ends = _mask(ends, self._bytes)
        self._read: OrderedDict[str, LLMatcher] = OrderedDict()
        self._followed: OrderedDict[tuple[str, bytes], LLMatcher] = OrderedDict()

    def allowed(self, grammar: str, output: bytes) -> bytes:
        """Which tokens may follow the answer ``output``, packed: a bit for each id, the lowest of the first byte first.

        At least one may. Where the grammar cannot be followed any further, which is logged, those that end the answer.
        """
        try:
            with panics_told():
                matcher = self._at(grammar, output)
                mask: bytes = matcher.compute_bitmask()[: self._bytes]
                wrong = matcher.get_error() if matcher.is_error() else ""
        except Panic as panic:
            wrong, mask = str(panic), b""
        if wrong or not any(mask):
            reason = wrong.partition("\n")[0] or "no token may follow"
            log.warning("grammar given up", reason=reason, tokens=count(output))
            return self._ends
        _remember(self._followed, (grammar, output), matcher, FOLLOWED_MAX)
        return mask

    def ahead(
        self, grammar: str, output: bytes, allowed: bytes, guess: bytes, most: int
    ) -> tuple[bytes, tuple[bytes, ...]]:
        """How an answer goes on behind ``output``, packed, and what is ``allowed`` after each of these tokens: at most ``most``.

        They are those that alone are allowed, and those of ``guess`` for as long as it goes on as they do and is allowed. None of
        them ends the answer. To be asked after :meth:`allowed`, whose answer ``allowed`` is.
        """
        place = self._followed.get((grammar, output))
        if place is None or not most:
            return b"", ()
        try:
            with panics_told():
                return self._walk(place.deep_copy(), allowed, unpack(guess), most)
        except Panic:
            return b"", ()  # it is told of when the answer comes there

    def _walk(
        self, matcher: LLMatcher, mask: bytes, guess: Sequence[int], most: int
    ) -> tuple[bytes, tuple[bytes, ...]]:
        draft: list[int] = []
        masks: list[bytes] = []
        while len(draft) < most:
            as_guessed = len(draft) < len(guess) and draft == [*guess[: len(draft)]]
            token = _next(mask, guess[len(draft)] if as_guessed else None)
            if token is None or _has(self._ends, token):
                break
            matcher.consume_token(token)
            mask = matcher.compute_bitmask()[: self._bytes]
            if matcher.is_error() or not any(mask):
                break
            draft.append(token)
            masks.append(mask)
        return pack(draft), tuple(masks)

    def _at(self, grammar: str, output: bytes) -> LLMatcher:
        """The grammar after ``output``."""
        for known in range(count(output), max(count(output) - BACK, 0) - 1, -1):
            matcher = self._followed.pop((grammar, span(output, 0, known)), None)
            if matcher is not None:
                break
        else:
            known, matcher = 0, self._new(grammar)
        matcher.consume_tokens(list(unpack(span(output, known, count(output)))))
        return matcher

    def _new(self, grammar: str) -> LLMatcher:
        read = self._read.get(grammar) or LLMatcher(self._tokenizer, grammar, log_level=0)
        _remember(self._read, grammar, read, READ_MAX)
        return read.deep_copy()


def wrong_with(grammar: str) -> str:
    """Why a grammar, llguidance's text, cannot be followed; empty: it can. It can take a second: call it in a thread."""
    try:
        with panics_told():
            wrong: str = LLMatcher.validate_grammar(grammar)
    except Panic as panic:
        return str(panic)
    return wrong


class _Pieces:
    """A tokenizer as llguidance asks it: what each id stands for."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, end: int) -> None:
        pieces = tokenizer.pieces()
        self.eos_token_id = end
        self.tokens = pieces + [b""] * (vocabulary - len(pieces))
        self.special_token_ids = sorted(tokenizer.specials.values())
        self._tokenizer = tokenizer

    def __call__(self, text: str | bytes) -> list[int]:
        plain = text if isinstance(text, str) else text.decode(errors="replace")
        return self._tokenizer.encode(plain, allow_special=False)


def _next(mask: bytes, guessed: int | None) -> int | None:
    """The one token that is allowed, or the guessed one if it is."""
    bits = int.from_bytes(mask, "little")
    if bits.bit_count() == 1:
        return bits.bit_length() - 1
    return guessed if guessed is not None and _has(mask, guessed) else None


def _has(mask: bytes, token: int) -> bool:
    return bool(mask[token // 8] >> token % 8 & 1)


def _mask(ids: Iterable[int], size: int) -> bytes:
    made = bytearray(size)
    for token in ids:
        made[token // 8] |= 1 << token % 8
    return bytes(made)


def _remember(kept: OrderedDict[Key, LLMatcher], key: Key, value: LLMatcher, most: int) -> None:
    kept[key] = value
    kept.move_to_end(key)
    while len(kept) > most:
        kept.popitem(last=False)
