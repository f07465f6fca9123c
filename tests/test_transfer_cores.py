"""The two cores of a transfer under loss, repetition, delay, cuts, pauses and death, in virtual time."""

from __future__ import annotations

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memserve.actions import Kill
from memserve.messages import Gone
from memserve.transfer.incoming import GONE_REMEMBERED, QUARANTINE_S, Incoming, LandingRefused
from memserve.transfer.messages import (
    Expect,
    Order,
    Post,
    Ready,
    Received,
    ReceiveFailed,
    Report,
    StopReceiving,
    StopWriting,
    TransferArrived,
    TransferGranted,
    TransferOffer,
    TransferRefused,
    TransferSent,
    TransferStop,
    TransferWithdrawn,
    Withdraw,
    Write,
    WriteFailed,
    Wrote,
)
from memserve.transfer.outgoing import Outgoing
from memserve.transfer.values import (
    Failure,
    Granularity,
    Piece,
    TransferDone,
    TransferFailed,
    Way,
)
from transfer_world import GEOMETRY, Faults, Pool, World

MAPPED, TCP, NIXL = Way("mapped", "m"), Way("tcp", "t"), Way("nixl", "n")
OFFER = TransferOffer(
    1,
    2,
    GEOMETRY.page_bytes,
    GEOMETRY.layers,
    Granularity.AGGREGATED,
    "host",
    7,
    ("mapped", "tcp", "nixl"),
    5.0,
)


# ---- the whole conversation ----------------------------------------------------------------------------------

HOSTILE = st.builds(
    Faults,
    lose=st.sampled_from([0.0, 0.1, 0.5]),
    repeat=st.sampled_from([0.0, 0.2]),
    cut=st.sampled_from([0.0, 0.1]),
    delay_s=st.sampled_from([0.001, 0.05, 0.5]),
    refuse_commit=st.sampled_from([0.0, 0.2]),
)
EVENT = st.tuples(
    st.sampled_from(["send", "send", "send", "feed", "kill", "pause", "libel", "wait", "evict"]),
    st.integers(0, 2),
    st.integers(0, 2),
    st.integers(1, 6),
)


@settings(max_examples=500, deadline=None)
@given(
    HOSTILE,
    st.lists(EVENT, max_size=25),
    st.sampled_from([("mapped",), ("tcp",), ("mapped", "tcp")]),
    st.integers(0, 1 << 32),
)
def test_nothing_leaks_and_no_half_written_page_is_ever_acknowledged(faults, events, paths, seed):
    """If it failed, some order of losses, pauses and deaths would leak pages, or serve one request another's KV.

    The world asserts at every store that the page is still the transfer's, and at every commit that it is whole.
    """
    world = World(faults, seed)
    names = ["a", "b", "c"]
    running = [world.shard(name, paths=paths) for name in names]
    for what, i, j, amount in events:
        sender, receiver = running[i], running[j]
        if what in ("send", "feed") and i != j:
            world.send(sender, receiver, amount, seconds=amount / 2, fed=what == "feed")
        elif what == "kill":
            world.kill(sender.id)
            running[i] = world.shard(names[i], paths=paths)
        elif what == "pause":
            world.pause(sender.id, amount)
        elif what == "libel":  # declared dead, but it lives
            world.announce(sender.id)
        elif what == "evict":
            sender.pool.forget()
        world.run(world.now + amount * faults.delay_s)

    world.faults = attrs.evolve(faults, lose=0.0)  # the network heals: within its lifetime all must end
    world.run(world.now + 300.0)
    world.settled()


@pytest.mark.parametrize("path", ["mapped", "tcp"])
def test_in_a_good_world_everything_arrives(path):
    """If it failed, the hypothesis above could hold because nothing ever arrives."""
    world = World(Faults(), 1)
    sender, receiver = world.shard("a", paths=(path,)), world.shard("b", paths=(path,))
    numbers = [world.send(sender, receiver, 3, 5.0, fed=bool(i % 2)) for i in range(4)]
    world.run(5.0)

    assert [type(sender.reports[number]) for number in numbers] == [TransferDone] * 4
    assert sorted(receiver.pool.committed) == [(sender.id, number) for number in numbers]
    world.settled()


def test_a_full_receiver_says_so_at_once():
    """If the sender had to wait for its deadline, every transfer to a full shard would cost a request seconds."""
    world = World(Faults(), 1)
    sender, receiver = world.shard("a"), world.shard("b", pages=4)
    number = world.send(sender, receiver, 5, seconds=60.0)
    world.run(0.1)

    assert sender.reports[number].failure is Failure.RECEIVER_FULL
    world.settled()


# ---- the receiver's side -------------------------------------------------------------------------------------


class Landing:
    """Grants pages 0, 1, 2, ... and writes down what it is told."""

    def __init__(self, refuse=None):
        self.calls, self.next, self.refuse = [], 0, refuse

    def grant(self, key, offer):
        """See the protocol."""
        if self.refuse == "grant":
            raise LandingRefused(Failure.RECEIVER_FULL, "full")
        self.next += offer.pages
        return tuple(range(self.next - offer.pages, self.next))

    def commit(self, key, offer, pages):
        """See the protocol."""
        if self.refuse == "commit":
            raise LandingRefused(Failure.REFUSED, "the tokens do not fit")
        self.calls.append(("commit", key, pages))

    def release(self, key, pages):
        """See the protocol."""
        self.calls.append(("release", key, pages))


def incoming(*ways, refuse=None, **limits):
    """A receiver's core, and its landing."""
    landing = Landing(refuse)
    return Incoming(GEOMETRY, "host", landing, ways, **limits), landing


def test_written_by_the_sender_it_is_complete_when_the_sender_says_so():
    """If anything were acknowledged before, a sender could count on pages that cannot be matched."""
    core, landing = incoming(MAPPED, TCP)
    core.receive("a.1", OFFER, 0.0)
    assert core.take() == [Post("a.1", TransferGranted(1, (0, 1), MAPPED))]
    core.receive("a.1", TransferSent(1), 1.0)

    assert landing.calls == [("commit", ("a.1", 1), (0, 1))]
    assert core.take() == [Post("a.1", TransferArrived(1))]
    assert core.deadline == float("inf")


def test_read_here_it_is_complete_when_it_was_read():
    """If the sender's word counted, bytes that are still in a socket would be served."""
    core, landing = incoming(TCP)
    core.receive("a.1", OFFER, 0.0)
    expect = Expect("a.1", 1, (0, 1), Granularity.AGGREGATED, 5.0)
    assert core.take() == [expect, Post("a.1", TransferGranted(1, (0, 1), TCP))]
    core.receive("a.1", TransferSent(1), 1.0)
    assert landing.calls == [] and core.take() == []
    core.receive("b.1", Received("a.1", 1), 1.0)

    assert landing.calls == [("commit", ("a.1", 1), (0, 1))]
    assert core.take() == [Post("a.1", TransferArrived(1))]


def test_every_repeat_gets_the_same_answer_and_no_second_grant():
    """If a lost answer led to a second grant, the first pages would leak."""
    core, landing = incoming(MAPPED)
    for _ in range(3):
        core.receive("a.1", OFFER, 0.0)
        assert core.take() == [Post("a.1", TransferGranted(1, (0, 1), MAPPED))]
    for _ in range(3):
        core.receive("a.1", TransferSent(1), 1.0)
        assert core.take() == [Post("a.1", TransferArrived(1))]
    core.receive("a.1", OFFER, 2.0)

    assert core.take() == [Post("a.1", TransferArrived(1))]
    assert landing.calls == [("commit", ("a.1", 1), (0, 1))]


def test_late_pages_stay_taken_until_their_writer_has_stopped():
    """If they were freed at the deadline, a slow sender would write into another request's KV."""
    core, landing = incoming(MAPPED)
    core.receive("a.1", OFFER, 0.0)
    core.take()
    core.advance(5.0)
    assert core.take() == [Post("a.1", TransferStop(1))]
    core.advance(core.deadline)
    assert core.take() == [Post("a.1", TransferStop(1))]
    assert landing.calls == []
    core.receive("a.1", TransferWithdrawn(1), 7.0)

    assert landing.calls == [("release", ("a.1", 1), (0, 1))]
    assert [post.message.failure for post in core.take()] == [Failure.DEADLINE]
    assert len(core) == 0


def test_what_is_read_here_stops_here():
    """If the pages were freed before the socket is left alone, its bytes would land in another request's KV."""
    core, landing = incoming(TCP)
    core.receive("a.1", OFFER, 0.0)
    core.take()
    core.advance(5.0)
    assert core.take() == [StopReceiving("a.1", 1)] and landing.calls == []
    core.receive("b.1", ReceiveFailed("a.1", 1, Failure.WITHDRAWN, "stopped"), 5.0)

    assert landing.calls == [("release", ("a.1", 1), (0, 1))]
    assert [post.message.failure for post in core.take()] == [Failure.DEADLINE]


def test_a_dead_sender_is_killed_for_good_before_its_pages_are_free():
    """If it only slept, it would go on copying when it wakes, into pages that are somebody else's."""
    core, landing = incoming(MAPPED)
    for number in (1, 2):
        core.receive("a.1", attrs.evolve(OFFER, id=number), 0.0)
    core.take()
    core.receive("scheduler", Gone(("a.1",)), 1.0)

    assert core.take()[0] == Kill("a.1", 7)
    assert [call[0] for call in landing.calls] == ["release", "release"]
    core.receive("a.1", attrs.evolve(OFFER, id=3), 2.0)  # was still on its way
    assert [post.message.failure for post in core.take()] == [Failure.PEER_GONE]
    assert len(core) == 0


def test_a_dead_sender_with_rdma_is_waited_for():
    """If its pages were freed at once, a write that its network card still repeats would land in them."""
    core, landing = incoming(NIXL)
    core.receive("a.1", OFFER, 0.0)
    core.receive("scheduler", Gone(("a.1",)), 1.0)
    core.advance(QUARANTINE_S)
    assert landing.calls == []
    assert core.deadline == 1.0 + QUARANTINE_S
    core.advance(1.0 + QUARANTINE_S)

    assert landing.calls == [("release", ("a.1", 1), (0, 1))]
    core.check()


def test_the_dead_are_remembered_within_limits():
    """If every dead actor were remembered, a shard would grow as long as its cluster lives."""
    core, _ = incoming(MAPPED)
    core.receive("scheduler", Gone(tuple(f"a.{i}" for i in range(GONE_REMEMBERED + 10))), 1.0)
    core.check()


def test_an_offer_after_its_own_withdrawal_is_not_granted():
    """If it were, its pages would be held until a deadline for nobody."""
    core, _ = incoming(MAPPED)
    core.receive("a.1", TransferWithdrawn(1), 0.0)
    core.receive("a.1", OFFER, 0.1)

    assert [post.message.failure for post in core.take()] == [Failure.WITHDRAWN]


@pytest.mark.parametrize(
    ("offer", "ways", "refuse", "failure", "text"),
    [
        (
            attrs.evolve(OFFER, page_bytes=8),
            (MAPPED,),
            None,
            Failure.REFUSED,
            "must have 4 bytes in 2 layers",
        ),
        (attrs.evolve(OFFER, layers=0), (MAPPED,), None, Failure.REFUSED, "4 bytes in 0 layers"),
        (attrs.evolve(OFFER, pages=0), (MAPPED,), None, Failure.REFUSED, "0 pages"),
        (attrs.evolve(OFFER, host="other"), (MAPPED,), None, Failure.REFUSED, "no common path"),
        (attrs.evolve(OFFER, paths=("nixl",)), (TCP,), None, Failure.REFUSED, "nixl there, tcp here"),
        (OFFER, (MAPPED,), "grant", Failure.RECEIVER_FULL, "full"),
    ],
)
def test_what_cannot_be_received_is_refused_with_a_reason(offer, ways, refuse, failure, text):
    """If the sender were told nothing, or granted what does not fit, it would wait, or write across page borders."""
    core, _ = incoming(*ways, refuse=refuse)
    core.receive("a.1", offer, 0.0)
    [post] = core.take()
    assert post.message.failure is failure and text in post.message.message
    assert len(core) == 0


def test_transfers_under_way_are_limited():
    """If they were not, one shard's senders could fill another's memory with its records."""
    core, _ = incoming(MAPPED, receiving_max=1)
    core.receive("a.1", OFFER, 0.0)
    core.take()
    core.receive("a.1", attrs.evolve(OFFER, id=2), 0.0)
    assert [post.message.failure for post in core.take()] == [Failure.RECEIVER_FULL]


def test_a_refused_insert_is_no_arrival():
    """If it were acknowledged, the sender would free pages that nobody has."""
    core, landing = incoming(MAPPED, refuse="commit")
    core.receive("a.1", OFFER, 0.0)
    core.take()
    core.receive("a.1", TransferSent(1), 0.0)

    assert [post.message for post in core.take()] == [
        TransferRefused(1, Failure.REFUSED, "the tokens do not fit")
    ]
    assert landing.calls == [("release", ("a.1", 1), (0, 1))]


def test_what_is_too_old_to_be_remembered_does_not_begin_again():
    """If a message from long ago were granted again, its pages would be held for nobody."""
    core, _ = incoming(MAPPED, remembered_max=2)
    for number in (1, 2, 3):
        core.receive("a.1", attrs.evolve(OFFER, id=number), 0.0)
        core.receive("a.1", TransferSent(number), 0.0)
    core.take()
    core.receive("a.1", OFFER, 1.0)

    [post] = core.take()
    assert "too old" in post.message.message and len(core) == 0


# ---- the sender's side ---------------------------------------------------------------------------------------

ORDER = Order("b.1", 1, (4, 5), 10.0)


def outgoing(**limits):
    """A sender's core."""
    return Outgoing("a.1", GEOMETRY, "host", 7, ("mapped", "tcp"), **limits)


def started(core, order=ORDER):
    """Begin a transfer and have it granted; the actions of the grant."""
    core.receive("a.1", order, 0.0)
    core.take()
    core.receive("b.1", TransferGranted(order.id, (0, 1), MAPPED), 0.0)
    return core.take()


def messages(core):
    """What a core posts now."""
    return [action.message for action in core.take() if isinstance(action, Post)]


def reports(core):
    """What a core reports now."""
    return [action.result for action in core.take() if isinstance(action, Report)]


def test_it_sends_and_asks_until_it_is_answered():
    """If anything were said once only, one lost message would cost a whole transfer."""
    core = outgoing()
    core.receive("a.1", ORDER, 0.0)
    core.advance(core.deadline)
    assert [type(one) for one in messages(core)] == [TransferOffer, TransferOffer]
    core.receive("b.1", TransferGranted(1, (0, 1), MAPPED), 1.0)
    [write] = core.take()
    assert (write.transfer.source, write.transfer.destination) == ((4, 5), (0, 1))
    assert write.deadline == 10.0
    core.receive("a.1", Wrote(1, 8), 2.0)
    core.advance(core.deadline)
    assert messages(core) == [TransferSent(1), TransferSent(1)]
    core.receive("b.1", TransferArrived(1), 3.0)

    assert reports(core) == [TransferDone(1, 2 * GEOMETRY.page_bytes)]
    assert len(core) == 0


def test_stopped_is_said_when_it_is_true_and_not_before():
    """If it were said while the mover still runs, the receiver would free pages that are being written to."""
    core = outgoing()
    started(core)
    core.receive("b.1", TransferStop(1), 5.0)
    assert core.take() == [
        StopWriting(1),
        Report(TransferFailed(1, Failure.DEADLINE, "the receiver's deadline passed first")),
    ]
    core.receive("b.1", TransferStop(1), 5.5)
    assert core.take() == []
    core.receive("a.1", WriteFailed(1, Failure.WITHDRAWN, "stopped"), 6.0)

    assert core.take() == [Post("b.1", TransferWithdrawn(1))]
    core.receive("b.1", TransferStop(1), 7.0)
    assert core.take() == [Post("b.1", TransferWithdrawn(1))], "the first may have been lost"


def test_the_result_comes_at_the_deadline_even_if_the_mover_does_not_stop():
    """If the result waited for the mover, a stuck copy would hang its request."""
    core = outgoing()
    started(core)
    core.advance(10.0)
    stop, report = core.take()
    assert stop == StopWriting(1) and report.result.failure is Failure.DEADLINE
    core.receive("a.1", Wrote(1, 8), 11.0)

    assert core.take() == [Post("b.1", TransferWithdrawn(1))], "finished after the result: not sent"


@pytest.mark.parametrize("state", ["offered", "writing", "sent"])
@pytest.mark.parametrize(
    ("said", "failure"),
    [
        (("scheduler", Gone(("b.1",))), Failure.PEER_GONE),
        (("b.1", TransferRefused(1, Failure.CHECKSUM, "damaged")), Failure.CHECKSUM),
        (("a.1", Withdraw(1)), Failure.WITHDRAWN),
    ],
)
def test_every_end_is_reported_once_in_every_state(state, said, failure):
    """If an end were missed, the request behind it would wait for its deadline; told twice, it would end twice."""
    core = outgoing()
    core.receive("a.1", ORDER, 0.0)
    if state != "offered":
        core.receive("b.1", TransferGranted(1, (0, 1), MAPPED), 0.0)
    if state == "sent":
        core.receive("a.1", Wrote(1, 8), 1.0)
    core.take()
    for _ in range(2):
        core.receive(*said, 2.0)
    core.receive("b.1", TransferArrived(1), 3.0)
    core.advance(20.0)

    assert [one.failure for one in reports(core)] == [failure]
    assert len(core) == (state == "writing")


def test_a_mover_that_fails_ends_it():
    """If a cut were not passed on, the receiver would hold its pages until the deadline."""
    core = outgoing()
    started(core)
    core.receive("a.1", WriteFailed(1, Failure.CUT, "the connection broke"), 1.0)
    assert core.take() == [
        Report(TransferFailed(1, Failure.CUT, "the connection broke")),
        Post("b.1", TransferWithdrawn(1)),
    ]


def test_layers_are_passed_on_as_they_come_and_kept_until_there_is_somewhere_to_send_them():
    """If those that are ready before the grant were dropped, the transfer would never be whole."""
    core = outgoing()
    order = attrs.evolve(ORDER, granularity=Granularity.BY_LAYER, fed=True)
    core.receive("a.1", order, 0.0)
    core.receive("a.1", Ready(1, (Piece(0, 2, 0),)), 0.1)
    core.take()
    core.receive("b.1", TransferGranted(1, (0, 1), MAPPED), 0.2)
    write, first = core.take()
    core.receive("a.1", Ready(1, (Piece(0, 2, 1),)), 0.3)
    [second] = core.take()

    assert isinstance(write, Write) and write.fed
    assert (first.pieces, second.pieces) == ((Piece(0, 2, 0),), (Piece(0, 2, 1),))


@pytest.mark.parametrize(
    ("order", "text"),
    [
        (attrs.evolve(ORDER, source=()), "at least one"),
        (attrs.evolve(ORDER, destination=(1,)), "from 2 pages to 1"),
        (attrs.evolve(ORDER, destination=(1, 1)), "twice"),
        (attrs.evolve(ORDER, fed=True), "only by_layer"),
    ],
)
def test_a_wrong_order_is_refused_here(order, text):
    """If it went out, the receiver would allocate for something that cannot be sent."""
    core = outgoing()
    core.receive("a.1", order, 0.0)
    [report] = core.take()
    assert report.result.failure is Failure.REFUSED and text in report.result.message


def test_a_piece_outside_the_transfer_ends_it():
    """If it were moved, it would be somebody else's page."""
    core = outgoing()
    started(core, attrs.evolve(ORDER, granularity=Granularity.BY_LAYER, fed=True))
    core.receive("a.1", Ready(1, (Piece(1, 2, 0),)), 0.1)
    assert [one.failure for one in reports(core)] == [Failure.REFUSED]


def test_too_many_at_a_time_and_wrong_grants_are_refused():
    """If they were not, a queue would have no limit, and a faulty receiver could mix up pages."""
    core = outgoing(sending_max=1)
    core.receive("a.1", ORDER, 0.0)
    core.take()
    core.receive("a.1", attrs.evolve(ORDER, id=2), 0.0)
    assert [one.failure for one in reports(core)] == [Failure.REFUSED]
    core.receive("c.1", TransferGranted(1, (0, 1), MAPPED), 0.0)  # not whom it was offered to
    assert core.take() == []
    core.receive("b.1", TransferGranted(1, (0, 0), MAPPED), 0.0)
    assert [one.failure for one in reports(core)] == [Failure.REFUSED]


def test_the_model_landing_is_one():
    """If the world's pool did not count, the leak test above could not fail."""
    world = World(Faults(), 1)
    shard = world.shard("a", pages=2)
    pool = Pool(shard, [0, 1])
    pages = pool.grant(("a.1", 1), OFFER)
    with pytest.raises(AssertionError, match="not complete"):
        pool.commit(("a.1", 1), OFFER, pages)
    with pytest.raises(LandingRefused):
        pool.grant(("a.1", 2), OFFER)
