"""Movers between simulated shards: each shard sends, and receives, one transfer after another.

What a death or a pause in the middle does depends on who stores into the receiver's pages
(docs/transfers.md). On ``mapped`` and ``cuda`` it is the sender's process, so a paused sender continues when
it wakes. On ``tcp`` it is the receiver's process. On ``nixl`` it is the sender's network card, which
continues without its process. A transfer that breaks off leaves half of the pages spoiled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import attrs

from memserve.identity import ActorId
from memserve.mempool.shard import ShardCore
from memserve.messages import Gone
from memserve.scheduling.cost_model import LINKS, LinkModel
from memserve.sim.pages import Arenas
from memserve.sim.world import Actor, Violation, World
from memserve.transfer.actions import (
    Expect,
    Probe,
    Received,
    ReceiveFailed,
    StopReceiving,
    StopWriting,
    Write,
    WriteFailed,
    Wrote,
)
from memserve.transfer.incoming import Key
from memserve.transfer.values import ON_ONE_HOST
from memserve.transfer_messages import Failure


@attrs.define(eq=False)
class Writing:
    """One transfer whose bytes are on their way."""

    sender: Actor
    order: Write
    ended: bool = False

    @property
    def key(self) -> Key:
        """The transfer's key at the receiver."""
        return self.sender.id, self.order.transfer.id

    @property
    def to(self) -> ActorId:
        """The receiving shard."""
        return ActorId(self.order.way.address)

    @property
    def path(self) -> str:
        """``mapped``, ``cuda``, ``tcp`` or ``nixl``."""
        return self.order.way.path


@attrs.define(eq=False)
class Movers:
    """The movers of all shards. :meth:`perform` takes what a shard's transfer cores order."""

    world: World
    arenas: Arenas
    page_bytes: int
    """KV bytes of a page, for counting what was moved."""
    timed_bytes: int
    """KV bytes of a page of the model whose costs the run uses: they decide how long a transfer takes."""
    links: Mapping[str, LinkModel] = attrs.field(factory=lambda: LINKS)
    core_of: Callable[[str], object] = lambda name: None
    """Finds an actor's core by the actor's name."""
    breaks: Callable[[], bool] = lambda: False
    """Whether a transfer breaks off in the middle."""
    moved_bytes: int = 0
    """KV bytes of completed transfers."""
    _writing: dict[Key, Writing] = attrs.field(factory=dict)
    _expected: dict[tuple[ActorId, Key], None] = attrs.field(factory=dict)
    """The tcp transfers that each receiver lets in."""
    _free_at: dict[tuple[ActorId, str], float] = attrs.field(factory=dict)
    """When a shard's outgoing or incoming link (``out``, ``in``) is free again."""

    def perform(self, shard: Actor, order: object) -> None:
        """Carry out what a shard's core orders of its movers."""
        match order:
            case Write():
                self._begin(Writing(shard, order))
            case StopWriting(number):
                one = self._writing.get((shard.id, number))
                if one is not None and not one.ended:
                    self._break(one, Failure.WITHDRAWN)
            case Expect(sender, number, pages):
                self._expected[shard.id, (sender, number)] = None
                self.arenas.claim(shard.id, pages, (sender, number))
            case StopReceiving(sender, number):
                self._refuse(shard, (sender, number), Failure.WITHDRAWN)
            case Probe(sender) if self.world.find(sender) is None:
                self._later(shard, Gone((sender,)))

    def drop(self, actor: Actor) -> None:
        """An actor is dead: what its process was writing breaks off; what its network card sends does not."""
        for one in list(self._writing.values()):
            if one.sender is actor and one.path != "nixl":
                self._break(one, Failure.CUT, killed=True)
        for receiver, key in list(self._expected):
            if receiver == actor.id:
                del self._expected[receiver, key]

    # ---- on the way --------------------------------------------------------------------------------------------

    def _begin(self, one: Writing) -> None:
        transfer, link, now = one.order.transfer, self.links[one.path], self.world.now
        ways = (one.sender.id, "out"), (one.to, "in")
        begin = max(now, *(self._free_at.get(way, 0.0) for way in ways))
        through = begin + link.byte_s * len(transfer.source) * self.timed_bytes
        self._free_at.update(dict.fromkeys(ways, through))
        self._writing[one.key] = one
        if one.path != "tcp":  # over tcp the receiver writes, and claims the pages at Expect
            self.arenas.claim(one.to, transfer.destination, one.key)
        self.world.at(through + link.fixed_s, self._arrive, one)

    def _arrive(self, one: Writing) -> None:
        """The bytes land now, unless a process that writes is paused, or the transfer breaks off."""
        receiver = self.world.find(one.to)
        writers = {"tcp": (one.sender, receiver), "nixl": ()}
        for actor in writers.get(one.path, (one.sender,)):
            if actor is not None and actor.paused:
                actor.held.append(partial(self._arrive, one))
                return
        if one.ended:
            return
        if one.path not in ON_ONE_HOST and (receiver is None or self._is_cut(one) or self._uninvited(one)):
            self._break(one, Failure.PEER_GONE if receiver is None else Failure.CUT)
        elif self.breaks():
            self._break(one, Failure.CUT)
        else:
            self._land(one)

    def _is_cut(self, one: Writing) -> bool:
        cut = self.world.network.cut
        return (one.sender.name in cut) != (one.to.rpartition(".")[0] in cut)

    def _uninvited(self, one: Writing) -> bool:
        return one.path == "tcp" and (one.to, one.key) not in self._expected

    # ---- ends --------------------------------------------------------------------------------------------------

    def _land(self, one: Writing) -> None:
        transfer, size = one.order.transfer, len(one.order.transfer.source) * self.page_bytes
        self._check_written_pages(one)
        self.arenas.copy(one.sender.id, transfer.source, one.to, transfer.destination)
        self.moved_bytes += size
        self._end(one)
        receiver = self.world.find(one.to)
        if one.path == "tcp" and receiver is not None:
            self._close(receiver, one.key)
            self.world.tell(receiver, Received(*one.key))
        self.world.tell(one.sender, Wrote(transfer.id, size))

    def _break(self, one: Writing, why: Failure, killed: bool = False) -> None:
        """Break a transfer off: half of the pages are written in part, the others not at all."""
        pages = one.order.transfer.destination
        if self.world.find(one.to) is not None and not self._uninvited(one):
            # A killed sender's pages may just have been released: they are granted again after the kill.
            if not killed:
                self._check_written_pages(one)
            self.arenas.spoil(one.to, pages[: len(pages) // 2 + 1])
        self._end(one)
        receiver = self.world.find(one.to)
        if receiver is not None and (one.to, one.key) in self._expected:
            self._refuse(receiver, one.key, why)
        self._later(one.sender, WriteFailed(one.order.transfer.id, why, "broken off"))

    def _end(self, one: Writing) -> None:
        one.ended = True
        del self._writing[one.key]
        if one.path != "tcp":
            self.arenas.let_go(one.key)

    def _refuse(self, receiver: Actor, key: Key, why: Failure) -> None:
        self._close(receiver, key)
        self._later(receiver, ReceiveFailed(*key, why, "no more is read"))

    def _close(self, receiver: Actor, key: Key) -> None:
        self._expected.pop((receiver.id, key), None)
        self.arenas.let_go(key)

    def _later(self, actor: Actor, message: object) -> None:
        """Tell an actor in an event of its own, not within an order: a core's turn is never re-entered."""
        self.world.after(0.0, self.world.tell, actor, message)

    def _check_written_pages(self, one: Writing) -> None:
        """Check that the pages written to are the transfer's own, as long as their shard lives.

        Raises Violation.
        """
        receiver = self.world.find(one.to)
        core = self.core_of(receiver.name) if receiver is not None else None
        if isinstance(core, ShardCore):
            held = core.exchange.incoming._receiving.get(one.key)
            if held is None or held.pages != one.order.transfer.destination:
                raise Violation(f"{one.key} is written to pages of {one.to} that no transfer holds")
