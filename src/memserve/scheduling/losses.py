"""What an eviction costs later: the share of pages held by no shard any more that are requested again.

A full shard evicts a page for each new one. Whether that matters depends on the load: documents that are not
asked about again cost nothing. So it is measured: lost prefixes are remembered for a while, and a prompt that
would have matched one counts.
"""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Mapping

import attrs

from memserve.identity import ActorId
from memserve.tokens import TOKEN_BYTES

REMEMBERED = 20_000
"""Lost runs of pages to remember, the latest."""
WINDOW_PAGES = 4_000.0
"""Evictions after which older ones count half; the number of pages in all shards, if that is larger."""
PRIOR_SHARE, PRIOR_PAGES = 0.5, 500.0
"""Assumed share before any eviction, and the number of evictions that this assumption counts as."""

Key = tuple[str, int, int]
"""Scope, tokens and checksum of a prefix that ends behind the first lost page. These are hints: a collision
is a small error of a price."""


@attrs.define
class Losses:
    """Counts pages. ``width``: bytes of a page's tokens."""

    width: int
    held: Mapping[ActorId, int]
    """Pages held by each shard."""
    _lost: OrderedDict[Key, int] = attrs.field(factory=OrderedDict, init=False)
    """Pages of each lost run, by its prefix up to and including its first page."""
    _evicted: float = attrs.field(default=PRIOR_PAGES, init=False)
    _wanted: float = attrs.field(default=PRIOR_PAGES * PRIOR_SHARE, init=False)

    @property
    def share(self) -> float:
        """The chance that a page evicted now will be requested again, and found on no shard."""
        return min(1.0, self._wanted / self._evicted)

    def evicted(self, pages: int) -> None:
        """Count evicted pages, including copies of pages that other shards hold."""
        self._evicted += pages
        if self._evicted > WINDOW_PAGES and self._evicted > sum(self.held.values()):
            self._evicted /= 2
            self._wanted /= 2

    def lost(self, scope: str, prefix: bytes, pages: int) -> None:
        """Remember a run of pages that no shard holds any more; ``prefix`` ends behind its first page."""
        self._lost[_key(scope, prefix)] = pages
        if len(self._lost) > REMEMBERED:
            self._lost.popitem(last=False)

    def missed(self, scope: str, tokens: bytes, found: int) -> None:
        """Count the lost pages that a prompt would have matched beyond the ``found`` bytes that are held."""
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
