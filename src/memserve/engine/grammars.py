"""Which tokens may come next in an answer that follows a grammar: JSON schema, regular expression, choice.

The library llguidance parses and follows grammars. The allowed tokens depend on the grammar and the answer so
far alone, so a stream that another worker resumes continues with the very tokens it would have had.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

import structlog
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from memserve.engine.tokenizer import Tokenizer
from memserve.panics import Panic, panics_as_errors
from memserve.tokens import count, pack, span, unpack

FOLLOWED_MAX = 1024
"""Answers whose grammar state is cached. One that was dropped is replayed from its first token."""
BACK = 65
"""Tokens by which an answer may have grown since its state was cached: a step's draft and one more."""
FOLLOWED_BYTES = 4 << 20
"""Bytes of these answers' grammars. Where every answer has a grammar of its own, its state takes some fifty times
as much memory as the grammar: 200 MiB in all. Sixty-four answers by the largest grammars are within the limit."""
READ_MAX = 64
"""Parsed grammars that are cached."""
STACK_BYTES = 256 << 20
"""Stack of a thread that parses a grammar; only what is used of it takes memory.

The library recurses where rules or schemas refer to one another, and an overflow ends the process. The deepest
grammars of the permitted size took less than 64 MiB.
"""

log = structlog.get_logger()
Found = TypeVar("Found")
_stack_size = threading.Lock()


class Grammars:
    """Follows grammars in one model's tokens. Only one thread may use it."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, ends: tuple[int, ...]) -> None:
        """``vocabulary``: the model's size, at least the tokenizer's. ``ends``: end tokens, at least one."""
        wrapped = TokenizerWrapper(_Pieces(tokenizer, vocabulary, ends[0]))
        self._tokenizer = LLTokenizer(wrapped, n_vocab=vocabulary, eos_token=list(ends))
        self._bytes = -(-vocabulary // 8)
        self._ends = _mask(ends, self._bytes)
        self._read: OrderedDict[str, LLMatcher] = OrderedDict()
        self._followed: OrderedDict[tuple[str, bytes], LLMatcher] = OrderedDict()
        self._followed_bytes = 0

    def allowed(self, grammar: str, output: bytes) -> bytes:
        """Bit mask of the tokens that may follow the answer ``output``, lowest bit of the first byte first.

        At least one bit is set. Where the grammar cannot be followed any further, only end tokens are
        allowed, and that is logged.
        """
        try:
            with panics_as_errors():
                matcher = self._at(grammar, output)
                mask: bytes = matcher.compute_bitmask()[: self._bytes]
                wrong = matcher.get_error() if matcher.is_error() else ""
        except Panic as panic:
            wrong, mask = str(panic), b""
        if wrong or not any(mask):
            reason = wrong.partition("\n")[0] or "no token may follow"
            log.warning("grammar given up", reason=reason, tokens=count(output))
            return self._ends
        self._keep(grammar, output, matcher)
        return mask

    def ahead(
        self, grammar: str, output: bytes, allowed: bytes, guess: bytes, most: int
    ) -> tuple[bytes, tuple[bytes, ...]]:
        """At most ``most`` tokens that continue ``output``, packed; the mask of allowed tokens after each.

        Each is the only allowed token, or the next token of ``guess`` where that is allowed and all tokens
        before it match ``guess``. None of them ends the answer. Call it after :meth:`allowed`; ``allowed`` is
        its result.
        """
        place = self._followed.get((grammar, output))
        if place is None or not most:
            return b"", ()
        try:
            with panics_as_errors():
                return self._walk(place.deep_copy(), allowed, unpack(guess), most)
        except Panic:
            return b"", ()  # logged once the answer reaches that place

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
        """A matcher in the state after ``output``."""
        for known in range(count(output), max(count(output) - BACK, 0) - 1, -1):
            matcher = self._followed.pop((grammar, span(output, 0, known)), None)
            if matcher is not None:
                self._followed_bytes -= len(grammar)
                break
        else:
            known, matcher = 0, self._new(grammar)
        matcher.consume_tokens(list(unpack(span(output, known, count(output)))))
        return matcher

    def _new(self, grammar: str) -> LLMatcher:
        parse = partial(LLMatcher, self._tokenizer, grammar, log_level=0)
        read = self._read.get(grammar) or _on_deep_stack(parse)
        self._read[grammar] = read
        self._read.move_to_end(grammar)
        if len(self._read) > READ_MAX:
            self._read.popitem(last=False)
        return read.deep_copy()

    def _keep(self, grammar: str, output: bytes, matcher: LLMatcher) -> None:
        """Cache the state after ``output``, which is not cached, and drop the oldest ones beyond the limits."""
        self._followed[grammar, output] = matcher
        self._followed_bytes += len(grammar)
        while len(self._followed) > FOLLOWED_MAX or self._followed_bytes > FOLLOWED_BYTES:
            (oldest, _), _ = self._followed.popitem(last=False)
            self._followed_bytes -= len(oldest)


def wrong_with(grammar: str) -> str:
    """Why a grammar, in llguidance's text form, cannot be followed; empty if it can.

    The check can take a second: call it in a thread.
    """
    try:
        with panics_as_errors():
            return _on_deep_stack(partial(LLMatcher.validate_grammar, grammar))
    except Panic as panic:
        return str(panic)


def _on_deep_stack(call: Callable[[], Found]) -> Found:
    """The result of ``call``, which runs on a thread with a stack of STACK_BYTES. Raises what it raises."""
    result: Future[Found] = Future()

    def run() -> None:
        try:
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)

    with _stack_size:  # a setting of the process, for all threads that start while it is in force
        before = threading.stack_size(STACK_BYTES)
        try:
            threading.Thread(target=run, name="grammar").start()
        finally:
            threading.stack_size(before)
    return result.result()


class _Pieces:
    """A tokenizer in the form that llguidance expects: the bytes of each id."""

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
    """The only allowed token, or the guessed one if it is allowed; otherwise None."""
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
