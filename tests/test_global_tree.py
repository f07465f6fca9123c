"""The global prompt tree compared with dictionaries of prefixes, and with what real shards hold."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from index_mirror import Mirror
from memserve.actions import Send
from memserve.identity import ActorId
from memserve.mempool.prompt_tree import PromptTree
from memserve.pool_messages import IndexDelta, IndexEvent, IndexSnapshot
from memserve.scheduling.global_tree import NOTHING, GlobalTree, ShardHit
from memserve.scheduling.holdings import EventsDoNotFit, Holdings
from memserve.scheduling.index_feed import ASK_AGAIN_S, IndexFeed
from memserve.scheduling.ttl_index import TtlIndex
from memserve.tokens import TOKEN_BYTES, pack

PAGE = 2
SHARDS = [ActorId(f"s{i}.1") for i in range(3)]
SCOPES = ("anne", "bert")


class Shard:
    """A shard's real tree, whose events reach a scheduler or are lost, and a mirror that gets all of them."""

    def __init__(self, name: ActorId, feed: IndexFeed):
        self.name, self.feed = name, feed
        self.tree = PromptTree(PAGE)
        self.tree.events = []
        self.mirror = Mirror(PAGE * TOKEN_BYTES)
        self.next = self.page = 0
        self.pinned = []

    def act(self, rng: random.Random) -> None:
        """A random change of the shard's tree."""
        tokens = pack([rng.randrange(2) for _ in range(rng.randrange(1, 7) * PAGE)])
        match rng.randrange(8):
            case 0 | 1 | 2 | 3:
                self.insert(rng.choice(SCOPES), tokens)
            case 4 if self.pinned:
                self.tree.unpin(self.pinned.pop(rng.randrange(len(self.pinned))))
            case 5:
                self.tree.delete(rng.choice(SCOPES), tokens)
            case 6 | 7:
                self.tree.evict(rng.randrange(1, 4), 0)

    def insert(self, scope: str, tokens: bytes) -> None:
        """A request whose pages are inserted one after another."""
        pin = self.tree.pin(scope, tokens)
        at = pin.tokens * TOKEN_BYTES
        while at < len(tokens):
            end = min(len(tokens), at + PAGE * TOKEN_BYTES)
            self.page += 1
            self.tree.insert(pin, tokens[at:end], [self.page])
            at = end
        self.pinned.append(pin)

    def send(self, rng: random.Random, now: float, loss: float) -> None:
        """Send the new events to the scheduler; some messages are lost."""
        events, self.tree.events = tuple(self.tree.events), []
        delta = IndexDelta(self.next, events)
        self.next += len(events)
        self.mirror.apply(events)
        if rng.random() >= loss:
            self.answer(self.feed.delta(self.name, delta, now), rng, now, loss)

    def answer(self, asked: list[Send], rng: random.Random, now: float, loss: float) -> None:
        """Send a snapshot in parts, any of which may be lost."""
        if not asked:
            return
        whole = list(self.tree.snapshot())
        parts = [whole[at : at + 3] for at in range(0, len(whole), 3)] or [[]]
        for number, part in enumerate(parts):
            if rng.random() >= loss:
                message = IndexSnapshot(self.next, number, len(parts), tuple(part))
                assert self.feed.snapshot(self.name, message, now) == []


def longest(mirror: Mirror, scope: str, tokens: bytes) -> ShardHit:
    """What a shard holds of a prompt, by the dictionary of its prefixes."""
    prefixes = mirror.prefixes()
    held = slow = 0
    for end in range(PAGE * TOKEN_BYTES, len(tokens) + 1, PAGE * TOKEN_BYTES):
        tier = prefixes.get((scope, tokens[:end]))
        if tier is None:
            break
        held, slow = held + PAGE, slow + PAGE * bool(tier)
    return ShardHit(held, slow)


@settings(deadline=None, max_examples=150)
@given(seed=st.integers(0, 1 << 32), loss=st.sampled_from([0.0, 0.3]), steps=st.integers(1, 40))
def test_the_tree_is_what_the_shards_hold(seed: int, loss: float, steps: int) -> None:
    """After any events, losses and restarts, the tree holds for each shard exactly the prefixes that it has."""
    rng = random.Random(seed)
    feed = IndexFeed(GlobalTree(PAGE))
    shards = [Shard(name, feed) for name in SHARDS]
    now = 0.0
    for _ in range(steps):
        number = rng.randrange(3)
        now += 1.0
        if rng.random() < 0.03:
            feed.forget(shards[number].name)
            shards[number] = Shard(shards[number].name, feed)  # its successor, under the same name here
        for _ in range(rng.randrange(4)):
            shards[number].act(rng)
        shards[number].send(rng, now, loss)
        feed.tree.check()
    for shard in shards:
        for _ in range(2):  # once to notice the loss, once to get the answer
            now += ASK_AGAIN_S
            shard.send(rng, now, 0.0)
    feed.tree.check()
    assert sum(feed.tree.pages.values()) == sum(len(shard.mirror.prefixes()) for shard in shards)
    for _ in range(30):
        scope, tokens = rng.choice(SCOPES), pack([rng.randrange(2) for _ in range(rng.randrange(14))])
        match = feed.match(scope, tokens, now)
        expected = {shard.name: longest(shard.mirror, scope, tokens) for shard in shards}
        assert {shard.name: match.held(shard.name) for shard in shards} == expected
        assert match.tokens == max(one.tokens for one in expected.values())
        best = [expected[one].tokens for one in match.best(3)]
        assert best == sorted((one.tokens for one in expected.values() if one.tokens), reverse=True)
    for name in SHARDS:
        feed.forget(name)
    assert (feed.tree.roots, feed.tree.pages) == ({}, {})


@settings(deadline=None, max_examples=100)
@given(seed=st.integers(0, 1 << 32))
def test_tiers_follow_moves(seed: int) -> None:
    """The tree knows which part of a prefix lies in slower tiers after any moves."""
    rng = random.Random(seed)
    tree = GlobalTree(PAGE)
    mirrors = {name: Mirror(PAGE * TOKEN_BYTES) for name in SHARDS[:2]}
    holdings = {name: Holdings(name, tree) for name in mirrors}
    last = dict.fromkeys(mirrors, 0)
    for _ in range(25):
        name = rng.choice(SHARDS[:2])
        event = _event(rng, mirrors[name], last)
        if event is not None:
            last[name] += event.kind != "moved"
            mirrors[name].apply([event])
            holdings[name].apply([event])
            tree.check()
        tokens = pack([rng.randrange(2) for _ in range(12)])
        for one, mirror in mirrors.items():
            assert tree.match("anne", tokens).held(one) == longest(mirror, "anne", tokens)


def _event(rng: random.Random, mirror: Mirror, last: dict[ActorId, int]) -> IndexEvent | None:
    """An event that adds entries below a random one, or moves one."""
    known = list(mirror.entries)
    if known and rng.random() < 0.5:
        return IndexEvent("moved", rng.choice(known), tier=rng.randrange(3))
    parent = rng.choice([0, *known])
    tokens = pack([rng.randrange(2) for _ in range(PAGE * rng.randrange(1, 4))])
    start = mirror.entries[parent].tokens if parent else b""
    if any(
        entry.tokens[: len(start) + PAGE * TOKEN_BYTES] == start + tokens[: PAGE * TOKEN_BYTES]
        for entry in mirror.entries.values()
    ):
        return None  # a shard's own tree would have found it
    return IndexEvent(
        "stored", max(known, default=0) + 1, parent, "" if parent else "anne", tokens, rng.randrange(3)
    )


def test_a_conversation_stays_one_node() -> None:
    """Pages that are stored one after another stay one node, which saves memory."""
    tree = GlobalTree(PAGE)
    tokens = pack(range(40))
    width = PAGE * TOKEN_BYTES
    for name in SHARDS:
        holdings = Holdings(name, tree)
        for at in range(0, len(tokens), width):
            holdings.apply([IndexEvent("stored", 1, 0, "anne", tokens[at : at + width])])
    assert len(list(tree.nodes())) == 1
    assert tree.pages == dict.fromkeys(SHARDS, 20)


@pytest.mark.parametrize(
    "event",
    [
        IndexEvent("stored", 2, 9, "anne", pack([1, 2])),
        IndexEvent("stored", 2, 0, "anne", pack([1])),
        IndexEvent("removed", 9),
        IndexEvent("split", 1, 2, pages=1),
        IndexEvent("burnt", 1),
    ],
)
def test_events_that_do_not_fit_ask_for_everything(event: IndexEvent) -> None:
    """An event that does not fit the tree asks for a snapshot, and keeps what is known until then."""
    feed = IndexFeed(GlobalTree(PAGE))
    assert (
        feed.delta(SHARDS[0], IndexDelta(0, (IndexEvent("stored", 1, 0, "anne", pack([7, 8])),)), 0.0) == []
    )
    (ask,) = feed.delta(SHARDS[0], IndexDelta(1, (event,)), 0.0)
    assert (ask.to, feed.is_whole(SHARDS[0])) == (SHARDS[0], False)
    assert feed.match("anne", pack([7, 8]), 0.0).held(SHARDS[0]) == ShardHit(2)
    with pytest.raises(EventsDoNotFit):
        Holdings(SHARDS[1], GlobalTree(PAGE)).apply([IndexEvent("moved", 3)])


@settings(deadline=None)
@given(seed=st.integers(0, 1 << 32))
def test_assumed_prefixes_last_for_their_time(seed: int) -> None:
    """In the paper's TTL mode, each placement counts as cached for its time, compared with a list of all placements."""
    rng = random.Random(seed)
    index = TtlIndex(GlobalTree(PAGE), ttl_s=10.0)
    placements: list[tuple[float, ActorId, bytes]] = []
    now = 0.0
    for _ in range(30):
        now += rng.random() * 3
        shard, tokens = rng.choice(SHARDS), pack([rng.randrange(2) for _ in range(rng.randrange(12))])
        index.match("anne", b"", now)
        index.placed(shard, "anne", tokens, now)
        placements.append((now, shard, tokens))
        if rng.random() < 0.05:
            index.forget(shard)
            placements = [one for one in placements if one[1] != shard]
        asked = pack([rng.randrange(2) for _ in range(rng.randrange(12))])
        match = index.match("anne", asked, now)
        index.tree.check()
        for one in SHARDS:
            live = [prompt for at, holder, prompt in placements if holder == one and now < at + 10.0]
            assert match.held(one) == _shared(asked, live)
    assert index.match("anne", pack([0] * 12), now + 11).path == ()
    assert index.tree.pages == {}


def _shared(asked: bytes, prompts: list[bytes]) -> ShardHit:
    width = PAGE * TOKEN_BYTES
    pages = 0
    while any(
        len(one) >= (pages + 1) * width
        and len(asked) >= (pages + 1) * width
        and one[: (pages + 1) * width] == asked[: (pages + 1) * width]
        for one in prompts
    ):
        pages += 1
    return ShardHit(pages * PAGE) if pages else NOTHING
