"""Calls that are answered when copies between tiers end: SwapOut, and an AllocMem that finds the arena full.

An AllocMem never waits for pages that others hold, because its caller holds some itself. But it does wait for
copies that make room, because copies always end. So cached pages move to the next tier instead of being lost.
"""

from __future__ import annotations

import attrs

from memserve.errors import PoolError
from memserve.identity import ActorId
from memserve.mempool.addresses import Tier
from memserve.mempool.answers import Answer
from memserve.mempool.grants import Grant
from memserve.mempool.pool import Pool
from memserve.pool_messages import Acquired, Allocated, AllocMem, Freed, PoolRefused, SwapOut

Reply = tuple[ActorId, Answer]


@attrs.define
class _Out:
    """A SwapOut that is under way."""

    sender: ActorId
    call: int
    copies: set[int]
    pages: int = 0
    """Pages moved so far."""


@attrs.define
class CopyWaits:
    """The calls of one shard that wait only for copies."""

    pool: Pool
    _outs: list[_Out] = attrs.field(factory=list, init=False)
    _allocs: dict[tuple[ActorId, int], AllocMem] = attrs.field(factory=dict, init=False)
    """AllocMems by (sender, call), longest waiting first."""

    def __len__(self) -> int:
        """Number of AllocMems that wait."""
        return len(self._allocs)

    def has(self, sender: ActorId, call: int) -> bool:
        """Whether a call waits here."""
        outs = any(out.sender == sender and out.call == call for out in self._outs)
        return outs or (sender, call) in self._allocs

    def swap_out(self, sender: ActorId, call: SwapOut) -> Answer | None:
        """Begin to move pages out; None: the answer comes later. Raises PoolError (BAD_COUNT, BAD_TIER)."""
        copies = set(self.pool.swap_out(call.pages, call.tier))
        if not copies:
            return Freed(call.call, 0)
        self._outs.append(_Out(sender, call.call, copies))
        return None

    def alloc(self, sender: ActorId, call: AllocMem, now: float, *, may_wait: bool) -> Answer | None:
        """Grant pages, or begin to make room; None: the answer comes later.

        Raises PoolError like :meth:`Pool.alloc_mem`.
        """
        if may_wait and not self._allocs and self._makes_room(sender, call):
            self._allocs[sender, call.call] = call
            return None
        return self._grant(sender, call, now)

    def _makes_room(self, sender: ActorId, call: AllocMem) -> bool:
        """Whether pages are missing and copies will free all of them; begins these copies."""
        if call.tier != Tier.DEVICE or call.pages <= 0 or self._is_wrong(sender, call):
            return False
        return self.pool.room.clears(call.pages)

    def _is_wrong(self, sender: ActorId, call: AllocMem) -> bool:
        return bool(call.lease) and self.pool.owner_of(call.lease) != sender

    def _grant(self, sender: ActorId, call: AllocMem, now: float) -> Answer:
        if not call.lease:
            return acquired(call.call, self.pool.alloc_new(sender, call.scope, call.pages, call.tier, now))
        try:
            pages = self.pool.alloc_mem(sender, call.lease, call.pages, now, call.tier)
        except PoolError as refused:
            if refused.code == PoolError.NO_PAGES:
                self.pool.leases.mark_starved(call.lease, now)
            raise
        self.pool.leases.clear_starved(call.lease)
        return Allocated(call.call, call.lease, pages)

    def grown(self, now: float) -> list[Reply]:
        """Answers to AllocMems that need not wait any longer.

        Either there is room by now, or copies will not make any after all: then cached pages are dropped.
        """
        answers: list[Reply] = []
        while self._allocs:
            (sender, number), call = next(iter(self._allocs.items()))
            if self._makes_room(sender, call):
                break
            del self._allocs[sender, number]
            try:
                answers.append((sender, self._grant(sender, call, now)))
            except PoolError as refused:
                answers.append((sender, PoolRefused(number, refused.code, refused.message)))
        return answers

    def copied(self, copy: int, pages: int) -> list[Reply]:
        """Answers to the SwapOuts that are complete now that a copy has moved ``pages`` pages."""
        answers: list[Reply] = []
        for out in [one for one in self._outs if copy in one.copies]:
            out.copies.remove(copy)
            out.pages += pages
            if not out.copies:
                self._outs.remove(out)
                answers.append((out.sender, Freed(out.call, out.pages)))
        return answers

    def forget(self, sender: ActorId) -> None:
        """Drop the calls of a sender that is gone."""
        self._outs = [out for out in self._outs if out.sender != sender]
        self._allocs = {key: call for key, call in self._allocs.items() if key[0] != sender}

    def withdraw(self, sender: ActorId, call: int) -> None:
        """Drop an AllocMem whose sender no longer waits for it."""
        self._allocs.pop((sender, call), None)

    def check(self) -> None:
        """Assert that every waiting call waits for copies."""
        swaps = self.pool.room.swaps
        assert all(copy in swaps for out in self._outs for copy in out.copies), "a copy is lost"
        # A copy may free nothing: its page can be pinned in the meantime, and then it stays.
        assert not self._allocs or len(swaps), "an AllocMem waits for nothing"


def acquired(call: int, grant: Grant, sequel: bytes = b"") -> Acquired:
    """The answer that reports a grant to its caller."""
    found = grant.found_pages
    return Acquired(call, grant.lease, grant.pages, grant.cached_tokens, found_pages=found, sequel=sequel)
