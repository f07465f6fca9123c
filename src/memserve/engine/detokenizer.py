"""Incremental detokenization: never half a character, never a part of a possible stop string.

Both classes take constant time per token on average: text that was passed on is never scanned again.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence

import attrs

STOPS_MAX = 16
"""Stop strings per request."""
STOP_CHARACTERS_MAX = 256
"""Length of one stop string, which bounds the text that is held back."""


def check_stops(stops: Sequence[str]) -> None:
    """Raise ValueError, naming what is wrong, unless ``stops`` are valid stop strings of a request."""
    if len(stops) > STOPS_MAX:
        raise ValueError(f"at most {STOPS_MAX} stop strings, got {len(stops)}")
    for index, stop in enumerate(stops):
        if not stop:
            raise ValueError(f"stop string {index} is empty; leave it out instead")
        if len(stop) > STOP_CHARACTERS_MAX:
            raise ValueError(f"stop string {index} has {len(stop)} characters, at most {STOP_CHARACTERS_MAX}")


class Detokenizer:
    """Decodes a growing sequence of tokens. Bytes that are not UTF-8 become U+FFFD."""

    def __init__(self, piece: Callable[[int], bytes]) -> None:
        """``piece`` gives the bytes of a token, as :meth:`memserve.engine.tokenizer.Tokenizer.piece` does."""
        self._piece = piece
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The characters that ``token`` completes; may be empty."""
        return self._decoder.decode(self._piece(token))

    def finish(self) -> str:
        """The rest when no token follows: U+FFFD for an incomplete character, or nothing."""
        return self._decoder.decode(b"", final=True)


class StopScanner:
    """Passes text on up to the first stop string, and holds back what may be the beginning of one.

    The stop string that is completed first wins; of two completed at the same character, the longer one. The
    outcome does not depend on how the text was cut into pushes. Each stop string has a Knuth-Morris-Pratt
    automaton.
    """

    def __init__(self, stops: Sequence[str] = (), with_stop: bool = False) -> None:
        """No stop string may be empty; see :func:`check_stops`. ``with_stop``: pass on the stop string too."""
        self._with_stop = with_stop
        self._matchers = [_Matcher.of(stop) for stop in sorted(set(stops), key=len, reverse=True)]
        self._held = ""
        self.matched: str | None = None
        """The stop string that was found, after which no text is passed on."""

    def push(self, text: str) -> str:
        """Take more text; returns the text now known to be passed on."""
        if self.matched is not None:
            return ""
        if not self._matchers:
            return text
        start = len(self._held)
        held = self._held + text
        for end, character in enumerate(text, start + 1):
            for matcher in self._matchers:
                if matcher.step(character) and self.matched is None:
                    self.matched = matcher.stop
            if self.matched is not None:
                self._held = ""
                return held[: end if self._with_stop else end - len(self.matched)]
        keep = max(matcher.state for matcher in self._matchers)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def finish(self) -> str:
        """The text held back, when no more text follows."""
        held, self._held = self._held, ""
        return held


@attrs.define
class _Matcher:
    stop: str
    failure: list[int]
    """``failure[n]``: length of the longest proper border of the stop string's first n characters."""
    state: int = 0
    """Length of the longest prefix of the stop string that the text so far ends with."""

    @classmethod
    def of(cls, stop: str) -> _Matcher:
        failure = [0, 0]
        border = 0
        for character in stop[1:]:
            while border and stop[border] != character:
                border = failure[border]
            border += stop[border] == character
            failure.append(border)
        return cls(stop, failure)

    def step(self, character: str) -> bool:
        """Take one character; true when it completes the stop string. Do not call it after that."""
        while self.state and self.stop[self.state] != character:
            self.state = self.failure[self.state]
        self.state += self.stop[self.state] == character
        return self.state == len(self.stop)
