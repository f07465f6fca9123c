"""How a step that exceeds the native step's buffers is cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import attrs

from memserve.engine.plans import Row
from memserve.tokens import count, span

MAX_ROWS = 512
"""Tokens that the native step's buffers hold; a larger step runs in several pieces, with the same results."""


def pieces(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """The rows in order, in pieces of at most ``MAX_ROWS`` tokens; long rows and drafts are cut."""
    piece: list[Row] = []
    room = MAX_ROWS
    for row in rows:
        start, tokens = 0, count(row.tokens)
        while tokens - start > room:
            part = span(row.tokens, start, start + room)
            score = row.score and row.score.part(start, start + room)
            whole = attrs.evolve(
                row, tokens=part, start=row.start + start, sample=None, score=score, draft=b""
            )
            yield [*piece, whole]
            start += room
            piece, room = [], MAX_ROWS
        last = _rest(row, start) if start else row
        room -= tokens - start
        if count(row.draft) > room:
            last = attrs.evolve(last, draft=span(row.draft, 0, room))
        piece.append(last)
        room -= count(last.draft)
        if not room:
            yield piece
            piece, room = [], MAX_ROWS
    if piece:
        yield piece


def _rest(row: Row, start: int) -> Row:
    """``row`` without its first ``start`` tokens."""
    tokens, score = (
        span(row.tokens, start, count(row.tokens)),
        row.score and row.score.part(start, count(row.tokens)),
    )
    return attrs.evolve(row, tokens=tokens, start=row.start + start, score=score)
