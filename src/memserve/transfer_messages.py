"""Messages between two shards that move pages, and the values that these messages contain.

:mod:`memserve.transfer.actions` describes the conversation, and what each side asks of its own process.
"""

from __future__ import annotations

import enum

import attrs

from memserve.identity import ActorId


class Granularity(enum.StrEnum):
    """The portions in which a transfer's pages move; see the table in :mod:`memserve.transfer.values`."""

    AGGREGATED = "aggregated"
    BY_LAYER = "by_layer"
    BY_REQUEST = "by_request"


class Failure(enum.StrEnum):
    """Why a transfer failed. Its destination pages were never reported complete."""

    RECEIVER_FULL = "receiver_full"
    """There is no room for the transfer. A later attempt may succeed.

    The receiver has as many transfers under way as it allows, or the shard that serves a Pull has no room to
    bring the pages in.
    """
    PEER_GONE = "peer_gone"
    """The other shard is dead, or no process listens at its announced endpoint."""
    CUT = "cut"
    """The connection broke or stalled."""
    DEADLINE = "deadline"
    """Not finished in time.

    If only the acknowledgement is late, the receiver may have the pages nevertheless.
    """
    REFUSED = "refused"
    """One side considers the other's request invalid.

    Examples are another page layout, a stale token, and an unknown page or transfer.
    """
    CHECKSUM = "checksum"
    """The bytes arrived damaged."""
    WITHDRAWN = "withdrawn"
    """The sender's own caller withdrew the transfer."""


@attrs.frozen
class Way:
    """How a sender reaches a receiver's arena; the receiver announces it with the pages that it grants."""

    path: str
    """``mapped``, ``cuda``, ``tcp`` or ``nixl``."""
    address: str
    """For mapped, the arena's socket; for tcp, ``host:port``.

    For nixl, the address of the arena's first byte in the receiver, in hex.
    """
    data: bytes = b""
    """For tcp, the receiver's token; for nixl, its agent's metadata."""


@attrs.frozen
class Purpose:
    """What the pages of a transfer are for. The two transfer cores pass it on as it is."""

    destination: tuple[int, ...] = ()
    """Addresses in a lease of ``owner`` at the receiver; if empty, the receiver allocates pages."""
    into: int = 0
    """Lease of ``owner`` that holds ``destination``."""
    owner: ActorId = ActorId("")
    """Owner of the pages at the receiver.

    If empty, a Pull asked for the pages, and ``private`` is the Pull's ID in 8 bytes.
    """
    caller: ActorId = ActorId("")
    """Actor whose call this is; the sender's shard reports to it how the transfer ended."""
    scope: str = ""
    tokens: bytes = b""
    """Packed tokens to insert with the pages (``transfer_with_insert``); empty inserts nothing."""
    private: bytes = b""
    """The caller's own data, delivered to ``owner`` with the pages."""


@attrs.frozen
class TransferOffer:
    """Ask the receiver to take these pages. Repeated until TransferGranted or TransferRefused."""

    id: int
    pages: int
    page_bytes: int
    layers: int
    granularity: Granularity
    host: str
    """Identity of the sender's host: a mapped way works only on the same host."""
    pid: int
    """Process ID of the sender.

    With it the receiver can kill a sender that was declared dead but may only be paused, before it uses the
    pages for others.
    """
    paths: tuple[str, ...]
    """Paths that the sender can use."""
    remaining_s: float
    """Seconds until the sender gives up. It is a duration because the clocks of two hosts differ."""
    purpose: Purpose = attrs.field(factory=Purpose)


@attrs.frozen
class TransferGranted:
    """These pages belong to the transfer until it ends."""

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
    """Lease that holds the pages at the receiver."""


@attrs.frozen
class TransferRefused:
    """The receiver does not take the transfer, or gives it up."""

    id: int
    failure: Failure
    message: str
    code: str = ""
    """Code of the PoolError, if the receiver's pool refused the pages."""


@attrs.frozen
class TransferStop:
    """Ask the sender to stop writing and to confirm it (TransferWithdrawn). Repeated until answered."""

    id: int


@attrs.frozen
class TransferWithdrawn:
    """The sender has stopped writing for this transfer, and will not start again."""

    id: int


ToReceiver = TransferOffer | TransferSent | TransferWithdrawn
ToSender = TransferGranted | TransferArrived | TransferRefused | TransferStop
TransferMessage = ToReceiver | ToSender


# ---- requests of a receiver -------------------------------------------------------------------------------


@attrs.frozen
class Pull:
    """Ask a shard to offer pages that are missing here. Repeated until a TransferOffer or PullRefused.

    Identified by (sender, id): a repeat does not begin a second transfer. The private data of the
    offer's purpose is ``id`` in 8 bytes.
    """

    id: int
    scope: str
    tokens: bytes
    """Packed tokens from position 0."""
    first_page: int
    """First page that is wanted; the asker has the pages before it."""
    pages: int
    """Maximum number of pages from ``first_page`` on; fewer are offered if fewer are held."""
    remaining_s: float
    """Seconds until the asker gives up."""
    lease: int = 0
    """Lease to take the pages from, full or not.

    If it is 0, or the lease has ended, whole pages are taken from the index.
    """
    owner: ActorId = ActorId("")
    """Owner of ``lease``."""


@attrs.frozen
class PullRefused:
    """No pages, or no further pages, will come for this Pull."""

    id: int
    failure: Failure
    message: str
