"""The receiver's core, step by step: what it grants, when pages are complete, and when they are free again."""

from __future__ import annotations

import attrs
import pytest

from memserve.actions import Kill
from memserve.messages import Gone
from memserve.transfer.actions import Expect, Post, Probe, Received, ReceiveFailed, StopReceiving
from memserve.transfer.incoming import GONE_REMEMBERED, QUARANTINE_S, Incoming, ReceiveRefused
from memserve.transfer_messages import (
    Failure,
    Granularity,
    TransferArrived,
    TransferGranted,
    TransferOffer,
    TransferRefused,
    TransferSent,
    TransferStop,
    TransferWithdrawn,
    Way,
)
from transfer_world import GEOMETRY

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

LEASE = 7


class ReceivingPool:
    """Grants pages 0, 1, 2, ... and records its calls."""

    def __init__(self, refuse=None):
        self.calls, self.next, self.refuse = [], 0, refuse

    def grant(self, key, offer):
        """See the protocol."""
        if self.refuse == "grant":
            raise ReceiveRefused(Failure.RECEIVER_FULL, "full")
        self.next += offer.pages
        return tuple(range(self.next - offer.pages, self.next))

    def commit(self, key, offer, pages):
        """See the protocol."""
        if self.refuse == "commit":
            raise ReceiveRefused(Failure.REFUSED, "the tokens do not fit")
        self.calls.append(("commit", key, pages))
        return LEASE

    def release(self, key, offer, pages):
        """See the protocol."""
        self.calls.append(("release", key, pages))


def incoming(*ways, refuse=None, **limits):
    """A receiver's core and its pool."""
    pool = ReceivingPool(refuse)
    return Incoming(GEOMETRY, "host", pool, ways, **limits), pool


def test_written_by_the_sender_it_is_complete_when_the_sender_says_so():
    """Pages that the sender writes itself are committed when it reports that they are sent."""
    core, pool = incoming(MAPPED, TCP)
    core.receive("a.1", OFFER, 0.0)
    assert core.take() == [Post("a.1", TransferGranted(1, (0, 1), MAPPED))]
    core.receive("a.1", TransferSent(1), 1.0)

    assert pool.calls == [("commit", ("a.1", 1), (0, 1))]
    assert core.take() == [Post("a.1", TransferArrived(1, LEASE))]
    assert core.deadline == float("inf")


def test_read_here_it_is_complete_when_it_was_read():
    """Pages that the receiver reads from a socket are committed when it has read them, not when they were sent."""
    core, pool = incoming(TCP)
    core.receive("a.1", OFFER, 0.0)
    expect = Expect("a.1", 1, (0, 1), Granularity.AGGREGATED, 5.0)
    assert core.take() == [expect, Post("a.1", TransferGranted(1, (0, 1), TCP))]
    core.receive("a.1", TransferSent(1), 1.0)
    assert pool.calls == [] and core.take() == []
    core.receive("b.1", Received("a.1", 1), 1.0)

    assert pool.calls == [("commit", ("a.1", 1), (0, 1))]
    assert core.take() == [Post("a.1", TransferArrived(1, LEASE))]


def test_every_repeat_gets_the_same_answer_and_no_second_grant():
    """A repeated message gets the first answer again, without a second grant."""
    core, pool = incoming(MAPPED)
    for _ in range(3):
        core.receive("a.1", OFFER, 0.0)
        assert core.take() == [Post("a.1", TransferGranted(1, (0, 1), MAPPED))]
    for _ in range(3):
        core.receive("a.1", TransferSent(1), 1.0)
        assert core.take() == [Post("a.1", TransferArrived(1, LEASE))]
    core.receive("a.1", OFFER, 2.0)

    assert core.take() == [Post("a.1", TransferArrived(1, LEASE))]
    assert pool.calls == [("commit", ("a.1", 1), (0, 1))]


def test_late_pages_stay_taken_until_their_writer_has_stopped():
    """After the deadline, pages are released only when their writer has confirmed that it stopped."""
    core, pool = incoming(MAPPED)
    core.receive("a.1", OFFER, 0.0)
    core.take()
    core.advance(5.0)
    assert core.take() == [Post("a.1", TransferStop(1)), Probe("a.1", 7)]
    core.advance(core.deadline)
    assert core.take() == [Post("a.1", TransferStop(1)), Probe("a.1", 7)]
    assert pool.calls == []
    core.receive("a.1", TransferWithdrawn(1), 7.0)

    assert pool.calls == [("release", ("a.1", 1), (0, 1))]
    assert [post.message.failure for post in core.take()] == [Failure.DEADLINE]
    assert len(core) == 0


def test_what_is_read_here_stops_here():
    """After the deadline, pages are released only when the receiver has stopped reading them."""
    core, pool = incoming(TCP)
    core.receive("a.1", OFFER, 0.0)
    core.take()
    core.advance(5.0)
    assert core.take() == [StopReceiving("a.1", 1)] and pool.calls == []
    core.receive("b.1", ReceiveFailed("a.1", 1, Failure.WITHDRAWN, "stopped"), 5.0)

    assert pool.calls == [("release", ("a.1", 1), (0, 1))]
    assert [post.message.failure for post in core.take()] == [Failure.DEADLINE]


def test_a_dead_sender_is_killed_for_good_before_its_pages_are_free():
    """A sender that was announced dead is killed before its pages are released: it might only be stopped."""
    core, pool = incoming(MAPPED)
    for number in (1, 2):
        core.receive("a.1", attrs.evolve(OFFER, id=number), 0.0)
    core.take()
    core.receive("scheduler", Gone(("a.1",)), 1.0)

    assert core.take()[0] == Kill("a.1", 7)
    assert [call[0] for call in pool.calls] == ["release", "release"]
    core.receive("a.1", attrs.evolve(OFFER, id=3), 2.0)  # was still on its way
    assert [post.message.failure for post in core.take()] == [Failure.PEER_GONE]
    assert len(core) == 0


def test_a_dead_sender_with_rdma_is_waited_for():
    """Pages of a dead RDMA sender are released after QUARANTINE_S: its network card may still write."""
    core, pool = incoming(NIXL)
    core.receive("a.1", OFFER, 0.0)
    core.receive("scheduler", Gone(("a.1",)), 1.0)
    core.advance(QUARANTINE_S)
    assert pool.calls == []
    assert core.deadline == 1.0 + QUARANTINE_S
    core.advance(1.0 + QUARANTINE_S)

    assert pool.calls == [("release", ("a.1", 1), (0, 1))]
    core.check()


def test_the_dead_are_remembered_within_limits():
    """Only GONE_REMEMBERED dead actors are remembered."""
    core, _ = incoming(MAPPED)
    core.receive("scheduler", Gone(tuple(f"a.{i}" for i in range(GONE_REMEMBERED + 10))), 1.0)
    core.check()


def test_an_offer_after_its_own_withdrawal_is_not_granted():
    """An offer that arrives after its withdrawal is not granted."""
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
    """Offers of other pages, without a common path, or for a full pool are refused with the reason."""
    core, _ = incoming(*ways, refuse=refuse)
    core.receive("a.1", offer, 0.0)
    [post] = core.take()
    assert post.message.failure is failure and text in post.message.message
    assert len(core) == 0


def test_transfers_under_way_are_limited():
    """At most receiving_max transfers are under way."""
    core, _ = incoming(MAPPED, receiving_max=1)
    core.receive("a.1", OFFER, 0.0)
    core.take()
    core.receive("a.1", attrs.evolve(OFFER, id=2), 0.0)
    assert [post.message.failure for post in core.take()] == [Failure.RECEIVER_FULL]


def test_a_refused_insert_is_no_arrival():
    """If the pool refuses to commit, the sender gets a refusal, and the pages are released."""
    core, pool = incoming(MAPPED, refuse="commit")
    core.receive("a.1", OFFER, 0.0)
    core.take()
    core.receive("a.1", TransferSent(1), 0.0)

    assert [post.message for post in core.take()] == [
        TransferRefused(1, Failure.REFUSED, "the tokens do not fit")
    ]
    assert pool.calls == [("release", ("a.1", 1), (0, 1))]


def test_what_is_too_old_to_be_remembered_does_not_begin_again():
    """An offer whose number is too old is refused instead of granted again."""
    core, _ = incoming(MAPPED, remembered_max=2)
    for number in (1, 2, 3):
        core.receive("a.1", attrs.evolve(OFFER, id=number), 0.0)
        core.receive("a.1", TransferSent(number), 0.0)
    core.take()
    core.receive("a.1", OFFER, 1.0)

    [post] = core.take()
    assert "too old" in post.message.message and len(core) == 0
