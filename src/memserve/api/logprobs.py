"""Log probabilities in OpenAI's two formats."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import attrs

from memserve.drawing import Logprobs
from memserve.tokens import unpack

Piece = Callable[[int], bytes]
"""Returns the bytes of a token, including control tokens."""
LEAST = -9999.0
"""The lowest log probability reported, as in vLLM: JSON has no infinity."""


@attrs.frozen
class TokenLogprobs:
    """One token of an answer or of its prompt, with its log probabilities."""

    token: int
    offset: int
    """Number of characters in the tokens before it."""
    logprobs: Logprobs | None
    """None for a prompt's first token, which follows nothing."""


def token_text(token: int, piece: Piece) -> str:
    """The text of a token by itself: an incomplete character becomes U+FFFD."""
    return piece(token).decode("utf-8", "replace")


def chat_logprobs(tokens: Iterable[TokenLogprobs], piece: Piece) -> dict[str, Any]:
    """``choices[].logprobs`` of a chat."""

    def entry(token: int, value: float) -> dict[str, Any]:
        shown = {"token": token_text(token, piece), "logprob": max(value, LEAST)}
        return shown | {"bytes": list(piece(token))}

    content = [
        entry(one.token, one.logprobs.drawn)
        | {"top_logprobs": [entry(*likely) for likely in _likeliest(one.logprobs)]}
        for one in tokens
        if one.logprobs is not None
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokens: Sequence[TokenLogprobs], piece: Piece, echoed: int = 0
) -> dict[str, list[Any]]:
    """``choices[].logprobs`` of a completion.

    A position's own token is always among its ``top_logprobs``, so there may be one more than requested.
    ``echoed``: characters in the tokens before these.
    """
    return {
        "tokens": [token_text(one.token, piece) for one in tokens],
        "token_logprobs": [
            None if one.logprobs is None else max(one.logprobs.drawn, LEAST) for one in tokens
        ],
        "top_logprobs": [
            None if one.logprobs is None else _shown(one.token, one.logprobs, piece) for one in tokens
        ],
        "text_offset": [echoed + one.offset for one in tokens],
    }


def _shown(own: int, known: Logprobs, piece: Piece) -> dict[str, float]:
    shown: dict[str, float] = {}
    for token, value in (*_likeliest(known), (own, known.drawn)):
        shown.setdefault(token_text(token, piece), max(value, LEAST))  # of equal texts, the likeliest
    return shown


def _likeliest(known: Logprobs) -> Iterable[tuple[int, float]]:
    return zip(unpack(known.ids), known.values, strict=True)
