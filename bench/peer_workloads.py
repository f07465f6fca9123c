"""The workloads of ``make bench-peers``, in the load generator's terms, and their figures.

Prompts are random words of exactly one token each, sent as text, which every server accepts. Each round and
request draws new words, the same for every server, so that prompts meant to be cold are cold.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import attrs

from loadgen.conversation import one_turn
from loadgen.records import Record
from loadgen.workload import Message, Piece, Session, Turn

DECODE_TOKENS = 128
SHARED_TOKENS, SUFFIX_TOKENS = 1500, 8
CHATS, TURNS, CHAT_TOKENS = 8, 4, 32
CHAT_SHARED, CHAT_OWN, CHAT_TURN = 400, 200, 96


class Wrong(Exception):
    """An answer of the wrong size: a row made from it would compare different work."""


@attrs.frozen
class Figure:
    """One number of a row."""

    name: str
    unit: str
    higher_is_better: bool
    read: Callable[[Sequence[Record]], float]


@attrs.frozen
class Case:
    """One workload: sessions played by ``clients`` clients, and its figures, each a row of the table."""

    name: str
    sessions: Callable[[str], tuple[Session, ...]]
    """The sessions, made from a key that no other run has; their ids are the same for every key."""
    clients: int
    figures: tuple[Figure, ...]
    prompt_tokens: Callable[[int], tuple[int, int]]
    """Fewest and most prompt tokens of a session's n-th turn."""
    repeats: int = 3
    """Number of runs in each round."""

    def check(self, records: Sequence[Record]) -> None:
        """Check that every answer is complete and has the requested token counts. Raises Wrong otherwise."""
        asked = sum(len(one.turns) for one in self.sessions(""))
        if failed := [one for one in records if not one.ok]:
            raise Wrong(f"{self.name}: {failed[0].error}: {failed[0].detail[:200]}")
        if len(records) != asked:
            raise Wrong(f"{self.name}: {len(records)} answers to {asked} requests")
        for one in records:
            low, high = self.prompt_tokens(one.turn)
            if one.output_tokens != one.asked_tokens:
                raise Wrong(
                    f"{self.name}: {one.output_tokens} tokens where {one.asked_tokens} were asked for"
                )
            if one.prompt_tokens is None or not low <= one.prompt_tokens <= high:
                raise Wrong(f"{self.name}: a prompt of {one.prompt_tokens} tokens, expected {low} to {high}")


# ---- sessions ------------------------------------------------------------------------------------------------


def decode_sessions(key: str) -> tuple[Session, ...]:
    """One stream after a short prompt."""
    return (one_turn("decode", (Piece(f"{key} decode", 20),), DECODE_TOKENS),)


def prefill_sessions(tokens: int) -> Callable[[str], tuple[Session, ...]]:
    """One cold prompt that asks for a single output token."""

    def sessions(key: str) -> tuple[Session, ...]:
        return (one_turn("prefill", (Piece(f"{key} prefill", tokens),), 1),)

    return sessions


def stream_sessions(key: str) -> tuple[Session, ...]:
    """Eight cold prompts of 128 tokens that ask for 64 tokens each."""
    return tuple(one_turn(f"stream {i}", (Piece(f"{key} stream {i}", 128),), 64) for i in range(8))


def prefix_sessions(key: str) -> tuple[Session, ...]:
    """Two requests, one after the other, whose prompts share all but their ends."""
    shared = Piece(f"{key} shared", SHARED_TOKENS)
    return tuple(
        one_turn(name, (shared, Piece(f"{key} {name}", SUFFIX_TOKENS)), 1) for name in ("cold", "warm")
    )


def chat_sessions(key: str) -> tuple[Session, ...]:
    """Conversations that share their first 400 tokens; each answer becomes a part of the next prompt."""
    shared = Piece(f"{key} shared", CHAT_SHARED)

    def content(chat: int, turn: int) -> tuple[Piece, ...]:
        if turn == 0:
            return (shared, Piece(f"{key} own {chat}", CHAT_OWN))
        return (Piece(f"{key} turn {chat} {turn}", CHAT_TURN),)

    return tuple(
        Session(
            f"chat {chat}",
            tuple(Turn((Message("user", content(chat, turn)),), CHAT_TOKENS) for turn in range(TURNS)),
            plain=True,
        )
        for chat in range(CHATS)
    )


def chat_prompt_tokens(turn: int) -> tuple[int, int]:
    """Fewest and most prompt tokens of a chat's n-th turn.

    Answers return to the server as text: special tokens vanish, and other tokens may merge or split.
    """
    asked = CHAT_SHARED + CHAT_OWN + turn * CHAT_TURN
    return asked, asked + turn * CHAT_TOKENS * 2


def exactly(tokens: int) -> Callable[[int], tuple[int, int]]:
    """Bounds for turns whose prompts all have ``tokens`` tokens."""
    return lambda _turn: (tokens, tokens)


# ---- figures -------------------------------------------------------------------------------------------------


def decode_rate(records: Sequence[Record]) -> float:
    """Tokens per second of a single stream after its first token."""
    [one] = records
    return 1e3 / _present(one.tpot_ms)


def prefill_rate(records: Sequence[Record]) -> float:
    """Prompt tokens per second of TTFT."""
    [one] = records
    return _present(one.prompt_tokens) / first_ms(one) * 1e3


def total_rate(records: Sequence[Record]) -> float:
    """Output tokens of all streams per second of the whole run, prefill included."""
    return sum(_present(one.output_tokens) for one in records) / wall_s(records)


def wall_s(records: Sequence[Record]) -> float:
    """Seconds from the first request to the end of the last answer."""
    return max(one.end_s for one in records) - min(one.sent_s for one in records)


def ttft_s(records: Sequence[Record]) -> float:
    """Median time to first token, seconds."""
    return statistics.median(first_ms(one) for one in records) / 1e3


def first_ms(record: Record) -> float:
    """Time to first token, milliseconds.

    A single output token without text (half a character) causes no event but the final one, which then
    counts.
    """
    return _present(record.jct_ms if record.ttft_ms is None and record.asked_tokens == 1 else record.ttft_ms)


def ttft_of(session: str) -> Callable[[Sequence[Record]], float]:
    """Time to first token of one session, seconds."""
    return lambda records: ttft_s([one for one in records if one.session == session])


def later_ttft_s(records: Sequence[Record]) -> float:
    """Median time to first token of all turns but the first, seconds."""
    return ttft_s([one for one in records if one.turn > 0])


def jct_s(records: Sequence[Record]) -> float:
    """Mean time of a turn from its request to the end of its answer, seconds."""
    return statistics.mean(one.jct_ms for one in records) / 1e3


def _present(value: float | None) -> float:
    if value is None:
        raise Wrong("an answer without the event that is measured")
    return value


CASES = (
    Case(
        f"decode, 1 stream of {DECODE_TOKENS}",
        decode_sessions,
        1,
        (Figure("rate", "tok/s", True, decode_rate),),
        exactly(20),
    ),
    *(
        Case(
            f"prefill {tokens:,}",
            prefill_sessions(tokens),
            1,
            (Figure("rate", "tok/s", True, prefill_rate),),
            exactly(tokens),
        )
        for tokens in (512, 2048)
    ),
    Case(
        "8 streams, 128 in, 64 out",
        stream_sessions,
        8,
        (Figure("total rate", "tok/s", True, total_rate), Figure("TTFT p50", "s", False, ttft_s)),
        exactly(128),
        repeats=2,
    ),
    Case(
        "1,508 tokens, 1,500 of them shared",
        prefix_sessions,
        1,
        (
            Figure("TTFT cold", "s", False, ttft_of("cold")),
            Figure("TTFT warm", "s", False, ttft_of("warm")),
        ),
        exactly(SHARED_TOKENS + SUFFIX_TOKENS),
    ),
    Case(
        "8 chats, 4 turns, 400 shared + 200 own + 96 a turn, 32 out",
        chat_sessions,
        CHATS,
        (
            Figure("later-turn TTFT p50", "s", False, later_ttft_s),
            Figure("JCT mean", "s", False, jct_s),
            Figure("wall", "s", False, wall_s),
        ),
        chat_prompt_tokens,
        repeats=1,
    ),
)
"""All workloads, in the order of the table."""
