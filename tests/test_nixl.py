"""The mover over NIXL with a played agent: whom it attaches, and when it lets go. (With real agents: test_movers.py.)"""

from __future__ import annotations

import threading
from types import SimpleNamespace

import attrs
import pytest
import trio

from memserve.transfer.mover import Memory, PieceFeed
from memserve.transfer.nixl import NixlMover
from memserve.transfer.values import Geometry, PageTransfer, TransferDone
from memserve.transfer_messages import Failure, Way

GEOMETRY = Geometry(page_bytes=8, layers=2)
WAY = Way("nixl", "1000", b"metadata of b.1")


@attrs.define(eq=False)
class PlayedAgent:
    """What the mover uses of a nixl_agent. Its writes are in progress until ``state`` is DONE."""

    attached: list[str] = attrs.field(factory=list)
    calls: list[str] = attrs.field(factory=list)
    writing: int = 0
    state: str = "DONE"
    adding: threading.Event = attrs.field(factory=threading.Event)
    may_add: threading.Event = attrs.field(factory=threading.Event)
    error: Exception | None = None

    def add_remote_agent(self, metadata: bytes) -> bytes:
        self.adding.set()
        assert self.may_add.wait(5)
        if self.error:
            raise self.error
        self.calls.append("add")
        self.attached.append(metadata.decode())
        return metadata

    def remove_remote_agent(self, name: str) -> None:
        assert not self.writing, "a write to it is under way"
        self.attached.remove(name)

    def get_xfer_descs(self, descriptors: list[object], mem_type: str) -> list[object]:
        return descriptors

    def initialize_xfer(self, kind: str, here: object, there: object, name: str) -> str:
        assert name in self.attached
        self.writing += 1
        return name

    def transfer(self, handle: str) -> None:
        """Begin the write."""

    def check_xfer_state(self, handle: str) -> str:
        return self.state

    def release_xfer_handle(self, handle: str) -> None:
        self.writing -= 1


@attrs.define(eq=False)
class Played:
    """A mover with such an agent."""

    agent: PlayedAgent = attrs.field(factory=PlayedAgent)
    mover: NixlMover = attrs.field(init=False)
    results: list[object] = attrs.field(factory=list)

    def __attrs_post_init__(self) -> None:
        self.agent.may_add.set()
        memory = Memory(memoryview(bytearray(4 * GEOMETRY.page_bytes)), GEOMETRY)
        held = SimpleNamespace(memory=memory, address=0, _agent=self.agent, close=lambda: None)
        self.mover = NixlMover(held)

    async def send(self, deadline_s: float = 5.0) -> None:
        transfer = PageTransfer(1, "a.1", (0,), (1,))
        feed = PieceFeed.whole(transfer, GEOMETRY)
        self.results.append(await self.mover.send(transfer, WAY, feed, deadline_s))


@pytest.mark.parametrize("cancelled", [False, True])
async def test_a_receiver_that_is_forgotten_while_it_is_attached_does_not_stay_attached(cancelled):
    """If it did, each shard that dies at such a moment would stay attached until this one ends."""
    played = Played()
    played.agent.may_add.clear()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(played.send)
        assert await trio.to_thread.run_sync(played.agent.adding.wait, 5)
        if cancelled:
            nursery.cancel_scope.cancel()
        played.mover.forget(WAY)
        played.agent.may_add.set()
    assert played.agent.calls == ["add"]
    assert played.agent.attached == []


async def test_two_transfers_attach_a_receiver_once_and_it_is_let_go_after_the_last_write():
    """An agent that is removed under a write would leave the write to memory that is no longer known."""
    played = Played()
    played.agent.state = "PROC"
    async with trio.open_nursery() as nursery:
        for _ in range(2):
            nursery.start_soon(played.send)
        while played.agent.writing < 2:
            await trio.sleep(0.001)
        played.mover.forget(WAY)
        assert played.agent.attached == ["metadata of b.1"]
        played.agent.state = "DONE"
    assert [type(one) for one in played.results] == [TransferDone] * 2
    assert (played.agent.calls, played.agent.attached) == (["add"], [])


async def test_a_receiver_is_attached_again_after_it_was_forgotten_or_not_taken():
    """What an agent refused once, for lack of memory for example, it may take later."""
    played = Played()
    played.agent.error = RuntimeError("NIXL_ERR_BACKEND")
    await played.send()
    assert played.results.pop().failure is Failure.PEER_GONE
    played.agent.error = None
    for _ in range(2):
        await played.send()
        assert isinstance(played.results.pop(), TransferDone)
        played.mover.forget(WAY)
    assert (played.agent.calls, played.agent.attached) == (["add"] * 2, [])
    await played.send()
    played.mover.close()
    assert played.agent.attached == []
