"""Readers of traces of lengths and arrival times, with or without block ids: Mooncake, Azure, BurstGPT."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from loadgen.conversation import one_turn
from loadgen.formats.files import Format, Record, Settings
from loadgen.workload import Piece, Session

BLOCK_TOKENS = 512
"""Tokens per hash id in Mooncake's published traces."""


def mooncake_pieces(row: Record, block_tokens: int, name: str) -> tuple[Piece, ...]:
    """The prompt of a trace line: one piece of ``block_tokens`` tokens per id.

    The last piece is shorter in proportion to its block in the trace. A block is full exactly when it was
    full there, so an engine with pages of ``block_tokens`` tokens hits the same blocks. Raises ValueError if
    ids and length do not agree.
    """
    ids, length = row["hash_ids"], int(row["input_length"])
    if len(ids) != -(-length // BLOCK_TOKENS):
        raise ValueError(f"{len(ids)} ids for {length} tokens, expected {-(-length // BLOCK_TOKENS)}")
    last = length - (len(ids) - 1) * BLOCK_TOKENS
    pieces = [Piece(f"{name}/{id}", block_tokens) for id in ids[:-1]]
    return (*pieces, Piece(f"{name}/{ids[-1]}", max(1, last * block_tokens // BLOCK_TOKENS)))


def _mooncake(rows: Sequence[Record], settings: Settings, name: str) -> list[Session]:
    ratio = settings.block_tokens / BLOCK_TOKENS
    return [
        one_turn(
            f"{name}-{i}",
            mooncake_pieces(row, settings.block_tokens, name),
            max(1, round(int(row["output_length"]) * ratio)),
            at_s=row["timestamp"] / 1000,
        )
        for i, row in enumerate(rows)
    ]


def _by_length(id: str, tokens: float, output: float, at_s: float, settings: Settings) -> Session:
    prompt = Piece(id, max(1, int(tokens * settings.scale)))
    return one_turn(id, (prompt,), max(1, round(output * settings.scale)), at_s=at_s)


def _lengths(rows: Sequence[Record], settings: Settings, name: str) -> list[Session]:
    return [
        _by_length(
            f"{name}-{i}",
            int(row["input_length"]),
            int(row["output_length"]),
            row["timestamp"] / 1000,
            settings,
        )
        for i, row in enumerate(rows)
    ]


def _azure(rows: Sequence[Record], settings: Settings, name: str) -> list[Session]:
    times = [_moment(row["TIMESTAMP"]) for row in rows]
    return [
        _by_length(
            f"{name}-{i}",
            int(row["ContextTokens"]),
            int(row["GeneratedTokens"]),
            (at - times[0]).total_seconds(),
            settings,
        )
        for i, (row, at) in enumerate(zip(rows, times, strict=True))
    ]


def _moment(text: str) -> datetime:
    """Parse a time stamp; Azure's have seven decimals of a second, and Python takes six."""
    whole, _, fraction = text.strip().removesuffix("+00:00").partition(".")
    return datetime.fromisoformat(f"{whole}.{fraction[:6]:0<6}")


def _burstgpt(rows: Sequence[Record], settings: Settings, name: str) -> list[Session]:
    # Failed requests are in the file with 0 response tokens.
    answered = [row for row in rows if int(row["Response tokens"]) > 0]
    first = float(answered[0]["Timestamp"]) if answered else 0.0
    return [
        _by_length(
            f"{name}-{i}",
            int(row["Request tokens"]),
            int(row["Response tokens"]),
            float(row["Timestamp"]) - first,
            settings,
        )
        for i, row in enumerate(answered)
    ]


FORMATS = (
    Format("Mooncake", frozenset({"timestamp", "input_length", "output_length", "hash_ids"}), _mooncake),
    Format("lengths", frozenset({"timestamp", "input_length", "output_length"}), _lengths),
    Format("Azure", frozenset({"TIMESTAMP", "ContextTokens", "GeneratedTokens"}), _azure),
    Format("BurstGPT", frozenset({"Timestamp", "Request tokens", "Response tokens"}), _burstgpt),
)
