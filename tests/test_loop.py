"""The shell that all actors share: deadlines are met, and several messages of one turn share its end."""

from __future__ import annotations

import attrs
import pytest
import trio
from trio.testing import MockClock

from memory_bus import MemoryBus
from memserve.actions import Send
from memserve.actors.loop import Shell
from memserve.errors import PeerUnreachable
from memserve.identity import ActorId
from memserve.messages import Gone

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
        shell.send(Send(actor, Gone((dead,))))
    shell.link.send(other, Gone((dead,)))
    with pytest.raises(PeerUnreachable):
        shell.link.send(dead, Gone((dead,)))
