"""Every error that memserve raises on purpose. Anything else that escapes is a bug and ends its process."""

from __future__ import annotations

import attrs


class UserError(Exception):
    """Wrong input from the person at the keyboard: shown as its text alone, exit status 2, no traceback."""


class ConfigError(UserError):
    """A configuration that cannot be used. Its text lists every problem found, one a line."""


class PeerError(Exception):
    """Another actor broke the rules of the bus: unknown kind, wrong version, undecodable body."""


class PeerUnreachable(Exception):
    """There is no connection to the named actor: it never joined, or it is gone."""


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
    """A pool call that was refused and changed nothing. ``code`` is one of the constants below."""

    code: str
    message: str

    UNKNOWN_LEASE = "unknown_lease"
    """The lease does not exist: released, expired, or of an earlier incarnation."""
    NOT_OWNER = "not_owner"
    """The lease belongs to another actor."""
    TOO_LARGE = "too_large"
    """More pages than the whole pool has."""
    NO_PAGES = "no_pages"
    """Fewer pages free or evictable at present than were asked for."""
    QUEUE_FULL = "queue_full"
    """Too many callers wait for pages already."""
    NOT_CONTIGUOUS = "not_contiguous"
    """An insert that leaves a gap after what the lease has retired."""
    TOKENS_CHANGED = "tokens_changed"
    """An insert of other tokens at a position that the lease has retired."""
    NOT_WHOLE_PAGES = "not_whole_pages"
    """Tokens that do not fill whole pages."""
    DOES_NOT_FIT = "does_not_fit"
    """An insert of more tokens than the lease's pages hold, or of more or fewer than the addresses named."""
    BAD_COUNT = "bad_count"
    """A number of pages below 0, or a deadline or a granularity that is none."""
    BAD_TIER = "bad_tier"
    """A tier that the shard does not have, or whose pages cannot be leased."""
    FOREIGN_ADDRESS = "foreign_address"
    """An address of another shard."""
    STALE_ADDRESS = "stale_address"
    """An address of an earlier incarnation of the shard."""
    NOT_HELD = "not_held"
    """An address that the caller does not hold: freed before, another's, or of no page at all."""
    RETIRED = "retired"
    """A write to, or a separate free of, a page that is in the index: its bytes may be another request's prefix."""
    MOVING = "moving"
    """The lease's pages are under copy: its next call must wait for the answer to the one that moves them."""
    PINNED = "pinned"
    """A page that others hold at its present address, so that it cannot be moved."""
    NO_PATH = "no_path"
    """A transfer between shards that have no way to each other: one shard, another page size, or pages that do not move."""
    PEER_GONE = "peer_gone"
    """A transfer to a shard that is dead, or was never reached."""
    CUT = "cut"
    """A transfer whose connection broke or stood still."""
    DEADLINE = "deadline"
    """A transfer that was not over in time."""
    CHECKSUM = "checksum"
    """A transfer whose bytes arrived damaged."""
    UNREADABLE = "unreadable"
    """The page's bytes cannot be reached from here: it is on disk, or in another host's memory."""

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"
