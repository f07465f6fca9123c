"""What an eviction costs later: of the pages that no shard holds any more, how many are asked for again.

A shard that is full evicts a page for each new one. Whether that matters is a property of the load: documents that nobody
asks about again cost nothing. So it is measured: what was lost is remembered for a while, by its prefix, and a prompt that
would have found it counts.
"""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Mapping

import attrs

from memserve.identity import ActorId
from memserve.tokens import TOKEN_BYTES

REMEMBERED = 20_000
"""Lost runs of pages, the newest."""
WINDOW_PAGES = 4_000.0
"""Evictions after which the older ones count half, at least; with more pages in all shards, as many as these."""
PRIOR_SHARE, PRIOR_PAGES = 0.5, 500.0
"""What is believed before anything was evicted, and how many evictions it is worth."""

Key = tuple[str, int, int]
"""Scope, bytes and checksum of a prefix that ends behind the first lost page. Hints: a clash is a small error of a price."""


@attrs.define
class Losses:
    """Counts pages. ``width``: bytes of a page's tokens."""

    width: int
    held: Mapping[ActorId, int]
    """Pages of each shard."""
    _lost: OrderedDict[Key, int] = attrs.field(factory=OrderedDict, init=False)
    """Pages of each lost run, by its prefix up to its first page."""
    _evicted: float = attrs.field(default=PRIOR_PAGES, init=False)
    _wanted: float = attrs.field(default=PRIOR_PAGES * PRIOR_SHARE, init=False)

    @property
    def share(self) -> float:
        """The chance that a page which is evicted now will be asked for again, and found nowhere."""
        return min(1.0, self._wanted / self._evicted)

    def evicted(self, pages: int) -> None:
        """A shard evicted so many pages, copies of what others hold included."""
        self._evicted += pages
        if self._evicted > WINDOW_PAGES and self._evicted > sum(self.held.values()):
            self._evicted /= 2
            self._wanted /= 2

    def lost(self, scope: str, prefix: bytes, pages: int) -> None:
        """A run of ``pages`` pages is held by nobody any more; ``prefix`` ends behind its first page."""
        self._lost[_key(scope, prefix)] = pages
        if len(self._lost) > REMEMBERED:
            self._lost.popitem(last=False)

    def missed(self, scope: str, tokens: bytes, found: int) -> None:
        """A prompt came of which ``found`` bytes are held: what it would have found else was wanted."""
        if not self._lost:
            return
        at, whole = found, len(tokens) // self.width * self.width
        while at < whole:
            pages = self._lost.pop(_key(scope, tokens[: at + self.width]), 0)
            if not pages:
                return
            self._wanted += min(pages, (whole - at) // self.width)
            at += pages * self.width


def _key(scope: str, prefix: bytes) -> Key:
    return scope, len(prefix) // TOKEN_BYTES, zlib.crc32(prefix)
