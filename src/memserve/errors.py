"""Errors that memserve raises on purpose and that several packages share.

Any other exception that escapes is a bug and ends its process.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import attrs


class UserError(Exception):
    """Wrong input from the person at the keyboard: shown as its text alone, exit status 2, no traceback."""


class ConfigError(UserError):
    """A configuration that cannot be used. Its text lists every problem found, one a line."""


class PeerError(Exception):
    """Another actor broke the protocol of the bus: unknown kind, wrong version, undecodable body."""


class PeerUnreachable(Exception):
    """No connection to the named actor exists: it never joined, or it is gone."""


class PeerFull(Exception):
    """The queue to the named actor is at its limit; the message was not sent."""


@attrs.frozen
class RequestFailed(Exception):
    """One request ended without its tokens.

    ``code`` is stable and machine-readable; ``status`` is the HTTP status it maps to;
    ``retry_after_s`` is set when the same request may succeed later.
    """

    code: str
    message: str
    status: int = 500
    retry_after_s: float | None = None

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


@attrs.frozen
class PoolError(Exception):
    """A pool call that was refused and changed nothing. ``code`` is one of the constants below.

    After CUT, DEADLINE, PEER_GONE or CHECKSUM, a transfer's destination pages may nevertheless have been
    written, and may be for a while yet.
    """

    code: str
    message: str

    UNKNOWN_LEASE = "unknown_lease"
    """The lease does not exist: released, expired, or of an earlier incarnation."""
    NOT_OWNER = "not_owner"
    """The lease belongs to another actor."""
    TOO_LARGE = "too_large"
    """The call needs more pages than the whole pool has."""
    NO_PAGES = "no_pages"
    """The call needs more pages than are free or evictable at present."""
    QUEUE_FULL = "queue_full"
    """Too many callers wait for pages, too many transfers are under way, or a transfer's receiver is full."""
    NOT_CONTIGUOUS = "not_contiguous"
    """An insert that leaves a gap after the tokens that the lease has retired."""
    TOKENS_CHANGED = "tokens_changed"
    """An insert of different tokens at a position that the lease has retired."""
    NOT_WHOLE_PAGES = "not_whole_pages"
    """Tokens that do not fill whole pages."""
    DOES_NOT_FIT = "does_not_fit"
    """An insert of more tokens than the lease's pages hold, an insert or transfer in which the numbers of tokens,
    pages and addresses do not match, a write beyond its page, or more than 1 MiB of private data."""
    BAD_COUNT = "bad_count"
    """A number of pages below 0, or an invalid deadline or granularity."""
    BAD_TIER = "bad_tier"
    """A tier that the shard does not have, or whose pages cannot be leased."""
    FOREIGN_ADDRESS = "foreign_address"
    """An address of another shard."""
    STALE_ADDRESS = "stale_address"
    """An address of an earlier incarnation of the shard."""
    NOT_HELD = "not_held"
    """An address that the caller does not hold: freed before, held by another, or not a page."""
    RETIRED = "retired"
    """A write to, or a separate free of, an indexed page, whose bytes may be another request's prefix."""
    MOVING = "moving"
    """The lease's pages are being copied: its next call must wait until the copying call is answered."""
    PINNED = "pinned"
    """A page that others hold at its present address, so it cannot be moved."""
    NO_PATH = "no_path"
    """A transfer between shards without a path: one shard, another page size, or pages that do not move."""
    PEER_GONE = "peer_gone"
    """A transfer to a shard that is dead, or was never reached."""
    CUT = "cut"
    """A transfer whose connection broke or stalled."""
    DEADLINE = "deadline"
    """A transfer that did not finish in time."""
    CHECKSUM = "checksum"
    """A transfer whose bytes arrived damaged."""
    UNREADABLE = "unreadable"
    """The page's bytes cannot be reached from here: it is on disk, on a GPU, or in another host's memory."""

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


@contextmanager
def unwrapped() -> Iterator[None]:
    """Let the only exception of a group, as nurseries make them, come out of the block by itself."""
    try:
        yield
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
            (error,) = error.exceptions
        raise error from error.__cause__  # a group of several as it is
