"""The MemPool of the paper for any trio program: its calls on shards that run elsewhere, and the bytes of their pages.

``docs/mempool.md`` shows it at work. A pool is used by tasks of one program; every call may be cancelled and then leaves
nothing behind. Pages are written and read in mapped memory, so on the shard's host only.

What is leased is kept by a call to every shard each second. A program that was stopped for longer than the shard's
``lease_s`` has lost its leases, and notices before it writes: :meth:`MemPool.write` refuses once the last answer is too old.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import trio

from memserve.bus import Link, Received, open_link
from memserve.errors import PeerFull, PeerUnreachable, PoolError
from memserve.kernels.arena import Arena, attach_arena
from memserve.mempool.addresses import Address, Home, Tier, page_of, tier_of, unpack
from memserve.mempool.client import ShardCalls
from memserve.messages import ActorId, Message
from memserve.pool_messages import (
    Acquire,
    Acquired,
    AllocMem,
    Delete,
    DescribePool,
    Evict,
    FreeMem,
    Insert,
    Match,
    PoolDescribed,
    PoolRefused,
    Prefetch,
    SwapIn,
    SwapOut,
)

REPEAT_S = 1.0
"""How long a call waits before it is sent again; a repeat is acted on once."""
RENEW_S = 1.0
"""How often every shard is called, so that leases live."""
OPEN_S = 10.0
"""How long a shard may take to answer the first call."""


@attrs.frozen
class Lease:
    """Pages that are this program's to use. ``addresses[i]`` has the tokens from ``i`` pages on."""

    shard: str
    id: int
    addresses: tuple[Address, ...]
    cached_tokens: int
    """The first of them are filled: read them, never write them."""


@attrs.define(eq=False)
class _Waiter:
    """A call that is under way."""

    arrived: trio.Event = attrs.field(factory=trio.Event)
    answer: Any = None


@attrs.define(eq=False)
class _Held:
    """A lease, and which of its pages may still be written."""

    id: int
    table: list[Address]
    private: set[Address]


@attrs.define(eq=False)
class _Shard:
    """A shard as this program knows it."""

    name: str
    to: ActorId
    valid_until: float
    """Until then our leases live for certain (trio's clock): ``lease_s`` after the last call that was answered."""
    about: PoolDescribed | None = None
    arenas: dict[Tier, Arena] = attrs.field(factory=dict)
    memory: dict[Tier, memoryview] = attrs.field(factory=dict)
    leases: dict[int, _Held] = attrs.field(factory=dict)
    lease_of: dict[Address, _Held] = attrs.field(factory=dict)

    @property
    def known(self) -> PoolDescribed:
        """What it said of itself."""
        assert self.about is not None, f"shard {self.name} is used before it was asked what it is"
        return self.about

    @property
    def home(self) -> Home:
        """What its addresses have in common."""
        return Home(self.known.shard, self.known.incarnation)


class MemPool:
    """See the module's text; :func:`open_pool` makes one. ``scope``: whose prefixes it sees.

    Every call raises PoolError when it is refused, and PeerUnreachable when the shard does not answer. Tokens are packed
    (:func:`memserve.tokens.pack`).
    """

    def __init__(self, link: Link, shards: Mapping[str, str], scope: str) -> None:
        self.scope = scope
        self._link = link
        self._calls: ShardCalls[_Waiter] = ShardCalls()
        self._shards: dict[str, _Shard] = {}
        for name, endpoint in shards.items():
            to = ActorId(f"{name}.pool")
            link.connect(to, endpoint)
            self._shards[name] = _Shard(name, to, trio.current_time() + OPEN_S)

    # ---- memory --------------------------------------------------------------------------------------------

    async def alloc_mem(
        self, size: int, shard: str, tier: Tier = Tier.DEVICE, lease: Lease | None = None
    ) -> Lease:
        """``size`` pages of a tier, all or nothing: under a new lease, or at the end of one.

        Raises PoolError (BAD_COUNT, BAD_TIER, TOO_LARGE, NO_PAGES; with a lease also UNKNOWN_LEASE, MOVING).
        """
        at, number = self._shards[shard], lease.id if lease else 0
        answer = await self._ask(
            at, lambda call: AllocMem(call, number, size, tier, self.scope), grants=not number
        )
        if not number:
            return self._hold(at, answer)
        held = self._held(at, number)
        new = list(at.home.addresses(answer.pages))
        held.table += new
        held.private.update(new)
        at.lease_of.update(dict.fromkeys(new, held))
        return Lease(shard, number, tuple(held.table), lease.cached_tokens if lease else 0)

    async def free_mem(self, pages: Lease | Sequence[Address]) -> int:
        """Give a lease back, or some of its pages that are not in the index; the pages that came free.

        What is in the index stays there. Raises PoolError (UNKNOWN_LEASE, FOREIGN_ADDRESS, STALE_ADDRESS, NOT_HELD,
        RETIRED).
        """
        named: tuple[Address, ...] = () if isinstance(pages, Lease) else tuple(pages)
        if isinstance(pages, Lease):
            at, number = self._shards[pages.shard], pages.id
        else:
            at, held = self._find(named)
            number = held.id
        answer = await self._ask(at, lambda call: FreeMem(number, call, named))
        self._let_go(at, number, set(named) or None)
        freed: int = answer.pages
        return freed

    def write(self, address: Address, data: bytes | memoryview, offset: int = 0) -> None:
        """Put bytes into a page that this program has leased and not yet inserted.

        Raises PoolError (FOREIGN_ADDRESS, STALE_ADDRESS, NOT_HELD, RETIRED, DOES_NOT_FIT, UNREADABLE).
        """
        at, held = self._find((address,))
        if address not in held.private:
            raise PoolError(
                PoolError.RETIRED, f"page {address:#x} is in the index: its bytes are others' too"
            )
        page = self._page(at, address)
        if offset < 0 or offset + len(data) > len(page):
            text = f"{len(data)} bytes at {offset} of a page of {len(page)}"
            raise PoolError(PoolError.DOES_NOT_FIT, text)
        page[offset : offset + len(data)] = data

    def read(self, address: Address) -> memoryview:
        """A page that this program has leased or matched, in place and read-only; valid as long as the lease.

        Raises PoolError (FOREIGN_ADDRESS, STALE_ADDRESS, NOT_HELD, UNREADABLE).
        """
        at, _ = self._find((address,))
        return self._page(at, address).toreadonly()

    # ---- index ---------------------------------------------------------------------------------------------

    async def acquire(self, tokens: bytes, extra_pages: int, shard: str) -> Lease:
        """match and alloc_mem in one: pages for all of ``tokens``, cached ones first, and ``extra_pages`` more.

        Waits while the pool is short of pages. Raises PoolError (TOO_LARGE, NOT_WHOLE_PAGES, BAD_COUNT, QUEUE_FULL).
        """
        at = self._shards[shard]
        return self._hold(
            at, await self._ask(at, lambda call: Acquire(call, self.scope, tokens, extra_pages), grants=True)
        )

    async def match(self, tokens: bytes, shard: str) -> Lease:
        """The longest cached prefix in whole pages, pinned until it is given back. Raises PoolError (QUEUE_FULL)."""
        at = self._shards[shard]
        return self._hold(at, await self._ask(at, lambda call: Match(call, self.scope, tokens), grants=True))

    async def insert(self, tokens: bytes, addresses: Sequence[Address]) -> int:
        """Put a prompt into the index: ``addresses`` hold all of ``tokens``, from the first on, in whole pages.

        They are pages of one lease, or those of a match and then pages of one lease. They cannot be written from now on.
        Answers how many of the tokens were cached already. Raises PoolError (NOT_WHOLE_PAGES, DOES_NOT_FIT,
        TOKENS_CHANGED, FOREIGN_ADDRESS, STALE_ADDRESS, NOT_HELD, UNKNOWN_LEASE, MOVING).
        """
        at, held = self._find(addresses[-1:])
        named = tuple(addresses)
        answer = await self._ask(at, lambda call: Insert(call, held.id, 0, tokens, named))
        held.private.difference_update(addresses)
        own = set(held.table)
        held.table = [*addresses, *(one for one in held.table if one not in set(addresses))]
        at.lease_of.update({one: held for one in addresses if one in own or one not in at.lease_of})
        already: int = answer.already_tokens
        return already

    async def delete(self, tokens: bytes, shard: str) -> int:
        """Drop a prompt and all that continues it, but for what is in use; the pages that came free."""
        return await self._freed(shard, lambda call: Delete(call, self.scope, tokens))

    async def evict(self, n: int, shard: str, tier: Tier = Tier.DEVICE) -> int:
        """Drop up to ``n`` pages that nobody uses, the least recently used; how many. Raises PoolError (BAD_TIER)."""
        return await self._freed(shard, lambda call: Evict(call, n, tier))

    # ---- tiers ---------------------------------------------------------------------------------------------

    async def swap_out(self, n: int, shard: str, tier: Tier = Tier.DEVICE) -> int:
        """Move up to ``n`` pages that nobody uses to the next tier; how many went. Raises PoolError (BAD_TIER)."""
        return await self._freed(shard, lambda call: SwapOut(call, n, tier))

    async def swap_in(self, pages: Lease | Sequence[Address]) -> Lease:
        """Bring the pages of a match into the device tier: the lease with their new addresses.

        Raises PoolError (UNKNOWN_LEASE, NOT_HELD, FOREIGN_ADDRESS, STALE_ADDRESS, MOVING, PINNED).
        """
        at, held = self._find(pages.addresses[:1] if isinstance(pages, Lease) else pages)
        answer = await self._ask(at, lambda call: SwapIn(call, held.id))
        self._let_go(at, held.id, None)
        return self._hold(at, answer)

    def prefetch(self, tokens: bytes, shard: str) -> None:
        """Say that a prefix will be wanted soon. A hint: nothing is promised, and nothing answered."""
        self._send(self._shards[shard], Prefetch(self.scope, tokens))

    # ---- inside --------------------------------------------------------------------------------------------

    async def _freed(self, shard: str, make: Callable[[int], Message]) -> int:
        answer = await self._ask(self._shards[shard], make)
        freed: int = answer.pages
        return freed

    async def _ask(self, at: _Shard, make: Callable[[int], Message], *, grants: bool = False) -> Any:
        """Call, again and again until it is answered. ``grants``: an answer that nobody takes is a lease to give back."""
        waiter = _Waiter()
        message = self._calls.ask(waiter, make, grants=grants)
        sent_at = trio.current_time()
        try:
            while not waiter.arrived.is_set():
                if trio.current_time() >= max(at.valid_until, sent_at + REPEAT_S):
                    raise PeerUnreachable(at.name)
                self._send(at, message)
                with trio.move_on_after(REPEAT_S):
                    await waiter.arrived.wait()
        finally:
            for withdrawal in self._calls.forget(waiter):
                self._send(at, withdrawal)
        if isinstance(waiter.answer, PoolRefused):
            raise PoolError(waiter.answer.code, waiter.answer.message)
        if at.about is not None:
            self._renewed(at, sent_at)
        return waiter.answer

    def _send(self, at: _Shard, message: Message) -> None:
        try:
            self._link.send(at.to, message)
        except PeerFull:
            pass  # it is sent again

    def _renewed(self, at: _Shard, sent_at: float) -> None:
        """A call sent then was answered. After a longer silence than the shard bears, our leases have ended."""
        if sent_at >= at.valid_until:
            at.leases.clear()
            at.lease_of.clear()
        at.valid_until = max(at.valid_until, sent_at + at.known.lease_s)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Receive answers and keep the leases alive. :func:`open_pool` starts it."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._receive)
            for shard in self._shards.values():
                await self._introduce(shard)
                nursery.start_soon(self._renew, shard)
            task_status.started()

    async def _introduce(self, at: _Shard) -> None:
        at.about = about = await self._ask(at, DescribePool)
        self._renewed(at, trio.current_time())
        for tier, path in zip(Tier, about.arenas, strict=True):
            arena = await trio.to_thread.run_sync(_attach, path, about.page_bytes)
            if arena is not None:
                at.arenas[tier], at.memory[tier] = arena, arena.memory

    async def _renew(self, at: _Shard) -> None:
        while True:
            await trio.sleep(min(RENEW_S, at.known.lease_s / 3))
            try:
                await self._ask(at, DescribePool)
            except PeerUnreachable:
                pass  # whoever uses the shard is told; it may come back

    async def _receive(self) -> None:
        while True:
            for received in await self._link.receive():
                self._hear(received)

    def _hear(self, received: Received) -> None:
        answer: Any = received.message
        waiter = self._calls.answered(getattr(answer, "call", 0))
        if waiter is not None:
            waiter.answer = answer
            waiter.arrived.set()
        elif isinstance(answer, Acquired) and not any(
            answer.lease in at.leases for at in self._shards.values()
        ):
            self._link.send(received.sender, FreeMem(answer.lease))

    def _hold(self, at: _Shard, answer: Acquired) -> Lease:
        table = at.home.addresses(answer.pages)
        cached = answer.cached_tokens // at.known.page_tokens
        held = at.leases[answer.lease] = _Held(answer.lease, list(table), set(table[cached:]))
        at.lease_of.update(dict.fromkeys(table, held))
        return Lease(at.name, answer.lease, table, answer.cached_tokens)

    def _let_go(self, at: _Shard, number: int, gone: set[Address] | None) -> None:
        """Forget a lease, or these of its pages."""
        held = at.leases.get(number)
        if held is None:
            return
        gone = set(held.table) if gone is None else gone
        held.table = [one for one in held.table if one not in gone]
        held.private -= gone
        for one in gone:
            if at.lease_of.get(one) is held:
                del at.lease_of[one]
        if not held.table:
            del at.leases[number]

    def _held(self, at: _Shard, number: int) -> _Held:
        held = at.leases.get(number)
        if held is None:
            raise PoolError(PoolError.UNKNOWN_LEASE, f"lease {number} on {at.name} has ended")
        return held

    def _find(self, addresses: Sequence[Address]) -> tuple[_Shard, _Held]:
        """Shard and lease of addresses; of the first one, where they are several's."""
        if not addresses:
            raise PoolError(PoolError.NOT_HELD, "no address given")
        number = unpack(addresses[0]).shard
        at = next((one for one in self._shards.values() if one.known.shard == number), None)
        if at is None:
            raise PoolError(
                PoolError.FOREIGN_ADDRESS, f"{addresses[0]:#x} is of shard {number}, which is not in use here"
            )
        at.home.slots(addresses)
        held = at.lease_of.get(addresses[0]) if trio.current_time() < at.valid_until else None
        if held is None:
            raise PoolError(
                PoolError.NOT_HELD, f"{addresses[0]:#x} is not, or no longer, leased by this program"
            )
        return at, held

    def _page(self, at: _Shard, address: Address) -> memoryview:
        (slot,) = at.home.slots((address,))
        memory = at.memory.get(Tier(tier_of(slot)))
        if memory is None:
            raise PoolError(PoolError.UNREADABLE, f"{address:#x} is not in memory of this host")
        size = at.known.page_bytes
        return memory[page_of(slot) * size : (page_of(slot) + 1) * size]

    def close(self) -> None:
        """Give all leases back and let go of the memory."""
        for at in self._shards.values():
            for lease in at.leases:
                self._send(at, FreeMem(lease))
            at.memory.clear()
            for arena in at.arenas.values():
                arena.close()


def _attach(path: str, page_bytes: int) -> Arena | None:
    """The arena at ``path``, or None where there is none: the shard is on another host."""
    return attach_arena(Path(path), page_bytes) if path and os.path.exists(path) else None


@asynccontextmanager
async def open_pool(
    name: str, folder: Path, shards: Mapping[str, str], scope: str = ""
) -> AsyncIterator[MemPool]:
    """A pool over shards, given by name and endpoint, for a ``with`` block; its leases end with it.

    ``folder``: for this program's own socket, with mode 0700. Raises PeerUnreachable when a shard does not answer.
    """
    actor = ActorId(f"{name}.{secrets.token_hex(4)}")
    async with open_link(actor, f"ipc://{folder / actor}.sock") as link, trio.open_nursery() as nursery:
        pool = MemPool(link, shards, scope)
        try:
            await nursery.start(pool.run)
            yield pool
        finally:
            pool.close()
        nursery.cancel_scope.cancel()
