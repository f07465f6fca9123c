"""What is asked: sessions of turns, fixed before a run begins, so that every server is asked the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import attrs

Role = Literal["system", "user", "assistant", "tool"]


@attrs.frozen
class Piece:
    """Generated content: the first ``tokens`` tokens of the endless random text that belongs to ``key``."""

    key: str
    tokens: int


Content = str | tuple[Piece, ...]
"""Recorded text, or a sequence of generated pieces, which become token ids or words when they are sent."""


@attrs.frozen
class Message:
    """One message of a conversation."""

    role: Role
    content: Content


@attrs.frozen
class Turn:
    """One request: what it adds to the conversation, and how long an answer it wants."""

    messages: tuple[Message, ...]
    output_tokens: int
    answer: Content | None = None
    """The answer that was recorded with the workload; None if it is not known."""
    think_s: float = 0.0
    """Seconds between the previous answer and this request."""
    fresh: bool = False
    """The messages are the whole prompt: earlier turns and answers are not part of it."""


@attrs.frozen
class Session:
    """Turns that are asked one after another, each after the answer to the one before."""

    id: str
    turns: tuple[Turn, ...]
    plain: bool = False
    """Whether contents are joined as they are; otherwise a completion's prompt has ``User:`` and
    ``Assistant:`` lines."""
    at_s: float | None = None
    """When it begins in its trace, in seconds from the trace's start."""
    tenant: str = ""


@attrs.frozen
class Workload:
    """Everything that a run may ask, in order."""

    name: str
    sessions: tuple[Session, ...]
    options: dict[str, Any] = attrs.field(factory=dict)
    """The options that it was made with, for reports."""

    @property
    def requests(self) -> int:
        """Number of requests in all sessions."""
        return sum(len(one.turns) for one in self.sessions)

    def fingerprint(self) -> str:
        """A digest of everything that is asked; only runs with equal digests are comparable."""
        digest = hashlib.sha256()
        for part in _parts(self.sessions):
            digest.update(part.encode())
            digest.update(b"\0")
        return digest.hexdigest()[:16]


def _parts(sessions: Iterable[Session]) -> Iterator[str]:
    for session in sessions:
        yield f"S {session.id} {session.plain} {session.at_s} {session.tenant}"
        for turn in session.turns:
            yield f"T {turn.output_tokens} {turn.think_s} {turn.fresh}"
            for message in turn.messages:
                yield message.role
                yield from _content_parts(message.content)
            if turn.answer is not None:
                yield from _content_parts(turn.answer)


def _content_parts(content: Content) -> Iterator[str]:
    if isinstance(content, str):
        yield content
        return
    for piece in content:
        yield f"P {piece.key} {piece.tokens}"


def tokens_of(content: Content, ruler: Ruler) -> int:
    """Length of a content in tokens: exact for generated pieces, measured by the ruler for text."""
    if isinstance(content, str):
        return ruler.tokens(content)
    return sum(piece.tokens for piece in content)


CHARS_PER_TOKEN = 4
"""Of English text, about; for lengths without a tokenizer."""


class Ruler:
    """Measures text in tokens, here as an estimate from characters; see also ``content.TokenizerRuler``."""

    def tokens(self, text: str) -> int:
        """The length of a text; 0 for an empty one."""
        return max(1, round(len(text) / CHARS_PER_TOKEN)) if text else 0

    def cut(self, text: str, tokens: int) -> str:
        """The beginning of a text, of at most ``tokens`` tokens."""
        return text[: round(tokens * CHARS_PER_TOKEN)]


@attrs.frozen
class Limits:
    """Limits that fit a workload to a small model or a short benchmark; None means no limit."""

    sessions: int | None = None
    turns: int | None = None
    context_tokens: int | None = None
    output_tokens: int | None = None


def limited(sessions: Sequence[Session], limits: Limits, ruler: Ruler) -> tuple[Session, ...]:
    """The sessions that fit: answers are shortened, and a session ends before the turn that would not fit."""
    kept: list[Session] = []
    for session in sessions:
        if limits.sessions is not None and len(kept) >= limits.sessions:
            break
        turns = _fitting(session.turns[: limits.turns], limits, ruler)
        if turns:
            kept.append(attrs.evolve(session, turns=turns))
    return tuple(kept)


def _fitting(turns: Sequence[Turn], limits: Limits, ruler: Ruler) -> tuple[Turn, ...]:
    kept: list[Turn] = []
    context = 0
    for turn in turns:
        if limits.output_tokens is not None:
            turn = attrs.evolve(turn, output_tokens=min(turn.output_tokens, limits.output_tokens))
        prompt = sum(tokens_of(message.content, ruler) for message in turn.messages)
        prompt += 0 if turn.fresh else context
        if limits.context_tokens is not None and prompt + turn.output_tokens > limits.context_tokens:
            break
        context = prompt + turn.output_tokens
        kept.append(turn)
    return tuple(kept)
