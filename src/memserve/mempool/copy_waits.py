"""Calls that are answered when copies between tiers end: SwapOut, and an AllocMem that finds the arena full.

An AllocMem never waits for what others hold, because whoever asks holds some itself. But it waits for copies that make
room, as these always end: so what is cached leaves for the next tier rather than being lost.
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
    """A SwapOut under way."""

    sender: ActorId
    call: int
    copies: set[int]
    pages: int = 0
    """Moved so far."""


@attrs.define
class CopyWaits:
    """The calls of one shard that wait for nothing but copies."""

    pool: Pool
    _outs: list[_Out] = attrs.field(factory=list, init=False)
    _allocs: dict[tuple[ActorId, int], AllocMem] = attrs.field(factory=dict, init=False)
    """The longest waiting first."""

    def __len__(self) -> int:
        """AllocMems that wait."""
        return len(self._allocs)

    def has(self, sender: ActorId, call: int) -> bool:
        """Whether a call waits here."""
        outs = any(out.sender == sender and out.call == call for out in self._outs)
        return outs or (sender, call) in self._allocs

    def swap_out(self, sender: ActorId, call: SwapOut) -> Answer | None:
        """Begin; None: it is answered later. Raises PoolError (BAD_COUNT, BAD_TIER)."""
        copies = set(self.pool.swap_out(call.pages, call.tier))
        if not copies:
            return Freed(call.call, 0)
        self._outs.append(_Out(sender, call.call, copies))
        return None

    def alloc(self, sender: ActorId, call: AllocMem, now: float, *, may_wait: bool) -> Answer | None:
        """Grant, or begin to make room; None: it is answered later. Raises PoolError, as :meth:`Pool.alloc_mem`."""
        if may_wait and not self._allocs and self._makes_room(sender, call):
            self._allocs[sender, call.call] = call
            return None
        return self._grant(sender, call, now)

    def _makes_room(self, sender: ActorId, call: AllocMem) -> bool:
        """Whether copies are under way that free all that is missing; begins them."""
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
                self.pool.leases.lack(call.lease, now)
            raise
        self.pool.leases.has_enough(call.lease)
        return Allocated(call.call, call.lease, pages)

    def grown(self, now: float) -> list[Reply]:
        """Answers to AllocMems for which there is room by now, or will not be after all: then what is cached is dropped."""
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
        """A copy has moved so many pages: answers to the SwapOuts that are over with it."""
        answers: list[Reply] = []
        for out in [one for one in self._outs if copy in one.copies]:
            out.copies.remove(copy)
            out.pages += pages
            if not out.copies:
                self._outs.remove(out)
                answers.append((out.sender, Freed(out.call, out.pages)))
        return answers

    def forget(self, sender: ActorId) -> None:
        """The sender is gone."""
        self._outs = [out for out in self._outs if out.sender != sender]
        self._allocs = {key: call for key, call in self._allocs.items() if key[0] != sender}

    def withdraw(self, sender: ActorId, call: int) -> None:
        """Nobody waits for this call any more."""
        self._allocs.pop((sender, call), None)

    def check(self) -> None:
        """Assert that whatever waits, waits for copies."""
        swaps = self.pool.room.swaps
        assert all(copy in swaps for out in self._outs for copy in out.copies), "a copy is lost"
        # Not all of them need make room: a page that is pinned meanwhile stays, and its copy ends for nothing.
        assert not self._allocs or len(swaps), "an AllocMem waits for nothing"


def acquired(call: int, grant: Grant, sequel: bytes = b"") -> Acquired:
    """A grant as its caller hears of it."""
    found = grant.found_pages
    return Acquired(call, grant.lease, grant.pages, grant.cached_tokens, found_pages=found, sequel=sequel)
