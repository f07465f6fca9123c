"""Log probabilities in OpenAI's two formats."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import attrs

from memserve.drawing import Logprobs
from memserve.tokens import unpack

Piece = Callable[[int], bytes]
"""The bytes of a token, control tokens too."""
LEAST = -9999.0
"""JSON has no infinity; the same as vLLM's."""


@attrs.frozen
class Told:
    """One token of an answer or of its prompt, and what is told about it."""

    token: int
    offset: int
    """Characters of the tokens before it."""
    logprobs: Logprobs | None
    """None: it is a prompt's first, which follows nothing."""


def token_text(token: int, piece: Piece) -> str:
    """A token by itself: what is but a part of a character becomes U+FFFD."""
    return piece(token).decode("utf-8", "replace")


def chat_logprobs(told: Iterable[Told], piece: Piece) -> dict[str, Any]:
    """``choices[].logprobs`` of a chat."""

    def entry(token: int, value: float) -> dict[str, Any]:
        shown = {"token": token_text(token, piece), "logprob": max(value, LEAST)}
        return shown | {"bytes": list(piece(token))}

    content = [
        entry(one.token, one.logprobs.drawn)
        | {"top_logprobs": [entry(*likely) for likely in _likeliest(one.logprobs)]}
        for one in told
        if one.logprobs is not None
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(told: Sequence[Told], piece: Piece, echoed: int = 0) -> dict[str, list[Any]]:
    """``choices[].logprobs`` of a completion. Its own token is always among a position's likeliest, so they may be one more.

    ``echoed``: characters of the tokens before these.
    """
    return {
        "tokens": [token_text(one.token, piece) for one in told],
        "token_logprobs": [None if one.logprobs is None else max(one.logprobs.drawn, LEAST) for one in told],
        "top_logprobs": [
            None if one.logprobs is None else _shown(one.token, one.logprobs, piece) for one in told
        ],
        "text_offset": [echoed + one.offset for one in told],
    }


def _shown(own: int, known: Logprobs, piece: Piece) -> dict[str, float]:
    shown: dict[str, float] = {}
    for token, value in (*_likeliest(known), (own, known.drawn)):
        shown.setdefault(token_text(token, piece), max(value, LEAST))  # of tokens alike the most probable
    return shown


def _likeliest(known: Logprobs) -> Iterable[tuple[int, float]]:
    return zip(unpack(known.ids), known.values, strict=True)
