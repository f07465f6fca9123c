"""Separates what a model thinks from its answer, if ``[model] reasoning`` asks for that.

Models that reason write their thoughts between ``<think>`` and ``</think>`` at the head of an answer. Some
templates write the ``<think>`` at the end of the prompt.
"""

from __future__ import annotations

from collections.abc import Callable

import attrs

OPEN, CLOSE = MARKS = "<think>", "</think>"


@attrs.frozen
class Thought:
    """A piece of what a model thinks."""

    text: str


def begins_in_thought(prompt: str, continued: str = "") -> bool:
    """Whether the answer to this prompt begins within a thought.

    ``continued``: the message that the answer continues, if it does.
    """
    return prompt.rstrip().endswith(OPEN) or continued.rfind(OPEN) > continued.rfind(CLOSE)


class ThoughtParser:
    """Parses one answer: ``push`` its text, then ``finish``; both return what is known by then.

    Whitespace around a thought belongs neither to it nor to the answer. The output depends only on the text,
    not on how it was cut into pieces.
    """

    def __init__(self, begun: bool) -> None:
        """``begun``: whether the answer begins within a thought."""
        self._rest = ""
        self._state: Callable[[], bool] = self._in_thought if begun else self._at_head
        self._thinking = False
        """Whether any of the thought has been reported."""
        self.began = begun
        """Whether there was a thought, which may be empty."""
        self._found: list[Thought | str] = []

    @property
    def over(self) -> bool:
        """Whether what follows belongs to the answer."""
        return self._state in (self._behind_thought, self._in_answer)

    def push(self, text: str) -> list[Thought | str]:
        """Take in ``text`` and return what is now known, in order."""
        self._rest += text
        while self._state():
            pass
        found, self._found = self._found, []
        return found

    def finish(self) -> list[Thought | str]:
        """What is left when no more text follows."""
        left, self._rest = self._rest, ""
        if self._state == self._in_thought:
            left = left if self._thinking else left.lstrip()
            return [Thought(left)] if left.strip() else []
        return [left] if left and self._state != self._behind_thought else []

    # ---- states: each works on the rest, and returns whether there is more to do with it -------------------

    def _at_head(self) -> bool:
        head = self._rest.lstrip()
        if OPEN.startswith(head):  # true of an empty head too
            if head != OPEN:
                return False
        elif not head.startswith(OPEN):
            return self._to(self._in_answer)
        self._rest = head[len(OPEN) :]
        self.began = True
        return self._to(self._in_thought)

    def _in_thought(self) -> bool:
        text, closed, behind = self._rest.partition(CLOSE)
        thought = text.rstrip() if closed else text[: len(text) - held(text, CLOSE)]
        shown = thought if self._thinking else thought.lstrip()
        if shown or closed:  # even an empty one tells where it ends
            self._thinking = self._thinking or bool(shown)
            self._found.append(Thought(shown))
        self._rest = behind if closed else text[len(thought) :]
        return bool(closed) and self._to(self._behind_thought)

    def _behind_thought(self) -> bool:
        self._rest = self._rest.lstrip()
        return bool(self._rest) and self._to(self._in_answer)

    def _in_answer(self) -> bool:
        if self._rest:
            self._found.append(self._rest)
            self._rest = ""
        return False

    def _to(self, state: Callable[[], bool]) -> bool:
        self._state = state
        return True


def held(text: str, marker: str) -> int:
    """How many characters at the end of ``text`` may begin ``marker``, whitespace before it included."""
    begun = next(
        (size for size in range(min(len(text), len(marker) - 1), 0, -1) if text.endswith(marker[:size])), 0
    )
    before = text[: len(text) - begun]
    return begun + len(before) - len(before.rstrip())
