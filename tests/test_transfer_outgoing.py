"""The sender's core, step by step: what it sends, repeats and reports, and when it confirms that it has stopped."""

from __future__ import annotations

import attrs
import pytest

from memserve.messages import Gone
from memserve.transfer.actions import (
    Forget,
    Order,
    Post,
    Ready,
    Report,
    StopWriting,
    Withdraw,
    Write,
    WriteFailed,
    Wrote,
)
from memserve.transfer.outgoing import Outgoing
from memserve.transfer.values import Piece, TransferDone, TransferFailed
from memserve.transfer_messages import (
    Failure,
    Granularity,
    Purpose,
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

MAPPED = Way("mapped", "m")


ORDER = Order("b.1", 1, (4, 5), 10.0)


def outgoing(**limits):
    """A sender's core."""
    return Outgoing("a.1", GEOMETRY, "host", 7, ("mapped", "tcp"), **limits)


def started(core, order=ORDER):
    """Begin a transfer and have it granted; returns the actions of the grant."""
    core.receive("a.1", order, 0.0)
    core.take()
    core.receive("b.1", TransferGranted(order.id, (0, 1), MAPPED), 0.0)
    return core.take()


def messages(core):
    """The messages that a core posts now."""
    return [action.message for action in core.take() if isinstance(action, Post)]


def reports(core):
    """The results that a core reports now."""
    return [action.result for action in core.take() if isinstance(action, Report)]


def test_it_sends_and_asks_until_it_is_answered():
    """Offers and completions are repeated until they are answered."""
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
    core.receive("b.1", TransferArrived(1, 7), 3.0)

    assert reports(core) == [TransferDone(1, 2 * GEOMETRY.page_bytes, (0, 1), 7)]
    assert len(core) == 0


def test_stopped_is_said_when_it_is_true_and_not_before():
    """The sender confirms a stop only when its mover has stopped: until then pages are being written."""
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
    """At the deadline the failure is reported, even if the mover does not stop."""
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
    """Every way to end is reported exactly once, in every state."""
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


def test_what_is_kept_for_a_receiver_goes_with_it():
    """When a receiver is gone, what is kept for it is forgotten."""
    core = outgoing()
    started(core)
    core.receive("a.1", Wrote(1, 8), 1.0)
    core.receive("b.1", TransferArrived(1), 1.0)
    core.take()
    core.receive("scheduler", Gone(("b.1", "c.1")), 2.0)
    assert core.take() == [Forget(MAPPED)]
    core.receive("scheduler", Gone(("b.1",)), 3.0)
    assert core.take() == []


def test_a_mover_that_fails_ends_it():
    """A mover that fails ends the transfer, and the receiver is informed."""
    core = outgoing()
    started(core)
    core.receive("a.1", WriteFailed(1, Failure.CUT, "the connection broke"), 1.0)
    assert core.take() == [
        Report(TransferFailed(1, Failure.CUT, "the connection broke")),
        Post("b.1", TransferWithdrawn(1)),
    ]


def test_layers_are_passed_on_as_they_come_and_kept_until_there_is_somewhere_to_send_them():
    """Layers that are ready before the grant are kept and then sent, later ones at once."""
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
        (attrs.evolve(ORDER, source=()), "at least 1"),
        (attrs.evolve(ORDER, purpose=Purpose((1,))), "from 2 pages to 1"),
        (attrs.evolve(ORDER, purpose=Purpose((1, 1))), "twice"),
        (attrs.evolve(ORDER, fed=True), "only by_layer"),
    ],
)
def test_a_wrong_order_is_refused_here(order, text):
    """A wrong order is refused by the sender itself."""
    core = outgoing()
    core.receive("a.1", order, 0.0)
    [report] = core.take()
    assert report.result.failure is Failure.REFUSED and text in report.result.message


def test_a_piece_outside_the_transfer_ends_it():
    """A piece outside of the transfer's pages ends it."""
    core = outgoing()
    started(core, attrs.evolve(ORDER, granularity=Granularity.BY_LAYER, fed=True))
    core.receive("a.1", Ready(1, (Piece(1, 2, 0),)), 0.1)
    assert [one.failure for one in reports(core)] == [Failure.REFUSED]


def test_too_many_at_a_time_and_wrong_grants_are_refused():
    """More than sending_max transfers are refused; grants from others are ignored, and invalid ones end the transfer."""
    core = outgoing(sending_max=1)
    core.receive("a.1", ORDER, 0.0)
    core.take()
    core.receive("a.1", attrs.evolve(ORDER, id=2), 0.0)
    assert [one.failure for one in reports(core)] == [Failure.REFUSED]
    core.receive("c.1", TransferGranted(1, (0, 1), MAPPED), 0.0)  # not whom it was offered to
    assert core.take() == []
    core.receive("b.1", TransferGranted(1, (0, 0), MAPPED), 0.0)
    assert [one.failure for one in reports(core)] == [Failure.REFUSED]


def test_a_grant_that_comes_too_late_writes_nothing():
    """After a grant at the deadline nothing is written: the pages may belong to another."""
    core = outgoing()
    core.receive("a.1", ORDER, 0.0)
    core.take()
    core.receive("b.1", TransferGranted(1, (0, 1), MAPPED), ORDER.deadline)
    actions = core.take()
    assert not [one for one in actions if isinstance(one, Write)]
    (report,) = [one for one in actions if isinstance(one, Report)]
    assert report.result.failure is Failure.DEADLINE
