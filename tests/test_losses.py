"""What evictions cost: which lost pages are counted as asked for again."""

from __future__ import annotations

from memserve.identity import ActorId
from memserve.pool_messages import IndexDelta, IndexEvent
from memserve.scheduling.global_tree import GlobalTree
from memserve.scheduling.index_feed import IndexFeed
from memserve.scheduling.losses import PRIOR_PAGES, PRIOR_SHARE, WINDOW_PAGES, Losses
from memserve.tokens import pack

PAGE = 16
A, B = ActorId("s0.1"), ActorId("s1.1")
PROMPT = pack(range(10 * PAGE))


class Feed:
    """An index that receives the events of shards."""

    def __init__(self) -> None:
        self.index = IndexFeed(GlobalTree(PAGE))
        self.said: dict[ActorId, int] = {}

    def say(self, shard: ActorId, *events: IndexEvent) -> None:
        first = self.said.get(shard, 0)
        self.said[shard] = first + len(events)
        assert self.index.delta(shard, IndexDelta(first, events), 0.0) == []

    @property
    def wanted(self) -> float:
        """Pages that were asked for after they were lost."""
        return self.index.losses._wanted - PRIOR_PAGES * PRIOR_SHARE


def stored(tokens: bytes, entry: int = 1, parent: int = 0) -> IndexEvent:
    return IndexEvent("stored", entry, parent, "anne", tokens)


def test_what_is_lost_and_asked_for_again_counts_once() -> None:
    """An evicted prefix counts as wanted when it is asked for in its scope, once for each time that it was lost."""
    feed = Feed()
    feed.say(A, stored(PROMPT), IndexEvent("removed", 1))
    feed.index.match("anne", PROMPT[: 4 * PAGE * 4], 1.0)
    assert feed.wanted == 4
    feed.index.match("anne", PROMPT, 2.0)
    assert feed.wanted == 4
    feed.say(A, stored(PROMPT, 2), IndexEvent("removed", 2))
    feed.index.match("bob", PROMPT, 3.0)
    assert feed.wanted == 4
    feed.index.match("anne", PROMPT, 4.0)
    assert feed.wanted == 14


def test_leaves_that_go_before_their_prefix_are_all_missed() -> None:
    """A prompt that is evicted piece by piece, leaves first, counts with all of its pages."""
    feed = Feed()
    cut = 6 * PAGE * 4
    feed.say(A, stored(PROMPT[:cut]), stored(PROMPT[cut:], 2, parent=1))
    feed.say(A, IndexEvent("removed", 2), IndexEvent("removed", 1))
    feed.index.match("anne", PROMPT, 1.0)
    assert feed.wanted == 10


def test_what_another_shard_still_holds_is_not_lost() -> None:
    """Pages that another shard still holds do not count as lost; the last copy does."""
    feed = Feed()
    feed.say(A, stored(PROMPT))
    feed.say(B, stored(PROMPT), IndexEvent("removed", 1))
    feed.index.match("anne", PROMPT, 1.0)
    assert feed.wanted == 0
    assert feed.index.losses.share < PRIOR_SHARE
    feed.say(A, IndexEvent("removed", 1))
    feed.index.match("anne", PROMPT, 1.0)
    assert feed.wanted == 10


def test_old_evictions_fade() -> None:
    """Old evictions lose their weight, so that one night's batch jobs do not set the price for the next day's chats."""
    losses = Losses(PAGE * 4, {A: 100})
    for _ in range(100):
        losses.evicted(int(WINDOW_PAGES / 10))
    assert losses.share < 0.01
    for number in range(200):
        prompt = pack(range(1000 * number, 1000 * number + 10 * PAGE))
        losses.evicted(10)
        losses.lost("anne", prompt[: PAGE * 4], 10)
        losses.missed("anne", prompt, 0)
    assert losses.share > 0.25
