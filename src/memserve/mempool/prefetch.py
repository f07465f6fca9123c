"""Pages that a shard fetches before their request is handed over, while the rest of its prompt is still computed.

Each chunk of the prompt announces what is full by then (a Prefetch whose source says ``ahead``). One fetch of a request is
under way at a time; what is announced meanwhile waits, the newest alone, as it covers the rest. The hand-over waits for
the fetch that is under way, and takes what has come for cached: then only the last pages are still to be moved.
"""

from __future__ import annotations

from collections import OrderedDict

import attrs

from memserve.identity import ActorId
from memserve.mempool.grants import Grant
from memserve.pool_messages import Acquire, Prefetch

REQUESTS_REMEMBERED = 1024
"""Requests of which it is known what came ahead."""


@attrs.define
class Prefetcher:
    """What one shard fetches ahead of hand-overs, by request."""

    _running: dict[str, Prefetch | None] = attrs.field(factory=dict, init=False)
    """Requests with a fetch under way, and what was announced since."""
    _held: dict[tuple[ActorId, int], Acquire] = attrs.field(factory=dict, init=False)
    """Hand-overs that wait for such a fetch."""
    _pages: OrderedDict[str, int] = attrs.field(factory=OrderedDict, init=False)

    def __len__(self) -> int:
        """Calls that wait."""
        return len(self._held)

    def announced(self, message: Prefetch) -> bool:
        """Whether to fetch this now; else it is done later, or never needed."""
        assert message.source is not None, "nothing to be fetched"
        request = message.source.request
        if request in self._running:
            self._running[request] = message
            return False
        self._running[request] = None
        return True

    def hold(self, sender: ActorId, call: Acquire) -> bool:
        """Whether a call must wait for what is under way for its request."""
        request = call.source.request if call.source else ""
        if not request or request not in self._running:
            return False
        self._running[request] = None  # the hand-over itself fetches what comes later
        self._held[sender, call.call] = call
        return True

    def over(self, request: str, pages: int) -> tuple[Prefetch | None, dict[tuple[ActorId, int], Acquire]]:
        """A fetch has brought so many pages, or failed: what to fetch next, and the calls that need not wait any more."""
        more = self._running.pop(request, None)
        self._pages[request] = self._pages.pop(request, 0) + pages
        while len(self._pages) > REQUESTS_REMEMBERED:
            self._pages.popitem(last=False)
        free = {
            key: call for key, call in self._held.items() if call.source and call.source.request == request
        }
        for key in free:
            del self._held[key]
        return more, free

    def counted(self, call: Acquire, grant: Grant, page_bytes: int) -> tuple[tuple[int, ...], int]:
        """The pages that were found for a hand-over, by tier, and the bytes that were moved ahead of it."""
        source = call.source
        early = self._pages.pop(source.request, 0) if source and source.lease else 0
        device, *slower = grant.found_pages
        early = min(early, device)  # some may have left again
        return (device - early, *slower), early * page_bytes

    def has(self, sender: ActorId, call: int) -> bool:
        """Whether a call waits."""
        return (sender, call) in self._held

    def forget(self, sender: ActorId, call: int | None = None) -> None:
        """Nobody waits for a sender's calls any more, or for one of them."""
        for key in [key for key in self._held if key[0] == sender and call in (None, key[1])]:
            del self._held[key]

    def check(self) -> None:
        """Assert that whatever waits, waits for something."""
        for call in self._held.values():
            assert call.source and call.source.request in self._running, f"call {call.call} waits for nothing"
