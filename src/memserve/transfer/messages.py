"""What two shards' transfer cores say to each other, and what they and their shells tell one another.

The conversation, for a transfer that succeeds::

    sender                                 receiver
    TransferOffer      ----------------->  grants pages, or refuses
                       <-----------------  TransferGranted: pages, and the way to them
    writes the pages   =================>  (mapped, nixl: into its memory; tcp: it reads them off a socket)
    TransferSent       ----------------->  inserts
                       <-----------------  TransferArrived: now, and not before, the pages can be matched

A sender repeats TransferOffer and TransferSent until they are answered; a receiver repeats TransferStop until it
knows that nobody writes to its pages any more. Every handler is idempotent by (sender, id).
"""

from __future__ import annotations

import attrs

from memserve.actions import Kill
from memserve.messages import ActorId
from memserve.transfer.values import Failure, Granularity, Piece, Result, Transfer, Way

# ---- between shards ------------------------------------------------------------------------------------------


@attrs.frozen
class TransferOffer:
    """Take these pages. Repeated until TransferGranted or TransferRefused."""

    id: int
    pages: int
    page_bytes: int
    layers: int
    granularity: Granularity
    host: str
    """Identity of the sender's host: a mapped way leads to the same one only."""
    pid: int
    """So that the receiver can end a dead sender that may only sleep, before it uses the pages for others."""
    paths: tuple[str, ...]
    """Paths that the sender can take."""
    remaining_s: float
    """Seconds until the sender gives up. A duration, because the clocks of two hosts differ."""
    destination: tuple[int, ...] = ()
    """Pages that the sender was granted before; empty: the receiver allocates."""
    scope: str = ""
    tokens: bytes = b""
    """Packed tokens to insert with the pages (``transfer_with_insert``); empty: nothing is inserted."""
    private: bytes = b""
    """The caller's own data, handed to the receiver's landing untouched."""


@attrs.frozen
class TransferGranted:
    """These pages are the transfer's until it ends."""

    id: int
    pages: tuple[int, ...]
    way: Way


@attrs.frozen
class TransferSent:
    """Every byte is in the granted pages and the sender writes no more. Repeated until answered."""

    id: int


@attrs.frozen
class TransferArrived:
    """The receiver has every byte, and has inserted the tokens if there were any."""

    id: int


@attrs.frozen
class TransferRefused:
    """The receiver will not take the transfer, or not any more."""

    id: int
    failure: Failure
    message: str


@attrs.frozen
class TransferStop:
    """Write no more, and say so (TransferWithdrawn). Repeated until answered."""

    id: int


@attrs.frozen
class TransferWithdrawn:
    """The sender writes no more for this transfer, and never will."""

    id: int


ToReceiver = TransferOffer | TransferSent | TransferWithdrawn
ToSender = TransferGranted | TransferArrived | TransferRefused | TransferStop
TransferMessage = ToReceiver | ToSender


# ---- told to a core by its own process -----------------------------------------------------------------------


@attrs.frozen
class Order:
    """To the sender's core: a transfer to begin. ``destination`` empty: the receiver allocates.

    ``id`` is higher than every earlier one of this incarnation; ``deadline`` is on the core's clock, in seconds.
    With ``fed`` (by_layer only) nothing is sent but what :class:`Ready` announces.
    """

    to: ActorId
    id: int
    source: tuple[int, ...]
    deadline: float
    granularity: Granularity = Granularity.AGGREGATED
    fed: bool = False
    destination: tuple[int, ...] = ()
    scope: str = ""
    tokens: bytes = b""
    private: bytes = b""


@attrs.frozen
class Ready:
    """To the sender's core: these pieces of a fed transfer are final. ``Piece.part`` is the layer."""

    id: int
    pieces: tuple[Piece, ...]


@attrs.frozen
class Withdraw:
    """To the sender's core: nobody wants this transfer any more."""

    id: int


@attrs.frozen
class Wrote:
    """To the sender's core: its mover has every byte in the receiver's pages."""

    id: int
    nbytes: int


@attrs.frozen
class WriteFailed:
    """To the sender's core: its mover has stopped for good. Also the answer to StopWriting."""

    id: int
    failure: Failure
    message: str


@attrs.frozen
class Received:
    """To the receiver's core: every byte came in and was right."""

    sender: ActorId
    id: int


@attrs.frozen
class ReceiveFailed:
    """To the receiver's core: nothing more will be read for this transfer. Also the answer to StopReceiving."""

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
    """Move a transfer's bytes; answered by Wrote or WriteFailed. With ``fed``, as :class:`Feed` brings them."""

    transfer: Transfer
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
    """Stop moving; answered by WriteFailed (or Wrote, if it was done already) once no byte moves any more."""

    id: int


@attrs.frozen
class Forget:
    """The receiver behind this way is gone: let go of what was kept for it, such as a mapping of its arena."""

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
    """Let no more in; answered by ReceiveFailed once no byte is written any more."""

    sender: ActorId
    id: int


@attrs.frozen
class Report:
    """The result of an Order, exactly once and by its deadline. The source pages are free to be used again."""

    result: Result


OutgoingAction = Post | Write | Feed | StopWriting | Forget | Report
IncomingAction = Post | Expect | StopReceiving | Kill
