"""Pages that a shard fetches before their request is handed over, while the rest of its prompt is computed.

Each chunk of the prompt announces the pages that are full by then (a Prefetch whose source has ``ahead``
set). Each request has at most one fetch under way. Of the announcements that arrive during a fetch only the
latest waits, because it covers the others. The handoff waits for the fetch under way and treats the fetched
pages as cached: only the last pages then remain to be moved.
"""

from __future__ import annotations

from collections import OrderedDict

import attrs

from memserve.identity import ActorId
from memserve.mempool.grants import Grant
from memserve.pool_messages import Acquire, Prefetch

REQUESTS_REMEMBERED = 1024
"""Number of requests for which the pages fetched ahead are remembered."""


@attrs.define
class Prefetcher:
    """The fetches of one shard ahead of handoffs, by request."""

    _running: dict[str, Prefetch | None] = attrs.field(factory=dict, init=False)
    """Requests with a fetch under way, each with the latest announcement since it began."""
    _held: dict[tuple[ActorId, int], Acquire] = attrs.field(factory=dict, init=False)
    """Handoffs that wait for such a fetch, by (sender, call)."""
    _pages: OrderedDict[str, int] = attrs.field(factory=OrderedDict, init=False)

    def __len__(self) -> int:
        """Number of calls that wait."""
        return len(self._held)

    def announced(self, message: Prefetch) -> bool:
        """Whether to fetch this now; if not, it is fetched later, or never needed."""
        assert message.source is not None, "nothing to be fetched"
        request = message.source.request
        if request in self._running:
            self._running[request] = message
            return False
        self._running[request] = None
        return True

    def hold(self, sender: ActorId, call: Acquire) -> bool:
        """Hold a call that must wait for the fetch under way for its request; False when there is none."""
        request = call.source.request if call.source else ""
        if not request or request not in self._running:
            return False
        self._running[request] = None  # the handoff itself fetches the pages that fill later
        self._held[sender, call.call] = call
        return True

    def ended(self, request: str, pages: int) -> tuple[Prefetch | None, dict[tuple[ActorId, int], Acquire]]:
        """Handle the end of a fetch that has brought ``pages`` pages, 0 if it failed.

        Returns what to fetch next, and the calls that need not wait any longer.
        """
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
        """Pages found for a handoff, by tier, and the bytes that were fetched ahead of it.

        The pages that were fetched ahead do not count as found.
        """
        source = call.source
        early = self._pages.pop(source.request, 0) if source and source.lease else 0
        device, *slower = grant.found_pages
        early = min(early, device)  # some may have left the device tier again
        return (device - early, *slower), early * page_bytes

    def has(self, sender: ActorId, call: int) -> bool:
        """Whether a call waits."""
        return (sender, call) in self._held

    def forget(self, sender: ActorId, call: int | None = None) -> None:
        """Drop the waiting calls of a sender, or one of them."""
        for key in [key for key in self._held if key[0] == sender and call in (None, key[1])]:
            del self._held[key]

    def check(self, fetching: set[str]) -> None:
        """Assert that every waiting call waits for a fetch, and that ``fetching`` are the requests with one."""
        assert self._running.keys() == fetching, f"fetches ahead for {fetching}, noted for {[*self._running]}"
        for call in self._held.values():
            assert call.source and call.source.request in self._running, f"call {call.call} waits for nothing"
