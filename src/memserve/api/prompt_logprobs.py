"""What is told of a prompt's own tokens: at the head of a completion's ``logprobs``, and as vLLM's ``prompt_logprobs``."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any

import attrs
import msgspec

from memserve.api.logprobs import LEAST, Piece, Told, completion_logprobs, token_text
from memserve.drawing import Logprobs, PromptLogprobs
from memserve.tokens import pack, unpack


@attrs.frozen
class _Known:
    """Of one token: its log probability and rank, and the most probable ones in its place."""

    value: float
    rank: int
    likeliest: Sequence[tuple[int, float]]


@attrs.define
class PromptReport:
    """One prompt's, for all of its answers. The first of them brings it: no other needs to have it computed again.

    A long prompt's takes a moment to write, so :meth:`show` is for another thread; nothing of an answer goes out before.
    """

    tokens: Sequence[int]
    piece: Piece
    echoed: int | None
    """How many of the likeliest tokens are shown with those of an echo; None: no echo is told of."""
    listed: int | None
    """How many in ``prompt_logprobs``; None: it was not asked for."""
    shown: bool = attrs.field(default=False, init=False)
    columns: dict[str, list[Any]] = attrs.field(factory=dict, init=False)
    """Of a completion's ``logprobs``; empty where no echo is told of."""
    characters: int = attrs.field(default=0, init=False)
    """Of the echoed tokens."""
    listing: msgspec.Raw | None = attrs.field(default=None, init=False)
    """JSON of ``prompt_logprobs``."""
    _pieces: list[PromptLogprobs] = attrs.field(factory=list, init=False)

    def take(self, pieces: Iterable[PromptLogprobs]) -> None:
        """What came of it, in the order of its tokens."""
        self._pieces += pieces

    @property
    def ready(self) -> bool:
        """All of it has come."""
        return 1 + sum(map(len, self._pieces)) == len(self.tokens)

    def show(self) -> None:
        """Write all of it."""
        piece = cache(self.piece)  # the same few tokens are the likeliest at many places
        if self.echoed is not None:
            self._show_echo(self.echoed, piece)
        if self.listed is not None:
            self.listing = msgspec.Raw(msgspec.json.encode([None, *self._listing(self.listed, piece)]))
        self._pieces.clear()
        self.shown = True

    def _show_echo(self, count: int, piece: Piece) -> None:
        told = [Told(self.tokens[0], 0, None)]
        self.characters = len(token_text(self.tokens[0], piece))
        for token, known in self._known():
            ids = [one for one, _ in known.likeliest[:count]]
            values = [value for _, value in known.likeliest[:count]]
            told.append(Told(token, self.characters, Logprobs(known.value, pack(ids), tuple(values))))
            self.characters += len(token_text(token, piece))
        self.columns = completion_logprobs(told, piece)

    def _listing(self, count: int, piece: Piece) -> Iterator[dict[str, Any]]:
        """By token id, as vLLM has it: the prompt's own token first, then the most probable ones."""
        text = cache(partial(token_text, piece=piece))
        for token, known in self._known():
            ranked = enumerate(known.likeliest[:count], 1)
            found = [(token, known.value, known.rank), *((one, value, rank) for rank, (one, value) in ranked)]
            yield {
                str(one): {"logprob": max(value, LEAST), "rank": rank, "decoded_token": text(one)}
                for one, value, rank in found
            }

    def _known(self) -> Iterator[tuple[int, _Known]]:
        """Each token but the first, and what is known of it."""
        tokens = iter(self.tokens[1:])
        for piece in self._pieces:
            values, ranks, ids = array("d", piece.values), unpack(piece.ranks), unpack(piece.ids)
            likeliest = array("d", piece.likeliest)
            width = len(ids) // len(values)
            for at, (value, rank) in enumerate(zip(values, ranks, strict=True)):
                here = slice(at * width, (at + 1) * width)
                yield next(tokens), _Known(value, rank, list(zip(ids[here], likeliest[here], strict=True)))


def behind_echo(prompt: PromptReport | None, answer: Mapping[str, list[Any]] | None) -> dict[str, Any] | None:
    """A completion's ``logprobs`` with those of its echo before its own; None where there are neither."""
    if prompt is None or not prompt.columns:
        return None if answer is None else dict(answer)
    return {name: column + (answer[name] if answer else []) for name, column in prompt.columns.items()}
