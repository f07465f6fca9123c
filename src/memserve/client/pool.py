"""The paper's MemPool for any trio program: calls on shards that run elsewhere, and the bytes of their pages.

``docs/mempool.md`` has an example. The tasks of one program share a pool. Every call may be cancelled, and
then leaves nothing behind. Pages are written and read in mapped memory, so only on the shard's host.

A call to every shard each second keeps the leases alive. A program that was stopped for longer than the
shard's ``lease_s`` has lost its leases, and notices before it writes: :meth:`MemPool.write` refuses once the
last answer is too old.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import trio

from memserve.bus import open_link
from memserve.client.calls import ShardConversation, Waiter
from memserve.client.leases import HeldLease, Lease, Shard, check_writable
from memserve.errors import PoolError, unwrapped
from memserve.identity import ActorId
from memserve.mempool.addresses import Address, Tier
from memserve.mempool.demands import check_private
from memserve.messages import Message
from memserve.pool_messages import (
    Acquire,
    Acquired,
    Adopt,
    AllocMem,
    Delete,
    Evict,
    FreeMem,
    Insert,
    Match,
    Meet,
    NextArrival,
    Prefetch,
    SwapIn,
    SwapOut,
    Transfer,
    Transferred,
)
from memserve.tokens import count
from memserve.transfer_messages import Granularity

TRANSFER_S = 30.0
"""How long a transfer may take if its caller does not say."""
MAY_WRITE_ON = {PoolError.CUT, PoolError.DEADLINE, PoolError.PEER_GONE, PoolError.CHECKSUM}
"""Failures after which a transfer's destination may be written for a while: it can only be given back."""


@attrs.frozen
class Delivery:
    """Pages that another program has sent to this one."""

    lease: Lease
    sender: ActorId
    private: bytes
    """The sender's own data, delivered with the pages."""


class MemPool(ShardConversation):
    """The pool; :func:`open_pool` makes one. ``scope``: the scope whose prefixes it sees (:mod:`memserve.scopes`).

    See the module's text. Every call raises PoolError when it is refused, and PeerUnreachable when the shard
    does not answer. Tokens are packed (:func:`memserve.tokens.pack`).
    """

    @property
    def me(self) -> ActorId:
        """The name to which another program sends pages: see :meth:`send`."""
        return self._link.actor

    # ---- memory --------------------------------------------------------------------------------------------

    async def alloc_mem(
        self, size: int, shard: str, tier: Tier = Tier.DEVICE, lease: Lease | None = None
    ) -> Lease:
        """``size`` pages of a tier, all or nothing: under a new lease, or at the end of ``lease``.

        Raises PoolError (BAD_COUNT, BAD_TIER, TOO_LARGE, NO_PAGES; with a lease also UNKNOWN_LEASE, MOVING).
        """
        at, number = self._shards[shard], lease.id if lease else 0
        answer = await self._ask(at, lambda call: AllocMem(call, number, size, tier, self.scope), grants=True)
        if not number:
            return at.hold(answer)
        held = at.held(number)
        at.grew(held, at.home.addresses(answer.pages))
        return Lease(shard, number, tuple(held.table), lease.cached_tokens if lease else 0)

    async def free_mem(self, pages: Lease | Sequence[Address]) -> int:
        """Give back a lease, or some of its pages that are not in the index.

        Returns the number of pages that came free; indexed pages stay in the index. Raises PoolError
        (UNKNOWN_LEASE, FOREIGN_ADDRESS, STALE_ADDRESS, NOT_HELD, RETIRED).
        """
        named: tuple[Address, ...] = () if isinstance(pages, Lease) else tuple(pages)
        if isinstance(pages, Lease):
            at, number = self._shards[pages.shard], pages.id
        else:
            at, held = self._find(named)
            number = held.id
        gone = set(named) or None
        try:
            answer = await self._ask(at, lambda call: FreeMem(number, call, named))
        except PoolError:
            raise  # it has changed nothing
        except BaseException:
            at.let_go(number, gone)  # the shard may have heard it, and granted the pages to another
            raise
        at.let_go(number, gone)
        freed: int = answer.pages
        return freed

    def write(self, address: Address, data: bytes | memoryview, offset: int = 0) -> None:
        """Write bytes into a page that this program has leased and not yet inserted.

        Raises PoolError (FOREIGN_ADDRESS, STALE_ADDRESS, NOT_HELD, MOVING, RETIRED, DOES_NOT_FIT,
        UNREADABLE).
        """
        at, held = self._find((address,))
        check_writable(held, address)
        page = at.page(address)
        if offset < 0 or offset + len(data) > len(page):
            text = f"{len(data)} bytes at {offset} of a page of {len(page)}"
            raise PoolError(PoolError.DOES_NOT_FIT, text)
        page[offset : offset + len(data)] = data

    def read(self, address: Address) -> memoryview:
        """A page that this program has leased or matched, in place and read-only; valid as long as its lease.

        Raises PoolError (FOREIGN_ADDRESS, STALE_ADDRESS, NOT_HELD, UNREADABLE).
        """
        at, _ = self._find((address,))
        return at.page(address).toreadonly()

    # ---- index ---------------------------------------------------------------------------------------------

    async def acquire(self, tokens: bytes, extra_pages: int, shard: str) -> Lease:
        """match and alloc_mem in one: pages for all of ``tokens``, cached ones first, plus ``extra_pages``.

        Waits while the pool is short of pages. Raises PoolError (TOO_LARGE, NOT_WHOLE_PAGES, BAD_COUNT,
        QUEUE_FULL).
        """
        at = self._shards[shard]
        make = lambda call: Acquire(call, self.scope, tokens, extra_pages)  # noqa: E731
        return at.hold(await self._ask(at, make, grants=True))

    async def match(self, tokens: bytes, shard: str) -> Lease:
        """The longest cached prefix in whole pages, pinned until it is given back.

        Raises PoolError (NOT_WHOLE_PAGES, QUEUE_FULL).
        """
        at = self._shards[shard]
        return at.hold(await self._ask(at, lambda call: Match(call, self.scope, tokens), grants=True))

    async def insert(self, tokens: bytes, addresses: Sequence[Address]) -> int:
        """Insert a prompt into the index: ``addresses`` hold all of ``tokens``, from the first on.

        Tokens fill whole pages. The addresses are pages of one lease, or pages of a match followed by pages
        of one lease. They cannot be written any more. Returns how many of the tokens were cached already.
        Raises PoolError (NOT_WHOLE_PAGES, DOES_NOT_FIT, TOKENS_CHANGED, FOREIGN_ADDRESS, STALE_ADDRESS,
        NOT_HELD, UNKNOWN_LEASE, MOVING).
        """
        at, held = self._find(addresses[-1:])
        named = tuple(addresses)
        own = held.private.intersection(named)
        held.private -= own  # from now on, whether an answer comes or not
        try:
            answer = await self._ask(at, lambda call: Insert(call, held.id, 0, tokens, named))
        except PoolError:
            held.private |= own
            raise
        at.inserted(held, named)
        already: int = answer.already_tokens
        return already

    async def delete(self, tokens: bytes, shard: str) -> int:
        """Drop a prompt and all that continues it, except pages in use; returns how many came free."""
        return await self._freed(shard, lambda call: Delete(call, self.scope, tokens))

    async def evict(self, n: int, shard: str, tier: Tier = Tier.DEVICE) -> int:
        """Drop up to ``n`` unused pages, least recently used first; returns how many came free.

        Raises PoolError (BAD_COUNT, BAD_TIER).
        """
        return await self._freed(shard, lambda call: Evict(call, n, tier))

    # ---- tiers ---------------------------------------------------------------------------------------------

    async def swap_out(self, n: int, shard: str, tier: Tier = Tier.DEVICE) -> int:
        """Move up to ``n`` unused pages to the next tier; returns how many were moved.

        Raises PoolError (BAD_COUNT, BAD_TIER).
        """
        return await self._freed(shard, lambda call: SwapOut(call, n, tier))

    async def swap_in(self, pages: Lease | Sequence[Address]) -> Lease:
        """Bring the pages of a match into the device tier; returns the lease with their new addresses.

        Raises PoolError (UNKNOWN_LEASE, NOT_HELD, FOREIGN_ADDRESS, STALE_ADDRESS, MOVING, PINNED, NO_PAGES,
        QUEUE_FULL).
        """
        if isinstance(pages, Lease):
            at = self._shards[pages.shard]
            held = at.held(pages.id)
        else:
            at, held = self._find(pages)
        try:
            answer = await self._ask(at, lambda call: SwapIn(call, held.id))
        except BaseException as error:
            if not isinstance(error, PoolError) or error.code == PoolError.UNKNOWN_LEASE:
                at.let_go(held.id, None)  # the pages may have moved, and nobody here knows where to
                self._send(at, FreeMem(held.id))
            raise
        at.let_go(held.id, None)
        return at.hold(answer)

    def prefetch(self, tokens: bytes, shard: str) -> None:
        """Hint that a prefix will be wanted soon. Nothing is promised, and nothing answered."""
        self._send(self._shards[shard], Prefetch(self.scope, tokens))

    # ---- between shards ------------------------------------------------------------------------------------

    async def transfer(
        self,
        shard: str,
        src: Sequence[Address],
        dst: Sequence[Address] = (),
        *,
        granularity: Granularity | None = None,
        deadline_s: float = TRANSFER_S,
    ) -> Lease:
        """Copy pages to another shard, into ``dst`` or into new pages; returns the lease there that has them.

        ``src`` are pages of this program in the device tier of one shard; ``dst`` are pages of one lease at
        the other. Raises PoolError (NOT_HELD, FOREIGN_ADDRESS, STALE_ADDRESS, UNKNOWN_LEASE, MOVING, RETIRED,
        BAD_TIER, DOES_NOT_FIT, BAD_COUNT, NO_PAGES, TOO_LARGE, QUEUE_FULL, NO_PATH; and PEER_GONE, CUT,
        DEADLINE, CHECKSUM, after which ``dst`` can only be given back).
        """
        return await self.transfer_with_insert(
            shard, b"", src, dst, granularity=granularity, deadline_s=deadline_s
        )

    async def transfer_with_insert(
        self,
        shard: str,
        tokens: bytes,
        src: Sequence[Address],
        dst: Sequence[Address] = (),
        *,
        granularity: Granularity | None = None,
        deadline_s: float = TRANSFER_S,
    ) -> Lease:
        """Copy pages like :meth:`transfer`, and let the receiver insert ``tokens`` before it acknowledges.

        ``src`` holds ``tokens`` from the first on. Raises PoolError like :meth:`transfer`, and
        NOT_WHOLE_PAGES.
        """
        there = self._shards[shard]
        into = self._destination(there, dst)
        number = into.id if into else 0
        call = self._push(
            there,
            src,
            deadline_s,
            tokens=tokens,
            destination=tuple(dst),
            into=number,
            granularity=granularity or "",
        )
        answer = await self._move(call, into)
        if into is None:
            return await self._claim(there, answer, count(tokens))
        if tokens:
            there.inserted(into, tuple(dst))
        return Lease(shard, into.id, tuple(into.table), count(tokens))

    async def send(
        self,
        shard: str,
        src: Sequence[Address],
        to: ActorId,
        private: bytes = b"",
        tokens: bytes = b"",
        *,
        deadline_s: float = TRANSFER_S,
    ) -> int:
        """Copy pages to another shard for another program; returns the number of bytes moved.

        ``to`` is that program's ``me``. It takes the pages and ``private``, at most 1 MiB, by :meth:`receive`.
        Raises PoolError like :meth:`transfer`.
        """
        check_private(private)
        call = self._push(self._shards[shard], src, deadline_s, tokens=tokens, owner=to, private=private)
        answer = await self._move(call, None)
        return answer.nbytes

    async def receive(self, shard: str) -> Delivery:
        """The next pages that another program has sent to this one; waits for them.

        Raises PoolError (QUEUE_FULL).
        """
        at = self._shards[shard]
        answer = await self._ask(at, NextArrival, grants=True)
        return Delivery(at.hold(answer), answer.sender, answer.private)

    # ---- inside --------------------------------------------------------------------------------------------

    async def _freed(self, shard: str, make: Callable[[int], Message]) -> int:
        answer = await self._ask(self._shards[shard], make)
        freed: int = answer.pages
        return freed

    def _destination(self, there: Shard, dst: Sequence[Address]) -> HeldLease | None:
        """The lease of destination pages, all of which must be writable."""
        if not dst:
            return None
        there.home.slots(dst)
        held = [there.holder(address, trio.current_time()) for address in dst]
        for one, address in zip(held, dst, strict=True):
            check_writable(one, address)
        return held[0]

    def _push(self, there: Shard, src: Sequence[Address], deadline_s: float, **more: Any) -> Transfer:
        """A Transfer of pages to a shard, not yet numbered."""
        at, _ = self._find(src[:1])
        at.home.slots(src)
        leases = tuple(dict.fromkeys(at.holder(one, trio.current_time()).id for one in src))
        return Transfer(0, there.known.actor, self.scope, leases, tuple(src), deadline_s, **more)

    async def _move(self, call: Transfer, into: HeldLease | None) -> Transferred:
        """Ask the shard that has the pages to send them; until that has ended, neither end may be written."""
        src, dst = [Address(one) for one in call.addresses], [Address(one) for one in call.destination]
        at, _ = self._find(src[:1])
        there = next(one for one in self._shards.values() if one.known.actor == call.to)
        self._send(at, Meet(call.to, there.endpoint))
        reads = [(at.holder(one, trio.current_time()), (one,)) for one in src]
        fills = [(into, tuple(dst))] if into else []
        for held, some in (*reads, *fills):
            held.lend(some)
        waiter, settled = Waiter(), False
        try:
            answer: Transferred = await self._ask(
                at, lambda number: attrs.evolve(call, call=number), grants=True, waiter=waiter
            )
            settled = True
        except PoolError as refused:
            settled = refused.code not in MAY_WRITE_ON
            raise
        finally:
            over = reads if waiter.arrived.is_set() else []  # otherwise nobody knows what is still read
            for held, some in (*over, *(fills if settled else ())):
                held.take_back(some)
        return answer

    async def _claim(self, there: Shard, answer: Transferred, tokens: int) -> Lease:
        """Adopt the new lease at the receiver, so that the receiver knows that its owner has claimed it."""
        try:
            await self._ask(there, lambda call: Adopt(call, answer.lease, self.me))
        except BaseException:
            self._send(there, FreeMem(answer.lease))
            raise
        return there.hold(Acquired(0, answer.lease, answer.pages, tokens))


@asynccontextmanager
async def open_pool(
    name: str, folder: Path, shards: Mapping[str, str], scope: str = ""
) -> AsyncIterator[MemPool]:
    """A pool over shards, given by name and endpoint, for an ``async with`` block; its leases end with it.

    ``folder`` is for this program's own socket and must have mode 0700. Raises PeerUnreachable when a shard
    does not answer.
    """
    actor = ActorId(f"{name}.{secrets.token_hex(4)}")
    with unwrapped():
        async with open_link(actor, f"ipc://{folder / actor}.sock") as link, trio.open_nursery() as nursery:
            pool = MemPool(link, shards, scope)
            try:
                await nursery.start(pool.run)
                yield pool
            finally:
                pool.close()
            nursery.cancel_scope.cancel()
