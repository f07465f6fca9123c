"""A program's conversation with shards: repeats calls until answered, keeps leases alive, maps memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import trio

from memserve.bus import Link, Received
from memserve.client.leases import HeldLease, Shard
from memserve.errors import PeerFull, PeerUnreachable, PoolError
from memserve.identity import ActorId
from memserve.mempool.addresses import Address, unpack
from memserve.mempool.shard_calls import ShardCalls
from memserve.messages import Message
from memserve.pool_messages import Acquired, Arrival, DescribePool, FreeMem, PoolRefused

REPEAT_S = 1.0
"""How long a call waits for its answer before it is sent again; the shard acts on it only once."""
RENEW_S = 1.0
"""How often every shard is called, so that leases stay alive."""
OPEN_S = 10.0
"""How long a shard may take to answer the first call."""


@attrs.define(eq=False)
class Waiter:
    """A call that is not answered yet."""

    arrived: trio.Event = attrs.field(factory=trio.Event)
    answer: Any = None


class ShardConversation:
    """A program's conversation with its shards, by name. ``scope``: the scope whose prefixes it sees."""

    def __init__(self, link: Link, shards: Mapping[str, str], scope: str) -> None:
        self.scope = scope
        self._link = link
        self._calls: ShardCalls[Waiter] = ShardCalls()
        self._shards: dict[str, Shard] = {}
        for name, endpoint in shards.items():
            to = ActorId(f"{name}.pool")
            link.connect(to, endpoint)
            self._shards[name] = Shard(name, to, endpoint, trio.current_time() + OPEN_S)

    async def _ask(
        self,
        at: Shard,
        make: Callable[[int], Message],
        *,
        grants: bool = False,
        waiter: Waiter | None = None,
    ) -> Any:
        """Send a call again and again until it is answered.

        ``grants``: the answer is a lease, which must be given back if the caller no longer waits for it.
        ``waiter``: given by a caller for whom a cancelled call must be over; has ``arrived`` when it is.
        Raises PoolError when the shard refuses, PeerUnreachable when it stays silent.
        """
        until_over, waiter = waiter is not None, waiter or Waiter()
        message = self._calls.ask(waiter, make, grants=grants)
        sent_at = trio.current_time()
        try:
            while not waiter.arrived.is_set():
                if trio.current_time() >= max(at.valid_until, sent_at + REPEAT_S):
                    raise PeerUnreachable(at.name)
                self._send(at, message)
                with trio.move_on_after(REPEAT_S):
                    await waiter.arrived.wait()
        except trio.Cancelled:
            if until_over:
                await self._withdraw(at, waiter)
            raise
        finally:
            for withdrawal in self._calls.forget(waiter):
                self._send(at, withdrawal)
        if isinstance(waiter.answer, PoolRefused):
            raise PoolError(waiter.answer.code, waiter.answer.message)
        if at.about is not None:
            for lease in at.renewed(sent_at, trio.current_time()):
                self._send(at, FreeMem(lease))
        return waiter.answer

    async def _withdraw(self, at: Shard, waiter: Waiter) -> None:
        """Withdraw a call, and wait a little for the answer to it or to its withdrawal."""
        for call in self._calls.of(waiter):
            self._send(at, FreeMem(lease=0, call=call))
            with trio.move_on_after(REPEAT_S, shield=True):
                await waiter.arrived.wait()

    def _send(self, at: Shard, message: Message) -> None:
        try:
            self._link.send(at.to, message)
        except PeerFull:
            pass  # calls are sent again

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Receive answers and keep leases alive. :func:`open_pool` starts it."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._receive)
            for shard in self._shards.values():
                await self._introduce(shard)
                nursery.start_soon(self._renew, shard)
            task_status.started()

    async def _introduce(self, at: Shard) -> None:
        at.about = await self._ask(at, DescribePool)
        # OPEN_S, the time for the first answer, may be longer than leases live: their life counts from here.
        at.valid_until = trio.current_time() + at.known.lease_s
        await trio.to_thread.run_sync(at.map)

    async def _renew(self, at: Shard) -> None:
        while True:
            await trio.sleep(min(RENEW_S, at.known.lease_s / 3))
            try:
                await self._ask(at, DescribePool)
            except PeerUnreachable:
                pass  # the program's own calls raise it too; the shard may come back

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
        elif isinstance(answer, Acquired | Arrival) and not any(
            answer.lease in at.leases for at in self._shards.values()
        ):
            self._link.send(received.sender, FreeMem(answer.lease))

    def _find(self, addresses: Sequence[Address]) -> tuple[Shard, HeldLease]:
        """Shard and lease of addresses; if they belong to several leases, that of the first address."""
        if not addresses:
            raise PoolError(PoolError.NOT_HELD, "no address given")
        number = unpack(addresses[0]).shard
        at = next((one for one in self._shards.values() if one.known.shard == number), None)
        if at is None:
            raise PoolError(
                PoolError.FOREIGN_ADDRESS, f"{addresses[0]:#x} is of shard {number}, which is not in use here"
            )
        at.home.slots(addresses)
        return at, at.holder(addresses[0], trio.current_time())

    def close(self) -> None:
        """Give all leases back and unmap the memory."""
        for at in self._shards.values():
            for lease in at.leases:
                self._send(at, FreeMem(lease))
            at.unmap()
