"""Which workers a policy chooses for a request, in situations that are set up by hand."""

from __future__ import annotations

import attrs
import pytest

from memserve.drawing import Sampling
from memserve.identity import ActorId
from memserve.messages import Member, Request
from memserve.scheduling.cost_model import LinkModel
from memserve.scheduling.fleet import SURE_S, Placed
from memserve.scheduling.outputs import TENANTS_MAX, UNKNOWN_TOKENS, OutputLengths
from memserve.scheduling.policies import PLAIN, LongestPrefix, StickySession
from memserve.scheduling.pricing import Cost, Weights
from memserve.scopes import salted
from memserve.tokens import pack
from placement_world import COSTS, DOCUMENT, World, busy, fetching


def test_an_idle_worker_with_the_prefix_wins() -> None:
    """Of idle workers, the one whose shard has the prompt cached gets the request."""
    world = World("w0", "w1", "w2", "w3", "w4", "w5")
    world.cache("s-w4", DOCUMENT)
    choice = world.place()
    assert (choice.prefill, choice.decode, choice.shard) == ("w4.1", "w4.1", "s-w4.1")
    assert choice.expected_tokens == 1600
    assert choice.seconds < 0.05
    assert choice.candidates.startswith("w4.1 ") and choice.candidates.count("ms (") == 3


def test_a_queue_longer_than_the_saving_loses() -> None:
    """A worker with the prefix is not chosen if its queue takes longer than the cache saves."""
    world = World("w1")
    world.report("w0", **busy(4000))
    world.cache("s-w0", DOCUMENT)
    choice = world.place()
    assert (choice.prefill, choice.expected_tokens) == ("w1.1", 0)
    world.report("w0", **busy(300))
    assert world.place().prefill == "w0.1"


def test_a_hot_prefix_gets_a_second_home() -> None:
    """Requests for a hot prefix spread to other workers, which then hold it too: replication follows from the prices."""
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
    """A short prefill runs on the decode worker itself, which is cheaper than a handoff."""
    world = World("p0@s0", "w0@s0")
    world.cache("s0", DOCUMENT)
    choice = world.place(DOCUMENT + pack(range(30)))
    assert (choice.prefill, choice.decode) == ("w0.1", "w0.1")


def test_a_long_prefill_is_run_away_from_many_streams() -> None:
    """A long prefill does not run on a worker with many streams, which would all wait for it."""
    world = World("p0@s0")
    world.report("w0@s0", **busy(0, rows=12))
    choice = world.place()
    assert (choice.prefill, choice.decode, choice.decode_shard) == ("p0.1", "w0.1", "")


@pytest.mark.parametrize(("byte_s", "fetched"), [(1 / 4e9, True), (1 / 20e6, False)])
def test_a_prefix_is_fetched_exactly_when_that_is_cheaper(byte_s: float, fetched: bool) -> None:
    """A prefix on another shard is fetched if that takes less time than computing it, and only then."""
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
    """Planned transfers from one shard count as queued, so that later requests compute the prefix instead."""
    world = World("w0", *(f"w{i}" for i in range(1, 9)), policy=fetching(1e-8))
    world.cache("s-w0", DOCUMENT)
    world.report("w0", **busy(80_000))
    sources = [world.place().source for _ in range(8)]
    assert sources[0] == "s-w0.1" and sources[-1] == ""


def test_a_stream_goes_on_where_it_is_rather_than_afar() -> None:
    """A request decodes on the shard where it prefills, not on another that has the same prefix: its last page is in no
    index."""
    world = World("p0@s0", "d0@s0", "d1@s1", policy=fetching(1e-9))
    world.cache("s0", DOCUMENT)
    world.cache("s1", DOCUMENT)
    world.fleet.placed(ActorId("d0.1"), Placed(world.now), world.now)  # d1 is the one used longest ago
    choice = world.place()
    assert (choice.decode, choice.decode_shard) == ("d0.1", "")


def test_transfers_are_priced_by_the_path_they_take() -> None:
    """Transfers cost what the configured path costs, so that a slow network is not used like a mapped copy."""
    policy = Cost(
        Weights(fetch=True, path="tcp"), {"mapped": LinkModel(0.0, 0.0), "tcp": LinkModel(9.0, 0.0)}
    )
    world = World("w0", "w1", policy=policy)
    world.cache("s-w0", DOCUMENT)
    world.report("w0", **busy(8000))
    assert world.place().source == ""


def full(world: World, *shards: str) -> None:
    """Have the shards report that no page is free."""
    for one in shards:
        member = Member(ActorId(f"{one}.1"), "MemPoolShard", "", 1, "ready", load={"pages_free": 0.0})
        world.fleet.heard(member, world.now)


def test_a_second_copy_costs_what_it_evicts() -> None:
    """On full shards a second copy of a prefix costs what it evicts, so that requests stay with the first."""
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
    """If evicted pages are hardly ever asked for again, evicting costs little, and a hot prefix may be copied."""
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
    """A prefix in host memory is used, but one in the arena is preferred: the copy back has a price."""
    world = World("w0", "w1")
    world.cache("s-w0", DOCUMENT, tier=1)
    assert world.place().prefill == "w0.1"
    world.now += 60
    for one in ("w0", "w1"):
        world.report(one)
    world.cache("s-w1", DOCUMENT)
    assert world.place().prefill == "w1.1"


def test_a_long_prompt_is_kept_from_the_home_of_sessions_that_ask_often() -> None:
    """A long prompt goes to the worker that sessions use less often, although the other was used longest ago."""
    world = World("p0@s0", "p1@s1", "d0@s0", policy=fetching(1e-10))
    chats = [pack(range(5000 + 2000 * i, 5000 + 2000 * i + 1600)) for i in range(8)]
    for i, chat in enumerate(chats):
        world.cache("s0" if i else "s1", chat)
    for chat in reversed(chats):
        assert world.place(chat + pack(range(8))).prefill == ("p1.1" if chat is chats[0] else "p0.1")
        world.now += 0.2
        for one in ("p0@s0", "p1@s1", "d0@s0"):
            world.report(one)
    assert world.fleet.prefills.every.first(1) == ["p0.1"], "the one used longest ago"
    assert world.place().prefill == "p1.1"


def test_a_worker_is_busy_until_a_fetched_prompt_is_run() -> None:
    """A worker counts as busy while the prefix of its next prompt is fetched, until it reports that the prompt ran."""
    world = World("w0", "w1", policy=fetching(1 / 80e6))
    world.cache("s-w0", DOCUMENT)
    world.report("w0", **busy(8000))
    choice = world.place()
    assert (choice.prefill, choice.source) == ("w1.1", "s-w0.1")
    worker = world.fleet.workers[ActorId("w1.1")]
    assert worker.queue_s(world.now) == pytest.approx(choice.seconds, rel=0.01)
    world.report("w1", prompts_taken_total=1.0, **busy(1, rows=1))
    assert worker.queue_s(world.now) == pytest.approx(choice.seconds, rel=0.01)
    world.report("w1", prompts_taken_total=1.0, **busy(0, rows=1))
    assert worker.queue_s(world.now) == 0.0, "it came sooner"


def test_reports_that_lag_are_made_up_for() -> None:
    """Placements count as load until a report can include them, and not twice afterwards."""
    world = World("w0", "w1", "w2", "w3")
    homes = [world.place(pack(range(1000 * i, 1000 * i + 900))).prefill for i in range(8)]
    assert sorted(homes) == sorted(2 * ["w0.1", "w1.1", "w2.1", "w3.1"])
    worker = world.fleet.workers[ActorId("w0.1")]
    assert worker.rows == 2
    world.now += SURE_S
    world.report("w0", **busy(900, rows=1))
    assert (worker.tokens, worker.rows) == (900, 1)


def test_a_report_that_includes_a_placement_ends_it_at_once() -> None:
    """A report that counts a prompt as taken ends that placement's own count at once."""
    world = World("w0")
    world.place(pack(range(900)))
    world.place(pack(range(1000, 1900)))
    world.report("w0", prompts_taken_total=1.0, **busy(900, rows=1))
    worker = world.fleet.workers[ActorId("w0.1")]
    assert (worker.tokens, worker.rows) == (1800, 2)
    world.report("w0", prompts_taken_total=2.0, **busy(1800, rows=2))
    assert (worker.tokens, worker.rows) == (1800, 2)


def test_a_prompt_that_fits_the_last_step_of_a_queue_is_priced_so() -> None:
    """A short prompt that fits in the last step of a queue costs only its share of that step."""
    world = World("w0")
    world.report("w0", **busy(300))
    worker = world.fleet.workers[ActorId("w0.1")]
    before = worker.queue_until
    world.place(pack(range(8)))
    assert worker.queue_until - before < 0.004 < worker.model.queue_s(8, 32)


def test_one_that_only_decodes_gets_no_prompt() -> None:
    """A worker with the decode role gets no prompt, even if it is the only one."""
    world = World("p0@s0", "d0@s0")
    for _ in range(20):
        choice = world.place()
        assert (choice.prefill, choice.decode) == ("p0.1", "d0.1")
    only = World("d0@s0")
    with pytest.raises(AssertionError):
        only.place()


def test_workers_whose_shard_is_gone_are_not_chosen() -> None:
    """Workers that drain, or whose shard is gone, are not chosen."""
    world = World("w0", "w1")
    world.fleet.forget(ActorId("s-w0.1"))
    assert {world.place().prefill for _ in range(4)} == {"w1.1"}
    world.fleet.heard(attrs.evolve(world.fleet.workers[ActorId("w1.1")].member, state="draining"), world.now)
    with pytest.raises(AssertionError):
        world.place()


def test_a_role_may_change() -> None:
    """A worker that changes its role is chosen by the new one."""
    world = World("p0@s0", "d0@s0")
    decode = world.fleet.workers[ActorId("d0.1")].member
    world.fleet.heard(attrs.evolve(decode, role="prefill"), world.now)
    world.fleet.heard(attrs.evolve(world.fleet.workers[ActorId("p0.1")].member, role="decode"), world.now)
    choice = world.place()
    assert (choice.prefill, choice.decode) == ("d0.1", "p0.1")


def test_a_session_stays_where_it_began() -> None:
    """The session policy places every turn of a session on the worker of its first."""
    world = World("w0", "w1", policy=StickySession())
    greeting = pack(range(40))
    first = [world.place(greeting + pack([i])).prefill for i in range(2)]
    assert sorted(first) == ["w0.1", "w1.1"]
    for turn in range(1, 6):
        for i in range(2):
            more = greeting + pack([i]) + pack(range(900, 900 + 50 * turn))
            assert world.place(more).prefill == first[i]


def test_sessions_are_forgotten_beyond_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """The session policy remembers at most SESSIONS_MAX sessions."""
    monkeypatch.setattr("memserve.scheduling.policies.SESSIONS_MAX", 3)
    policy = StickySession()
    world = World("w0", "w1", policy=policy)
    for number in range(20):
        opening = pack(range(100 * (number // 2), 100 * (number // 2) + 40))
        world.place(opening + pack([number]))
        assert sum(len(alike) for alike in policy._sessions.values()) == policy._known <= 3
    assert world.place(opening + pack([19, 1, 2])).prefill and policy._known <= 3


def test_the_longest_prefix_wins_whatever_the_load() -> None:
    """The longest-prefix policy, from section 6 of the paper, ignores load."""
    world = World("w0", policy=LongestPrefix())
    world.report("w1", **busy(50_000))
    world.cache("s-w1", DOCUMENT)
    assert world.place().prefill == "w1.1"
    assert world.place(pack([1])).prefill == "w0.1"


@pytest.mark.parametrize("name", PLAIN)
def test_every_policy_says_what_it_expects(name: str) -> None:
    """Every policy reports how many tokens it expects to be cached."""
    world = World("w0", policy=PLAIN[name]())
    world.cache("s-w0", DOCUMENT)
    assert world.place().expected_tokens == 1600


def test_lengths_of_answers_are_learned_by_tenant() -> None:
    """The expected length of answers is learned for each tenant, limited by max_tokens, for at most TENANTS_MAX tenants."""
    lengths = OutputLengths()
    request = Request("r", 0, ActorId("f.1"), "anne", pack(range(12)), 10, 1000, (), Sampling())
    assert lengths.expect(request) == UNKNOWN_TOKENS
    for _ in range(200):
        lengths.learn("anne", 20)
    assert lengths.expect(request) == pytest.approx(20, abs=0.1)
    assert lengths.expect(attrs.evolve(request, max_tokens=5)) == 3
    assert lengths.expect(attrs.evolve(request, scope="bert")) == UNKNOWN_TOKENS
    assert lengths.expect(attrs.evolve(request, scope=salted("anne", "x"))) == lengths.expect(request)
    for i in range(TENANTS_MAX + 5):
        lengths.learn(f"t{i}", 1)
    assert len(lengths._means) == TENANTS_MAX


def test_a_worker_with_senseless_figures_is_priced_like_one_without() -> None:
    """A worker that reports invalid costs is accepted and priced without them, instead of ending the scheduler."""
    world = World("w0")
    world.report("w1", costs=attrs.evolve(COSTS, dense=((1.0, 0.01), (1.0, 0.01))))
    assert {one.member.id for one in world.fleet.workers.values()} == {"w0.1", "w1.1"}
