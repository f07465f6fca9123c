"""Log probabilities of prompts, in a completion's ``logprobs`` with ``echo``, and in ``prompt_logprobs``."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any

import attrs
import msgspec

from memserve.api.logprobs import LEAST, Piece, TokenLogprobs, completion_logprobs, token_text
from memserve.drawing import Logprobs, PromptLogprobs
from memserve.tokens import pack, unpack


@attrs.frozen
class _Known:
    """One token's log probability and rank, and the most probable tokens at its position."""

    value: float
    rank: int
    likeliest: Sequence[tuple[int, float]]


@attrs.define
class PromptReport:
    """The log probabilities of one prompt, for all of its answers.

    Only the first answer requests them, so that they are computed once. Formatting those of a long prompt
    takes a moment: call :meth:`show` in another thread. No part of an answer is written before that.
    """

    tokens: Sequence[int]
    piece: Piece
    echoed: int | None
    """How many of the likeliest tokens to show with each token of the echo; None: no log probabilities."""
    listed: int | None
    """How many of the likeliest tokens to show in ``prompt_logprobs``; None: it is not requested."""
    shown: bool = attrs.field(default=False, init=False)
    """Whether :meth:`show` has finished."""
    columns: dict[str, list[Any]] = attrs.field(factory=dict, init=False)
    """The echo's part of a completion's ``logprobs``, by column; empty if the echo has none."""
    characters: int = attrs.field(default=0, init=False)
    """Number of characters in the echoed tokens."""
    listing: msgspec.Raw | None = attrs.field(default=None, init=False)
    """``prompt_logprobs`` as JSON."""
    _pieces: list[PromptLogprobs] = attrs.field(factory=list, init=False)

    def take(self, pieces: Iterable[PromptLogprobs]) -> None:
        """Take in further log probabilities, in the order of the prompt's tokens."""
        self._pieces += pieces

    @property
    def ready(self) -> bool:
        """Whether the log probabilities of all tokens have come."""
        return 1 + sum(map(len, self._pieces)) == len(self.tokens)

    def show(self) -> None:
        """Format everything that was requested."""
        piece = cache(self.piece)  # the same few tokens are the likeliest at many places
        if self.echoed is not None:
            self._show_echo(self.echoed, piece)
        if self.listed is not None:
            self.listing = msgspec.Raw(msgspec.json.encode([None, *self._listing(self.listed, piece)]))
        self._pieces.clear()
        self.shown = True

    def _show_echo(self, count: int, piece: Piece) -> None:
        shown = [TokenLogprobs(self.tokens[0], 0, None)]
        self.characters = len(token_text(self.tokens[0], piece))
        for token, known in self._known():
            ids = [one for one, _ in known.likeliest[:count]]
            values = [value for _, value in known.likeliest[:count]]
            shown.append(
                TokenLogprobs(token, self.characters, Logprobs(known.value, pack(ids), tuple(values)))
            )
            self.characters += len(token_text(token, piece))
        self.columns = completion_logprobs(shown, piece)

    def _listing(self, count: int, piece: Piece) -> Iterator[dict[str, Any]]:
        """Objects by token id, as in vLLM: the prompt's own token first, then the most probable ones."""
        text = cache(partial(token_text, piece=piece))
        for token, known in self._known():
            ranked = enumerate(known.likeliest[:count], 1)
            found = [(token, known.value, known.rank), *((one, value, rank) for rank, (one, value) in ranked)]
            yield {
                str(one): {"logprob": max(value, LEAST), "rank": rank, "decoded_token": text(one)}
                for one, value, rank in found
            }

    def _known(self) -> Iterator[tuple[int, _Known]]:
        """Each token except the first, with its log probabilities."""
        tokens = iter(self.tokens[1:])
        for piece in self._pieces:
            values, ranks, ids = array("d", piece.values), unpack(piece.ranks), unpack(piece.ids)
            likeliest = array("d", piece.likeliest)
            width = len(ids) // len(values)
            for at, (value, rank) in enumerate(zip(values, ranks, strict=True)):
                here = slice(at * width, (at + 1) * width)
                yield next(tokens), _Known(value, rank, list(zip(ids[here], likeliest[here], strict=True)))


def behind_echo(prompt: PromptReport | None, answer: Mapping[str, list[Any]] | None) -> dict[str, Any] | None:
    """A completion's ``logprobs``, with those of its echo before its own; None if there are neither."""
    if prompt is None or not prompt.columns:
        return None if answer is None else dict(answer)
    return {name: column + (answer[name] if answer else []) for name, column in prompt.columns.items()}
