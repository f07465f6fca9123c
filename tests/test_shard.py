"""The shard's core: its answers, the order of the queue, what happens on its timer, and the caller's side of calls."""

import math

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from memserve.actions import Kill, Log, Overslept, Send
from memserve.errors import PoolError
from memserve.mempool.leases import STARVED_S
from memserve.mempool.pool import Pool
from memserve.mempool.shard import ShardCore
from memserve.mempool.shard_calls import ShardCalls
from memserve.messages import Cluster, Gone, Load, Member, Planned
from memserve.pool_messages import (
    Acquire,
    Acquired,
    Adopt,
    Adopted,
    Allocated,
    AllocMem,
    Freed,
    FreeMem,
    Insert,
    Inserted,
    Match,
)
from memserve.tokens import pack

PAGE = 4
PROMPT = pack(range(9))  # three pages


class Shard:
    """A core with a clock that the test advances."""

    def __init__(self, pages=8, **limits):
        self.core = ShardCore(Pool(pages, PAGE, 5.0), **limits)
        self.now = 0.0

    def say(self, sender, message):
        self.core.receive(sender, message, self.now)
        self.core.check()
        return self.heard()

    def wait(self, seconds):
        self.now += seconds
        self.core.advance(self.now)
        self.core.check()
        return self.heard()

    def heard(self):
        """Its actions: (to, message) for a Send, text for a Kill or a log event."""
        return [_plain(action) for action in self.core.take()]


def _plain(action):
    match action:
        case Send(to, message):
            return to, message
        case Kill(actor):
            return f"{actor} killed"
        case Log(_, event):
            return event


def load(actor):
    return Load(Member(actor, "PrefillWorker", "", 1, "ready"))


def test_the_way_of_one_request():
    """The calls of one request, from the prefill worker's Acquire to the decode worker's FreeMem, and the gauges after
    them."""
    shard = Shard()
    [(_, acquired)] = shard.say("p.1", Acquire(1, "anne", PROMPT, 1))
    lease = acquired.lease

    assert acquired == Acquired(1, lease, (0, 1, 2, 3), 0)
    assert shard.say("p.1", Insert(2, lease, 0, PROMPT[:32])) == [("p.1", Inserted(2, 0))]
    assert shard.say("d.1", Adopt(1, lease, "p.1")) == [("d.1", Adopted(1))]
    assert shard.say("d.1", AllocMem(2, lease, 2)) == [("d.1", Allocated(2, lease, (4, 5)))]
    assert shard.say("d.1", FreeMem(lease)) == []
    gauges = shard.core.gauges()
    assert (gauges["pages_total"], gauges["pages_free"], gauges["pages_indexed"]) == (8, 6, 2)
    assert (gauges["handed_over_pages_total"], gauges["handoff_bytes_copied_total"]) == (4, 0)
    assert gauges["leases"] == gauges["waiting_acquires"] == gauges["pages_leased"] == 0


def test_waiting_acquires_are_granted_in_order():
    """Waiting acquires are granted in order of arrival: a small one must not overtake a long prompt again and again."""
    shard = Shard(pages=4)
    [(_, first)] = shard.say("p.1", Acquire(1, "anne", PROMPT, 0))

    assert shard.say("p.2", Acquire(1, "anne", PROMPT, 1)) == []
    assert shard.say("p.1", Acquire(2, "anne", pack([1]), 0)) == []  # would fit, but is not first
    assert shard.core.gauges()["waiting_acquires"] == 2
    assert [to for to, _ in shard.say("p.1", FreeMem(first.lease))] == ["p.2"]


def test_an_acquire_is_granted_once_however_often_it_is_repeated():
    """A repeated Acquire gets the first answer again and no second lease; after the lease ended it is refused."""
    shard = Shard(pages=4)
    [granted] = shard.say("p.1", Acquire(1, "anne", PROMPT, 0))

    assert shard.say("p.1", Acquire(1, "anne", PROMPT, 0)) == [granted]
    shard.say("p.1", Acquire(2, "anne", PROMPT, 0))
    assert shard.say("p.1", Acquire(2, "anne", PROMPT, 0)) == []  # waits; once is enough
    [(_, second)] = shard.say("p.1", FreeMem(granted[1].lease))
    assert second.call == 2
    [(_, refused)] = shard.say("p.1", Acquire(1, "anne", PROMPT, 0))
    assert (refused.call, refused.code) == (1, PoolError.UNKNOWN_LEASE)
    assert shard.core.gauges()["leases"] == 1


def test_a_repeated_alloc_mem_adds_no_pages():
    """A repeated AllocMem gets the first answer again and adds no pages."""
    shard = Shard()
    [(_, granted)] = shard.say("p.1", Acquire(1, "anne", PROMPT, 0))
    answer = shard.say("p.1", AllocMem(2, granted.lease, 2))

    assert shard.say("p.1", AllocMem(2, granted.lease, 2)) == answer
    assert shard.core.gauges()["pages_leased"] == 5


def test_a_withdrawn_acquire_is_not_granted():
    """A waiting Acquire that was withdrawn is never granted, and late repeats of it are ignored."""
    shard = Shard(pages=4)
    [(_, first)] = shard.say("p.1", Acquire(1, "anne", PROMPT, 0))
    shard.say("p.1", Acquire(2, "anne", PROMPT, 0))
    shard.say("p.2", Acquire(1, "anne", pack([1]), 0))

    withdrawn = ("p.1", Freed(2, 0))
    assert shard.say("p.1", FreeMem(lease=0, call=2)) == [withdrawn, ("p.2", Acquired(1, 2, (3,), 0))]
    assert shard.say("p.1", FreeMem(lease=0, call=2)) == [withdrawn]  # its answer was lost
    assert shard.say("p.1", Acquire(2, "anne", PROMPT, 0)) == []  # a late repeat of it
    assert shard.say("p.1", FreeMem(first.lease)) == []


def test_a_withdrawal_that_crosses_the_grant_ends_the_lease():
    """Withdrawing an Acquire that was just granted ends its lease: the worker no longer expects the answer."""
    shard = Shard()
    [(_, granted)] = shard.say("p.1", Acquire(1, "anne", PROMPT, 0))

    assert shard.say("p.1", FreeMem(lease=0, call=1)) == [("p.1", Freed(1, 0))]
    assert shard.core.gauges()["pages_free"] == 8
    assert shard.say("p.1", FreeMem(granted.lease)) == [
        "free refused"
    ]  # the worker's own, on the late answer


def test_a_withdrawal_that_crosses_a_lease_s_growth_takes_the_pages_back():
    """If it did not, a program that gives up would hold pages that it has never heard of."""
    shard = Shard()
    [(_, granted)] = shard.say("p.1", Acquire(1, "anne", PROMPT, 0))
    shard.say("p.1", AllocMem(2, granted.lease, 2))
    assert shard.say("p.1", FreeMem(lease=0, call=2)) == [("p.1", Freed(2, 0))]
    assert shard.core.gauges()["pages_free"] == 5
    shard.say("p.1", AllocMem(4, granted.lease, 1))
    shard.say("p.1", Insert(5, granted.lease, 0, pack(range(16))))
    shard.say("p.1", FreeMem(lease=0, call=4))  # by one who has used them: nothing happens
    assert shard.core.gauges()["pages_free"] == 4
    shard.say("p.1", AllocMem(3, granted.lease, 2))
    shard.say("p.1", FreeMem(granted.lease))
    assert shard.say("p.1", FreeMem(lease=0, call=3)) == [("p.1", Freed(3, 0))]
    assert shard.core.gauges()["pages_leased"] == 0


def test_the_queue_has_a_limit():
    """Beyond waiting_max an Acquire is refused with QUEUE_FULL; one that can never fit is refused at once."""
    shard = Shard(pages=3, waiting_max=1)
    shard.say("p.1", Acquire(1, "anne", PROMPT, 0))
    shard.say("p.1", Acquire(2, "anne", PROMPT, 0))
    [(to, refused)] = shard.say("p.1", Acquire(3, "anne", PROMPT, 0))

    assert (to, refused.call, refused.code) == ("p.1", 3, PoolError.QUEUE_FULL)
    [(_, refused)] = shard.say("p.1", Acquire(4, "anne", PROMPT, 1))
    assert refused.code == PoolError.TOO_LARGE  # at once: no wait could help


def test_a_wrong_call_is_refused_at_once_and_not_from_the_queue():
    """If it waited, its refusal would come out of whatever message frees pages: the shard would end there."""
    shard = Shard(pages=3)
    [(_, first)] = shard.say("p.1", Acquire(1, "anne", PROMPT, 0))
    shard.say("p.1", Acquire(2, "anne", PROMPT, 0))
    for wrong in (Match(1, "anne", b"abc"), Acquire(1, "anne", b"abc", 0), Acquire(1, "anne", b"", -1)):
        [(_, refused)] = shard.say("p.2", wrong)
        assert refused.code in (PoolError.NOT_WHOLE_PAGES, PoolError.BAD_COUNT)
        shard = Shard(pages=3)
        [(_, first)] = shard.say("p.1", Acquire(1, "anne", PROMPT, 0))
        shard.say("p.1", Acquire(2, "anne", PROMPT, 0))
    assert [answer.call for _, answer in shard.say("p.1", FreeMem(first.lease))] == [2]


def test_alloc_mem_never_waits():
    """An AllocMem that cannot be granted is refused at once: two running requests must not wait for each other."""
    shard = Shard(pages=3)
    [(_, granted)] = shard.say("p.1", Acquire(1, "anne", PROMPT, 0))
    [(_, refused)] = shard.say("p.1", AllocMem(2, granted.lease, 1))

    assert (refused.call, refused.code) == (2, PoolError.TOO_LARGE)
    shard = Shard(pages=4)
    [(_, granted)] = shard.say("p.1", Acquire(1, "anne", pack([1]), 0))
    shard.say("p.1", Acquire(2, "bob", PROMPT, 0))
    [(_, refused)] = shard.say("p.1", AllocMem(3, granted.lease, 1))
    assert (refused.call, refused.code) == (3, PoolError.NO_PAGES)


def test_what_comes_free_goes_first_to_a_lease_that_was_refused():
    """Free pages go to a lease whose AllocMem was refused before the queue, where the request that gave them up waits."""
    shard = Shard(pages=4)
    [(_, old)] = shard.say("p.1", Acquire(1, "anne", pack([1]), 0))
    [(_, young)] = shard.say("p.1", Acquire(2, "bob", PROMPT, 0))
    [(_, refused)] = shard.say("p.1", AllocMem(3, old.lease, 1))
    assert refused.code == PoolError.NO_PAGES
    shard.say("p.1", FreeMem(young.lease, 4))
    assert shard.say("p.1", Acquire(5, "bob", PROMPT, 0)) == []
    assert [type(one) for _, one in shard.say("p.1", AllocMem(6, old.lease, 1))] == [Allocated]
    assert shard.core.gauges()["waiting_acquires"] == 1


def test_a_refused_lease_that_asks_no_more_holds_nobody_up():
    """A refused lease that does not ask again holds up the queue for STARVED_S at most."""
    shard = Shard(pages=4)
    [(_, old)] = shard.say("p.1", Acquire(1, "anne", pack([1]), 0))
    [(_, young)] = shard.say("p.1", Acquire(2, "bob", PROMPT, 0))
    shard.say("p.1", AllocMem(3, old.lease, 1))
    shard.say("p.1", FreeMem(young.lease, 4))
    assert shard.say("p.1", Acquire(5, "bob", PROMPT, 0)) == []
    assert shard.core.deadline == STARVED_S
    assert [type(one) for _, one in shard.wait(STARVED_S)] == [Acquired]


def test_a_silent_owner_loses_its_leases_on_the_timer():
    """An owner without heartbeats is killed and its leases end on a timer, without any new call."""
    shard = Shard()
    shard.say("p.1", Acquire(1, "anne", PROMPT, 0))
    assert shard.core.deadline == 5.0
    shard.now = 4.0
    shard.say("p.1", load("p.1"))
    assert shard.core.deadline == 9.0

    assert shard.wait(4.9) == []
    assert shard.wait(0.1) == ["p.1 killed", "lease expired"]
    assert shard.core.deadline == math.inf
    assert shard.core.gauges()["pages_free"] == 8


def test_a_silent_waiter_leaves_the_queue():
    """Waiting acquires of an owner without heartbeats are removed."""
    shard = Shard(pages=3)
    shard.say("p.1", Acquire(1, "anne", PROMPT, 0))
    shard.say("p.2", Acquire(1, "anne", PROMPT, 0))
    shard.now = 3.0
    shard.say("p.1", load("p.1"))

    assert shard.wait(2.0) == ["lease expired"]
    assert shard.core.gauges()["waiting_acquires"] == 0


def test_the_pages_of_the_gone_go_to_the_waiting():
    """When an owner is announced gone, its leases and waiting calls end, and the next in the queue gets the pages."""
    shard = Shard(pages=3)
    shard.say("p.1", Acquire(1, "anne", PROMPT, 0))
    shard.say("p.1", Acquire(2, "anne", PROMPT, 0))
    shard.say("p.2", Acquire(1, "anne", PROMPT, 0))
    event, (to, granted) = shard.say("g.1", Gone(("p.1", "f.1")))

    assert (event, to, granted.call) == ("owner gone", "p.2", 1)
    assert shard.say("g.1", Gone(("p.1",))) == []


def test_misuse_is_refused_and_logged():
    """Calls on a lease by anyone but its owner are refused, and messages that a shard does not expect are logged."""
    shard = Shard()
    [(_, granted)] = shard.say("p.1", Acquire(1, "anne", PROMPT, 0))

    assert shard.say("p.2", FreeMem(granted.lease)) == ["free refused"]
    [(_, refused)] = shard.say("p.2", Insert(1, granted.lease, 0, PROMPT[:16]))
    assert refused.code == PoolError.NOT_OWNER
    [(_, refused)] = shard.say("p.2", Adopt(2, granted.lease, "p.9"))
    assert refused.code == PoolError.NOT_OWNER
    assert shard.say("f.1", Planned("r", 0, None)) == ["unexpected message"]
    assert shard.say("g.1", Cluster("g.1", ())) == []


def test_old_answers_are_forgotten_but_not_granted_again():
    """A very late repeat of a call whose answer was forgotten is refused instead of granted again."""
    shard = Shard(remembered_max=4)
    for call in range(1, 11):
        [(_, granted)] = shard.say("p.1", Acquire(call, "anne", PROMPT, 0))
        shard.say("p.1", FreeMem(granted.lease))
    [(_, refused)] = shard.say("p.1", Acquire(1, "anne", PROMPT, 0))

    assert refused.code == PoolError.UNKNOWN_LEASE
    assert shard.core.gauges()["leases"] == 0


class ShardUnderFire(RuleBasedStateMachine):
    """Workers that send, repeat, withdraw and die in any order: each lease of the shard is known to its owner."""

    def __init__(self):
        super().__init__()
        self.shard = Shard(pages=6, waiting_max=3, remembered_max=8)
        self.calls = {name: ShardCalls() for name in ("p.1", "d.1")}
        self.sent: list[tuple[str, Acquire | AllocMem]] = []
        self.leases: dict[int, str] = {}

    def hear(self, heard):
        """Workers take their answers; a grant that nobody waits for is given back, as the protocol demands."""
        while heard:
            item = heard.pop(0)
            if isinstance(item, str):
                continue
            to, answer = item
            key = self.calls[to].answered(answer.call)
            if isinstance(answer, Acquired) and key is not None:
                self.leases[answer.lease] = to
            elif isinstance(answer, Acquired) and self.leases.get(answer.lease) != to:
                heard += self.shard.say(to, FreeMem(answer.lease))

    def send(self, sender, message):
        if isinstance(message, Acquire | AllocMem):
            self.sent.append((sender, message))
        self.hear(self.shard.say(sender, message))

    @rule(sender=st.sampled_from(["p.1", "d.1"]), tokens=st.integers(1, 20), extra=st.integers(0, 2))
    def acquire(self, sender, tokens, extra):
        key = len(self.sent) % 5
        self.send(
            sender,
            self.calls[sender].ask(
                key, lambda call: Acquire(call, "anne", pack(range(tokens)), extra), grants=True
            ),
        )

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def repeat(self, data):
        self.send(*data.draw(st.sampled_from(self.sent)))

    @rule(sender=st.sampled_from(["p.1", "d.1"]), key=st.integers(0, 4))
    def give_up(self, sender, key):
        for withdrawal in self.calls[sender].forget(key):
            self.send(sender, withdrawal)

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), n=st.integers(0, 3))
    def alloc(self, data, n):
        lease = data.draw(st.sampled_from(sorted(self.leases)))
        sender = self.leases[lease]
        self.send(sender, self.calls[sender].ask("a", lambda call: AllocMem(call, lease, n)))

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def free(self, data):
        lease = data.draw(st.sampled_from(sorted(self.leases)))
        self.send(self.leases.pop(lease), FreeMem(lease))

    @rule(actor=st.sampled_from(["p.1", "d.1"]))
    def die(self, actor):
        """A dead actor is replaced under the same name with new call numbers, and the old one's repeats stop."""
        self.leases = {lease: owner for lease, owner in self.leases.items() if owner != actor}
        self.sent = [(sender, message) for sender, message in self.sent if sender != actor]
        self.calls[actor] = ShardCalls()
        self.hear(self.shard.say("g.1", Gone((actor,))))

    @rule(seconds=st.integers(1, 3))
    def live(self, seconds):
        for actor in ("p.1", "d.1"):
            self.hear(self.shard.say(actor, load(actor)))
        self.hear(self.shard.wait(seconds))

    @invariant()
    def every_lease_is_known_to_its_owner(self):
        assert len(self.shard.core.pool.leases) == len(self.leases)
        waiting = self.shard.core.gauges()["waiting_acquires"]
        assert waiting == sum(len(calls) for calls in self.calls.values())


ShardUnderFire.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestShardUnderFire = ShardUnderFire.TestCase
TestShardUnderFire.__doc__ = "A lease that only the shard knows of is memory lost until its worker dies."


def test_calls_remember_what_they_are_for():
    """ShardCalls numbers calls, finds the request that an answer belongs to, and withdraws forgotten calls."""
    calls = ShardCalls()
    acquire = calls.ask("r1", lambda call: Acquire(call, "anne", PROMPT, 2), grants=True)
    alloc = calls.ask("r2", lambda call: AllocMem(call, 7, 3))

    assert (acquire.call, alloc.call) == (1, 2)
    assert calls.ask("r1", lambda call: Insert(call, 7, 16, PROMPT)) == Insert(3, 7, 16, PROMPT)
    assert calls.ask("r2", lambda call: Adopt(call, 7, "p.1")) == Adopt(4, 7, "p.1")
    assert calls.answered(2) == "r2"
    assert calls.answered(2) is None
    assert calls.forget("r1") == (FreeMem(lease=0, call=1),)
    assert calls.answered(1) is None
    assert len(calls) == 1


def test_a_shard_that_was_stopped_ends_nobodys_leases():
    """A shard that was suspended gives every owner a full lease time: their heartbeats are still in its inbox."""
    shard = Shard()
    shard.say("p.1", Acquire(1, "anne", PROMPT, 0))
    shard.now = 60.0
    shard.say("s0.1", Overslept())
    assert shard.wait(4.9) == []
    assert "p.1 killed" not in shard.wait(0.2)  # it never reported a process
    assert len(shard.core.pool.leases) == 0


def test_log_lines_carry_their_figures():
    """The log line of an expired lease has its owner and how many leases and pages it freed."""
    shard = Shard()
    shard.core.receive("p.1", Acquire(1, "anne", PROMPT, 0), 0.0)
    shard.core.take()
    shard.core.advance(5.0)

    data = {"owner": "p.1", "leases": 1, "pages_freed": 3, "waiting_acquires": 0}
    assert shard.core.take() == [Log("warning", "lease expired", data)]
