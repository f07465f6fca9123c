"""Texts that were encoded before, with their tokens: each turn of a chat brings all earlier messages again."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable

import attrs

from memserve.tokens import pack, unpack

CHARACTERS_MAX = 4 << 20
"""Of all texts together. Tokens take as much memory again, where a token is four characters."""
ENTRY_CHARACTERS = 100
"""What an entry counts for beside its text: roles and line breaks between messages are worth keeping, but not free."""

Key = tuple[str, bool, str]
"""Whose it is, whether it is the later part of a prompt, and the text."""


@attrs.define
class KnownTexts:
    """The least recently used texts go first. Threads may share it.

    One tenant's are not another's: how soon a prompt is encoded would tell whether somebody else has sent its parts.
    """

    characters_max: int = CHARACTERS_MAX
    _tokens: OrderedDict[Key, bytes] = attrs.field(factory=OrderedDict, init=False)
    _characters: int = attrs.field(default=0, init=False)
    _lock: threading.Lock = attrs.field(factory=threading.Lock, init=False)

    def tokens(self, scope: str, later: bool, text: str, encode: Callable[[str], list[int]]) -> Iterable[int]:
        """What ``encode(text)`` gives, or gave."""
        if _size(text) > self.characters_max:
            return encode(text)
        key = (scope, later, text)
        with self._lock:
            if (known := self._tokens.get(key)) is not None:
                self._tokens.move_to_end(key)
                return unpack(known)
        ids = encode(text)  # may take milliseconds: others look up meanwhile
        self._remember(key, pack(ids))
        return ids

    def _remember(self, key: Key, tokens: bytes) -> None:
        with self._lock:
            if key not in self._tokens:
                self._characters += _size(key[2])
            self._tokens[key] = tokens
            while self._characters > self.characters_max:
                (_, _, text), _ = self._tokens.popitem(last=False)
                self._characters -= _size(text)


def _size(text: str) -> int:
    return len(text) + ENTRY_CHARACTERS
