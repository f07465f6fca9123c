"""Which workers a request is given to: situations made by hand, and what the answer must be."""

from __future__ import annotations

import random

import attrs
import pytest

from memserve.costs import Site, StepCosts
from memserve.messages import ActorId, Member, Request, Sampling
from memserve.pool_messages import IndexDelta, IndexEvent
from memserve.scheduling.cost_model import LINKS, Link
from memserve.scheduling.fleet import SURE_S, Fleet, Placed
from memserve.scheduling.global_tree import GlobalTree
from memserve.scheduling.index_feed import IndexFeed
from memserve.scheduling.outputs import TENANTS_MAX, UNKNOWN_TOKENS, OutputLengths
from memserve.scheduling.policies import PLAIN, Choice, LongestPrefix, Policy, Session
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
"""About a small model on a few cores: 2,500 tokens/s, 10 ms a step."""
DOCUMENT = pack(range(1600))


class World:
    """A fleet and an index, by hand. Workers are ``p…`` (prefill), ``d…`` (decode) and ``w…`` (both), on a shard each
    unless named ``p0@s1``.
    """

    def __init__(self, *workers: str, policy: Policy | None = None):
        self.fleet, self.index, self.policy = Fleet(), IndexFeed(GlobalTree(PAGE)), policy or Cost()
        self.entries: dict[str, int] = {}
        self.now = 100.0
        self.number = 0
        for one in workers:
            self.report(one)

    def report(self, worker: str, costs: StepCosts = COSTS, site: Site | None = None, **load: float) -> None:
        """A heartbeat of a worker, and of its shard."""
        name, _, shard = worker.partition("@")
        shard = ActorId(f"{shard or 's-' + name}.1")
        role = {"p": "prefill", "d": "decode", "w": "both"}[name[0]]
        self.fleet.heard(Member(shard, "MemPoolShard", "", 1, "ready"), self.now)
        kind = "DecodeWorker" if role == "decode" else "PrefillWorker"
        me = Member(ActorId(f"{name}.1"), kind, "", 1, "ready", role, shard, load, costs, site=site)
        self.fleet.heard(me, self.now)

    def cache(self, shard: str, tokens: bytes, tier: int = 0) -> None:
        """A shard tells that it holds a prompt."""
        first = self.entries.get(shard, 0)
        self.entries[shard] = first + 1
        event = IndexEvent("stored", first + 1, 0, "anne", tokens[: len(tokens) // 64 * 64], tier)
        assert self.index.delta(ActorId(f"{shard}.1"), IndexDelta(first, (event,)), self.now) == []

    def evict(self, shard: str) -> None:
        """A shard tells that what it stored last is gone."""
        first = self.entries[shard]
        self.entries[shard] = first + 1
        event = IndexEvent("removed", first)
        assert self.index.delta(ActorId(f"{shard}.1"), IndexDelta(first, (event,)), self.now) == []

    def place(self, tokens: bytes = DOCUMENT, max_tokens: int = 100) -> Choice:
        """Where a request goes."""
        self.number += 1
        length = len(tokens) // 4
        request = Request(
            f"r{self.number}", 0, ActorId("f.1"), "anne", tokens, length, max_tokens, (), Sampling()
        )
        match = self.index.match("anne", tokens, self.now)
        choice = self.policy.choose(self.fleet, request, match, self.now)
        assert choice is not None
        self.index.tree.check()
        return choice


def busy(tokens: float, rows: float = 0) -> dict[str, float]:
    """The load of a worker with so many prompt tokens waiting, in prompts of about 1,000, and streams of 500 tokens."""
    return {
        "waiting_tokens": tokens,
        "waiting_pairs": tokens * 500,
        "decode_rows": rows,
        "context_tokens": rows * 500,
    }


def fetching(byte_s: float) -> Cost:
    """The policy where pages move, so many seconds a byte."""
    return Cost(Weights(fetch=True), {**LINKS, "mapped": Link(0.002, byte_s)})


def test_an_idle_worker_with_the_prefix_wins() -> None:
    """If it failed, nothing that is cached would be found again."""
    world = World("w0", "w1", "w2", "w3", "w4", "w5")
    world.cache("s-w4", DOCUMENT)
    choice = world.place()
    assert (choice.prefill, choice.decode, choice.shard) == ("w4.1", "w4.1", "s-w4.1")
    assert choice.expected_tokens == 1600
    assert choice.seconds < 0.05
    assert choice.candidates.startswith("w4.1 ") and choice.candidates.count("ms (") == 3


def test_a_queue_longer_than_the_saving_loses() -> None:
    """If it failed, a popular prefix would pile its requests up on one worker."""
    world = World("w1")
    world.report("w0", **busy(4000))
    world.cache("s-w0", DOCUMENT)
    choice = world.place()
    assert (choice.prefill, choice.expected_tokens) == ("w1.1", 0)
    world.report("w0", **busy(300))
    assert world.place().prefill == "w0.1"


def test_a_hot_prefix_gets_a_second_home() -> None:
    """If it failed, one worker would serve all that begin alike while others idle. Replication comes of the prices."""
    world = World("w0", "w1", "w2")
    world.cache("s-w0", DOCUMENT)
    homes = [world.place(DOCUMENT + pack(range(5000 + 300 * i, 5300 + 300 * i))).prefill for i in range(12)]
    assert homes[0] == homes[1] == "w0.1"
    assert set(homes) == {"w0.1", "w1.1", "w2.1"}
    replica = homes[next(i for i, home in enumerate(homes) if home != "w0.1")]
    world.cache(f"s-{replica.removesuffix('.1')}", DOCUMENT)
    world.now += 60.0
    for one in ("w0", "w1", "w2"):
        world.report(one)
    assert {world.place(DOCUMENT).prefill for _ in range(2)} == {"w0.1", replica}


def test_a_short_prefill_where_the_answer_is_made_beats_a_hand_over() -> None:
    """If it failed, every turn of a warm chat would pay a hand-over."""
    world = World("p0@s0", "w0@s0")
    world.cache("s0", DOCUMENT)
    choice = world.place(DOCUMENT + pack(range(30)))
    assert (choice.prefill, choice.decode) == ("w0.1", "w0.1")


def test_a_long_prefill_is_run_away_from_many_streams() -> None:
    """If it failed, disaggregation would bring nothing: every stream would wait for every prompt."""
    world = World("p0@s0")
    world.report("w0@s0", **busy(0, rows=12))
    choice = world.place()
    assert (choice.prefill, choice.decode, choice.decode_shard) == ("p0.1", "w0.1", "")


@pytest.mark.parametrize(("byte_s", "fetched"), [(1 / 4e9, True), (1 / 20e6, False)])
def test_a_prefix_is_fetched_exactly_when_that_is_cheaper(byte_s: float, fetched: bool) -> None:
    """If it failed, transfers would be made that take longer than computing, or not be made that save seconds."""
    world = World("w0", "w1", policy=fetching(byte_s))
    world.cache("s-w0", DOCUMENT)
    world.report("w0", **busy(8000))
    choice = world.place()
    assert choice.prefill == "w1.1"
    assert (choice.source, choice.source_tokens, choice.expected_tokens) == (
        ("s-w0.1", 1600, 0) if fetched else ("", 0, 0)
    )
    # 1,599 tokens take about 0.7 s; fetching their 32 MB 10 ms, or 1.6 s.
    assert (choice.seconds < 0.1) == fetched


def test_transfers_from_one_shard_wait_for_one_another() -> None:
    """If it failed, a hundred requests would each believe that they have the link to themselves."""
    world = World("w0", *(f"w{i}" for i in range(1, 9)), policy=fetching(1e-8))
    world.cache("s-w0", DOCUMENT)
    world.report("w0", **busy(80_000))
    sources = [world.place().source for _ in range(8)]
    assert sources[0] == "s-w0.1" and sources[-1] == ""


def test_a_stream_goes_on_where_it_is_rather_than_afar() -> None:
    """If it failed, pages would be moved for nothing: the last page of a prompt is in nobody's index."""
    world = World("p0@s0", "d0@s0", "d1@s1", policy=fetching(1e-9))
    world.cache("s0", DOCUMENT)
    world.cache("s1", DOCUMENT)
    world.fleet.placed(ActorId("d0.1"), Placed(world.now), world.now)  # d1 is the one used longest ago
    choice = world.place()
    assert (choice.decode, choice.decode_shard) == ("d0.1", "")


def test_transfers_are_priced_by_the_path_they_take() -> None:
    """If it failed, shards that only a slow network joins would be treated like neighbours."""
    policy = Cost(Weights(fetch=True, path="tcp"), {"mapped": Link(0.0, 0.0), "tcp": Link(9.0, 0.0)})
    world = World("w0", "w1", policy=policy)
    world.cache("s-w0", DOCUMENT)
    world.report("w0", **busy(8000))
    assert world.place().source == ""


def full(world: World, *shards: str) -> None:
    """Shards report that no page is free."""
    for one in shards:
        member = Member(ActorId(f"{one}.1"), "MemPoolShard", "", 1, "ready", load={"pages_free": 0.0})
        world.fleet.heard(member, world.now)


def test_a_second_copy_costs_what_it_evicts() -> None:
    """If it failed, small pools would fill with copies, and everyone would lose what they come back for."""
    world = World("w0", "w1")
    world.cache("s-w0", DOCUMENT)
    world.report("w0", **busy(1800))
    assert world.place().prefill == "w1.1"
    world = World("w0", "w1")
    world.cache("s-w0", DOCUMENT)
    world.report("w0", **busy(1800))
    full(world, "s-w0", "s-w1")
    assert world.place().prefill == "w0.1"


def test_what_nobody_asks_for_again_costs_nothing() -> None:
    """If it failed, pools full of rubbish would keep a hot prefix on one worker."""
    world = World("w0", "w1")
    world.cache("s-w0", DOCUMENT)
    for number in range(60):
        rubbish = pack(range(100_000 + 2000 * number, 101_600 + 2000 * number))
        world.cache("s-w1", rubbish)
        world.evict("s-w1")
    assert world.index.losses.share < 0.05
    world.report("w0", **busy(1800))
    full(world, "s-w0", "s-w1")
    assert world.place().prefill == "w1.1"


def test_what_lies_in_a_slow_tier_costs_its_way_back() -> None:
    """If it failed, a prefix in the arena would be no better than one on disk."""
    world = World("w0", "w1")
    world.cache("s-w0", DOCUMENT, tier=1)
    assert world.place().prefill == "w0.1"
    world.now += 60
    for one in ("w0", "w1"):
        world.report(one)
    world.cache("s-w1", DOCUMENT)
    assert world.place().prefill == "w1.1"


def test_reports_that_lag_are_made_up_for() -> None:
    """If it failed, a burst would land on one worker; and a placement must not count twice for ever."""
    world = World("w0", "w1", "w2", "w3")
    homes = [world.place(pack(range(1000 * i, 1000 * i + 900))).prefill for i in range(8)]
    assert sorted(homes) == sorted(2 * ["w0.1", "w1.1", "w2.1", "w3.1"])
    worker = world.fleet.workers[ActorId("w0.1")]
    assert worker.rows == 2
    world.now += SURE_S
    world.report("w0", **busy(900, rows=1))
    assert (worker.tokens, worker.rows) == (900, 1)


def test_a_report_that_includes_a_placement_ends_it_at_once() -> None:
    """If it failed, for a tenth of a second a worker that was just given a prompt would seem twice as busy as it is."""
    world = World("w0")
    world.place(pack(range(900)))
    world.place(pack(range(1000, 1900)))
    world.report("w0", prompts_taken_total=1.0, **busy(900, rows=1))
    worker = world.fleet.workers[ActorId("w0.1")]
    assert (worker.tokens, worker.rows) == (1800, 2)
    world.report("w0", prompts_taken_total=2.0, **busy(1800, rows=2))
    assert (worker.tokens, worker.rows) == (1800, 2)


def test_a_prompt_that_fits_the_last_step_of_a_queue_is_priced_so() -> None:
    """If it failed, warm turns would be sent away from a worker that would run them beside what it has, for nothing."""
    world = World("w0")
    world.report("w0", **busy(300))
    worker = world.fleet.workers[ActorId("w0.1")]
    before = worker.queue_until
    world.place(pack(range(8)))
    assert worker.queue_until - before < 0.004 < worker.model.queue_s(8, 32)


def test_one_that_only_decodes_gets_no_prompt() -> None:
    """If it failed, a role would be no more than a wish."""
    world = World("p0@s0", "d0@s0")
    for _ in range(20):
        choice = world.place()
        assert (choice.prefill, choice.decode) == ("p0.1", "d0.1")
    only = World("d0@s0")
    with pytest.raises(AssertionError):
        only.place()


def test_workers_whose_shard_is_gone_are_not_chosen() -> None:
    """If it failed, a request would wait for pages that nobody can grant."""
    world = World("w0", "w1")
    world.fleet.forget(ActorId("s-w0.1"))
    assert {world.place().prefill for _ in range(4)} == {"w1.1"}
    world.fleet.heard(attrs.evolve(world.fleet.workers[ActorId("w1.1")].member, state="draining"), world.now)
    with pytest.raises(AssertionError):
        world.place()


def test_a_role_may_change() -> None:
    """If it failed, a worker would be ranked where it no longer belongs."""
    world = World("p0@s0", "d0@s0")
    decode = world.fleet.workers[ActorId("d0.1")].member
    world.fleet.heard(attrs.evolve(decode, role="prefill"), world.now)
    world.fleet.heard(attrs.evolve(world.fleet.workers[ActorId("p0.1")].member, role="decode"), world.now)
    choice = world.place()
    assert (choice.prefill, choice.decode) == ("d0.1", "p0.1")


def test_a_session_stays_where_it_began() -> None:
    """If it failed, the policy that others have would be compared unfairly."""
    world = World("w0", "w1", policy=Session())
    greeting = pack(range(40))
    first = [world.place(greeting + pack([i])).prefill for i in range(2)]
    assert sorted(first) == ["w0.1", "w1.1"]
    for turn in range(1, 6):
        for i in range(2):
            more = greeting + pack([i]) + pack(range(900, 900 + 50 * turn))
            assert world.place(more).prefill == first[i]


def test_the_longest_prefix_wins_whatever_the_load() -> None:
    """If it failed, the paper's section 6 would be compared unfairly."""
    world = World("w0", policy=LongestPrefix())
    world.report("w1", **busy(50_000))
    world.cache("s-w1", DOCUMENT)
    assert world.place().prefill == "w1.1"
    assert world.place(pack([1])).prefill == "w0.1"


@pytest.mark.parametrize("name", PLAIN)
def test_every_policy_says_what_it_expects(name: str) -> None:
    """If it failed, a stale hint could not be told from a good one."""
    world = World("w0", policy=PLAIN[name]())
    world.cache("s-w0", DOCUMENT)
    assert world.place().expected_tokens == 1600


def test_lengths_of_answers_are_learned_by_tenant() -> None:
    """If it failed, a tenant of long answers would be priced as one of short ones; or memory would grow for ever."""
    lengths = OutputLengths()
    request = Request("r", 0, ActorId("f.1"), "anne", pack(range(12)), 10, 1000, (), Sampling())
    assert lengths.expect(request) == UNKNOWN_TOKENS
    for _ in range(200):
        lengths.learn("anne", 20)
    assert lengths.expect(request) == pytest.approx(20, abs=0.1)
    assert lengths.expect(attrs.evolve(request, max_tokens=5)) == 3
    assert lengths.expect(attrs.evolve(request, scope="bert")) == UNKNOWN_TOKENS
    for i in range(TENANTS_MAX + 5):
        lengths.learn(f"t{i}", 1)
    assert len(lengths._means) == TENANTS_MAX


def test_a_worker_with_senseless_figures_is_priced_like_one_without() -> None:
    """One worker's bad heartbeat would end the scheduler, and its successor, and so the cluster."""
    world = World("w0")
    world.report("w1", costs=attrs.evolve(COSTS, dense=((1.0, 0.01), (1.0, 0.01))))
    assert {one.member.id for one in world.fleet.workers.values()} == {"w0.1", "w1.1"}


# ---- workers that share a site ---------------------------------------------------------------------------------

HOST = Site("host", cores=2, threads=2)
SHARING = attrs.evolve(COSTS, decode_crowding=0.85, prefill_crowding=0.55)
"""As measured on two cores: docs/measurements/2026-11-26-scheduling.md."""


def two_workers(*sites: Site | None, **load: float) -> World:
    """``w0`` with a load and ``w1`` without, on one shard."""
    world = World()
    for name, site, has in zip(("w0@s0", "w1@s0"), sites, (load, {}), strict=True):
        world.report(name, SHARING, site, **has)
    return world


def test_streams_of_one_site_are_put_together_where_answers_are_long() -> None:
    """If it failed, two workers would read the weights from the same memory, each on half of the cores."""
    short = pack(range(32))
    together, apart = two_workers(HOST, HOST, **busy(0, 5)), two_workers(None, None, **busy(0, 5))
    assert [together.place(short, 300).decode for _ in range(4)] == ["w0.1"] * 4
    assert apart.place(short, 300).decode == "w1.1", "another machine's cores are free for the asking"


def test_streams_that_are_on_both_workers_of_a_site_come_together_again() -> None:
    """If it failed, one stream on each would keep both busy for ever."""
    world = two_workers(HOST, HOST, **busy(0, 5))
    world.report("w1@s0", SHARING, HOST, **busy(0, 1))
    assert world.place(pack(range(32)), 300).decode == "w0.1"


def test_a_queue_is_shared_with_the_other_worker_of_the_site() -> None:
    """If it failed, a host would run prompts on one worker; two together are faster, because one uses two cores badly."""
    world = two_workers(HOST, HOST, **busy(2000))
    assert world.place(max_tokens=2).prefill == "w1.1"
    many = [world.place(pack(range(i * 500, i * 500 + 480)), 2).prefill for i in range(8)]
    assert set(many) == {"w0.1", "w1.1"}


def test_streams_are_not_crowded_for_a_prompt_that_gains_little() -> None:
    """If it failed, ten streams would run at half their speed for the sake of one short prompt."""
    world = two_workers(HOST, HOST, **busy(0, 10))
    assert world.place(pack(range(64)), 2).prefill == "w0.1"
    world.report("w0@s0", SHARING, HOST, **busy(8000, 10))
    assert world.place(pack(range(64)), 2).prefill == "w1.1", "behind a long queue it gains much"


def test_times_are_those_beside_busy_neighbours() -> None:
    """If it failed, deadlines would be promised by the speed that a worker has alone."""
    alone, beside = (two_workers(site, HOST, **busy(0)) for site in (None, HOST))
    for world in (alone, beside):
        world.report("w1@s0", SHARING, HOST, **busy(0, 3))
    one, other = (world.fleet.workers[ActorId("w0.1")] for world in (alone, beside))
    assert other.prefill_s(512, 0, 100.0) == pytest.approx(1.55 * one.prefill_s(512, 0, 100.0))
    assert other.streams_crowded() == pytest.approx(1 + 0.85 * 3 / 4), "the third of three has ended by then"
    beside.report("w0@s0", SHARING, HOST, **busy(0, 4))
    neighbour = beside.fleet.workers[ActorId("w1.1")]
    assert neighbour.step_s == pytest.approx(1.85 * neighbour.alone_s), "it was told at once"
    beside.fleet.forget(ActorId("w0.1"))
    beside.report("w1@s0", SHARING, HOST, **busy(0, 3))
    assert neighbour.step_s == neighbour.alone_s
    beside.fleet.forget(ActorId("w1.1"))
    assert beside.fleet.sites == {}


def test_sites_of_their_own_change_no_decision() -> None:
    """If it failed, clusters of one worker a host or a GPU would be placed differently than before."""
    decided = []
    for told in (False, True):
        world, rng = World(policy=fetching(1 / 4e9)), random.Random(7)
        for _ in range(150):
            name = f"w{rng.randrange(6)}"
            site = Site(name, cores=2, threads=2) if told else None
            world.report(
                f"{name}@s{name[1:]}", SHARING, site, **busy(rng.choice((0, 300, 4000)), rng.randrange(9))
            )
            begin = rng.randrange(0, 40_000, 500)
            choice = world.place(pack(range(begin, begin + rng.choice((64, 900)))), rng.choice((2, 100)))
            decided.append((told, choice.prefill, choice.decode, choice.seconds, choice.candidates))
            world.now += 0.02
    half = len(decided) // 2
    assert [one[1:] for one in decided[:half]] == [one[1:] for one in decided[half:]]
    assert len({one[1] for one in decided}) == 6


def test_the_busiest_of_a_site_is_looked_at_among_many_hosts() -> None:
    """If it failed, idle workers beside busy ones, with the shortest queues, would be all that is priced."""
    world = World()
    for host in range(8):
        for i in range(2):
            name = f"w{2 * host + i}@s{host}"
            world.report(name, SHARING, Site(f"h{host}", 2, 2), **busy(0, 4 if i == 0 else 0))
    assert int(world.place(pack(range(32)), 300).decode[1:-2]) % 2 == 0


def test_slices_of_a_site() -> None:
    """If it failed, workers with cores enough for all of them would be priced as if they crowded one another."""
    assert Site("a", cores=64, threads=16).slices(3) == 1.0
    assert Site("a", cores=64, threads=16).slices(7) == 2.0
    assert Site("gpu").slices(1) == 2.0
    assert COSTS.crowded(2.0, prompts=True) == 2.0, "shared in time unless something else was measured"
