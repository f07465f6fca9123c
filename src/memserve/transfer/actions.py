"""What a transfer core is told by its own process, and the actions that it asks of its shell.

The messages between two shards' cores are in :mod:`memserve.transfer_messages`. For a transfer that succeeds,
the conversation is::

    sender                                 receiver
    TransferOffer      ----------------->  grants pages, or refuses
                       <-----------------  TransferGranted: pages, and the way to them
    writes the pages   =================>  (tcp: the receiver reads them off a socket; otherwise: into its memory)
    TransferSent       ----------------->  inserts
                       <-----------------  TransferArrived: only from now on can the pages be matched

A sender repeats TransferOffer and TransferSent until they are answered. A receiver repeats TransferStop until
it knows that its pages are no longer written to. Every handler is idempotent by (sender, id).
"""

from __future__ import annotations

import attrs

from memserve.actions import Kill
from memserve.identity import ActorId
from memserve.transfer.values import PageTransfer, Piece, Result
from memserve.transfer_messages import (
    Failure,
    Granularity,
    Purpose,
    TransferMessage,
    Way,
)

# ---- to a core, from its own process -------------------------------------------------------------------------


@attrs.frozen
class Order:
    """To the sender's core: begin a transfer.

    ``id`` is higher than every earlier one of this incarnation; ``deadline`` is on the core's clock, in
    seconds. With ``fed`` (by_layer only), only the pieces that :class:`Ready` announces are sent.
    """

    to: ActorId
    id: int
    source: tuple[int, ...]
    deadline: float
    granularity: Granularity = Granularity.AGGREGATED
    fed: bool = False
    purpose: Purpose = attrs.field(factory=Purpose)


@attrs.frozen
class Ready:
    """To the sender's core: these pieces of a fed transfer are final. ``Piece.part`` is the layer."""

    id: int
    pieces: tuple[Piece, ...]


@attrs.frozen
class Withdraw:
    """To the sender's core: the caller no longer wants this transfer."""

    id: int


@attrs.frozen
class Wrote:
    """To the sender's core: its mover has written every byte into the receiver's pages."""

    id: int
    nbytes: int


@attrs.frozen
class WriteFailed:
    """To the sender's core: its mover has stopped and writes no more. Also the answer to StopWriting."""

    id: int
    failure: Failure
    message: str


@attrs.frozen
class Received:
    """To the receiver's core: every byte has arrived intact."""

    sender: ActorId
    id: int


@attrs.frozen
class ReceiveFailed:
    """To the receiver's core: nothing more will be read for this transfer.

    Also the answer to StopReceiving.
    """

    sender: ActorId
    id: int
    failure: Failure
    message: str


# ---- asked of the shell --------------------------------------------------------------------------------------


@attrs.frozen
class Post:
    """Send a message to another shard; it may be lost."""

    to: ActorId
    message: TransferMessage


@attrs.frozen
class Write:
    """Move a transfer's bytes; answered by Wrote or WriteFailed.

    With ``fed``, move pieces as :class:`Feed` brings them.
    """

    transfer: PageTransfer
    way: Way
    deadline: float
    fed: bool


@attrs.frozen
class Feed:
    """Pieces of a fed transfer that may be moved now."""

    id: int
    pieces: tuple[Piece, ...]


@attrs.frozen
class StopWriting:
    """Stop moving bytes; answered by WriteFailed (Wrote if it had finished) once no byte moves any more."""

    id: int


@attrs.frozen
class Forget:
    """The receiver behind this way is gone: release what was kept for it, such as a mapping of its arena."""

    way: Way


@attrs.frozen
class Expect:
    """Let this transfer's bytes in; answered by Received or ReceiveFailed, exactly once."""

    sender: ActorId
    id: int
    pages: tuple[int, ...]
    granularity: Granularity
    deadline: float


@attrs.frozen
class StopReceiving:
    """Let no more bytes in; answered by ReceiveFailed once no byte is written any more."""

    sender: ActorId
    id: int


@attrs.frozen
class Probe:
    """Find out whether a sender on this host still exists; answered by Gone if its process has ended."""

    sender: ActorId
    pid: int


@attrs.frozen
class Report:
    """The result of an Order, exactly once and by its deadline.

    From then on the source pages may be reused.
    """

    result: Result


OutgoingAction = Post | Write | Feed | StopWriting | Forget | Report
IncomingAction = Post | Expect | StopReceiving | Probe | Kill
