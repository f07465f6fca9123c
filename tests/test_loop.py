"""The shell that all actors share: deadlines are met, and several messages of one turn share its end."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest
import trio
from trio.testing import MockClock

from memory_bus import MemoryBus
from memserve.actions import Died, Send
from memserve.actors.loop import Shell
from memserve.bus import Received, open_link
from memserve.drawing import Sampling
from memserve.errors import PeerUnreachable
from memserve.identity import ActorId
from memserve.messages import Gone, Inquired, Load, Member, Request, Submit
from memserve.processes.actor import raise_descriptor_limit
from memserve.scheduling.policies import RoundRobin
from memserve.scheduling.scheduler import SchedulerCore

NEVER = float("inf")


@attrs.define
class Waiting:
    """A core that only waits for its deadline."""

    deadline: float = NEVER
    fired: list[float] = attrs.field(factory=list)

    def receive(self, sender, message, now) -> None:
        self.deadline = message

    def advance(self, now) -> None:
        if now >= self.deadline:
            self.fired.append(now)
            self.deadline = NEVER

    def take(self) -> list:
        return []

    def undeliverable(self, to, message, now) -> None: ...

    def gauges(self) -> dict[str, float]:
        return {}


async def test_deadlines_are_met_however_they_move(autojump_clock: MockClock) -> None:
    """Deadlines fire once and on time, however they are moved before."""
    core = Waiting()
    shell = Shell(core, MemoryBus().link(ActorId("a.1")), clock=trio.current_time)
    async with trio.open_nursery() as nursery:
        await nursery.start(shell.run)
        began = trio.current_time()
        for moves in ([10.0], [10.0, 5.0], [5.0, 10.0], [5.0, 10.0, 7.0, 12.0], [NEVER, 3.0], [3.0, NEVER]):
            start = trio.current_time()
            for move in moves:
                shell.tell(start + move)
            await trio.sleep(20.0)
            due = [start + moves[-1]] if moves[-1] < NEVER else []
            assert [one for one in core.fired if one >= start] == due, moves
        # A core whose deadline is postponed at every turn, as heartbeats do.
        for _ in range(30):
            shell.tell(trio.current_time() + 5.0)
            await trio.sleep(1.0)
        await trio.sleep(10.0)
        assert len(core.fired) == 6
        assert core.fired[-1] == began + 6 * 20.0 + 29.0 + 5.0
        nursery.cancel_scope.cancel()


async def test_the_end_of_a_turn_comes_once_after_all_messages_that_waited(autojump_clock: MockClock) -> None:
    """The end of a turn is called once for all messages that were waiting."""
    bus, ends = MemoryBus(), []
    link = bus.link(ActorId("a.1"))
    core = Waiting()
    shell = Shell(core, link, clock=trio.current_time, after_turn=lambda: ends.append(core.deadline))
    async with trio.open_nursery() as nursery:
        await nursery.start(shell.run)
        await trio.testing.wait_all_tasks_blocked()
        ends.clear()
        for number in range(5):
            shell.core.receive(link.actor, 100.0 + number, 0.0)
        shell.turn()
        assert ends == [104.0]
        nursery.cancel_scope.cancel()


async def test_the_last_word_to_a_dead_actor_ends_its_connection() -> None:
    """Sending Gone to the dead actor itself closes the connection to it, so that sockets do not pile up."""
    bus = MemoryBus()
    dead, other = ActorId("w0.1"), ActorId("w1.1")
    shell = Shell(Waiting(), bus.link(ActorId("scheduler-0.1")))
    for actor in (dead, other):
        shell.link.connect(actor, bus.link(actor).endpoint)
    for actor in (other, dead):
        shell.send(Send(actor, Gone((dead,)), last=actor == dead))
    shell.link.send(other, Gone((dead,)))
    with pytest.raises(PeerUnreachable):
        shell.link.send(dead, Gone((dead,)))


async def test_a_frontend_that_is_taken_back_is_answered_at_once() -> None:
    """What it asks after a pause would stay unanswered until its next heartbeat names its address again."""
    bus = MemoryBus()
    me = Member(ActorId("scheduler-0.1"), "GlobalScheduler", "memory://scheduler-0.1", 1, "ready")
    shell = Shell(SchedulerCore(me, "round_robin", RoundRobin()), bus.link(me.id))
    link = bus.link(ActorId("frontend-0.1"))
    frontend = Member(link.actor, "Frontend", link.endpoint, 1, "ready")
    shell.hear(Received(frontend.id, Load(frontend)))
    shell.tell(Died(frontend.id))
    await link.receive()
    request = Request("r", 0, frontend.id, "", b"\1\0\0\0", 1, 3, (), Sampling())
    for message in (Load(frontend), Submit(request)):
        shell.hear(Received(frontend.id, message))
    shell.turn()
    with trio.fail_after(2):
        heard = [one.message for one in await link.receive()]
    assert heard[0] == Gone((frontend.id,))
    assert Inquired("r", 0, held=True) in heard


async def test_a_thousand_peers_and_more_can_be_sent_to(tmp_path: Path) -> None:
    """The scheduler of a large cluster could not answer those who join last."""
    raise_descriptor_limit()
    async with open_link(ActorId("a.1"), f"ipc://{tmp_path}/a.1.sock") as link:
        for number in range(1_100):
            link.connect(ActorId(f"b.{number}"), f"ipc://{tmp_path}/{number}")
            link.send(ActorId(f"b.{number}"), Gone(()))
