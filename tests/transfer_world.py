"""Shards that send each other pages in virtual time, over a network that loses, repeats and delays messages.

It also cuts connections. The cores are the real ones. Pools, arenas, movers and processes are models that
know more than a shard does: each write to a page is checked against the transfer that holds the page at that
moment.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable

import attrs

from memserve.actions import Kill
from memserve.messages import Gone
from memserve.transfer.actions import (
    Expect,
    Feed,
    Forget,
    Order,
    Post,
    Ready,
    Received,
    ReceiveFailed,
    Report,
    StopReceiving,
    StopWriting,
    Write,
    WriteFailed,
    Wrote,
)
from memserve.transfer.incoming import Incoming, ReceiveRefused
from memserve.transfer.outgoing import Outgoing
from memserve.transfer.values import Geometry, Piece, TransferDone
from memserve.transfer_messages import (
    Failure,
    Granularity,
    Purpose,
    TransferArrived,
    TransferGranted,
    TransferRefused,
    TransferStop,
    Way,
)

GEOMETRY = Geometry(page_bytes=4, layers=2)
TO_SENDER = (TransferGranted, TransferArrived, TransferRefused, TransferStop)


@attrs.define
class Faults:
    """Faults. Probabilities are per message, per piece (``cut``) or per commit (``refuse_commit``)."""

    lose: float = 0.0
    repeat: float = 0.0
    cut: float = 0.0
    delay_s: float = 0.01
    refuse_commit: float = 0.0


@attrs.define(eq=False)
class Pool:
    """A receiving pool that accounts for all its pages and checks the contents of every commit."""

    shard: Shard
    free: list[int]
    held: dict = attrs.field(factory=dict)
    committed: dict = attrs.field(factory=dict)

    def grant(self, key, offer):
        """See ReceivingPool."""
        if len(self.free) < offer.pages:
            raise ReceiveRefused(Failure.RECEIVER_FULL, f"{len(self.free)} pages are free")
        assert key not in self.held and key not in self.committed, f"{key} was granted twice"
        self.held[key] = tuple(self.free.pop() for _ in range(offer.pages))
        return self.held[key]

    def commit(self, key, offer, pages):
        """See ReceivingPool. Pages that become visible must be complete and correct."""
        world = self.shard.world
        if world.chance(world.faults.refuse_commit):
            raise ReceiveRefused(Failure.REFUSED, "the tokens do not fit")
        for i, page in enumerate(pages):
            wanted = dict.fromkeys(range(GEOMETRY.layers), (key, i))
            assert self.shard.arena.get(page) == wanted, f"{key}: page {i} is visible, but not complete"
        self.committed[key] = self.held.pop(key)
        return 0

    def release(self, key, offer, pages):
        """See ReceivingPool."""
        assert self.held.pop(key) == pages
        self.free += pages

    def forget(self):
        """Free all committed pages, as if the index evicted them."""
        for key in list(self.committed):
            self.free += self.committed[key]
            self.committed[key] = ()


@attrs.define(eq=False)
class Stream:
    """The bytes of one transfer on their way."""

    write: Write
    waiting: list[Piece]
    missing: int
    stopped: bool = False
    ended: bool = False


@attrs.define(eq=False)
class Shard:
    """One shard's process."""

    world: World
    id: str
    pid: int
    paths: tuple[str, ...]
    total: int
    arena: dict = attrs.field(factory=dict)
    """Contents: for each page, and each part of it, the transfer and position that wrote it."""
    alive: bool = True
    paused_until: float = 0.0
    was_paused: bool = False
    streams: dict[int, Stream] = attrs.field(factory=dict)
    expected: dict = attrs.field(factory=dict)
    reports: dict = attrs.field(factory=dict)
    orders: dict = attrs.field(factory=dict)
    pool: Pool = attrs.field(init=False)
    outgoing: Outgoing = attrs.field(init=False)
    incoming: Incoming = attrs.field(init=False)

    def __attrs_post_init__(self):
        ways = tuple(Way(path, self.id) for path in self.paths)
        self.pool = Pool(self, list(range(self.total)))
        self.outgoing = Outgoing(self.id, GEOMETRY, "host", self.pid, self.paths)
        self.incoming = Incoming(GEOMETRY, "host", self.pool, ways)

    # ---- turns -----------------------------------------------------------------------------------------------

    def tell(self, sender, message):
        """Give a message to the core it concerns, and take the turn that follows."""
        world = self.world
        if not self.alive:
            return
        if world.now < self.paused_until:
            world.at(self.paused_until - world.now, lambda: self.tell(sender, message))
            return
        for core in self._cores(message):
            core.receive(sender, message, world.now)
            # Delivering a message twice must not change anything.
            if world.chance(world.faults.repeat) and not isinstance(message, Gone):
                core.receive(sender, message, world.now)
        self.turn()

    def _cores(self, message):
        if isinstance(message, Gone):
            return [self.outgoing, self.incoming]
        ours = (Order, Ready, Wrote, WriteFailed)
        return [self.outgoing if isinstance(message, (*TO_SENDER, *ours)) else self.incoming]

    def turn(self):
        """Advance both cores and perform their actions."""
        world = self.world
        if not self.alive or world.now < self.paused_until:
            return
        for core in (self.outgoing, self.incoming):
            core.advance(world.now)
            for action in core.take():
                self.perform(action)
            core.check()
        self.check()
        due = min(self.outgoing.deadline, self.incoming.deadline)
        if due < float("inf"):
            world.at(max(due - world.now, 0.0), self.turn)

    def check(self):
        """Check that every page is free, held or committed, exactly once."""
        held = [page for pages in self.pool.held.values() for page in pages]
        committed = [page for pages in self.pool.committed.values() for page in pages]
        assert sorted(self.pool.free + held + committed) == list(range(self.total))

    def perform(self, action):
        """Perform one action of a core."""
        match action:
            case Post(to, message):
                self.world.post(self.id, to, message)
            case Report(result):
                self._reported(result)
            case Write():
                self._write(action)
            case Feed(number, pieces):
                stream = self.streams.get(number)
                if stream:
                    stream.waiting += pieces
            case StopWriting(number):
                if number in self.streams:
                    self.streams[number].stopped = True
            case Forget(way):
                assert way.address in self.world.shards
            case Expect():
                self.expected[action.sender, action.id] = action
            case StopReceiving(sender, number):
                failed = ReceiveFailed(sender, number, Failure.WITHDRAWN, "stopped")
                if self.expected.pop((sender, number), None):
                    self.world.at(0.0, lambda: self.tell(self.id, failed))
            case Kill(actor, pid):
                victim = self.world.shards.get(actor)
                assert victim is None or victim.pid == pid
                self.world.kill(actor)

    def _reported(self, result):
        assert result.id not in self.reports, f"{result} after {self.reports[result.id]}"
        self.reports[result.id] = result
        order = self.orders[result.id]
        if not self.was_paused:
            assert self.world.now <= order.deadline + 1e-6, f"{result} came after its deadline"
        receiver = self.world.shards[order.to]
        if isinstance(result, TransferDone):
            assert (self.id, result.id) in receiver.pool.committed

    # ---- moving bytes ----------------------------------------------------------------------------------------

    def _write(self, write):
        pages, parts = len(write.transfer.source), GEOMETRY.layers
        whole = [Piece(i, 1, part) for i in range(pages) for part in range(parts)]
        stream = Stream(write, [] if write.fed else whole, pages * parts)
        self.streams[write.transfer.id] = stream
        self._step_later(stream)

    def _step_later(self, stream):
        self.world.at(self.world.delay(), lambda: self._step(stream))

    def _step(self, stream):
        """Move one piece, or end the stream if it was stopped, is cut, or has moved everything."""
        world = self.world
        if not self.alive:
            return
        if world.now < self.paused_until:
            world.at(self.paused_until - world.now, lambda: self._step(stream))
            return
        number = stream.write.transfer.id
        receiver = world.shards[stream.write.way.address]
        if stream.stopped:
            self._ended(stream, WriteFailed(number, Failure.WITHDRAWN, "stopped"))
        elif stream.write.way.path == "tcp" and self._is_cut(stream, receiver):
            self._ended(stream, WriteFailed(number, Failure.CUT, "cut"))
        elif stream.waiting:
            self._land(stream, receiver, stream.waiting.pop(0))
            if stream.missing:
                self._step_later(stream)
            else:
                self._all_landed(stream, receiver)
        else:
            self._step_later(stream)

    def _is_cut(self, stream, receiver):
        """Whether the connection is gone; the receiver notices as well, but later."""
        key = (self.id, stream.write.transfer.id)
        if not receiver.alive or key not in receiver.expected:
            return True
        if self.world.chance(self.world.faults.cut):
            failed = ReceiveFailed(*key, Failure.CUT, "cut")

            def notice():
                if receiver.expected.pop(key, None):
                    receiver.tell(receiver.id, failed)

            self.world.at(self.world.delay(), notice)
            return True
        return False

    def _land(self, stream, receiver, piece):
        """Store bytes into a page, and check that the page belongs to this transfer at this moment."""
        transfer = stream.write.transfer
        key = (self.id, transfer.id)
        page = transfer.destination[piece.first]
        if receiver.alive:  # the arena of a dead process is gone with it
            assert page in receiver.pool.held.get(key, ()), (
                f"{key} writes to page {page}, which is not its own"
            )
        receiver.arena.setdefault(page, {})[piece.part] = (key, piece.first)
        stream.missing -= 1

    def _all_landed(self, stream, receiver):
        number = stream.write.transfer.id
        if stream.write.way.path == "tcp":
            granted = receiver.expected.pop((self.id, number))
            receiver.tell(receiver.id, Received(granted.sender, granted.id))
        self._ended(stream, Wrote(number, 0))

    def _ended(self, stream, outcome):
        stream.ended = True
        self.streams.pop(stream.write.transfer.id)
        self.world.at(0.0, lambda: self.tell(self.id, outcome))


@attrs.define(eq=False)
class World:
    """The clock, the network and every shard."""

    faults: Faults
    seed: int
    now: float = 0.0
    shards: dict[str, Shard] = attrs.field(factory=dict)
    _chance: random.Random = attrs.field(init=False)
    _events: list = attrs.field(factory=list)
    _order: itertools.count = attrs.field(factory=itertools.count)
    _pids: itertools.count = attrs.field(factory=lambda: itertools.count(100))
    _ids: itertools.count = attrs.field(factory=lambda: itertools.count(1))

    def __attrs_post_init__(self):
        self._chance = random.Random(self.seed)

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self._chance.random() < probability

    def delay(self) -> float:
        """A random delay in seconds, up to ``delay_s``; two in a hundred are a hundred times as long."""
        return self._chance.random() * self.faults.delay_s * (100 if self.chance(0.02) else 1)

    def at(self, after: float, happen: Callable[[], None]) -> None:
        """Schedule ``happen`` for ``after`` seconds from now."""
        heapq.heappush(self._events, (self.now + after, next(self._order), happen))

    def run(self, until: float) -> None:
        """Let time pass until ``until``."""
        while self._events and self._events[0][0] <= until:
            self.now, _, happen = heapq.heappop(self._events)
            happen()
        self.now = until

    # ---- shards ----------------------------------------------------------------------------------------------

    def shard(self, name: str, pages: int = 12, paths: tuple[str, ...] = ("mapped", "tcp")) -> Shard:
        """Start a shard's process."""
        pid = next(self._pids)
        shard = self.shards[f"{name}.{pid}"] = Shard(self, f"{name}.{pid}", pid, paths, pages)
        return shard

    def kill(self, actor: str) -> None:
        """Kill a process as SIGKILL does. All others hear of it, sooner or later."""
        if self.shards[actor].alive:
            self.shards[actor].alive = False
            self.announce(actor)

    def announce(self, actor: str) -> None:
        """Tell all other shards that an actor is gone, true or not."""
        for other in list(self.shards.values()):
            if other.id != actor:
                self.at(
                    min(self.delay() * 10, 20.0), lambda other=other: other.tell("scheduler", Gone((actor,)))
                )

    def pause(self, actor: str, seconds: float) -> None:
        """Pause a process as SIGSTOP does; it continues after ``seconds``."""
        shard = self.shards[actor]
        shard.was_paused = True
        shard.paused_until = self.now + seconds
        self.at(seconds, shard.turn)

    def post(self, sender: str, to: str, message: object) -> None:
        """Send a message over the bus, which may deliver it late, twice or not at all."""
        times = 0 if self.chance(self.faults.lose) else 1 + self.chance(self.faults.repeat)
        for _ in range(times):
            self.at(self.delay(), lambda: self.shards[to].tell(sender, message))

    def send(self, sender: Shard, to: Shard, pages: int, seconds: float, fed: bool = False) -> int:
        """Start a transfer; its id. Does nothing if the sender is dead or paused."""
        number = next(self._ids)
        if not sender.alive or self.now < sender.paused_until:
            return number
        granularity = Granularity.BY_LAYER if fed else Granularity.AGGREGATED
        order = Order(
            to.id,
            number,
            tuple(range(pages)),
            self.now + seconds,
            granularity,
            fed,
            purpose=Purpose(private=b"mine"),
        )
        sender.orders[number] = order
        sender.tell(sender.id, order)
        if fed:
            for part in range(GEOMETRY.layers):
                ready = Ready(number, tuple(Piece(i, 1, part) for i in range(pages)))
                self.at(self.delay() * 5, lambda ready=ready: sender.tell(sender.id, ready))
        return number

    def settled(self) -> None:
        """Check a quiet world: nothing is under way, nothing has leaked, everything was reported."""
        for shard in self.shards.values():
            if shard.alive:
                assert shard.reports.keys() == shard.orders.keys()
                assert not shard.pool.held, f"{shard.pool.held} leaked at {shard.id}"
                assert not len(shard.incoming) and not len(shard.outgoing)
                assert not shard.streams and not shard.expected
                shard.check()
