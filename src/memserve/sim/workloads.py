"""What clients ask: sessions of turns, from traces or generated from a seed.

Tokens are a function of a seed and a key, and each is drawn by itself: a block that repeats one value could
match blocks of other prompts. They are generated when they are asked for, so that a trace of millions of
tokens is stored as a list of keys.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import random
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs

from memserve.errors import UserError
from memserve.tokens import TOKEN_BYTES, pages_for

TRACE_BLOCK_TOKENS = 512
"""Tokens per hash id in Mooncake's published traces."""


@attrs.frozen
class Piece:
    """The first ``tokens`` tokens of a key's text: a shorter piece of a key is a prefix of a longer one."""

    key: str
    tokens: int

    def make(self, seed: int) -> bytes:
        """The tokens, packed."""
        return hashlib.shake_128(f"{seed}/{self.key}".encode()).digest(self.tokens * TOKEN_BYTES)


@attrs.frozen
class Turn:
    """What a client adds to its conversation, and how many tokens it wants."""

    pieces: tuple[Piece, ...]
    output: int
    wait_s: float = 0.0
    """Seconds from the previous turn's answer to this turn."""
    fresh: bool = False
    """The pieces are the whole prompt: earlier turns and answers are not part of it."""


@attrs.frozen
class Session:
    """One client. Each turn continues from the answers that it got before."""

    id: str
    at_s: float
    turns: tuple[Turn, ...]
    scope: str = ""
    priority: int = 0
    ttft_s: float | None = None
    """Seconds within which the first token of each turn is wanted; None: no deadline."""


# ---- traces --------------------------------------------------------------------------------------------------


def read_trace(
    path: Path, *, block_tokens: int, speed: float = 1.0, first: int | None = None
) -> list[Session]:
    """Sessions of one turn each from a trace in Mooncake's format: JSON lines, plain or gzipped.

    Lengths are scaled by ``block_tokens`` / 512; times are divided by ``speed`` and count from the earliest
    request; only the ``first`` requests are read. A line without ``hash_ids`` shares nothing. Raises UserError naming the line that is wrong.
    """
    sessions: list[Session] = []
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
            for number, line in enumerate(lines, 1):
                if first is not None and len(sessions) == first:
                    break
                if line.strip():
                    sessions.append(_parsed(path, number, line, block_tokens, speed))
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"--trace {path} cannot be read: {error}") from error
    if not sessions:
        raise UserError(f"--trace {path} holds no request: expected a JSON object a line")
    begin = min(one.at_s for one in sessions)
    return [attrs.evolve(one, at_s=one.at_s - begin) for one in sessions]


def _parsed(path: Path, number: int, line: str, block_tokens: int, speed: float) -> Session:
    try:
        return trace_session(json.loads(line), f"{path.name}:{number}", block_tokens, speed)
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        keys = "timestamp (ms), input_length, output_length and hash_ids"
        what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"--trace {path}, line {number}: {what}; expected an object with {keys}") from error


def trace_session(row: dict[str, Any], id: str, block_tokens: int, speed: float = 1.0) -> Session:
    """One trace line: a piece of ``block_tokens`` tokens per hash id.

    The last piece is shorter where it was in the trace: a block is full exactly when it was full there.
    Raises ValueError where ids and length do not agree, or a figure is out of range.
    """
    length, output = int(row["input_length"]), int(row["output_length"])
    at_s = row["timestamp"] / 1000 / speed
    if min(length, output) < 0 or not math.isfinite(at_s):
        raise ValueError(f"timestamp {row['timestamp']}, input_length {length} and output_length {output}")
    scaled = max(1, round(output * block_tokens / TRACE_BLOCK_TOKENS))
    if "hash_ids" not in row:
        tokens = max(1, length * block_tokens // TRACE_BLOCK_TOKENS)
        return Session(id, at_s, (Turn((Piece(id, tokens),), scaled),))
    ids = row["hash_ids"]
    if len(ids) != pages_for(length, TRACE_BLOCK_TOKENS) or length < 1:
        raise ValueError(
            f"{len(ids)} hash_ids for input_length {length}, expected {pages_for(length, TRACE_BLOCK_TOKENS)}"
        )
    last = length - (len(ids) - 1) * TRACE_BLOCK_TOKENS
    pieces = [Piece(f"block/{one}", block_tokens) for one in ids[:-1]]
    pieces.append(Piece(f"block/{ids[-1]}", max(1, last * block_tokens // TRACE_BLOCK_TOKENS)))
    return Session(id, at_s, (Turn(tuple(pieces), scaled),))


# ---- generated -----------------------------------------------------------------------------------------------


def sharegpt(rng: random.Random, i: int) -> list[Turn]:
    """A chat like ShareGPT's: a few turns, prompts and answers of some hundred tokens."""
    turns = min(8, 1 + int(rng.expovariate(1 / 2.2)))
    made = []
    for turn in range(turns):
        prompt = (
            min(3000, int(rng.lognormvariate(5.0, 1.1)))
            if turn == 0
            else min(1500, int(rng.lognormvariate(4.2, 1.0)))
        )
        answer = min(1000, max(20, int(rng.lognormvariate(5.5, 0.75))))
        made.append(Turn((Piece(f"chat/{i}/{turn}", 1 + prompt),), answer, wait_s=5.0))
    return made


def loogle(rng: random.Random, i: int, questions: int = 5) -> list[Turn]:
    """Questions about one long document, like LooGLE's: long prompts, short answers."""
    made = []
    for turn in range(questions):
        answer = min(99, max(4, int(rng.lognormvariate(3.0, 0.6))))
        document = (Piece(f"document/{i}", 1700),) if turn == 0 else ()
        made.append(Turn((*document, Piece(f"question/{i}/{turn}", 40)), answer, wait_s=1.0))
    return made


def react(rng: random.Random, i: int) -> list[Turn]:
    """An agent's loop like ReAct's: one long shared prefix, then observations and thoughts."""
    made = []
    for turn in range(rng.randint(3, 6)):
        answer = min(500, max(40, int(rng.lognormvariate(4.9, 0.6))))
        common = (Piece("react", 1800),) if turn == 0 else ()
        seen = Piece(f"seen/{i}/{turn}", 100 if turn == 0 else rng.randint(40, 200))
        made.append(Turn((*common, seen), answer, wait_s=0.5))
    return made


BLOCK = 150
"""Consecutive sessions of one kind in a load that shifts."""


def shifting(rng: random.Random, i: int) -> list[Turn]:
    """A load that shifts between long prompts with short answers and short prompts with long answers.

    No prompts share a prefix.
    """
    if i // BLOCK % 2 == 0:
        return [Turn((Piece(f"long/{i}", rng.randint(1500, 4000)),), rng.randint(8, 40))]
    return [Turn((Piece(f"short/{i}", rng.randint(40, 200)),), rng.randint(200, 600))]


KINDS: dict[str, Callable[[random.Random, int], list[Turn]]] = {
    "sharegpt": sharegpt,
    "loogle": loogle,
    "react": react,
    "shifting": shifting,
}
"""The workloads that ``--workload`` may name."""


def generated(kind: str, *, rate: float, requests: int, seed: int, burst: float = 1.0) -> list[Session]:
    """Sessions of a kind, of at least ``requests`` requests in all, with Poisson arrivals.

    ``rate`` is in requests a second. ``burst`` above 1: in the first third of every BURST_S, sessions come
    that many times as often as in the rest, with the same mean.
    """
    rng = random.Random(f"{seed}/{kind}")
    bodies: list[list[Turn]] = []
    total = 0
    while total < requests:
        bodies.append(KINDS[kind](rng, len(bodies)))
        total += len(bodies[-1])
    arrivals = _arrivals(rng, rate * len(bodies) / total, burst)
    return [Session(f"{kind}-{i}", next(arrivals), tuple(turns)) for i, turns in enumerate(bodies)]


BURST_S = 20.0
"""Period of one burst and the calm that follows, in seconds."""


def _arrivals(rng: random.Random, rate: float, burst: float) -> Iterator[float]:
    """Arrivals of a Poisson process; with ``burst``, a third of the time at ``burst`` times the calm rate."""
    calm = rate * 3 / (burst + 2)
    at = 0.0
    while True:
        now = calm * burst if math.fmod(at, BURST_S) < BURST_S / 3 else calm
        at += rng.expovariate(now)
        yield at


def shared_documents(*, sessions: int, share: int, rate: float, seed: int) -> list[Session]:
    """LooGLE-like sessions, ``share`` of them per document, as in the paper's scheduler experiment."""
    rng = random.Random(f"{seed}/shared/{share}")
    arrivals = _arrivals(rng, rate, 1.0)
    order = list(range(sessions))
    rng.shuffle(order)
    made = []
    for i in range(sessions):
        turns = loogle(rng, i, questions=rng.choice((2, 3, 4)))
        document = Piece(f"document/{order[i] // share}", 1700)
        turns[0] = attrs.evolve(turns[0], pieces=(document, *turns[0].pieces[1:]))
        made.append(Session(f"shared-{i}", next(arrivals), tuple(turns)))
    return made


# ---- how much could be reused --------------------------------------------------------------------------------


def one_pool_bound(sessions: Iterable[Session], page_tokens: int) -> tuple[int, int]:
    """(prompt tokens that one unlimited pool would find, prompt tokens) of one-turn sessions.

    The sessions run one after another. Only whole pages are found, and at least one token of each prompt is
    left to compute, as in a shard.
    """
    known: set[bytes] = set()
    found = total = 0
    for session in sessions:
        tokens = b"".join(piece.make(0) for piece in session.turns[0].pieces)
        total += len(tokens) // TOKEN_BYTES
        hit = True
        for number, key in enumerate(chained(tokens, page_tokens)):
            hit = hit and key in known and (number + 1) * page_tokens * TOKEN_BYTES < len(tokens)
            found += page_tokens * hit
            known.add(key)
    return found, total


def chained(tokens: bytes, page_tokens: int) -> Sequence[bytes]:
    """A key for each whole page, which covers it and all pages before it."""
    width, chain, keys = page_tokens * TOKEN_BYTES, b"", []
    for start in range(0, len(tokens) - width + 1, width):
        chain = hashlib.blake2b(chain + tokens[start : start + width], digest_size=16).digest()
        keys.append(chain)
    return keys
