"""Cache of encoded texts with their tokens: each turn of a chat sends all earlier messages again."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable

import attrs

from memserve.tokens import pack, unpack

CHARACTERS_MAX = 4 << 20
"""Characters of all cached texts. Tokens take as much memory again, at four characters per token."""
ENTRY_CHARACTERS = 100
"""Characters charged per entry in addition to its text.

Roles and line breaks between messages are worth caching, but not free.
"""

Key = tuple[str, bool, str]
"""The tenant's scope, whether the text is a later part of a prompt, and the text."""


@attrs.define
class KnownTexts:
    """An LRU cache that threads may share.

    Tenants do not share entries: encoding time would reveal whether another tenant has sent the same parts.
    """

    characters_max: int = CHARACTERS_MAX
    _tokens: OrderedDict[Key, bytes] = attrs.field(factory=OrderedDict, init=False)
    _characters: int = attrs.field(default=0, init=False)
    _lock: threading.Lock = attrs.field(factory=threading.Lock, init=False)

    def tokens(self, scope: str, later: bool, text: str, encode: Callable[[str], list[int]]) -> Iterable[int]:
        """The tokens of ``encode(text)``, cached or computed now."""
        if _size(text) > self.characters_max:
            return encode(text)
        key = (scope, later, text)
        with self._lock:
            if (known := self._tokens.get(key)) is not None:
                self._tokens.move_to_end(key)
                return unpack(known)
        ids = encode(text)  # may take milliseconds: without the lock
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
