"""A fleet and an index made by hand, for tests of placement."""

from __future__ import annotations

from memserve.costs import Site, StepCosts
from memserve.drawing import Sampling
from memserve.identity import ActorId
from memserve.messages import Member, Request
from memserve.pool_messages import IndexDelta, IndexEvent
from memserve.scheduling.cost_model import LINKS, LinkModel
from memserve.scheduling.fleet import Fleet
from memserve.scheduling.global_tree import GlobalTree
from memserve.scheduling.index_feed import IndexFeed
from memserve.scheduling.outputs import OutputLengths
from memserve.scheduling.policies import Placement, Policy
from memserve.scheduling.pricing import Cost, Weights
from memserve.tokens import pack

PAGE = 16
COSTS = StepCosts(
    dense=((1, 0.010), (16, 0.011), (256, 0.100), (512, 0.200)),
    row_s=1e-4,
    read_s=1e-6,
    pair_s=1e-7,
    chunk_tokens=256,
    token_bytes=20_000,
)
"""Roughly a small model on a few cores: 2,500 tokens/s of prefill, 10 ms per step."""
DOCUMENT = pack(range(1600))


class World:
    """A fleet and an index made by hand.

    Workers are named ``p…`` (prefill), ``d…`` (decode) or ``w…`` (both). Each has a shard of its own, unless
    its name gives one: ``p0@s1``.
    """

    def __init__(self, *workers: str, policy: Policy | None = None):
        self.fleet, self.index, self.policy = Fleet(), IndexFeed(GlobalTree(PAGE)), policy or Cost()
        self.entries: dict[str, int] = {}
        self.now = 100.0
        self.number = 0
        for one in workers:
            self.report(one)

    def report(self, worker: str, costs: StepCosts = COSTS, site: Site | None = None, **load: float) -> None:
        """Deliver a heartbeat of a worker and of its shard."""
        name, _, shard = worker.partition("@")
        shard = ActorId(f"{shard or 's-' + name}.1")
        role = {"p": "prefill", "d": "decode", "w": "both"}[name[0]]
        self.fleet.heard(Member(shard, "MemPoolShard", "", 1, "ready"), self.now)
        kind = "DecodeWorker" if role == "decode" else "PrefillWorker"
        me = Member(ActorId(f"{name}.1"), kind, "", 1, "ready", role, shard, load, costs, site=site)
        self.fleet.heard(me, self.now)

    def cache(self, shard: str, tokens: bytes, tier: int = 0) -> None:
        """Let a shard report that it holds a prompt."""
        first = self.entries.get(shard, 0)
        self.entries[shard] = first + 1
        event = IndexEvent("stored", first + 1, 0, "anne", tokens[: len(tokens) // 64 * 64], tier)
        assert self.index.delta(ActorId(f"{shard}.1"), IndexDelta(first, (event,)), self.now) == []

    def evict(self, shard: str) -> None:
        """Let a shard report that the prompt it stored last is gone."""
        first = self.entries[shard]
        self.entries[shard] = first + 1
        event = IndexEvent("removed", first)
        assert self.index.delta(ActorId(f"{shard}.1"), IndexDelta(first, (event,)), self.now) == []

    def place(self, tokens: bytes = DOCUMENT, max_tokens: int = 100) -> Placement:
        """The placement of a new request."""
        self.number += 1
        length = len(tokens) // 4
        request = Request(
            f"r{self.number}", 0, ActorId("f.1"), "anne", tokens, length, max_tokens, (), Sampling()
        )
        match = self.index.match("anne", tokens, self.now)
        answer = OutputLengths().expect(request)
        choice = self.policy.choose(self.fleet, request, match, answer, self.now)
        assert choice is not None
        self.index.tree.check()
        return choice


def busy(tokens: float, rows: float = 0) -> dict[str, float]:
    """The load of a worker with ``tokens`` waiting prompt tokens and ``rows`` streams.

    Waiting prompts have about 1,000 tokens; streams have contexts of 500.
    """
    return {
        "waiting_tokens": tokens,
        "waiting_pairs": tokens * 500,
        "decode_rows": rows,
        "context_tokens": rows * 500,
    }


def fetching(byte_s: float) -> Cost:
    """The cost policy with fetching, over links that take ``byte_s`` seconds per byte."""
    return Cost(Weights(fetch=True), {**LINKS, "mapped": LinkModel(0.002, byte_s)})
