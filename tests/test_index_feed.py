"""What a shard reports of its index, and what a scheduler does about gaps."""

import random

from index_mirror import Mirror
from memserve.actions import Send
from memserve.bus import FRAME_BYTES_MAX
from memserve.identity import ActorId
from memserve.mempool.pool import Pool
from memserve.mempool.prompt_tree import PromptTree
from memserve.mempool.publishing import EVENTS_MAX, GATHER_S, QUIET_S, Publisher
from memserve.mempool.shard import ShardCore
from memserve.messages import encode
from memserve.pool_messages import (
    Acquire,
    Acquired,
    FreeMem,
    IndexDelta,
    IndexEvent,
    IndexSnapshot,
    IndexWanted,
    Insert,
)
from memserve.scheduling.global_tree import GlobalTree
from memserve.scheduling.index_feed import ASK_AGAIN_S, IndexFeed
from memserve.tokens import TOKEN_BYTES, pack

SEED = ActorId("scheduler-0.seed")
EVENT = IndexEvent("stored", 1, tokens=b"....", scope="anne")


class ReportingShard:
    """A shard whose reports reach a scheduler, and a copy of its index that is made from them."""

    def __init__(self):
        self.core = ShardCore(Pool(3000, 1, 5.0), schedulers=(SEED,))
        self.feed, self.mirror = IndexFeed(GlobalTree(1)), Mirror(TOKEN_BYTES)
        self.now, self.calls = 0.0, 0

    def store(self, *prompt):
        """A request whose prompt is inserted, and which ends."""
        self.calls += 2
        self.core.receive("p.1", Acquire(self.calls, "anne", pack(prompt), 0), self.now)
        lease = next(a.message.lease for a in self.heard() if isinstance(a.message, Acquired))
        self.core.receive("p.1", Insert(self.calls + 1, lease, 0, pack(prompt)), self.now)
        self.core.receive("p.1", FreeMem(lease), self.now)
        self.heard()

    def heard(self):
        """The actions; those for the scheduler are answered as it would."""
        actions = self.core.take()
        for action in actions:
            if isinstance(action.message, IndexDelta | IndexSnapshot):
                self.deliver(action)
        return actions

    def deliver(self, action):
        """A message reaches the scheduler."""
        self.mirror.hear(action.message)
        if isinstance(action.message, IndexSnapshot):
            self.feed.snapshot("s0.1", action.message, self.now)
            return
        for ask in self.feed.delta("s0.1", action.message, self.now):
            self.core.receive(SEED, ask.message, self.now)
            self.heard()

    def wait(self, seconds):
        """Let time pass."""
        self.now += seconds
        self.core.advance(self.now)
        return self.heard()


def test_changes_travel_together_and_soon():
    """Changes are gathered for GATHER_S at most and sent in one message."""
    shard = ReportingShard()
    shard.store(1, 2)
    shard.store(1, 3)
    assert shard.core.deadline <= shard.now + GATHER_S
    (delta,) = shard.wait(GATHER_S)

    assert (delta.to, delta.message.first) == (SEED, 0)
    assert shard.mirror.prefixes() == {("anne", pack(tokens)): 0 for tokens in ([1], [1, 2], [1, 3])}


def test_a_lost_delta_is_noticed_and_made_good():
    """A lost delta is noticed, also when nothing follows it, and a snapshot repairs the index."""
    shard = ReportingShard()
    shard.store(1, 2)
    shard.now += GATHER_S
    shard.core.advance(shard.now)
    shard.core.take()  # lost, and nothing follows it but silence
    assert shard.wait(QUIET_S) != []
    assert shard.feed.is_whole("s0.1")
    assert (shard.feed.gaps, shard.feed.snapshots) == (1, 1)
    assert shard.mirror.prefixes() == {("anne", pack([1])): 0, ("anne", pack([1, 2])): 0}
    assert shard.wait(60.0) == []
    shard.store(1, 5)
    shard.wait(GATHER_S)
    assert ("anne", pack([1, 5])) in shard.mirror.prefixes()


def test_a_large_index_comes_in_parts():
    """A snapshot of a large index is sent in parts."""
    shard = ReportingShard()
    rng = random.Random(1)
    for _ in range(EVENTS_MAX + 100):
        shard.store(rng.randrange(10_000))
    shard.wait(GATHER_S)
    shard.core.receive(ActorId("scheduler-0.2"), IndexWanted(0), shard.now)
    parts = [action.message for action in shard.core.take()]

    assert [(part.part, part.parts) for part in parts] == [(0, 2), (1, 2)]
    again = Mirror(TOKEN_BYTES)
    assert not any(again.hear(part) for part in parts)
    assert (again.prefixes(), again.next) == (shard.mirror.prefixes(), shard.mirror.next)


def test_no_part_is_longer_than_the_bus_allows():
    """If one was, the scheduler would cut the shard off and ask again, for ever: an index of long prompts stays unknown."""
    tree = PromptTree(1 << 18)
    publisher = Publisher(tree, (SEED,))
    for first in range(80):  # of a megabyte each
        pin = tree.pin("anne", b"")
        tree.insert(pin, pack([first]) * (1 << 18), [first])
        tree.unpin(pin)
    messages = [send.message for send in publisher.snapshot(SEED)]
    for kind in (IndexDelta, IndexSnapshot):
        parts = [message for message in messages if isinstance(message, kind)]
        assert sum(len(part.events) for part in parts) == 80
        assert max(len(frame) for part in parts for frame in encode(part)) < FRAME_BYTES_MAX / 2


def test_a_scheduler_asks_once_and_again_when_nothing_comes():
    """After a gap the scheduler asks for a snapshot once, and again after ASK_AGAIN_S without a whole one."""
    feed = IndexFeed(GlobalTree(1))
    assert feed.delta("s0.1", IndexDelta(7, (EVENT,)), 0.0) == [Send("s0.1", IndexWanted(0))]
    assert feed.delta("s0.1", IndexDelta(8, (EVENT,)), 1.0) == []
    assert feed.delta("s0.1", IndexDelta(9, (EVENT,)), ASK_AGAIN_S) == [Send("s0.1", IndexWanted(0))]
    feed.snapshot("s0.1", IndexSnapshot(10, 1, 2, ()), 2.0)  # its first part was lost
    assert not feed.is_whole("s0.1")
    feed.snapshot("s0.1", IndexSnapshot(10, 0, 2, ()), 2.0)
    feed.snapshot("s0.1", IndexSnapshot(10, 1, 2, ()), 2.0)
    assert feed.is_whole("s0.1")
    assert feed.delta("s0.1", IndexDelta(10, (EVENT, EVENT)), 5.0) == []
    feed.forget("s0.1")
    assert not feed.is_whole("s0.1")
    assert (feed.events, feed.gaps) == (2, 1)


def test_without_schedulers_nothing_is_noted():
    """A shard without schedulers keeps no events."""
    core = ShardCore(Pool(8, 4, 5.0))
    core.receive("p.1", Acquire(1, "anne", pack(range(9)), 0), 0.0)
    core.receive("p.1", Insert(2, 1, 0, pack(range(8))), 0.0)
    assert core.pool.tree.events is None
    assert core.deadline == 5.0
