"""What two shards say to each other when pages move between them, and the words that these messages are made of.

The conversation is told in :mod:`memserve.transfer.actions`, with what each side asks of its own process.
"""

from __future__ import annotations

import enum

import attrs

from memserve.identity import ActorId


class Granularity(enum.StrEnum):
    """In what portions a transfer's pages move; see the module's table."""

    AGGREGATED = "aggregated"
    BY_LAYER = "by_layer"
    BY_REQUEST = "by_request"


class Failure(enum.StrEnum):
    """Why a transfer did not happen. Its destination pages were never reported complete."""

    RECEIVER_FULL = "receiver_full"
    """The receiver has no pages, or as many transfers under way as it allows. Later may do."""
    PEER_GONE = "peer_gone"
    """The other shard is dead, or nobody listens where it was announced."""
    CUT = "cut"
    """The connection broke or stood still."""
    DEADLINE = "deadline"
    """Not finished in time. When only the acknowledgement is late, the receiver may have the pages after all."""
    REFUSED = "refused"
    """One side holds the other's request for wrong: another layout, a stale token, an unknown page or transfer."""
    CHECKSUM = "checksum"
    """Bytes arrived damaged."""
    WITHDRAWN = "withdrawn"
    """The sender's own caller gave it up."""


@attrs.frozen
class Way:
    """How a sender reaches one receiver's arena: announced by the receiver with the pages it grants."""

    path: str
    """``mapped``, ``tcp`` or ``nixl``."""
    address: str
    """mapped: the arena's socket; tcp: ``host:port``; nixl: the arena's first byte in the receiver, in hex."""
    data: bytes = b""
    """tcp: the receiver's token; nixl: its agent's metadata."""


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
    """Addresses in a lease of ``owner``'s at the receiver; empty: the receiver allocates."""
    into: int = 0
    """That lease."""
    owner: ActorId = ActorId("")
    """Whose the pages are at the receiver. Nobody: a Pull asked for them, and ``private`` is its id in 8 bytes."""
    caller: ActorId = ActorId("")
    """Whose call this is: who is told, at the sender, how it ended."""
    scope: str = ""
    tokens: bytes = b""
    """Packed tokens to insert with the pages (``transfer_with_insert``); empty: nothing is inserted."""
    private: bytes = b""
    """The caller's own data, given to ``owner`` with the pages."""


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
    lease: int = 0
    """That holds the pages there."""


@attrs.frozen
class TransferRefused:
    """The receiver will not take the transfer, or not any more."""

    id: int
    failure: Failure
    message: str
    code: str = ""
    """Of the PoolError, where the receiver's pool refused the pages."""


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


# ---- asked by a receiver -------------------------------------------------------------------------------------


@attrs.frozen
class Pull:
    """From a shard that lacks pages to one that has them: offer me these. Repeated until a TransferOffer or PullRefused.

    Known by (sender, id): a repeat begins no second transfer. The offer's ``private`` is ``id``, in 8 bytes.
    """

    id: int
    scope: str
    tokens: bytes
    """Packed, from position 0."""
    first_page: int
    """The pages before it are there already."""
    pages: int
    """At most so many from there on; fewer are offered where fewer are held."""
    remaining_s: float
    """Seconds until the asker gives up."""
    lease: int = 0
    """Take them from this lease, full or not; 0, or a lease that has ended: what the index holds, in whole pages."""
    owner: ActorId = ActorId("")
    """Of the lease."""


@attrs.frozen
class PullRefused:
    """Nothing, or nothing more, will come for this Pull."""

    id: int
    failure: Failure
    message: str
