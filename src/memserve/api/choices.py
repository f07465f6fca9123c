"""One answer on its way to a client: tokens in, text out, until the model or a stop string ends it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import attrs

from memserve.api.service import Chunk
from memserve.engine.detokenizer import Detokenizer, StopScanner


@attrs.define
class Delta:
    """What is new in an answer since the last look."""

    text: str = ""
    tokens: list[int] = attrs.field(factory=list)
    finish: str | None = None

    def __bool__(self) -> bool:
        return bool(self.text or self.tokens or self.finish)


class Choice:
    """One answer. ``feed`` what the service gives, ``take`` what a client is to get."""

    def __init__(self, index: int, prompt: int, piece: Callable[[int], bytes], stops: Sequence[str]) -> None:
        """``index`` is the choice's in the response, ``prompt`` the number of its prompt."""
        self.index = index
        self.prompt = prompt
        self.output_tokens = 0
        """Up to the end of a stop string, where there was one."""
        self.cached_tokens = 0
        self.finish: str | None = None
        """``stop`` or ``length`` once the answer is whole."""
        self._detokenizer = Detokenizer(piece)
        self._scanner = StopScanner(stops)
        # Not yet taken. Bounded by max_tokens: a client that reads slowly costs no more than one that waits.
        self._new = Delta()
        self._texts: list[str] = []

    @property
    def stopped(self) -> bool:
        """Whether a stop string ended the answer: the service need not go on."""
        return self._scanner.matched is not None

    def feed(self, chunk: Chunk) -> None:
        """Take tokens in. What follows a stop string is dropped, its tokens too."""
        self.cached_tokens = chunk.cached_tokens
        for token in chunk.tokens:
            self.output_tokens += 1
            self._new.tokens.append(token)
            self._texts.append(self._scanner.push(self._detokenizer.push(token)))
            if self.stopped:
                return self._end("stop")
        if chunk.finish is not None:
            self._texts.append(self._scanner.push(self._detokenizer.finish()))
            self._texts.append(self._scanner.finish())
            self._end("stop" if self.stopped else chunk.finish)
        return None

    def take(self) -> Delta:
        """Everything new since the last call."""
        delta, self._new = self._new, Delta()
        delta.text = "".join(self._texts)
        self._texts.clear()
        return delta

    def _end(self, finish: str) -> None:
        self.finish = self._new.finish = finish
