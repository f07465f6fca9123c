"""The sender's side of transfers: offer, have the bytes moved, say that they are sent, report one result.

What each state waits for::

    OFFERING   TransferGranted or TransferRefused; the offer is repeated
    WRITING    the mover's Wrote or WriteFailed
    SENT       TransferArrived or TransferRefused; TransferSent is repeated
    STOPPING   the mover to stop. The result is already reported; TransferWithdrawn is sent only afterwards

The receiver relies on TransferWithdrawn and TransferSent to mean that no byte moves any more.
"""

from __future__ import annotations

import enum
import math

import attrs

from memserve.identity import ActorId
from memserve.messages import Gone
from memserve.transfer.actions import (
    Feed,
    Forget,
    Order,
    OutgoingAction,
    Post,
    Ready,
    Report,
    StopWriting,
    Withdraw,
    Write,
    WriteFailed,
    Wrote,
)
from memserve.transfer.values import Coverage, Geometry, PageTransfer, Piece, TransferDone, TransferFailed
from memserve.transfer_messages import (
    Failure,
    Granularity,
    ToSender,
    TransferArrived,
    TransferGranted,
    TransferMessage,
    TransferOffer,
    TransferRefused,
    TransferSent,
    TransferStop,
    TransferWithdrawn,
    Way,
)

REPEAT_S = 0.2
"""First pause before an unanswered message is repeated; it doubles up to REPEAT_MAX_S."""
REPEAT_MAX_S = 2.0


class _State(enum.Enum):
    OFFERING = enum.auto()
    WRITING = enum.auto()
    SENT = enum.auto()
    STOPPING = enum.auto()


@attrs.define(eq=False)
class _Sending:
    order: Order
    coverage: Coverage
    """The pieces of a fed transfer that were announced so far."""
    state: _State = _State.OFFERING
    announced: list[Piece] = attrs.field(factory=list)
    """Pieces announced before the grant, while no mover runs that could send them."""
    nbytes: int = 0
    pages: tuple[int, ...] = ()
    """Pages at the receiver, once it has granted them."""
    repeat_at: float = math.inf
    pause_s: float = REPEAT_S


@attrs.define
class Outgoing:
    """All transfers that this shard sends.

    Verbs: receive, advance, take, deadline, check. ``receive`` takes :data:`ToSender` from other shards,
    Gone, and Order, Ready, Withdraw, Wrote, WriteFailed from this one.
    """

    me: ActorId
    geometry: Geometry
    host: str
    pid: int
    paths: tuple[str, ...]
    """Paths that this process can take."""
    sending_max: int = 64
    """Maximum number of transfers under way; one more is refused at once."""
    _sending: dict[int, _Sending] = attrs.field(factory=dict, init=False)
    _ways: dict[ActorId, Way] = attrs.field(factory=dict, init=False)
    """The last way to each living receiver: a dead one's arena stays mapped until Forget names its way."""
    _last_id: int = attrs.field(default=0, init=False)
    _actions: list[OutgoingAction] = attrs.field(factory=list, init=False)

    # ---- verbs -----------------------------------------------------------------------------------------------

    @property
    def deadline(self) -> float:
        """When :meth:`advance` must be called next; infinity when nothing is under way."""
        return min(
            (min(one.repeat_at, _gives_up_at(one)) for one in self._sending.values()), default=math.inf
        )

    def receive(
        self,
        sender: ActorId,
        message: ToSender | Gone | Order | Ready | Withdraw | Wrote | WriteFailed,
        now: float,
    ) -> None:
        """Handle one message. A late, repeated or unrelated one changes no state."""
        match message:
            case Order():
                self._begin(message, now)
            case Ready(number, pieces):
                self._announce(number, pieces)
            case Withdraw(number):
                self._give_up(number, Failure.WITHDRAWN, "its caller withdrew it")
            case Wrote(number, nbytes):
                self._wrote(number, nbytes, now)
            case WriteFailed(number, failure, text):
                self._write_failed(number, failure, text)
            case Gone(actors):
                self._end_all_of(frozenset(actors))
            case _:
                self._hear(sender, message, now)

    def advance(self, now: float) -> None:
        """Give up transfers past their deadline, and repeat unanswered messages."""
        for number, one in list(self._sending.items()):
            if now >= _gives_up_at(one):
                what = f"not finished in time, {one.state.name.lower()} was as far as it came"
                self._give_up(number, Failure.DEADLINE, what)
            elif now >= one.repeat_at:
                self._say(one, now)

    def take(self) -> list[OutgoingAction]:
        """The actions to perform; each is returned once."""
        actions, self._actions = self._actions, []
        return actions

    def check(self) -> None:
        """Assert every invariant."""
        assert len(self._sending) <= self.sending_max, (
            f"{len(self._sending)} are sent, {self.sending_max} may"
        )
        for number, one in self._sending.items():
            assert number == one.order.id <= self._last_id
            waits = one.state in (_State.OFFERING, _State.SENT)
            assert math.isfinite(one.repeat_at) == waits, f"transfer {number} is {one.state}"
            assert not one.announced or one.state is _State.OFFERING

    def __len__(self) -> int:
        """Transfers under way, including those that only wait for their mover to stop."""
        return len(self._sending)

    # ---- asked by this shard ---------------------------------------------------------------------------------

    def _begin(self, order: Order, now: float) -> None:
        if order.id <= self._last_id:
            return  # a repeat
        self._last_id = order.id
        wrong = self._wrong(order)
        if wrong:
            self._report(TransferFailed(order.id, Failure.REFUSED, wrong))
            return
        parts = self.geometry.parts(order.granularity)
        one = self._sending[order.id] = _Sending(order, Coverage(len(order.source), parts))
        self._say(one, now)

    def _wrong(self, order: Order) -> str:
        """Why an order cannot begin; empty when it can."""
        if len(self._sending) >= self.sending_max:
            return f"{len(self._sending)} transfers are under way already"
        if order.fed and order.granularity is not Granularity.BY_LAYER:
            return f"only by_layer can be fed, not {order.granularity}"
        pages = tuple(range(len(order.source)))  # a destination that is not known yet: distinct placeholders
        try:
            PageTransfer(self.me, order.id, order.source, order.purpose.destination or pages)
        except ValueError as error:
            return str(error)
        return ""

    def _announce(self, number: int, pieces: tuple[Piece, ...]) -> None:
        one = self._sending.get(number)
        if one is None or one.state not in (_State.OFFERING, _State.WRITING) or not one.order.fed:
            return  # it has ended, or takes no pieces
        try:
            new = tuple(piece for piece in pieces if one.coverage.add(piece))
        except ValueError as error:
            self._give_up(number, Failure.REFUSED, str(error))
            return
        if one.state is _State.OFFERING:
            one.announced += new
        elif new:
            self._actions.append(Feed(number, new))

    # ---- the receiver's answers ------------------------------------------------------------------------------

    def _hear(self, sender: ActorId, message: ToSender, now: float) -> None:
        one = self._sending.get(message.id)
        if one is not None and one.order.to != sender:
            return  # not its transfer
        match message:
            case TransferGranted() | TransferStop() if one is None:
                self._post(sender, TransferWithdrawn(message.id))  # it has ended: nothing is written here
            case TransferGranted(_, pages, way):
                self._granted(message.id, pages, way, now)
            case TransferStop(number):
                self._give_up(number, Failure.DEADLINE, "the receiver's deadline passed first")
            case TransferRefused(number, failure, text, code):
                self._give_up(number, failure, text, code)
            case TransferArrived(number, lease):
                self._arrived(number, lease)

    def _granted(self, number: int, pages: tuple[int, ...], way: Way, now: float) -> None:
        one = self._sending[number]
        if one.state is not _State.OFFERING:
            return  # a repeat
        order = one.order
        if now >= order.deadline:
            self._give_up(number, Failure.DEADLINE, "the grant came after the deadline")
            return
        try:
            transfer = PageTransfer(self.me, number, order.source, pages, order.granularity)
        except ValueError as error:
            self._give_up(number, Failure.REFUSED, f"the receiver's grant is wrong: {error}")
            return
        one.state, one.repeat_at, one.pages = _State.WRITING, math.inf, pages
        self._ways[order.to] = way
        self._actions.append(Write(transfer, way, order.deadline, order.fed))
        if one.announced:
            self._actions.append(Feed(number, tuple(one.announced)))
            one.announced.clear()

    def _arrived(self, number: int, lease: int) -> None:
        """The pages have arrived.

        Over tcp the receiver knows before the sender's mover, which then ends by itself.
        """
        one = self._sending.get(number)
        if one is None or one.state not in (_State.SENT, _State.WRITING):
            return
        nbytes = len(one.order.source) * self.geometry.page_bytes
        self._report(TransferDone(number, nbytes, one.pages, lease))
        if one.state is _State.WRITING:
            one.state = _State.STOPPING
        else:
            del self._sending[number]

    def _end_all_of(self, actors: frozenset[ActorId]) -> None:
        for number, one in list(self._sending.items()):
            if one.order.to in actors:
                self._give_up(number, Failure.PEER_GONE, f"{one.order.to} is gone")
        for actor in actors & self._ways.keys():
            self._actions.append(Forget(self._ways.pop(actor)))

    # ---- the mover's answers ---------------------------------------------------------------------------------

    def _wrote(self, number: int, nbytes: int, now: float) -> None:
        one = self._sending.get(number)
        if one is None:
            return
        if one.state is _State.STOPPING:
            self._stopped(number)
        elif one.state is _State.WRITING:
            one.state, one.nbytes, one.pause_s = _State.SENT, nbytes, REPEAT_S
            self._say(one, now)

    def _write_failed(self, number: int, failure: Failure, text: str) -> None:
        one = self._sending.get(number)
        if one is None:
            return
        if one.state is not _State.STOPPING:
            self._report(TransferFailed(number, failure, text))
        self._stopped(number)

    def _stopped(self, number: int) -> None:
        """Say that nothing is written any more. If the message is lost, the receiver will ask."""
        one = self._sending.pop(number)
        self._post(one.order.to, TransferWithdrawn(number))

    # ---- ends ------------------------------------------------------------------------------------------------

    def _give_up(self, number: int, failure: Failure, text: str, code: str = "") -> None:
        one = self._sending.get(number)
        if one is None or one.state is _State.STOPPING:
            return
        if one.state is _State.WRITING:
            # Stop the mover before the report: once the result is out, the source pages may change under it.
            self._actions.append(StopWriting(number))
            one.state = _State.STOPPING
        else:
            self._stopped(number)
        self._report(TransferFailed(number, failure, text, code))

    def _report(self, result: TransferDone | TransferFailed) -> None:
        self._actions.append(Report(result))

    # ---- messages --------------------------------------------------------------------------------------------

    def _say(self, one: _Sending, now: float) -> None:
        """Send, or repeat, the message whose answer this state waits for."""
        order = one.order
        if one.state is _State.SENT:
            self._post(order.to, TransferSent(order.id))
        else:
            self._post(order.to, self._offer(order, now))
        one.repeat_at = now + one.pause_s
        one.pause_s = min(2 * one.pause_s, REPEAT_MAX_S)

    def _offer(self, order: Order, now: float) -> TransferOffer:
        return TransferOffer(
            id=order.id,
            pages=len(order.source),
            page_bytes=self.geometry.page_bytes,
            layers=self.geometry.layers,
            granularity=order.granularity,
            host=self.host,
            pid=self.pid,
            paths=self.paths,
            remaining_s=order.deadline - now,
            purpose=order.purpose,
        )

    def _post(self, to: ActorId, message: TransferMessage) -> None:
        self._actions.append(Post(to, message))


def _gives_up_at(one: _Sending) -> float:
    return math.inf if one.state is _State.STOPPING else one.order.deadline
